"""Pass: no product of a transposed batch with a matrix, which the fused operator can't compute."""

import numpy as np
import onnx_ir as ir


def unfuse_batch_transposes(model: ir.Model) -> bool:
    """A FusedMatMul with `transBatchA` and a right side of two axes becomes a MatMul and a Transpose.

    Upstream's fusions for ONNX Runtime (onnxscript's, with 1.31.1) write it where a transposed sequence meets a weight
    (`torch.nn.MultiheadAttention`); the operator wants two inputs of one rank then. The transposed batch keeps the last
    axis, so it can as well come after the product. Returns whether the model was modified.
    """
    modified = False
    for node in list(model.graph):
        left, right = (*node.inputs, None, None)[:2]
        if node.op_type != "FusedMatMul" or left is None or right is None or not _number(node, "transBatchA"):
            continue
        if left.shape is None or right.shape is None or len(right.shape) != 2 or len(left.shape) < 3:
            continue
        if _number(node, "transA") or _number(node, "transBatchB"):
            continue
        result, rank = node.outputs[0], len(left.shape)
        nodes = []
        if _number(node, "transB"):
            nodes.append(ir.node("Transpose", [right], attributes={"perm": [1, 0]}))
            right = nodes[-1].outputs[0]
        nodes.append(ir.node("MatMul", [left, right]))
        alpha = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1.0
        if alpha != 1.0:
            scale = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(alpha, np.float32))})
            nodes += [scale, ir.node("Mul", [nodes[-1].outputs[0], scale.outputs[0]])]
        # The operator's own order: the first axis goes behind the batch's others.
        order = [*range(1, rank - 1), 0, rank - 1]
        nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], attributes={"perm": order}))
        last = nodes[-1].outputs[0]
        last.shape, last.dtype = result.shape, result.dtype
        model.graph.insert_before(node, nodes)
        result.replace_all_uses_with(last, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        last.name = result.name
        modified = True
    return modified


def _number(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0
