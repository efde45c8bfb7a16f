"""ONNX programs: lower each component, fix what ONNX Runtime needs, share every weight, describe inputs and outputs."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from genbundle.builder.components import Component, as_state
from genbundle.builder.exporting import to_onnx
from genbundle.builder.formats import Exported, Progress, describe_inputs, lower_each
from genbundle.builder.formats.onnx_precision import round_programs
from genbundle.builder.passes.batch_transposes import unfuse_batch_transposes
from genbundle.builder.passes.engine_optimized import optimize
from genbundle.builder.passes.left_products import multiply_from_the_left
from genbundle.builder.passes.output_rows import keep_output_rows
from genbundle.builder.passes.packed_biases import add_biases_before_split
from genbundle.builder.passes.reshapes import remove_round_trips
from genbundle.builder.passes.separate_products import multiply_apart
from genbundle.builder.passes.step_attention import attend_in_products
from genbundle.builder.passes.tied_weights import share_transposed_weights
from genbundle.builder.precision import LANGUAGE_MODEL, Precisions, part_of
from genbundle.builder.weights import SHARED_FROM_BYTES, WEIGHTS_NAME, WeightPool
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Output, Program, State


def export_onnx(
    components: Iterable[Component], folder: Path, provider: str, progress: Progress, precisions: Precisions,
    *, shared: bool = False,
) -> Exported:  # fmt: skip
    """Write one .onnx per component below `folder` and the weights they share, each once.

    provider: "cpu" or "cuda", the execution provider whose operators the graphs are fused into. shared: whether other
    runtimes shall read the graphs, which then keep the operators that these know.
    """
    models, programs, states = {}, [], {}
    notes: list[str] = []
    lowered = list(lower_each(components, lambda item: _lower(item, provider, precisions), progress, notes))
    rounded = round_programs(lowered, precisions, progress, notes)
    decoders: list[ir.Model] = []
    for component, model in lowered:
        if provider == "cpu" and "language_model" in component.roles:
            keep_output_rows(model)
        hidden = _hidden_states(model, component) if provider == "cpu" and not shared else {}
        _name_axes(model, component)
        forget_shapes(model, hidden)
        program = rounded.describe(_describe(model, component, states))
        _rename(model, component)
        if provider == "cpu" and not shared:
            progress(f"optimize {component.name}")
            _forget_trace(model)
            model, complete = optimize(model)
            program = replace(program, optimized=complete)
            if "language_model" in component.roles:
                decoders.append(model)
        models[component.name] = model
        programs.append(program)
    # Where a program is optimized again at opening, that would take the weights' sides back; and those that programs
    # share have to lie the same way in all.
    if all(program.optimized for program in programs if "language_model" in program.roles):
        for model in decoders:
            multiply_from_the_left(model)
    for model in decoders:
        attend_in_products(model)
    progress("write weights")
    size = write_models(models, folder)
    carried = tuple(_without_unread_state(entry, states) for entry in programs)
    return Exported(
        programs=carried,
        state=tuple(states.values()),
        weights=WEIGHTS_NAME,
        weight_bytes=size if precisions.lossy else None,
        notes=tuple(notes),
    )


def write_models(models: Mapping[str, ir.Model], folder: Path) -> int:
    """Write each model as NAME.onnx and the weights that they share, each once; returns the bytes of these."""
    pool = WeightPool(shaped=False)
    shared = {name: _share(model, pool) for name, model in models.items()}
    size = pool.write(folder / WEIGHTS_NAME)
    for name, model in models.items():
        for value, key in shared[name]:
            slot, tensor = pool.slots[key], value.const_value
            value.const_value = ir.ExternalTensor(  # pyright: ignore
                WEIGHTS_NAME,
                slot.offset,
                slot.length,
                tensor.dtype,  # pyright: ignore
                shape=tensor.shape,  # pyright: ignore
                name=value.name,  # pyright: ignore
                base_dir=folder,
            )
        model.producer_name, model.producer_version = "genbundle", None
        _forget_trace(model)
        ir.save(model, folder / f"{name}.onnx")
    return size


def _forget_trace(model: ir.Model) -> None:
    # What the tracer wrote down of the exporting machine: no use to a runtime, and it'd change the bytes.
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None


def forget_shapes(model: ir.Model, known: Mapping[str, ir.Shape] | None = None) -> None:
    """Leave values within the graph the shapes that are `known`, by name, and no others.

    ONNX Runtime plans its memory by these, finds most again by itself, and the tracer's aren't always right: two
    symbols that met in one sample may have become one.
    """
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = (known or {}).get(value.name or "")


def _hidden_states(model: ir.Model, component: Component) -> dict[str, ir.Shape]:
    """The shapes of the values that hold a row for each token, `[batch, tokens, features]`, in the axes' names.

    Without them ONNX Runtime's planning would end where a branch or a Reshape hides a shape: it would reuse no memory
    behind, and look long for some.
    """
    tokens = set()
    for given in model.graph.inputs:
        names = component.axes.get(given.name or "", {})
        if given.shape is not None and (names.get(0), names.get(1)) == ("batch", "sequence"):
            tokens.add(tuple(str(size) for size in tuple(given.shape)[:2]))
    shapes = {}
    for value in (value for node in model.graph for value in node.outputs):
        sizes = () if value.shape is None else tuple(value.shape)
        if len(sizes) == 3 and isinstance(sizes[2], int) and tuple(map(str, sizes[:2])) in tokens - {("None", "None")}:
            shapes[value.name or ""] = ir.Shape(["batch", "sequence", sizes[2]])
    return shapes


def _without_unread_state(entry: Program, states: Mapping[str, State]) -> Program:
    """What no program reads isn't carried: an encoder's pooled output, for instance."""
    outputs = (item if item.state in states else replace(item, state=None) for item in entry.outputs)
    return replace(entry, outputs=tuple(outputs))


def _lower(component: Component, provider: str, precisions: Precisions) -> ir.Model:
    """The component as an ONNX graph, fused and simplified."""
    part = part_of(component)
    # Towers' fused attention takes its three matrices as one that the engine puts together: none of them is a product.
    fusions = component.fusions and (part == LANGUAGE_MODEL or precisions.of_part(part) == "fp32")
    # Upstream's fusions for CUDA leave operators that the CPU provider lacks, where the bundle is verified.
    fused_for = provider if fusions and provider == "cpu" else None
    model = to_onnx(component.module, component.sample, component.axes, component.longest, fused_for, component.least)
    _expect_dynamic(model, component)
    share_transposed_weights(model)
    unfuse_batch_transposes(model)
    if provider == "cpu":
        multiply_apart(model)  # in all programs, fused or not: they share weights
    if fused_for is not None:
        remove_round_trips(model)
        add_biases_before_split(model)
    return model


def onnx_name(name: str) -> str:
    """The graph's name of a component's input or output: the field's `past_key_values.0.key`, `present.0.key`."""
    head, _, rest = name.partition("_")
    index, _, kind = rest.partition("_")
    if head in ("past", "present") and index.isdigit():
        return f"{'past_key_values' if head == 'past' else 'present'}.{index}.{kind}"
    return name


def _share(model: ir.Model, pool: WeightPool) -> list[tuple[ir.Value, str]]:
    shared = []
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.nbytes >= SHARED_FROM_BYTES:
            shared.append((value, pool.add(value.name or "weight", value.const_value)))
    return shared


def _expect_dynamic(model: ir.Model, component: Component) -> None:
    """UnsupportedModelError where the tracer fixed an axis that has to vary: elsewhere the program would be wrong."""
    for value in model.graph.inputs:
        for axis, name in component.axes.get(value.name or "", {}).items():
            if value.uses() and value.shape is not None and isinstance(value.shape[axis], int):
                raise UnsupportedModelError(
                    f"{component.name}: axis {axis} ({name}) of its input {value.name!r} is fixed at "
                    f"{value.shape[axis]} by the model's code"
                )


def _name_axes(model: ir.Model, component: Component) -> None:
    """Give the dynamic axes their names, in place of the tracer's symbols."""
    for value in model.graph.inputs:
        axes = component.axes.get(value.name or "", {})
        if value.shape is not None:
            value.shape = ir.Shape([axes.get(axis, dim) for axis, dim in enumerate(value.shape)])
    for value in model.graph.outputs:
        axes = component.axes.get(value.name or "", {})
        if value.shape is not None:
            value.shape = ir.Shape([axes.get(axis, dim) for axis, dim in enumerate(value.shape)])


def _rename(model: ir.Model, component: Component) -> None:
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.name = onnx_name(value.name or "")


def _describe(model: ir.Model, component: Component, states: dict[str, State]) -> Program:
    read = {value.name for value in model.graph.inputs if value.uses() or value.is_graph_output()}
    for value in list(model.graph.inputs):
        if value.name not in read:
            model.graph.inputs.remove(value)
    inputs = describe_inputs(component, read, onnx_name)
    for name, source in component.sources.items():
        if source.kind == "state" and name in read:
            axes = component.axes[name]
            states[source.name or ""] = as_state(source.name or "", component.sample[name], axes)
    outputs = []
    for value in model.graph.outputs:
        name = value.name or ""
        axes = component.axes.get(name, {})
        shape = tuple(
            axes.get(axis, dim if isinstance(dim, int) else str(dim)) for axis, dim in enumerate(value.shape or ())
        )
        dtype = "bfloat16" if value.dtype == ir.DataType.BFLOAT16 else value.dtype.numpy().name  # pyright: ignore
        outputs.append(Output(name=onnx_name(name), dtype=dtype, shape=shape, state=component.states.get(name)))
    return Program(
        name=component.name,
        file=f"{component.name}.onnx",
        roles=component.roles,
        modality=component.modality,
        placeholder_id=component.placeholder_id,
        least=component.least,
        largest=model.meta["largest"],
        inputs=inputs,
        outputs=tuple(outputs),
    )
