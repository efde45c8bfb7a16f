"""Generation state: what is carried from call to call, driven by the manifest."""

from collections.abc import Mapping

import numpy as np

from genbundle.bundles.dtypes import numpy_dtype
from genbundle.bundles.manifest import State as StateEntry
from genbundle.runtime.program import Tensor


class State:
    """The state of `batch` sequences: tensors by name, and how many tokens they have seen.

    Programs that keep their state inside (a .pte) have no tensors here; `length` alone says where they stand.
    """

    def __init__(self, entries: tuple[StateEntry, ...], batch: int):
        self._entries = entries
        self.length = 0
        self.tensors: dict[str, Tensor] = {entry.name: _empty(entry, batch) for entry in entries}

    def update(self, outputs: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        """Take the outputs that replace state entries (`names`: output -> entry)."""
        for output, entry in names.items():
            self.tensors[entry] = outputs[output]


def _empty(entry: StateEntry, batch: int) -> np.ndarray:
    shape = [size if isinstance(size, int) else batch if size == "batch" else 0 for size in entry.shape]
    return np.zeros(shape, numpy_dtype(entry.dtype))
