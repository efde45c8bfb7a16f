"""Which files an .onnx names, and where its weights lie in them, read from its bytes: ONNX Runtime opens any file that
lies beside it, listed or not, and each of its sessions would have weights of its own on a GPU."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# The fields of ONNX's messages that lead to a tensor, from https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}


def named_files(content: bytes) -> set[str]:
    """The locations of a model's external data; ValueError for what isn't a protobuf message."""
    found, waiting = set(), [("model", memoryview(content))]
    while waiting:
        kind, message = waiting.pop()
        if kind == "entry":
            # A field that stands twice counts as it stands last, as in any protobuf reader.
            entry = {field: bytes(value) for field, value in _fields(message)}
            if entry.get(1) == b"location":
                found.add(entry.get(2, b"").decode("utf-8"))
            continue
        inside = _FIELDS[kind]
        waiting += [(inside[field], value) for field, value in _fields(message) if field in inside]
    return found


_WHOLE = re.compile(rb"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class ExternalWeight:
    """A weight in another file: its `length` bytes from `offset` on are numbers of ONNX's type `dtype`."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int


def external_weights(content: bytes) -> list[ExternalWeight]:
    """The weights of a model's graph that lie in other files; ValueError for what isn't a protobuf message."""
    graphs = [value for field, value in _fields(memoryview(content)) if field == 7]
    tensors = [value for graph in graphs for field, value in _fields(graph) if field == 5]
    return [found for tensor in tensors if (found := _external(tensor)) is not None]


def _external(tensor: memoryview) -> ExternalWeight | None:
    """None for a weight inside the model, and for one that is written as no library writes it."""
    shape, dtype, name, where = [], 0, b"", {}
    for field, value in _each(tensor):
        if isinstance(value, int):
            shape += [value] if field == 1 else []
            dtype = value if field == 2 else dtype
        elif field == 1:
            shape += _packed(value)
        elif field == 8:
            name = bytes(value)
        elif field == 13:
            entry = dict(_fields(value))
            where[bytes(entry.get(1, b""))] = bytes(entry.get(2, b""))
    offset, length = where.get(b"offset", b""), where.get(b"length", b"")
    if b"location" not in where or not (_WHOLE.fullmatch(offset) and _WHOLE.fullmatch(length)):
        return None
    location = where[b"location"].decode("utf-8")
    return ExternalWeight(name.decode("utf-8"), dtype, tuple(shape), location, int(offset), int(length))


def _packed(value: memoryview) -> Iterator[int]:
    place = 0
    while place < len(value):
        number, place = _number(value, place)
        yield number


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each field that has a length."""
    return ((field, value) for field, value in _each(message) if isinstance(value, memoryview))


def _each(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """The fields that have a length or are whole numbers; the others are passed over."""
    place = 0
    while place < len(message):
        tag, place = _number(message, place)
        if not 8 <= tag < 2**32:  # readers differ in what they take such for: another field, or none
            raise ValueError(f"a field of the number {tag >> 3}")
        wire, size = tag & 7, 0
        if wire == 0:
            value, place = _number(message, place)
            yield tag >> 3, value
        elif wire == 2:
            size, place = _number(message, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of the wire type {wire}")
        if place + size > len(message):
            raise ValueError("a field that is longer than what holds it")
        if wire == 2:
            yield tag >> 3, message[place : place + size]
        place += size


def _number(message: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            break
        byte, place = message[place], place + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), place
    raise ValueError("a number that doesn't end")
