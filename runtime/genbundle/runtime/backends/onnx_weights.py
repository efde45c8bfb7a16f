"""Weights that ONNX Runtime's sessions are handed instead of reading them themselves: on a GPU one copy for all, on the
CPU what they read once, to pack weights of a few bits."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from genbundle.bundles import BundleError
from genbundle.runtime.backends.onnx_device import TYPES, on_device
from genbundle.runtime.backends.onnx_file import ExternalWeight, external_weights

_FLOAT32 = 1  # ONNX's number of it
# Each mapping holds a file descriptor (until Python 3.13's `trackfd`), of which a process may have no more than 256: so
# many for a bundle.
_MOST = 96


def _mapped(weight: ExternalWeight, folder: Path) -> tuple[np.ndarray, mmap.mmap]:
    """A weight where its file is mapped, by itself, since the system may map what lies around too; BundleError for one
    that its file can't hold so."""
    file, before = folder / weight.location, weight.offset % mmap.ALLOCATIONGRANULARITY
    try:
        if not 0 < weight.length <= file.stat().st_size - weight.offset:
            raise ValueError("beyond the file's end")
        if weight.offset % TYPES[weight.dtype].itemsize:
            raise ValueError("between two numbers")
        with file.open("rb") as stream:
            mapped = mmap.mmap(
                stream.fileno(), before + weight.length, access=mmap.ACCESS_READ, offset=weight.offset - before
            )
        content = np.frombuffer(mapped, np.uint8, weight.length, before)
        return content.view(TYPES[weight.dtype]).reshape(weight.shape), mapped
    except ValueError as error:
        raise BundleError(f"{file}: doesn't hold the weight {weight.name!r} as its program has it") from error


class DeviceWeights:
    """A bundle's weights on a device, each once however many sessions read it."""

    def __init__(self, value: Any, device: str):
        self._value, self._device = value, device
        self._kept: dict[tuple, Any] = {}
        self._owned: list[Any] = []

    def share(self, options: Any, program: Path) -> None:
        """Let the session that `options` open for an .onnx read the weights from here, but for those of types that
        numpy lacks; BundleError for one that lies beyond its file's end."""
        for weight in external_weights(program.read_bytes()):
            if weight.dtype in TYPES:
                options.add_initializer(weight.name, self._find(weight, program.parent))

    def _find(self, weight: ExternalWeight, folder: Path) -> Any:
        key = (folder / weight.location, weight.offset, weight.length, weight.dtype, weight.shape)
        if key not in self._kept:
            owned = on_device(self._value, _mapped(weight, folder)[0], self._device)
            self._owned.append(owned)
            # Sessions share memory that isn't ONNX Runtime's own only: the same place, seen as somebody else's.
            self._kept[key] = self._value.from_dlpack(owned)
        return self._kept[key]


class ScalesOfBlocks:
    """The float32 numbers of programs whose products are by blocks of a few bits, mostly these blocks' scales. Where
    ONNX Runtime takes them into its packed form, when it opens a program, no call reads them again; yet it would keep
    them mapped, a tenth of the file. The largest are handed to it, which are most of them."""

    def __init__(self, value: Any):
        self._value = value
        self._kept: list[tuple[Any, mmap.mmap]] = []

    def share(self, options: Any, program: Path) -> None:
        """Let the session that `options` open for an .onnx read its float32 numbers from here; BundleError as above."""
        found = [weight for weight in external_weights(program.read_bytes()) if weight.dtype == _FLOAT32]
        for weight in sorted(found, key=lambda weight: -weight.length)[: _MOST - len(self._kept)]:
            array, mapped = _mapped(weight, program.parent)
            handed = self._value.ortvalue_from_numpy(array, "cpu")
            options.add_initializer(weight.name, handed)
            self._kept.append((handed, mapped))

    def give_back(self) -> None:
        """Let the system have the memory of what opening has read; it is read from the file again where it has to."""
        for _, mapped in self._kept:
            if hasattr(mapped, "madvise"):  # not on Windows
                mapped.madvise(mmap.MADV_DONTNEED)
