"""Generation state: what is carried from call to call, driven by the manifest."""

import math
import mmap
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from genbundle.bundles import EngineError
from genbundle.bundles.dtypes import numpy_dtype
from genbundle.bundles.manifest import State as StateEntry
from genbundle.runtime.program import Buffers, Tensor

# Else other processes could be given it, for which the system keeps it as a file; Windows has no such choice.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_SMALLEST_ROOM = 256  # of buffers in few sizes
# A buffer that grows has so many places more than tokens, and a 64th of these: a step that attends by products reads
# every place (the builder's passes/step_attention.py), and growing copies every token.
_SPARE = 64


class State:
    """The state of `batch` sequences: tensors by name, and how many tokens they have seen.

    Programs that keep their state inside (a .pte) have no tensors here; `length` alone says where they stand. What is
    written in place is a buffer with room for more than `length`; it grows by little (`_SPARE`).

    most: how many tokens the sequences may get; None where that isn't known. capacity: how many any may get. least: how
    many they get at least, the prompt's, for which the first buffer has room: its pieces then find it large enough.
    """

    def __init__(
        self,
        entries: tuple[StateEntry, ...],
        batch: int,
        most: int | None = None,
        capacity: int | None = None,
        *,
        least: int = 0,
    ):
        self._axes = {entry.name: entry.axis for entry in entries if entry.axis is not None}
        self._rooms: dict[str, int] = {}  # how many tokens a buffer holds; other tensors are as long as the sequences
        # What programs write in place and how many tokens all of it has room for, until one of the tensors is another.
        self._held: dict[str, tuple[Buffers, int]] = {}
        self.length, self.most, self._capacity, self._least = 0, most, capacity, least
        self.tensors: dict[str, Tensor] = {entry.name: _empty(entry, batch) for entry in entries}

    def update(self, outputs: Mapping[str, Tensor], replaced: Mapping[str, str], written: Mapping[str, str]) -> None:
        """Take a program's outputs that are state (output -> entry): tensors that replace others, and what it wrote in
        place, where that isn't the very tensor that went in."""
        for output, entry in replaced.items():
            self.tensors[entry] = outputs[output]
            if self._rooms.pop(entry, None) is not None:
                self._held.clear()
        for output in outputs.keys() & written.keys():
            self.tensors[written[output]] = outputs[output]
            self._held.clear()

    def buffers(
        self,
        program: str,
        names: Mapping[str, str],
        new: int,
        to_numpy: Callable[[Tensor], np.ndarray],
        *,
        few_sizes: bool = False,
    ) -> Buffers:
        """What a program writes in place (`names`: its input -> entry), with room for `new` more tokens: the same
        object while nothing is made anew. There are two a layer, which in most steps nothing is asked of.

        few_sizes: rooms are powers of two, or the capacity, for programs that are made ready for each.
        """
        held, room = self._held.get(program, (None, 0))
        if held is not None and room >= max(self.length + new, self._least):
            return held
        del held
        self._held.pop(program, None)  # else all the old tensors would live until all the new ones are made
        made = Buffers((name, self._buffer(entry, new, to_numpy, few_sizes=few_sizes)) for name, entry in names.items())
        self._held[program] = made, min(self._rooms[entry] for entry in names.values())
        return made

    def _buffer(self, name: str, new: int, to_numpy: Callable[[Tensor], np.ndarray], *, few_sizes: bool) -> Tensor:
        needed = max(self.length + new, self._least)
        if name not in self._rooms or self._rooms[name] < needed:
            if few_sizes:
                room = max(_SMALLEST_ROOM, 1 << (needed - 1).bit_length())
                room = room if self._capacity is None else max(needed, min(room, self._capacity))
            else:
                more = new if needed > self._least else 0  # behind the prompt's last piece come single tokens
                room = needed + max(more, _SPARE + needed // 64)
                room = room if self.most is None else max(needed, min(room, self.most))
            self.tensors[name] = _grown(to_numpy(self.tensors[name]), self._axes[name], room, self.length)
            self._rooms[name] = room
            self._held.clear()
        return self.tensors[name]

    def room(self, name: str) -> int:
        """How many tokens an entry's buffer holds."""
        return self._rooms[name]

    def cut(self, length: int, to_numpy: Callable[[Tensor], np.ndarray]) -> None:
        """Keep the first `length` tokens. Buffers are made anew when they are needed: products over a whole buffer hide
        what lies behind the tokens by numbers that it is multiplied with, which leaves what isn't finite as it is."""
        for name in self._axes if length < self.length else ():
            self.tensors[name] = self._first(name, length, to_numpy)
            self._rooms.pop(name, None)
            self._held.clear()
        self.length, self._least = length, 0

    def exact(self, name: str, to_numpy: Callable[[Tensor], np.ndarray]) -> Tensor:
        """The tensor of an entry, as long as the sequences."""
        if name not in self._rooms:
            return self.tensors[name]
        return self._first(name, self.length, to_numpy)

    def _first(self, name: str, length: int, to_numpy: Callable[[Tensor], np.ndarray]) -> np.ndarray:
        kept = (slice(None),) * self._axes[name] + (slice(length),)
        # A copy always: one of a single head would be a view, which keeps no engine's tensor alive.
        return np.array(to_numpy(self.tensors[name])[kept], order="C")


def _grown(array: np.ndarray, axis: int, size: int, length: int) -> np.ndarray:
    """A larger array that begins with the first `length` of `array` along `axis`."""
    shape = list(array.shape)
    shape[axis] = size
    try:
        grown = _zeros(shape, array.dtype)
    except (MemoryError, OSError, OverflowError) as error:
        raise EngineError(f"no memory for a state of {shape}") from error
    kept = (slice(None),) * axis + (slice(length),)
    grown[kept] = array[kept]
    return grown


def _zeros(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Zeros in pages of their own, which the system gives when they are written and takes back with the array. Of the
    heap they'd take what lies between the engine's own tensors, and leave holes there that fit no other length."""
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer(mmap.mmap(-1, size, **_PRIVATE), dtype).reshape(shape) if size else np.zeros(shape, dtype)


def _empty(entry: StateEntry, batch: int) -> np.ndarray:
    shape = [size if isinstance(size, int) else batch if size == "batch" else 0 for size in entry.shape]
    return np.zeros(shape, numpy_dtype(entry.dtype))
