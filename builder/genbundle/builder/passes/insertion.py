"""What passes put into graphs: nodes with names of their own, and constants, each once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


def insert_before(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node], name: str) -> None:
    """Put `nodes` before one of the graph's, their results named after `name`."""
    name_results(nodes, name)
    graph.insert_before(node, nodes)


def name_results(nodes: Sequence[ir.Node], name: str) -> None:
    """Number the results that have no name: those of a branch mustn't have one of the graph around it."""
    for number, value in enumerate(value for node in nodes for value in node.outputs):
        value.name = value.name or f"{name}_{number}"


def constant(graph: ir.Graph, name: str, numbers: Any) -> ir.Value:
    """The graph's constant of that name, made of `numbers` (an array, or integers as int64) when it isn't there."""
    if name not in graph.initializers:
        array = np.asarray(numbers)
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(ir.val(name, const_value=tensor, dtype=tensor.dtype, shape=array.shape))
    return graph.initializers[name]


def take_place(old: ir.Value, new: ir.Value) -> None:
    """Let `new` be what `old` was, by name, type and shape, for all that read it."""
    new.name, new.type, new.shape, old.name = old.name, old.type, old.shape, f"{old.name}_before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
