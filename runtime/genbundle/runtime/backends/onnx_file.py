"""Which files an .onnx names, read from its bytes: ONNX Runtime opens any that lies beside it, listed or not."""

from collections.abc import Iterator

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


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each field that has a length; the others are numbers, and passed over."""
    place = 0
    while place < len(message):
        tag, place = _number(message, place)
        wire, size = tag & 7, 0
        if wire == 0:
            _, place = _number(message, place)
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
