"""Recorded inputs with the tokens and logits that eager gave: a bundle proves itself by them with no model near."""

import math
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from genbundle.bundles.dtypes import DTYPE_NAMES, numpy_dtype
from genbundle.bundles.errors import BundleError

GOLDEN_NAME = "golden.msgpack"
_VERSION = 1
_MOST_ITEMS = 10_000
MOST_ROUNDING = 0.01
"""The most that a record may say of a model's rounding: above it nothing would be proven."""
_MOST_BYTES = 2**31  # of all deflated arrays of a file, which few bytes may claim to hold
_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, zlib.error, msgpack.exceptions.UnpackException)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenCase:
    """One generation that eager did greedily.

    inputs: the generation inputs (`input_ids` `[batch, length]`, ...). sequences: `[batch, length + new]`, as
    `model.generate` returned them. top_ids, top_logits: int64 and float32 `[batch, new, k]`, the largest logits of
    every step and their tokens. rest: float32 `[batch, new]`, what all other logits amount to, the logarithm of the sum
    of their exponentials; None where there are no others. rounding: float32 `[batch, new]`, how far the model's logits
    in float32 are from those in float64 at each step, of the largest one's size; None where that wasn't measured.
    """

    name: str
    inputs: dict[str, np.ndarray]
    sequences: np.ndarray
    top_ids: np.ndarray
    top_logits: np.ndarray
    rest: np.ndarray | None = None
    rounding: np.ndarray | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def truncated(self, k: int) -> "GoldenCase":
        """The case, which has every logit, with only the `k` largest of every step."""
        order = np.argsort(-self.top_logits, axis=-1, kind="stable")
        ids, logits = (np.take_along_axis(array, order, -1) for array in (self.top_ids, self.top_logits))
        rest = log_sum_exp(logits[..., k:]).astype(np.float32) if k < logits.shape[-1] else None
        return replace(self, top_ids=ids[..., :k], top_logits=logits[..., :k], rest=rest)


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """The logarithm of the sum of the exponentials along the last axis, in float64."""
    largest = logits.max(axis=-1, keepdims=True).astype(np.float64)
    return np.log(np.exp(logits - largest).sum(axis=-1)) + largest[..., 0]


def write_golden(path: Path, cases: list[GoldenCase]) -> None:
    """Write `cases` to `path`; the same cases give the same bytes."""
    content = {
        "version": _VERSION,
        "cases": [
            {
                "name": case.name,
                "inputs": {name: _pack(array) for name, array in sorted(case.inputs.items())},
                "sequences": _pack(case.sequences),
                "top_ids": _pack(case.top_ids),
                "top_logits": _pack(case.top_logits),
                "rest": None if case.rest is None else _pack(case.rest),
                "rounding": None if case.rounding is None else _pack(case.rounding),
                "options": dict(sorted(case.options.items())),
            }
            for case in cases
        ],
    }
    path.write_bytes(msgpack.packb(content))  # pyright: ignore[reportArgumentType]


def read_golden(path: Path) -> list[GoldenCase]:
    """The cases in the file `path`; BundleError if it isn't what `write_golden` writes."""
    try:
        # msgpack makes a list of the length that an array's head names before it reads the first item.
        content = msgpack.unpackb(path.read_bytes(), max_map_len=_MOST_ITEMS, max_array_len=_MOST_ITEMS)
        if content["version"] != _VERSION:
            raise BundleError(f"{path}: golden file version {content['version']!r}, expected {_VERSION}")
        arrays = _Arrays()
        cases = [
            GoldenCase(
                name=case["name"],
                inputs={name: arrays.unpack(array) for name, array in case["inputs"].items()},
                sequences=arrays.unpack(case["sequences"]),
                top_ids=arrays.unpack(case["top_ids"]),
                top_logits=arrays.unpack(case["top_logits"]),
                rest=None if case["rest"] is None else arrays.unpack(case["rest"]),
                rounding=None if case.get("rounding") is None else arrays.unpack(case["rounding"]),
                options=case["options"],
            )
            for case in content["cases"]
        ]
        for case in cases:
            _check(case)
        return cases
    except _DAMAGED as error:
        raise BundleError(f"{path}: not a golden file: {error}") from error
    except MemoryError as error:
        raise BundleError(f"{path}: not a golden file that fits in the memory here") from error


def _check(case: GoldenCase) -> None:
    """ValueError for a case that a replay couldn't be compared with, or that nothing could differ from."""
    if not isinstance(case.name, str) or not all(isinstance(name, str) for name in case.inputs):
        raise ValueError(f"the names of a case and its inputs are texts, got {case.name!r} with {list(case.inputs)}")
    ids, logits, sequences = case.top_ids, case.top_logits, case.sequences
    if ids.dtype.kind not in "iu" or sequences.dtype.kind not in "iu" or logits.dtype != np.float32:
        raise ValueError(
            f"{case.name}: expected sequences and top_ids of integers and top_logits float32, got {sequences.dtype}, "
            f"{ids.dtype} and {logits.dtype}"
        )
    if ids.ndim != 3 or ids.shape != logits.shape or 0 in ids.shape or (ids < 0).any():
        raise ValueError(f"{case.name}: top_ids {ids.shape} and top_logits {logits.shape} don't fit")
    if sequences.ndim != 2 or len(ids) != len(sequences) or ids.shape[1] > sequences.shape[1]:
        raise ValueError(f"{case.name}: sequences {sequences.shape} and top_ids {ids.shape} don't fit")
    rest = case.rest
    if rest is not None and (rest.dtype != np.float32 or rest.shape != ids.shape[:2]):
        raise ValueError(f"{case.name}: rest {rest.dtype} {rest.shape} doesn't fit top_ids {ids.shape}")
    if not np.isfinite(logits).all() or (rest is not None and not np.isfinite(rest).all()):
        raise ValueError(f"{case.name}: top_logits or rest that aren't numbers")
    rounding = case.rounding
    if rounding is not None and (rounding.shape != ids.shape[:2] or rounding.dtype.kind != "f"):
        raise ValueError(f"{case.name}: expected a rounding of every step, got {list(rounding.shape)}")
    if rounding is not None and not ((rounding >= 0) & (rounding <= MOST_ROUNDING)).all():
        raise ValueError(f"{case.name}: expected roundings from 0 to {MOST_ROUNDING}, got {rounding.max()}")
    options = case.options if isinstance(case.options, dict) else {}
    new_tokens = options.get("max_new_tokens")
    # Fewer steps than that are recorded where every sequence ended before.
    if type(new_tokens) is not int or new_tokens < ids.shape[1] or options.get("do_sample") is not False:
        raise ValueError(
            f"{case.name}: expected options with do_sample false and max_new_tokens of at least the {ids.shape[1]} "
            f"recorded steps, got {case.options!r:.200}"
        )


def _pack(array: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(array).tobytes()
    deflated = zlib.compress(data, 9)
    packed = {"dtype": array.dtype.name, "shape": list(array.shape)}
    return {**packed, "deflated": deflated} if len(deflated) < len(data) else {**packed, "data": data}


class _Arrays:
    """Reads the arrays of one file."""

    def __init__(self) -> None:
        self._left = _MOST_BYTES

    def unpack(self, value: dict[str, Any]) -> np.ndarray:
        """The array that the map `value` is; ValueError, zlib.error or another of `_DAMAGED` for one that is none."""
        if value["dtype"] not in DTYPE_NAMES:
            raise ValueError(f"unknown dtype {value['dtype']!r}")
        shape = value["shape"]
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"expected a shape, got {shape!r:.200}")
        dtype = numpy_dtype(value["dtype"])
        if "deflated" not in value:
            return np.frombuffer(value["data"], dtype).reshape(shape)
        data = self._inflate(value["deflated"], math.prod(shape) * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(shape)

    def _inflate(self, deflated: bytes, size: int) -> bytes:
        """What `deflated` holds, which has to be exactly `size` bytes."""
        self._left -= size
        if self._left < 0:
            raise ValueError(f"its deflated arrays are larger than {_MOST_BYTES} bytes")
        inflater = zlib.decompressobj()
        # One byte more than there may be, and no others, however many it would give.
        data = inflater.decompress(deflated, size + 1)
        if len(data) != size or not inflater.eof or inflater.unused_data:
            raise ValueError(f"expected one zlib stream of {size} bytes, which gives others or goes on behind them")
        return data
