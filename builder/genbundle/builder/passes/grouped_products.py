"""Pass: the grouped product of mixtures of experts by an operator that the runtime brings."""

import torch

from genbundle.runtime.backends.torch_operators import register_operators


def use_own_grouped_product(graph: torch.fx.Graph) -> bool:
    """Replace transformers' grouped product, which only exists where transformers is imported; whether any was there.

    Can go when torch has `torch._grouped_mm` for float32 on CPUs.
    """
    register_operators()
    theirs = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    found = [node for node in graph.nodes if theirs is not None and node.target is theirs.default]
    for node in found:
        node.target = torch.ops.genbundle.grouped_mm.default
        node.args, node.kwargs = (*node.args, *node.kwargs.values()), {}
    return bool(found)
