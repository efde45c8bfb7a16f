"""The step between lowering and the weight pool: every program's weights at the precision of their part."""

import hashlib
from dataclasses import dataclass, replace
from functools import partial

import onnx_ir as ir
import torch

from genbundle.builder.components import Component
from genbundle.builder.formats import Progress, knowing
from genbundle.builder.passes.half_precision import halve
from genbundle.builder.passes.weight_only import quantize_weights
from genbundle.builder.precision import BITS, HALVES, LANGUAGE_MODEL, Precisions, kept_note, part_of
from genbundle.builder.weights import SHARED_FROM_BYTES
from genbundle.bundles.manifest import Program

_TOKEN_INPUTS = ("input_ids", "decoder_input_ids")
_HALF_TYPES = {"fp16": (torch.float16, ir.DataType.FLOAT16), "bf16": (torch.bfloat16, ir.DataType.BFLOAT16)}


@dataclass(frozen=True, kw_only=True)
class RoundedPrograms:
    """Which precision each program got, and how many tokens the table has that an input of it looks up."""

    precisions: dict[str, str]
    rows: dict[str, dict[str, int]]

    def describe(self, program: Program) -> Program:
        """The manifest's entry with its precision, and with the tokens that it knows: the engine takes any others for
        zeros, and says nothing."""
        rows = self.rows.get(program.name, {})
        inputs = tuple(knowing(item, rows.get(item.name)) for item in program.inputs)
        return replace(program, inputs=inputs, precision=self.precisions.get(program.name, "fp32"))


def round_programs(
    lowered: list[tuple[Component, ir.Model]], precisions: Precisions, progress: Progress, notes: list[str]
) -> RoundedPrograms:
    """Quantize the models in place, each weight by the part of the model that it belongs to; a part in 16 bits whole.

    Of a program with encoder and language model in one, the weights that other programs of the language model read are
    the language model's, so that they are shared; the others stay.
    """
    parts = {component.name: part_of(component) for component, _ in lowered}
    precisions.expect_parts(parts.values())
    used, rows, kept = {name: precisions.of_part(part) for name, part in parts.items()}, {}, {}
    mixed = {component.name for component, _ in lowered if {"encoder", "language_model"} <= set(component.roles)}
    known: set[bytes] = set()
    for place, (component, model) in enumerate(lowered):
        if used[component.name] in HALVES:
            progress(f"halve {component.name}")
            lowered[place] = _halved(component, model, used[component.name])
    for component, model in sorted(lowered, key=lambda item: item[0].name in mixed):
        bits = BITS.get(used[component.name])
        if bits is None:
            continue
        progress(f"quantize {component.name}")
        tokens = [
            name
            for name, source in component.sources.items()
            if source.kind == "tokens" or (source.kind == "user" and source.name in _TOKEN_INPUTS)
        ]
        if component.name in mixed:
            done = quantize_weights(model, bits, tokens=tokens, chosen=partial(_among, known))
        else:
            if mixed and parts[component.name] == LANGUAGE_MODEL:
                known |= {_content(value) for value in model.graph.initializers.values() if _large(value)}
            done = quantize_weights(model, bits, tokens=tokens)
        rows[component.name] = done.rows
        kept |= done.kept
    notes.extend(kept_note(kept))
    return RoundedPrograms(precisions=used, rows=rows)


def _halved(component: Component, model: ir.Model, precision: str) -> tuple[Component, ir.Model]:
    """A component whose arithmetic and state are in 16 bits; what it gets and gives besides is float32."""
    torch_type, graph_type = _HALF_TYPES[precision]
    past = {name for name, source in component.sources.items() if source.kind == "state"}
    sample = {
        name: tensor.to(torch_type) if name in past and tensor.is_floating_point() else tensor
        for name, tensor in component.sample.items()
    }
    halve(model, past | component.states.keys(), graph_type)
    return replace(component, sample=sample), model


def _among(known: set[bytes], value: ir.Value) -> bool:
    return _content(value) in known


def _large(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.nbytes >= SHARED_FROM_BYTES


def _content(value: ir.Value) -> bytes:
    assert value.const_value is not None
    return hashlib.sha256(value.const_value.tobytes()).digest()
