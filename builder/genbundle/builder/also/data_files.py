"""Programs with weights in files of their own beside them, under the names that transformers.js looks for."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from genbundle.builder.weights import WEIGHTS_NAME

_LARGEST = 2**31 - 2**20  # bytes of a file: a page takes no more in one piece
_PAGE = 4096


def move_programs(
    folder: Path, files: Mapping[str, str], others: Sequence[str], largest: int = _LARGEST
) -> dict[str, int]:
    """Move the .onnx `files` (old name -> new name) and give each its weights: `NEW_data`, `NEW_data_1` ...

    The `others` stay where they are and read the same files, or what is left of the common one. A weight that several
    of the moved programs read stands in the files of each: a page hands a program its own files only. Returns how
    many weight files there are by new name.
    """
    source = _Weights(folder / WEIGHTS_NAME)
    models = {name: ir.load(folder / name) for name in (*files, *others)}
    places: dict[int, tuple[str, int]] = {}  # offset in the common file -> file and offset, for the others
    counts = {}
    for old, new in files.items():
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        groups = source.divide(_offsets(models[old]), largest)
        names = [f"{new}_data{f'_{number}' if number else ''}" for number in range(len(groups))]
        own = {}
        for name, group in zip(names, groups, strict=True):
            own |= {offset: (name, place) for offset, place in source.write(folder / name, group).items()}
        _point(models[old], {offset: (Path(name).name, place) for offset, (name, place) in own.items()}, folder / new)
        counts[new], places = len(groups), own | places
    left = [offset for other in others for offset in _offsets(models[other]) if offset not in places]
    rest = folder / f"{WEIGHTS_NAME}.rest"
    places |= {offset: (WEIGHTS_NAME, place) for offset, place in source.write(rest, list(dict.fromkeys(left))).items()}
    for other in others:
        _point(models[other], places, folder / other)
    for old, new in files.items():
        _name_batch(models[old])
        ir.save(models[old], folder / new)
        (folder / old).unlink()
    for other in others:
        ir.save(models[other], folder / other)
    (folder / WEIGHTS_NAME).unlink()
    rest.rename(folder / WEIGHTS_NAME) if left else rest.unlink()
    return counts


class _Weights:
    """The tensors of a .safetensors file by their offsets from its beginning."""

    def __init__(self, path: Path):
        self._bytes = np.memmap(path, np.uint8, mode="r")
        length = int.from_bytes(self._bytes[:8].tobytes(), "little")
        header = json.loads(self._bytes[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        begin = 8 + length
        self._entries = {begin + entry["data_offsets"][0]: (name, entry) for name, entry in header.items()}

    def divide(self, offsets: Sequence[int], largest: int) -> list[list[int]]:
        """The tensors in groups of at most `largest` bytes, but for one that is larger by itself."""
        groups: list[list[int]] = []
        size = 0
        for offset in offsets:
            if not groups or size + self._length(offset) > largest:
                groups.append([])
                size = 0
            groups[-1].append(offset)
            size += self._length(offset)
        return groups

    def write(self, path: Path, offsets: Sequence[int]) -> dict[int, int]:
        """Write these tensors as a file of the same kind; offset here -> offset there."""
        header: dict[str, Any] = {"__metadata__": {"format": "genbundle"}}
        position, found = 0, {}
        for offset in offsets:
            name, entry = self._entries[offset]
            header[name] = {**entry, "data_offsets": [position, position + self._length(offset)]}
            found[offset] = position
            position += self._length(offset)
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-(len(encoded) + 8) % _PAGE)
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for offset in offsets:
                file.write(self._bytes[offset : offset + self._length(offset)].data)
        return {offset: place + 8 + len(encoded) for offset, place in found.items()}

    def _length(self, offset: int) -> int:
        first, last = self._entries[offset][1]["data_offsets"]
        return last - first


def _external(model: ir.Model) -> list[tuple[ir.Value, ir.ExternalTensor]]:
    values = ((value, value.const_value) for value in model.graph.initializers.values())
    return [(value, tensor) for value, tensor in values if isinstance(tensor, ir.ExternalTensor)]


def _offsets(model: ir.Model) -> list[int]:
    """Where the model's weights stand in the common file, each once."""
    return list(dict.fromkeys(tensor.offset or 0 for _, tensor in _external(model)))


def _point(model: ir.Model, places: Mapping[int, tuple[str, int]], file: Path) -> None:
    """Let the model read its weights from other files."""
    for value, tensor in _external(model):
        location, offset = places[tensor.offset or 0]
        value.const_value = ir.ExternalTensor(
            location,
            offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=value.name or "",
            base_dir=file.parent,
        )


def _name_batch(model: ir.Model) -> None:
    """transformers.js begins with an empty past, whose axes with a name are 0 long, but for this one."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(["batch_size" if str(size) == "batch" else size for size in value.shape])
