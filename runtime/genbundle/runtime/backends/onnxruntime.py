"""ONNX Runtime, CPU and CUDA providers: tensors stay in the engine from call to call."""

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from genbundle.bundles import Bundle, BundleError, EngineError, MissingExtraError
from genbundle.bundles.manifest import Program
from genbundle.runtime.backends.onnx_device import BufferPool, as_numpy, on_device
from genbundle.runtime.backends.onnx_file import named_files
from genbundle.runtime.backends.onnx_weights import DeviceWeights, ScalesOfBlocks
from genbundle.runtime.program import Buffers, Tensor

if TYPE_CHECKING:
    from genbundle.runtime.backends.onnx_steps import FixedSteps, Sizes

_ON_DEVICE = threading.RLock()
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
            f"pip install 'genbundle[onnx-gpu]' where a GPU is{_or_the_cpu(bundle)}"
        )
    if device == "cuda":
        try:  # else the first weight would be what can't be put there
            on_device(onnxruntime.OrtValue, np.zeros(1, np.float32), device)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise _not_started(bundle, _PROVIDERS[device], reason) from error
    return OnnxRuntimeBackend(onnxruntime, bundle, device, threads)


class OnnxRuntimeBackend:
    """A bundle's sessions, opened one by one as they are needed; they map the weights of one file, or share those on a
    GPU.

    kept: whether weights and buffers are on the device for good, and steps of fixed sizes are recorded. By default so
    on a GPU, and with `cuda` bundles on the CPU, where they are tried: with the same sessions, unrecorded.
    """

    def __init__(self, onnxruntime: Any, bundle: Bundle, device: str, threads: int | None, *, kept: bool | None = None):
        self._onnxruntime, self._bundle, self._threads = onnxruntime, bundle, threads
        self.device = device
        self._kept = "cuda" in (device, bundle.manifest.backend) if kept is None else kept
        self._weights = DeviceWeights(onnxruntime.OrtValue, device)
        self._scales = ScalesOfBlocks(onnxruntime.OrtValue)
        self._pool = BufferPool(onnxruntime.OrtValue, device)
        self._programs: dict[str, OnnxProgram] = {}
        # While a step is recorded, nothing else may be asked of the GPU, by any thread or other bundle:
        # https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#using-cuda-graphs-preview
        self._lock = _ON_DEVICE if self._kept else nullcontext()

    def program(self, name: str) -> "OnnxProgram":
        """The program of that name, opened when it is first asked for."""
        if name not in self._programs:
            with self._lock:
                self._programs[name] = self._programs.get(name) or self._open(name)
        return self._programs[name]

    def to_numpy(self, tensor: Tensor) -> np.ndarray:
        """An OrtValue (or a numpy array) as a numpy array; float16 and bfloat16 as they are."""
        if isinstance(tensor, np.ndarray):
            return tensor
        with self._lock:
            return as_numpy(self._onnxruntime, tensor, _PROVIDERS[self.device])

    def _open(self, name: str) -> "OnnxProgram":
        entry = self._bundle.manifest.program(name)
        if entry.precision == "bf16" and self.device == "cpu":
            raise EngineError(
                f"{self._bundle.path}: the program {name!r} computes in bfloat16, which ONNX Runtime's CPU provider "
                "can't: load the bundle on a GPU, or build it with another precision"
            )
        self._check_files(entry.file)
        ort = self._onnxruntime
        if not self._kept:
            scales = self._scales if entry.precision in ("int8", "int4") else None
            session = self._session(entry, scales)
            if scales is not None:
                scales.give_back()
            return OnnxProgram(ort, session, name, self.device, entry.in_place)
        from genbundle.runtime.backends.onnx_steps import (
            FixedSteps,
            has_fixed_steps,
        )  # nothing that a CPU's start needs

        steps = None
        if has_fixed_steps(entry):
            steps = FixedSteps(entry, partial(self._session, entry, self._weights), ort, self.device, self._pool)
        kept = {"pool": self._pool, "steps": steps, "lock": self._lock}
        return OnnxProgram(ort, self._session(entry, self._weights), name, self.device, entry.in_place, **kept)

    def _session(
        self, entry: Program, weights: DeviceWeights | ScalesOfBlocks | None, sizes: "Sizes | None" = None
    ) -> Any:
        """A session of a program that reads `weights` from there; with `sizes`, for these alone, recorded where a GPU
        is."""
        ort, file, provider = self._onnxruntime, self._bundle.file(entry.file), _PROVIDERS[self.device]
        options, settings = self._options(entry), {}
        for symbol, size in (sizes or {}).items():
            options.add_free_dimension_override_by_name(symbol, size)
        if sizes is not None and self.device == "cuda":
            settings["enable_cuda_graph"] = "1"
        try:
            if weights is not None:
                weights.share(options, file)
            # Its fallback would open all of it on the CPU, after a line on stdout, before we could look.
            session = ort.InferenceSession(str(file), options, providers=[(provider, settings)], enable_fallback=0)
        except BundleError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise EngineError(f"{self._bundle.path}: ONNX Runtime can't open {entry.file}: {error}") from error
        if provider not in session.get_providers():
            # It goes on with the CPU, and says so only in its log.
            raise _not_started(self._bundle, provider, f"it would run {entry.file} with {session.get_providers()[0]}")
        self._check_outputs(session, entry)
        session.handed_weights = weights  # it reads them and keeps nothing of them alive
        return session

    def _options(self, entry: Program) -> Any:
        ort = self._onnxruntime
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
            options.inter_op_num_threads = 1
        # What it holds back for later calls is as large as the largest call's work: that of a piece where all prompts
        # go in pieces, but for those in batches or with padding.
        flow = self._bundle.manifest.flow
        pieces = flow.chunk is not None and all(route.programs == flow.step for route in flow.prompt)
        options.enable_cpu_mem_arena = pieces and entry.name in flow.step and self.device == "cpu"
        if entry.optimized and self.device == "cpu":
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if entry.precision == "fp32":
            # A repacked copy of every weight in memory: steps are as fast with the mapped ones, and prompts nearly.
            # Those in blocks of a few bits would be unpacked to float32 in each call.
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self.device == "cpu":
            # A plan of all memory for each shape of the inputs: a step's mask has another each time, so that it would
            # be made in every step, and kept.
            options.enable_mem_pattern = False
        return options

    def _check_outputs(self, session: Any, entry: Program) -> None:
        """BundleError where the manifest has outputs that the program lacks: their buffers would stay as they are; and
        for an output that is an input: ONNX Runtime gives its memory back as it came, for nobody to keep."""
        given = {output.name for output in session.get_outputs()}
        missing = {output.name for output in entry.outputs} - given
        if handed_on := given & {item.name for item in session.get_inputs()}:
            file, names = self._bundle.file(entry.file), ", ".join(sorted(handed_on))
            raise BundleError(f"{file}: the output {names} is an input, which the runtime needs no program for")
        if missing:
            raise BundleError(f"{self._bundle.file(entry.file)}: gives no {', '.join(sorted(missing))}, as it should")

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


def _not_started(bundle: Bundle, provider: str, detail: str) -> EngineError:
    return EngineError(
        f"{bundle.path}: ONNX Runtime couldn't start its {provider} here ({detail}): check the GPU's driver, CUDA and "
        f"cuDNN{_or_the_cpu(bundle)}"
    )


def _or_the_cpu(bundle: Bundle) -> str:
    """What else to do where no GPU is: nothing with bfloat16, which the CPU can't."""
    narrow = any(program.precision == "bf16" for program in bundle.manifest.programs)
    return "" if narrow else ", or load it with device='cpu'"


class OnnxProgram:
    """One session: numpy arrays or OrtValues in, OrtValues out.

    in_place: as the manifest's entry has it: outputs that are written into the tensor of an input. pool: where such
    tensors come from if they stay on the device. steps: what takes steps of fixed sizes, if the program has such. lock:
    held meanwhile.
    """

    def __init__(
        self,
        onnxruntime: Any,
        session: Any,
        name: str,
        device: str,
        in_place: Mapping[str, str],
        *,
        pool: BufferPool | None = None,
        steps: "FixedSteps | None" = None,
        lock: AbstractContextManager[Any] | None = None,
    ):
        self._value = onnxruntime.OrtValue
        self.session, self.name, self._device, self._in_place = session, name, device, in_place
        self._pool, self._steps, self._lock = pool, steps, lock or nullcontext()
        self.outputs = [output.name for output in session.get_outputs()]
        self._new = [name for name in self.outputs if name not in in_place]
        # On a GPU an input that an operator on the CPU reads is copied when it is bound: for each call then. Steps of
        # fixed sizes have bindings of their own.
        self._keeps_bindings = device == "cpu" and steps is None

    def __call__(self, inputs: Mapping[str, Tensor], buffers: Buffers | None = None) -> dict[str, Tensor]:
        """Run the program."""
        try:
            with self._lock:
                return self._run(inputs, Buffers() if buffers is None else buffers)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise EngineError(f"ONNX Runtime failed in the program {self.name!r}: {error}") from error

    def _run(self, inputs: Mapping[str, Tensor], buffers: Buffers) -> dict[str, Tensor]:
        if buffers.bound is not None:
            return self._run_bound(buffers.bound, inputs)
        arrays = {name: tensor for name, tensor in buffers.items() if isinstance(tensor, np.ndarray)}
        made = {name: self._to_buffer(name, array) for name, array in arrays.items()}
        whole = {**buffers, **made}
        written = {name: made[source] for name, source in self._in_place.items() if source in made}
        if self._steps is not None and (done := self._steps(inputs, whole)) is not None:
            return done | written
        binding = self._bind(whole)
        if self._keeps_bindings and not made:
            buffers.bound = binding
        return self._run_bound(binding, inputs) | written

    def _run_bound(self, binding: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run it with what `_bind` bound, and `inputs`: the outputs that aren't written in place."""
        for name, tensor in inputs.items():
            if self._device == "cpu" and isinstance(tensor, np.ndarray) and tensor.dtype != ml_dtypes.bfloat16:
                binding.bind_cpu_input(name, np.asarray(tensor, order="C"))  # a third of the time of an OrtValue
            else:
                binding.bind_ortvalue_input(name, self._to_engine(tensor))
        # Unbound outputs come back to the CPU: state would cross the bus twice a step.
        for name in self._new:
            binding.bind_output(name, self._device)
        self.session.run_with_iobinding(binding)
        # Each a handle of its own, which outlives the binding's. What was bound as an output would come back as a
        # handle that doesn't keep a numpy array's memory.
        found = binding.get_outputs_as_ortvaluevector()
        return {name: self._value(found[len(self._in_place) + place]) for place, name in enumerate(self._new)}

    def _bind(self, buffers: Mapping[str, Any]) -> Any:
        """A binding that has the buffers, each as input and output, and before all other outputs."""
        binding = self.session.io_binding()
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
        for name, source in self._in_place.items():
            binding.bind_ortvalue_output(name, buffers[source])
        return binding

    def _to_buffer(self, name: str, array: np.ndarray) -> Any:
        return self._to_engine(array) if self._pool is None else self._pool.take(name, array)

    def _to_engine(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, np.ndarray):
            return tensor
        if tensor.dtype == ml_dtypes.bfloat16:
            return on_device(self._value, tensor, self._device)
        return self._value.ortvalue_from_numpy(np.asarray(tensor, order="C"), self._device)
