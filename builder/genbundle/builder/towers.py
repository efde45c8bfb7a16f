"""An encoder as the modules that `get_<modality>_features` calls one after another, without the Python around them.

Where inputs steer Python (patch grids, picture sizes), that Python can't be traced: it deals pictures out and the
features back, with numbers read from tensors. What it calls can: each module's inputs are found among the program's own
and among the outputs of the modules before it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.modules import module as hooks

from genbundle.builder.components import Component, name_axes, needed_inputs, same_tensors
from genbundle.builder.cut import leaves
from genbundle.builder.exporting import prepare_inputs
from genbundle.builder.preparing import explain_prepared
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Input, Source

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ModuleCall:
    """One call of a module: its arguments by name, and the tensors of its output by path."""

    module: torch.nn.Module
    arguments: dict[str, Any]
    fields: Tensors


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Where a tensor comes from: an input of the program (stage None), or a field of an earlier module's output.

    shape: what it is reshaped to, with -1 for the axis that varies; None as it is. filled: instead, this number
    throughout, as many rows as the input or field has. made: Python made it of the user's inputs. skip: so much of the
    second axis is left out. rows: the input that says in which order its rows are taken, `last` being one more.
    """

    stage: int | None
    name: str
    shape: tuple[int, ...] | None = None
    filled: float | None = None
    made: bool = False
    skip: int = 0
    rows: str | None = None
    last: torch.Tensor | None = None

    def take(self, inputs: Mapping[str, Any], outputs: Sequence[Mapping[str, torch.Tensor]]) -> Any:
        """The tensor, from the program's inputs and the outputs of the modules so far."""
        value = inputs[self.name] if self.stage is None else outputs[self.stage][self.name]
        if self.skip:
            value = value[:, self.skip :]
        if self.rows is not None:
            value = value.reshape(-1, value.shape[-1])
            table = value if self.last is None else torch.cat([value, self.last[None]])
            return table[inputs[self.rows]]
        if self.filled is not None:
            assert self.shape is not None
            return torch.full((value.shape[0], *self.shape[1:]), self.filled)
        return value if self.shape is None else value.reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One module of a chain: its tensors' feeds and its other arguments."""

    module: torch.nn.Module
    feeds: dict[str, Feed]
    constants: dict[str, Any] = field(default_factory=dict)


class Chain(torch.nn.Module):
    """Modules called one after another, with flat outputs; the first takes the inputs that feed nothing else too."""

    def __init__(self, stages: Sequence[Stage], outputs: Mapping[str, Feed]):
        super().__init__()
        self.parts = torch.nn.ModuleList(stage.module for stage in stages)
        self.config = getattr(stages[0].module, "config", None)
        self.stages, self._outputs = tuple(stages), dict(outputs)
        self._taken = {
            feed.name
            for feed in (*self._outputs.values(), *(feed for stage in stages for feed in stage.feeds.values()))
            if feed.stage is None
        } | {feed.rows for feed in self._outputs.values()}

    def forward(self, **inputs: Any) -> Tensors:
        """The features by name."""
        outputs: list[Tensors] = []
        for index, stage in enumerate(self.stages):
            rest = {} if index else {name: value for name, value in inputs.items() if name not in self._taken}
            given = {
                argument: feed.take(inputs, outputs)
                for argument, feed in stage.feeds.items()
                if feed.stage is not None or feed.name in inputs
            }
            outputs.append(leaves(stage.module(**stage.constants, **given, **rest)))
        return {name: feed.take(inputs, outputs) for name, feed in self._outputs.items()}


def watch_modules(run: Callable[[], Any]) -> list[ModuleCall]:
    """The outermost modules that `run` calls, in order."""
    calls: list[ModuleCall] = []
    with torch.no_grad(), _watched(calls):
        run()
    return calls


@contextmanager
def _watched(calls: list[ModuleCall]) -> Iterator[None]:
    depth = 0

    def enter(_module: torch.nn.Module, _args: tuple) -> None:
        nonlocal depth
        depth += 1

    def leave(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            # Models write into their tower's output object.
            fields = {path: value.clone() for path, value in leaves(output).items()}
            calls.append(ModuleCall(module=module, arguments=_bound(module, args, kwargs), fields=fields))

    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, with_kwargs=True, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bound(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(module.forward).parameters)
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in bound.items()}


def chain_component(
    model: torch.nn.Module,
    modality: str,
    run: Callable[[Tensors], Any],
    given: list[Tensors],
    wanted: list[Tensors],
) -> Component:
    """The modules that `run(inputs)` calls, as a component that gives the features `wanted` of every capture.

    Raises UnsupportedModelError, naming what a module takes that comes from nowhere, or a feature that none gives.
    """
    name = f"{modality}_encoder"
    calls = [watch_modules(lambda inputs=inputs: run(inputs)) for inputs in given]
    order = [call.module for call in calls[0]]
    if not order or len({id(module) for module in order}) != len(order):
        raise UnsupportedModelError(f"the {name} calls a module once for each picture, which can't be traced")
    if any([call.module for call in item] != order for item in calls):
        raise UnsupportedModelError(f"the {name} calls other modules from run to run, which can't be traced")
    found = {key: _feature_feed(model, name, key, [item[key] for item in wanted], calls) for key in wanted[0]}
    outputs = {key: feed for key, (feed, _) in found.items()}
    orders = [{feed.rows: rows[index] for feed, rows in found.values() if feed.rows} for index in range(len(calls))]
    used = max(feed.stage or 0 for feed in outputs.values()) + 1
    # Upstream prepares what it finds under a marker's name; the program has it under the user's.
    prepared = [prepare_inputs(order[0], _tensors(item[0].arguments)) for item in calls]
    stages = [_stage(name, index, calls, given) for index in range(used)]
    module = Chain(stages, outputs).eval()
    taken = [(index, argument, feed) for index, stage in enumerate(stages) for argument, feed in stage.feeds.items()]
    own = [
        {
            # As the user gives it where that's what the module takes.
            feed.name: item[index].arguments[argument] if feed.made else inputs[feed.name]
            for index, argument, feed in taken
            if feed.stage is None
        }
        for inputs, item in zip(given, calls, strict=True)
    ]
    arguments = stages[0].feeds.keys()
    extra = [
        {key: value for key, value in item.items() if key not in arguments and isinstance(value, torch.Tensor)}
        for item in prepared
    ]
    tensors = [{**mine, **more, **order} for mine, more, order in zip(own, extra, orders, strict=True)]
    kept = {key for item in tensors for key in needed_inputs(module, item, optional=own[0])}
    samples = [{key: value for key, value in item.items() if key in kept} for item in tensors]
    with torch.no_grad():
        for sample, expected in zip(samples, wanted, strict=True):
            if not same_tensors(module(**sample), expected):
                raise UnsupportedModelError(
                    f"the {name} cut out of the model doesn't give the features that the model computes"
                )
    probes = _probes(order[0], stages[0], given[0])
    sources = explain_prepared(
        name,
        model,
        [*given, *(inputs for inputs, _ in probes)],
        [*samples, *({key: value for key, value in made.items() if key in extra[0]} for _, made in probes)],
    )
    return Component(
        name=name,
        roles=("encoder", "projector") if used > 1 else ("encoder",),
        modality=modality,
        module=module,
        sample=samples[0],
        axes={**name_axes(samples), **name_axes(wanted)},
        sources=sources,
        guides={key: _fixed(key, numbers) for key in samples[0] if (numbers := _same_number(key, given)) is not None},
    )


def _same_number(key: str, given: list[Tensors]) -> int | None:
    """The number that an input of one for each picture is in every capture; None where it differs."""
    if key not in given[0] or given[0][key].is_floating_point() or given[0][key].dim() != 1:
        return None
    numbers = torch.cat([inputs[key] for inputs in given]).unique()
    return int(numbers) if len(numbers) == 1 else None


def _fixed(key: str, number: int) -> Input:
    """An input that a program made for one number can do without."""
    source = Source(kind="user", name=key, options={"equals": number})
    return Input(name=key, dtype="int64", shape=("pictures",), source=source)


_PROBES = ([[2, 4, 8]], [[1, 8, 4], [3, 4, 4], [1, 12, 4]])
"""Patch grids that captures rarely hold: clips, and pictures of several sizes beside them."""


def _probes(module: torch.nn.Module, stage: Stage, given: Tensors) -> list[tuple[Tensors, Tensors]]:
    """More patch grids and what upstream prepares of them, so that a preparer is right for more than the captures."""
    found = []
    for argument, feed in stage.feeds.items():
        value = given.get(feed.name)
        if feed.stage is None and not feed.made and value is not None and value.shape[1:] == (3,):
            for rows in _PROBES:
                # Beside the grid each picture may have other numbers, which stay the captured ones.
                numbers = {
                    other: (item.name, given[item.name][:1].expand(len(rows)).clone())
                    for other, item in stage.feeds.items()
                    if item.name in given and given[item.name].dim() == 1
                }
                numbers[argument] = (feed.name, torch.tensor(rows, dtype=value.dtype))
                try:
                    made = prepare_inputs(module, {other: number for other, (_, number) in numbers.items()})
                except (RuntimeError, ValueError, TypeError):
                    continue  # it takes no clips, or no sizes of that kind
                rest = {key: item for key, item in _tensors(made).items() if key not in numbers}
                found.append((dict(numbers.values()), rest))
    return found


def _tensors(values: Mapping[str, Any]) -> Tensors:
    return {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}


def _stage(name: str, index: int, calls: list[list[ModuleCall]], given: list[Tensors]) -> Stage:
    """How the `index`-th module is called."""
    feeds: dict[str, Feed] = {}
    constants: dict[str, Any] = {}
    for argument in {key: None for item in calls for key in item[index].arguments}:
        found = [item[index].arguments.get(argument) for item in calls]
        values = [value for value in found if isinstance(value, torch.Tensor)]
        if len(values) < len(found):
            if any(value is not found[0] and value != found[0] for value in found):
                raise UnsupportedModelError(f"the {name}'s {argument!r} differs between runs, unexplained")
            if found[0] is not None:
                constants[argument] = found[0]
            continue
        feed = _given_feed(values, given) or _field_feed(values, calls, index)
        if feed is None and index:
            feed = _filled_feed(values, calls, index)
        if feed is None and index:
            kind = type(calls[0][index].module).__name__
            raise UnsupportedModelError(f"the {name}'s {kind} takes {argument!r}, which no module before it gives")
        # What Python made of the inputs before the first module is for a preparer to make.
        feeds[argument] = feed or Feed(stage=None, name=argument, made=True)
    return Stage(module=calls[0][index].module, feeds=feeds, constants=constants)


def _given_feed(values: list[torch.Tensor], given: list[Tensors]) -> Feed | None:
    for key in given[0]:
        found = _reshaped(values, [inputs[key] for inputs in given], leading=True)
        if found is not None:
            return Feed(stage=None, name=key, shape=found or None)
    return None


def _field_feed(values: list[torch.Tensor], calls: list[list[ModuleCall]], before: int) -> Feed | None:
    """The latest module's field that holds `values` in every capture."""
    for stage in reversed(range(before)):
        for key in calls[0][stage].fields:
            fields = [item[stage].fields.get(key) for item in calls]
            if any(item is None for item in fields):
                continue
            for skip in (0, 1):  # a token for the whole picture stands first
                parts = [item[:, skip:] if item is not None and item.dim() > 2 else item for item in fields]
                found = _reshaped(values, parts, leading=False)
                if found is not None:
                    return Feed(stage=stage, name=key, shape=found or None, skip=skip)
    return None


def _filled_feed(values: list[torch.Tensor], calls: list[list[ModuleCall]], before: int) -> Feed | None:
    """One number throughout, in as many rows as a field of a module before has."""
    number = values[0].flatten()[0] if values[0].numel() else None
    alike = number is not None and all(bool((value == number).all()) for value in values)
    if not alike or len({value.shape[1:] for value in values}) != 1:
        return None
    for stage in reversed(range(before)):
        for key, tensor in calls[0][stage].fields.items():
            rows = [item[stage].fields[key].shape[0] for item in calls] if tensor.dim() else []
            if rows == [value.shape[0] for value in values]:
                filled = number.item()  # pyright: ignore[reportOptionalMemberAccess]
                return Feed(stage=stage, name=key, shape=(-1, *values[0].shape[1:]), filled=filled)
    return None


def _feature_feed(
    model: torch.nn.Module, name: str, key: str, values: list[torch.Tensor], calls: list[list[ModuleCall]]
) -> tuple[Feed, list[torch.Tensor]]:
    """Where a feature comes from, and the order of the rows in each capture where it isn't the module's own."""
    feed = _field_feed(values, calls, len(calls[0]))
    if feed is not None:
        shape = None if feed.shape is None else (-1, *values[0].shape[1:])
        return replace(feed, shape=shape), []
    for stage in reversed(range(len(calls[0]))):
        for path in calls[0][stage].fields:
            found = _order(model, values, [item[stage].fields.get(path) for item in calls])
            if found is not None:
                rows, last = found
                # One order for all levels of features, which are dealt out alike.
                return Feed(stage=stage, name=path, rows="image_rows", last=last), rows
    raise UnsupportedModelError(f"{key} is no output of a module that the {name} calls")


def _order(
    model: torch.nn.Module, values: list[torch.Tensor], fields: list[torch.Tensor | None]
) -> tuple[list[torch.Tensor], torch.Tensor | None] | None:
    """The rows of `fields` that `values` are made of, a parameter of the model being one more; None for others."""
    orders, last = [], None
    for value, rows in zip(values, fields, strict=True):
        if rows is None or value.dim() != 2 or rows.dim() < 2 or rows.shape[-1] != value.shape[-1]:
            return None
        table = rows.reshape(-1, rows.shape[-1])
        places = {row.tobytes(): index for index, row in enumerate(table.detach().numpy())}
        found = [places.get(row.tobytes()) for row in value.detach().numpy()]
        other = {value[index].detach().numpy().tobytes() for index, place in enumerate(found) if place is None}
        if len(other) > 1 or (other and len(found) == found.count(None)):
            return None
        if other:
            width = value.shape[-1]
            given = (item for item in model.parameters() if item.shape == (width,))
            last = next((item for item in given if item.detach().numpy().tobytes() in other), None)
            if last is None:
                return None
        orders.append(torch.tensor([len(table) if place is None else place for place in found]))
    return orders, last


def _reshaped(
    values: list[torch.Tensor], sources: Sequence[torch.Tensor | None], *, leading: bool
) -> tuple[int, ...] | None:
    """The shape that makes the sources the values, () where they are; None where they don't hold them.

    leading: only by one axis of size 1 in front, more or less.
    """
    if any(source is None for source in sources) or len({value.dim() for value in values}) != 1:
        return None
    sizes = zip(*(value.shape for value in values), strict=True)
    shape = [size[0] if len(set(size)) == 1 else -1 for size in sizes]
    same = True
    for value, source in zip(values, sources, strict=True):
        assert source is not None
        if source.dtype != value.dtype or source.numel() != value.numel():
            return None
        same &= value.shape == source.shape
        if leading and value.shape != source.shape and source.shape not in ((1, *value.shape), value.shape[1:]):
            return None
        if not torch.equal(source.reshape(value.shape), value):
            return None
    if same:
        return ()
    if shape.count(-1) > 1:
        return None
    if -1 not in shape:
        shape[0] = -1
    return tuple(shape)
