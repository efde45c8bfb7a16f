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


class _Mapped:
    """Weights where their files are mapped: each by itself, since the system may map what lies around too."""

    def __init__(self) -> None:
        self._mapped: list[mmap.mmap] = []

    def read(self, weight: ExternalWeight, folder: Path) -> np.ndarray:
        """A weight; BundleError for one that lies beyond its file's end."""
        file, before = folder / weight.location, weight.offset % mmap.ALLOCATIONGRANULARITY
        try:
            with file.open("rb") as stream:
                mapped = mmap.mmap(
                    stream.fileno(), before + weight.length, access=mmap.ACCESS_READ, offset=weight.offset - before
                )
            content = np.frombuffer(mapped, np.uint8, weight.length, before)
            array = content.view(TYPES[weight.dtype]).reshape(weight.shape)
        except ValueError as error:
            raise BundleError(f"{file}: doesn't hold the weight {weight.name!r} as its program has it") from error
        self._mapped.append(mapped)
        return array

    def give_back(self) -> None:
        """Let the system have the memory of what was read; it is read from the files again where it has to be."""
        for mapped in self._mapped:
            if hasattr(mapped, "madvise"):  # not on Windows
                mapped.madvise(mmap.MADV_DONTNEED)


class DeviceWeights:
    """A bundle's weights on a device, each once however many sessions read it."""

    def __init__(self, value: Any, device: str):
        self._value, self._device = value, device
        self._mapped = _Mapped()
        self._kept: dict[tuple, Any] = {}
        self._owned: list[Any] = []

    def share(self, options: Any, program: Path) -> None:
        """Let the session that `options` open for an .onnx read the weights from here, but for those of types that
        numpy lacks; BundleError for one that lies beyond its file's end."""
        for weight in external_weights(program.read_bytes()):
            if weight.dtype in TYPES:
                options.add_initializer(weight.name, self._find(weight, program.parent))

    def _find(self, weight: ExternalWeight, folder: Path) -> Any:
        key = (weight.location, weight.offset, weight.length, weight.dtype, weight.shape)
        if key not in self._kept:
            owned = on_device(self._value, self._mapped.read(weight, folder), self._device)
            self._owned.append(owned)
            # Sessions share memory that isn't ONNX Runtime's own only: the same place, seen as somebody else's.
            self._kept[key] = self._value.from_dlpack(owned)
        return self._kept[key]


class ScalesOfBlocks:
    """The float32 numbers of programs whose other weights are blocks of a few bits. ONNX Runtime takes the scales into
    its packed form when it opens a program, and would keep them mapped, a tenth of the file, though no call reads them.
    """

    def __init__(self, value: Any):
        self._value, self._mapped = value, _Mapped()
        self._kept: list[Any] = []

    def share(self, options: Any, program: Path) -> None:
        """Let the session that `options` open for an .onnx read its float32 numbers from here; BundleError as above."""
        for weight in external_weights(program.read_bytes()):
            if weight.dtype == _FLOAT32:
                self._kept.append(self._value.ortvalue_from_numpy(self._mapped.read(weight, program.parent), "cpu"))
                options.add_initializer(weight.name, self._kept[-1])

    def give_back(self) -> None:
        """Let the system have the memory of what opening has read."""
        self._mapped.give_back()
