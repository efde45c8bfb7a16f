"""build_bundle: the recipe in order. Load, capture, explain, export, verify, publish."""

import errno
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from genbundle.builder.also import check_also
from genbundle.builder.attempts import Exporting, Settings, verified
from genbundle.builder.conditioning import with_rounding
from genbundle.builder.exporting import first_line
from genbundle.builder.limits import limits_of
from genbundle.builder.loading import borrowed, expect_unchanged, load, settings_of
from genbundle.builder.precision import parse_precision
from genbundle.builder.progress import show_progress
from genbundle.builder.rows import mixes_rows, one_at_a_time
from genbundle.builder.samples import as_inputs, from_processor, make_samples
from genbundle.bundles import BuildError, Bundle
from genbundle.bundles.manifest import BACKENDS
from genbundle.bundles.writer import check_target, new_bundle, trial_bundle


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
        precision: "fp32", on "cpu", "xnnpack" and "torch" "int8" or "int4", on "cuda" "fp16" or "bf16": of the language
            model's weights, with its token embedding and its head. Encoders of pictures and sound, with their
            projectors, stay at fp32 unless they are named:
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
    with show_progress(progress, stages=16 if precisions.lossy and verify else 8) as announce:
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
                work = Exporting(loaded, samples, given, settings, limits, measure, announce)
                exact = None
                if settings.verify and precisions.lossy:
                    # What rounding is allowed to change would hide a small mistake in the programs.
                    with trial_bundle(target) as trial:
                        announce("the same at float32")
                        exact = verified(work.attempt(trial, precisions.exact(), None), trial, limits, None, measure)
                attempt = work.attempt(writer, precisions, exact)
                expect_unchanged(eager, before)
            # A model that the build loaded itself needs no memory beside the engine that opens the bundle.
            del loaded, eager, work, before
            gc.collect()
            if settings.verify:
                announce("verify")
                attempt = verified(attempt, writer, limits, floor, measure)
            announce("publish")
            return writer.commit(attempt.manifest)


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
