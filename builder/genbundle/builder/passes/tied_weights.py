"""Pass: one copy of a weight that a graph holds both as it is and transposed (tied embedding and head)."""

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from genbundle.builder.passes.output_rows import is_product, multiply_by_rows
from genbundle.builder.weights import SHARED_FROM_BYTES


def share_transposed_weights(model: ir.Model) -> bool:
    """Read a folded transpose from the original: `MatMul(x, W.T)` becomes com.microsoft FusedMatMul(x, W, transB=1).

    The exporter folds the transpose in front of the head's MatMul into an initializer of its own, a second copy of a
    tied embedding. Returns whether the model was modified.
    """
    graph = model.graph
    by_shape: dict[tuple, list[ir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and len(tensor.shape) == 2 and tensor.nbytes >= SHARED_FROM_BYTES:
            by_shape[(tensor.dtype, *tensor.shape)].append(value)
    modified = False
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        uses = list(value.uses())
        if tensor is None or len(tensor.shape) != 2 or tensor.nbytes < SHARED_FROM_BYTES or not uses:
            continue
        if not all(is_product(use.node, use.idx, graph) for use in uses):
            continue
        candidates = by_shape[(tensor.dtype, tensor.shape[1], tensor.shape[0])]
        original = next((other for other in candidates if other is not value and _is_transpose(other, value)), None)
        if original is None or any(use.node.op_type == "MatMul" for use in original.uses()):
            continue
        for use in uses:
            multiply_by_rows(graph, use.node, original)
        del graph.initializers[value.name or ""]
        by_shape[(tensor.dtype, *tensor.shape)].remove(value)
        modified = True
    if modified:
        model.graph.opset_imports.setdefault("com.microsoft", 1)
    return modified


def _is_transpose(original: ir.Value, value: ir.Value) -> bool:
    return np.array_equal(original.const_value.numpy().T, value.const_value.numpy())  # pyright: ignore
