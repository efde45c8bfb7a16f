"""Weights of a module as torchao rounds them, for the time that it takes to trace the module."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from genbundle.builder.components import Component
from genbundle.builder.precision import BITS, LANGUAGE_MODEL, only_encodes, part_of
from genbundle.builder.weights import SHARED_FROM_BYTES

_GROUP = 32  # weights that share a scale at 4 bits; at 8 bits each row has one


@dataclass(kw_only=True)
class Rounding:
    """What is rounded: `layers`, each with the weight that it had and the bytes of what it has instead; `kept`, weights
    that stay, by layer and shape with their bytes; `rows`, the tokens that a rounded embedding knows."""

    layers: dict[torch.nn.Module, tuple[torch.nn.Parameter, int]] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    rows: int | None = None


def saved_bytes(roundings: Iterable[Rounding]) -> int:
    """What they save of a model's bytes. A weight that several layers shared is one, and stands once for each now."""
    layers = {module: entry for rounding in roundings for module, entry in rounding.layers.items()}
    before = {id(weight): weight.nbytes for weight, _ in layers.values()}
    return sum(before.values()) - sum(after for _, after in layers.values())


@contextmanager
def rounded(
    modules: Iterable[torch.nn.Module], precision: str, *, vocabulary: int | None, activations: bool
) -> Iterator[Rounding]:
    """While open, the weights of linear layers and token embeddings among `modules` are torchao's tensors, of integers
    with scales; afterwards all are as before.

    vocabulary: the rows of a token embedding; other tables hold positions or kinds, and stay. activations: whether
    products round their inputs to 8 bits, row by row, as they go.
    """
    found = Rounding()
    bits = BITS.get(precision)
    if bits is None:
        yield found
        return
    # Here, since it takes seconds and only lossy builds for two backends need it.
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    dtype = getattr(torch, f"int{bits}")
    granularity = PerAxis(0) if bits == 8 else PerGroup(_GROUP)
    table = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
    dynamic = Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
    saved: list[tuple[torch.nn.Module, torch.nn.Parameter]] = []
    try:
        for module in dict.fromkeys(modules):
            weight = module._parameters.get("weight")
            if weight is None or weight.dim() < 2 or weight.nbytes < SHARED_FROM_BYTES:
                continue
            linear = isinstance(module, torch.nn.Linear)
            tokens = isinstance(module, torch.nn.Embedding) and weight.shape[0] == vocabulary
            if not (linear or tokens) or (bits == 4 and weight.shape[1] % _GROUP):
                found.kept[f"{type(module).__name__} {list(weight.shape)}"] = weight.nbytes
                continue
            saved.append((module, weight))
            quantize_(module, dynamic if linear and activations else table, lambda item, _, own=module: item is own)
            scales = 4 * (weight.shape[0] if bits == 8 else weight.numel() // _GROUP)
            found.layers[module] = (weight, weight.numel() * bits // 8 + scales)
            found.rows = vocabulary if tokens else found.rows
        yield found
    finally:
        for module, weight in saved:
            module.weight = weight


@contextmanager
def rounded_layers(component: Component, precision: str, *, activations: bool) -> Iterator[Rounding]:
    """`rounded` for the layers that a component's program calls, at the precision of the component's part."""
    if precision == "fp32":
        yield Rounding()
        return
    layers, vocabulary = layers_of(component)
    with rounded(layers, precision, vocabulary=vocabulary, activations=activations) as found:
        yield found


def layers_of(component: Component) -> tuple[list[torch.nn.Module], int | None]:
    """The layers that a component's program calls whose weights its part's precision is for, and the tokens that its
    model knows; None where they aren't known, or no table of the part holds tokens.

    Only the decoder, its head and its table where an encoder is in the same program.
    """
    layers = called_layers(component)
    model = next((module for module in component.module.modules() if isinstance(module, PreTrainedModel)), None)
    if part_of(component) != LANGUAGE_MODEL or model is None:
        return layers, None
    try:
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # which of its tables is meant isn't known (PP-FormulaNet)
        table = head = None
    rows = len(table.weight) if isinstance(table, torch.nn.Embedding) else None
    if "encoder" not in component.roles or only_encodes(component.roles):
        return layers, rows
    parts = [part for part in (model.get_decoder(), head, table) if isinstance(part, torch.nn.Module)]
    own = {module for part in parts for module in part.modules()}
    return [layer for layer in layers if layer in own], rows


def called_layers(component: Component) -> list[torch.nn.Module]:
    """The modules with a weight that the component's sample goes through: its module may hold the whole model."""
    found: dict[torch.nn.Module, None] = {}

    def note(module: torch.nn.Module, _: Any) -> None:
        if module._parameters.get("weight") is not None:
            found[module] = None

    watching = register_module_forward_pre_hook(note)
    try:
        with torch.no_grad():
            component.module(**component.sample)
    finally:
        watching.remove()
    return list(found)
