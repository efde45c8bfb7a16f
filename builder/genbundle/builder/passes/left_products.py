"""Pass: the weights of feed-forward layers as the left side of their products."""

from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from genbundle.builder.passes.elementwise import EACH, GELUS, PAIRS
from genbundle.builder.passes.insertion import constant, insert_before, take_place
from genbundle.builder.passes.tensors import sizes


@dataclass(frozen=True)
class _Layer:
    """The products that begin a layer, all of the same rows; the element-wise nodes behind them; and the product at its
    end."""

    last: ir.Node
    first: dict[ir.Node, None] = field(default_factory=dict)
    between: dict[ir.Node, None] = field(default_factory=dict)


def multiply_from_the_left(model: ir.Model) -> bool:
    """Between two products by weights with only element-wise operators between them, tokens become columns:
    `f(x @ A.T) @ B.T` is `(B @ f(A @ x.T)).T`, for weights that `keep_output_rows` has laid so.

    ONNX Runtime packs the right side of a product in each call, which for a prompt of 128 tokens takes as long as a
    sixth of its products. Now the tokens are what it packs, and the weights are read where they are. A step is the same
    product of a matrix and a vector either way. Returns whether the model was modified.
    """
    graph, modified = model.graph, False
    for node in list(graph):
        layer = _layer_before(node)
        if layer is not None:
            _turn(graph, layer)
            modified = True
    if modified:
        RemoveUnusedNodesPass()(model)  # biases as rows
    return modified


def _weight(node: ir.Node) -> ir.Value | None:
    """The weight `[outputs, inputs]` of a product by its transpose."""
    if node.op_type != "FusedMatMul":
        return None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = attributes.pop("transB", 0) == 1 and attributes.pop("alpha", 1.0) == 1.0 and not any(attributes.values())
    weight = node.inputs[1]
    return weight if plain and weight is not None and weight.is_initializer() and len(_sizes(weight)) == 2 else None


def _sizes(value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None and value.const_value is not None
    return sizes(value.const_value)


def _layer_before(last: ir.Node) -> _Layer | None:
    """The layer that a product ends; None where something in it needs tokens as rows, or is read elsewhere too."""
    weight = _weight(last)
    if weight is None:
        return None
    layer, reached = _Layer(last), [last.inputs[0]]
    while reached:
        value = reached.pop()
        node = None if value is None else value.producer()
        if node is None or node.graph is not last.graph:
            return None
        if _weight(node) is not None:
            layer.first[node] = None
        elif node not in layer.between:
            read = _computed(node)
            if read is None:
                return None
            layer.between[node] = None
            reached += read
    nodes = {*layer.first, *layer.between, last}
    outputs = [value for node in nodes - {last} for value in node.outputs]
    alone = all(not value.is_graph_output() and {use.node for use in value.uses()} <= nodes for value in outputs)
    same = len({node.inputs[0] for node in layer.first}) == 1
    back = all(_sizes(weight)[0] == _sizes(given)[1] for node in layer.first if (given := _weight(node)) is not None)
    return layer if layer.between and alone and same and back else None


def _computed(node: ir.Node) -> list[ir.Value | None] | None:
    """The computed values that an element-wise node reads; None for another node."""
    each = node.op_type in EACH and len(node.inputs) == 1
    constants = [value for value in node.inputs if value is not None and value.is_initializer()]
    rows = all(len(_sizes(value)) < 2 for value in constants)
    if not rows or not (each or node.op_type in PAIRS or node.op_type in GELUS):
        return None
    return [value for value in node.inputs if value not in constants]


def _turn(graph: ir.Graph, layer: _Layer) -> None:
    """Rewrite a layer. Sequences are flattened too: else each of a batch would read the weights by itself."""
    first, result, weight = list(layer.first), layer.last.outputs[0], _weight(layer.last)
    name, given, tape = result.name or "left_product", first[0].inputs[0], Tape()
    assert weight is not None and given is not None
    (width, inner), count = _sizes(weight), _count(given)

    def op(
        kind: str, inputs: list[ir.Value | None], shape: list[int | str | None], **attributes: list[int]
    ) -> ir.Value:
        value = tape.op(kind, inputs, attributes=attributes)
        value.shape, value.type = ir.Shape(shape), weight.type
        return value

    rows = op("Reshape", [given, constant(graph, f"rows_of_{width}", [-1, width])], [count, width])
    # Not as a product's transposed side, which a slower kernel reads where it is one token.
    columns = op("Transpose", [rows], [width, count], perm=[1, 0])
    features = set()
    for node in layer.first:
        features.add(_sizes(node.inputs[1])[0])
        product = op("MatMul", [node.inputs[1], columns], [_sizes(node.inputs[1])[0], count])
        node.outputs[0].replace_all_uses_with(product)
    insert_before(graph, next(node for node in graph if node in layer.first), tape.nodes, f"{name}_first")
    for node in layer.between:
        node.outputs[0].shape = ir.Shape([inner, count]) if features == {inner} else None
        for place, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and value.const_value is not None and _sizes(value):
                column = value.const_value.numpy().reshape(-1, 1)
                node.replace_input_with(place, constant(graph, f"{value.name}_column", column))
        if node.op_type in GELUS and len(node.inputs) == 2:
            _add_bias_before(graph, node)
    tape = Tape()
    columns = op("MatMul", [weight, layer.last.inputs[0]], [width, count])
    rows = op("Transpose", [columns], [count, width], perm=[1, 0])
    take_place(result, tape.op("Reshape", [rows, tape.op("Shape", [given])]))
    insert_before(graph, layer.last, tape.nodes, f"{name}_last")
    graph.remove([layer.last, *first], safe=True)


def _add_bias_before(graph: ir.Graph, node: ir.Node) -> None:
    """An addition and the operator without a bias in the place of one that takes rows."""
    tape, result = Tape(), node.outputs[0]
    added = tape.op("Add", node.inputs)
    added.shape, added.type = result.shape, result.type
    kind = GELUS[node.op_type]
    take_place(result, tape.op(kind, [added], attributes=dict(node.attributes), domain="com.microsoft"))
    insert_before(graph, node, tape.nodes, f"{added.name or result.name}_bias")
    graph.remove(node, safe=True)


def _count(given: ir.Value) -> str | None:
    """How many rows a value has, in the names of its axes. ONNX Runtime takes the memory of a value whose shape it
    doesn't know for no other, and a layer's are its largest."""
    sizes = [] if given.shape is None else [str(size) for size in tuple(given.shape)[:-1]]
    return "*".join(sizes) if sizes and "None" not in sizes else None
