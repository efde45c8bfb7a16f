"""A copy of every input that a program writes into: ExecuTorch gives such an input back as one more output."""

from typing import Any

import torch


def copy_written_inputs(program: Any) -> None:
    """Let the operators of an ExportedProgram work on copies of the user's inputs that one of them writes into."""
    users = set(program.graph_signature.user_inputs)
    graph = program.graph
    written = {
        _storage(node.args[0]) for node in graph.nodes if node.op == "call_function" and _aliased(node, write=True)
    }
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in users and node in written:
            with graph.inserting_after(node):
                copy = graph.call_function(torch.ops.aten.clone.default, (node,))
            copy.meta = dict(node.meta)
            node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
    program.graph_module.recompile()


def _storage(node: Any) -> Any:
    """The node whose memory the result is a view of."""
    while isinstance(node, torch.fx.Node) and node.op == "call_function" and _aliased(node, write=None):
        node = node.args[0]
    return node


def _aliased(node: torch.fx.Node, *, write: bool | None) -> bool:
    """Whether the result is the first argument's memory; written into, if `write`."""
    schema = getattr(node.target, "_schema", None)
    first = schema.arguments[0].alias_info if schema is not None and schema.arguments else None
    return first is not None and bool(node.args) and (write is None or first.is_write == write)
