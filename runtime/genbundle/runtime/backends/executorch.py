"""ExecuTorch with the XNNPACK delegate: one .pte whose methods are the programs and whose decoder keeps its own state."""

import importlib.metadata
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from genbundle.bundles import Bundle, EngineError, MissingExtraError
from genbundle.runtime.program import Tensor


def open_backend(bundle: Bundle, *, device: str | None, threads: int | None) -> "ExecuTorchBackend":
    """Open an `xnnpack` bundle, which runs on the CPU.

    threads: ExecuTorch 1.4 makes one thread pool for the process, a thread for each fast core, and its Python bindings
    can't resize it (pybindings.pyi has no setter), so a number given here has no effect.
    """
    if device not in (None, "cpu"):
        raise EngineError(f"unknown device {device!r}: an xnnpack bundle runs on 'cpu'")
    _check_version(bundle)
    try:
        with _captured_stderr(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Registers the operators torch.ops.llama.* (update_cache, custom_sdpa) that the decoders call.
            import executorch.extension.llm.custom_ops.custom_ops
            from executorch.runtime import Runtime
    except ImportError:
        raise _missing() from None
    return ExecuTorchBackend(Runtime.get(), bundle)


class ExecuTorchBackend:
    """A bundle's methods, loaded one by one as they are needed; each .pte file is opened once."""

    device = "cpu"

    def __init__(self, runtime: Any, bundle: Bundle):
        self._runtime, self._bundle = runtime, bundle
        self._files: dict[str, Any] = {}
        self._methods: dict[tuple[str, str], Any] = {}

    def program(self, name: str) -> "ExecuTorchProgram":
        """The program of that name, its method loaded when it is first asked for.

        Programs that share a method share its state, which a decoder keeps between calls.
        """
        entry = self._bundle.manifest.program(name)
        method = entry.method or "forward"
        if (entry.file, method) not in self._methods:
            self._methods[entry.file, method] = self._load(entry.file, method)
        inputs = tuple(item.name for item in entry.inputs)
        outputs = tuple(item.name for item in entry.outputs)
        return ExecuTorchProgram(name, self._methods[entry.file, method], inputs, outputs)

    def to_numpy(self, tensor: Tensor) -> np.ndarray:
        """A torch tensor (or a numpy array) as a numpy array over the same memory."""
        return tensor if isinstance(tensor, np.ndarray) else tensor.numpy()

    def _load(self, file: str, method: str) -> Any:
        path, log = self._bundle.file(file), ""
        try:
            with _captured_stderr() as read_log:
                try:
                    if file not in self._files:
                        self._files[file] = self._runtime.load_program(path)
                    return self._files[file].load_method(method)
                finally:
                    log = read_log()
        except (RuntimeError, KeyError) as error:
            detail = f"{error} {log}".strip()
            raise EngineError(
                f"{self._bundle.path}: ExecuTorch can't load the method {method!r} of {file}: {detail}: "
                "the file is damaged (`genbundle verify` tells) or needs operators that this ExecuTorch lacks"
            ) from error


class ExecuTorchProgram:
    """One method: numpy arrays or torch tensors in by name, torch tensors out by name."""

    def __init__(self, name: str, method: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]):
        self.name, self._method, self._inputs, self._outputs = name, method, inputs, outputs

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the method; EngineError when it fails."""
        try:
            results = self._method.execute([_to_torch(inputs[name]) for name in self._inputs])
        except RuntimeError as error:
            shapes = {name: list(inputs[name].shape) for name in self._inputs}
            raise EngineError(f"ExecuTorch failed in the program {self.name!r} on inputs of shapes {shapes}: {error}") from error
        return dict(zip(self._outputs, results, strict=True))


def _to_torch(tensor: Tensor) -> Any:
    if not isinstance(tensor, np.ndarray):
        return tensor.contiguous()
    import torch

    # torch shares numpy's memory and warns about read-only arrays (broadcast ones, for instance): those are copied.
    return torch.from_numpy(np.require(tensor, requirements=("C", "W")))


def _check_version(bundle: Bundle) -> None:
    """EngineError when the .pte was written for another minor version: its operators and layout may differ."""
    try:
        installed = importlib.metadata.version("executorch")
    except importlib.metadata.PackageNotFoundError:
        raise _missing() from None
    written = bundle.manifest.packages.get("executorch")
    if written is not None and written.split(".")[:2] != installed.split(".")[:2]:
        raise EngineError(
            f"{bundle.path}: its .pte was built for ExecuTorch {written}, and {installed} is installed: "
            f"pip install 'executorch=={written}', or build the bundle again with {installed}"
        )


def _missing() -> MissingExtraError:
    return MissingExtraError("running an 'xnnpack' bundle", "executorch", "executorch")


@contextmanager
def _captured_stderr() -> Iterator[Any]:
    """Hold back what ExecuTorch's C++ logs on stderr (five lines about the processor on first use alone).

    Gives a function that returns the text so far, which is where a failed load says why.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield lambda: os.pread(log.fileno(), 2000, 0).decode(errors="replace").strip()
        finally:
            os.dup2(saved, 2)
            os.close(saved)
