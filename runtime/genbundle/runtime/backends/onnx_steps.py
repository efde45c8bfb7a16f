"""Steps of one token at fixed sizes, which a GPU records once (a CUDA graph) and replays.

The kernels of a step take less time than the processor needs to start them one by one. ONNX Runtime records what runs
on the GPU alone: sessions that are opened for given sizes have no shapes to compute, which it does on the CPU.
https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#using-cuda-graphs-preview
"""

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from genbundle.bundles.dtypes import numpy_dtype
from genbundle.bundles.manifest import CAPACITY, Program
from genbundle.runtime.backends.onnx_device import on_device, overwrite
from genbundle.runtime.program import Tensor

# A session takes as long to open as some hundred steps: short answers do without.
WORTHWHILE = 16
_RECORDINGS = 8  # of one size at a time, each for buffers of its own

Sizes = dict[str, int]


def has_fixed_steps(entry: Program) -> bool:
    """Whether a program's sizes are the same from step to step: it attends to whole buffers and keeps nothing else."""
    masked = any(item.source.kind == "mask" and CAPACITY in item.shape for item in entry.inputs)
    kept = [item for item in entry.inputs if item.source.kind == "state"]
    own = (output for output in entry.outputs if output.state is None)
    known = {symbol for item in entry.inputs for symbol in item.shape}
    return masked and all(CAPACITY in item.shape for item in kept) and all(known >= set(_symbols(o)) for o in own)


def _symbols(item: Any) -> list[str]:
    return [size for size in item.shape if isinstance(size, str)]


class FixedSteps:
    """A program's steps, with a session for each number of sequences and size of buffers.

    open_session: gives a session for these sizes of the graph's axes, or raises where the engine has none that can be
    recorded; steps then go on without.
    """

    def __init__(self, entry: Program, open_session: Callable[[Sizes], Any], onnxruntime: Any, device: str):
        self._entry, self._open_session, self._ort, self._device = entry, open_session, onnxruntime, device
        self._buffers = [item.name for item in entry.inputs if item.source.kind == "state"]
        self._seen: Counter[tuple] = Counter()
        self._steps: dict[tuple, _FixedStep | None] = {}
        self._lock = threading.Lock()  # a recorded step's inputs and results lie at one place

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The outputs, those in place as they went in; None where this call isn't one of these steps.

        inputs: numpy arrays, but for the buffers, which are OrtValues on the device.
        """
        arrays = {name: tensor for name, tensor in inputs.items() if name not in self._buffers}
        if not all(isinstance(tensor, np.ndarray) for tensor in arrays.values()):
            return None
        sizes = self._sizes(inputs)
        if sizes.get("sequence", 1) != 1:
            return None
        key = tuple(sorted(sizes.items()))
        if key not in self._steps:
            self._seen[key] += 1
            if self._seen[key] < WORTHWHILE:
                return None
            self._steps[key] = self._open(sizes)
        step = self._steps[key]
        try:
            with self._lock:
                return None if step is None else step(arrays, {name: inputs[name] for name in self._buffers})
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            self._give_up(key, error)
            return None

    def _sizes(self, inputs: Mapping[str, Tensor]) -> Sizes:
        found: Sizes = {}
        for item in self._entry.inputs:
            tensor = inputs[item.name]
            shape = tensor.shape if isinstance(tensor, np.ndarray) else tensor.shape()
            found |= {symbol: size for symbol, size in zip(item.shape, shape, strict=True) if isinstance(symbol, str)}
        return found

    def _open(self, sizes: Sizes) -> "_FixedStep | None":
        try:
            return _FixedStep(self._entry, self._open_session(sizes), sizes, self._ort, self._device)
        except Exception as error:  # as above
            self._give_up(tuple(sorted(sizes.items())), error)
            return None

    def _give_up(self, key: tuple, error: Exception) -> None:
        self._steps[key] = None
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        logging.getLogger(__name__).warning("%s: steps aren't recorded at %s: %s", self._entry.name, dict(key), reason)


@dataclass(frozen=True, slots=True)
class _Recording:
    """What a step of one set of buffers is bound to, under its number in the session."""

    binding: Any
    options: Any


class _FixedStep:
    """A session of fixed sizes. What goes in and out lies at the same places in every call."""

    def __init__(self, entry: Program, session: Any, sizes: Sizes, onnxruntime: Any, device: str):
        self._session, self._ort, self._device = session, onnxruntime, device
        states = {item.source.name: item.name for item in entry.inputs if item.source.kind == "state"}
        self._in_place = {item.name: states[item.state] for item in entry.outputs if item.state in states}
        self._results = {}
        for item in entry.outputs:
            if item.name not in self._in_place:
                shape = [size if isinstance(size, int) else sizes[size] for size in item.shape]
                empty = np.zeros(shape, numpy_dtype(item.dtype))
                self._results[item.name] = on_device(onnxruntime.OrtValue, empty, device)
        self._given: dict[str, Any] = {}
        self._recordings: OrderedDict[tuple[int, ...], _Recording] = OrderedDict()
        self._made = 0

    def __call__(self, arrays: Mapping[str, np.ndarray], buffers: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run it: numpy arrays but for what was written in place."""
        for name, array in arrays.items():
            if name in self._given:
                overwrite(self._given[name], array)
            else:
                self._given[name] = on_device(self._ort.OrtValue, array, self._device)
        where = tuple(buffer.data_ptr() for buffer in buffers.values())
        if where not in self._recordings:
            self._recordings[where] = self._bind(buffers)
            if len(self._recordings) > _RECORDINGS:
                self._recordings.popitem(last=False)
        recording = self._recordings[where]
        self._session.run_with_iobinding(recording.binding, recording.options)
        results = {name: np.array(value.numpy()) for name, value in self._results.items()}
        return results | {name: buffers[source] for name, source in self._in_place.items()}

    def _bind(self, buffers: Mapping[str, Any]) -> _Recording:
        binding, options = self._session.io_binding(), self._ort.RunOptions()
        taken = {item.name for item in self._session.get_inputs()}
        # Other handles on the buffers: a binding keeps what it's given, and buffers go on to other sequences.
        buffers = {name: self._ort.OrtValue(buffer._get_c_value()) for name, buffer in buffers.items()}
        for name, value in {**self._given, **buffers}.items():
            if name in taken:
                binding.bind_ortvalue_input(name, value)
        for output in self._session.get_outputs():
            source = self._in_place.get(output.name)
            binding.bind_ortvalue_output(output.name, buffers[source] if source else self._results[output.name])
        self._made += 1
        # Never the number of a recording that was dropped: its addresses are others' by now.
        options.add_run_config_entry("gpu_graph_id", str(self._made))
        return _Recording(binding, options)
