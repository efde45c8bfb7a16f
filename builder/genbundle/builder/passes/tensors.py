"""Weights' tensors: their sizes, and tensors that are computed from them when they are read."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir


def sizes(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a tensor, which is known throughout, in numbers."""
    return tuple(int(size) for size in tensor.shape)  # pyright: ignore[reportArgumentType]


def when_read(
    tensor: ir.TensorProtocol,
    change: Callable[[np.ndarray], np.ndarray],
    shape: Sequence[int],
    name: str,
    dtype: ir.DataType | None = None,
) -> ir.LazyTensor:
    """What `change` makes of a tensor's numbers, of its type or `dtype`, computed each time that it is read: no second
    copy of all weights is ever in memory."""
    dtype = dtype or tensor.dtype

    def compute() -> ir.TensorProtocol:
        return ir.tensor(change(tensor.numpy()), dtype=dtype, name=name)

    return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape), name=name)
