"""Pass: views of tensors that hold nothing, as new ones."""

from typing import Any

import torch

_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


def make_empty_views(program: Any) -> bool:
    """Make what has an axis of 0, such as the turned part of keys that have none (GLM-5-Next).

    onnxscript writes a view's open axis as -1, which ONNX refuses beside a 0. Returns whether the graph was modified.
    """
    modified = False
    for node in list(program.graph.nodes):
        # A size that depends on values is not known to be 0, and comparing it would be a guard on it.
        if node.target not in _VIEWS or not any(type(size) is int and size == 0 for size in node.meta["val"].shape):
            continue
        with program.graph.inserting_before(node):
            empty = program.graph.call_function(
                torch.ops.aten.full.default, (node.args[1], 0), {"dtype": node.meta["val"].dtype}
            )
            empty.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(empty)
        program.graph.erase_node(node)
        modified = True
    return modified
