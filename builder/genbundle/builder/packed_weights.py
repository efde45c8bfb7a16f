"""Weights of 8 bits as torch's own operators read them, for the time that it takes to trace a module."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from genbundle.builder.components import Component
from genbundle.builder.cut import attribute
from genbundle.builder.rounding import Rounding, rounded_layers


@contextmanager
def packed(component: Component, precision: str) -> Iterator[Rounding]:
    """While open, the linear layers that the component's program calls, and its token embedding, compute with torchao's
    8-bit integers through aten's operators, so that an archive needs no torchao; afterwards they are as before.

    Code that reads a weight itself, instead of calling its layer, would find integers: it fails, and the build says so.
    """
    with rounded_layers(component, precision, activations=False) as found:
        weights = {module: module._parameters.pop("weight") for module in found.less}
        try:
            for module, weight in weights.items():
                parts: Any = weight
                module.register_buffer("weight", parts.qdata)
                module.register_buffer("weight_scale", parts.scale.reshape(-1))
            with (
                _through(torch.nn.Linear, weights.keys(), _multiply),
                _through(torch.nn.Embedding, weights.keys(), _look_up),
            ):
                yield found
        finally:
            for module, weight in weights.items():
                del module._buffers["weight"], module._buffers["weight_scale"]
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
