"""Pass: additions of numbers so small that onnxscript takes them for zero."""

from typing import Any

import torch

_TAKEN_FOR_ZERO = 1e-8
"""onnxscript's rule `x + 0 = x` matches constants up to this (`abs_tol` in rewriter/_pattern_ir.py, 0.7.2)."""
_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add.Scalar)


def keep_small_addends(program: Any) -> bool:
    """Spread such a number over the other operand's shape, which no rule takes for a constant.

    Without it a norm of zeros, such as a padding token's embedding, is 0 / 0 (Helium's epsilon is 1e-8). Returns
    whether the graph was modified. It can go once onnxscript compares with zero exactly.
    """
    modified = False
    for node in list(program.graph.nodes):
        if node.target not in _ADDITIONS or not isinstance(node.args[1], float):
            continue
        values, number = node.args[0], node.args[1] * node.kwargs.get("alpha", 1)
        if not 0 < abs(number) <= _TAKEN_FOR_ZERO:
            continue
        val = node.meta["val"]
        with program.graph.inserting_before(node):
            # Of the sum's type: the other operand may be integers.
            spread = program.graph.call_function(
                torch.ops.aten.full_like.default, (values, number), {"dtype": val.dtype}
            )
            result = program.graph.call_function(torch.ops.aten.add.Tensor, (values, spread))
        spread.meta["val"] = result.meta["val"] = val
        node.replace_all_uses_with(result)
        program.graph.erase_node(node)
        modified = True
    return modified
