"""torch.export programs on CPU or CUDA: the archives hold no weights, which are mapped from one file and shared."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from genbundle.bundles import Bundle, BundleError, EngineError, MissingExtraError
from genbundle.bundles.manifest import Program
from genbundle.runtime.backends.torch_archive import checked_archive
from genbundle.runtime.backends.torch_compiled import compiled_module
from genbundle.runtime.backends.torch_operators import register_operators
from genbundle.runtime.program import Buffers, Tensor


def open_backend(bundle: Bundle, *, device: str | None, threads: int | None, compiled: bool = False) -> "TorchBackend":
    """Open a `torch` bundle on `device` ("cpu", "cuda" or "cuda:1"; "cpu" by default), `compiled` by AOTInductor."""
    try:
        import torch
    except ImportError:
        raise MissingExtraError("running a 'torch' bundle", "torch", "torch") from None
    built = bundle.manifest.packages.get("torch", "")
    installed = torch.__version__.partition("+")[0]
    if built.split(".")[:2] != installed.split(".")[:2]:
        raise EngineError(
            f"{bundle.path} was exported with torch {built}, {installed} is installed: install torch {built}, or build "
            "the bundle again with this version"
        )
    device = device or "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device, re.ASCII):
        raise EngineError(f"unknown device {device!r}: a 'torch' bundle runs on 'cpu', 'cuda' or 'cuda:1'")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EngineError(f"{bundle.path}: no CUDA device here: load it with device='cpu'")
    if threads is not None:
        torch.set_num_threads(threads)
    register_operators()
    return TorchBackend(torch, bundle, device, compiled)


class TorchBackend:
    """A bundle's programs, loaded one by one as they are needed."""

    def __init__(self, torch: Any, bundle: Bundle, device: str, compiled: bool):
        self._torch, self._bundle, self._compiled = torch, bundle, compiled
        self.device = device
        self._programs: dict[str, TorchProgram] = {}
        self._weights: dict[str, Any] = {}

    def program(self, name: str) -> "TorchProgram":
        """The program of that name, loaded when it is first asked for."""
        if name not in self._programs:
            self._programs[name] = self._open(name)
        return self._programs[name]

    def to_numpy(self, tensor: Tensor) -> np.ndarray:
        """A tensor (or a numpy array) as a numpy array; bfloat16 as float32, which numpy lacks."""
        if isinstance(tensor, np.ndarray):
            return tensor
        return (tensor.float() if tensor.dtype == self._torch.bfloat16 else tensor).cpu().numpy()

    def _open(self, name: str) -> "TorchProgram":
        torch, bundle = self._torch, self._bundle
        entry = bundle.manifest.program(name)
        file = bundle.file(entry.file)
        archive = checked_archive(file, torch)
        # It warns of symbols that only guards mention, which aren't evaluated here.
        log = logging.getLogger("torch")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            exported = torch.export.load(archive)
        except Exception as error:  # a graph that is none surfaces as anything, from AssertionError to torch's own
            raise EngineError(f"{file}: torch.export can't load it: {error}") from error
        finally:
            log.setLevel(level)
        table = _weight_names(bundle.file(f"{name}.weights.json"))
        for parameter, expected in exported.state_dict.items():
            tensor = self._weight(table.get(parameter))
            if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
                raise BundleError(f"{file}: the weight {parameter!r} has another shape or dtype than the program reads")
            exported.state_dict[parameter] = torch.nn.Parameter(tensor, requires_grad=False)
        if self.device != "cpu":
            from torch.export.passes import move_to_device_pass

            exported = move_to_device_pass(exported, self.device)
        if self._compiled:
            where = f"{bundle.path}: the program {name!r}"
            module = compiled_module(torch, exported, archive=archive.getvalue(), device=self.device, program=where)
            return TorchProgram(torch, module, entry, self.device)
        # The manifest's shapes are checked before; torch's own guards would be evaluated in Python on every step.
        return TorchProgram(torch, exported.module(check_guards=False), entry, self.device)

    def _weight(self, name: str | None) -> Any:
        """A weight of the shared file, mapped once, and moved to the device once, however many programs read it."""
        if not self._weights:
            from safetensors.torch import load_file

            self._weights = load_file(self._bundle.file(self._bundle.manifest.weights or ""))
        if name not in self._weights:
            raise BundleError(f"{self._bundle.path}: the weights file holds no {name!r}")
        if self.device != "cpu":
            self._weights[name] = self._weights[name].to(self.device)  # itself, if it is there already
        return self._weights[name]


def _weight_names(path: Path) -> dict[str, str]:
    """Parameter -> tensor name in the weights file, as the builder wrote it for one program."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BundleError(f"{path}: can't be read: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise BundleError(f"{path}: expected an object of tensor names")
    return table


class TorchProgram:
    """One loaded program: numpy arrays or tensors in, tensors out."""

    def __init__(self, torch: Any, module: Any, entry: Program, device: str):
        self._torch, self._module, self._name, self._device = torch, module, entry.name, device
        self._outputs = {output.name for output in entry.outputs}

    def __call__(self, inputs: Mapping[str, Tensor], buffers: Buffers | None = None) -> dict[str, Tensor]:
        """Run the program."""
        feeds = {name: self._to_engine(tensor) for name, tensor in {**inputs, **(buffers or {})}.items()}
        try:
            with self._torch.inference_mode():
                found = self._module(**feeds)
        except Exception as error:  # an operator's own exception type, a guard, a kernel: torch has no common base
            raise EngineError(
                f"torch failed in the program {self._name!r}: {str(error).partition(chr(10))[0]}"
            ) from error
        missing = self._outputs - found.keys()
        if missing:
            raise BundleError(f"the program {self._name!r} gives no {', '.join(sorted(missing))}, as it should")
        return found

    def _to_engine(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, np.ndarray):
            return tensor
        if not tensor.flags.writeable:
            tensor = tensor.copy()  # torch warns of read-only memory
        return self._torch.from_numpy(np.asarray(tensor, order="C")).to(self._device)
