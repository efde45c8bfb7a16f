"""Models whose generate calls another model's inside: what stands before that call is traced with the prompt."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from genbundle.builder.components import Component
from genbundle.builder.cut import attribute
from genbundle.builder.decoder import Decoder
from genbundle.builder.exporting import MODEL_ERRORS, decompose, first_line, quiet
from genbundle.builder.plan import Call, Capture, Inputs, capture, constant_arguments
from genbundle.builder.samples import per_token
from genbundle.builder.turns import Outer, Turn, turn_components
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Flow, Generation, PromptEdit, Source

_PROMPT = ("input_ids", "attention_mask")
_STATE = ("past_key_values", "use_cache", "return_dict", "input_ids")


def generate_of(model: PreTrainedModel, generate: Callable[..., Any]) -> AbstractContextManager[None]:
    """`model` with another `generate` inside the block, on this instance alone."""
    return attribute(model, "generate", generate)


def capture_calls(model: PreTrainedModel, samples: list[Inputs]) -> list[Capture]:
    """Captures of the model or, where its generate never calls its own forward, of the one inside that generates."""
    try:
        return capture(model, samples)
    except UnsupportedModelError:
        found = [_inner_call(model, sample) for sample in samples]
        if any(call is None for call in found):
            raise
    captures = []
    for sample, call in zip(samples, found, strict=True):
        assert call is not None
        inner, kwargs = call
        prompt, step = decompose(inner, kwargs)
        captures.append(Capture(inputs=sample, prompt=prompt, step=step, inner=call))
    return captures


def _inner_call(model: PreTrainedModel, sample: Inputs) -> tuple[PreTrainedModel, dict[str, Any]] | None:
    """Which model inside generates for `sample`, and from what; None where none does."""
    inside = [
        module
        for module in model.modules()
        if module is not model and isinstance(module, PreTrainedModel) and module.can_generate()
    ]
    calls: list[tuple[PreTrainedModel, dict[str, Any]]] = []

    def recorder(module: PreTrainedModel) -> Callable[..., torch.Tensor]:
        def record(**kwargs: Any) -> torch.Tensor:
            calls.append((module, {key: value for key, value in kwargs.items() if value is not None}))
            return sample["input_ids"]

        return record

    outer: Any = model.generate
    try:
        with ExitStack() as stack, quiet(), torch.no_grad():
            for module in inside:
                stack.enter_context(generate_of(module, recorder(module)))
            outer(**{name: value.clone() for name, value in sample.items()})
    except MODEL_ERRORS as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}.generate refuses the inputs {sorted(sample)}: {first_line(error)}"
        ) from error
    return calls[0] if len(calls) == 1 else None


def explain_inner(model: PreTrainedModel, captures: list[Capture], step: Call) -> tuple[Call, tuple[str, ...]]:
    """How the runtime calls the prompt: the user's inputs and positions; and what the inner forward is given of what
    the inner generate was."""
    name = type(model).__name__
    cache = {key for item in captures for key, value in item.prompt.items() if isinstance(value, Cache)}
    constants = constant_arguments(
        [item.prompt for item in captures], f"{name}: the inner prompt's", {*_STATE, *cache, "mm_encoder_outputs"}
    )
    sources = {key: Source(kind="user", name=key) for key in captures[0].inputs}
    sources |= {"input_ids": Source(kind="tokens")}
    if "attention_mask" in sources:
        sources["attention_mask"] = Source(kind="mask")
    handed = []
    for argument in {key: None for item in captures for key in item.prompt}:
        values = [item.prompt.get(argument) for item in captures]
        if not any(isinstance(value, torch.Tensor) for value in values) or argument in cache:
            continue
        if all(_handed(item, argument) for item in captures):
            handed.append(argument)
        elif argument == "position_ids" and "position_ids" in step.sources:
            sources[argument] = step.sources[argument]
        else:
            raise UnsupportedModelError(f"{name}: the inner prompt's input {argument!r} has no explanation")
    return Call(sources=sources, constants=constants, position_axes=step.position_axes), tuple(handed)


def _handed(item: Capture, argument: str) -> bool:
    """Whether the inner forward got what the inner generate did; a mask of ones is dropped on the way."""
    assert item.inner is not None
    value, given = item.prompt.get(argument), item.inner[1].get(argument)
    if not isinstance(given, torch.Tensor):
        return False
    if not isinstance(value, torch.Tensor):
        return argument == "attention_mask" and bool((given == 1).all())
    return value.shape == given.shape and torch.equal(value, given)


def observed_generation(generation: Generation, captures: Sequence[Capture]) -> Generation:
    """`generation` with what the outer generate hands to the inner one instead: its tokens, and how its prompt begins.

    Raises UnsupportedModelError for a prompt that is made of the user's in a way not known here.
    """
    calls = [(item.inputs, item.inner[1]) for item in captures if item.inner is not None]
    if not calls:
        return generation
    for name in ("eos_token_id", "pad_token_id"):
        found = [call.get(name) for _, call in calls]
        if all(value is None for value in found):
            continue
        tokens = found[0] if isinstance(found[0], list) else [found[0]]
        if any(value != found[0] for value in found) or not all(isinstance(token, int) for token in tokens):
            raise UnsupportedModelError(f"generate hands the inner one {name}={found[0]!r}, unexplained")
        known = {"eos_token_ids": tuple(tokens)} if name == "eos_token_id" else {name: tokens[0]}
        generation = replace(generation, **known)
    return replace(generation, prompt_edit=prompt_edit(captures))


def prompt_edit(captures: Sequence[Capture]) -> PromptEdit | None:
    """What the outer generate makes of the prompt's tokens before the inner one gets them; None for nothing."""
    edits = []
    for item in captures:
        found = None if item.inner is None else item.inner[1].get("input_ids")
        given = item.inputs.get("input_ids")
        if not isinstance(found, torch.Tensor) or given is None:
            return None
        kept = found.shape[1]
        begun = None if torch.equal(found[:, 0], given[:, 0]) else int(found[0, 0])
        edit = PromptEdit(first=begun, dropped=given.shape[1] - kept)
        expected = given[:, :kept].clone()
        if begun is not None:
            expected[:, 0] = begun
        if edit.dropped < 0 or not torch.equal(found, expected):
            raise UnsupportedModelError("generate makes another prompt of the user's tokens, in a way not known here")
        edits.append(edit)
    first = next((edit.first for edit in edits if edit.first is not None), None)
    if len({edit.dropped for edit in edits}) > 1 or any(edit.first not in (None, first) for edit in edits):
        raise UnsupportedModelError("generate changes the user's tokens otherwise from run to run, unexplained")
    if first is None and not edits[0].dropped:
        return None
    beside = sorted(per_token([item.inputs for item in captures]) - set(_PROMPT))
    if beside:
        raise UnsupportedModelError(f"generate changes the prompt's tokens, and {beside[0]!r} has a row for each")
    return PromptEdit(first=first, dropped=edits[0].dropped)


def inner_turn_components(
    model: PreTrainedModel, captures: list[Capture], why: UnsupportedModelError
) -> tuple[list[Component], Flow, tuple[str, ...]]:
    """Programs of the inner model's own loop, the prompt's with what stands before it; raises `why` where it can't."""
    found = [item.inner for item in captures if item.inner is not None]
    inner, edit = found[0][0], prompt_edit(captures) or PromptEdit()
    calls = [{key: value for key, value in call.items() if isinstance(value, torch.Tensor)} for _, call in found]
    if any("input_ids" not in call for call in calls):
        raise why
    begun = [{**item.inputs, "input_ids": call["input_ids"]} for item, call in zip(captures, calls, strict=True)]
    begun = [
        {**inputs, "attention_mask": call.get("attention_mask", torch.ones_like(call["input_ids"]))}
        for inputs, call in zip(begun, calls, strict=True)
    ]
    return turn_components(inner, calls, why, outer=Outer(begun, lambda begin: InnerTurn(model, begin, edit).eval()))


class InnerTurn(torch.nn.Module):
    """`outer`'s generate up to the inner one, whose place the first turn of the inner model's loop takes.

    Its tokens are those that the inner one gets: `edit` says what the outer one would have been given.
    """

    def __init__(self, outer: PreTrainedModel, begin: Turn, edit: PromptEdit):
        super().__init__()
        self.outer, self.begin, self.edit, self.config = outer, begin, edit, begin.config

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The turn's logits and what is carried on."""
        found: list[dict[str, torch.Tensor]] = []
        user = dict(inputs)
        for name in _PROMPT:
            if name in inputs:  # outer models write into it, and what they drop may be anything
                last = inputs[name][:, -1:].expand(-1, self.edit.dropped)
                user[name] = torch.cat([inputs[name], last], 1)

        def turn(**kwargs: Any) -> torch.Tensor:
            found.append(self.begin(**{name: kwargs[name] for name in (*_PROMPT, *self.begin.media) if name in kwargs}))
            return inputs["input_ids"]

        outer: Any = self.outer.generate
        with generate_of(self.begin.model, turn):
            outer(**user)
        return found[0]


class InnerPrompt(Decoder):
    """`outer`'s generate up to the inner one, whose place the inner model's forward takes.

    handed: the arguments that the inner generate hands to its forward.
    """

    def __init__(self, outer: PreTrainedModel, inner: PreTrainedModel, handed: tuple[str, ...], **options: Any):
        super().__init__(inner, **options)
        self.outer, self._handed = outer, handed

    def call(self, inputs: dict[str, torch.Tensor], cache: Any) -> torch.Tensor:
        """The logits of the inner forward."""
        found: list[torch.Tensor] = []
        own = {name: inputs[name] for name in ("position_ids",) if name in inputs}
        user = {name: value for name, value in inputs.items() if name not in own}

        def forward(**kwargs: Any) -> torch.Tensor:
            given = {name: kwargs[name] for name in self._handed}
            found.append(super(InnerPrompt, self).call({**given, **own}, cache))
            return inputs["input_ids"]

        outer: Any = self.outer.generate
        with generate_of(self.model, forward):
            outer(**user)
        return found[0]
