"""The files of source code and text in a phone's folder: a bundle's numbers and texts in the templates under phone/.

A bundle may be a stranger's: nothing of it becomes code but numbers that are numbers and texts as escaped literals.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genbundle.bundles import Bundle
from genbundle.bundles.manifest import Images, Input, Runner
from genbundle.runtime.inspection import megabytes
from genbundle.runtime.questions import Parts, question_parts
from genbundle.runtime.text import TextProcessor

PLATFORMS = {"android": "GenbundleModel.kt", "ios": "GenbundleModel.swift"}
"""platform -> the file with its calls."""

_QUESTION = "{the question}"
_NEW_TOKENS = 256


def code_files(
    bundle: Bundle, runner: Runner, media: Input | None, processor: TextProcessor, facts: Mapping[str, Any]
) -> dict[str, str]:
    """The source file for `facts["platform"]` and a README.md, by name.

    media: the input for pictures or sounds. facts: what stands in device.json.
    """
    manifest, code = bundle.manifest, PLATFORMS[facts["platform"]]
    assert manifest.text is not None
    parts, tokenizer = _asked(manifest.images, media, processor, runner), bundle.file(manifest.text.tokenizer)
    wanted = manifest.generation.options.get("max_new_tokens")
    values = {
        **facts,
        **_media_values(media, android=facts["platform"] == "android"),
        **_drawing(manifest.images if parts is not None else None),
        **{name: _plain(str(facts[name])) for name in ("executorch", "runner", "precision")},
        "name": _plain(manifest.model.name),
        "bundle": _plain(bundle.path.name),
        "architecture": _plain(manifest.model.architecture),
        "code": code,
        "parts": parts,
        "each": manifest.images.tokens_per_image if manifest.images is not None else None,
        "ends": [processor.decode([end], skip_special_tokens=False) for end in manifest.generation.eos_token_ids],
        "new_tokens": wanted if type(wanted) is int else _NEW_TOKENS,
        "model_size": megabytes(facts["model_bytes"]),
        "tokenizer_size": megabytes(facts["tokenizer_bytes"]),
        "planned": megabytes(facts["planned_bytes"] or 0),
        "weights": megabytes(manifest.model.weight_bytes),
        "differs": [_plain(difference) for difference in runner.differs],
        "lookahead": any(look in Path(tokenizer).read_text(encoding="utf-8") for look in ("(?!", "(?=", "(?<")),
    }
    return {name: _render(name, values) for name in (code, "README.md")}


def _asked(images: Images | None, media: Input | None, processor: TextProcessor, runner: Runner) -> Parts | None:
    """A question in the model's form; None where a part of it isn't known (sounds, pictures taken as arrays)."""
    if media is not None and (images is None or images.placeholder is None):
        return None
    parts = question_parts(processor, images, _QUESTION, runner.prefix)
    pictures = sum(part is None for part in parts)
    return parts if parts and pictures == (media is not None) and parts[-1] is not None else None


def _media_values(media: Input | None, *, android: bool) -> dict[str, Any]:
    """The calls that take pictures `[channels, height, width]` or sounds `[bins, frames]`."""
    sizes = [] if media is None else [int(size) for size in media.shape[1:]]
    kind = {0: None, 2: "sound", 3: "picture"}[len(sizes)]
    shape = "[" + ", ".join(map(str, sizes)) + "]"
    words = f"FloatArray for a {kind} {shape}" if android else f"float32 values of a {kind} {shape}"
    if kind != "picture":
        bins, frames = sizes or (0, 0)
        return {
            "media": kind is not None,
            "picture": False,
            "media_words": words,
            "prefill": f"module.prefillAudio(part, 1, {bins}, {frames})",
            "construct": f"Audio(float: values, batchSize: 1, bins: {bins}, frames: {frames})",
        }
    channels, height, width = sizes
    return {
        "media": True,
        "picture": True,
        "media_words": words,
        "width": width,
        "height": height,
        "prefill": f"module.prefillImages(part, {width}, {height}, {channels})",
        "construct": f"Image(float: values, width: {width}, height: {height}, channels: {channels})",
    }


def _drawing(images: Images | None) -> dict[str, Any]:
    """The steps from a picture to its pixels, where the templates have all of them; else the caller brings pixels."""
    settings: dict[str, Any] = {"factor": 1.0, "mean": [0.0] * 3, "std": [1.0] * 3, "resample": "bilinear"}
    steps: list[dict[str, Any]] = []
    for step in images.steps if images is not None else ():
        numbers = {key: value for key, value in step.items() if key not in ("op", "resample")}
        given = (str(step.get("op")), frozenset(numbers))
        if given not in _DRAWN or not all(
            _counts(value, 3 if key in ("mean", "std") else None) for key, value in numbers.items()
        ):
            return {"steps": []}
        steps.append(step)
        settings |= {key: value for key, value in step.items() if key in settings}
    settings["filter"] = _plain(str(settings.pop("resample")))
    return {"steps": steps, **settings}


def _counts(value: Any, length: int | None) -> bool:
    """Whether a value of a step is a number, or a list of `length`, that both languages write as Python does."""
    if length is not None:
        return isinstance(value, list) and len(value) == length and all(_counts(item, None) for item in value)
    return type(value) in (int, float) and abs(value) < 2**31


_DRAWN = {
    ("convert_rgb", frozenset()),
    ("resize", frozenset({"height", "width"})),
    ("resize", frozenset({"shortest_edge"})),
    ("center_crop", frozenset({"height", "width"})),
    ("rescale", frozenset({"factor"})),
    ("normalize", frozenset({"mean", "std"})),
}
"""The steps that the templates have, with their options."""


def _render(template: str, values: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("genbundle.runtime", "phone"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["kotlin"] = lambda text: _literal(text, "${question}", _kotlin)
    environment.filters["swift"] = lambda text: _literal(text, "\\(question)", _swift)
    return environment.get_template(f"{template}.jinja").render(values)


def _literal(text: str, question: str, letter: Any) -> str:
    """`text` as a string literal in which `question` stands for the user's."""
    return '"' + question.join("".join(map(letter, piece)) for piece in text.split(_QUESTION)) + '"'


def _kotlin(letter: str) -> str:
    if letter.isprintable():
        return f"\\{letter}" if letter in '\\"$' else letter
    # What can't be seen, or steers how a line is shown, by its numbers in UTF-16.
    units = letter.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


def _swift(letter: str) -> str:
    if letter.isprintable():
        return f"\\{letter}" if letter in '\\"' else letter
    return f"\\u{{{ord(letter):x}}}"


def _plain(text: str) -> str:
    """A text that ends no comment and no code block."""
    return re.sub(r"[^\w .,:;()\[\]'/@+-]", "?", text).replace("//", "/ /")
