"""Models whose generate calls another model's inside: what stands before that call is traced with the prompt."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from genbundle.builder.cut import attribute
from genbundle.builder.decoder import Decoder
from genbundle.builder.exporting import MODEL_ERRORS, decompose, first_line, quiet
from genbundle.builder.plan import Call, Capture, Inputs, capture, constant_arguments
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Source

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
