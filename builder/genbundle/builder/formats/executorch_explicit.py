"""The `xnnpack` backend's second way: programs that take and return their state, as methods of one .pte.

For every model whose decoder can't own its cache (formats/executorch.py): the components are those of the ONNX and
torch.export backends, for one sequence at a time, with a bound for every axis that varies, by which ExecuTorch plans
its memory. ExecuTorch's own runners don't run such a .pte; this runtime does.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from genbundle.builder.components import Component, one_sequence
from genbundle.builder.exporting import to_exported_program
from genbundle.builder.formats import Exported, Progress, lower_each
from genbundle.builder.formats.executorch import at_precision
from genbundle.builder.formats.torch_export import describe_program
from genbundle.builder.noise import quiet
from genbundle.builder.passes.equal_ranks import give_equal_ranks
from genbundle.builder.passes.written_inputs import copy_written_inputs
from genbundle.builder.precision import Precisions, kept_note, part_of
from genbundle.builder.rounding import Rounding, rounded_layers, saved_bytes
from genbundle.builder.weights import unique_bytes
from genbundle.bundles import MissingExtraError, UnsupportedModelError
from genbundle.bundles.manifest import State

# Axes that don't count tokens (frames, patches) may be this many times as long as in the captured inputs.
_LONGER = 4
_LENGTHS = frozenset({"batch", "sequence", "past", "total"})


def export_explicit(
    components: Iterable[Component],
    capacity: int,
    path: Path,
    progress: Progress,
    precisions: Precisions | None = None,
) -> Exported:
    """Write `components` as the methods of one .pte to `path`.

    capacity: the most tokens (prompt and generated). precisions: float32 by default.

    Raises UnsupportedModelError, naming the component, for one that torch.export or ExecuTorch can't take, and
    MissingExtraError without ExecuTorch.
    """
    try:
        from genbundle.builder.formats.executorch_lowering import lower_programs
        from genbundle.builder.formats.executorch_partitioning import ProductPartitioner
    except ImportError as error:
        raise MissingExtraError("building an xnnpack bundle", "executorch", "builder") from error
    rows = [one_sequence(component) for component in components]
    most = largest_sizes(rows, capacity)
    notes: list[str] = []
    precisions = precisions or Precisions()
    precisions.expect_parts(map(part_of, rows))
    found: dict[str, Rounding] = {}

    def export(component: Component) -> Any:
        precision = precisions.of_part(part_of(component))
        with rounded_layers(component, precision, activations=True) as found[component.name]:
            return _export(component, capacity, most)

    lowered = list(lower_each(rows, export, progress, notes))
    progress("lower to ExecuTorch")
    lower = partial(lower_programs, constants={}, path=path, partitioner=ProductPartitioner)
    with quiet():
        lowered = _lower(lowered, lower, notes)
    states: dict[str, State] = {}
    programs, kept = [], {}
    for component, exported in lowered:
        entry = describe_program(component, states, exported, file=path.name, method=component.name)
        order = {name: place for place, name in enumerate(exported.graph_signature.user_inputs)}
        inputs = sorted(entry.inputs, key=lambda item: order.get(item.name, len(order)))
        entry = replace(entry, inputs=tuple(inputs))
        programs.append(at_precision(entry, precisions.of_part(part_of(component)), found[component.name]))
        kept |= found[component.name].kept
    notes.extend(kept_note(kept))
    size = unique_bytes(torch.nn.ModuleList(component.module for component, _ in lowered))
    return Exported(
        programs=tuple(programs),
        state=tuple(states.values()),
        weight_bytes=size - saved_bytes(found.values()) if precisions.lossy else None,
        notes=tuple(notes),
    )


def largest_sizes(components: Iterable[Component], capacity: int) -> dict[str, int]:
    """The largest size of the axes of each name: the capacity, or a multiple of the sample's size if that is long.

    Axes that span an input together (height and width) multiply, and so does the memory that is planned for them: each
    of these is at most twice the sample's, or the capacity's root.
    """
    sizes: dict[str, int] = {}
    spanning: dict[str, int] = {}
    components = list(components)
    taken = {symbol for each in components for name in each.sample for symbol in each.axes.get(name, {}).values()}
    for component in components:
        tensors = {**_given(component, taken), **component.sample}
        for name, axes in component.axes.items():
            free = [symbol for symbol in axes.values() if symbol.partition("_")[0] not in _LENGTHS]
            for axis, symbol in axes.items():
                found = tensors[name].shape[axis] if name in tensors else 0
                sizes[symbol] = max(sizes.get(symbol, capacity), found * _LONGER if found > capacity // 2 else 0)
                if len(free) > 1 and symbol in free:
                    spanning[symbol] = max(spanning.get(symbol, math.isqrt(capacity)), found * 2)
    return sizes | spanning


def _given(component: Component, taken: Collection[str]) -> Mapping[str, torch.Tensor]:
    """What a component gives for its sample, where another takes it with an axis that isn't of tokens; else nothing.

    A decoder's own sample says nothing of how long an encoder's output is.
    """
    named = {s for name, axes in component.axes.items() if name not in component.sample for s in axes.values()}
    if not any(symbol in taken and symbol.partition("_")[0] not in _LENGTHS for symbol in named):
        return {}
    with torch.no_grad():
        return component.module(**component.sample)


def _export(component: Component, capacity: int, most: Mapping[str, int]) -> Any:
    longest = component.longest or capacity
    most = {**most, "sequence": min(longest, most.get("sequence", longest))}
    with torch.no_grad():
        exported = to_exported_program(
            component.module, component.sample, component.axes, longest, most, component.least
        )
    copy_written_inputs(exported)
    give_equal_ranks(exported.graph)
    return exported


def _lower(
    lowered: list[tuple[Component, Any]], lower: Callable[[dict[str, Any]], Any], notes: list[str]
) -> list[tuple[Component, Any]]:
    """Write the methods; the ones that are in the file, which is all but optional ones that can't be lowered."""
    try:
        lower({component.name: exported for component, exported in lowered})
    except UnsupportedModelError as first:
        # Together they fail without a word on which of them it was.
        able = []
        for component, exported in lowered:
            try:
                lower({component.name: exported})
            except UnsupportedModelError as error:
                # Sizes that only a running program knows can't be traced twice: then the first error is the cause.
                cause = first if "Unbacked" in str(error) else error
                if not component.optional:
                    raise UnsupportedModelError(f"{component.name}: {cause}") from first
                notes.append(f"done without a program of its own: {cause}")
            else:
                able.append((component, exported))
        if len(able) == len(lowered):
            raise
        lower({component.name: exported for component, exported in able})
        return able
    return lowered
