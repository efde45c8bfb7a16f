"""Pass: an exported program without the weights that it doesn't read."""

from typing import Any

from torch.export.graph_signature import InputKind

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def drop_unused_weights(exported: Any) -> bool:
    """Leave out the weights that nothing reads; whether there were any.

    A component's module may hold the whole model, all of whose weights torch.export makes inputs of the program: a part
    that is rounded in its own program would be stored at float32 for another's.
    """
    signature = exported.graph_signature
    unread = {node.name: node for node in exported.graph.find_nodes(op="placeholder") if not node.users}
    written = set(signature.buffers_to_mutate.values())
    dropped = [
        spec
        for spec in signature.input_specs
        if spec.kind in _WEIGHTS and spec.arg.name in unread and spec.target not in written
    ]
    for spec in dropped:
        signature.input_specs.remove(spec)
        exported.graph.erase_node(unread[spec.arg.name])
    kept = {spec.target for spec in signature.input_specs}
    for name in [name for name in exported.state_dict if name not in kept]:
        del exported.state_dict[name]
    for name in {spec.target for spec in dropped} - kept:
        exported.constants.pop(name, None)
    exported.graph_module.recompile()
    return bool(dropped)
