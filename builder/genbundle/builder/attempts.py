"""One export of a model into a folder and its replay there; a build makes one, or at a lossy precision two."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from genbundle.builder.also import complete, expect_generation
from genbundle.builder.backends import EXPORTERS, otherwise
from genbundle.builder.formats import Exported
from genbundle.builder.image_text import feature_token
from genbundle.builder.inner import capture_calls, observed_generation
from genbundle.builder.limits import Limits
from genbundle.builder.loading import Loaded
from genbundle.builder.precision import Precisions, parse_precision
from genbundle.builder.processing import describe_generation, describe_images, describe_text
from genbundle.builder.samples import Inputs, Samples, reaching
from genbundle.builder.stock_runners import asking, tried_runners
from genbundle.builder.verify import (
    NEW_TOKENS,
    Measure,
    new_tokens,
    record,
    taken_by,
    unsupported,
    verify_staged,
    without_optional_programs,
)
from genbundle.builder.weights import unique_bytes
from genbundle.bundles import EngineError, VerificationError
from genbundle.bundles.golden import GoldenCase
from genbundle.bundles.manifest import FORMAT, FORMAT_VERSION, Images, Manifest
from genbundle.bundles.manifest import Model as ModelFacts
from genbundle.bundles.report import QualityFloor
from genbundle.bundles.writer import BundleWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a build was asked for; the manifest records it."""

    backend: str
    precision: str | dict[str, str] = "fp32"
    max_length: int | None = None
    verify: bool = True
    quality_floor: float | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Programs in a writer's folder with what they are to be replayed on, and the exporter that made them.

    lost: why optional programs were left out, since they failed their check.
    """

    manifest: Manifest
    cases: list[GoldenCase]
    exporter: Callable[..., Exported]
    lost: str | None = None

    def replayed(self, writer: BundleWriter, limits: Limits, floor: QualityFloor | None, measure: Measure) -> "Attempt":
        """With the report of its verification; VerificationError or EngineError where it fails."""
        manifest = verify_staged(self.cases, limits, self.manifest, writer, floor, measure)
        said = [note for note in manifest.notes if note not in self.manifest.notes]
        lost = said[0] if manifest.flow.prompt != self.manifest.flow.prompt else None
        return replace(self, manifest=manifest, lost=lost)


@dataclass(frozen=True)
class Exporting:
    """What all exports of one build have in common."""

    loaded: Loaded
    samples: Samples
    given: list[Inputs]
    settings: Settings
    limits: Limits
    measure: Measure
    announce: Callable[[str], None]

    def attempt(self, writer: BundleWriter, precisions: Precisions, exact: Attempt | None) -> Attempt:
        """Export, and replay what another exporter takes over where it fails.

        exact: the same at float32, whose exporter and cases are taken again.
        """
        exporter = exact.exporter if exact is not None else EXPORTERS[self.settings.backend]
        manifest = self._export(exporter, precisions, writer.path)
        if exact is not None:
            if exact.lost is not None:
                manifest = without_optional_programs(manifest, writer, exact.lost) or manifest
            return Attempt(manifest=manifest, cases=exact.cases, exporter=exporter)
        attempt = Attempt(manifest=manifest, cases=self._record(manifest, writer.path), exporter=exporter)
        other = otherwise(manifest)
        if other is None or not self.settings.verify:
            return attempt
        self.announce("verify")
        try:
            return attempt.replayed(writer, self.limits, None, self.measure)
        except (VerificationError, EngineError) as error:
            exporter = partial(other, refusal=unsupported(error, writer.path))
        return replace(attempt, manifest=self._export(exporter, precisions, writer.path), exporter=exporter)

    def _export(self, exporter: Callable[..., Exported], precisions: Precisions, folder: Path) -> Manifest:
        """Capture, explain and export; everything of the manifest but the verification."""
        model = self.loaded.model
        generation = describe_generation(model)
        runners = expect_generation(self.settings.also, generation, self.limits)
        self.announce("capture")
        captures = capture_calls(model, self.samples.capture)
        generation = observed_generation(generation, captures)
        self.announce("explain")
        other = {"also": self.settings.also} if self.settings.also else {}
        exported = exporter(
            model, captures, self.limits.capacity, folder, self.announce, precisions=precisions, **other
        )
        text = images = None
        if self.loaded.processor is not None:
            text = describe_text(self.loaded.processor, folder)
            images = describe_images(self.loaded.processor, model.config)
        flow = replace(exported.flow, restart=self.limits.restart)
        if self.samples.alone:
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
            backend=self.settings.backend,  # pyright: ignore[reportArgumentType]
            precision=precisions.language_model,
            model=ModelFacts(
                architecture=type(model).__name__,
                name=self.loaded.name,
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
            packages=_packages(self.settings.backend, precisions),
            settings=asdict(self.settings),
        )
        manifest = replace(manifest, runners=tried_runners(manifest, folder))
        return complete(self.settings.also, manifest, runners, folder, model.config)

    def _record(self, manifest: Manifest, folder: Path) -> list[GoldenCase]:
        """What eager gives for held-out inputs that the bundle takes."""
        if not self.settings.verify:
            return []
        model, limits = self.loaded.model, self.limits
        lossy = parse_precision(self.settings.precision, self.settings.backend).lossy
        held_out = self.samples.held_out | reaching(model, self.given, self.samples, manifest, limits)
        room = None if limits.capacity is None else limits.capacity - NEW_TOKENS
        held_out |= asking(model, manifest, folder, self.given, room)
        return [
            record(model, name, inputs, new_tokens(inputs, limits, lossy=lossy))
            for name, inputs in held_out.items()
            if taken_by(manifest, inputs)
        ]


def verified(
    attempt: Attempt, writer: BundleWriter, limits: Limits, floor: QualityFloor | None, measure: Measure
) -> Attempt:
    """An attempt after its replay; UnsupportedModelError where it fails, or VerificationError of a lossy precision."""
    if attempt.manifest.verification is not None:
        return attempt
    try:
        return attempt.replayed(writer, limits, floor, measure)
    except (VerificationError, EngineError) as error:
        if floor is not None and isinstance(error, VerificationError):
            raise
        raise unsupported(error, writer.path) from error


def _packages(backend: str, precisions: Precisions) -> dict[str, str]:
    names = {"cpu": ("onnxruntime", "onnxscript"), "cuda": ("onnxruntime", "onnxscript"), "xnnpack": ("executorch",)}
    rounding = ("torchao",) if precisions.lossy and backend in ("xnnpack", "torch") else ()
    return package_versions("transformers", "torch", *names.get(backend, ()), *rounding)


def package_versions(*names: str) -> dict[str, str]:
    """The versions of genbundle and of these packages, without what a build of them adds."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in ("genbundle", *names)}
