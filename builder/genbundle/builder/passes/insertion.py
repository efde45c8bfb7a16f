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
    """A constant of the graph made of `numbers` (an array, or integers as int64): the one of that name, if it is the
    same; else a new one, under another name where that one is taken."""
    array, number = np.asarray(numbers), 0
    taken = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    while (known := taken.get(f"{name}_{number}" if number else name)) is not None:
        tensor = known.const_value
        if tensor is not None and tensor.numpy().dtype == array.dtype and np.array_equal(tensor.numpy(), array):
            return known
        number += 1
    name = f"{name}_{number}" if number else name
    value = ir.val(name, const_value=ir.tensor(array, name=name), shape=array.shape)
    value.dtype = ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def take_place(old: ir.Value, new: ir.Value) -> None:
    """Let `new` be what `old` was, by name, type and shape, for all that read it."""
    new.name, new.type, new.shape, old.name = old.name, old.type, old.shape, f"{old.name}_before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
