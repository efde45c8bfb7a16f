"""Pass: the first tokens of a state are read where they lie.

Imports ExecuTorch at module level: import this module inside functions only.
"""

from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
from executorch.exir import memory
from executorch.exir.passes.memory_planning_pass import MemoryPlanningPass
from torch.export.graph_signature import ExportGraphSignature as Signature
from torch.fx.passes.infra.pass_base import PassResult


class PrefixesInPlace(MemoryPlanningPass):
    """ExecuTorch's memory planning, which gives the first rows of a state the state's own place instead of a copy.

    ExecuTorch has no views of a part of a tensor, as its views are planned as their whole bases. A part that starts
    where its base does needs no more than the base's place in the plan, and no instruction.
    """

    def run(self, graph_module: torch.fx.GraphModule, graph_signature: Signature | None = None) -> PassResult:
        """Plan the memory of one method."""
        found = prefixes(graph_module.graph, _states(graph_signature))
        bases = [_base(node.args[0]) for node in found]
        for node, base in zip(found, bases, strict=True):
            place = cast(torch.fx.Node, node.kwargs["out"])
            node.target, node.args, node.kwargs = memory.view, (base, [*node.meta["val"].shape]), {}
            graph_module.graph.erase_node(place)
        graph_module.recompile()
        result = super().run(graph_module, graph_signature)
        for node, base in zip(found, bases, strict=True):
            own, whole = node.meta["spec"], base.meta["spec"]
            own.mem_id, own.mem_offset, own.mem_obj_id = whole.mem_id, whole.mem_offset, whole.mem_obj_id
        return result


def prefixes(graph: torch.fx.Graph, states: Collection[str]) -> list[torch.fx.Node]:
    """The copies of first rows of `states` (names of inputs) that nothing writes to while they are read."""
    nodes = list(graph.nodes)
    places = {node: place for place, node in enumerate(nodes)}
    found = []
    for node in nodes:
        if _is_prefix(node, states):
            readers = list(_readers(node))
            last = max((places[reader] for reader in readers), default=0)
            written = any(_writes(later, _base(node.args[0])) for later in nodes[places[node] : last + 1])
            # A caller may keep an output, or put it elsewhere.
            if not written and all(reader.op != "output" for reader in readers):
                found.append(node)
    return found


def _states(signature: Signature | None) -> set[str]:
    """The names of the inputs that hold state between calls."""
    if signature is None:
        return set()
    written = set(signature.buffers_to_mutate.values())
    return {name for name, buffer in signature.inputs_to_buffers.items() if buffer in written}


def _readers(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """What reads a node, itself or as a view."""
    for user in node.users:
        yield user
        if user.target is memory.view:
            yield from _readers(user)


def _base(node: Any) -> torch.fx.Node:
    """What a view shows; the node itself where it is none."""
    while node.op == "call_function" and node.target is memory.view:
        node = node.args[0]
    return node


def _is_prefix(node: torch.fx.Node, states: Collection[str]) -> bool:
    """Whether the node copies the first rows of a state, in one piece and of a fixed size."""
    if node.op != "call_function" or node.target is not torch.ops.aten.slice_copy.Tensor_out:
        return False
    named = dict(zip(("self", "dim", "start", "end", "step"), node.args, strict=False))
    source, axis = named["self"], named.get("dim", 0)
    assert isinstance(source, torch.fx.Node) and isinstance(axis, int)
    base, shape = _base(source), source.meta["val"].shape
    return (
        base.op == "placeholder"
        and base.target in states
        and named.get("start") in (None, 0)
        and named.get("step") in (None, 1)
        and all(isinstance(size, int) for size in (*shape, *node.meta["val"].shape))
        and all(size == 1 for size in shape[:axis])
    )


def _writes(node: torch.fx.Node, state: torch.fx.Node) -> bool:
    """Whether the node writes into the state, by its operator's schema."""
    return isinstance(node.target, torch._ops.OpOverload) and any(
        argument.alias_info is not None and argument.alias_info.is_write and _base(given) is state
        for argument, given in _given(node)
    )


def _given(node: torch.fx.Node) -> list[tuple[Any, torch.fx.Node]]:
    """A node's tensors with what its operator's schema says of them."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    named = {argument.name: argument for argument in arguments}
    pairs = [*zip(arguments, node.args, strict=False), *((named[name], value) for name, value in node.kwargs.items())]
    return [(argument, value) for argument, value in pairs if isinstance(value, torch.fx.Node)]
