"""Pass: the gate and up projections of feed-forward layers as products of their own."""

from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from genbundle.builder.passes.elementwise import EACH, GELUS, PAIRS
from genbundle.builder.passes.insertion import take_place
from genbundle.builder.passes.tensors import sizes, when_read


def multiply_apart(model: ir.Model) -> bool:
    """`Split(x @ W)`, without a bias before the Split, becomes a product by a part of `W` for each of its results,
    where element-wise operators read them all.

    Upstream packs products of the same input into one. For queries, keys and values that spares two small ones; of a
    feed-forward layer, Split copies the largest values that there are, and both stand in memory meanwhile. Some models'
    own code packs them too. Returns whether the model was modified.
    """
    modified = False
    for split in list(model.graph):
        packed = _dealt_out(split) if split.op_type == "Split" else None
        if packed is not None:
            _separate(model.graph, split, *packed)
            modified = True
    if modified:
        RemoveUnusedNodesPass()(model)
    return modified


def _dealt_out(split: ir.Node) -> tuple[ir.Node, list[int]] | None:
    """The product, and how many features each part has; None for a Split of anything but such a product."""
    packed = split.inputs[0]
    product = None if packed is None else packed.producer()
    if packed is None or product is None or product.op_type != "MatMul" or product.graph is not split.graph:
        return None
    weight, alone = product.inputs[1], len(packed.uses()) == 1 and not packed.is_graph_output()
    if weight is None or weight.const_value is None or not weight.is_initializer() or len(weight.uses()) != 1:
        return None
    shape, rank = sizes(weight.const_value), None if packed.shape is None else len(packed.shape)
    axis = split.attributes.get_int("axis", 0)
    if not alone or len(shape) != 2 or (axis != -1 and (rank is None or axis != rank - 1)):
        return None
    if not all(map(_element_wise, split.outputs)):
        return None
    given = split.inputs[1] if len(split.inputs) > 1 else None
    if given is None:
        each, rest = divmod(shape[1], len(split.outputs))
        return None if rest else (product, [each] * len(split.outputs))
    constant = given.const_value if given.is_initializer() else None
    widths = [] if constant is None else [int(size) for size in constant.numpy()]
    return (product, widths) if widths and all(widths) else None


def _element_wise(part: ir.Value) -> bool:
    """Whether all that reads a value, or its sum with a bias, does the same to each of its numbers."""
    for node in (use.node for use in part.uses()):
        biased = node.op_type == "Add" and any(value is not None and value.is_initializer() for value in node.inputs)
        if not (_element_wise(node.outputs[0]) if biased else node.op_type in {*EACH, *PAIRS, *GELUS}):
            return False
    return bool(part.uses()) and not part.is_graph_output()


def _separate(graph: ir.Graph, split: ir.Node, product: ir.Node, widths: list[int]) -> None:
    given, weight = product.inputs
    assert weight is not None and weight.const_value is not None
    begin = 0
    for number, (part, width) in enumerate(zip(list(split.outputs), widths, strict=True)):
        name = f"{weight.name}_part_{number}"
        while name in graph.initializers:
            name += "_"
        columns = partial(_columns, begin=begin, end=begin + width)
        tensor = when_read(weight.const_value, columns, (sizes(weight.const_value)[0], width), name)
        matrix = ir.val(name, const_value=tensor, dtype=tensor.dtype, shape=tensor.shape)
        graph.register_initializer(matrix)
        node = ir.node("MatMul", [given, matrix])
        graph.insert_before(split, node)
        take_place(part, node.outputs[0])
        begin += width
    graph.remove([split, product], safe=True)
    del graph.initializers[weight.name or ""]


def _columns(array: np.ndarray, *, begin: int, end: int) -> np.ndarray:
    return np.ascontiguousarray(array[:, begin:end])
