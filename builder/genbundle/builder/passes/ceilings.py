"""Pass: a size divided and rounded up, without a ceiling."""

import math
import operator
from typing import Any

import torch


def divide_upwards(graph: torch.fx.Graph) -> bool:
    """`ceil(a / b)` of sizes as `(a + b - 1) // b`, which torch.export can save where it can't a ceiling.

    Returns whether the graph was modified.
    """
    modified = False
    for node in list(graph.nodes):
        divided: Any = node.args[0] if node.op == "call_function" and node.target is math.ceil else None
        if not isinstance(divided, torch.fx.Node) or divided.target is not operator.truediv:
            continue
        size, by = divided.args
        if not isinstance(size, torch.fx.Node) or not isinstance(by, int) or by < 1:
            continue
        with graph.inserting_before(node):
            raised = graph.call_function(operator.add, (size, by - 1))
            raised.meta["val"] = size.meta["val"] + (by - 1)
            result = graph.call_function(operator.floordiv, (raised, by))
            result.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        if not divided.users:
            graph.erase_node(divided)
        modified = True
    return modified
