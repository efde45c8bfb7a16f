"""An encoder as the modules that `get_<modality>_features` calls one after another, without the Python around them.

Where inputs steer Python (patch grids, picture sizes), that Python can't be traced: it deals pictures out and the
features back, with numbers read from tensors. What it calls can: each module's inputs are found among the program's own
and among the outputs of the modules before it.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules import module as hooks

from genbundle.builder.components import Component, name_axes, needed_inputs, same_tensors
from genbundle.builder.cut import output_tensors
from genbundle.builder.exporting import MODEL_ERRORS, prepare_inputs
from genbundle.builder.feeds import (
    PAIRED,
    Feed,
    ModuleCall,
    Tensors,
    feature_feed,
    field_feed,
    filled_feed,
    given_feed,
    paired_feed,
)  # fmt: skip
from genbundle.builder.preparing import explain_prepared
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Input, Source

_OFFSETS = "cu_seqlens"


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
        feeds = [*self._outputs.values(), *(feed for stage in stages for feed in stage.feeds.values())]
        self._taken = {feed.name for feed in feeds if feed.stage is None} | {feed.rows for feed in feeds if feed.rows}

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
            outputs.append(output_tensors(stage.module(**stage.constants, **given, **rest)))
        return {name: feed.take(inputs, outputs) for name, feed in self._outputs.items()}


def watch_modules(run: Callable[[], Any], opened: Collection[torch.nn.Module] = ()) -> list[ModuleCall]:
    """The outermost modules that `run` calls, in order; of `opened` ones those that they call instead."""
    calls: list[ModuleCall] = []
    with torch.no_grad(), _watched(calls, {id(module) for module in opened}):
        run()
    return calls


@contextmanager
def _watched(calls: list[ModuleCall], opened: set[int]) -> Iterator[None]:
    depth = 0

    def enter(module: torch.nn.Module, _args: tuple) -> None:
        nonlocal depth
        depth += id(module) not in opened

    def leave(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal depth
        if id(module) in opened:
            return
        depth -= 1
        if depth == 0:
            # Models write into their tower's output object.
            fields = {path: value.clone() for path, value in output_tensors(output).items()}
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
    _, *rest = watch_modules(lambda: run(given[0]))
    numbers = [value for value in given[0].values() if not value.is_floating_point()]
    # What deals rows out by the user's numbers can do so in Python, between modules of its own.
    dealing = [call.module for call in rest if any(_is_one_of(value, numbers) for value in call.arguments.values())]
    if dealing:
        with suppress(UnsupportedModelError):
            return _chain(model, modality, run, given, wanted, dealing)
    return _chain(model, modality, run, given, wanted, [])


def _is_one_of(value: Any, tensors: list[torch.Tensor]) -> bool:
    return isinstance(value, torch.Tensor) and any(
        value.shape == tensor.shape and torch.equal(value, tensor) for tensor in tensors
    )


def _chain(
    model: torch.nn.Module, modality: str, run: Callable[[Tensors], Any], given: list[Tensors], wanted: list[Tensors],
    opened: list[torch.nn.Module],
) -> Component:  # fmt: skip
    name = f"{modality}_encoder"
    calls = [watch_modules(lambda inputs=inputs: run(inputs), opened) for inputs in given]
    order = [call.module for call in calls[0]]
    if not order or len({id(module) for module in order}) != len(order):
        raise UnsupportedModelError(f"the {name} calls a module once for each picture, which can't be traced")
    if any([call.module for call in item] != order for item in calls):
        raise UnsupportedModelError(f"the {name} calls other modules from run to run, which can't be traced")
    found = {key: feature_feed(model, name, key, [item[key] for item in wanted], calls) for key in wanted[0]}
    outputs = {key: feed for key, (feed, _) in found.items()}
    orders = [{feed.rows: rows[index] for feed, rows in found.values() if feed.rows} for index in range(len(calls))]
    used = max(feed.stage or 0 for feed in outputs.values()) + 1
    # Upstream prepares what it finds under a marker's name; the program has it under the user's.
    prepared = [prepare_inputs(order[0], _tensors(item[0].arguments)) for item in calls]
    stages = [_stage(name, index, calls, given, orders) for index in range(used)]
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
        axes={**name_axes(samples, _patch_axes(samples, extra[0].keys())), **name_axes(wanted)},
        sources=sources,
        guides={key: _fixed(key, numbers) for key in samples[0] if (numbers := _same_number(key, given)) is not None},
    )


def _patch_axes(samples: list[Tensors], prepared: Collection[str]) -> dict[tuple[int, ...], str]:
    """The names of axes with a row for each patch, or for each block of so many, by their sizes over the samples.

    Of towers that are told where frames end. Blocks show in what is prepared: what users give may be alike by chance.
    """
    if any(_OFFSETS not in sample for sample in samples):
        return {}
    totals = [int(sample[_OFFSETS][-1]) for sample in samples]
    found = {tuple(sample[name].shape[0] for sample in samples) for name in samples[0] if name in prepared}
    blocks = {sizes: share for sizes in found if (share := _share(totals, sizes)) > 1}
    if len(blocks) != 1:
        return {tuple(totals): "patches"}
    ((sizes, share),) = blocks.items()
    return {tuple(totals): f"blocks_times{share}", sizes: "blocks"}


def _share(totals: Sequence[int], sizes: Sequence[int]) -> int:
    """How many times the sizes the totals are; 0 where it isn't the same everywhere."""
    shares = {total // size if size and total % size == 0 else 0 for total, size in zip(totals, sizes, strict=True)}
    return shares.pop() if len(shares) == 1 else 0


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
                except MODEL_ERRORS:
                    continue  # it takes no clips, or no sizes of that kind
                rest = {key: item for key, item in _tensors(made).items() if key not in numbers}
                found.append((dict(numbers.values()), rest))
    return found


def _tensors(values: Mapping[str, Any]) -> Tensors:
    return {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}


def _stage(
    name: str, index: int, calls: list[list[ModuleCall]], given: list[Tensors], orders: list[dict[str, torch.Tensor]]
) -> Stage:
    """How the `index`-th module is called; an order of rows that it is given is added to each capture's `orders`."""
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
        feed = given_feed(values, given) or field_feed(values, calls, index)
        if feed is None and index:
            feed = filled_feed(values, calls, index)
        if feed is None and index:
            feed, rows = paired_feed(values, calls, index)
            for order, row in zip(orders, rows, strict=False):
                order[PAIRED] = row
        if feed is None and index:
            kind = type(calls[0][index].module).__name__
            raise UnsupportedModelError(f"the {name}'s {kind} takes {argument!r}, which no module before it gives")
        # What Python made of the inputs before the first module is for a preparer to make.
        feeds[argument] = feed or Feed(stage=None, name=argument, made=True)
    return Stage(module=calls[0][index].module, feeds=feeds, constants=constants)
