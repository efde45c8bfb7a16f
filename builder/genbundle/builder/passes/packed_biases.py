"""Pass: one bias for a packed projection, in place of one for each of its parts."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def add_biases_before_split(model: ir.Model) -> bool:
    """`Split(x)` with a constant added to some of the parts becomes `Split(x + bias)`, zeros for the other parts.

    Upstream packs the query, key and value projections into one MatMul and leaves their biases behind its Split.
    Returns whether the model was modified.
    """
    modified = False
    for node in model.graph:
        if node.op_type == "Split" and node.inputs[0] is not None:
            modified |= _add_before(model.graph, node, node.inputs[0])
    if modified:
        RemoveUnusedNodesPass()(model)
    return modified


def _add_before(graph: ir.Graph, split: ir.Node, packed: ir.Value) -> bool:
    axis = split.attributes.get_int("axis", 0)
    if packed.shape is None or packed.dtype is None or axis not in (-1, len(packed.shape) - 1):
        return False
    biases = {part: found for part in split.outputs if (found := _bias_of(part)) is not None}
    last = [None if part.shape is None else part.shape[-1] for part in split.outputs]
    widths: list[int] = [width for width in last if isinstance(width, int)]
    if not biases or len(widths) != len(split.outputs):
        return False
    rows = [
        biases[part][1] if part in biases else np.zeros(width, packed.dtype.numpy())
        for part, width in zip(split.outputs, widths, strict=True)
    ]
    if any(row.shape != (width,) for row, width in zip(rows, widths, strict=True)):
        return False
    name = f"{packed.name}_bias"
    bias = ir.val(name, const_value=ir.tensor(np.concatenate(rows), name=name), dtype=packed.dtype,
                  shape=[sum(map(len, rows))])  # fmt: skip
    graph.register_initializer(bias)
    add = ir.node("Add", [packed, bias])
    add.outputs[0].shape, add.outputs[0].dtype = packed.shape, packed.dtype
    graph.insert_before(split, add)
    split.replace_input_with(0, add.outputs[0])
    for part, (before, _) in biases.items():
        before.outputs[0].replace_all_uses_with(part)
    return True


def _bias_of(part: ir.Value) -> tuple[ir.Node, np.ndarray] | None:
    """The Add of a constant that is the only thing that reads `part`, and the constant."""
    uses = list(part.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or uses[0].node.outputs[0].is_graph_output():
        return None
    bias = uses[0].node.inputs[1 - uses[0].idx]
    if bias is None or not bias.is_initializer() or bias.const_value is None:
        return None
    return uses[0].node, bias.const_value.numpy()
