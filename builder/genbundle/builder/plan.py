"""Explain what the model's forward was called with: every argument has a rule that the runtime can follow, or the build
stops. Nothing is guessed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from genbundle.builder.exporting import decompose
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Source
from genbundle.runtime.positions import POSITION_RULES, position_ids

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Capture:
    """One eager generation: its inputs, and the forward's kwargs for the prompt and for two steps at once."""

    inputs: Inputs
    prompt: dict[str, Any]
    step: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one layer keeps per token: key heads and width, value heads and width."""

    heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the runtime calls the decoder.

    sources: per forward argument, for a prompt and a step alike. constants: arguments that never change. layers: the
    growing key-value state. position_axes: leading axes of position ids before the batch (3 or 4 for M-RoPE, else 0).
    """

    sources: dict[str, Source]
    constants: dict[str, Any]
    layers: tuple[Layer, ...]
    position_axes: int = 0


def capture(model: PreTrainedModel, samples: list[Inputs]) -> list[Capture]:
    """Run `model.generate` on every sample and record what its forward was called with."""
    captures = []
    for sample in samples:
        prompt, step = decompose(model, sample)
        captures.append(Capture(inputs=sample, prompt=prompt, step=step))
    return captures


def make_plan(model: PreTrainedModel, captures: list[Capture]) -> Plan:
    """The rule of every decoder argument; UnsupportedModelError names the one that has none."""
    name = type(model).__name__
    for item in captures:
        if item.prompt.get("input_ids") is None:
            raise UnsupportedModelError(f"{name}: the decoder's prompt has no input_ids")
    layers = _layers(captures[0], name)
    sources: dict[str, Source] = {"input_ids": Source(kind="tokens")}
    constants: dict[str, Any] = {}
    position_axes = 0
    for argument in {key: None for item in captures for key in item.step}:
        values = [item.step.get(argument) for item in captures]
        if argument in ("input_ids", "past_key_values", "use_cache", "return_dict"):
            continue
        if not any(isinstance(value, torch.Tensor) for value in values):
            _expect_constant(name, argument, values)
            if values[0] is not None:
                constants[argument] = values[0]
        elif argument == "attention_mask":
            _explain_mask(captures, name)
            sources[argument] = Source(kind="mask")
        elif argument == "position_ids":
            sources[argument] = _explain_positions(model, captures)
            position_axes = 0 if values[0] is None or values[0].dim() == 2 else values[0].shape[0]
        elif not _needed(model, argument, captures):
            continue
        else:
            raise UnsupportedModelError(f"{name}: the decoder's input {argument!r} has no explanation")
    return Plan(sources=sources, constants=constants, layers=layers, position_axes=position_axes)


def _layers(item: Capture, name: str) -> tuple[Layer, ...]:
    cache = item.step.get("past_key_values")
    if not isinstance(cache, DynamicCache):
        raise UnsupportedModelError(f"{name}: generation state of type {type(cache).__name__} can't be carried yet")
    layers = []
    layer: Any
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None or layer.values is None:
            raise UnsupportedModelError(
                f"{name}: layer {index} keeps a {type(layer).__name__}, which can't be carried yet"
            )
        if layer.keys.dim() != 4 or layer.keys.shape[2] == 0:
            raise UnsupportedModelError(f"{name}: layer {index} keeps no keys of its own, which can't be carried yet")
        layers.append(
            Layer(heads=layer.keys.shape[1], key_width=layer.keys.shape[3], value_width=layer.values.shape[3])
        )
    return tuple(layers)


def _expect_constant(name: str, argument: str, values: list[Any]) -> None:
    simple = all(value is None or isinstance(value, bool | int | float | str) for value in values)
    if not simple or any(value != values[0] for value in values):
        raise UnsupportedModelError(f"{name}: the decoder's input {argument!r} differs between runs, unexplained")


def _explain_mask(captures: list[Capture], name: str) -> None:
    for item in captures:
        mask, given = item.step.get("attention_mask"), item.inputs.get("attention_mask")
        if mask is None or given is None:
            continue
        expected = torch.cat([given, given.new_ones(given.shape[0], mask.shape[-1] - given.shape[1])], 1)
        if mask.shape != expected.shape or not torch.equal(mask.to(expected.dtype), expected):
            raise UnsupportedModelError(f"{name}: the decoder's attention_mask isn't the padding mask, unexplained")


def _explain_positions(model: PreTrainedModel, captures: list[Capture]) -> Source:
    """The first rule that gives every captured prompt's position ids, and whose continuation gives the steps'."""
    name = type(model).__name__
    for rule, describe in _POSITION_OPTIONS.items():
        options = describe(model)
        # Some models count from 1 or 2; the first prompt says where, the others must agree.
        start = None if options is None else _position_start(rule, options, captures[0])
        if options is None or start is None:
            continue
        options = {**options, "start": start} if start else options
        if all(_positions_match(rule, options, item) for item in captures):
            return Source(kind="position", rule=rule, options=options)
    raise UnsupportedModelError(f"{name}: the decoder's position_ids follow none of the rules {sorted(POSITION_RULES)}")


def _rule_positions(rule: str, options: Mapping[str, Any], item: Capture) -> torch.Tensor | None:
    inputs = {key: value.numpy() for key, value in item.inputs.items() if isinstance(value, torch.Tensor)}
    inputs.setdefault("attention_mask", inputs["input_ids"] * 0 + 1)
    try:
        return torch.from_numpy(np.ascontiguousarray(position_ids(rule, inputs, dict(options))))
    except (KeyError, ValueError, StopIteration, RuntimeError):
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
    return bool((found == expected).all())


def _mrope_options(model: PreTrainedModel) -> dict[str, Any] | None:
    inner = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
    vision = getattr(model.config, "vision_config", None)
    if inner is None or getattr(vision, "spatial_merge_size", None) is None:
        return None
    return {"spatial_merge_size": int(vision.spatial_merge_size)}  # pyright: ignore[reportOptionalMemberAccess]


_POSITION_OPTIONS = {"cumsum": lambda _model: {}, "arange": lambda _model: {}, "mrope": _mrope_options}


def _needed(model: PreTrainedModel, argument: str, captures: list[Capture]) -> bool:
    """Whether leaving `argument` out of a step changes its logits in any capture."""
    for item in captures:
        kwargs = {key: value for key, value in item.step.items() if key != argument}
        try:
            with torch.no_grad():
                full = model(**_fresh(item.step)).logits
                without = model(**_fresh(kwargs)).logits
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            return True
        if not torch.equal(full, without):
            return True
    return False


def _fresh(kwargs: dict[str, Any]) -> dict[str, Any]:
    import copy  # a cache is written to by the forward

    return {key: copy.deepcopy(value) if key == "past_key_values" else value for key, value in kwargs.items()}
