"""The builder's commands of the `genbundle` command line: build and demo."""

import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from genbundle.builder.noise import logged_to, quiet
from genbundle.bundles import BuildError, Bundle, GenbundleError
from genbundle.bundles.manifest import BACKENDS
from genbundle.runtime.cli import needs_builder
from genbundle.runtime.inspection import megabytes
from genbundle.runtime.quality import in_words

_BACKEND = click.option(
    "--backend",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help=f"What the bundle runs on: {', '.join(BACKENDS)}. See the table below.",
)


@click.command(short_help="Export a model into a bundle and verify it.")
@click.argument("model")
@_BACKEND
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="DIR", help="The bundle; MODEL-BACKEND.bundle here by default."
)
@click.option(
    "--max-length", type=int, metavar="N", help="The most tokens that the bundle holds, prompt and generated."
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    metavar="NAME",
    help="Of the language model: fp32; int8 or int4 on cpu, xnnpack and torch; fp16 or bf16 on cuda; or of each part: "
    "language_model=int4,encoder=int8.",
)
@click.option(
    "--quality-floor",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Of a lossy precision: the least share of first choices that are the original model's, 0 for any; by default "
    "0.9 for int8 and 0.7 for int4.",
)
@click.option(
    "--also",
    multiple=True,
    metavar="RUNTIME",
    help="Let another runtime open the directory of a cpu bundle too: ort-genai, transformers.js; may be given several "
    "times.",
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is at the output.")
@click.option("--no-verify", is_flag=True, help="Skip the replay against the original model.")
@click.option("--quiet", "no_progress", is_flag=True, help="No progress bar, which is shown on a terminal only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output; no progress bar.")
def build(
    model: str, backend: str, output: Path | None, max_length: int | None, precision: str,
    quality_floor: float | None, also: tuple[str, ...], overwrite: bool, no_verify: bool, no_progress: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Export MODEL, a saved transformers model's directory or a hub id, into one self-contained bundle.

    The finished bundle is replayed on inputs that the export never saw and compared with the original model, token by
    token; a bundle that differs is not kept. At int8 and int4 tokens may differ: how far the probabilities are from the
    original model's is measured and reported, and too far is refused. Nothing stands at the output until all of that
    is done.

    \b
    cpu      ONNX Runtime on the CPU; runs without torch and transformers
    cuda     ONNX Runtime on an NVIDIA GPU; may be built on any machine
    xnnpack  one ExecuTorch .pte, for phones and small devices
    torch    torch.export programs, for torch on the CPU or CUDA

    \b
    Examples:
      genbundle build ./my-model
      genbundle build HuggingFaceTB/SmolLM2-135M-Instruct --backend xnnpack --max-length 2048
      genbundle build ./my-model --precision int4
      genbundle build ./my-model --also ort-genai --also transformers.js
      genbundle build ./my-model --output app/model.bundle --overwrite --json
    """
    with kept_log():
        with needs_builder("build"), quiet():
            from genbundle.builder import build_bundle
        bundle = build_bundle(
            model, backend=backend, output=output, max_length=max_length, precision=precision,
            quality_floor=quality_floor, also=also, overwrite=overwrite, verify=not no_verify,
            progress=sys.stderr.isatty() and not (no_progress or as_json),
        )  # fmt: skip
    _tell(bundle, as_json=as_json)


@click.command(short_help="Make a bundle of what transformers exported.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--model", metavar="MODEL", help="The model that was exported, its directory or hub id: compare the bundle with it."
)
@click.option("--tokenizer", metavar="DIR", help="Where the tokenizer is; the directory itself or MODEL by default.")
@click.option("--no-tokenizer", is_flag=True, help="A bundle that takes token ids.")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="DIR", help="The bundle; NAME-cpu.bundle here by default."
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is at the output.")
@click.option("--quiet", "no_progress", is_flag=True, help="No progress bar, which is shown on a terminal only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output; no progress bar.")
def pack(
    directory: Path, model: str | None, tokenizer: str | None, no_tokenizer: bool, output: Path | None, overwrite: bool,
    no_progress: bool, as_json: bool,
) -> None:  # fmt: skip
    """Make a bundle of DIRECTORY, which transformers' ExportedModel.save_pretrained wrote from export_for_generation.

    Its ONNX graphs are taken as they are, without exporting again, and each weight once. That needs the components of a
    text decoder. With --model the bundle is replayed against that model, token by token, as a build's is; without it,
    the graphs are only compared with each other, and the bundle says so.

    \b
    Examples:
      genbundle pack ./exported --model ./my-model
      genbundle pack ./exported --tokenizer ./my-model --output my-model.bundle
    """
    with kept_log():
        with needs_builder("pack"), quiet():
            from genbundle.builder import pack_bundle
        bundle = pack_bundle(
            directory, model=model, processor=False if no_tokenizer else tokenizer, output=output, overwrite=overwrite,
            progress=sys.stderr.isatty() and not (no_progress or as_json),
        )  # fmt: skip
    _tell(bundle, as_json=as_json)


def _tell(bundle: Bundle, *, as_json: bool) -> None:
    """Print what was built, for people or for scripts."""
    if as_json:
        click.echo(json.dumps(report(bundle)))
    else:
        for line in lines(bundle):
            click.echo(line)


def report(bundle: Bundle) -> dict[str, Any]:
    """What was built, for scripts."""
    from dataclasses import asdict

    manifest = bundle.manifest
    verification = asdict(manifest.verification) if manifest.verification is not None else None
    return {
        "path": str(bundle.path),
        "backend": manifest.backend,
        "precision": manifest.precision,
        "bytes": bundle.size,
        "weight_bytes": manifest.model.weight_bytes,
        "verification": verification,
        "notes": list(manifest.notes),
    }


def lines(bundle: Bundle) -> list[str]:
    """What was built, for people."""
    manifest = bundle.manifest
    found = [
        f"{display(bundle.path)}  {megabytes(bundle.size)}, {manifest.backend} {manifest.precision}, "
        f"programs: {', '.join(program.name for program in manifest.programs)}",
        verified(bundle),
    ]
    if manifest.verification is not None and manifest.verification.pending:
        found.append(f"pending: {manifest.verification.pending}")
    return [*found, *(f"note: {note}" for note in manifest.notes)]


def verified(bundle: Bundle) -> str:
    """One line on what the build's replay showed."""
    verification = bundle.manifest.verification
    if verification is None:
        packed = bundle.manifest.settings.get("packed")
        return "not compared with the original model" if packed else "not verified (--no-verify)"
    names = ", ".join(check.name for check in verification.checks)
    if verification.quality is not None:
        return (
            f"measured on {verification.provider} against the original model, over {verification.quality.positions} "
            f"tokens of {names}: {in_words(verification.quality)}"
        )
    worst = max((check.max_logit_difference for check in verification.checks), default=0.0)
    return (
        f"verified on {verification.provider} against the original model: same tokens for {names}; "
        f"largest logit difference {worst:.1e}"
    )


def display(path: Path) -> str:
    """A path as short as it can be said from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


@contextlib.contextmanager
def kept_log() -> Iterator[None]:
    """Keep upstream's hidden output in a log file when the block fails, and name it; remove it otherwise."""
    handle, name = tempfile.mkstemp(prefix="genbundle-build-", suffix=".log")
    os.close(handle)
    log, keep = Path(name), False
    try:
        with logged_to(log):
            yield
    except GenbundleError as error:
        keep = error.__cause__ is not None and log.stat().st_size > 0
        if keep:
            error.args = (f"{error} (the exporters' own output: {log})",)
        raise
    except (OSError, KeyboardInterrupt):
        raise
    except Exception as error:
        keep = True
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
        raise BuildError(f"the build failed unexpectedly: {type(error).__name__}: {error} (details: {log})") from error
    finally:
        if not keep:
            log.unlink(missing_ok=True)


@click.command(short_help="Build the embedded image-text model and ask it about a picture.")
@_BACKEND
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="DIR", help="Where the bundle goes; a cache folder by default."
)
@click.option(
    "--question", "questions", multiple=True, metavar="TEXT", help="Ask this instead; may be given several times."
)
@click.option("--image-out", type=click.Path(path_type=Path), metavar="FILE", help="Save the picture there, as PNG.")
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Which picture; a random one by default.")
@click.option("--rebuild", is_flag=True, help="Build anew even if this version's bundle is there.")
def demo(
    backend: str,
    output: Path | None,
    questions: tuple[str, ...],
    image_out: Path | None,
    seed: int | None,
    rebuild: bool,
) -> None:
    """Build the bundle of the small image-text model that comes with genbundle, and let it describe a picture.

    The picture is drawn for the occasion, of a layout that training never saw; the answers are compared with what was
    drawn. The first run builds and verifies the bundle, later ones reuse it.

    \b
    Examples:
      genbundle demo
      genbundle demo --backend xnnpack --seed 7
      genbundle demo --question "How many stars are there?" --question "What is on the left?"
    """
    with kept_log():
        with needs_builder("demo"):
            from genbundle.builder.demo.show import show
        show(backend=backend, output=output, questions=questions, image_out=image_out, seed=seed, rebuild=rebuild)
