"""Weights of 8 and 4 bits as torch's own operators read them, for the time that it takes to trace a module."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from genbundle.builder.components import Component
from genbundle.builder.cut import attribute
from genbundle.builder.precision import BITS
from genbundle.builder.rounding import Rounding, rounded_layers

_ROWS = 8192  # of 4-bit weights that are at float32 at once


@contextmanager
def packed(component: Component, precision: str) -> Iterator[Rounding]:
    """While open, the linear layers that the component's program calls, and its token embedding, compute with torchao's
    integers through aten's operators, so that an archive needs no torchao; afterwards they are as before.

    Code that reads a weight itself, instead of calling its layer, would find integers: it fails, and the build says so.
    """
    with rounded_layers(component, precision, activations=False) as found:
        small = BITS.get(precision) == 4
        pack = in_halves if small else in_rows
        multiply, look_up = (_multiply_halves, _look_up_halves) if small else (_multiply, _look_up)
        weights = {module: module._parameters.pop("weight") for module in found.layers}
        try:
            for module, weight in weights.items():
                parts: Any = weight
                integers, scales = pack(parts.qdata, parts.scale)
                module.register_buffer("weight", integers)
                module.register_buffer("weight_scale", scales)
            with (
                _through(torch.nn.Linear, weights.keys(), multiply),
                _through(torch.nn.Embedding, weights.keys(), look_up),
            ):
                yield found
        finally:
            for module, weight in weights.items():
                for name in ("weight", "weight_scale"):
                    module._buffers.pop(name, None)  # not there where packing failed
                module._parameters["weight"] = weight


@contextmanager
def _through(kind: Any, packed_ones: Collection[torch.nn.Module], function: Any) -> Iterator[None]:
    """While open, the forward of `kind` is `function` for those modules; kinds derived from it call it as theirs."""
    original = kind.forward

    def forward(module: Any, values: torch.Tensor) -> torch.Tensor:
        return function(module, values) if module in packed_ones else original(module, values)

    with attribute(kind, "forward", forward):
        yield


def _multiply(module: Any, values: torch.Tensor) -> torch.Tensor:
    rows = values.reshape(-1, values.shape[-1]).contiguous()
    product = torch.ops.aten._weight_int8pack_mm(rows, module.weight, module.weight_scale)
    product = product.reshape(*values.shape[:-1], module.weight.shape[0])
    return product if module.bias is None else product + module.bias


def _look_up(module: Any, ids: torch.Tensor) -> torch.Tensor:
    scales = module.weight_scale[:, None]
    return torch.nn.functional.embedding(ids, module.weight).to(scales.dtype) * torch.nn.functional.embedding(
        ids, scales
    )


def in_rows(integers: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit weights as they are, int8 `[rows, columns]`, and a scale for each row, float32 `[rows]`."""
    return integers, scales.reshape(-1)


def in_halves(integers: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """4-bit weights `[rows, columns]` two in a byte, int8 `[groups, 16, rows]`: the lower half holds a group's first 16
    columns, the upper its last 16. Their scales `[groups, 1, rows]` are float16, or float32 where that has no room for
    some of them.

    No operator of aten reads 4 bits in a layout that doesn't depend on the processor. Rows come last, since scaling
    runs along them.
    """
    rows, groups = scales.shape
    first, last = integers.T.reshape(groups, 2, -1, rows).unbind(1)
    halves = (first & 15) | (last << 4)
    short = torch.finfo(torch.float16)
    fits = bool(((scales == 0) | ((scales >= short.tiny) & (scales <= short.max))).all())
    scales = scales.T.reshape(groups, 1, rows)
    return halves.contiguous(), (scales.half() if fits else scales).contiguous()


def from_halves(halves: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights that `in_halves` packed, float32 `[columns, rows]`."""
    return (torch.cat([(halves << 4) >> 4, halves >> 4], 1) * scales.float()).flatten(0, 1)


def _multiply_halves(module: Any, values: torch.Tensor) -> torch.Tensor:
    # Some rows at a time, so that no whole head stands in memory at float32.
    parts = zip(module.weight.split(_ROWS, 2), module.weight_scale.split(_ROWS, 2), strict=True)
    product = torch.cat([values @ from_halves(*part) for part in parts], -1)
    return product if module.bias is None else product + module.bias


def _look_up_halves(module: Any, ids: torch.Tensor) -> torch.Tensor:
    found = (tensor.index_select(2, ids.flatten()) for tensor in (module.weight, module.weight_scale))
    return from_halves(*found).T.unflatten(0, ids.shape)
