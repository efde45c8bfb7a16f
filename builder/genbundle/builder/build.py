"""build_bundle: the recipe in order. Load, capture, explain, export, verify, publish."""

import errno
import gc
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from genbundle.builder.components import Component
from genbundle.builder.encoder_decoder import encoder_decoder_components
from genbundle.builder.experts import dense_experts
from genbundle.builder.exporting import first_line, quiet
from genbundle.builder.formats import Exported
from genbundle.builder.formats.onnx import export_onnx
from genbundle.builder.fused import decoder_components
from genbundle.builder.image_text import image_token
from genbundle.builder.inner import capture_calls
from genbundle.builder.limits import Limits, limits_of
from genbundle.builder.loading import Loaded, borrowed, load
from genbundle.builder.plan import Capture, make_plan
from genbundle.builder.processing import describe_generation, describe_images, describe_text
from genbundle.builder.progress import show_progress
from genbundle.builder.samples import (
    Samples,
    as_inputs,
    from_processor,
    make_samples,
    padded_single,
)
from genbundle.builder.turns import turn_components
from genbundle.builder.verify import GOLDEN_LOGITS, record
from genbundle.bundles import BuildError, Bundle, EngineError, UnsupportedModelError, VerificationError
from genbundle.bundles.golden import GOLDEN_NAME, GoldenCase, write_golden
from genbundle.bundles.manifest import BACKENDS, FORMAT, FORMAT_VERSION, Flow, Images, Manifest, Verification
from genbundle.bundles.manifest import Model as ModelFacts
from genbundle.bundles.writer import BundleWriter, check_target, new_bundle
from genbundle.runtime import load_bundle
from genbundle.runtime.inputs import TEXT_INPUTS
from genbundle.runtime.verify import replay

PRECISIONS = {"cpu": ("fp32",), "cuda": ("fp32",), "xnnpack": ("fp32",), "torch": ("fp32",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a build was asked for; the manifest records it."""

    backend: str
    precision: str = "fp32"
    max_length: int | None = None
    verify: bool = True


def build_bundle(
    model: PreTrainedModel | str | Path,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    backend: str = "cpu",
    *,
    output: str | Path | None = None,
    precision: str = "fp32",
    max_length: int | None = None,
    processor: Any = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool | Callable[[str], None] = True,
) -> Bundle:
    """Export `model` for `backend` into one self-contained bundle, replay it and publish it at `output`.

    Args:
        model: a loaded generative model, a saved model's directory, or a hub id. A loaded model is not copied: it is
            put into eval mode and float32 on the CPU for the build, and is as before afterwards.
        inputs: generate kwargs to capture from (`input_ids` int64 `[batch, length]`, `pixel_values` ...), or several
            of them that differ in what shall be dynamic (picture sizes, counts); made up from the model's vocabulary
            or processor when None.
        backend: "cpu" or "cuda" (ONNX Runtime), "xnnpack" (ExecuTorch), "torch" (torch.export).
        output: the bundle's directory; `<model name>-<backend>.bundle` here by default.
        precision: of weights and computation; "fp32".
        max_length: the most tokens (prompt and generated) that a bundle holds; the model's own limit by default.
        processor: the tokenizer or processor; loaded from the directory or hub id when None.
        overwrite: replace a bundle that is at `output`. Anything else there is kept and the build refused.
        verify: replay the bundle on held-out inputs and compare with eager; a mismatch fails the build.
        progress: True for a progress bar, False for silence, or a callable that gets each stage's name.

    Raises:
        BuildError: settings, inputs or an output that can't be used.
        UnsupportedModelError: a model whose generation can't be replayed exactly; names the component and the cause.
        VerificationError: the finished bundle gave other tokens than eager; nothing is kept.
    """
    settings = _check_settings(backend, precision, max_length, verify)
    if output is not None:
        check_target(Path(output).absolute(), overwrite=overwrite)
    given = as_inputs(inputs)
    with show_progress(progress, stages=8) as announce:
        announce("load the model")
        loaded = load(model, processor)
        target = Path(output) if output is not None else Path(f"{loaded.name.replace('/', '--')}-{backend}.bundle")
        with _writing(target), new_bundle(target, overwrite=overwrite) as writer:
            with borrowed(loaded.model) as eager:
                limits = limits_of(eager, backend, max_length)
                samples = make_samples(eager, given or from_processor(eager, loaded.processor), limits)
                manifest = _export(loaded, samples, settings, limits, writer.path, announce)
                held_out = samples.held_out if settings.verify else {}
                cases = [record(eager, name, inputs) for name, inputs in held_out.items()]
            # A model that the build loaded itself needs no memory beside the engine that opens the bundle.
            del loaded, eager
            gc.collect()
            if settings.verify:
                announce("verify")
                manifest = _verify(cases, limits, manifest, writer)
            announce("publish")
            return writer.commit(manifest)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """BuildError for what the operating system refuses while the bundle is made."""
    try:
        yield
    except OSError as error:
        reason = "no space is left there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else first_line(error)
        raise BuildError(f"the bundle can't be written to {target}: {reason}; nothing was kept") from error


def _check_settings(backend: str, precision: str, max_length: int | None, verify: bool) -> Settings:
    if backend not in BACKENDS:
        raise BuildError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if precision not in PRECISIONS[backend]:
        raise BuildError(
            f"precision {precision!r} isn't available on {backend!r}: it can {', '.join(PRECISIONS[backend])}"
        )
    if max_length is not None and (type(max_length) is not int or max_length < 2):
        raise BuildError(f"max_length: expected an integer of at least 2, got {max_length!r}")
    return Settings(backend=backend, precision=precision, max_length=max_length, verify=verify)


def _export(
    loaded: Loaded, samples: Samples, settings: Settings, limits: Limits, folder: Path, announce: Callable[[str], None]
) -> Manifest:
    """Capture, explain and export; everything of the manifest but the verification."""
    model = loaded.model
    generation = describe_generation(model)
    announce("capture")
    captures = capture_calls(model, samples.capture)
    exported = _FORMATS[settings.backend](model, captures, limits.capacity, folder, announce)
    text = images = None
    if loaded.processor is not None:
        text = describe_text(loaded.processor, folder)
        images = describe_images(loaded.processor, model.config)
    token = image_token(captures)
    if token is not None and images is None:
        images = Images(input="pixel_values", reason="the bundle was built without the model's processor")
    if token is not None and images is not None and images.token_id is None:
        images = replace(images, token_id=token)
    model.config.to_json_file(folder / "config.json", use_diff=False)
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    return Manifest(
        format=FORMAT,
        version=FORMAT_VERSION,
        backend=settings.backend,  # pyright: ignore[reportArgumentType]
        precision=settings.precision,
        model=ModelFacts(
            architecture=type(model).__name__,
            name=loaded.name,
            parameters=sum(parameter.numel() for parameter in parameters),
            weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        ),
        flow=replace(exported.flow, restart=limits.restart),
        programs=exported.programs,
        state=exported.state,
        weights=exported.weights,
        generation=generation,
        text=text,
        images=images,
        files={},
        notes=exported.notes,
        packages=_packages(settings.backend),
        settings=asdict(settings),
    )


def _components(
    model: PreTrainedModel, captures: list[Capture], capacity: int | None, *, fuse: bool
) -> tuple[list[Component], Flow, tuple[str, ...]]:
    """The programs to be of a model whose state goes in and out of them, how they are called, and what to know."""
    if model.config.is_encoder_decoder:
        return *encoder_decoder_components(model, captures, capacity), ()
    try:
        return *decoder_components(model, captures, fuse=fuse, capacity=capacity), ()
    except UnsupportedModelError as error:
        if any(item.inner is not None or "mm_encoder_outputs" in item.prompt for item in captures):
            raise
        components, flow, notes = turn_components(model, [item.inputs for item in captures], error)
        return components, replace(flow, capacity=capacity), notes


def _explicit(
    format_name: str,
    model: PreTrainedModel,
    captures: list[Capture],
    capacity: int | None,
    folder: Path,
    announce: Callable[[str], None],
) -> Exported:
    """The backends whose programs take and return their state: ONNX and torch.export."""
    announce("explain")
    components, flow, notes = _components(model, captures, capacity, fuse=format_name == "cpu")
    components = [replace(component, longest=capacity) for component in components]
    if format_name == "torch":
        from genbundle.builder.formats.torch_export import export_torch

        exported = export_torch(components, folder, announce)
    else:
        exported = export_onnx(components, folder, format_name, announce)
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
) -> Exported:
    """One .pte for ExecuTorch: with its state inside, or, for a model that can't have that, in and out of it."""
    from genbundle.builder.formats.executorch import PROGRAM_FILE
    from genbundle.builder.formats.executorch_explicit import export_explicit

    announce("explain")
    assert capacity is not None  # limits_of
    with dense_experts(model):
        try:
            return _stateful(model, captures, capacity, folder, announce)
        except UnsupportedModelError as error:
            refusal = error
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
            why = f"its code fails with another cache and mask than its own: {type(error).__name__}"
            refusal = UnsupportedModelError(f"language_model: {why}: {first_line(error)}")
        try:
            components, flow, notes = _components(model, _with_single(model, captures), capacity, fuse=False)
            exported = export_explicit(components, capacity, folder / PROGRAM_FILE, announce)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error}; nor can its state be kept inside the program: {refusal}") from error
    exported = _with_flow(exported, replace(flow, batch=1), notes)
    note = (
        "every call takes the whole state and returns it, which ExecuTorch's own runners don't do: "
        f"it can't be kept inside the program ({refusal})"
    )
    return replace(exported, notes=(note, *exported.notes))


def _with_single(model: PreTrainedModel, captures: list[Capture]) -> list[Capture]:
    """`captures` with one sequence first, for programs of one sequence with content (pictures) in it."""
    sample = captures[-1].inputs
    content = [name for name in sample if name not in TEXT_INPUTS]
    if model.config.is_encoder_decoder or not content or len(sample["input_ids"]) != 1:
        return captures
    return [*capture_calls(model, [padded_single(model, sample)]), *captures]


def _stateful(
    model: PreTrainedModel, captures: list[Capture], capacity: int, folder: Path, announce: Callable[[str], None]
) -> Exported:
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
    )


_FORMATS: dict[str, Callable[..., Exported]] = {
    "cpu": partial(_explicit, "cpu"),
    "cuda": partial(_explicit, "cuda"),
    "torch": partial(_explicit, "torch"),
    "xnnpack": _executorch,
}


def _verify(cases: list[GoldenCase], limits: Limits, manifest: Manifest, writer: BundleWriter) -> Manifest:
    """Replay the staged bundle on what eager gave; the manifest with the report, the golden records written."""
    device = "cpu" if manifest.backend == "cuda" else None
    try:
        with quiet():  # an engine logs what it fails at
            runtime = load_bundle(writer.stage(manifest), device=device)
            checks = tuple(replay(runtime, case) for case in cases)
    except (VerificationError, EngineError) as error:
        # A tracer may fix a loop's length without a word: prompts then go through the step's program.
        simpler = without_optional_programs(manifest, error)
        if simpler is None:
            raise
        for file in {program.file for program in manifest.programs} - {program.file for program in simpler.programs}:
            (writer.path / file).unlink()
            (writer.path / file).with_suffix(".weights.json").unlink(missing_ok=True)
        manifest = simpler
        runtime = load_bundle(writer.stage(manifest), device=device)
        checks = tuple(replay(runtime, case) for case in cases)
    write_golden(writer.path / GOLDEN_NAME, [case.truncated(GOLDEN_LOGITS) for case in cases])
    pending = None
    if manifest.backend == "cuda":
        pending = "not run on the CUDA provider yet: `genbundle verify` on a machine with a GPU completes it"
    notes = manifest.notes
    longest = max(check.prompt_length + check.new_tokens for check in checks)
    missed = limits.not_reached(longest)
    if missed:
        notes += (f"verified on up to {longest} tokens: {' and '.join(missed)} was not reached",)
    report = Verification(provider=runtime.backend.device, checks=checks, pending=pending)
    return replace(manifest, verification=report, notes=notes)


def without_optional_programs(manifest: Manifest, error: Exception) -> Manifest | None:
    """The manifest without the prompt programs that another route can do without; None where none can."""
    flow = manifest.flow
    spare = {route.needs for route in flow.prompt if route.one_by_one}
    routes = tuple(route for route in flow.prompt if route.one_by_one or route.needs not in spare)
    if routes == flow.prompt:
        return None
    used = {*flow.step, *(name for route in routes for name in route.programs)}
    note = f"prompts go through the step's program token by token, since the prompt's own failed its check: {error}"
    return replace(
        manifest,
        flow=replace(flow, prompt=routes),
        programs=tuple(program for program in manifest.programs if program.name in used),
        notes=(*manifest.notes, first_line(RuntimeError(note))),
    )


def _packages(backend: str) -> dict[str, str]:
    names = {"cpu": ("onnxruntime", "onnxscript"), "cuda": ("onnxruntime", "onnxscript"), "xnnpack": ("executorch",)}
    used = ("genbundle", "transformers", "torch", *names.get(backend, ()))
    return {name: importlib.metadata.version(name).partition("+")[0] for name in used}
