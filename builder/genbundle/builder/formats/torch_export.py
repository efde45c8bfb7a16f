"""torch.export programs: .pt2 archives without weights, which all of them share in one .safetensors file."""

import io
import json
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._sympy.value_ranges import ValueRanges

from genbundle.builder.components import Component, as_state, dtype_of, shape_of
from genbundle.builder.exporting import quiet, to_exported_program
from genbundle.builder.formats import Exported, Progress, describe_inputs, lower_each
from genbundle.builder.guards import largest
from genbundle.builder.packed_weights import packed
from genbundle.builder.passes.ceilings import divide_upwards
from genbundle.builder.passes.grouped_products import use_own_grouped_product
from genbundle.builder.passes.unused_weights import drop_unused_weights
from genbundle.builder.precision import Precisions, kept_note, part_of
from genbundle.builder.weights import WEIGHTS_NAME, WeightPool
from genbundle.bundles.manifest import Output, Program, State

# Where and by whom a node was traced: no use to a runtime, and it holds paths of the exporting machine.
_TRACE_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def export_torch(components: Iterable[Component], folder: Path, progress: Progress, precisions: Precisions) -> Exported:
    """Write one .pt2 per component below `folder`, which weight it reads where, and the weights, each once."""
    pool, programs, states, reads = WeightPool(), [], {}, {}
    notes: list[str] = []
    kept: dict[str, int] = {}
    components = list(components)
    precisions.expect_parts(map(part_of, components))

    def lower(component: Component) -> Any:
        with packed(component, precisions.of_part(part_of(component))) as found:
            exported = _lower(component)
        kept.update(found.kept)
        return exported

    for component, exported in lower_each(components, lower, progress, notes):
        program = describe_program(component, states, exported, file=f"{component.name}.pt2")
        programs.append(replace(program, precision=precisions.of_part(part_of(component))))
        reads[component.name] = {name: pool.add(name, tensor.detach()) for name, tensor in exported.state_dict.items()}
        _save(exported, folder / f"{component.name}.pt2")
    progress("write weights")
    size = pool.write(folder / WEIGHTS_NAME)
    for name, keys in reads.items():
        table = {parameter: pool.slots[key].name for parameter, key in sorted(keys.items())}
        (folder / f"{name}.weights.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return Exported(
        programs=tuple(programs),
        state=tuple(states.values()),
        weights=WEIGHTS_NAME,
        weight_bytes=size if precisions.lossy else None,
        notes=(*notes, *kept_note(kept)),
    )


def _lower(component: Component) -> Any:
    """The component as an ExportedProgram."""
    exported = to_exported_program(
        component.module, component.sample, component.axes, component.longest, least=component.least
    )
    if any(node.target is torch.ops.higher_order.flat_apply for node in exported.graph.nodes):
        # A mask made by vmap calls Python functions, which no archive holds; tracing once more runs through them.
        exported = exported.run_decompositions({})
    divide_upwards(exported.graph)
    use_own_grouped_product(exported.graph)
    relax_lower_bounds(exported)
    drop_unused_weights(exported)
    return exported


def relax_lower_bounds(exported: Any) -> None:
    """Pass: let every dynamic size start at 0.

    The tracer takes sizes it was shown (2 and more) for no smaller than that, and sums of them for no smaller than 4,
    though nothing in the graph depends on it; a size that really is
    fixed was refused before; the replay runs an empty past, one token and one sequence. A sum of sizes has no range of
    its own: archives name sizes only.
    """
    ranges = exported.range_constraints
    for symbol, found in list(ranges.items()):
        if symbol.is_symbol:
            ranges[symbol] = ValueRanges(min(0, found.lower), found.upper)
        else:
            del ranges[symbol]


def describe_program(
    component: Component, states: dict[str, State], exported: Any, *, file: str, method: str | None = None
) -> Program:
    """The manifest's entry of a component's program in `file`; the state that it reads is added to `states`."""
    for name, source in component.sources.items():
        if source.kind == "state":
            axes = component.axes[name]
            states[source.name or ""] = as_state(source.name or "", component.sample[name], axes)
    with torch.no_grad():
        results = component.module(**component.sample)
    outputs = tuple(
        Output(
            name=name,
            dtype=dtype_of(value),
            shape=shape_of(value, component.axes.get(name, {})),
            state=component.states.get(name),
        )
        for name, value in results.items()
    )
    return Program(
        name=component.name,
        file=file,
        method=method,
        roles=component.roles,
        modality=component.modality,
        placeholder_id=component.placeholder_id,
        least=component.least,
        largest=largest(exported, component.axes),
        inputs=describe_inputs(component, set(component.sample), lambda name: name),
        outputs=outputs,
    )


def _save(exported: Any, path: Path) -> None:
    """Write the program without its weights, sample inputs and trace, byte for byte the same each time."""
    weights = exported.state_dict
    exported._state_dict = {
        name: torch.nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
        if isinstance(value, torch.nn.Parameter)
        else torch.empty_like(value, device="meta")
        for name, value in weights.items()
    }
    exported._example_inputs = None
    for module in exported.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for key in _TRACE_META:
                    node.meta.pop(key, None)
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(exported, buffer)
    # The archive's own times and random id would make each build's bytes different.
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            if not name.endswith("/.data/serialization_id"):
                target.writestr(zipfile.ZipInfo(name), source.read(name))
