"""Pass: the logits of each sequence's last token, also where padding follows it."""

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape


def take_last_tokens(model: ir.Model) -> bool:
    """Take each sequence's last position that `attention_mask` doesn't mask, instead of the last position.

    Decoders compute logits for the last of the new positions alone. ONNX Runtime GenAI pads a batch on the right, where
    that is padding in all sequences but the longest. With padding on the left nothing changes. Returns whether the
    model was modified: there is such a choice, and a mask.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids", inputs.get("inputs_embeds"))
    node = _last_position(graph)
    if mask is None or ids is None or node is None:
        return False
    tape = Tape()

    def number(value: int | list[int]) -> ir.Value:
        return tape.op("Constant", [], attributes={"value": ir.tensor(np.array(value, np.int64))})

    total = tape.op("Shape", [mask], attributes={"start": 1, "end": 2})
    new = tape.op("Shape", [ids], attributes={"start": 1, "end": 2})
    one = number(1)
    # The largest of the unmasked positions, counted from 1; then from 0, and from the first new one.
    counted = tape.op("Range", [one, tape.op("Add", [tape.op("Squeeze", [total]), one]), one])
    last = tape.op("ReduceMax", [tape.op("Mul", [mask, counted]), number([1])], attributes={"keepdims": 1})
    index = tape.op("Sub", [tape.op("Sub", [last, one]), tape.op("Sub", [total, new])])
    index = tape.op("Max", [index, number(0)])
    taken = tape.op("GatherND", [node.inputs[0], index], attributes={"batch_dims": 1})
    taken = tape.op("Unsqueeze", [taken, number([1])])
    graph.insert_before(node, tape.nodes)
    node.outputs[0].replace_all_uses_with(taken, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True


def _last_position(graph: ir.Graph) -> ir.Node | None:
    """The one node before the logits that takes the last of the positions, `[:, -1:]`."""
    value: ir.Value | None = next((output for output in graph.outputs if output.name == "logits"), None)
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Slice" and _is_last(node):
            return node
        # The head and what stands around it work position by position, and have their values first.
        value = node.inputs[0] if node.inputs else None
    return None


def _is_last(node: ir.Node) -> bool:
    starts, axes = (_numbers(node.inputs[index]) if len(node.inputs) > index else None for index in (1, 3))
    ends = _numbers(node.inputs[2])
    return starts == [-1] and axes == [1] and ends is not None and ends[0] >= 2**31 - 1


def _numbers(value: ir.Value | None) -> list[int] | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy().reshape(-1).tolist()
