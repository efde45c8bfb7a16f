"""What a model's own generation loop is given and carries on, watched turn by turn, and how the sizes of that vary."""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from genbundle.builder.cut import attribute
from genbundle.builder.exporting import quiet
from genbundle.builder.generation_config import greedy_config
from genbundle.builder.layers import whole_windows
from genbundle.builder.objects import Path, leaves
from genbundle.builder.plan import Inputs
from genbundle.builder.samples import per_token
from genbundle.bundles import UnsupportedModelError
from genbundle.runtime.inputs import TEXT_INPUTS

_TURNS = 4
_SHORT = 3  # a prompt shorter than any window: what depends on the length shows
# Arguments that the loop gives on top of its kwargs, or that are computed from others here.
_OWN = ("next_sequence_length", "is_first_iteration", "attention_mask", "position_ids")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One turn as eager takes it: all tokens so far, the loop's kwargs before it, and the logits it gives."""

    ids: torch.Tensor
    kwargs: dict[str, Any]
    logits: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Run:
    """The first turns of one generation, and what the user gave."""

    given: Inputs
    calls: list[Call]


@dataclass(frozen=True, kw_only=True)
class Held:
    """One tensor that the loop carries.

    axes: what its axes vary with: "batch"; the number of tokens, so many for each, and a rest; or, by a name of its
    own, what the user gave.
    """

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    axes: Mapping[int, str | tuple[int, int]]


def observe(model: PreTrainedModel, inputs: Inputs) -> Run:
    """What eager's loop does in its first turns."""
    lengths = {"max_new_tokens": _TURNS, "min_new_tokens": _TURNS, "max_length": None}
    config = greedy_config(model, **lengths, return_dict_in_generate=True, output_logits=True)
    with quiet(), torch.no_grad(), whole_windows(), _recorded(model) as calls:
        generate: Any = model.generate
        output = generate(**{key: value.clone() for key, value in inputs.items()}, generation_config=config)
    if len(calls) != len(output.logits):
        raise RuntimeError("generate doesn't prepare its inputs once a turn")
    turns = zip(calls, output.logits, strict=True)
    return Run(given=inputs, calls=[Call(ids=ids, kwargs=kwargs, logits=logits) for (ids, kwargs), logits in turns])


@contextmanager
def _recorded(model: Any) -> Iterator[list[tuple[torch.Tensor, dict[str, Any]]]]:
    """What the model's loop calls `prepare_inputs_for_generation` with, inside the block."""
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []
    own = model.prepare_inputs_for_generation

    @functools.wraps(own)
    def record(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((input_ids.clone(), copy.deepcopy(kwargs)))
        return own(input_ids, *args, **kwargs)

    with attribute(model, "prepare_inputs_for_generation", record):
        yield calls


def cut(samples: Sequence[Inputs]) -> list[Inputs]:
    """The ends of prompts."""
    rows = per_token(samples)
    return [{key: value[:, -_SHORT:] if key in rows else value for key, value in sample.items()} for sample in samples]


def spared(held: tuple[Held, ...], runs: Sequence[Run]) -> Iterator[tuple[Held, ...]]:
    """`held` without what the loop only hands on, which the prompt alone may need; and all of it."""
    handed_on = {key for key in runs[0].calls[0].kwargs if all(_stays(run, key) for run in runs)}
    yield tuple(item for item in held if item.path[0] not in handed_on)
    yield held


def _stays(run: Run, key: str) -> bool:
    first, *others = (call.kwargs.get(key) for call in run.calls)
    if not isinstance(first, torch.Tensor):
        return False
    return all(isinstance(other, torch.Tensor) and torch.equal(first, other) for other in others)


def template(call: Call) -> dict[str, Any]:
    return {key: None if key in _OWN[2:] else value for key, value in call.kwargs.items() if key not in _OWN[:2]}


def without_cache(call: Call) -> dict[str, Any]:
    """The loop's kwargs for a turn that begins anew: plain ones alone."""
    simple = bool, int, float, str, type(None)
    return {**{key: value for key, value in template(call).items() if isinstance(value, simple)}, "use_cache": False}


def explain(runs: Sequence[Run], name: str) -> tuple[tuple[Held, ...], dict[Path, int]]:
    """What the loop carries from its second turn on: tensors, and numbers that count tokens.

    Raises UnsupportedModelError for what differs between turns in another way.
    """
    steps = [(number, call) for number, run in enumerate(runs) for call in run.calls[1:]]
    sizes = [_Sizes(number, call.ids.shape[0], call.ids.shape[1] - 1) for number, call in steps]
    found = [leaves(template(call)) for _, call in steps]
    if any(each.keys() != found[0].keys() for each in found):
        raise UnsupportedModelError(f"{name}: its state holds other things from turn to turn")
    held, numbers, names = [], {}, {}
    media = len(runs[0].given.keys() - set(TEXT_INPUTS)) > 0
    for path, first in found[0].items():
        values: list[Any] = [each[path] for each in found]
        where = ".".join(map(str, path))
        if isinstance(first, torch.Tensor):
            if any(not isinstance(value, torch.Tensor) or value.dim() != first.dim() for value in values):
                raise UnsupportedModelError(f"{name}: its state {where} has another number of axes from turn to turn")
            constant = not first.dim() and all(value == first for value in values)  # a number as a tensor
            if any(value.numel() for value in values) and not constant:
                held.append(_held(path, where, values, sizes, names if media else None, name))
        elif any(value != first for value in values):
            if not all(type(value) is int for value in values):
                raise UnsupportedModelError(f"{name}: its state {where} differs from turn to turn, unexplained")
            distances = {value - each.length for value, each in zip(values, sizes, strict=True)}
            if len(distances) != 1:
                raise UnsupportedModelError(f"{name}: its state {where} counts something unexplained")
            numbers[path] = distances.pop()
    return tuple(held), numbers


@dataclass(frozen=True)
class _Sizes:
    """Of one turn: which run's it is, how many sequences, how many tokens before its new one."""

    run: int
    batch: int
    length: int


def _held(
    path: Path, where: str, values: Sequence[Any], turns: Sequence[_Sizes], names: dict[tuple, str] | None, name: str
) -> Held:
    """names: the names of sizes that differ with what the user gave, to be added to; None where he gives text alone."""
    title = "_".join("cache" if key == "past_key_values" else str(key) for key in path)
    axes: dict[int, str | tuple[int, int]] = {}
    for axis, found in enumerate(zip(*(value.shape for value in values), strict=True)):
        if len(set(found)) == 1:
            continue
        line = _line(found, turns)
        if all(size == turn.batch for size, turn in zip(found, turns, strict=True)):
            axes[axis] = "batch"
        elif line is not None:
            axes[axis] = line
        elif names is not None and len(set(zip(found, (turn.run for turn in turns), strict=True))) == turns[-1].run + 1:
            axes[axis] = names.setdefault(found, f"{title}_{axis}")
        else:
            raise UnsupportedModelError(f"{name}: axis {axis} of its state {where} varies in a way not known here")
    return Held(name=title, path=path, dtype=values[0].dtype, shape=tuple(values[0].shape), axes=axes)


def _line(found: tuple[int, ...], turns: Sequence[_Sizes]) -> tuple[int, int] | None:
    """How many there are for each token, and how many besides; None where it isn't so."""
    each = found[1] - found[0]  # of two turns, one after the other
    rests = {size - each * turn.length for size, turn in zip(found, turns, strict=True)}
    return (each, rests.pop()) if each > 0 and len(rests) == 1 else None
