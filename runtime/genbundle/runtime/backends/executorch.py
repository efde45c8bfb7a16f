"""ExecuTorch with the XNNPACK delegate: one .pte whose methods are the programs; its decoder keeps its own state."""

import importlib.metadata
import io
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any

import numpy as np

from genbundle.bundles import Bundle, EngineError, MissingExtraError
from genbundle.bundles.manifest import Program
from genbundle.runtime.pieces import taken_inputs
from genbundle.runtime.program import Buffers, Tensor


def open_backend(bundle: Bundle, *, device: str | None, threads: int | None) -> "ExecuTorchBackend":
    """Open an `xnnpack` bundle, which runs on the CPU.

    threads: the size of ExecuTorch's thread pool. There is one in a process, and only its first bundle can set it.
    """
    if device not in (None, "cpu"):
        raise EngineError(f"unknown device {device!r}: an xnnpack bundle runs on 'cpu'")
    _check_version(bundle)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Registers the operators torch.ops.llama.* (update_cache, custom_sdpa) that the decoders call.
            import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401
            from executorch.extension.pybindings import _portable_lib
            from executorch.runtime import Runtime

            if any(program.precision != "fp32" for program in bundle.manifest.programs):
                # Registers the operators for tables of rounded weights.
                from executorch.kernels import quantized  # noqa: F401
    except ImportError:
        raise _missing() from None
    _set_threads(_portable_lib, threads)
    return ExecuTorchBackend(Runtime.get(), bundle)


class ExecuTorchBackend:
    """A bundle's methods, loaded one by one as they are needed; each .pte file is opened once."""

    device = "cpu"
    started = False  # whether any method was loaded in this process: it keeps the thread pool that it found

    def __init__(self, runtime: Any, bundle: Bundle):
        self._runtime, self._bundle = runtime, bundle
        self._files: dict[str, Any] = {}
        self._methods: dict[tuple[str, str], Any] = {}
        self._programs: dict[str, ExecuTorchProgram] = {}
        self._lock = threading.Lock()  # a method's memory is one: two threads in it would mix their tensors

    def program(self, name: str) -> "ExecuTorchProgram":
        """The program of that name, its method loaded when it is first asked for.

        Programs that share a method share its state, which a decoder keeps between calls.
        """
        if name not in self._programs:
            entry = self._bundle.manifest.program(name)
            method = entry.method or "forward"
            if (entry.file, method) not in self._methods:
                self._methods[entry.file, method] = self._load(entry.file, method)
            self._programs[name] = ExecuTorchProgram(entry, self._methods[entry.file, method], self._lock)
        return self._programs[name]

    def to_numpy(self, tensor: Tensor) -> np.ndarray:
        """A torch tensor (or a numpy array) as a numpy array over the same memory."""
        return tensor if isinstance(tensor, np.ndarray) else tensor.numpy()

    def _load(self, file: str, method: str) -> Any:
        path, log = self._bundle.file(file), io.StringIO()
        ExecuTorchBackend.started = True
        try:
            # ExecuTorch logs through sys.stderr: why a load failed, and on first use five lines about the processor.
            with redirect_stderr(log):
                if file not in self._files:
                    self._files[file] = self._runtime.load_program(path)
                return self._files[file].load_method(method)
        except (RuntimeError, KeyError) as error:
            detail = " ".join(f"{error} {log.getvalue()}".split())
            raise EngineError(
                f"{self._bundle.path}: ExecuTorch can't load the method {method!r} of {file}: {detail}: "
                "the file is damaged (`genbundle verify` tells) or needs operators that this ExecuTorch lacks"
            ) from error


class ExecuTorchProgram:
    """One method: numpy arrays or torch tensors in by name, torch tensors out by name."""

    def __init__(self, entry: Program, method: Any, lock: threading.Lock):
        self._entry, self._method, self._lock = entry, method, lock
        self._names = taken_inputs(entry)
        self._outputs = [output.name for output in entry.outputs]

    def __call__(self, inputs: Mapping[str, Tensor], buffers: Buffers | None = None) -> dict[str, Tensor]:
        """Run the method; EngineError when it fails."""
        found = self._run({**inputs, **(buffers or {})})
        if len(found) != len(self._outputs):
            raise EngineError(
                f"the program {self._entry.name!r} gives {len(found)} outputs, the manifest names {len(self._outputs)}"
            )
        return dict(zip(self._outputs, found, strict=True))

    def _run(self, inputs: Mapping[str, Tensor]) -> Sequence[Any]:
        try:
            with self._lock:
                return self._method.execute([_to_torch(inputs[name]) for name in self._names])
        except RuntimeError as error:
            shapes = {name: list(inputs[name].shape) for name in self._names}
            raise EngineError(
                f"ExecuTorch failed in the program {self._entry.name!r} on inputs of shapes {shapes}: {error}"
            ) from error


def _to_torch(tensor: Tensor) -> Any:
    if not isinstance(tensor, np.ndarray):
        return tensor.contiguous()
    import torch

    # torch shares numpy's memory and warns about read-only arrays (broadcast ones, for instance): those are copied.
    shared = torch.from_numpy(np.require(tensor, requirements=("C", "W")))
    # numpy gives an empty array strides of 0, which ExecuTorch's assertion ends the process for.
    return shared if tensor.size else shared.new_zeros(shared.shape)


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


def _set_threads(portable_lib: Any, threads: int | None) -> None:
    """Resize the process's thread pool; EngineError where a method that was loaded before is bound to another size."""
    if threads is None:
        return
    with redirect_stderr(io.StringIO()):
        present = portable_lib._threadpool_get_thread_count()
    if present == threads:
        return
    if ExecuTorchBackend.started:
        raise EngineError(
            f"threads={threads}: ExecuTorch runs on {present} threads in this process since it opened its first "
            "bundle, and can't change that: load this one in a process of its own"
        )
    with redirect_stderr(io.StringIO()):
        portable_lib._unsafe_reset_threadpool(threads)


def _missing() -> MissingExtraError:
    return MissingExtraError("running an 'xnnpack' bundle", "executorch", "executorch")
