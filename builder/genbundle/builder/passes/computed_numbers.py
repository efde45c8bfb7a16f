"""Pass: a number that is computed from constants by an operator that ONNX doesn't have, computed beforehand."""

from typing import Any

import torch
from torch.fx.node import map_arg

_WITHOUT_ONNX = (torch.ops.aten.erfinv.default,)  # Gemma 3n's cutoff of a normal distribution


def compute_numbers(program: Any) -> bool:
    """Put what such operators give for a single constant in their place. Returns whether the graph was modified."""
    modified = False
    for node in list(program.graph.nodes):
        if node.target not in _WITHOUT_ONNX or node.meta["val"].numel() != 1:
            continue
        value = _value(program, node)
        if value is None:
            continue
        found = node.meta["val"]
        with program.graph.inserting_before(node):
            number = program.graph.call_function(
                torch.ops.aten.full.default, (list(found.shape), float(value)), {"dtype": found.dtype}
            )
            number.meta["val"] = found
        node.replace_all_uses_with(number)
        program.graph.erase_node(node)
        modified = True
    return modified


def _value(program: Any, node: torch.fx.Node) -> torch.Tensor | None:
    """What a node gives where nothing that it depends on is an input of the program."""
    if node.op == "placeholder":
        signature = program.graph_signature
        name = signature.inputs_to_lifted_tensor_constants.get(node.name, signature.inputs_to_buffers.get(node.name))
        return None if name is None else program.constants.get(name, program.state_dict.get(name))
    if node.op != "call_function":
        return None
    known = {item: _value(program, item) for item in node.all_input_nodes}
    if any(value is None for value in known.values()):
        return None
    target: Any = node.target
    arguments = map_arg((node.args, node.kwargs), lambda item: known[item])
    return target(*arguments[0], **arguments[1])  # pyright: ignore
