"""State that no known cache layer holds: one turn of the model's own generation loop as a program.

The loop calls `prepare_inputs_for_generation`, the forward, and `_update_model_kwargs_for_generation`; what it carries
from turn to turn is its kwargs. Every tensor in them becomes state, whatever object holds it. A model that keeps
nothing, or keeps what can't be carried, runs the whole sequence again in each turn: then the tokens are the state.
Pictures and sounds go in with the prompt; what the model makes of them is state like anything else.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from genbundle.builder.components import Component, name_axes
from genbundle.builder.exporting import MODEL_ERRORS, first_line
from genbundle.builder.layers import whole_windows
from genbundle.builder.lengths import loop_over_length
from genbundle.builder.objects import Path, leaves, with_leaves
from genbundle.builder.plan import Inputs
from genbundle.builder.programs import BATCH, NEW, PAST, PROMPTS
from genbundle.builder.samples import generates_from_text_alone
from genbundle.builder.watching import Held, Run, cut, explain, observe, spared, template, without_cache
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Flow, Route, Source
from genbundle.runtime.inputs import TEXT_INPUTS

_PROMPT = 9  # tokens of the prompt's sample
_CLOSE = 1e-4  # of the largest logit


class Turn(torch.nn.Module):
    """New tokens `input_ids [batch, new]` and what is carried, to the last position's logits and what is carried on.

    template: the loop's kwargs, into copies of which the carried tensors go. numbers: what stands there besides and
    counts tokens, with its distance from the number of tokens before. ids: whether the tokens themselves are carried.
    media: the user's inputs beside the tokens, which a prompt takes.
    """

    def __init__(
        self, model: PreTrainedModel, template: Mapping[str, Any], held: Sequence[Held], numbers: Mapping[Path, int],
        after: Sequence[Held], *, ids: bool, begins: bool, media: Sequence[str] = (),
    ):  # fmt: skip
        super().__init__()
        self.media = tuple(media)
        self.model: Any = model
        self.config, self.ids, self.begins = model.config, ids, begins
        self.template, self.held, self.numbers, self.after = dict(template), tuple(held), dict(numbers), tuple(after)

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """One turn, by the model's own methods."""
        with whole_windows():
            return self._turn(inputs)

    def _turn(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        new = ids.shape[1]
        if "past_ids" in inputs:
            ids = torch.cat([inputs["past_ids"], ids], 1)
        length = ids.shape[1] if mask is None else mask.shape[1]
        # Copies, since models write into their state and the program's inputs are the caller's.
        given: dict[Path, Any] = {item.path: inputs[f"past_{item.name}"].clone() for item in self.held}
        given |= {path: length - new + distance for path, distance in self.numbers.items()}
        if self.media:
            # What generate makes of its inputs before the loop.
            user = {"input_ids": ids, **{name: inputs[name] for name in self.media}}
            made = self.model._prepare_model_inputs(None, None, user)[2]
            given |= {(key,): value for key, value in made.items() if isinstance(self.template.get(key), torch.Tensor)}
        kwargs = with_leaves(self.template, given)
        if "attention_mask" in kwargs:
            kwargs["attention_mask"] = mask
        if "position_ids" in kwargs:
            known = {} if mask is None else {"attention_mask": mask}
            kwargs["position_ids"] = self.model._prepare_position_ids_for_generation(ids, known)
        if self.begins:
            kwargs["is_first_iteration"] = True
        own = None if self.begins or not kwargs.get("use_cache") else new
        prepared = self.model.prepare_inputs_for_generation(ids, next_sequence_length=own, **kwargs)
        outputs = self.model(**prepared, return_dict=True)
        kwargs.pop("is_first_iteration", None)
        encoder = self.config.is_encoder_decoder
        kwargs = self.model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=encoder)
        result = {"logits": outputs.logits[:, -1:], **({"present_ids": ids} if self.ids else {})}
        if self.after:
            carried = leaves(kwargs)
            result |= {f"present_{item.name}": carried[item.path] for item in self.after}
        return result


@dataclass(frozen=True)
class Outer:
    """A generate around the model's own: what the user gives it, and the prompt's module that begins there."""

    samples: Sequence[Inputs]
    prompt: Callable[[Turn], torch.nn.Module]


def turn_components(
    model: PreTrainedModel, samples: Sequence[Inputs], why: UnsupportedModelError, outer: Outer | None = None
) -> tuple[list[Component], Flow, tuple[str, ...]]:
    """Programs of the model's own loop, how they are called, and what to know of them.

    Raises `why`, which is what stands against the usual programs, where the loop's turns can't be replayed either.
    """
    name = type(model).__name__
    media = tuple(key for key in samples[0] if key not in TEXT_INPUTS)
    try:
        runs = [observe(model, sample) for sample in (*samples, *cut(samples))]
    except MODEL_ERRORS as error:
        raise UnsupportedModelError(f"{why} (its own loop can't be watched: {first_line(error)})") from error
    reasons = []
    try:
        held, numbers = explain(runs, name)
        for ids, kept in itertools.product((False, True), spared(held, runs) if media else (held,)) if held else ():
            left_out = {item.path[0]: None for item in held if item not in kept}
            begin = Turn(model, template(runs[0].calls[0]), (), {}, kept, ids=ids, begins=True, media=media).eval()
            step = Turn(model, template(runs[0].calls[1]) | left_out, kept, numbers, kept, ids=ids, begins=False).eval()
            wrong = _differs(begin, step, runs)
            if wrong is None and media:
                return _with_media(model, begin, step, samples, outer)
            if wrong is None:
                return *_carrying(begin, step, _padding_counts(begin, runs)), ()
            reasons.append(wrong)
    except UnsupportedModelError as error:
        reasons.append(str(error))
    if media:
        raise UnsupportedModelError(f"{why} ({'; '.join(reasons)})") from why
    again = Turn(model, without_cache(runs[0].calls[0]), (), {}, (), ids=True, begins=False).eval()
    wrong = _differs(again, again, runs)
    if wrong is not None:
        raise UnsupportedModelError(f"{why} ({'; '.join([*reasons, 'without a cache ' + wrong])})") from why
    note = f"{name} has no state that can be carried: each step runs the whole sequence again, slow for long ones"
    flow = Flow(prompt=(Route(programs=("decode",)),), step=("decode",), continues=True)
    return [_component(again, new=NEW, past=PAST)], flow, (note,)


def _differs(begin: Turn, step: Turn, runs: Sequence[Run]) -> str | None:
    """Why replaying what eager did gives other logits; None where it gives the same."""
    try:
        with torch.no_grad():
            for run in runs:
                mask = _mask(run)
                kept: dict[str, torch.Tensor] = {name: run.given[name] for name in begin.media}
                for number, call in enumerate(run.calls):
                    module = step if number else begin
                    inputs = {"input_ids": call.ids[:, -1:] if number else call.ids, **kept}
                    if "attention_mask" in module.template:
                        inputs["attention_mask"] = torch.ones_like(call.ids)
                        if mask is not None:
                            inputs["attention_mask"][:, : mask.shape[1]] = mask
                    results = module(**inputs)
                    kept = {key.replace("present_", "past_", 1): v for key, v in results.items() if key != "logits"}
                    logits = results["logits"][:, -1].float()
                    if not torch.allclose(logits, call.logits, rtol=0, atol=_CLOSE * float(call.logits.abs().max())):
                        return f"turn {number} of a replay gives other logits than eager"
    except MODEL_ERRORS as error:
        return f"a replay fails: {first_line(error)}"
    return None


def _mask(run: Run) -> torch.Tensor | None:
    """The prompt's mask, where there is one: generate drops one of ones."""
    masks = (call.kwargs.get("attention_mask") for call in run.calls)
    return next((mask for mask in masks if mask is not None), None)


def _padding_counts(begin: Turn, runs: Sequence[Run]) -> bool:
    """Whether the model takes padding for tokens like any others."""
    for run in runs:
        mask, ids = _mask(run), run.calls[0].ids
        if mask is not None and not bool(mask.all()):
            mask = mask[:, : ids.shape[1]]
            with torch.no_grad():
                masked, plain = (
                    begin(input_ids=ids, attention_mask=each)["logits"] for each in (mask, torch.ones_like(mask))
                )
            return torch.equal(masked, plain)
    return False


def _with_media(
    model: PreTrainedModel, begin: Turn, step: Turn, samples: Sequence[Inputs], outer: Outer | None
) -> tuple[list[Component], Flow, tuple[str, ...]]:
    """Programs for a prompt with pictures or sounds, and for every further token."""
    module, media = begin, begin.media
    if outer is not None:
        module, samples = outer.prompt(begin), outer.samples
        media = tuple(name for name in samples[0] if name not in TEXT_INPUTS)
    ids = [sample["input_ids"] for sample in samples]
    known = {tuple(each.shape[axis] for each in ids): name for axis, name in ((1, "sequence"), (0, "batch"))}
    names = (*(("attention_mask",) if "attention_mask" in begin.template else ()), *media)
    given = [{"input_ids": sample["input_ids"], **{name: sample[name] for name in names}} for sample in samples]
    text = _component(begin, new=_PROMPT, past=0)
    prompt = replace(
        text,
        name="prompt",
        module=module,
        roles=("encoder", "projector", *text.roles),
        sample=given[0],
        axes={**text.axes, **name_axes(given, known)},
        sources={**text.sources, **{name: Source(kind="user", name=name) for name in media}},
    )
    route = Route(programs=("prompt",), needs=tuple(sorted(media)))
    alone = outer is None and generates_from_text_alone(model)
    notes = ("prompts of text alone are refused",) if alone else ()
    return [prompt, _component(step, new=1, past=PAST)], Flow(prompt=(route,), step=("decode",)), notes


def _carrying(begin: Turn, step: Turn, padded: bool) -> tuple[list[Component], Flow]:
    """Programs for a prompt, for its first token, and for every further one."""
    obstacle = loop_over_length(begin, lambda length: _component(begin, new=length, past=0).sample)
    prompt = replace(_component(begin, new=_PROMPT, past=0), name="prompt", optional=True, obstacle=obstacle)
    components = [prompt, _component(begin, new=1, past=0)]
    routes = (
        *(Route(programs=(name,), padded=padded) for name in PROMPTS),
        Route(programs=("begin",), one_by_one=True, padded=padded),
    )
    return [*components, _component(step, new=1, past=PAST)], Flow(prompt=routes, step=("decode",))


def _component(module: Turn, *, new: int, past: int) -> Component:
    """One program of the loop: a prompt without a past, its first token, or a step."""
    sequence = {} if new == 1 else {1: "sequence"}
    sample = {"input_ids": torch.ones(BATCH, new, dtype=torch.long)}
    axes: dict[str, dict[int, str]] = {"input_ids": {0: "batch", **sequence}, "logits": {0: "batch"}}
    sources: dict[str, Source] = {"input_ids": Source(kind="tokens")}
    states: dict[str, str] = {}
    # After a past, or one new token: the sum of both is a size of its own.
    total = {1: "total"} if past else sequence
    if "attention_mask" in module.template:
        sample["attention_mask"] = torch.ones(BATCH, past + new, dtype=torch.long)
        axes["attention_mask"] = {0: "batch", **total}
        sources["attention_mask"] = Source(kind="mask")
    if module.ids:
        if past:
            sample["past_ids"] = torch.ones(BATCH, past, dtype=torch.long)
            axes["past_ids"], sources["past_ids"] = {0: "batch", 1: "past"}, Source(kind="state", name="ids")
        axes["present_ids"], states["present_ids"] = {0: "batch", **total}, "ids"
    for item in module.held if past else ():
        shape = [_size(item.axes.get(axis), size, past) for axis, size in enumerate(item.shape)]
        sample[f"past_{item.name}"] = torch.zeros(shape, dtype=item.dtype)
        axes[f"past_{item.name}"] = _named(item, "past")
        sources[f"past_{item.name}"] = Source(kind="state", name=item.name)
    for item in module.after:
        axes[f"present_{item.name}"] = _named(item, "total" if past else "sequence" if new > 1 else None)
        states[f"present_{item.name}"] = item.name
    return Component(
        name="decode" if past else "begin",
        roles=("merge", "language_model", "lm_head", *(("decode",) if past else ())),
        module=module,
        sample=sample,
        axes=axes,
        sources=sources,
        states=states,
        fusions=False,  # they look back only, and what this model looks at isn't known here
    )


def _size(varies: str | tuple[int, int] | None, size: int, past: int) -> int:
    """The size of a carried tensor's axis in the sample of a step; `size` as it was watched."""
    if isinstance(varies, tuple):
        return varies[0] * past + varies[1]
    return BATCH if varies == "batch" else size


def _named(item: Held, growing: str | None) -> dict[int, str]:
    """The names of a tensor's axes; one that grows and isn't as long as the sequence has a name of its own."""
    names = {}
    for axis, varies in item.axes.items():
        if isinstance(varies, str):
            names[axis] = varies
        elif growing is not None:
            each, rest = varies
            times = "" if each == 1 else f"_times{each}"
            names[axis] = f"{growing}{times}" + (
                f"_{rest:+d}".replace("+", "plus").replace("-", "minus") if rest else ""
            )
    return names
