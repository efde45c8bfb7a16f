"""Pass: no reshape that gives back a shape that its data had before."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def remove_round_trips(model: ir.Model) -> bool:
    """Read `x` in place of `Reshape(...Reshape(x))` where the result has the shape of `x` again.

    Attention code splits heads off and joins them; once an operator takes the joined form, the two cancel out. Shapes
    are compared by the tracer's symbols, one of which stands for one size throughout a graph. Returns whether the model
    was modified.
    """
    modified = False
    for node in model.graph:
        if node.op_type != "Reshape" or node.outputs[0].is_graph_output():
            continue
        source = node.inputs[0]
        while source is not None and not same_shape(source, node.outputs[0]):
            before = source.producer()
            source = before.inputs[0] if before is not None and before.op_type == "Reshape" else None
        if source is not None:
            node.outputs[0].replace_all_uses_with(source)
            modified = True
    if modified:
        RemoveUnusedNodesPass()(model)
    return modified


def same_shape(first: ir.Value, second: ir.Value) -> bool:
    """Whether both shapes are known, dimension by dimension, and alike."""
    if first.shape is None or second.shape is None or len(first.shape) != len(second.shape):
        return False
    return all(
        _known(one) is not None and _known(one) == _known(two)
        for one, two in zip(first.shape, second.shape, strict=True)
    )


def _known(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value
