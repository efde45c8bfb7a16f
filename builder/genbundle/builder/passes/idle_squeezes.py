"""Pass: `squeeze` of an axis that isn't 1, which does nothing in torch and is no valid `Squeeze` in ONNX."""

from typing import Any

import torch

_SQUEEZES = (torch.ops.aten.squeeze.dim, torch.ops.aten.squeeze.dims)


def remove_idle_squeezes(program: Any) -> bool:
    """Let what squeezes no axis go (experts' masks of several choices). Returns whether the graph was modified."""
    idle = [
        node
        for node in program.graph.nodes
        if node.target in _SQUEEZES and node.meta["val"].dim() == node.args[0].meta["val"].dim()
    ]
    for node in idle:
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)
    return bool(idle)
