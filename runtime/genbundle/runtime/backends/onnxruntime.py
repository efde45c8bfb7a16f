"""ONNX Runtime, CPU and CUDA providers: tensors stay in the engine from call to call."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from genbundle.bundles import Bundle, BundleError, EngineError, MissingExtraError
from genbundle.bundles.manifest import Flow
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
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
            options.inter_op_num_threads = 1
        once = name not in _repeated(self._bundle.manifest.flow)
        if once and "language_model" in entry.roles and entry.precision == "fp32":
            # A repacked copy of every weight for one pass per prompt: the mapped ones serve it as fast. Those in blocks
            # of a few bits would be unpacked to float32 in each call.
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
        return OnnxProgram(ort, session, name, self.device)

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


def _repeated(flow: Flow) -> set[str]:
    """The programs that run for each token."""
    return {*flow.step, *(route.programs[-1] for route in flow.prompt if route.one_by_one)}


class OnnxProgram:
    """One session: numpy arrays or OrtValues in, OrtValues out."""

    def __init__(self, onnxruntime: Any, session: Any, name: str, device: str):
        self._value = onnxruntime.OrtValue
        self.session, self.name, self._device = session, name, device
        self.outputs = [output.name for output in session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the program."""
        try:
            binding = self.session.io_binding()
            for name, tensor in inputs.items():
                binding.bind_ortvalue_input(name, self._to_engine(tensor))
            # Unbound outputs come back to the CPU: state would cross the bus twice a step.
            for name in self.outputs:
                binding.bind_output(name, self._device)
            self.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise EngineError(f"ONNX Runtime failed in the program {self.name!r}: {error}") from error
        return dict(zip(self.outputs, binding.get_outputs(), strict=True))

    def _to_engine(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, np.ndarray):
            return tensor
        if tensor.dtype == ml_dtypes.bfloat16:
            return self._value.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(tensor).view(np.uint16), 16)
        return self._value.ortvalue_from_numpy(np.ascontiguousarray(tensor), self._device)
