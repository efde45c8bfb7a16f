"""From captures to the programs of a backend: which components a model becomes, and which format takes them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from genbundle.builder.also import EMBEDDED, expect_fed
from genbundle.builder.buffers import with_buffers
from genbundle.builder.components import Component, one_sequence
from genbundle.builder.embedded import NotSimpleError
from genbundle.builder.encoder_decoder import encoder_decoder_components
from genbundle.builder.experts import dense_experts
from genbundle.builder.exporting import MODEL_ERRORS, first_line
from genbundle.builder.formats import Exported
from genbundle.builder.formats.onnx import export_onnx
from genbundle.builder.fused import decoder_components
from genbundle.builder.generation_config import describe_generation
from genbundle.builder.inner import capture_calls, inner_turn_components
from genbundle.builder.plan import Capture, make_plan
from genbundle.builder.precision import Precisions
from genbundle.builder.programs import SMALL_CHUNK
from genbundle.builder.samples import padded_single
from genbundle.builder.stock_runners import MULTIMODAL_RUNNER, SEQ2SEQ_RUNNER, TEXT_RUNNER
from genbundle.builder.turns import turn_components
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import CAPACITY, Flow, Manifest, Runner
from genbundle.runtime.inputs import TEXT_INPUTS


def _components(
    model: PreTrainedModel, captures: list[Capture], capacity: int | None, *, fuse: bool, embedded: bool = False
) -> tuple[list[Component], Flow, tuple[str, ...]]:
    """The programs to be of a model whose state goes in and out of them, how they are called, and what to know."""
    if model.config.is_encoder_decoder:
        return encoder_decoder_components(model, captures, capacity)
    try:
        return *decoder_components(model, captures, fuse=fuse, capacity=capacity, embedded=embedded), ()
    except NotSimpleError:
        raise
    except UnsupportedModelError as error:
        if any("mm_encoder_outputs" in item.prompt for item in captures):
            raise
        if captures[0].inner is None:
            components, flow, notes = turn_components(model, [item.inputs for item in captures], error)
        else:
            components, flow, notes = inner_turn_components(model, captures, error)
        return components, replace(flow, capacity=capacity), notes


def _explicit(
    format_name: str,
    model: PreTrainedModel,
    captures: list[Capture],
    capacity: int | None,
    folder: Path,
    announce: Callable[[str], None],
    *,
    precisions: Precisions,
    also: Sequence[str] = (),
    refusal: Exception | None = None,
) -> Exported:
    """The backends whose programs take and return their state: ONNX and torch.export.

    refusal: why a GPU's steps can't have fixed sizes.
    """
    embedded = EMBEDDED in also
    try:
        components, flow, notes = _components(model, captures, capacity, fuse=format_name == "cpu", embedded=embedded)
    except NotSimpleError as error:
        raise UnsupportedModelError(f"{EMBEDDED} can't run it: {error}") from error
    expect_fed(also, components, flow)
    if all(len(item.inputs.get("input_ids", ())) == 1 for item in captures):  # rows.one_at_a_time
        components = [one_sequence(component) for component in components]
    components = [replace(component, longest=capacity) for component in components]
    if format_name == "cuda" and refusal is None:
        components = with_buffers(components)  # last, since what takes a component's place is as it is here
    if flow.chunk is not None and precisions.language_model != "fp32":
        flow = replace(flow, chunk=SMALL_CHUNK)
    if format_name == "torch":
        from genbundle.builder.formats.torch_export import export_torch

        exported = export_torch(components, folder, announce, precisions)
    else:
        exported = export_onnx(components, folder, format_name, announce, precisions, shared=bool(also))
    if format_name == "cuda" and not any(CAPACITY in entry.shape for entry in exported.state):
        why = "" if refusal is None else f": {refusal}"
        notes = (*notes, f"its state isn't in buffers of a fixed size, so that no CUDA graph records its steps{why}")
    return _with_flow(exported, flow, notes)


def _with_flow(exported: Exported, flow: Flow, notes: tuple[str, ...]) -> Exported:
    """`exported` called by `flow`, without routes through programs that it doesn't have."""
    there = {program.name for program in exported.programs}
    routes = tuple(route for route in flow.prompt if there.issuperset(route.programs))
    return replace(exported, flow=replace(flow, prompt=routes), notes=(*exported.notes, *notes))


def _executorch(
    model: PreTrainedModel,
    captures: list[Capture],
    capacity: int | None,
    folder: Path,
    announce: Callable[[str], None],
    *,
    precisions: Precisions,
) -> Exported:
    """One .pte for ExecuTorch: with its state inside, or, for a model that can't have that, in and out of it."""
    assert capacity is not None  # limits_of
    try:
        with dense_experts(model):
            return _stateful(model, captures, capacity, folder, announce, precisions)
    except UnsupportedModelError as error:
        refusal = error
    except MODEL_ERRORS as error:
        why = f"its code fails with another cache and mask than its own: {type(error).__name__}"
        refusal = UnsupportedModelError(f"language_model: {why}: {first_line(error)}")
    return _state_outside(model, captures, capacity, folder, announce, refusal=refusal, precisions=precisions)


def _state_outside(
    model: PreTrainedModel,
    captures: list[Capture],
    capacity: int | None,
    folder: Path,
    announce: Callable[[str], None],
    *,
    refusal: Exception,
    precisions: Precisions,
) -> Exported:
    """One .pte whose methods take and return the state.

    refusal: why it can't be kept inside.
    """
    from genbundle.builder.formats.executorch import PROGRAM_FILE
    from genbundle.builder.formats.executorch_explicit import export_explicit

    assert capacity is not None  # limits_of
    try:
        with dense_experts(model):
            components, flow, notes = _components(model, _with_single(model, captures), capacity, fuse=False)
            exported = export_explicit(components, capacity, folder / PROGRAM_FILE, announce, precisions)
    except (UnsupportedModelError, *MODEL_ERRORS) as error:
        own = isinstance(error, UnsupportedModelError)
        why = error if own else f"its code fails for one sequence: {type(error).__name__}: {first_line(error)}"
        raise UnsupportedModelError(f"{why}; nor can its state be kept inside the program: {refusal}") from error
    exported = _with_flow(exported, replace(flow, batch=1), notes)
    media = any(route.needs for route in exported.flow.prompt)
    name = SEQ2SEQ_RUNNER if model.config.is_encoder_decoder else MULTIMODAL_RUNNER if media else TEXT_RUNNER
    runner = Runner(name=name, obstacle="its methods take and return the state, which the runner leaves inside them")
    note = (
        "every call takes the whole state and returns it, which ExecuTorch's own runners don't do: "
        f"it can't be kept inside the program ({refusal})"
    )
    return replace(exported, notes=(note, *exported.notes), runners=(runner,))


def _with_single(model: PreTrainedModel, captures: list[Capture]) -> list[Capture]:
    """`captures` with one sequence first, for programs of one sequence with content (pictures) in it."""
    sample = captures[-1].inputs
    content = [name for name in sample if name not in TEXT_INPUTS]
    if not content or len(sample.get("input_ids", ())) != 1:
        return captures
    return [*capture_calls(model, [padded_single(model, [item.inputs for item in captures])]), *captures]


def _stateful(
    model: PreTrainedModel, captures: list[Capture], capacity: int, folder: Path, announce: Callable[[str], None],
    precisions: Precisions,
) -> Exported:  # fmt: skip
    """One .pte that keeps its state inside."""
    from genbundle.builder.formats.executorch import PROGRAM_FILE, export_executorch

    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(model).__name__} has an encoder and a decoder")
    if captures[0].inner is not None:
        raise UnsupportedModelError(f"{type(model).__name__}: its generate calls a model inside")
    plan = make_plan(model, captures)
    announce("export the methods")
    return export_executorch(
        model,
        max_length=capacity,
        eos_token_ids=describe_generation(model).eos_token_ids,
        captures=captures,
        positions=plan.step.sources.get("position_ids") if plan.step.position_axes else None,
        path=folder / PROGRAM_FILE,
        precisions=precisions,
    )


EXPORTERS: dict[str, Callable[..., Exported]] = {
    "cpu": partial(_explicit, "cpu"),
    "cuda": partial(_explicit, "cuda"),
    "torch": partial(_explicit, "torch"),
    "xnnpack": _executorch,
}
"""backend -> `export(model, captures, capacity, folder, announce, precisions=)`."""

_OTHERWISE: dict[str, Callable[..., Exported]] = {"xnnpack": _state_outside, "cuda": EXPORTERS["cuda"]}


def otherwise(manifest: Manifest) -> Callable[..., Exported] | None:
    """The same with `refusal=`, for a model whose bundle failed its verification with its state kept as here: inside
    a .pte, or in buffers of a fixed size. None where there is no other way."""
    buffered = any(CAPACITY in entry.shape for entry in manifest.state)
    there_is = buffered if manifest.backend == "cuda" else not manifest.state
    return _OTHERWISE.get(manifest.backend) if there_is else None
