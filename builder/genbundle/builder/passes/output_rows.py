"""Pass: weights as torch keeps them, a row for each output."""

import numpy as np
import onnx_ir as ir

from genbundle.builder.passes.insertion import take_place
from genbundle.builder.passes.tensors import sizes, when_read
from genbundle.builder.weights import SHARED_FROM_BYTES


def keep_output_rows(model: ir.Model) -> bool:
    """`MatMul(x, W)` with a weight `[inputs, outputs]` becomes com.microsoft FusedMatMul(x, W.T, transB=1).

    A step reads every weight once. Of a matrix of few outputs each thread would read a part of every row, a kilobyte
    or two at a time; the rows of the transpose are read from end to end. Prompts are faster for it too, since the
    engine packs such weights anew in each call. Returns whether the model was modified.
    """
    graph, modified = model.graph, False
    for value in list(graph.initializers.values()):
        tensor, uses = value.const_value, list(value.uses())
        if tensor is None or len(tensor.shape) != 2 or tensor.nbytes < SHARED_FROM_BYTES or not uses:
            continue
        if not all(is_product(use.node, use.idx, graph) for use in uses):
            continue
        sides = sizes(tensor)[::-1]
        value.const_value = when_read(tensor, _transposed, sides, value.name or "weight")
        value.shape = ir.Shape(sides)
        for use in uses:
            multiply_by_rows(graph, use.node, value)
        modified = True
    if modified:
        graph.opset_imports.setdefault("com.microsoft", 1)
    return modified


def is_product(node: ir.Node, index: int, graph: ir.Graph) -> bool:
    """Whether an input is multiplied with from the right, in `graph` itself and not in a body of an If or Loop."""
    return node.op_type == "MatMul" and node.domain == "" and index == 1 and node.graph is graph


def multiply_by_rows(graph: ir.Graph, node: ir.Node, rows: ir.Value) -> None:
    """Put a product by the transpose of `rows` in the place of a MatMul."""
    fused = ir.node(
        "FusedMatMul", [node.inputs[0], rows], attributes={"transB": 1, "alpha": 1.0}, domain="com.microsoft"
    )
    graph.insert_before(node, fused)
    take_place(node.outputs[0], fused.outputs[0])
    graph.remove(node, safe=True)


def _transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T)
