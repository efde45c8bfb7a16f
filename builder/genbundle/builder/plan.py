"""Explain what the model's forward was called with: every argument has a rule that the runtime can follow, or the build
stops. Nothing is guessed."""

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from genbundle.builder.exporting import MODEL_ERRORS, decompose
from genbundle.builder.layers import Layer, describe_layers
from genbundle.builder.windows import cut_window
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Source
from genbundle.runtime.positions import POSITION_RULES, position_ids

Inputs = dict[str, torch.Tensor]
Phase = Literal["prompt", "step"]
_ENTRIES = ("input_ids", "use_cache", "return_dict", "mm_encoder_outputs")


@dataclass(frozen=True, kw_only=True)
class Capture:
    """One eager generation: its inputs, and the forward's kwargs for the prompt and for a step; of an encoder-decoder
    also its encoder's.

    inner: the model inside whose generate this one's calls, with what; the forward is then the inner model's.
    """

    inputs: Inputs
    prompt: dict[str, Any]
    step: dict[str, Any]
    encoder: dict[str, Any] | None = None
    inner: tuple[PreTrainedModel, dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """How the runtime calls the decoder.

    sources: per forward argument. constants: arguments that never change. position_axes: leading axes of position ids
    before the batch (3 or 4 for M-RoPE, else 0). unmasked: how much longer a step's past is than the mask says, of a
    model that puts pictures before the prompt.
    """

    sources: dict[str, Source]
    constants: dict[str, Any]
    position_axes: int = 0
    unmasked: int = 0

    @property
    def media(self) -> tuple[str, ...]:
        """The user's inputs beside text that it takes as they are."""
        return tuple(source.name or "" for source in self.sources.values() if source.kind == "user")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the runtime calls the decoder for a step and for a prompt of text alone (None with encoders), what its layers
    carry, and the forward argument that takes it. single: the model's code takes one new token after a past, no more.
    window: `windows.cut_window`.
    """

    step: Call
    prompt: Call | None
    layers: tuple[Layer, ...]
    cache_argument: str = "past_key_values"
    single: bool = False
    window: int | None = None

    @property
    def continues(self) -> bool:
        """Whether the decoder takes several new tokens after a past."""
        return not self.single and all(layer.plain for layer in self.layers)

    @property
    def one_program(self) -> bool:
        """Whether the same program serves a prompt of text and a step."""
        return self.continues and self.prompt == self.step


def capture(model: PreTrainedModel, samples: list[Inputs]) -> list[Capture]:
    """Run `model.generate` on every sample and record what its forward was called with."""
    captures = []
    for sample in samples:
        with _encoder_calls(model) as encoder:
            prompt, step = decompose(model, sample)
        if not prompt.get("mm_encoder_outputs"):
            prompt.pop("mm_encoder_outputs", None)  # empty where a multimodal model was given text alone
        captures.append(Capture(inputs=sample, prompt=prompt, step=step, encoder=encoder[0] if encoder else None))
    return captures


@contextmanager
def _encoder_calls(model: PreTrainedModel) -> Iterator[list[dict[str, Any]]]:
    """What the encoder of an encoder-decoder is called with inside the block; nothing for other models."""
    calls: list[dict[str, Any]] = []
    if not model.config.is_encoder_decoder:
        yield calls
        return
    encoder: Any = model.get_encoder()

    def record(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        names = inspect.signature(type(module).forward).parameters
        calls.append({**dict(zip([name for name in names if name != "self"], args, strict=False)), **kwargs})

    handle = encoder.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def make_plan(model: PreTrainedModel, captures: list[Capture]) -> Plan:
    """The rule of every decoder argument; UnsupportedModelError names the one that has none."""
    name = type(model).__name__
    inner = any(item.inner is not None for item in captures)
    for item in captures:
        if item.prompt.get("input_ids") is None and not inner:
            raise UnsupportedModelError(f"{name}: the decoder's prompt has no input_ids")
        given = item.step.get("input_ids")
        if given is not None and not inner and given.shape[1] != 1:
            raise UnsupportedModelError(f"{name}: a step is given {given.shape[1]} tokens, not the new one alone")
    step_kwargs = captures[0].step
    cache_argument = next((key for key, value in step_kwargs.items() if isinstance(value, Cache)), "past_key_values")
    cache: Any = step_kwargs.get(cache_argument)
    layers = describe_layers(cache, name)
    text = not inner and not any(item.prompt.get("mm_encoder_outputs") for item in captures)
    step = _explain(model, captures, "step")
    prompt = _explain(model, captures, "prompt") if text else None
    if prompt is not None and prompt.media:
        step = replace(step, unmasked=_unmasked(captures, cache_argument, name))
    window = cut_window(model, cache.layers) if prompt is not None else None
    return Plan(step=step, prompt=prompt, layers=layers, cache_argument=cache_argument, window=window)


def _explain(model: PreTrainedModel, captures: list[Capture], phase: Phase) -> Call:
    """The rule of every argument of the captured prompts or steps."""
    name = type(model).__name__
    sources: dict[str, Source] = {"input_ids": Source(kind="tokens")}
    constants: dict[str, Any] = {}
    position_axes = 0
    for argument in {key: None for item in captures for key in getattr(item, phase)}:
        values = [getattr(item, phase).get(argument) for item in captures]
        given = [value for value in values if value is not None]
        if argument in _ENTRIES or all(isinstance(value, Cache) for value in given):
            continue
        if not any(isinstance(value, torch.Tensor) for value in values):
            _expect_constant(name, argument, values)
            if values[0] is not None:
                constants[argument] = values[0]
        elif argument == "attention_mask":
            _explain_mask(captures, phase, name)
            sources[argument] = Source(kind="mask")
        elif argument == "position_ids":
            sources[argument] = _explain_positions(model, captures)
            position_axes = 0 if values[0] is None or values[0].dim() == 2 else values[0].shape[0]
        elif phase == "prompt" and all(_equal_to_input(item, argument) for item in captures):
            sources[argument] = Source(kind="user", name=argument)
        elif not _needed(model, argument, captures, phase):
            continue
        else:
            raise UnsupportedModelError(f"{name}: the decoder's {phase} input {argument!r} has no explanation")
    return Call(sources=sources, constants=constants, position_axes=position_axes)


def _equal_to_input(item: Capture, argument: str) -> bool:
    given, found = item.inputs.get(argument), item.prompt.get(argument)
    return given is not None and found is not None and given.shape == found.shape and torch.equal(given, found)


def _unmasked(captures: list[Capture], cache_argument: str, name: str) -> int:
    """How much longer the past of every captured step is than the mask says."""
    counts = set()
    for item in captures:
        past, mask = item.step[cache_argument], item.step.get("attention_mask")
        if mask is not None:
            counts.add(past.get_seq_length() + item.step["input_ids"].shape[1] - mask.shape[1])
    if len(counts) > 1:
        raise UnsupportedModelError(f"{name}: pictures take {sorted(counts)} places before the prompt, unexplained")
    return counts.pop() if counts else 0


def constant_arguments(calls: Sequence[Mapping[str, Any]], whose: str, ignored: Collection[str]) -> dict[str, Any]:
    """What every call is given alike and is no tensor, without None and the `ignored` names.

    Raises UnsupportedModelError, beginning with `whose`, for an argument that differs.
    """
    constants = {}
    for name in {key: None for call in calls for key in call}:
        values = [call.get(name) for call in calls]
        if name in ignored or any(isinstance(value, torch.Tensor) for value in values):
            continue
        if any(value != values[0] for value in values):
            raise UnsupportedModelError(f"{whose} {name!r} differs between runs, unexplained")
        if values[0] is not None:
            constants[name] = values[0]
    return constants


def _expect_constant(name: str, argument: str, values: list[Any]) -> None:
    simple = all(value is None or isinstance(value, bool | int | float | str) for value in values)
    if not simple or any(value != values[0] for value in values):
        raise UnsupportedModelError(f"{name}: the decoder's input {argument!r} differs between runs, unexplained")


def _explain_mask(captures: list[Capture], phase: Phase, name: str) -> None:
    for item in captures:
        mask, given = getattr(item, phase).get("attention_mask"), item.inputs.get("attention_mask")
        if mask is None or given is None:
            continue
        expected = torch.cat([given, given.new_ones(given.shape[0], mask.shape[-1] - given.shape[1])], 1)
        if mask.shape != expected.shape or not torch.equal(mask.to(expected.dtype), expected):
            raise UnsupportedModelError(f"{name}: the decoder's attention_mask isn't the padding mask, unexplained")


def _explain_positions(model: PreTrainedModel, captures: list[Capture]) -> Source:
    """The first rule that gives every captured prompt's position ids, and whose continuation gives the steps'."""
    name = type(model).__name__
    clips = []
    for rule, options in _position_candidates(model, captures[0]):
        # Some models count from 1 or 2; the first prompt says where, the others must agree.
        start = _position_start(rule, options, captures[0])
        if start is None:
            continue
        options = {**options, "start": start} if start else options
        if all(_positions_match(rule, options, item) for item in captures):
            if rule != "mrope_clips":
                return Source(kind="position", rule=rule, options=options)
            clips.append(options)
    if len(clips) > 1:
        clips = [options for options in clips if _as_made_up(model, options)]
        if len(clips) != 1:
            raise UnsupportedModelError(
                f"{name}: several rules give the position_ids of these clips: give a clip of several frames, some "
                "seconds apart"
            )
    if clips:
        return Source(kind="position", rule="mrope_clips", options=clips[0])
    raise UnsupportedModelError(f"{name}: the decoder's position_ids follow none of the rules {sorted(POSITION_RULES)}")


def _as_made_up(model: PreTrainedModel, options: Mapping[str, Any]) -> bool:
    """Whether `mrope_clips` gives the model's own positions for a made-up clip of frames some time apart, which
    are together or each by itself, as the model takes them."""
    owner: Any = next(module for module in model.modules() if hasattr(module, "get_rope_index"))
    merge, agrees = options["spatial_merge_size"], []
    for clip in ([2] * 18, [*[2] * 6, 0, *[2] * 6, 0, *[2] * 6]):
        kinds = torch.tensor([[0, 0, *clip, 0]])
        inputs = {
            "input_ids": torch.ones_like(kinds),
            "attention_mask": torch.ones_like(kinds),
            "mm_token_type_ids": kinds,
            "video_grid_thw": torch.tensor([[3, 2 * merge, 3 * merge]]),
            "second_per_grid_ts": torch.tensor([1.5]),
        }
        try:
            own, _ = owner.get_rope_index(**inputs)
        except (*MODEL_ERRORS, StopIteration):
            continue
        found = _rule_positions("mrope_clips", options, Capture(inputs=inputs, prompt={}, step={}))
        agrees.append(found is not None and torch.equal(found[-3:], own))
    return bool(agrees) and all(agrees)


def _rule_positions(rule: str, options: Mapping[str, Any], item: Capture) -> torch.Tensor | None:
    inputs = {key: value.numpy() for key, value in item.inputs.items() if isinstance(value, torch.Tensor)}
    inputs.setdefault("attention_mask", inputs["input_ids"] * 0 + 1)
    try:
        return torch.from_numpy(np.ascontiguousarray(position_ids(rule, inputs, dict(options))))
    except (*MODEL_ERRORS, StopIteration):
        return None


def _position_start(rule: str, options: Mapping[str, Any], item: Capture) -> int | None:
    expected, found = _rule_positions(rule, options, item), item.prompt["position_ids"]
    if expected is None or expected.dim() != found.dim() or expected.shape[-1] != found.shape[-1]:
        return None
    return int(found[..., -1].max() - expected[..., -1].max())


def _positions_match(rule: str, options: Mapping[str, Any], item: Capture) -> bool:
    expected = _rule_positions(rule, options, item)
    if expected is None:
        return False
    prompt, step = item.prompt["position_ids"], item.step["position_ids"]
    following = expected[..., -1:] + torch.arange(1, step.shape[-1] + 1)
    # A one-row position array stands for every row of the batch.
    return _equal(prompt, expected) and _equal(step, following)


def _equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.dim() != expected.dim() or found.shape[-1] != expected.shape[-1]:
        return False
    if any(size not in (1, other) for size, other in zip(found.shape, expected.shape, strict=True)):
        return False
    return bool((found == expected).all())


def _position_candidates(model: PreTrainedModel, item: Capture) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rules with the options that may fit the model."""
    yield "cumsum", {}
    yield "arange", {}
    if not any(hasattr(module, "get_rope_index") for module in model.modules()):
        return
    owners = (*model.modules(), *(getattr(module, "config", None) for module in model.modules()))
    merges = (getattr(owner, "spatial_merge_size", None) for owner in owners)
    positions = item.prompt.get("position_ids")
    rows = 0 if positions is None or positions.dim() != 3 else positions.shape[0]
    # Without types of tokens, one of them stands where a picture is.
    tokens: list[dict[str, Any]] = [{}]
    if "mm_token_type_ids" not in item.inputs:
        tokens = [{"image_token_id": token} for token in item.inputs["input_ids"].unique().tolist()]
    axes = {"axes": 3} if rows == 3 else {}
    paces = [getattr(owner, "tokens_per_second", None) for owner in owners]
    clips: list[dict[str, Any]] = [{}, {"apart": True}]
    clips += [{"tokens_per_second": pace} for pace in dict.fromkeys(paces) if isinstance(pace, int | float)]
    for merge in dict.fromkeys(value for value in merges if isinstance(value, int)):
        if "video_grid_thw" in item.inputs:
            for clip in clips:
                yield "mrope_clips", {"spatial_merge_size": merge, **axes, **clip}
            continue
        for token in tokens:
            yield "mrope", {"spatial_merge_size": merge, **token, **axes}
            yield "mrope", {"spatial_merge_size": merge, **token, **axes, "padding": 1}
            if rows > 2:
                yield "mrope_in_place", {"spatial_merge_size": merge, **token, "axes": rows}


def _needed(model: PreTrainedModel, argument: str, captures: list[Capture], phase: Phase) -> bool:
    """Whether leaving `argument` out of a prompt or step changes its logits in any capture."""
    for item in captures:
        given = getattr(item, phase)
        kwargs = {key: value for key, value in given.items() if key != argument}
        try:
            with torch.no_grad():
                full = model(**_fresh(given)).logits
                without = model(**_fresh(kwargs)).logits
        except MODEL_ERRORS:
            return True
        if not torch.equal(full, without):
            return True
    return False


def _fresh(kwargs: dict[str, Any]) -> dict[str, Any]:
    import copy  # a cache is written to by the forward

    return {key: copy.deepcopy(value) if isinstance(value, Cache) else value for key, value in kwargs.items()}
