"""The `xnnpack` backend: one multi-method .pte whose decoder owns its cache, lowered to ExecuTorch's XNNPACK delegate.

The method names and constants are those that ExecuTorch's own runners look for, so that a bundle whose model they can
express runs in them unchanged: `forward` (TextLLMRunner); `vision_encoder` or `audio_encoder`,
`token_embedding` and `text_decoder` (MultimodalRunner).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from genbundle.builder.formats import Exported, knowing
from genbundle.builder.noise import quiet
from genbundle.builder.plan import Capture
from genbundle.builder.precision import BITS, LANGUAGE_MODEL, Precisions, kept_note, only_encodes, part_of
from genbundle.builder.rounding import Rounding, rounded, rounded_layers, saved_bytes
from genbundle.builder.stateful import DecoderCall, StatefulDecoder, decoder_of, head_of
from genbundle.builder.stateful_encoder import MediaEncoder, media_component, with_sounds
from genbundle.builder.stateful_merge import (
    Scatter,
    TokenEmbedding,
    check_scatter,
    fixed_inputs,
    probe_call,
    text_alone,
)
from genbundle.builder.stock_runners import MULTIMODAL_RUNNER, TEXT_RUNNER, multimodal_obstacle
from genbundle.builder.weights import unique_bytes
from genbundle.bundles import MissingExtraError, UnsupportedModelError
from genbundle.bundles.manifest import Flow, Input, Output, Program, Role, Route, Runner, Source
from genbundle.runtime.positions import POSITION_INPUTS

PROGRAM_FILE = "model.pte"
_TOKENS = Input(name="tokens", dtype="int64", shape=(1, "sequence"), source=Source(kind="tokens"))
_START = Input(name="start_pos", dtype="int64", shape=(1,), source=Source(kind="start"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method of a .pte: the module, inputs to trace it with, and `torch.export`'s description of their axes.

    fold_constants: compute what doesn't depend on the inputs now, where the model computes it with operators that
    ExecuTorch lacks; every weight that only such a computation reads is replaced by its result.
    """

    module: torch.nn.Module
    args: tuple[torch.Tensor, ...]
    dynamic_shapes: Any = None
    fold_constants: bool = False


def export_executorch(
    model: PreTrainedModel,
    *,
    max_length: int,
    eos_token_ids: Sequence[int] = (),
    captures: Sequence[Capture] = (),
    positions: Source | None = None,
    path: Path,
    precisions: Precisions | None = None,
) -> Exported:
    """Write `model` as one .pte to `path` and say what is in it.

    Args:
        model: a loaded generative model, float32, in eval mode; unchanged afterwards.
        max_length: the most tokens (prompt and generated) that the state holds; the file reserves memory for them.
        eos_token_ids: where ExecuTorch's own runners stop.
        captures: generations of the model, with pictures or sounds for a model that takes them beside text.
        positions: the source of explicit position ids (M-RoPE), where the model's decoder takes them.
        path: the file to write.
        precisions: float32 by default.

    Raises:
        BuildError: a precision for a part that the model doesn't have.
        UnsupportedModelError: the model's state, attention or merge can't be expressed; names component and cause.
        MissingExtraError: ExecuTorch isn't installed.
    """
    with quiet():
        captures = with_sounds(model, list(captures))
        if any("mm_encoder_outputs" in item.prompt for item in captures):
            exported, methods = _with_media(model, max_length, captures, positions)
        else:
            exported, methods = _text(model, max_length)
        encoder = next(
            (item.module.component for item in methods.values() if isinstance(item.module, MediaEncoder)), None
        )
        precisions = precisions or Precisions()
        precisions.expect_parts([LANGUAGE_MODEL] if encoder is None else [LANGUAGE_MODEL, part_of(encoder)])
        with ExitStack() as stack:
            found = {LANGUAGE_MODEL: stack.enter_context(_rounded_language_model(model, precisions.language_model))}
            if encoder is not None:
                part = part_of(encoder)
                layers = rounded_layers(encoder, precisions.of_part(part), activations=True)
                found[part] = stack.enter_context(layers)
            planned = lower(methods, runner_constants(max_length, eos_token_ids), path)
    programs = tuple(replace(item, memory=planned.get(item.method or "") or None) for item in exported.programs)
    exported = replace(exported, programs=programs, notes=_notes(model, precisions.language_model))
    if not precisions.lossy:
        return exported
    kept = {name: size for rounding in found.values() for name, size in rounding.kept.items()}
    parts = [
        part_of(encoder) if encoder is not None and only_encodes(item.roles) else LANGUAGE_MODEL for item in programs
    ]
    return replace(
        exported,
        programs=tuple(
            at_precision(program, precisions.of_part(part), found[part])
            for program, part in zip(programs, parts, strict=True)
        ),
        weight_bytes=unique_bytes(model) - saved_bytes(found.values()),
        notes=(*exported.notes, *kept_note(kept)),
    )


def _rounded_language_model(model: PreTrainedModel, precision: str) -> AbstractContextManager[Rounding]:
    """The decoder's, the head's and the token embedding's weights rounded while open."""
    table = cast(torch.nn.Embedding, model.get_input_embeddings())
    layers = [*decoder_of(model).modules(), head_of(model), table]
    return rounded(layers, precision, vocabulary=len(table.weight), activations=True)


def at_precision(program: Program, precision: str, found: Rounding) -> Program:
    """The manifest's entry of a program whose weights are rounded, with the tokens that it knows.

    ExecuTorch would end the process for any others.
    """
    inputs = tuple(
        knowing(item, found.rows) if item.source.kind == "tokens" or item.source.name == "input_ids" else item
        for item in program.inputs
    )
    # The merge takes placeholders that lie beyond the table.
    return replace(program, precision=precision, inputs=program.inputs if program.name == "merge" else inputs)


def runner_constants(max_length: int, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """The constant methods that ExecuTorch's own runners read from a .pte (extension/llm/runner/constants.h)."""
    return {
        "get_max_seq_len": max_length,
        "get_max_context_len": max_length,
        "get_eos_ids": list(eos_token_ids),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def lower(methods: Mapping[str, Method], constants: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Export `methods`, lower them to XNNPACK and write one .pte to `path`; the bytes of memory planned for each.

    Weights that several methods read in the same layout are stored once.

    Raises MissingExtraError without ExecuTorch, UnsupportedModelError (naming the method) for a module that
    torch.export or ExecuTorch can't take.
    """
    with quiet():
        try:
            from genbundle.builder.formats.executorch_lowering import lower_methods
        except ImportError as error:
            raise MissingExtraError("building an xnnpack bundle", "executorch", "builder") from error
        return lower_methods(methods, constants, path)


def _text(model: PreTrainedModel, max_length: int) -> tuple[Exported, dict[str, Method]]:
    call, _ = probe_call(model, {"input_ids": torch.zeros(1, 3, dtype=torch.long) + _some_token(model)})
    if call != DecoderCall():
        raise UnsupportedModelError(
            "language_model: generate calls it with more than tokens, or a prompt's tokens attend to later ones, which "
            "the xnnpack backend can't do for text alone: build for another backend, for instance cpu"
        )
    decoder = StatefulDecoder(model, capacity=max_length)
    sequence = torch.export.Dim("sequence", min=1, max=max_length)
    forward = Method(
        module=decoder,
        args=(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, dtype=torch.long)),
        dynamic_shapes=({1: sequence}, None),
    )
    roles: tuple[Role, ...] = ("merge", "language_model", "lm_head", "decode")
    program = _program("decode", "forward", roles, (_TOKENS, _START), (_logits(decoder),))
    flow = Flow(prompt=(Route(programs=("decode",)),), step=("decode",), batch=1, continues=True, capacity=max_length)
    return Exported(programs=(program,), flow=flow, runners=(Runner(name=TEXT_RUNNER),)), {"forward": forward}


def _with_media(
    model: PreTrainedModel, max_length: int, captures: list[Capture], positions: Source | None
) -> tuple[Exported, dict[str, Method]]:
    call, seen = probe_call(model, captures[0].inputs)
    if not call.embeds or (call.position_axes and positions is None):
        what = "position_ids have no rule" if call.embeds else "input is tokens although pictures or sounds were given"
        raise UnsupportedModelError(f"language_model: its {what}: build for another backend, for instance cpu")
    component, placeholder = media_component(model, captures)
    decoder, encoder = StatefulDecoder(model, capacity=max_length, call=call), MediaEncoder(component)
    embedding = TokenEmbedding(model, call.deepstack)
    scatter = Scatter(embedding, placeholder)
    with torch.no_grad():
        found = [part.reshape(-1, part.shape[-1]) for part in component.module(**component.sample).values()]
        check_scatter(scatter, captures[0].inputs, found, seen)
    width = found[0].shape[1]
    sequence = torch.export.Dim("sequence", min=1, max=max_length)
    features = torch.export.Dim("features", min=1, max=max_length)
    tokens, start = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    extra = [(torch.zeros(call.position_axes, 1, 3, dtype=torch.long), {2: sequence})] if call.position_axes else []
    extra += [(torch.ones(1, dtype=torch.long), None)] if call.both_ways else []
    extra += [(torch.zeros(call.deepstack, 1, 3, width), {2: sequence})] if call.deepstack else []
    decode_shapes = ({1: sequence}, None, *([tuple(shape for _, shape in extra)] if extra else []))
    levels = [(torch.zeros(call.deepstack, 2, width), {1: features})] if call.deepstack else []
    merge_shapes = ({1: sequence}, {1: features}, *([tuple(shape for _, shape in levels)] if levels else []))
    methods = {
        encoder.method: Method(
            module=encoder,
            args=encoder.first(),
            dynamic_shapes=encoder.dynamic_shapes(len(found[0])),
            fold_constants=not encoder.packed,
        ),
        "token_embedding": Method(module=embedding, args=(tokens,), dynamic_shapes=({1: sequence},)),
        "merge": Method(
            module=scatter,
            args=(tokens, torch.zeros(1, 2, width), *(level for level, _ in levels)),
            dynamic_shapes=merge_shapes,
        ),
        "text_decoder": Method(
            module=decoder,
            args=(torch.zeros(1, 3, width), start, *(tensor for tensor, _ in extra)),
            dynamic_shapes=decode_shapes,
        ),
    }
    text = text_alone(model, captures[0].inputs, placeholder, call)
    read = {*encoder.needs, *(POSITION_INPUTS.get(positions.rule or "", ()) if positions is not None else ())}
    fixed = fixed_inputs(captures, {"input_ids", "attention_mask", *read})
    programs, flow = _media_programs(decoder, encoder, positions, width, text, fixed, placeholder)
    each = len(found[0]) // len(next(iter(component.sample.values())))
    prompts = [item.inputs["input_ids"] for item in captures]
    runner = Runner(
        name=MULTIMODAL_RUNNER, obstacle=multimodal_obstacle(call, encoder, prompts, placeholder, max(each, 1))
    )
    return Exported(programs=programs, flow=flow, runners=(runner,)), methods


def _media_programs(
    decoder: StatefulDecoder, encoder: MediaEncoder, positions: Source | None, width: int, text: DecoderCall | None,
    fixed: tuple[Input, ...], placeholder: int,
) -> tuple[tuple[Program, ...], Flow]:  # fmt: skip
    """The manifest's programs and flow.

    text: how the decoder is called for a prompt of text alone. fixed: inputs that are checked and go no further.
    """
    call, component, modality = decoder.call, encoder.component, encoder.modality
    features = Output(name=f"{modality}_features", dtype="float32", shape=(1, "features", width))
    embeds = Output(name="inputs_embeds", dtype="float32", shape=(1, "sequence", width))
    levels = Output(name=f"{modality}_levels", dtype="float32", shape=(call.deepstack, "features", width))
    dense = Output(name="deepstack", dtype="float32", shape=(call.deepstack, 1, "sequence", width))
    deep = call.deepstack > 0
    encode = Program(
        name=component.name,
        file=PROGRAM_FILE,
        method=encoder.method,
        modality=modality,
        # Those of pictures stand among what the manifest says of pictures.
        placeholder_id=None if modality == "image" else placeholder,
        roles=component.roles,
        inputs=encoder.inputs(),
        outputs=(features, levels) if deep else (features,),
    )
    merged = (embeds, dense) if deep else (embeds,)
    merge_inputs = (_TOKENS, _fed(features), *((_fed(levels),) if deep else ()), *fixed)
    merge = _program("merge", "merge", ("merge",), merge_inputs, merged)
    embedding = _program("token_embedding", "token_embedding", ("merge",), (_TOKENS,), merged)
    prompt = _program(
        "prompt",
        "text_decoder",
        ("language_model", "lm_head"),
        _decoder_inputs(embeds, dense, positions, call, 1),
        (_logits(decoder),),
    )
    decode = _program(
        "decode",
        "text_decoder",
        ("language_model", "lm_head", "decode"),
        _decoder_inputs(embeds, dense, positions, call, 0),
        (_logits(decoder),),
    )
    needs = tuple(sorted({*encoder.needs, *(item.name for item in fixed)}))
    routes = [Route(programs=(encode.name, "merge", "prompt"), needs=needs)]
    if text is not None:
        routes.append(Route(programs=("token_embedding", "prompt" if text.both_ways else "decode")))
    flow = Flow(
        prompt=tuple(routes), step=("token_embedding", "decode"), batch=1, continues=True, capacity=decoder.capacity
    )
    return (encode, merge, embedding, prompt, decode), flow


def _decoder_inputs(
    embeds: Output, dense: Output, positions: Source | None, call: DecoderCall, both_ways: int
) -> tuple[Input, ...]:
    inputs = [_fed(embeds), _START]
    if call.position_axes and positions is not None:
        shape = (call.position_axes, 1, "sequence")
        inputs.append(Input(name="position_ids", dtype="int64", shape=shape, source=positions))
    if call.both_ways:
        source = Source(kind="constant", value=both_ways)
        inputs.append(Input(name="both_ways", dtype="int64", shape=(1,), source=source))
    return (*inputs, _fed(dense)) if call.deepstack else tuple(inputs)


def _fed(output: Output) -> Input:
    source = Source(kind="output", name=output.name)
    return Input(name=output.name, dtype=output.dtype, shape=output.shape, source=source)


def _logits(decoder: StatefulDecoder) -> Output:
    return Output(name="logits", dtype="float32", shape=(1, 1, int(decoder.head.weight.shape[0])))


def _program(
    name: str, method: str, roles: tuple[Role, ...], inputs: tuple[Input, ...], outputs: tuple[Output, ...]
) -> Program:
    return Program(name=name, method=method, file=PROGRAM_FILE, roles=roles, inputs=inputs, outputs=outputs)


def _notes(model: PreTrainedModel, precision: str) -> tuple[str, ...]:
    """What a user should know of the file."""
    weight = head_of(model).weight
    if weight is cast(torch.nn.Embedding, model.get_input_embeddings()).weight:
        size = weight.numel() * BITS.get(precision, 8 * weight.element_size()) // 8
        return (f"the tied embedding stands twice ({size} bytes): as a table, and packed for the head by XNNPACK",)
    return ()


def _some_token(model: PreTrainedModel) -> int:
    """A token that generation doesn't treat specially."""
    config = model.generation_config
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = {config.pad_token_id, config.bos_token_id, *eos}
    return next(token for token in range(len(head_of(model).weight)) if token not in special)
