"""From modules to one .pte: torch.export, XNNPACK partitioning, memory planning, streamed to the file.

Imports ExecuTorch (and with it torchao) at module level: import this module inside functions only.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.config import (
    gemm_configs,
    generic_node_configs,
    node_configs,
    xnnpack_config,
)
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge,
)
from executorch.exir.backend.utils import is_same_node
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.passes.constant_prop_pass import constant_prop_pass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers torch.ops.llama.*
from executorch.kernels import quantized  # noqa: F401  registers the kernels of rounded tables
from executorch.runtime import Runtime
from torch._subclasses.fake_impls import op_implementations_dict

from genbundle.builder.exporting import without_size_of_kernels
from genbundle.builder.formats.executorch_partitioning import CONFIGS, Partitioner
from genbundle.builder.passes.complex_pairs import pair_complex_numbers
from genbundle.builder.passes.computed_weights import multiply_by_computed_weights
from genbundle.builder.passes.missing_kernels import replace_missing_kernels
from genbundle.builder.passes.state_prefixes import PrefixesInPlace
from genbundle.builder.stateful import StatefulDecoder
from genbundle.builder.stateful_encoder import MediaEncoder
from genbundle.bundles import UnsupportedModelError


def lower_methods(methods: Mapping[str, Any], constants: Mapping[str, Any], path: Path) -> dict[str, int]:
    """What `executorch.lower` does, with ExecuTorch imported."""
    return lower_programs({name: _export(name, method) for name, method in methods.items()}, constants, path)


def lower_programs(
    programs: Mapping[str, torch.export.ExportedProgram],
    constants: Mapping[str, Any],
    path: Path,
    partitioner: type[Partitioner] = Partitioner,
) -> dict[str, int]:
    """Lower exported programs, by the names of their methods, and write them to `path` as one .pte.

    Returns the bytes of memory that are planned for each method, its state among them. partitioner: says which parts
    XNNPACK gets.
    """
    for program in programs.values():
        pair_complex_numbers(program)
    any_rounded = any(_is_rounded(program) for program in programs.values())
    programs = {name: _unwrapped(program) if _is_rounded(program) else program for name, program in programs.items()}
    programs = {name: replace_missing_kernels(program) for name, program in programs.items()}
    for program in programs.values():
        multiply_by_computed_weights(program)
    try:
        # Without gradients: branches of control flow that read a number out of a tensor can't be traced with them.
        with _uncopied(programs.values()), _places_in_rows(), without_size_of_kernels(), torch.no_grad():
            # `to_edge_transform_and_lower` would trace every program once or twice more, to ask what to keep whole.
            chosen = partitioner(CONFIGS)
            kept = [set(chosen.whole(program)) for program in programs.values()]
            settings = EdgeCompileConfig(
                _check_ir_validity=False, _skip_dim_order=True, preserve_ops=list(set.intersection(*kept))
            )
            edge = to_edge(dict(programs), dict(constants), settings).to_backend(chosen)
            if any_rounded:
                _keep_parts_of_branches(edge)
            program = edge.to_executorch(
                ExecutorchBackendConfig(
                    # Inputs are used where they are; a dynamic axis needs the constraint-based evaluation.
                    memory_planning_pass=PrefixesInPlace(alloc_graph_input=False),
                    sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
                    # Tables of rounded weights become ExecuTorch's own operators for them.
                    do_quant_fusion_and_const_prop=any_rounded,
                )
            )
    except Exception as error:
        raise UnsupportedModelError(
            f"ExecuTorch can't lower the methods {', '.join(programs)}: {_first_line(error)}: build for another "
            "backend, for instance cpu"
        ) from error
    _expect_kernels(program)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # one that failed its check may still be mapped
    with path.open("wb") as file:
        program.write_to_file(file)
    planned = {plan.name: sum(plan.non_const_buffer_sizes) for plan in program.executorch_program.execution_plan}
    _release(edge)
    return planned


def _keep_parts_of_branches(edge: EdgeProgramManager) -> None:
    """Name the parts that XNNPACK got of branches in the graphs around them.

    ExecuTorch's fusion of rounded tables removes modules that its graph doesn't name, and with them those that only a
    branch does (`GraphModule.delete_all_unused_submodules` in torch 2.13's torch/fx/graph_module.py, by
    `subgraph_rewriter.replace_pattern`). It removes these names too, when it is done. To go with a torch that looks
    into the graphs of modules that are named.
    """
    for name in edge.methods:
        module = edge.exported_program(name).graph_module
        with module.graph.inserting_before(next(iter(module.graph.nodes))):
            for path, part in module.named_modules():
                if isinstance(part, LoweredBackendModule) and "." in path:
                    module.graph.get_attr(path)


def _is_rounded(program: torch.export.ExportedProgram) -> bool:
    """Whether weights of the program are torchao's tensors."""
    return any(str(node.target).startswith("torchao.") for node in program.graph.nodes)


def _unwrapped(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """`program` with the parts of rounded weights as weights of its own, as XNNPACK reads them, and with look-ups as
    ExecuTorch's operators for rounded tables have them, which know no padding (it only concerns gradients)."""
    program = program.run_decompositions({})
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.embedding.default:
            node.args, node.kwargs = node.args[:2], {}
    return program


def _expect_kernels(program: ExecutorchProgramManager) -> None:
    """UnsupportedModelError, naming the method, for operators that the ExecuTorch installed here has no kernels for."""
    known = set(Runtime.get().operator_registry.operator_names)
    for plan in program.executorch_program.execution_plan:
        names = {f"{item.name}.{item.overload}" if item.overload else item.name for item in plan.operators}
        missing = sorted(names - known)
        if missing:
            raise UnsupportedModelError(
                f"{plan.name}: ExecuTorch has no kernel for {', '.join(missing)}: build for another backend, for "
                "instance cpu"
            )


def _export(name: str, method: Any) -> torch.export.ExportedProgram:
    replaced = isinstance(method.module, StatefulDecoder | MediaEncoder)
    try:
        with torch.no_grad(), method.module.exporting() if replaced else nullcontext():
            program = torch.export.export(
                method.module.eval(), method.args, dynamic_shapes=method.dynamic_shapes, strict=False
            )
            return _folded(program) if method.fold_constants else program
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"torch.export can't trace the method {name!r} of {type(method.module).__name__}: {_first_line(error)}: "
            "build for another backend, for instance cpu"
        ) from error


def _folded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """`program` with what doesn't depend on its inputs computed, but for rounded weights, which would be float32."""
    parts: Any = torch.ops.export.access_subclass_inner_tensor.default
    return constant_prop_pass(program, custom_skip_targets={parts})


@contextmanager
def _uncopied(programs: Iterable[torch.export.ExportedProgram]) -> Iterator[None]:
    """While open, copying a program shares its weights: ExecuTorch deep-copies programs, which nothing writes into.

    Without it a build needs the model's size once more, and a tied embedding's besides.
    """
    weights = {id(weight): weight for program in programs for weight in program.state_dict.values()}
    for weight in weights.values():
        weight.__deepcopy__ = lambda _memo, weight=weight: weight
    try:
        yield
    finally:
        for weight in weights.values():
            del weight.__deepcopy__


@contextmanager
def _places_in_rows() -> Iterator[None]:
    """While open, tracers take the places that `nonzero` finds to lie row by row, as ExecuTorch's kernel puts them.

    PyTorch's own lie column by column, which would be planned for, and ExecuTorch's slices refuse what lies otherwise
    than their outputs. Remove with https://github.com/pytorch/executorch/issues/11086.
    """
    operator = torch.ops.aten.nonzero.default
    own = op_implementations_dict[operator]

    def nonzero(*args: Any) -> Any:
        found = own(*args)
        return found.new_empty(found.shape)

    op_implementations_dict[operator] = nonzero
    try:
        yield
    finally:
        op_implementations_dict[operator] = own


def _release(edge: EdgeProgramManager) -> None:
    """Free what lowering made, once it is in the file; else the weights would stay in memory, and their bytes besides.

    Two kinds of caches keep their contents until the process ends. PyTorch's (of fake tensors and symbolic shapes) hold
    lowered parts, which are emptied here. ExecuTorch's hold nodes, each with its graph: all that it ever compared
    (https://github.com/pytorch/executorch/pull/148), and the last that each file of configurations refused.
    """
    for name in edge.methods:
        for part in edge.exported_program(name).graph_module.modules():
            if isinstance(part, LoweredBackendModule):
                part.original_module.state_dict.clear()
                if part.named_data_store_output is not None:
                    part.named_data_store_output.buffers.clear()
    is_same_node.cache_clear()
    for module in (gemm_configs, generic_node_configs, node_configs, xnnpack_config):
        module.why.node = None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
