"""Weights of a module as torchao rounds them, for the time that it takes to trace the module."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from genbundle.builder.components import Component
from genbundle.builder.precision import BITS, LANGUAGE_MODEL, part_of
from genbundle.builder.weights import SHARED_FROM_BYTES

_GROUP = 32  # weights that share a scale at 4 bits; at 8 bits each row has one


@dataclass(kw_only=True)
class Rounding:
    """What is rounded: `kept`, weights that stay, by layer and shape with their bytes; `less`, the bytes that are
    saved; `rows`, the tokens that a rounded embedding knows."""

    kept: dict[str, int] = field(default_factory=dict)
    less: int = 0
    rows: int | None = None


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
    seen: set[int] = set()
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
            # A tied weight becomes two.
            scales = 4 * (weight.shape[0] if bits == 8 else weight.numel() // _GROUP)
            found.less += (0 if id(weight) in seen else weight.nbytes) - weight.numel() * bits // 8 - scales
            seen.add(id(weight))
            found.rows = vocabulary if tokens else found.rows
        yield found
    finally:
        for module, weight in saved:
            module.weight = weight


def language_model_of(component: Component) -> tuple[list[torch.nn.Module], int | None]:
    """The modules whose weights a component's program rounds, and the tokens that its model knows.

    None of an encoder, and only the decoder, its head and its table where an encoder is in the same program.
    """
    modules = list(component.module.modules())
    model = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    if part_of(component) != LANGUAGE_MODEL or model is None:
        return [], None
    try:
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # which of its tables is meant isn't known (PP-FormulaNet)
        table = head = None
    rows = len(table.weight) if isinstance(table, torch.nn.Embedding) else None
    if "encoder" not in component.roles:
        return modules, rows
    own = [model.get_decoder(), head, table]
    return [item for module in own if isinstance(module, torch.nn.Module) for item in module.modules()], rows
