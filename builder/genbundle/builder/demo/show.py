"""`genbundle demo`: build the embedded model's bundle, show it a held-out picture, compare answers with the truth."""

import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import click
from PIL import Image

from genbundle.builder.cli import display, lines
from genbundle.builder.demo.scenes import (
    Scene,
    draw,
    held_out_scenes,
    questions_by_kind,
    random_question,
    training_scene,
)
from genbundle.builder.noise import quiet
from genbundle.bundles import Bundle, BundleError, open_bundle
from genbundle.runtime import Model, Timings, load_bundle
from genbundle.runtime.cli import needs_builder
from genbundle.runtime.verify import verify_bundle

MODEL = Path(__file__).parent / "model"
_SCENES = 200  # held-out pictures to draw from
_PICTURE_SIZE = 240


def show(
    *,
    backend: str,
    output: Path | None,
    questions: tuple[str, ...],
    image_out: Path | None,
    seed: int | None,
    rebuild: bool,
) -> None:
    """The whole demo, told on standard output."""
    begun = time.perf_counter()
    model, bundle = ready_bundle(backend, output, rebuild=rebuild)
    with quiet():  # engines log while they open programs
        for program in bundle.manifest.programs:
            model.backend.program(program.name)
    rng = Random(seed)
    scene = rng.choice(held_out_scenes(_SCENES))
    picture = draw(scene, _PICTURE_SIZE, rng)
    _show_picture(picture, image_out, bundle.path.parent)
    truth = {question: answer for pairs in questions_by_kind(scene).values() for question, answer in pairs}
    asked = questions or pick_questions(scene, rng)
    answered = [_ask(model, picture, question, truth.get(question)) for question in asked]
    known = [right for right, _ in answered if right is not None]
    speeds = [timings.tokens_per_second for _, timings in answered if timings.new_tokens > 2]
    click.echo()
    if known:
        click.echo(f"{sum(known)} of {len(known)} answers are what was drawn.", nl=not speeds)
    if speeds:
        click.echo(f" {max(speeds):.0f} tokens/s on {model.backend.device}.")
    for line in lines(bundle):
        click.echo(line)
    click.echo(f"{time.perf_counter() - begun:.0f} s in all. Next: genbundle inspect {display(bundle.path)}")


def ready_bundle(backend: str, output: Path | None, *, rebuild: bool) -> tuple[Model, Bundle]:
    """The embedded model's bundle, opened: an earlier one of this version that replays its records, or a new one."""
    path = (output or _cache() / f"demo-{_fingerprint()}-{backend}.bundle").absolute()
    if path.exists() and not rebuild:
        try:
            bundle = open_bundle(path)
            bundle.verify_files()
            model = load_bundle(bundle)
            verify_bundle(model)
        except BundleError:
            click.echo(f"{display(path)} is damaged, building it anew")
        else:
            click.echo(f"Using {display(path)}, built earlier and verified again just now.")
            return model, bundle
    click.echo(f"Building the demo model's bundle for {backend}: {display(path)}")
    with needs_builder("demo"), quiet():
        from genbundle.builder.build import build_bundle
    bundle = build_bundle(MODEL, sample_inputs(), backend, output=path, overwrite=path.exists())
    return load_bundle(bundle), bundle


def sample_inputs() -> list[dict[str, Any]]:
    """Generate kwargs for two pictures with a question each, made by the model's own processor."""
    with quiet():
        from transformers import AutoProcessor

    processor, rng, samples = AutoProcessor.from_pretrained(MODEL), Random(0), []
    for question in ("Is there a star?", "How many yellow shapes are there?"):
        scene = training_scene(rng)
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
        samples.append(dict(processor(text=[text], images=[draw(scene, _PICTURE_SIZE, rng)], return_tensors="pt")))
    return samples


def pick_questions(scene: Scene, rng: Random) -> tuple[str, ...]:
    """Two short questions of different kinds, then the long description."""
    first = random_question(scene, rng, ("content", "count"))[0]
    second = random_question(scene, rng, ("place",))[0] if questions_by_kind(scene)["place"] else "Is there a star?"
    return first, second, "Describe the picture."


def _ask(model: Model, picture: Image.Image, question: str, truth: str | None) -> tuple[bool | None, Timings]:
    """Stream one answer and say whether it is the true one (None where the truth isn't known)."""
    click.echo(f"\n  {question}\n  ", nl=False)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    answer, timings = "", Timings(prompt=0, steps=0, programs=0, prompt_tokens=0, new_tokens=0)
    for chunk in model.stream([message], images=picture):
        click.echo(chunk.text, nl=False)
        sys.stdout.flush()
        answer, timings = answer + chunk.text, chunk.timings or timings
    if truth is None:
        click.echo()
        return None, timings
    right = answer.strip() == truth
    click.echo("  [right]" if right else f"  [drawn was: {truth}]")
    return right, timings


def _show_picture(picture: Image.Image, image_out: Path | None, folder: Path) -> None:
    if image_out is not None or not sys.stdout.isatty():
        path = image_out or folder / "demo-picture.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, format="PNG")
        click.echo(f"The picture: {display(path.absolute())}")
    if sys.stdout.isatty():
        click.echo(half_blocks(picture))


def half_blocks(picture: Image.Image, columns: int = 44) -> str:
    """A square picture as text: every character shows two pixels, one in its foreground and one in its background."""
    pixels = picture.convert("RGB").resize((columns, columns), Image.Resampling.BOX).load()
    rows = []
    for y in range(0, columns - 1, 2):
        cells = []
        for x in range(columns):
            upper, lower = pixels[x, y], pixels[x, y + 1]  # pyright: ignore[reportOptionalSubscript]
            cells.append(f"\x1b[38;2;{_color(upper)};48;2;{_color(lower)}m▀")
        rows.append("  " + "".join(cells) + "\x1b[0m")
    return "\n".join(rows)


def _color(pixel: Any) -> str:
    return ";".join(map(str, pixel))


def _fingerprint() -> str:
    """What a cached bundle must have been built from: this version of genbundle and these model files."""
    from importlib.metadata import version

    digest = hashlib.sha256("".join(version(name) for name in ("genbundle", "transformers", "torch")).encode())
    for path in sorted(MODEL.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _cache() -> Path:
    """The user's cache folder, or a temporary one where that can't be written."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genbundle"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError:
        base = Path(tempfile.gettempdir()) / "genbundle"
        base.mkdir(parents=True, exist_ok=True)
    return base if os.access(base, os.W_OK) else Path(tempfile.gettempdir())
