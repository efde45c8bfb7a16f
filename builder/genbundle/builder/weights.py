"""Every weight once: a content-addressed pool that all programs point into, written as one .safetensors file."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS_NAME = "weights.safetensors"
# Smaller tensors stay inside the graphs: ONNX shape inference needs the values of shape-like constants.
SHARED_FROM_BYTES = 1024
_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where a shared tensor stands in the file: its name and its byte range from the start of the file."""

    name: str
    offset: int
    length: int


def unique_bytes(model: Any) -> int:
    """The bytes of a module's weights, each once."""
    return sum(weight.nbytes for weight in model.parameters())


class WeightPool:
    """Tensors by content: adding an equal tensor twice stores it once.

    The file keeps the tensors in the order of their first use, so that the same programs give the same bytes.
    shaped: whether tensors of equal bytes and other shapes are other tensors, for programs that read them by name.
    """

    def __init__(self, *, shaped: bool = True) -> None:
        self._shaped = shaped
        self._tensors: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self.slots: dict[str, Slot] = {}

    def add(self, name: str, tensor: Any) -> str:
        """Take a tensor (anything with `numpy()`, `shape` and `dtype`) and return the key of its content."""
        array = np.asarray(tensor.numpy(), order="C")  # ascontiguousarray would give a number an axis
        digest = hashlib.sha256(repr((array.dtype.name, array.shape if self._shaped else None)).encode())
        digest.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
        key = digest.hexdigest()
        if key not in self._tensors:
            taken = set(self._names.values())
            base, number = name, 1
            while name in taken:
                name, number = f"{base}.{number}", number + 1
            self._tensors[key], self._names[key] = tensor, name
        return key

    def write(self, path: Path) -> int:
        """Write the file and fill `slots`; returns the bytes of the tensors alone."""
        header: dict[str, Any] = {"__metadata__": {"format": "genbundle"}}
        position, lengths = 0, {}
        for key, array in self._arrays():
            lengths[key] = array.nbytes
            header[self._names[key]] = {
                "dtype": _CODES[array.dtype.name],
                "shape": list(array.shape),
                "data_offsets": [position, position + array.nbytes],
            }
            position += array.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        # Padded so that the data starts on a page: engines map it as it is.
        encoded += b" " * (-(len(encoded) + 8) % 4096)
        offset = len(encoded) + 8
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for key, array in self._arrays():
                file.write(array.data if array.dtype.name != "bfloat16" else array.view(np.uint16).data)
                self.slots[key] = Slot(name=self._names[key], offset=offset, length=lengths[key])
                offset += lengths[key]
        return position

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for key, tensor in self._tensors.items():
            yield key, np.asarray(tensor.numpy(), order="C")
