"""The `genbundle` command: run, inspect, verify and bench bundles. Other packages add commands by entry points."""

import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from genbundle.bundles import GenbundleError, MissingExtraError

COMMAND_GROUP = "genbundle.commands"
# The builder's commands are listed without loading the builder, which takes seconds, and where it isn't installed.
_BUILDER = {
    "build": "Export a model into a bundle and verify it.",
    "pack": "Make a bundle of what transformers exported.",
    "demo": "Build the embedded image-text model and ask it about a picture.",
}
_ORDER = ("build", "pack", "run", "inspect", "verify", "bench", "device", "demo")


class Commands(click.Group):
    """The commands of this module and those under the entry-point group `genbundle.commands`, loaded when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The known commands in the order of their use, then any others."""
        names = {*self.commands, *_BUILDER, *(point.name for point in _entry_points())}
        return sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name; MissingExtraError when what it needs isn't installed."""
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        for point in _entry_points():
            if point.name == cmd_name:
                with needs_builder(cmd_name):
                    return point.load()
        if cmd_name in _BUILDER:
            raise MissingExtraError(f"`genbundle {cmd_name}`", "genbundle.builder", "builder")
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands; the added ones by what is known of them without loading them."""
        rows = []
        for name in self.list_commands(ctx):
            own = self.commands.get(name)
            rows.append((name, own.get_short_help_str(80) if own else _BUILDER.get(name, "")))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@contextmanager
def needs_builder(command: str) -> Iterator[None]:
    """Turns the failed import of an optional package into the error that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("genbundle.") and error.name != "genbundle.builder":
            raise
        raise MissingExtraError(f"`genbundle {command}`", error.name or "genbundle.builder", "builder") from error


def _entry_points() -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group=COMMAND_GROUP)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="genbundle", message="%(prog)s %(version)s")
def cli() -> None:
    """Export a generative model once into a self-contained bundle; generate from the bundle anywhere.

    \b
    genbundle demo                                  see it work, with a model that is included
    genbundle build ./my-model --backend cpu        a saved model or a hub id becomes my-model-cpu.bundle
    genbundle run my-model-cpu.bundle "Hello"       stream an answer; no torch, no transformers
    genbundle inspect my-model-cpu.bundle           what is in it, how its programs feed one another
    """


_BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
_DEVICE = click.option("--device", metavar="NAME", help="Where to run: cpu or cuda; the bundle's own by default.")
_THREADS = click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="Threads of the engine; its own choice by default."
)
_COMPILED = click.option(
    "--compiled", is_flag=True, help="Compile the programs (of `torch` bundles) for this machine, the first time."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")


@cli.command(short_help="Generate from a bundle and stream the text.")
@_BUNDLE
@click.argument("prompt")
@click.option(
    "--image", "images", multiple=True, metavar="PATH", help="A picture for the prompt; may be given several times."
)
@click.option(
    "--chat/--raw",
    default=None,
    help="Wrap the prompt (and pictures) as a user's message in the model's chat template, the default where the "
    "bundle has one, or give the text to the model as it is.",
)
@click.option("--max-new-tokens", type=int, metavar="N", help="The most tokens to generate.")
@click.option(
    "--temperature", type=float, metavar="T", help="Sample, flatter above 1, sharper below; 0 takes the likeliest."
)
@click.option("--top-k", type=int, metavar="K", help="Sample among the K likeliest tokens.")
@click.option("--top-p", type=float, metavar="P", help="Sample among the likeliest tokens that add up to P.")
@click.option(
    "--min-p", type=float, metavar="P", help="Sample among tokens at least P times as likely as the likeliest."
)
@click.option(
    "--repetition-penalty", type=float, metavar="R", help="Above 1 discourages tokens that were there before."
)
@click.option("--seed", type=int, metavar="N", help="Sample the same tokens each time.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End where this text comes; may be given several times.")
@_DEVICE
@_THREADS
@_COMPILED
@_JSON
def run(
    bundle: Path, prompt: str, images: tuple[str, ...], chat: bool | None, device: str | None, threads: int | None,
    compiled: bool, as_json: bool, stop: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """Generate from BUNDLE and stream the text to standard output; the speed goes to standard error.

    PROMPT is the text, or - to read it from standard input. Without sampling options the model's own generation config
    decides, which for most models means the likeliest token each time.

    \b
    Examples:
      genbundle run llama.bundle "Why is the sky blue?" --max-new-tokens 200
      genbundle run llava.bundle "What is in the picture?" --image photo.jpg
      genbundle run llama.bundle "Once upon a time" --raw --temperature 0.8 --seed 7
      cat notes.txt | genbundle run llama.bundle - --json
    """
    from genbundle.runtime import load_bundle

    prompt = sys.stdin.read() if prompt == "-" else prompt
    begun = time.perf_counter()
    model = load_bundle(bundle, device=device, threads=threads, compiled=compiled)
    for name in model.bundle.manifest.flow.step:  # opened now, so that the first step's time is a step's
        model.backend.program(name)
    loaded = time.perf_counter() - begun
    given = {name: value for name, value in options.items() if value is not None}
    if stop:
        given["stop"] = stop
    content = prompt_content(model.bundle.manifest, prompt, len(images), chat)
    ids, text, last = [], [], None
    for last in model.stream(content, images=list(images) or None, **given):
        ids.append(last.token_id)
        text.append(last.text)
        if not as_json:
            click.echo(last.text, nl=False)
            sys.stdout.flush()
    timings = last.timings if last else None
    if last is None or timings is None:
        return
    if as_json:
        seconds = {"load": loaded, "prompt": timings.prompt, "steps": timings.steps}
        report = {
            "text": "".join(text), "token_ids": ids, "finish_reason": last.finish_reason,
            "prompt_tokens": timings.prompt_tokens, "new_tokens": timings.new_tokens,
            "tokens_per_second": timings.tokens_per_second, "seconds": seconds,
        }  # fmt: skip
        click.echo(json.dumps(report, ensure_ascii=False))
        return
    click.echo()
    click.echo(speed(timings, last.finish_reason), err=True)


def prompt_content(manifest: Any, prompt: str, pictures: int, chat: bool | None) -> Any:
    """The prompt as a user's message where there is a chat template (or `chat` says so), else the text itself.

    A text that holds no placeholder gets the pictures' in front; one that holds some must hold them all.
    """
    has_template = manifest.text is not None and manifest.text.chat_template is not None
    if has_template if chat is None else chat:
        # Templates of image-text models go through a message's parts, those of text models want a text.
        parts = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": prompt}]
        return [{"role": "user", "content": parts if manifest.images is not None else prompt}]
    placeholder = manifest.images.placeholder if manifest.images is not None else None
    return placeholder * pictures + prompt if placeholder and placeholder not in prompt else prompt


def speed(timings: Any, finish_reason: str | None) -> str:
    """One line on how fast a generation was and why it ended."""
    ends = {"eos": "the model ended it", "stop": "a stop text ended it", "length": "the most tokens were reached"}
    rate = f"{timings.tokens_per_second:.1f} tokens/s" if timings.new_tokens > 1 else "one token"
    return (
        f"[{rate}; {timings.new_tokens} new tokens, prompt of {timings.prompt_tokens} in {timings.prompt:.2f} s; "
        f"{ends.get(finish_reason or '', finish_reason)}]"
    )


@cli.command(short_help="Show what a bundle holds and how its programs feed one another.")
@_BUNDLE
@click.option(
    "--svg", type=click.Path(path_type=Path), metavar="FILE", help="Write the drawing as SVG to FILE as well."
)
@_JSON
def inspect(bundle: Path, svg: Path | None, as_json: bool) -> None:
    """Show BUNDLE's programs with their roles, inputs and outputs, its sizes, and what was verified.

    The drawing at the end shows how the programs feed one another for a prompt and for every further token. Nothing is
    run, and no engine is needed.

    \b
    Examples:
      genbundle inspect llava.bundle
      genbundle inspect llava.bundle --svg llava.svg
      genbundle inspect llava.bundle --json | jq .manifest.programs[].roles
    """
    from genbundle.bundles import open_bundle
    from genbundle.runtime.drawing import as_svg
    from genbundle.runtime.inspection import as_text, facts

    opened = open_bundle(bundle)
    if svg is not None:
        svg.write_text(as_svg(opened.manifest), encoding="utf-8")
    click.echo(json.dumps(facts(opened), ensure_ascii=False, indent=1) if as_json else as_text(opened))
    if svg is not None and not as_json:
        click.echo(f"drawing written to {svg}", err=True)


@cli.command(short_help="Check a bundle's files and replay its recorded generations.")
@_BUNDLE
@_DEVICE
@_THREADS
@_COMPILED
@_JSON
def verify(bundle: Path, device: str | None, threads: int | None, compiled: bool, as_json: bool) -> None:
    """Prove BUNDLE on this machine: every file's sha256, then the recorded generations, token by token.

    The records hold what the original model gave in float32. Neither the model nor transformers is needed. Exit code 2
    says that something differs; the message says what and where. A bundle of a lossy precision is run along the
    recorded tokens, and has to come as near to the recorded logits as its build asked for.

    \b
    Examples:
      genbundle verify llama.bundle
      genbundle verify llama-cuda.bundle --device cuda
    """
    from dataclasses import asdict

    from genbundle.runtime import load_bundle
    from genbundle.runtime.quality import in_words, overall
    from genbundle.runtime.verify import verify_bundle

    model = load_bundle(bundle, device=device, threads=threads, compiled=compiled)
    model.bundle.verify_files()
    files = len(model.bundle.manifest.files)
    if not as_json:
        click.echo(f"OK  {files} files have the manifest's sha256")
    checks = verify_bundle(model)
    if as_json:
        report = {
            "ok": True,
            "device": model.backend.device,
            "files": files,
            "cases": [asdict(check) for check in checks],
        }
        click.echo(json.dumps(report))
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        size = f"{check.batch} x {check.prompt_length} + {check.new_tokens} tokens"
        found = f"largest logit difference {check.max_logit_difference:.1e}"
        click.echo(f"OK  {check.name:<{width}}  {size:<20}  {in_words(check.quality) if check.quality else found}")
    qualities = [check.quality for check in checks if check.quality is not None]
    result = f"{in_words(overall(qualities))}, compared with" if qualities else "same tokens as"
    click.echo(f"{bundle}: {result} the original model in all {len(checks)} cases, on {model.backend.device}")


@cli.command(short_help="Time a bundle: prompt, tokens per second, memory.")
@_BUNDLE
@click.option(
    "--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="Length of the prompt."
)
@click.option(
    "--new-tokens", type=click.IntRange(2), default=32, show_default=True, metavar="N", help="Tokens to generate."
)
@_DEVICE
@_THREADS
@_COMPILED
@_JSON
def bench(
    bundle: Path, prompt_tokens: int, new_tokens: int, device: str | None, threads: int | None, compiled: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Time BUNDLE on this machine, for one sequence of random tokens, after a warm-up.

    A bundle that takes no text without a picture is timed on its first recorded input instead. Compare numbers from one
    machine at one time only.

    \b
    Examples:
      genbundle bench llama.bundle --threads 2
      genbundle bench llama.bundle --prompt-tokens 900 --new-tokens 64 --json
    """
    from dataclasses import asdict

    from genbundle.runtime.bench import measure

    result = measure(
        bundle, prompt_tokens=prompt_tokens, new_tokens=new_tokens, device=device, threads=threads, compiled=compiled
    )
    if as_json:
        click.echo(json.dumps(asdict(result)))
        return
    where = [result.device, *([f"{threads} threads"] if threads else []), *(["compiled"] if compiled else [])]
    rows = (
        ("device", ", ".join(where)),
        ("input", result.input),
        ("load", f"{result.load_seconds:.2f} s"),
        ("prompt", f"{result.prompt_seconds:.3f} s for {result.prompt_tokens} tokens"),
        ("step", f"{result.step_milliseconds:.2f} ms per token (median), {result.tokens_per_second:.1f} tokens/s"),
        ("loop", f"{result.loop_share:.1%} of the time is spent outside the programs"),
        (
            "memory",
            "unknown here" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:.0f} MB at most resident",
        ),
    )
    for name, value in rows:
        click.echo(f"{name:<8}{value}")


@cli.command(short_help="Write a bundle as a folder for an Android or iOS app.")
@_BUNDLE
@click.option("--platform", required=True, metavar="NAME", help="android or ios.")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="DIR", help="The folder; BUNDLE-PLATFORM here by default."
)
@_JSON
def device(bundle: Path, platform: str, output: Path | None, as_json: bool) -> None:
    """Write what an app needs to run BUNDLE, of the backend xnnpack, in ExecuTorch's own runners.

    The folder holds the model and its tokenizer, a Kotlin or Swift file with the calls for this model, its sizes and
    memory, and recorded cases with the expected tokens, by which the phone proves itself. Bundles that those runners
    can't run are refused with the cause; `genbundle inspect` shows it as well.

    \b
    Examples:
      genbundle device llama-xnnpack.bundle --platform android
      genbundle device llava-xnnpack.bundle --platform ios --output App/Model
    """
    from genbundle.runtime.device import write_device_folder

    folder = output or Path(f"{bundle.absolute().name.removesuffix('.bundle')}-{platform}")
    facts = write_device_folder(bundle, platform, folder)
    if as_json:
        click.echo(json.dumps({"path": str(folder.absolute()), **facts}))
        return
    click.echo(
        f"{folder}: for {facts['runner']} of ExecuTorch {facts['executorch']}, model.pte of {facts['model_bytes']:,} "
        f"bytes, recorded cases: {facts['golden_cases']}; its README.md says how to go on"
    )


def invoke(args: Sequence[str]) -> int:
    """Run the command line `args`; the exit code. Expected errors are one line on standard error."""
    try:
        result = cli.main(args=list(args) or ["--help"], prog_name="genbundle", standalone_mode=False)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "genbundle"
        return fail(f"{error.format_message().rstrip('.')}; see `{path} --help`")
    except click.ClickException as error:
        return fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        click.echo("genbundle: interrupted", err=True)
        return 130
    except GenbundleError as error:
        return fail(str(error))
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return fail(f"{error.strerror or error}{where}")
    return result if isinstance(result, int) else 0


def fail(message: str) -> int:
    """Say what is wrong in one line; exit code 2."""
    from genbundle.runtime.inspection import printable

    click.echo(f"genbundle: error: {printable(' '.join(message.split()))}", err=True)
    return 2


def main() -> None:
    """The console script."""
    sys.exit(invoke(sys.argv[1:]))


if __name__ == "__main__":
    main()
