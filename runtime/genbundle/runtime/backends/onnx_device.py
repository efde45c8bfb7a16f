"""What ONNX Runtime takes and gives on a GPU, and the buffers of state that stay there between its calls."""

import functools
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

# ONNX's numbers of its types: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
BFLOAT16 = 16
TYPES: Mapping[int, np.dtype] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
# A graph of one operator, float32 y = Cast(bfloat16 x), as serialized by onnx_ir: numpy can't take what is inside an
# OrtValue of bfloat16, and the engine can.
_WIDEN = (
    b'\x08\t:2\n\x17\n\x01x\x12\x01y"\x04Cast*\t\n\x02to\x18\x01\xa0\x01\x02\x12\x01gZ\t\n\x01x\x12\x04\n\x02\x08\x10b'
    b"\t\n\x01y\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x14"
)
_SIZES = 8  # of the buffers of one state that are kept for the next sequences


def on_device(value: Any, array: np.ndarray, device: str) -> Any:
    """A copy of `array` on `device`; value: ONNX Runtime's class OrtValue."""
    kind = BFLOAT16 if array.dtype == ml_dtypes.bfloat16 else array.dtype.type
    made = value.ortvalue_from_shape_and_type(array.shape, kind, device)
    overwrite(made, array)
    return made


def overwrite(target: Any, array: np.ndarray) -> None:
    """Copy `array` to where the OrtValue `target` lies."""
    array = np.asarray(array, order="C")
    # numpy has no bfloat16 that ONNX Runtime knows; the bytes are the same.
    target.update_inplace(array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array)


def as_numpy(onnxruntime: Any, tensor: Any, provider: str) -> np.ndarray:
    """What an OrtValue holds; bfloat16 as ml_dtypes has it."""
    if tensor.element_type() != BFLOAT16:
        return tensor.numpy()
    session = _widening(onnxruntime, provider)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", tensor)
    binding.bind_output("y", "cpu")
    session.run_with_iobinding(binding)
    return binding.get_outputs()[0].numpy().astype(ml_dtypes.bfloat16)


@functools.cache
def _widening(onnxruntime: Any, provider: str) -> Any:
    return onnxruntime.InferenceSession(_WIDEN, providers=[provider])


class BufferPool:
    """Buffers of state on a device. Of each size one stays, and goes to other sequences when those that had it are
    gone: recorded steps hold addresses. Sequences that come meanwhile get others, which end with them."""

    def __init__(self, value: Any, device: str):
        self._value, self._device = value, device
        self._kept: dict[str, OrderedDict[tuple, _Kept]] = {}
        self._addresses: set[int] = set()

    def take(self, name: str, array: np.ndarray) -> Any:
        """A buffer for the state `name` that holds what `array` does."""
        kept = self._kept.setdefault(name, OrderedDict())
        size = (array.shape, array.dtype)
        found = kept.get(size)
        if found is not None and found.taken:
            return on_device(self._value, array, self._device)
        if found is None:
            inside = on_device(self._value, array, self._device)._get_c_value()
            found = kept[size] = _Kept(inside)
            made = self._value(inside)
            self._addresses.add(made.data_ptr())
            if len(kept) > _SIZES:
                _, oldest = kept.popitem(last=False)
                self._addresses.discard(self._value(oldest.inside).data_ptr())
        else:
            kept.move_to_end(size)
            made = self._value(found.inside)
            overwrite(made, array)
        found.taken = True
        weakref.finalize(made, setattr, found, "taken", False)
        return made

    def stay(self, addresses: Iterable[int]) -> bool:
        """Whether buffers at these addresses go to other sequences."""
        return self._addresses.issuperset(addresses)


@dataclass(slots=True)
class _Kept:
    inside: Any
    taken: bool = False
