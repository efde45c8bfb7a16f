"""Which parts of a program XNNPACK gets.

Imports ExecuTorch at module level: import this module inside functions only.
"""

from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from types import SimpleNamespace
from typing import Any, cast

import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.gemm_configs import ConvolutionConfig
from executorch.backends.xnnpack.partition.config.generic_node_configs import (
    GeluConfig,
    SliceCopyConfig,
    ViewCopyConfig,
)
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.backend.canonical_partitioners.config_partitioner import format_target_name
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
from executorch.exir.graph_module import get_control_flow_submodules


class ExactGeluConfig(GeluConfig):
    """Leaves GELU's tanh form to ExecuTorch's own kernel: XNNPACK 1.4.1 computes the exact form in its place.

    Remove with an ExecuTorch that has https://github.com/pytorch/executorch/pull/22851.
    """

    def check_constraints(self, node: torch.fx.Node, ep: torch.export.ExportedProgram) -> bool:
        """Whether XNNPACK takes the node."""
        return node.kwargs.get("approximate", "none") == "none" and super().check_constraints(node, ep)


class OneAxisConvolutionConfig(ConvolutionConfig):
    """Leaves a convolution over sequences of any number and length to ExecuTorch.

    XNNPACK's convolutions have two axes: its pass gives such an input one more, and its serializer then refuses an
    input that varies along several, when it is too late to take the node back.
    """

    def check_constraints(self, node: torch.fx.Node, ep: torch.export.ExportedProgram) -> bool:
        """Whether XNNPACK takes the node."""
        shapes = [node.meta["val"].shape, cast(torch.fx.Node, node.args[0]).meta["val"].shape]
        several = any(len(shape) == 3 and sum(not isinstance(size, int) for size in shape) > 1 for shape in shapes)
        return not several and super().check_constraints(node, ep)


class _LeavesStates:
    """Leaves parts of a state, and a state in another shape, where they are: XNNPACK would copy them."""

    def check_constraints(self, node: torch.fx.Node, ep: torch.export.ExportedProgram) -> bool:
        """Whether XNNPACK takes the node."""
        return not _reads_state(node) and cast(Any, super()).check_constraints(node, ep)


class OwnSliceConfig(_LeavesStates, SliceCopyConfig):
    """For the first tokens of a state (passes/state_prefixes.py)."""


class OwnViewConfig(_LeavesStates, ViewCopyConfig):
    """For a state with its heads side by side."""


def _reads_state(node: torch.fx.Node) -> bool:
    """Whether the node takes part of, or another shape of, what a custom operator wrote in its place."""
    source = node.args[0]
    while isinstance(source, torch.fx.Node) and source.op == "call_function" and _operator(source) in _SEEN_AS:
        source = source.args[0]
    written = torch.ops.higher_order.auto_functionalized_v2, torch.ops.higher_order.auto_functionalized
    return isinstance(source, torch.fx.Node) and source.target in written


_SEEN_AS = frozenset({"getitem", "view_copy", "slice_copy"})
_OWN_CONFIGS = {
    GeluConfig: ExactGeluConfig,
    ConvolutionConfig: OneAxisConvolutionConfig,
    SliceCopyConfig: OwnSliceConfig,
    ViewCopyConfig: OwnViewConfig,
}
CONFIGS = [_OWN_CONFIGS.get(config, config) for config in ALL_PARTITIONER_CONFIGS]
"""XNNPACK's own rules, with ours in the place of some."""


class Partitioner(XnnpackPartitioner):
    """XNNPACK's own choice of parts, with fewer passes over those of plain operators."""

    # What XNNPACK's serializer takes as it is: its seventeen passes, each of which traces the part, change nothing.
    _PLAIN = frozenset({
        "linear", "bmm", "add", "sub", "mul", "div", "neg", "exp", "sqrt", "rsqrt", "sigmoid", "tanh", "gelu",
        "_softmax", "view_copy", "permute_copy", "slice_copy", "clone", "maximum", "minimum",
    })  # fmt: skip

    def partition(self, exported_program: torch.export.ExportedProgram) -> PartitionResult:
        """`exported_program` with its parts tagged, and the passes that each needs."""
        # Past the parent's own, which only warns that it isn't called from `to_edge_transform_and_lower`.
        result = super(XnnpackPartitioner, self).partition(exported_program)
        graphs = [exported_program.graph]
        # ExecuTorch lowers what is tagged in branches too, but its partitioner looks at a program's own graph only.
        for name, branch in _branches(exported_program.graph_module):
            for part in filter(_multiplies, self.generate_partitions(_program_of(branch, exported_program))):
                tag = f"{name}_{part.id}"
                result.partition_tags[tag] = self.delegation_spec
                for node in part.nodes:
                    node.meta["delegation_tag"] = tag
            graphs.append(branch.graph)
        targets: dict[str, set[str]] = {}
        for node in (node for graph in graphs for node in graph.nodes):
            if "delegation_tag" in node.meta and node.op == "call_function":
                targets.setdefault(node.meta["delegation_tag"], set()).add(_operator(node))
        for tag, names in targets.items():
            if names <= self._PLAIN:
                # By this key XNNPACK runs the pass for linear layers alone.
                spec = [CompileSpec("dqlinear_partitioner", b"")]
                result.partition_tags[tag] = DelegationSpec(self.delegation_spec.backend_id, spec)
        return result

    def generate_partitions(self, ep: torch.export.ExportedProgram) -> list[Any]:
        """The parts that are worth it, without those that would wait for one another, which lowering fails on."""
        return parts_in_order([part for part in super().generate_partitions(ep) if self.worth(part)], ep.graph)

    def worth(self, part: Any) -> bool:
        """Whether XNNPACK is to get the part."""
        del part
        return True

    def whole(self, program: torch.export.ExportedProgram) -> list[Any]:
        """The operators that XNNPACK takes whole, wherever they stand in `program`."""
        operators, takes = self.ops_to_not_decompose(program)
        refused = {node.target for node in program.graph.nodes if takes is not None and not takes(node)}
        return [operator for operator in operators if operator not in refused]


class ProductPartitioner(Partitioner):
    """Hands XNNPACK the parts that hold a matrix product or a convolution, and no others.

    Every part costs lowering, and a call at run time that only products pay for; a decoder whose state goes in and out
    falls into dozens.
    """

    def worth(self, part: Any) -> bool:
        """Whether the part does more than move and add."""
        return _multiplies(part)


_PRODUCTS = frozenset({"linear", "addmm", "mm", "bmm", "convolution"})


def _multiplies(part: Any) -> bool:
    """Whether a part holds a matrix product or a convolution."""
    return any(node.op == "call_function" and _operator(node) in _PRODUCTS for node in part.nodes)


def _branches(module: torch.fx.GraphModule, within: str = "branch") -> Iterator[tuple[str, torch.fx.GraphModule]]:
    """The bodies of control flow in `module`, and those inside them, each with a name of its own."""
    for name, branch, _ in get_control_flow_submodules(module):
        yield f"{within}_{name}", branch
        yield from _branches(branch, f"{within}_{name}")


def _program_of(branch: torch.fx.GraphModule, program: torch.export.ExportedProgram) -> Any:
    """A branch as the rules see a program: one that has no weights of its own, whatever its inputs are called."""
    none: dict[str, str] = {}
    signature = SimpleNamespace(
        inputs_to_parameters=none, inputs_to_buffers=none, inputs_to_lifted_tensor_constants=none,
        buffers_to_mutate=none, non_persistent_buffers=(),
    )  # fmt: skip
    return SimpleNamespace(
        graph_module=branch, graph=branch.graph, graph_signature=signature, state_dict={}, constants={},
        range_constraints=program.range_constraints,
    )  # fmt: skip


def parts_in_order(parts: list[Any], graph: torch.fx.Graph) -> list[Any]:
    """Those of `parts` that can be computed each in one piece, one after another; the first ones where not all can."""
    if _in_order(parts, graph):
        return parts
    kept: list[Any] = []
    for part in parts:
        if _in_order([*kept, part], graph):
            kept.append(part)
    return kept


def _in_order(parts: Iterable[Any], graph: torch.fx.Graph) -> bool:
    owners = {node: number for number, part in enumerate(parts) for node in part.nodes}
    needs: dict[Any, set[Any]] = {}
    for node in graph.nodes:
        own = owners.get(node, node)
        # Each part gets the weights that it reads, so that they tie none to another.
        sources = {owners.get(item, item) for item in node.all_input_nodes if item.op != "placeholder"}
        if node.op != "placeholder":
            needs.setdefault(own, set()).update(sources - {own})
    try:
        TopologicalSorter(needs).prepare()
    except CycleError:
        return False
    return True


def _operator(node: torch.fx.Node) -> str:
    """The name of a node's operator, without its namespace and overload."""
    return format_target_name(cast(Any, node.target).__name__).partition(".")[0]
