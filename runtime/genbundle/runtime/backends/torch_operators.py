"""Operators of torch.export programs that torch doesn't bring: made known to torch when a bundle is opened or built."""

import functools
from typing import Any

GROUPED_MM = "genbundle::grouped_mm"


@functools.cache
def register_operators() -> None:
    """Register `genbundle::grouped_mm` with torch, once in a process.

    It multiplies rows `[rows, in]`, sorted by group, by the matrix of their group, `[groups, in, out]`; `offs [groups]`
    says where each group's rows end. What mixtures of experts are made of: `torch._grouped_mm` in float32 on a CPU.
    """
    import torch

    def grouped_mm(rows: Any, weight: Any, offs: Any) -> Any:
        result, start = rows.new_zeros(rows.shape[0], weight.shape[2]), 0
        for matrix, end in zip(weight, offs.tolist(), strict=True):
            if start != end:
                torch.mm(rows[start:end], matrix, out=result[start:end])
            start = end
        return result

    operator = torch.library.custom_op(
        GROUPED_MM, grouped_mm, mutates_args=(), schema="(Tensor rows, Tensor weight, Tensor offs) -> Tensor"
    )
    operator.register_fake(lambda rows, weight, offs: rows.new_empty(rows.shape[0], weight.shape[2]))
