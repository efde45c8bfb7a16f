"""Steps of one token at fixed sizes, which a GPU records once (a CUDA graph) and replays.

The kernels of a step take less time than the processor needs to start them one by one. ONNX Runtime records what runs
on the GPU alone: sessions that are opened for given sizes have no shapes to compute, which it does on the CPU.
https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#using-cuda-graphs-preview
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from genbundle.bundles.dtypes import numpy_dtype
from genbundle.bundles.manifest import Program
from genbundle.runtime.backends.onnx_device import BufferPool, on_device, overwrite
from genbundle.runtime.program import Tensor

# A session takes as long to open as some hundred steps: the shortest answers do without. `genbundle verify`, and the
# build's replay, take more steps than this, so that they go through such sessions too.
WORTHWHILE = 8
_SESSIONS = 8  # that are open at a time

Sizes = dict[str, int]


def has_fixed_steps(entry: Program) -> bool:
    """Whether a program's sizes are the same from step to step: it attends to whole buffers and keeps nothing else."""
    others = [item for item in entry.inputs if item.source.kind == "state" and item not in entry.buffers]
    own = (output for output in entry.outputs if output.state is None)
    known = {symbol for item in entry.inputs for symbol in item.shape}
    return entry.attends_to_room and not others and all(known >= set(_symbols(output)) for output in own)


def _symbols(item: Any) -> list[str]:
    return [size for size in item.shape if isinstance(size, str)]


class FixedSteps:
    """A program's steps, with a session for each number of sequences and size of buffers.

    open_session: gives a session for these sizes of the graph's axes, or raises where the engine has none that can be
    recorded; steps then go on without. pool: the buffers that stay, of which a step is recorded; others' steps run in
    the same session as they are. Calls come one at a time.
    """

    def __init__(
        self, entry: Program, open_session: Callable[[Sizes], Any], onnxruntime: Any, device: str, pool: BufferPool
    ):
        self._entry, self._open_session, self._ort, self._device = entry, open_session, onnxruntime, device
        self._items = {item.name: item for item in entry.inputs}
        self._names = [item.name for item in entry.buffers]
        self._pool = pool
        self._seen: Counter[tuple] = Counter()
        self._steps: OrderedDict[tuple, _FixedStep] = OrderedDict()
        self._refused: set[tuple] = set()

    def __call__(self, arrays: Mapping[str, Tensor], buffers: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The outputs that aren't written in place; None where this call isn't one of these steps.

        arrays: the inputs beside the buffers, numpy arrays. buffers: OrtValues on the device.
        """
        if not all(name in buffers for name in self._names) or not all(map(self._fits, arrays, arrays.values())):
            return None
        sizes = self._sizes({**arrays, **buffers})
        if sizes.get("sequence", 1) != 1:
            return None
        key = tuple(sorted(sizes.items()))
        if key in self._refused or not self._ready(key, sizes):
            return None
        self._steps.move_to_end(key)
        step = self._steps[key]
        where = tuple(buffer.data_ptr() for buffer in buffers.values())
        stay = self._pool.stay(where)
        if stay and step.recorded not in (None, where):
            # What it recorded writes into buffers that don't stay any more: another session, at the next step.
            del self._steps[key]
            self._seen[key] = WORTHWHILE
            return None
        try:
            return step(arrays, buffers, where if stay else None)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            if step.recorded is not None:
                raise
            self._refuse(key, error)  # what it couldn't record was run to its end or not at all
            return None

    def _fits(self, name: str, tensor: Tensor) -> bool:
        """Whether it is an array of the type and the fixed sizes that the program has: it is copied as bytes."""
        item = self._items[name]
        return (
            isinstance(tensor, np.ndarray)
            and tensor.dtype == numpy_dtype(item.dtype)
            and tensor.ndim == len(item.shape)
            and all(isinstance(size, str) or size == got for size, got in zip(item.shape, tensor.shape, strict=True))
        )

    def _sizes(self, inputs: Mapping[str, Tensor]) -> Sizes:
        found: Sizes = {}
        for name, tensor in inputs.items():
            shape = tensor.shape if isinstance(tensor, np.ndarray) else tensor.shape()
            sizes = zip(self._items[name].shape, shape, strict=True)
            found |= {symbol: size for symbol, size in sizes if isinstance(symbol, str)}
        return found

    def _ready(self, key: tuple, sizes: Sizes) -> bool:
        """Whether there is a session for these sizes, opened here when it is worth that."""
        if key in self._steps:
            return True
        self._seen[key] += 1
        if self._seen[key] < WORTHWHILE:
            return False
        del self._seen[key]
        try:
            self._steps[key] = _FixedStep(self._entry, self._open_session(sizes), sizes, self._ort, self._device)
        except Exception as error:  # as above
            self._refuse(key, error)
            return False
        if len(self._steps) > _SESSIONS:
            self._steps.popitem(last=False)
        return True

    def _refuse(self, key: tuple, error: Exception) -> None:
        self._steps.pop(key, None)
        self._refused.add(key)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        logging.getLogger(__name__).warning("%s: steps aren't recorded at %s: %s", self._entry.name, dict(key), reason)


class _FixedStep:
    """A session of fixed sizes. What goes in and out lies at the same places in every call.

    recorded: the addresses of the buffers that its recording writes into, None before there is one.
    """

    def __init__(self, entry: Program, session: Any, sizes: Sizes, onnxruntime: Any, device: str):
        self._session, self._ort, self._device = session, onnxruntime, device
        self._in_place = entry.in_place
        self._results = {}
        for item in entry.outputs:
            if item.name not in self._in_place:
                shape = [size if isinstance(size, int) else sizes[size] for size in item.shape]
                empty = np.zeros(shape, numpy_dtype(item.dtype))
                self._results[item.name] = on_device(onnxruntime.OrtValue, empty, device)
        self._given: dict[str, Any] = {}
        self._binding: Any = None
        self.recorded: tuple[int, ...] | None = None

    def __call__(
        self, arrays: Mapping[str, np.ndarray], buffers: Mapping[str, Any], where: tuple[int, ...] | None
    ) -> dict[str, Tensor]:
        """Run it: what isn't written in place, as numpy arrays.

        where: the buffers' addresses if it is to be recorded, or was; None for buffers of which it isn't.
        """
        for name, array in arrays.items():
            if name in self._given:
                overwrite(self._given[name], array)
            else:
                self._given[name] = on_device(self._ort.OrtValue, array, self._device)
        # A session keeps what it recorded as long as it lives, so it records one set of buffers.
        if where is not None and self._binding is None:
            self._binding = self._bind(buffers)
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", "-1" if where is None else "1")
        self._session.run_with_iobinding(self._bind(buffers) if where is None else self._binding, options)
        self.recorded = where or self.recorded
        return {name: np.array(value.numpy()) for name, value in self._results.items()}

    def _bind(self, buffers: Mapping[str, Any]) -> Any:
        binding = self._session.io_binding()
        taken = {item.name for item in self._session.get_inputs()}
        # Other handles on the buffers: a binding keeps what it's given, and buffers go on to other sequences.
        buffers = {name: self._ort.OrtValue(buffer._get_c_value()) for name, buffer in buffers.items()}
        for name, value in {**self._given, **buffers}.items():
            if name in taken:
                binding.bind_ortvalue_input(name, value)
        for output in self._session.get_outputs():
            source = self._in_place.get(output.name)
            binding.bind_ortvalue_output(output.name, buffers[source] if source else self._results[output.name])
        return binding
