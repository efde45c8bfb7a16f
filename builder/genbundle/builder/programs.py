"""Which programs a model becomes on the explicit-state backends: text decoders here, image-text in image_text.py."""

import copy
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from genbundle.builder.attention import observe_attention
from genbundle.builder.components import Component
from genbundle.builder.decoder import Decoder, language_model_of
from genbundle.builder.plan import Capture, Plan
from genbundle.bundles.manifest import Flow, Role, Route, Source

# Traced with sizes that differ from each other and from 1, so that none is taken for another or for a constant.
_BATCH, _NEW, _PAST = 2, 3, 5


def decoder_component(model: PreTrainedModel, plan: Plan, captures: list[Capture], *, fuse: bool) -> Component:
    """The program `decode`: token ids and past to logits and present; serves prompt, continuation and step.

    fuse: use ONNX Runtime's GroupQueryAttention where every layer's attention allows it.
    """
    fused = fuse and can_fuse(model, plan, captures)
    module = Decoder(model, len(plan.layers), fused=fused, constants=plan.constants).eval()
    roles: tuple[Role, ...] = ("merge", "language_model", "lm_head", "decode")
    sample, axes, sources = text_sample(plan)
    return with_past(
        Component(name="decode", roles=roles, module=module, sample=sample, axes=axes, sources=sources), plan
    )


def can_fuse(model: PreTrainedModel, plan: Plan, captures: list[Capture]) -> bool:
    """Whether every layer's attention, watched on captured prompts and steps, is what GroupQueryAttention computes."""
    return can_fuse_prompt(model, plan, captures) and can_fuse_step(model, plan, captures)


def can_fuse_prompt(model: PreTrainedModel, plan: Plan, captures: list[Capture]) -> bool:
    """The same for the prompts alone."""
    prompts = [{key: value for key, value in item.prompt.items() if key != "past_key_values"} for item in captures]
    return _fusible(model, plan, [{**prompt, "use_cache": False} for prompt in prompts])


def can_fuse_step(model: PreTrainedModel, plan: Plan, captures: list[Capture]) -> bool:
    """The same for the steps alone."""
    return _fusible(model, plan, [item.step for item in captures])


def _fusible(model: PreTrainedModel, plan: Plan, calls: list[dict]) -> bool:
    language_model = language_model_of(model)
    if not language_model._can_set_attn_implementation():
        return False
    for kwargs in calls:
        # A cache and encoder outputs are written to by the forward.
        facts = observe_attention(language_model, lambda kwargs=kwargs: model(**copy.deepcopy(kwargs)))
        if facts.obstacle is not None or sorted(facts.layers) != list(range(len(plan.layers))):
            return False
    return True


def text_sample(plan: Plan) -> tuple[dict, dict, dict]:
    """Sample, axes and sources of the inputs that every decoder program has: tokens, mask, positions."""
    sample: dict[str, torch.Tensor] = {"input_ids": torch.randint(0, 2, (_BATCH, _NEW))}
    axes: dict[str, dict[int, str]] = {"input_ids": {0: "batch", 1: "sequence"}, "logits": {0: "batch"}}
    if "attention_mask" in plan.sources:
        mask = torch.ones(_BATCH, _PAST + _NEW, dtype=torch.long)
        mask[0, 0] = 0
        sample["attention_mask"] = mask
        axes["attention_mask"] = {0: "batch", 1: "total"}
    if "position_ids" in plan.sources:
        leading = (plan.position_axes,) if plan.position_axes else ()
        positions = torch.arange(_PAST, _PAST + _NEW).expand(*leading, _BATCH, _NEW)
        sample["position_ids"] = positions.clone()
        axes["position_ids"] = {len(leading): "batch", len(leading) + 1: "sequence"}
    return sample, axes, dict(plan.sources)


def with_past(component: Component, plan: Plan) -> Component:
    """`component` with the plan's state as inputs and outputs."""
    sample, sources, states = dict(component.sample), dict(component.sources), dict(component.states)
    axes = {name: dict(item) for name, item in component.axes.items()}
    for index, layer in enumerate(plan.layers):
        for kind, width in (("key", layer.key_width), ("value", layer.value_width)):
            past, present = f"past_{index}_{kind}", f"present_{index}_{kind}"
            sample[past] = torch.zeros(_BATCH, layer.heads, _PAST, width)
            axes[past] = {0: "batch", 2: "past"}
            axes[present] = {0: "batch", 2: "total"}
            sources[past] = Source(kind="state", name=f"{index}.{kind}")
            states[present] = f"{index}.{kind}"
    return replace(component, sample=sample, axes=axes, sources=sources, states=states)


def text_flow(capacity: int | None) -> Flow:
    """One program for prompt and step."""
    return Flow(prompt=(Route(programs=("decode",)),), step=("decode",), continues=True, capacity=capacity)
