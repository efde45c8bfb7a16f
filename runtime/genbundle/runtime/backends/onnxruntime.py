"""ONNX Runtime, CPU and CUDA providers: tensors stay in the engine from call to call."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from genbundle.bundles import Bundle, BundleError, EngineError, MissingExtraError
from genbundle.bundles.manifest import CAPACITY, Program
from genbundle.runtime.backends.onnx_file import named_files
from genbundle.runtime.program import Tensor

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_backend(bundle: Bundle, *, device: str | None, threads: int | None) -> "OnnxRuntimeBackend":
    """Open a `cpu` or `cuda` bundle on `device` ("cpu" or "cuda"; its own by default)."""
    try:
        import onnxruntime
    except ImportError:
        extra = "onnx-gpu" if bundle.manifest.backend == "cuda" else "onnx"
        raise MissingExtraError(f"running a {bundle.manifest.backend!r} bundle", "onnxruntime", extra) from None
    device = device or bundle.manifest.backend
    if device not in _PROVIDERS:
        raise EngineError(f"unknown device {device!r}: an ONNX bundle runs on 'cpu' or 'cuda'")
    available = onnxruntime.get_available_providers()
    if _PROVIDERS[device] not in available:
        raise EngineError(
            f"{bundle.path}: no CUDA provider here (ONNX Runtime has {', '.join(available)}): "
            "pip install 'genbundle[onnx-gpu]' where a GPU is, or load it with device='cpu'"
        )
    return OnnxRuntimeBackend(onnxruntime, bundle, device, threads)


class OnnxRuntimeBackend:
    """A bundle's sessions, opened one by one as they are needed; they map the weights of one file."""

    def __init__(self, onnxruntime: Any, bundle: Bundle, device: str, threads: int | None):
        self._onnxruntime, self._bundle, self._threads = onnxruntime, bundle, threads
        self.device = device
        self._programs: dict[str, OnnxProgram] = {}

    def program(self, name: str) -> "OnnxProgram":
        """The program of that name, opened when it is first asked for."""
        if name not in self._programs:
            self._programs[name] = self._open(name)
        return self._programs[name]

    def to_numpy(self, tensor: Tensor) -> np.ndarray:
        """An OrtValue (or a numpy array) as a numpy array; float16 and bfloat16 as they are."""
        return tensor if isinstance(tensor, np.ndarray) else tensor.numpy()

    def _open(self, name: str) -> "OnnxProgram":
        ort, entry = self._onnxruntime, self._bundle.manifest.program(name)
        if entry.precision == "bf16" and self.device == "cpu":
            raise EngineError(
                f"{self._bundle.path}: the program {name!r} computes in bfloat16, which ONNX Runtime's CPU provider "
                "can't: load the bundle on a GPU, or build it with another precision"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
            options.inter_op_num_threads = 1
        # What it holds back for later calls is as large as the largest prompt's work, and no step is faster for it.
        options.enable_cpu_mem_arena = False
        if entry.optimized and self.device == "cpu":
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if entry.precision == "fp32":
            # A repacked copy of every weight in memory: steps are as fast with the mapped ones, and prompts nearly.
            # Those in blocks of a few bits would be unpacked to float32 in each call.
            options.add_session_config_entry("session.disable_prepacking", "1")
        file, provider = self._bundle.file(entry.file), _PROVIDERS[self.device]
        self._check_files(entry.file)
        try:
            session = ort.InferenceSession(str(file), options, providers=[provider])
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise EngineError(f"{self._bundle.path}: ONNX Runtime can't open {entry.file}: {error}") from error
        if provider not in session.get_providers():
            # It goes on with the CPU, and says so only in its log.
            raise EngineError(
                f"{self._bundle.path}: ONNX Runtime couldn't start its {provider} here and would run {entry.file} with "
                f"{', '.join(session.get_providers())}: check the GPU's driver, CUDA and cuDNN, or load the bundle "
                "with device='cpu'"
            )
        return OnnxProgram(ort, session, name, self.device, _in_place(entry))

    def _check_files(self, program: str) -> None:
        """BundleError for a program that reads a file which the manifest doesn't list, wherever it is."""
        file = self._bundle.file(program)
        if file.suffix != ".onnx":
            raise BundleError(f"{file}: expected a program named .onnx")
        try:
            named = named_files(file.read_bytes())
        except (ValueError, OSError) as error:
            raise EngineError(f"{self._bundle.path}: ONNX Runtime can't open {file.name}: {error}") from error
        for name in sorted(named):
            if str(PurePosixPath(program).parent / name) not in self._bundle.manifest.files:
                raise BundleError(f"{file}: reads the file {name!r}, which the manifest doesn't list")


def _in_place(entry: Program) -> dict[str, str]:
    """The outputs that are written into the tensor of an input: output -> input."""
    buffers = {item.source.name: item.name for item in entry.inputs if CAPACITY in item.shape}
    return {output.name: buffers[output.state] for output in entry.outputs if output.state in buffers}


class OnnxProgram:
    """One session: numpy arrays or OrtValues in, OrtValues out.

    in_place: as `_in_place` returns it; such an output is the very tensor that went in.
    """

    def __init__(self, onnxruntime: Any, session: Any, name: str, device: str, in_place: Mapping[str, str]):
        self._value = onnxruntime.OrtValue
        self.session, self.name, self._device, self._in_place = session, name, device, in_place
        self.outputs = [output.name for output in session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the program."""
        try:
            binding = self.session.io_binding()
            given = {name: self._to_engine(tensor) for name, tensor in inputs.items()}
            for name, tensor in given.items():
                binding.bind_ortvalue_input(name, tensor)
            written = {name: given[source] for name, source in self._in_place.items()}
            # Unbound outputs come back to the CPU: state would cross the bus twice a step.
            for name in self.outputs:
                if name in written:
                    binding.bind_ortvalue_output(name, written[name])
                else:
                    binding.bind_output(name, self._device)
            self.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise EngineError(f"ONNX Runtime failed in the program {self.name!r}: {error}") from error
        # What was bound as an output comes back as another handle, which doesn't keep a numpy array's memory.
        return dict(zip(self.outputs, binding.get_outputs(), strict=True)) | written

    def _to_engine(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, np.ndarray):
            return tensor
        if tensor.dtype == ml_dtypes.bfloat16:
            return self._value.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(tensor).view(np.uint16), 16)
        return self._value.ortvalue_from_numpy(np.ascontiguousarray(tensor), self._device)
