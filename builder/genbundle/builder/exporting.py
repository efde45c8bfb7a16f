"""The only module that touches transformers.exporters: captures, preparers, and lowering one module to one program.

transformers.exporters is experimental and its versions are pinned in pyproject.toml; everything that a change there
could break is behind these few functions.
"""

import copy
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import PreTrainedModel
from transformers.exporters.configs import DynamoConfig, OnnxConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.utils import decompose_prefill_decode, prepare_for_export

from genbundle.builder.cut import attribute
from genbundle.builder.generation_config import greedy_config
from genbundle.builder.guards import Axes, HoldsFrom, expect_free, expect_open, largest
from genbundle.builder.noise import quiet
from genbundle.builder.passes.complex_axes import add_axes_to_parts
from genbundle.builder.passes.computed_numbers import compute_numbers
from genbundle.builder.passes.empty_views import make_empty_views
from genbundle.builder.passes.idle_squeezes import remove_idle_squeezes
from genbundle.builder.passes.small_addends import keep_small_addends
from genbundle.builder.symbolic import open_numbers, open_sizes
from genbundle.bundles import UnsupportedModelError

if TYPE_CHECKING:
    import onnx_ir

FREE_AXES = frozenset({"batch", "sequence", "past", "capacity"})
_BLOCKS = re.compile(r"blocks_times(\d+)")
MODEL_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError)
"""What a model's own code raises where it can't take its inputs."""


def decompose(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The forward kwargs of the prompt and of one step, captured from a real `model.generate(**inputs)`.

    Raises UnsupportedModelError when generate refuses the inputs or never calls the model's own forward.
    """
    with quiet():
        try:
            # Sampling would draw different tokens in each capture, and beams would multiply the batch.
            config = greedy_config(model)
            if getattr(config, "lang_to_id", None):
                # A language that isn't given is detected, in a call of the forward that is none of the generation's.
                config.language, config.return_timestamps = next(iter(config.lang_to_id)), False
            stages = decompose_prefill_decode(model, dict(inputs), generation_config=config)
        except RuntimeError as error:
            cause = error.__cause__ or error
            raise UnsupportedModelError(
                f"{type(model).__name__}.generate refuses the inputs {sorted(inputs)}: {first_line(cause)}"
            ) from error
    return stages["prefill"][1], stages["decode"][1]


def prepare_inputs(module: torch.nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` with the integer tensors added that upstream computes before tracing (patch grids to positions ...)."""
    with quiet(), torch.no_grad():
        _, prepared, _ = prepare_for_export(module, copy.deepcopy(dict(inputs)))
    return dict(prepared)


class _ProgramExporter(DynamoExporter):
    """Upstream's exporter, with a look at the program before anything is made of it."""

    passes: ClassVar[tuple[Callable[[Any], bool], ...]] = ()

    def __init__(self, axes: Axes, longest: int | None, least: int):
        super().__init__()
        self._axes, self._longest, self._least = axes, longest, least
        self.largest: dict[str, int] = {}

    def export_program(self, model: Any, sample_inputs: Any, config: Any) -> Any:
        """Refuse a program that holds for some sizes only."""
        program, metadata = super().export_program(model, sample_inputs, config=config)
        expect_free(program, self._axes, self._longest)
        self.largest = largest(program, self._axes)
        expect_open(program, model, dict(sample_inputs), self._axes, self._longest, self._least)
        for modify in self.passes:
            modify(program)
        return program, metadata


class _GraphExporter(OnnxExporter, _ProgramExporter):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The same for ONNX, whose exporter converts what the one before it gives."""

    passes = (compute_numbers, add_axes_to_parts, keep_small_addends, remove_idle_squeezes, make_empty_views)


def to_exported_program(
    module: Any,
    sample: dict[str, torch.Tensor],
    axes: Axes,
    longest: int | None,
    most: Mapping[str, int] | None = None,
    least: int = 1,
) -> Any:
    """`module(**sample)` as a torch.export ExportedProgram, dynamic along `axes` only, for `least` to `longest` tokens.

    most: the largest size of the axes of a name, where an engine plans its memory by them; without it there is none.
    """
    # A copy of the sample, here and below: upstream's preparation writes into the dict that it is given.
    return _dynamic(
        module,
        sample,
        axes,
        lambda shapes: (
            _ProgramExporter(axes, longest, least)
            .export(module, dict(sample), DynamoConfig(dynamic_shapes=shapes))
            .program
        ),
        most or {},
    )


def to_onnx(
    module: Any,
    sample: dict[str, torch.Tensor],
    axes: Axes,
    longest: int | None,
    provider: str | None,
    least: int = 1,
) -> "onnx_ir.Model":
    """The same as an ONNX model, fused for `provider` ("cpu", "cuda" or None), with `guards.largest` in its `meta`."""

    def export(shapes: dict) -> Any:
        exporter = _GraphExporter(axes, longest, least)
        options: Any = OnnxConfig(dynamic_shapes=shapes, ort_fusions=provider)  # pyright: ignore
        model = exporter.export(module, dict(sample), options).program
        model.meta["largest"] = exporter.largest
        return model

    return _dynamic(module, sample, axes, export, {})


def _dynamic(
    module: Any,
    sample: Mapping[str, torch.Tensor],
    axes: Axes,
    export: Callable[[dict], Any],
    most: Mapping[str, int],
) -> Any:
    """`export` with the axes' shapes: first with one symbol for the axes of one name, which spares the solver most of
    its work and is checked strictly. Code that branches on sizes may leave a condition that always holds and that the
    solver can't prove: then every axis has a symbol of its own, and whether it stayed dynamic is for the caller to see.
    """
    with quiet(), _without_checks(), _without_moves(), without_size_of_kernels(), open_sizes(module):
        try:
            return _tried(sample, axes, export, most)
        except HoldsFrom:
            raise
        except UnsupportedModelError as error:
            try:
                with open_numbers(module):
                    return _tried(sample, axes, export, most)
            except Exception:  # the first one says more
                raise error from error.__cause__


def _tried(
    sample: Mapping[str, torch.Tensor], axes: Axes, export: Callable[[dict], Any], most: Mapping[str, int]
) -> Any:
    try:
        return export(_shapes(sample, axes, FREE_AXES, most))
    except Exception as error:  # upstream wraps what torch raises
        causes = [str(item) for item in (error, error.__cause__, error.__context__)]
        fixed = next((line for text in causes for line in text.splitlines() if "to be a constant" in line), None)
        if fixed is not None:
            raise UnsupportedModelError(f"the model's code fixes a size: {fixed.strip(' -')}") from error
        # The second is what torch's search for better bounds ends in where there are none.
        if not any("Constraints violated" in text or "inconsistent min" in text for text in causes):
            raise
    return export(_shapes(sample, axes, frozenset(), most))


def without_size_of_kernels() -> AbstractContextManager[Any]:
    """Without oneDNN: a traced convolution asks which kernel PyTorch would take, for which oneDNN goes by how many
    numbers the input has, and the answer for the sample's would bound its sizes."""
    return torch.backends.mkldnn.flags(enabled=False)


@contextmanager
def _without_checks() -> Iterator[None]:
    """Without the models' own checks of their inputs, by transformers' switch for them (`torch_compilable_check`).

    They compare counts of placeholder tokens, on which tracers fail; the runtime checks those itself.
    """
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _without_moves() -> Iterator[None]:
    """Modules that are moved in a forward to the dtype and device that they have stay untouched.

    A tracer's stand-ins for parameters can't be swapped for others, which `Module.to` does (Switch Transformers).
    """
    original: Any = torch.nn.Module.to

    def to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        kept = (item for item in (*module.parameters(), *module.buffers()) if item.is_floating_point())
        there = all(item.dtype == (dtype or item.dtype) for item in kept)
        return module if there and device is None else original(module, *args, **kwargs)

    with attribute(torch.nn.Module, "to", to):
        yield


def _shapes(
    sample: Mapping[str, torch.Tensor], axes: Axes, free: frozenset[str], most: Mapping[str, int]
) -> dict[str, dict[int, Any]]:
    # Any other axis may follow from others (total = past + new), which torch.export derives but refuses of a symbol of
    # its own.
    names = {symbol for item in axes.values() for symbol in item.values()}
    auto = torch.export.Dim.AUTO
    symbols: dict[str, Any] = {name: auto(max=most[name]) if name in most else auto for name in names - free}
    symbols |= {name: torch.export.Dim(name, max=most.get(name)) for name in names & free}
    if free:
        symbols |= _blocks(names, most)
    return {name: {axis: symbols[symbol] for axis, symbol in axes.get(name, {}).items()} for name in sample}


def _blocks(names: Collection[str], most: Mapping[str, int]) -> dict[str, Any]:
    """The axes of blocks and of what they consist of, one from the other: else the tracer knows no bound of a size that
    it computes from both, and an engine that plans its memory by bounds would take the sample's."""
    found = next((match for name in names if (match := _BLOCKS.fullmatch(name))), None)
    if found is None or "blocks" not in names or not most:
        return {}
    each = int(found[1])
    blocks = torch.export.Dim("blocks", max=-(-most[found[0]] // each))
    return {"blocks": blocks, found[0]: each * blocks}


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
