"""Pass: a step's attention over key and value buffers as products of matrices."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from genbundle.builder.passes.insertion import constant, insert_before, name_results, take_place
from genbundle.bundles.manifest import CAPACITY

# ONNX Runtime's GroupQueryAttention reads a key head's keys and values anew for each of its query heads. With fewer
# than this many, products, which pack them first, gain nothing.
LEAST_GROUP = 4
_BIAS = 10  # where the operator takes the additive mask
# The attributes that the operator may have here, and the values at which it computes nothing else.
_PLAIN = {
    "causal": 1, "do_rotary": 0, "k_quant_type": "NONE", "kv_cache_bit_width": 0, "local_window_size": -1,
    "qk_output": 0, "rotary_interleaved": 0, "sliding_window_cache": 0, "smooth_softmax": -1, "softcap": 0.0,
    "v_quant_type": "NONE",
}  # fmt: skip
_FREE = {"kv_num_heads", "num_heads", "qk_norm_epsilon", "scale"}
_Branch = tuple[Sequence[ir.Node], Sequence[ir.Value]]
"""The nodes of a branch and its results."""


def attend_in_products(model: ir.Model) -> bool:
    """A GroupQueryAttention that writes into buffers becomes an If: for one new token its key and value are written and
    all heads of a group attend to the whole buffers at once, by two products; else the operator as it was.

    Of a node's inputs the sequences' lengths all have to be the total without the new token, as attention.py gives
    them: padding is in the bias. What the buffers hold behind the tokens is masked, and has to be zeros or what an
    earlier step wrote. The products are softmax(query @ keys.T * scale + bias) @ values, as the operator's are but for
    rows whose every position is masked, padding's own. Returns whether the model was modified.
    """
    graph, steps = model.graph, {}
    nodes = [node for node in graph if _can(node)]
    for node in nodes:
        key = (*(node.inputs[place] for place in (5, 6, _BIAS)), _groups(node), _width(node))
        if key not in steps:
            steps[key] = _Step(graph, node, f"step_attention_{len(steps)}")
        steps[key].choose(node)
    return bool(nodes)


def _can(node: ir.Node) -> bool:
    if node.op_type != "GroupQueryAttention" or not (_is_buffer(node, 3, 1) and _is_buffer(node, 4, 2)):
        return False
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = all(name in _FREE or (name in _PLAIN and _PLAIN[name] == value) for name, value in attributes.items())
    given = {place for place, value in enumerate(node.inputs) if value is not None}
    grouped = attributes["num_heads"] >= LEAST_GROUP * attributes["kv_num_heads"]
    return plain and grouped and attributes.get("scale", 0.0) > 0 and given == {*range(7), _BIAS}


def _is_buffer(node: ir.Node, given: int, written: int) -> bool:
    """Whether an input is one of the graph's with room, and an output the graph's output that it becomes."""
    ends = (node.inputs[given], node.outputs[written])
    if any(value is None or value.shape is None or str(value.shape[2]) != CAPACITY for value in ends):
        return False
    return bool(ends[0] and ends[0].is_graph_input() and ends[1] and ends[1].is_graph_output())


class _Step:
    """What layers share: whether there is one new token, its place in their buffers, and the mask over all places."""

    def __init__(self, graph: ir.Graph, first: ir.Node, name: str):
        self._graph, tape = graph, Tape()
        query, keys, lengths, bias = (first.inputs[place] for place in (0, 3, 5, _BIAS))
        one = constant(graph, "one_token", [1])
        hidden = constant(graph, "hidden", np.float32(-np.inf))
        self._one = tape.op("Squeeze", [tape.op("Equal", [_size(tape, query, 1), one])])
        inside, nothing = Tape(), Tape()
        room = inside.op("Sub", [_size(inside, keys, 2), _size(inside, bias, 3)])
        pads = inside.op("Concat", [constant(graph, "pads_before", [0] * 7), room], attributes={"axis": 0})
        mask = self._grouped(inside, inside.op("Pad", [bias, pads, hidden]), _groups(first))
        # Lengths are counted without the last token, which makes them the new one's place; of each head and number.
        place = inside.op("Cast", [lengths], attributes={"to": ir.DataType.INT64.value})
        place = inside.op("Reshape", [place, constant(graph, "by_sequence", [-1, 1, 1, 1])])
        place = inside.op("Expand", [place, self._sizes(1, _groups(first), 1, _width(first))])
        unread = [nothing.op("Identity", [value]) for value in (hidden, one)]
        self._mask, self._place = self._if(tape, name, (inside.nodes, [mask, place]), (nothing.nodes, unread))
        insert_before(graph, first, tape.nodes, name)

    def _grouped(self, tape: Tape, mask: ir.Value, groups: int) -> ir.Value:
        """A mask `[batch, 1 or heads, 1, room]` with the heads as the scores have them: groups, and those of each; 1
        and 1 where it is the same for all."""
        heads = _size(tape, mask, 1)
        of_groups = tape.op("Min", [heads, self._sizes(groups)])
        sizes = [self._sizes(0), of_groups, tape.op("Div", [heads, of_groups]), self._sizes(-1)]
        return tape.op("Reshape", [mask, tape.op("Concat", sizes, attributes={"axis": 0})])

    def choose(self, node: ir.Node) -> None:
        """Put the If in the node's place."""
        name, tape, products, operator = node.outputs[0].name or "attention", Tape(), Tape(), Tape()
        outputs = self._products(products, node)
        attributes = dict(node.attributes)
        same = operator.op_multi_out(
            node.op_type, list(node.inputs), attributes=attributes, domain=node.domain, num_outputs=3
        )
        chosen = self._if(tape, f"{name}_step", (products.nodes, outputs), (operator.nodes, same))
        for old, new in zip(node.outputs, chosen, strict=True):
            take_place(old, new)
        insert_before(self._graph, node, tape.nodes, name)
        self._graph.remove(node, safe=True)

    def _products(self, tape: Tape, node: ir.Node) -> list[ir.Value]:
        query, key, value, *buffers = node.inputs[:5]
        heads, groups, width = node.attributes["num_heads"].as_int(), _groups(node), _width(node)
        query = tape.op("Reshape", [query, self._sizes(0, groups, heads // groups, width)])
        written = []
        for new, buffer in zip((key, value), buffers, strict=True):
            new = tape.op("Reshape", [new, self._sizes(0, groups, 1, width)])
            written.append(tape.op("ScatterElements", [buffer, self._place, new], attributes={"axis": 2}))
        scale = {"transB": 1, "alpha": node.attributes["scale"].as_float()}
        scores = tape.op("FusedMatMul", [query, written[0]], attributes=scale, domain="com.microsoft")
        shares = tape.op("Softmax", [tape.op("Add", [scores, self._mask])], attributes={"axis": -1})
        attended = tape.op("MatMul", [shares, written[1]])
        return [tape.op("Reshape", [attended, self._sizes(0, 1, heads * width)]), *written]

    def _if(self, tape: Tape, name: str, then: _Branch, otherwise: _Branch) -> Sequence[ir.Value]:
        branches = {}
        for branch, (nodes, outputs) in (("then_branch", then), ("else_branch", otherwise)):
            name_results(nodes, f"{name}_{branch}")
            branches[branch] = ir.Graph([], outputs, nodes=nodes, name=f"{name}_{branch}")
        return tape.op_multi_out("If", [self._one], attributes=branches, num_outputs=len(then[1]))

    def _sizes(self, *sizes: int) -> ir.Value:
        return constant(self._graph, "_".join(["sizes", *map(str, sizes)]).replace("-", "rest_"), sizes)


def _groups(node: ir.Node) -> int:
    return node.attributes["kv_num_heads"].as_int()


def _width(node: ir.Node) -> int:
    """How many numbers a head's key has."""
    keys = node.inputs[3]
    assert keys is not None and keys.shape is not None
    return int(keys.shape[3])  # pyright: ignore[reportArgumentType]


def _size(tape: Tape, value: ir.Value | None, axis: int) -> ir.Value:
    return tape.op("Shape", [value], attributes={"start": axis, "end": axis + 1})
