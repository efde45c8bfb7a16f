"""Pass: complex numbers as pairs of real ones, on a last axis of two."""

from typing import Any

import torch
from torch.fx.node import map_arg

_aten = torch.ops.aten
_ALIKE = frozenset({_aten.to.dtype_layout, _aten.to.dtype, _aten.clone.default, _aten.contiguous.default})
_CHECKS = frozenset({_aten._assert_tensor_metadata.default})
_MADE = frozenset({_aten.polar.default, _aten.view_as_complex.default})
_TAKEN = frozenset({_aten.mul.Tensor, _aten.unsqueeze.default, _aten.slice.Tensor, *_ALIKE})


def pair_complex_numbers(program: torch.export.ExportedProgram) -> bool:
    """Rotary positions that a model computes as complex numbers, by their real and imaginary parts: ExecuTorch has no
    complex numbers. Whether the graph was modified; a program with other operators on them stays as it is."""
    nodes = [node for node in program.graph.nodes if _is_complex(node) or any(map(_is_complex, node.all_input_nodes))]
    if not nodes or not all(_known(node) for node in nodes):
        return False
    pairs: dict[Any, Any] = {}
    for node in nodes:
        with program.graph.inserting_before(node):
            if node.target is _aten.view_as_real.default:
                node.replace_all_uses_with(pairs[node.args[0]])
            elif node.target not in _CHECKS:
                pairs[node] = _paired(node, pairs)
    for node in reversed(nodes):
        program.graph.erase_node(node)
    program.graph_module.recompile()
    return True


def _is_complex(node: Any) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


def _known(node: torch.fx.Node) -> bool:
    if node.target in _CHECKS or node.target is _aten.view_as_real.default:
        return True
    if node.target is _aten.mul.Tensor or node.target in _MADE:
        return _is_complex(node)
    return node.target in _TAKEN and _is_complex(node) and _is_complex(node.args[0])


def _paired(node: torch.fx.Node, pairs: dict[Any, Any]) -> Any:
    """The pairs of the complex numbers that `node` gives."""
    graph: torch.fx.Graph = node.graph
    first: Any = node.args[0]
    given: list[Any] = [pairs.get(arg, arg) if isinstance(arg, torch.fx.Node) else arg for arg in node.args]

    def call(operator: Any, *args: Any) -> torch.fx.Node:
        made = graph.call_function(operator, args)
        made.meta["val"] = operator(*map_arg(args, lambda arg: arg.meta["val"]))
        return made

    if node.target is _aten.polar.default:
        parts = [call(_aten.mul.Tensor, given[0], call(part, given[1])) for part in _PARTS]
        return call(_aten.stack.default, parts, -1)
    if node.target is _aten.unsqueeze.default:
        return call(_aten.unsqueeze.default, given[0], _axis(given[1], first.meta["val"].dim() + 1))
    if node.target is _aten.slice.Tensor:
        axis = _axis(given[1] if len(given) > 1 else 0, first.meta["val"].dim())
        return call(_aten.slice.Tensor, given[0], axis, *given[2:])
    if node.target is _aten.mul.Tensor:
        return _product(call, node, given)
    return given[0]  # view_as_complex takes pairs; the others change nothing of them


_PARTS = (_aten.cos.default, _aten.sin.default)


def _axis(axis: int, count: int) -> int:
    return axis if axis >= 0 else axis + count


def _product(call: Any, node: torch.fx.Node, given: list[Any]) -> Any:
    complex_ones = [isinstance(arg, torch.fx.Node) and _is_complex(arg) for arg in node.args]
    if not all(complex_ones):
        # A number, or a real tensor: both parts times it.
        given = [
            call(_aten.unsqueeze.default, arg, -1) if isinstance(arg, torch.fx.Node) and not known else arg
            for arg, known in zip(given, complex_ones, strict=True)
        ]
        return call(_aten.mul.Tensor, *(given if complex_ones[0] else reversed(given)))
    (a, b), (c, d) = ([call(_aten.select.int, pair, -1, part) for part in (0, 1)] for pair in given)
    real = call(_aten.sub.Tensor, call(_aten.mul.Tensor, a, c), call(_aten.mul.Tensor, b, d))
    imaginary = call(_aten.add.Tensor, call(_aten.mul.Tensor, a, d), call(_aten.mul.Tensor, b, c))
    return call(_aten.stack.default, [real, imaginary], -1)
