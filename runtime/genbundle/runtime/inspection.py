"""What a bundle says of itself, for people (`as_text`) and for scripts (`facts`)."""

from collections.abc import Iterable, Sequence
from typing import Any

from genbundle.bundles import Bundle, Manifest
from genbundle.bundles.codec import encode
from genbundle.bundles.manifest import Input, Output, Program
from genbundle.runtime.drawing import as_text as draw
from genbundle.runtime.drawing import summary
from genbundle.runtime.quality import in_words

_WIDTH = 100


def facts(bundle: Bundle) -> dict[str, Any]:
    """The manifest with every field spelled out, and what follows from it."""
    manifest = bundle.manifest
    return {"path": str(bundle.path), "bytes": bundle.size, "manifest": encode(manifest)}


def as_text(bundle: Bundle) -> str:
    """A page about the bundle, at most 100 columns wide."""
    manifest = bundle.manifest
    parts = [f"{bundle.path.name}: {manifest.model.architecture} for {manifest.backend}", ""]
    for name, value in _overview(bundle):
        parts += _wrapped(name, value)
    parts += ["", "Programs"]
    for program in manifest.programs:
        parts += ["", *_program(program, manifest)]
    parts += ["", "How they feed one another", "", draw(manifest, _WIDTH)]
    return "\n".join(printable(line) for part in parts for line in part.split("\n"))


def printable(line: str) -> str:
    """A stranger's names and notes without characters that steer a terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def megabytes(size: int) -> str:
    """A size in bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def _overview(bundle: Bundle) -> Iterable[tuple[str, str]]:
    manifest, flow = bundle.manifest, bundle.manifest.flow
    yield "model", f"{manifest.model.name}, {manifest.model.parameters:,} parameters"
    largest = max(manifest.files, key=lambda name: manifest.files[name].size, default=None)
    size = f"{megabytes(bundle.size)} in {len(manifest.files)} files"
    if largest is not None:
        size += f", of it {largest} {megabytes(manifest.files[largest].size)}"
    yield "size", f"{size}; the model's weights, each once, are {megabytes(manifest.model.weight_bytes)}"
    others = {p.name: p.precision for p in manifest.programs if p.precision != manifest.precision}
    planned = {(program.file, program.method): program.memory for program in manifest.programs if program.memory}
    if planned:
        yield "memory", f"{megabytes(sum(planned.values()))} planned beside the weights, the state among them"
    yield "precision", ", ".join([manifest.precision, *(f"{name} {other}" for name, other in others.items())])
    held = "as many tokens as fit" if flow.capacity is None else f"up to {flow.capacity} tokens, prompt and generated"
    batch = {None: "any batch", 1: "one sequence at a time"}.get(flow.batch, f"batches up to {flow.batch}")
    yield "holds", f"{held}; {'one sequence, no batches' if flow.alone else batch}"
    yield "state", _state(manifest)
    yield "text", _text(manifest)
    yield "pictures", _pictures(manifest)
    options = ", ".join(f"{name}={value}" for name, value in manifest.generation.options.items())
    ends = ", ".join(map(str, manifest.generation.eos_token_ids)) or "none"
    yield "defaults", f"{options or 'greedy'}; end tokens: {ends}"
    yield from _runners(manifest)
    yield from _verified(manifest)
    for note in manifest.notes:
        yield "note", note
    yield "built with", ", ".join(f"{name}=={version}" for name, version in manifest.packages.items())


def _state(manifest: Manifest) -> str:
    if not manifest.state:
        return "kept inside the programs"
    total = len(manifest.state)
    return f"{total} tensors carried from call to call: " + ", ".join(
        f"{count} x {shape}" for shape, count in _counted(_tensor(item) for item in manifest.state).items()
    )


def _counted(items: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts


def _text(manifest: Manifest) -> str:
    if manifest.text is None:
        return "no tokenizer: takes and gives token ids"
    return f"tokenizer, {'with' if manifest.text.chat_template else 'no'} chat template"


def _pictures(manifest: Manifest) -> str:
    images, needs = manifest.images, sorted({name for route in manifest.flow.prompt for name in route.needs})
    if images is None:
        return f"as ready arrays: {', '.join(needs)}" if needs else "none"
    if not images.steps:
        return f"as ready arrays ({images.input}): {images.reason}"
    each = f", {images.tokens_per_image} tokens each" if images.tokens_per_image else ""
    return f"any picture file: {', '.join(str(step.get('op')) for step in images.steps)}{each}"


def _runners(manifest: Manifest) -> Iterable[tuple[str, str]]:
    """Which other runtimes open the bundle's files, or why not."""
    for runner in manifest.runners:
        if runner.obstacle is not None:
            yield "elsewhere", f"not in {runner.name}: {runner.obstacle}"
            continue
        first = f"; a prompt begins with {runner.prefix!r} there" if runner.prefix else ""
        yield "elsewhere", f"runs unchanged in {runner.name}{first}"
        for difference in runner.differs:
            yield "", difference


def _verified(manifest: Manifest) -> Iterable[tuple[str, str]]:
    report = manifest.verification
    if report is None:
        yield "verified", "not at all: built with verify=False"
        return
    result = "tokens equal in" if report.quality is None else f"{in_words(report.quality)}, along its tokens in"
    yield "verified", f"on {report.provider} against the original model, {result} {len(report.checks)} cases:"
    for check in report.checks:
        size = f"{check.batch} x {check.prompt_length} + {check.new_tokens} tokens"
        found = f"largest logit difference {check.max_logit_difference:.1e}"
        yield "", f"{check.name}: {size}, {found if check.quality is None else in_words(check.quality)}"
    if report.pending:
        yield "pending", report.pending


def _program(program: Program, manifest: Manifest) -> list[str]:
    where = f"{program.file}:{program.method}" if program.method else program.file
    size = "" if program.method else f", {megabytes(manifest.files[program.file].size)}"
    roles = " + ".join(program.roles) + (f" ({program.modality})" if program.modality else "")
    lines = [f"  {program.name}  [{roles}]  {where}{size}, {program.precision}"]
    rows = [("in", *row) for row in _rows(program.inputs)] + [("out", *row) for row in _rows(program.outputs)]
    name_width = min(36, max((len(row[1]) for row in rows), default=0))
    type_width = min(34, max((len(row[2]) for row in rows), default=0))
    for kind, name, shape, origin in rows:
        lines.append(f"    {kind:<3} {name:<{name_width}}  {shape:<{type_width}}  {origin}"[:_WIDTH].rstrip())
    return lines


def _rows(values: Sequence[Input] | Sequence[Output]) -> list[tuple[str, str, str]]:
    """Name, dtype with shape, and origin or use of each value; three or more alike but for a number are one row."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for value in values:
        stem = "".join("#" if letter.isdigit() else letter for letter in value.name)
        # Keys and values of one cache go together.
        stem = stem.replace(".key", ".*").replace(".value", ".*")
        groups.setdefault((stem, _tensor(value), _use(value)), []).append(value.name)
    rows = []
    for (stem, shape, use), names in groups.items():
        if len(names) > 2:
            rows.append((f"{stem.replace('#', '*')} ({len(names)})", shape, use))
        else:
            rows.extend((name, shape, use) for name in names)
    return rows


def _tensor(value: Any) -> str:
    return f"{value.dtype} [{', '.join(map(str, value.shape))}]"


def _use(value: Input | Output) -> str:
    if isinstance(value, Output):
        return "-> state" if value.state is not None else ""
    source = value.source
    if source.kind == "position":
        return f"positions by the rule {source.rule}"
    if source.kind == "prepared":
        return f"{source.rule}({summary(source.options.get('inputs', ()))})"
    if source.kind == "constant":
        return f"always {source.value:g}"
    words = {"tokens": "the new token ids", "mask": "the padding mask", "start": "tokens already in the state"}
    named = {"user": f"given: {source.name}", "state": "<- state", "output": f"<- {source.name}"}
    return words.get(source.kind) or named[source.kind]


def _wrapped(name: str, value: str) -> list[str]:
    import textwrap

    return textwrap.wrap(
        value, _WIDTH, initial_indent=f"  {name:<11}", subsequent_indent=" " * 13, break_long_words=True
    ) or [f"  {name}"]
