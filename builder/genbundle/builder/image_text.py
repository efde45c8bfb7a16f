"""The programs of a model of pictures or video: encoder (with projector), merge, prompt, and decode for the steps."""

import copy
import re
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from genbundle.builder.components import Component, dtype_of, name_axes, needed_inputs, same_tensors
from genbundle.builder.embedded import embedded_components, expect_placed
from genbundle.builder.encoders import Features, candidate_features, encoder_component
from genbundle.builder.guards import resized
from genbundle.builder.lengths import loop_over_length
from genbundle.builder.merge import Merge, Prompt, needed_features, tensors_of
from genbundle.builder.packed import in_pieces
from genbundle.builder.plan import Capture, Plan, constant_arguments
from genbundle.builder.programs import by_token, can_fuse_prompt, can_fuse_step, step_component, with_present
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Flow, Input, Route, Source
from genbundle.runtime.inputs import TEXT_INPUTS
from genbundle.runtime.positions import POSITION_INPUTS

_TOKEN_NAME = re.compile(r"(?!bos|eos|pad|decoder)\w+_token_(id|index)")
_STATE = {"past_key_values", "use_cache", "return_dict", "mm_encoder_outputs"}


def image_text_components(
    model: PreTrainedModel, plan: Plan, captures: list[Capture], *, fuse: bool, capacity: int | None, text_alone: bool,
    embedded: bool = False,
) -> tuple[list[Component], Flow]:  # fmt: skip
    """The components of a model of pictures (or video) and text, and how they are called.

    fuse: use GroupQueryAttention where a program's attention allows it. text_alone: the model also generates from text
    without a picture, which the step's program then takes. embedded: one decoder that takes embeddings, for prompt and
    step, as other runtimes want it; NotSimpleError where that can't be.
    """
    modality = _modality(model, captures)
    outputs = [item.prompt["mm_encoder_outputs"][modality] for item in captures]
    sizes = {
        tuple(item.prompt["input_ids"].shape[0] for item in captures): "batch",
        tuple(item.prompt["input_ids"].shape[1] for item in captures): "sequence",
    }
    constants = constant_arguments([item.prompt for item in captures], f"{type(model).__name__}: the prompt's", _STATE)
    given = [_prompt_tensors(item, captures[0]) for item in captures]
    features = _features(model, modality, outputs[0], given[0], constants)
    merge = Merge(model, modality, features, type(outputs[0]), constants)
    samples = [
        {**inputs, **{item.name: item.read(output) for item in features}}
        for inputs, output in zip(given, outputs, strict=True)
    ]
    with torch.no_grad():
        template = merge.called_with(samples[0])
        recorded = [tensors_of(merge.called_with(sample)) for sample in samples]
    handed_through = {
        path: name for path, value in recorded[0].items() for name, item in samples[0].items() if value is item
    }
    merge.only = [path for path in recorded[0] if path not in handed_through]
    kept = needed_inputs(merge.eval(), samples[0])
    for sample, made in zip(samples, recorded, strict=True):
        with torch.no_grad():
            found = merge(**{name: value for name, value in sample.items() if name in kept})
        if not same_tensors(found, {f"merged_{path}": made[path] for path in merge.only}):
            raise UnsupportedModelError("the merge cut out of the model doesn't give what the model computes")
    sources = {
        **_prompt_sources(model, plan, captures, given),
        **{item.name: Source(kind="output", name=item.name) for item in features},
    }
    encoder = encoder_component(model, modality, captures, features)
    # Those of pictures stand among what the manifest says of pictures.
    token = None if modality == "image" else feature_token(model, captures, modality)
    encoder = in_pieces(replace(encoder, placeholder_id=token))
    merged = Component(
        name="merge",
        roles=("merge",),
        module=merge,
        sample=kept,
        axes={
            **name_axes(given, sizes),
            # Pictures are counted apart from sequences, though each captured sequence has one.
            **name_axes([{item.name: sample[item.name] for item in features} for sample in samples]),
            **name_axes([{f"merged_{p}": v for p, v in item.items()} for item in recorded], sizes),
        },
        sources={name: sources[name] for name in kept},
    )
    used = {source.name for part in (encoder, merged) for source in part.sources.values()} | _guiding(encoder)
    used |= {name for source in plan.step.sources.values() for name in POSITION_INPUTS.get(source.rule or "", ())}
    merged = replace(merged, guides=_unread(captures, used))
    needs = {
        *(source.name for source in merged.sources.values() if source.kind == "user"),
        *(source.name for source in encoder.sources.values() if source.kind == "user"),
        *_guiding(encoder),
    }
    picture = Route(programs=(encoder.name, "merge"), needs=tuple(sorted(filter(None, needs))))
    if embedded:
        expect_placed(model, samples, recorded, feature_token(model, captures, modality))
        prompt_sources = _language_model_sources(recorded, handed_through, sources)
        fused = fuse and can_fuse_prompt(model, plan, captures) and can_fuse_step(model, plan, captures)
        embed, decoder = embedded_components(model, plan, template, recorded[0], prompt_sources, fused=fused)
        routes = [replace(picture, programs=(*picture.programs, decoder.name))]
        text = (embed.name, decoder.name)
        routes += [Route(programs=text)] if text_alone else []
        return [encoder, merged, embed, decoder], Flow(
            prompt=tuple(routes), step=text, continues=True, capacity=capacity
        )
    prompt = _prompt_component(model, plan, captures, template, recorded, handed_through, sources, sizes, fuse=fuse)
    decode = step_component(model, plan, captures, fuse=fuse)
    routes = [replace(picture, programs=(*picture.programs, prompt.name))]
    if prompt.alternative is not None:
        programs = (*picture.programs, prompt.alternative.name)
        routes.append(replace(picture, programs=programs, one_by_one=True))
    if text_alone:
        routes.append(Route(programs=("decode",), one_by_one=not plan.continues))
    flow = Flow(prompt=tuple(routes), step=("decode",), continues=plan.continues, capacity=capacity)
    return [encoder, merged, prompt, decode], flow


def _guiding(encoder: Component) -> set[str]:
    """The user's inputs that an encoder's preparers and its calls read."""
    names = {name for source in encoder.sources.values() for name in source.options.get("inputs", ())}
    guides = (item.source for item in encoder.guides.values())
    return names | {source.name for source in guides if source.kind == "user" and source.name is not None}


def _unread(captures: list[Capture], used: set[str | None]) -> dict[str, Input]:
    """The user's inputs that nothing reads: taken, and checked where they never were but one number."""
    guides = {}
    for name, tensor in captures[0].inputs.items():
        if name in used or name in TEXT_INPUTS or not all(name in item.inputs for item in captures):
            continue
        numbers = torch.cat([item.inputs[name].flatten() for item in captures]).unique()
        options: dict[str, Any] = {"unread": True}
        if len(numbers) == 1:
            options = {"equals": numbers[0].item(), "optional": True}
        guides[name] = Input(
            name=name,
            dtype=dtype_of(tensor),
            shape=tuple(f"{name}_{axis}" for axis in range(tensor.dim())),
            source=Source(kind="user", name=name, options=options),
        )
    return guides


def placeholder_token(model: PreTrainedModel, captures: list[Capture], counts: list[int]) -> int | None:
    """The one token that stands in every captured prompt as often as `counts`, its features, says; None without one.

    Of several, the one that the model's config names (`image_token_id`, `audio_token_index`).
    """
    candidates = captures[0].inputs["input_ids"].unique().tolist()
    found = [
        token
        for token in candidates
        if all(int((c.inputs["input_ids"] == token).sum()) == n for c, n in zip(captures, counts, strict=True))
    ]
    if len(found) > 1:
        configs = (model.config.to_dict(), model.config.get_text_config().to_dict())
        named = {value for config in configs for name, value in config.items() if _TOKEN_NAME.fullmatch(name)}
        found = [token for token in found if token in named]
    return found[0] if len(found) == 1 else None


def _modality(model: PreTrainedModel, captures: list[Capture]) -> str:
    """What the encoder of every captured prompt encoded: image or video."""
    found = {
        tuple(name for name, output in item.prompt["mm_encoder_outputs"].items() if output is not None)
        if item.prompt.get("mm_encoder_outputs")
        else ()
        for item in captures
    }
    kinds = found.pop()
    if found or len(kinds) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: a bundle takes pictures or video, the same in every sample; these hold "
            f"{sorted({kind for other in (kinds, *found) for kind in other})}"
        )
    return kinds[0]


def feature_token(model: PreTrainedModel, captures: list[Capture], modality: str = "image") -> int | None:
    """The placeholder token of pictures (or video); None for captures without them or without such a token."""
    outputs = [item.prompt.get("mm_encoder_outputs", {}).get(modality) for item in captures]
    if any(output is None for output in outputs):
        return None
    counts = []
    for output in outputs:
        pooled = getattr(output, "pooler_output", None)
        found = output.last_hidden_state if pooled is None else pooled
        pieces = found if isinstance(found, list | tuple) else [found]
        counts.append(sum(piece.shape[:-1].numel() for piece in pieces))
    return placeholder_token(model, captures, counts)


def _features(model: PreTrainedModel, modality: str, output: Any, inputs: dict, constants: dict) -> list[Features]:
    candidates = candidate_features(output, modality)

    def run(encoder_output: Any) -> dict[str, torch.Tensor]:
        probe = _Probe(model, modality, [], type(output), constants)
        probe.encoder_output = encoder_output
        with torch.no_grad():
            return tensors_of(probe.called_with(inputs))

    return needed_features(model, modality, output, candidates, run)


class _Probe(Merge):
    """The merge with a whole encoder output instead of features."""

    encoder_output: Any = None

    def make_output(self, fields: dict[str, Any]) -> Any:
        """The output that was given."""
        return copy.copy(self.encoder_output)


def _prompt_tensors(item: Capture, like: Capture) -> dict[str, torch.Tensor]:
    """The tensors of a captured prompt, with the mask that generate drops when it is all ones."""
    tensors = {
        name: value for name, value in item.prompt.items() if isinstance(value, torch.Tensor) and name not in _STATE
    }
    if "attention_mask" in like.prompt and "attention_mask" not in tensors:
        tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
    return {name: tensors[name] for name in like.prompt if name in tensors}


def _prompt_sources(
    model: PreTrainedModel, plan: Plan, captures: list[Capture], given: list[dict]
) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for name in given[0]:
        if name in plan.step.sources:
            sources[name] = plan.step.sources[name]
        elif all(
            name in item.inputs and torch.equal(item.inputs[name], tensors[name])
            for item, tensors in zip(captures, given, strict=True)
        ):
            sources[name] = Source(kind="user", name=name)
        else:
            raise UnsupportedModelError(f"{type(model).__name__}: the prompt's input {name!r} has no explanation")
    return sources


def _language_model_sources(
    recorded: list[dict], handed_through: dict[str, str], sources: dict[str, Source]
) -> dict[str, Source]:
    """Where the language model's tensors come from, by path: the merge's inputs handed through, or its outputs."""
    return {
        path: sources[handed_through[path]] if path in handed_through else Source(kind="output", name=f"merged_{path}")
        for path in recorded[0]
    }


def _prompt_component(
    model: PreTrainedModel, plan: Plan, captures: list[Capture], template: dict, recorded: list[dict],
    handed_through: dict[str, str], sources: dict[str, Source], sizes: dict, *, fuse: bool,
) -> Component:  # fmt: skip
    # A mask that the merge makes may look both ways; GroupQueryAttention is causal.
    fused = fuse and can_fuse_prompt(model, plan, captures)
    prompt = Component(
        name="prompt",
        roles=("language_model", "lm_head"),
        module=Prompt(model, template, plan.layers, fused=fused).eval(),
        sample=dict(recorded[0]),
        axes={**name_axes(recorded, sizes), "logits": {0: "batch"}},
        sources=_language_model_sources(recorded, handed_through, sources),
        fusions=fused or not fuse,
    )
    prompt = with_present(prompt, plan.layers, "sequence")
    if all(layer.plain for layer in plan.layers):
        return prompt
    # Other state than keys and values is computed in chunks or a scan: a loop over the length.
    whole = Prompt(model, template, plan.layers, fused=False).eval()
    obstacle = loop_over_length(whole, lambda length: resized(recorded[0], prompt.axes, {"sequence": length}))
    part = Prompt(model, template, plan.layers, fused=False, begins=False).eval()
    return replace(prompt, obstacle=obstacle, alternative=by_token(prompt, part, plan.layers))
