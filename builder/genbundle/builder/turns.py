"""State that no known cache layer holds: one turn of the model's own generation loop as a program.

The loop calls `prepare_inputs_for_generation`, the forward, and `_update_model_kwargs_for_generation`; what it carries
from turn to turn is its kwargs. Every tensor in them becomes state, whatever object holds it. A model that keeps
nothing, or keeps what can't be carried, runs the whole sequence again in each turn: then the tokens are the state.
"""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from genbundle.builder.components import Component
from genbundle.builder.exporting import MODEL_ERRORS, first_line, quiet
from genbundle.builder.generation_config import greedy_config
from genbundle.builder.lengths import loop_over_length
from genbundle.builder.objects import Path, leaves, with_leaves
from genbundle.builder.plan import Inputs
from genbundle.builder.programs import BATCH, NEW, PAST
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Flow, Route, Source

_TURNS = 4
_PROMPT = 9  # tokens of the prompt's sample
_SHORT = 3  # a prompt shorter than any window: what depends on the length shows
_CLOSE = 1e-4  # of the largest logit
# Arguments that the loop gives on top of its kwargs, or that are computed from others here.
_OWN = ("next_sequence_length", "is_first_iteration", "attention_mask", "position_ids")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One turn as eager takes it: all tokens so far, the loop's kwargs before it, and the logits it gives."""

    ids: torch.Tensor
    kwargs: dict[str, Any]
    logits: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Held:
    """One tensor that the loop carries. axes: what its axes vary with: "batch", or the number of tokens and a rest."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    axes: Mapping[int, str | int]


class Turn(torch.nn.Module):
    """New tokens `input_ids [batch, new]` and what is carried, to the last position's logits and what is carried on.

    template: the loop's kwargs, into copies of which the carried tensors go. numbers: what stands there besides and
    counts tokens, with its distance from the number of tokens before. ids: whether the tokens themselves are carried.
    """

    def __init__(
        self, model: PreTrainedModel, template: Mapping[str, Any], held: Sequence[Held], numbers: Mapping[Path, int],
        after: Sequence[Held], *, ids: bool, begins: bool,
    ):  # fmt: skip
        super().__init__()
        self.model: Any = model
        self.config, self.ids, self.begins = model.config, ids, begins
        self.template, self.held, self.numbers, self.after = dict(template), tuple(held), dict(numbers), tuple(after)

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """One turn, by the model's own methods."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        new = ids.shape[1]
        if "past_ids" in inputs:
            ids = torch.cat([inputs["past_ids"], ids], 1)
        length = ids.shape[1] if mask is None else mask.shape[1]
        # Copies, since models write into their state and the program's inputs are the caller's.
        given: dict[Path, Any] = {item.path: inputs[f"past_{item.name}"].clone() for item in self.held}
        given |= {path: length - new + distance for path, distance in self.numbers.items()}
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
        kwargs = self.model._update_model_kwargs_for_generation(outputs, kwargs)
        result = {"logits": outputs.logits[:, -1:], **({"present_ids": ids} if self.ids else {})}
        if self.after:
            carried = leaves(kwargs)
            result |= {f"present_{item.name}": carried[item.path] for item in self.after}
        return result


def turn_components(
    model: PreTrainedModel, samples: Sequence[Inputs], why: UnsupportedModelError
) -> tuple[list[Component], Flow, tuple[str, ...]]:
    """Programs of the model's own loop, how they are called, and what to know of them.

    Raises `why`, which is what stands against the usual programs, where the loop's turns can't be replayed either.
    """
    name = type(model).__name__
    try:
        runs = [_observe(model, sample) for sample in samples]
        short = [_observe(model, _cut(sample)) for sample in samples]
    except MODEL_ERRORS as error:
        raise UnsupportedModelError(f"{why} (its own loop can't be watched: {first_line(error)})") from error
    reasons = []
    try:
        held, numbers = _explain([*runs, *short], name)
        for ids in (False, True) if held else ():
            begin = Turn(model, _template(runs[0][0]), (), {}, held, ids=ids, begins=True).eval()
            step = Turn(model, _template(runs[0][1]), held, numbers, held, ids=ids, begins=False).eval()
            wrong = _differs(begin, step, [*runs, *short])
            if wrong is None:
                return *_carrying(begin, step, _padding_counts(begin, runs)), ()
            reasons.append(wrong)
    except UnsupportedModelError as error:
        reasons.append(str(error))
    again = Turn(model, _without_cache(runs[0][0]), (), {}, (), ids=True, begins=False).eval()
    wrong = _differs(again, again, [*runs, *short])
    if wrong is not None:
        raise UnsupportedModelError(f"{why} ({'; '.join([*reasons, 'without a cache ' + wrong])})") from why
    note = f"{name} has no state that can be carried: each step runs the whole sequence again, slow for long ones"
    flow = Flow(prompt=(Route(programs=("decode",)),), step=("decode",), continues=True)
    return [_component(again, new=NEW, past=PAST)], flow, (note,)


def _observe(model: PreTrainedModel, inputs: Inputs) -> list[Call]:
    """What eager's loop does in its first turns."""
    lengths = {"max_new_tokens": _TURNS, "min_new_tokens": _TURNS, "max_length": None}
    config = greedy_config(model, **lengths, return_dict_in_generate=True, output_logits=True)
    with quiet(), torch.no_grad(), _recorded(model) as calls:
        generate: Any = model.generate
        output = generate(**{key: value.clone() for key, value in inputs.items()}, generation_config=config)
    if len(calls) != len(output.logits):
        raise RuntimeError("generate doesn't prepare its inputs once a turn")
    return [
        Call(ids=ids, kwargs=kwargs, logits=logits) for (ids, kwargs), logits in zip(calls, output.logits, strict=True)
    ]


@contextmanager
def _recorded(model: Any) -> Iterator[list[tuple[torch.Tensor, dict[str, Any]]]]:
    """What the model's loop calls `prepare_inputs_for_generation` with, inside the block."""
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []
    own = model.prepare_inputs_for_generation

    @functools.wraps(own)
    def record(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((input_ids.clone(), copy.deepcopy(kwargs)))
        return own(input_ids, *args, **kwargs)

    model.prepare_inputs_for_generation = record  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield calls
    finally:
        del model.__dict__["prepare_inputs_for_generation"]


def _cut(sample: Inputs) -> Inputs:
    """The end of a prompt."""
    ids = sample["input_ids"]
    return {key: value[:, -_SHORT:] if value.shape == ids.shape else value for key, value in sample.items()}


def _template(call: Call) -> dict[str, Any]:
    return {key: None if key in _OWN[2:] else value for key, value in call.kwargs.items() if key not in _OWN[:2]}


def _without_cache(call: Call) -> dict[str, Any]:
    """The loop's kwargs for a turn that begins anew: plain ones alone."""
    simple = bool, int, float, str, type(None)
    return {**{key: value for key, value in _template(call).items() if isinstance(value, simple)}, "use_cache": False}


def _explain(runs: Sequence[Sequence[Call]], name: str) -> tuple[tuple[Held, ...], dict[Path, int]]:
    """What the loop carries from its second turn on: tensors, and numbers that count tokens.

    Raises UnsupportedModelError for what differs between turns in another way.
    """
    steps = [call for run in runs for call in run[1:]]
    sizes = [(call.ids.shape[0], call.ids.shape[1] - 1) for call in steps]
    found = [leaves(_template(call)) for call in steps]
    if any(each.keys() != found[0].keys() for each in found):
        raise UnsupportedModelError(f"{name}: its state holds other things from turn to turn")
    held, numbers = [], {}
    for path, first in found[0].items():
        values: list[Any] = [each[path] for each in found]
        where = ".".join(map(str, path))
        if isinstance(first, torch.Tensor):
            if any(not isinstance(value, torch.Tensor) or value.dim() != first.dim() for value in values):
                raise UnsupportedModelError(f"{name}: its state {where} has another number of axes from turn to turn")
            if any(value.numel() for value in values):
                held.append(_held(path, where, values, sizes, name))
        elif any(value != first for value in values):
            if not all(type(value) is int for value in values):
                raise UnsupportedModelError(f"{name}: its state {where} differs from turn to turn, unexplained")
            distances = {value - length for value, (_, length) in zip(values, sizes, strict=True)}
            if len(distances) != 1:
                raise UnsupportedModelError(f"{name}: its state {where} counts something unexplained")
            numbers[path] = distances.pop()
    return tuple(held), numbers


def _held(path: Path, where: str, values: Sequence[Any], sizes: Sequence[tuple[int, int]], name: str) -> Held:
    axes: dict[int, str | int] = {}
    for axis, found in enumerate(zip(*(value.shape for value in values), strict=True)):
        rests = {size - length for size, (_, length) in zip(found, sizes, strict=True)}
        if len(set(found)) == 1:
            continue
        if all(size == batch for size, (batch, _) in zip(found, sizes, strict=True)):
            axes[axis] = "batch"
        elif len(rests) == 1:
            axes[axis] = rests.pop()
        else:
            raise UnsupportedModelError(f"{name}: axis {axis} of its state {where} varies in a way not known here")
    title = "_".join("cache" if key == "past_key_values" else str(key) for key in path)
    return Held(name=title, path=path, dtype=values[0].dtype, shape=tuple(values[0].shape), axes=axes)


def _differs(begin: Turn, step: Turn, runs: Sequence[Sequence[Call]]) -> str | None:
    """Why replaying what eager did gives other logits; None where it gives the same."""
    try:
        with torch.no_grad():
            for run in runs:
                mask = next((call.kwargs["attention_mask"] for call in run if _mask(call) is not None), None)
                kept: dict[str, torch.Tensor] = {}
                for number, call in enumerate(run):
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


def _mask(call: Call) -> torch.Tensor | None:
    return call.kwargs.get("attention_mask")


def _padding_counts(begin: Turn, runs: Sequence[Sequence[Call]]) -> bool:
    """Whether the model takes padding for tokens like any others."""
    for run in runs:
        mask = _mask(run[0])
        if mask is not None and not bool(mask.all()):
            with torch.no_grad():
                masked, plain = (
                    begin(input_ids=run[0].ids, attention_mask=each)["logits"] for each in (mask, torch.ones_like(mask))
                )
            return torch.equal(masked, plain)
    return False


def _carrying(begin: Turn, step: Turn, padded: bool) -> tuple[list[Component], Flow]:
    """Programs for a prompt, for its first token, and for every further one."""
    obstacle = loop_over_length(begin, lambda length: _component(begin, new=length, past=0).sample)
    prompt = replace(_component(begin, new=_PROMPT, past=0), name="prompt", optional=True, obstacle=obstacle)
    components = [prompt, _component(begin, new=1, past=0)]
    routes = (
        Route(programs=("prompt",), padded=padded),
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
        sizes = {axis: BATCH if size == "batch" else past + int(size) for axis, size in item.axes.items()}
        shape = [sizes.get(axis, size) for axis, size in enumerate(item.shape)]
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


def _named(item: Held, growing: str | None) -> dict[int, str]:
    """The names of a tensor's axes; one that grows and isn't as long as the sequence has a name of its own."""
    names = {}
    for axis, size in item.axes.items():
        if size == "batch":
            names[axis] = "batch"
        elif growing is not None:
            names[axis] = growing if size == 0 else f"{growing}_{size:+d}".replace("+", "plus").replace("-", "minus")
    return names
