"""Pass: an axis added to complex numbers, as one added to their real and imaginary parts."""

from typing import Any

import torch


def add_axes_to_parts(program: Any) -> bool:
    """`unsqueeze` of complex numbers, which torch's ONNX exporter doesn't know (Llama 4's rotary positions), by way of
    `view_as_real`. Returns whether the graph was modified."""
    modified = False
    graph: torch.fx.Graph = program.graph
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.unsqueeze.default or not node.meta["val"].is_complex():
            continue
        values, axis = node.args
        axis = axis if axis >= 0 else axis + node.meta["val"].dim()
        with graph.inserting_before(node):
            parts = graph.call_function(torch.ops.aten.view_as_real.default, (values,))
            parts.meta["val"] = torch.view_as_real(values.meta["val"])
            longer = graph.call_function(torch.ops.aten.unsqueeze.default, (parts, axis))
            longer.meta["val"] = parts.meta["val"].unsqueeze(axis)
            result = graph.call_function(torch.ops.aten.view_as_complex.default, (longer,))
            result.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        modified = True
    return modified
