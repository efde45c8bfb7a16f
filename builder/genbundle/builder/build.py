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

from genbundle.builder.also import check_also, complete, expect_generation
from genbundle.builder.backends import EXPORTERS, OTHERWISE
from genbundle.builder.conditioning import with_rounding
from genbundle.builder.exporting import first_line
from genbundle.builder.formats import Exported
from genbundle.builder.image_text import feature_token
from genbundle.builder.inner import capture_calls, observed_generation
from genbundle.builder.limits import Limits, limits_of
from genbundle.builder.loading import Loaded, borrowed, expect_unchanged, load, settings_of
from genbundle.builder.precision import Precisions, parse_precision
from genbundle.builder.processing import describe_generation, describe_images, describe_text
from genbundle.builder.progress import show_progress
from genbundle.builder.rows import mixes_rows, one_at_a_time
from genbundle.builder.samples import Samples, as_inputs, from_processor, make_samples, reaching
from genbundle.builder.stock_runners import asking, tried_runners
from genbundle.builder.verify import NEW_TOKENS, new_tokens, record, taken_by, unsupported, verify_staged
from genbundle.builder.weights import unique_bytes
from genbundle.bundles import BuildError, Bundle, EngineError, VerificationError
from genbundle.bundles.manifest import BACKENDS, FORMAT, FORMAT_VERSION, Images, Manifest
from genbundle.bundles.manifest import Model as ModelFacts
from genbundle.bundles.writer import check_target, new_bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a build was asked for; the manifest records it."""

    backend: str
    precision: str | dict[str, str] = "fp32"
    max_length: int | None = None
    verify: bool = True
    quality_floor: float | None = None
    also: tuple[str, ...] = ()


def build_bundle(
    model: PreTrainedModel | str | Path,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    backend: str = "cpu",
    *,
    output: str | Path | None = None,
    precision: str | Mapping[str, str] = "fp32",
    quality_floor: float | None = None,
    max_length: int | None = None,
    processor: Any = None,
    also: Sequence[str] = (),
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
        precision: "fp32", on "cpu", "xnnpack" and "torch" "int8" or "int4", on "cuda" "fp16": of the language model's
            weights, with its token embedding and its head. Encoders of pictures and sound, with their projectors, stay
            at fp32 unless they are named:
            `{"language_model": "int4", "encoder": "int8"}` (`image_encoder`, `audio_encoder`, `video_encoder` for one).
        quality_floor: of a lossy precision, the least share of new tokens on held-out inputs whose first choice has to
            be eager's, 0 for any; by default what `genbundle.builder.precision.FLOORS` says, which also bounds the
            mean KL divergence of each input.
        max_length: the most tokens (prompt and generated) that a bundle holds; the model's own limit by default.
        processor: the tokenizer or processor; loaded from the directory or hub id when None.
        also: other runtimes that shall open the same directory, of "cpu" bundles: "ort-genai" (ONNX Runtime GenAI),
            "transformers.js".
        overwrite: replace a bundle that is at `output`. Anything else there is kept and the build refused.
        verify: replay the bundle on held-out inputs and compare with eager; a mismatch fails the build.
        progress: True for a progress bar, False for silence, or a callable that gets each stage's name.

    Raises:
        BuildError: settings, inputs or an output that can't be used.
        UnsupportedModelError: a model whose generation can't be replayed exactly; names the component and the cause:
            at float32 the programs that gave other logits or tokens than eager on a held-out input, and which.
        VerificationError: the finished bundle came too far from eager at a lossy precision; nothing is kept.
    """
    settings = _check_settings(backend, precision, quality_floor, max_length, verify, also)
    precisions = parse_precision(precision, backend)
    floor = precisions.floor(quality_floor)
    if output is not None:
        check_target(Path(output).absolute(), overwrite=overwrite)
    given = as_inputs(inputs)
    with show_progress(progress, stages=8) as announce:
        announce("load the model")
        loaded = load(model, processor)
        measure = partial(with_rounding, model, sum(parameter.numel() for parameter in loaded.model.parameters()))
        target = Path(output) if output is not None else Path(f"{loaded.name.replace('/', '--')}-{backend}.bundle")
        with writing(target), new_bundle(target, overwrite=overwrite) as writer:
            with borrowed(loaded.model) as eager:
                before = settings_of(eager)
                limits = limits_of(eager, backend, max_length)
                given = given or from_processor(eager, loaded.processor)
                samples = make_samples(eager, given, limits)
                if mixes_rows(eager, samples):
                    samples = one_at_a_time(samples)
                export = partial(_export, loaded, samples, settings, precisions, limits, writer.path, announce)
                manifest = export(EXPORTERS[backend])
                held_out = samples.held_out | reaching(eager, given, samples, manifest, limits)
                room = None if limits.capacity is None else limits.capacity - NEW_TOKENS
                held_out |= asking(eager, manifest, writer.path, given, room)
                cases = [
                    record(eager, name, inputs, new_tokens(inputs, limits, lossy=precisions.lossy))
                    for name, inputs in (held_out.items() if settings.verify else ())
                    if taken_by(manifest, inputs)
                ]
                expect_unchanged(eager, before)
                if settings.verify and backend in OTHERWISE and not manifest.state:
                    announce("verify")
                    try:
                        manifest = verify_staged(cases, limits, manifest, writer, floor, measure)
                    except (VerificationError, EngineError) as error:
                        manifest = export(partial(OTHERWISE[backend], refusal=unsupported(error, writer.path)))
            # A model that the build loaded itself needs no memory beside the engine that opens the bundle.
            del loaded, eager, export
            gc.collect()
            if settings.verify and manifest.verification is None:
                announce("verify")
                try:
                    manifest = verify_staged(cases, limits, manifest, writer, floor, measure)
                except (VerificationError, EngineError) as error:
                    if floor is not None and isinstance(error, VerificationError):
                        raise
                    raise unsupported(error, writer.path) from error
            announce("publish")
            return writer.commit(manifest)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """BuildError for what the operating system refuses while the bundle is made."""
    try:
        yield
    except OSError as error:
        reason = "no space is left there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else first_line(error)
        raise BuildError(f"the bundle can't be written to {target}: {reason}; nothing was kept") from error


def _check_settings(
    backend: str, precision: str | Mapping[str, str], quality_floor: float | None, max_length: int | None,
    verify: bool, also: Sequence[str],
) -> Settings:  # fmt: skip
    if backend not in BACKENDS:
        raise BuildError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if quality_floor is not None and not 0 <= quality_floor <= 1:
        raise BuildError(f"quality_floor: expected a share from 0 to 1, got {quality_floor!r}")
    if max_length is not None and (type(max_length) is not int or max_length < 2):
        raise BuildError(f"max_length: expected an integer of at least 2, got {max_length!r}")
    given = precision if isinstance(precision, str) else dict(precision)
    return Settings(
        backend=backend, precision=given, max_length=max_length, verify=verify, quality_floor=quality_floor,
        also=check_also(also, backend),
    )  # fmt: skip


def _export(
    loaded: Loaded, samples: Samples, settings: Settings, precisions: Precisions, limits: Limits, folder: Path,
    announce: Callable[[str], None], exporter: Callable[..., Exported],
) -> Manifest:  # fmt: skip
    """Capture, explain and export; everything of the manifest but the verification."""
    model = loaded.model
    generation = describe_generation(model)
    runners = expect_generation(settings.also, generation, limits)
    announce("capture")
    captures = capture_calls(model, samples.capture)
    generation = observed_generation(generation, captures)
    announce("explain")
    other = {"also": settings.also} if settings.also else {}
    exported = exporter(model, captures, limits.capacity, folder, announce, precisions=precisions, **other)
    text = images = None
    if loaded.processor is not None:
        text = describe_text(loaded.processor, folder)
        images = describe_images(loaded.processor, model.config)
    flow = replace(exported.flow, restart=limits.restart)
    if samples.alone:
        flow = replace(flow, batch=1, alone=True)
    token = feature_token(model, captures)
    if token is not None and images is None:
        images = Images(input="pixel_values", reason="the bundle was built without the model's processor")
    if token is not None and images is not None and images.token_id is None:
        images = replace(images, token_id=token)
    model.config.to_json_file(folder / "config.json", use_diff=False)
    manifest = Manifest(
        format=FORMAT,
        version=FORMAT_VERSION,
        backend=settings.backend,  # pyright: ignore[reportArgumentType]
        precision=precisions.language_model,
        model=ModelFacts(
            architecture=type(model).__name__,
            name=loaded.name,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            weight_bytes=exported.weight_bytes or unique_bytes(model),
        ),
        flow=flow,
        programs=exported.programs,
        state=exported.state,
        weights=exported.weights,
        generation=generation,
        text=text,
        images=images,
        files={},
        notes=exported.notes,
        runners=exported.runners,
        packages=_packages(settings.backend, precisions),
        settings=asdict(settings),
    )
    manifest = replace(manifest, runners=tried_runners(manifest, folder))
    return complete(settings.also, manifest, runners, folder, model.config)


def _packages(backend: str, precisions: Precisions) -> dict[str, str]:
    names = {"cpu": ("onnxruntime", "onnxscript"), "cuda": ("onnxruntime", "onnxscript"), "xnnpack": ("executorch",)}
    rounding = ("torchao",) if precisions.lossy and backend in ("xnnpack", "torch") else ()
    return package_versions("transformers", "torch", *names.get(backend, ()), *rounding)


def package_versions(*names: str) -> dict[str, str]:
    """The versions of genbundle and of these packages, without what a build of them adds."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in ("genbundle", *names)}
