"""The programs of a text decoder, and what every decoder program has: sample, past, present."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from genbundle.builder.attention import observe_attention
from genbundle.builder.components import Component, runs
from genbundle.builder.decoder import Decoder, language_model_of
from genbundle.builder.layers import Layer
from genbundle.builder.lengths import loop_over_length
from genbundle.builder.plan import Call, Capture, Plan, make_plan
from genbundle.bundles.manifest import CAPACITY, Flow, Route, Source

# Traced with sizes that differ from each other and from 1, so that none is taken for another or for a constant.
BATCH, NEW, PAST, _PROMPT, ROOM = 2, 3, 5, 9, 13
PROMPTS = ("prompt", "short_prompt")
"""The programs that take a whole prompt, the second one those that are too short for the first."""
# Tokens of a long prompt that go through at once: more are hardly faster, and the work space grows with them. Beside
# weights of a few bits it would be the larger part of the memory, and fewer are as fast.
_CHUNK, SMALL_CHUNK = 512, 128
_LONG_PROMPTS = (293, 127, 61, 31)  # primes, which no chunk divides


def make_decoder_plan(model: PreTrainedModel, captures: list[Capture]) -> Plan:
    """`make_plan`, with whether the model's code takes several new tokens after a past."""
    plan = make_plan(model, captures)
    if not plan.continues:
        return plan
    return replace(plan, single=not runs(step_component(model, plan, captures, fuse=False)))


def text_components(
    model: PreTrainedModel, plan: Plan, captures: list[Capture], *, fuse: bool, capacity: int | None
) -> tuple[list[Component], Flow]:
    """The programs of a text decoder: one for prompt and step where the model allows it, else one for each.

    fuse: use ONNX Runtime's GroupQueryAttention where every layer's attention allows it.
    """
    if plan.one_program:
        decode = step_component(model, plan, captures, fuse=fuse and can_fuse_prompt(model, plan, captures))
        flow = Flow(prompt=(Route(programs=("decode",)),), step=("decode",), continues=True, capacity=capacity)
        # In pieces, a prompt's later ones would see the window alone.
        return [decode], replace(flow, chunk=_CHUNK if plan.window is None else None)
    decode = step_component(model, plan, captures, fuse=fuse)
    # Token by token is right for any prompt, and slow: for those that the prompt's program can't take.
    routes = (*(Route(programs=(name,)) for name in PROMPTS), Route(programs=("decode",), one_by_one=True))
    flow = Flow(prompt=routes, step=("decode",), continues=plan.continues, capacity=capacity)
    return [_prompt_component(model, plan, captures, fuse=fuse, capacity=capacity), decode], flow


def step_component(model: PreTrainedModel, plan: Plan, captures: list[Capture], *, fuse: bool) -> Component:
    """The program `decode`: new token ids and past to logits and present; one new token where the model needs that."""
    fused = fuse and can_fuse_step(model, plan, captures)
    in_place = fused and "attention_mask" in plan.step.sources and not plan.step.unmasked
    module = Decoder(
        model,
        plan.layers,
        fused=fused,
        in_place=in_place,
        cache_argument=plan.cache_argument,
        constants=plan.step.constants,
        window=plan.window,
    ).eval()
    sample, axes = text_sample(plan.step, new=NEW if plan.continues else 1, past=PAST)
    past = ROOM if in_place else PAST + plan.step.unmasked
    decode = Component(
        name="decode",
        roles=("merge", "language_model", "lm_head", "decode"),
        module=module,
        sample=sample,
        axes=axes,
        sources=plan.step.sources,
    )
    return with_past(decode, plan.layers, past, in_place=in_place)


def _prompt_component(
    model: PreTrainedModel, plan: Plan, captures: list[Capture], *, fuse: bool, capacity: int | None
) -> Component:
    """The program `prompt`: token ids to logits and present, for the prompt alone."""
    call = plan.prompt
    assert call is not None
    fused = fuse and can_fuse_prompt(model, plan, captures)
    # A scan works through chunks, and a program for one of them takes no more.
    long = next((size for size in _LONG_PROMPTS if size <= (capacity or size)), _PROMPT)
    new = _PROMPT if plan.continues else long
    sample, axes = text_sample(call, new=new, past=0)
    module = Decoder(
        model,
        plan.layers,
        fused=fused,
        begins=True,
        cache_argument=plan.cache_argument,
        constants=call.constants,
    ).eval()
    prompt = Component(
        name="prompt",
        roles=("merge", "language_model", "lm_head"),
        module=module,
        sample=sample,
        axes=axes,
        sources=call.sources,
        fusions=fused or not fuse,
        optional=True,
        # A fused one only traces; what it would loop over doesn't depend on that.
        obstacle=None if fused else loop_over_length(module, lambda length: text_sample(call, new=length, past=0)[0]),
    )
    return with_present(prompt, plan.layers, "sequence")


def can_fuse_prompt(model: PreTrainedModel, plan: Plan, captures: list[Capture]) -> bool:
    """Whether every layer's attention, watched on captured prompts, is what GroupQueryAttention computes."""
    prompts = [{key: value for key, value in item.prompt.items() if key != plan.cache_argument} for item in captures]
    return _fusible(model, plan, [{**prompt, "use_cache": False} for prompt in prompts])


def can_fuse_step(model: PreTrainedModel, plan: Plan, captures: list[Capture]) -> bool:
    """The same for captured steps."""
    return _fusible(model, plan, [item.step for item in captures])


def _fusible(model: PreTrainedModel, plan: Plan, calls: list[dict]) -> bool:
    language_model = language_model_of(model)
    if not plan.continues:
        return False
    if not language_model._can_set_attn_implementation():
        return False
    for kwargs in calls:
        # A cache and encoder outputs are written to by the forward.
        try:
            facts = observe_attention(language_model, lambda kwargs=kwargs: model(**copy.deepcopy(kwargs)))
        except KeyError:  # a registry of the model's own, which doesn't know ours
            return False
        if facts.obstacle is not None or sorted(facts.layers) != list(range(len(plan.layers))):
            return False
        # The operator appends to the cache what attention gets: a model may keep something else and unfold it.
        if any(
            plan.layers[i].index is not None or plan.layers[i].attention != state
            for i, state in zip(facts.layers, facts.states, strict=True)
        ):
            return False
    return True


def text_sample(call: Call, *, new: int, past: int) -> tuple[dict, dict]:
    """Sample and axes of the inputs that every decoder program has: tokens, mask, positions.

    new: how many tokens; an axis of one is fixed. past: how many before them; 0 for a program of prompts.
    """
    sequence = {} if new == 1 else {1: "sequence"}
    sample: dict[str, torch.Tensor] = {"input_ids": torch.randint(0, 2, (BATCH, new))}
    axes: dict[str, dict[int, str]] = {"input_ids": {0: "batch", **sequence}, "logits": {0: "batch"}}
    if "attention_mask" in call.sources:
        mask = torch.ones(BATCH, past + new, dtype=torch.long)
        mask[0, 0] = 0
        sample["attention_mask"] = mask
        axes["attention_mask"] = {0: "batch", 1: "total" if past else "sequence"}
    if "position_ids" in call.sources:
        leading = (call.position_axes,) if call.position_axes else ()
        positions = torch.arange(past, past + new).expand(*leading, BATCH, new)
        sample["position_ids"] = positions.clone()
        axes["position_ids"] = {len(leading): "batch", **({len(leading) + 1: "sequence"} if sequence else {})}
    return sample, axes


def with_present(component: Component, layers: Sequence[Layer], symbol: str) -> Component:
    """`component` with what its layers keep as outputs; the axis that grows is called `symbol`."""
    axes, states = dict(component.axes), dict(component.states)
    for index, layer in enumerate(layers):
        for kind, shape in layer.shapes():
            axes[f"present_{index}_{kind}"] = _state_axes(shape, symbol)
            states[f"present_{index}_{kind}"] = f"{index}.{kind}"
    return replace(component, axes=axes, states=states)


def with_past(component: Component, layers: Sequence[Layer], size: int = PAST, *, in_place: bool = False) -> Component:
    """`component` with what its layers keep as inputs, grown to `size` in the sample, and outputs.

    in_place: what grows has room for more, and the same tensor serves as input and output.
    """
    sample, sources, axes = dict(component.sample), dict(component.sources), dict(component.axes)
    for index, layer in enumerate(layers):
        for kind, shape in layer.shapes():
            past = f"past_{index}_{kind}"
            sizes = (size if fixed is None else fixed for fixed in shape)
            sample[past] = torch.zeros(BATCH, *sizes, dtype=layer.dtype(kind))
            axes[past] = _state_axes(shape, CAPACITY if in_place else "past")
            sources[past] = Source(kind="state", name=f"{index}.{kind}")
    component = replace(component, sample=sample, axes=axes, sources=sources)
    return with_present(component, layers, CAPACITY if in_place else "total")


def by_token(prompt: Component, module: torch.nn.Module, layers: Sequence[Layer]) -> Component | None:
    """The program `token`: the same as `prompt` for one token of it after another, by a `module` that takes a past too.

    None where something goes into the prompt that doesn't belong to its tokens, such as features of pictures.
    """
    sample, axes = {}, {}
    for name, tensor in prompt.sample.items():
        named = prompt.axes.get(name, {})
        if set(named.values()) - {"batch", "sequence"}:
            return None
        # Of a mask of queries and keys, a token's row up to itself; of one of tokens, what has been until then.
        growing = prompt.sources[name].kind == "mask"
        kept = {}
        for axis, symbol in sorted(named.items()):
            indices = torch.zeros(BATCH) if symbol == "batch" else torch.arange(PAST + 1) % tensor.shape[axis]
            if symbol == "sequence" and not growing:
                indices, growing = indices[-1:], True
            else:
                kept[axis] = "batch" if symbol == "batch" else "total"
            tensor = tensor.index_select(axis, indices.long())
        sample[name], axes[name] = tensor, kept
    axes["logits"] = prompt.axes["logits"]
    return with_past(replace(prompt, name="token", module=module, sample=sample, axes=axes, states={}), layers)


def _state_axes(shape: Sequence[int | None], symbol: str) -> dict[int, str]:
    """The dynamic axes of a state whose `shape` behind the batch has None where it grows."""
    return {0: "batch", **({shape.index(None) + 1: symbol} if None in shape else {})}
