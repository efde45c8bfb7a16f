"""What a model's tokenizer and processor do, as data for the bundle: described, then verified.

Nothing is taken from a model's name. The text around pictures is found by running the processor on probes and looking
at what it hands to its tokenizer; the picture steps are read off the image processor's own settings, and kept only if
the runtime's pixels then equal the processor's.
"""

import copy
import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import transformers
from tokenizers import Tokenizer, decoders

from genbundle.builder.generation_config import describe_generation
from genbundle.builder.probes import (
    Undescribed,
    class_name,
    pixel_values,
    probe_picture,
    probe_pictures,
    run_processor,
    token_ids,
)
from genbundle.bundles import BuildError, GenbundleError
from genbundle.bundles.manifest import Images, Text
from genbundle.runtime.images import expand_placeholders, preprocess
from genbundle.runtime.text import TextProcessor

__all__ = ["PIXEL_TOLERANCE", "describe_generation", "describe_images", "describe_text", "pixel_difference"]

# The largest pixel difference at which two ways to prepare a picture count as one: rounding, nothing more.
PIXEL_TOLERANCE = 1e-5

_SAMPLE_TEXTS = (
    "Hello world",
    " A leading space, and two  inside it's 1234.5!",
    "Grüße, 東京, שלום, ½ and 👩‍🚀\n\tnew line",
    "",
)
# The words that mark the probes' text; letters only, so that any tokenizer leaves them as they are.
_PROBE = ("red", "green", "blue")
_TEXT_OUTPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")


def describe_text(processor: Any, directory: Path) -> Text:
    """Write a tokenizer's files into the staged bundle and describe them.

    Args:
        processor: a transformers tokenizer, or a processor that has one.
        directory: gets tokenizer.json, tokenizer_config.json and, if there is a template, chat_template.jinja.

    Raises:
        BuildError: a tokenizer without a tokenizer.json, or whose ids the runtime's tokenizer doesn't reproduce.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    name = type(tokenizer).__name__
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        raise BuildError(
            f"{name} is a tokenizer in Python, without a tokenizer.json that can be read without transformers: "
            "build with its fast variant, or without a tokenizer"
        )
    backend = _portable(tokenizer)
    (directory / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8", newline="\n")
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        config = json.loads((Path(saved) / "tokenizer_config.json").read_text(encoding="utf-8"))
    # Where the tokenizer came from is of no use in a bundle, and differs between two builds of the same model.
    for key in (
        "name_or_path",
        "tokenizer_file",
        "_commit_hash",
        "is_local",
        "local_files_only",
        "chat_template",
        "auto_map",
    ):
        config.pop(key, None)
    _write_json(directory / "tokenizer_config.json", config)
    template = _chat_template(processor) or _chat_template(tokenizer)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    text = Text(
        tokenizer="tokenizer.json",
        chat_template=None if template is None else "chat_template.jinja",
        special_tokens={key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        padding_token_id=tokenizer.pad_token_id,
    )
    _verify_text(tokenizer, TextProcessor.from_files(text, directory), list(text.special_tokens.values()))
    return text


def describe_images(processor: Any, model_config: Any = None) -> Images | None:
    """Describe how a processor prepares pictures, and the text around them, as data; None if it takes no pictures.

    A description is returned only when the runtime, following it, gives the processor's own pixels (within
    `PIXEL_TOLERANCE`, see `pixel_difference`) and token ids. Otherwise `steps` is empty and `reason` says why.

    Args:
        processor: a transformers processor (or a tokenizer, for which there is nothing to describe).
        model_config: the model's config, which names the token that pictures take the place of.
    """
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        return None
    processor = _with_pil_backend(processor)
    token_id = _configured_token(processor, model_config)
    try:
        images = _describe_placeholder(processor, model_config, token_id)
        images = _describe_steps(processor, images)
        _verify_prompts(processor, images)
    except Undescribed as reason:
        return Images(input="pixel_values", token_id=token_id, reason=str(reason))
    return images


def pixel_difference(processor: Any, images: Images) -> float:
    """The largest absolute difference between a processor's pixels and the runtime's, over pictures of every kind."""
    processor = _with_pil_backend(processor)
    worst = 0.0
    for picture in probe_pictures(every_mode=bool(_settings(processor)["do_convert_rgb"])):
        expected = pixel_values(run_processor(processor, _prompt(images, 1), [picture])[0], 1)
        ours = preprocess([picture], images)
        if ours.shape != expected.shape:
            return float("inf")
        worst = max(worst, float(np.abs(ours - expected).max()))
    return worst


# Text


def _portable(tokenizer: Any) -> Tokenizer:
    """The tokenizer with everything inside it that transformers does around it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    cleaned = getattr(tokenizer, "clean_up_tokenization_spaces", False)
    if cleaned and type(backend.model).__name__ != "BPE":
        # What `clean_up_tokenization` does to decoded text; transformers leaves BPE out.
        pairs = (" .", " ?", " !", " ,"), (" ' ", " n't", " 'm", " 's", " 've", " 're")
        cleaning = [decoders.Replace(old, old.strip()) for group in pairs for old in group]
        first = [] if backend.decoder is None else [backend.decoder]
        backend.decoder = decoders.Sequence([*first, decoders.Fuse(), *cleaning])
    return backend


def _chat_template(owner: Any) -> str | None:
    template = getattr(owner, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return template or None


def _verify_text(tokenizer: Any, ours: TextProcessor, special_tokens: Sequence[str]) -> None:
    for text in (*_SAMPLE_TEXTS, *(f"a {token} b{token}" for token in special_tokens)):
        for special in (True, False):
            expected = list(tokenizer(text, add_special_tokens=special)["input_ids"])
            found = ours.encode(text, add_special_tokens=special)
            if found != expected:
                raise BuildError(
                    f"{type(tokenizer).__name__} does more than its tokenizer.json says: for {text!r} "
                    f"(special tokens {special}) it gives {expected}, the file alone {found}"
                )
            said = tokenizer.decode(expected, skip_special_tokens=special)
            if said != (read := ours.decode(expected, skip_special_tokens=special)):
                raise BuildError(
                    f"{type(tokenizer).__name__} decodes {expected} to {said!r}, its tokenizer.json alone to {read!r}"
                )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", "utf-8", newline="\n")


# The text around pictures


def _describe_placeholder(processor: Any, model_config: Any, token_id: int | None) -> Images:
    failures: list[Undescribed] = []
    for placeholder in _placeholder_candidates(processor, model_config):
        try:
            return _describe_layout(processor, placeholder, token_id)
        except Undescribed as error:
            failures.append(error)
    # The first is the processor's own placeholder.
    raise next(iter(failures), Undescribed(f"{class_name(processor)} names no placeholder for a picture in the text"))


def _describe_layout(processor: Any, placeholder: str, token_id: int | None) -> Images:
    """Where the processor puts what around pictures: probes with one and with two, looked at between known words."""
    first, second, third = _PROBE
    prompt = f"{first}{placeholder}{second}"
    output, seen = run_processor(processor, prompt, [probe_picture(80, 60)])
    extra = sorted(set(output) - {"pixel_values", *_TEXT_OUTPUTS})
    if extra:
        raise Undescribed(f"{class_name(processor)} gives {', '.join(extra)} besides pixel_values")
    if np.any(np.asarray(output.get("token_type_ids", 0))):
        raise Undescribed(f"{class_name(processor)} gives token_type_ids that tell pictures from text")
    pixel_values(output, 1)
    before, last, after = _split(rf"(.*?){first}(.*){second}(.*)", seen, processor)
    for width, height in ((60, 90), (300, 40)):
        if run_processor(processor, prompt, [probe_picture(width, height)])[1] != seen:
            raise Undescribed(f"{class_name(processor)} makes the number of image tokens depend on the picture's size")
    expansion, per_prompt = last, None
    try:
        output, seen = run_processor(
            processor, f"{prompt}{placeholder}{third}", [probe_picture(80, 60), probe_picture(70, 60)]
        )
        pixel_values(output, 2)
    except Undescribed:
        per_prompt = 1
    else:
        parts = _split(rf"(.*?){first}(.*){second}(.*){third}(.*)", seen, processor)
        expansion = parts[1]
        if (parts[0], parts[2], parts[3]) != (before, last, after) or not last.startswith(expansion):
            raise Undescribed(f"{class_name(processor)} writes different text around several pictures")
    if token_id is None:
        inside = Counter(processor.tokenizer(expansion, add_special_tokens=False)["input_ids"])
        token_id = int(inside.most_common(1)[0][0]) if inside else -1
    tokens = token_ids(output).count(token_id) // len(output["pixel_values"])
    if not tokens:
        raise Undescribed(f"{class_name(processor)} writes no token {token_id} in a picture's place")
    steps: list[dict[str, Any]] = []
    if last != expansion:
        steps.append({"op": "insert_after_images", "text": last[len(expansion) :]})
    if before or after:
        steps.append({"op": "wrap_text", "before": before, "after": after})
    return Images(
        input="pixel_values",
        token_id=token_id,
        placeholder=placeholder,
        expansion=expansion,
        tokens_per_image=tokens,
        per_prompt=per_prompt,
        steps=tuple(steps),
    )


def _split(pattern: str, seen: str, processor: Any) -> tuple[str, ...]:
    match = re.fullmatch(pattern, seen, re.DOTALL)
    if match is None:
        raise Undescribed(f"{class_name(processor)} rewrites the prompt around its pictures")
    return match.groups()


def _placeholder_candidates(processor: Any, model_config: Any) -> list[str]:
    """The tokens that may stand for a picture, the processor's own first."""
    tokenizer = processor.tokenizer
    found = [getattr(owner, "image_token", None) for owner in (processor, tokenizer)]
    token_id = _configured_token(processor, model_config)
    if token_id is not None:
        found.append(tokenizer.convert_ids_to_tokens(token_id))
    return list(dict.fromkeys(str(token) for token in found if token))


def _configured_token(processor: Any, model_config: Any) -> int | None:
    for owner in (model_config, processor):
        for name in ("image_token_id", "image_token_index"):
            if isinstance(token_id := getattr(owner, name, None), int):
                return token_id
    return None


def _verify_prompts(processor: Any, images: Images) -> None:
    with tempfile.TemporaryDirectory() as directory:
        text = describe_text(processor, Path(directory))
        ours = TextProcessor.from_files(text, Path(directory))
    mark = images.placeholder or ""
    prompts = [(f"{mark}What is this?", 1), (f"What is\n{mark}\nthis?", 1), (f"It's {mark}", 1), (mark, 1)]
    if images.per_prompt is None:
        prompts += [(f"{mark}{mark}Which is larger?", 2), (f"{mark} and {mark} or {mark}.", 3)]
    for prompt, count in prompts:
        expected = token_ids(
            run_processor(processor, prompt, [probe_picture(50 + 9 * index, 64) for index in range(count)])[0]
        )
        if ours.encode(expand_placeholders(prompt, count, images)) != expected:
            raise Undescribed(
                f"{class_name(processor)} makes other tokens of the prompt {prompt!r} than its description"
            )


def _prompt(images: Images, count: int) -> str:
    return f"{(images.placeholder or '') * count}{_PROBE[0]}"


# Pictures


def _describe_steps(processor: Any, images: Images) -> Images:
    """The first of the candidate step lists that gives the processor's own pixels."""
    difference = float("inf")
    for steps in _candidate_steps(processor):
        candidate = replace(images, steps=(*steps, *images.steps))
        try:
            difference = min(difference, pixel_difference(processor, candidate))
        except GenbundleError as error:
            raise Undescribed(f"{class_name(processor)}: its picture settings can't be followed: {error}") from error
        if difference <= PIXEL_TOLERANCE:
            return candidate
    raise Undescribed(
        f"{class_name(processor.image_processor)} does more than its settings say: following them, pixels differ by "
        f"{difference:.3g}"
    )


def _candidate_steps(processor: Any) -> list[list[dict[str, Any]]]:
    settings = _settings(processor)
    steps: list[dict[str, Any]] = []
    if settings["do_convert_rgb"]:
        steps.append({"op": "convert_rgb"})
    if settings["do_resize"]:
        # Without a filter of its own, transformers' PIL backend resizes bilinearly.
        resample = settings["resample"]
        name = PIL.Image.Resampling(2 if resample is None else int(resample)).name.lower()
        steps.append({"op": "resize", **_size(settings["size"]), "resample": name})
    if settings["do_center_crop"]:
        steps.append({"op": "center_crop", **_size(settings["crop_size"])})
    if settings["do_rescale"]:
        steps.append({"op": "rescale", "factor": float(settings["rescale_factor"])})
    mean, std = (_three(settings[name]) for name in ("image_mean", "image_std"))
    if settings["do_normalize"]:
        steps.append({"op": "normalize", "mean": mean, "std": std})
    if not settings["do_pad"]:
        return [steps]
    at = 1 if settings["do_convert_rgb"] else 0
    square = {"op": "pad_square", "background": [int(value * 255) for value in mean] if mean else [0, 0, 0]}
    return [steps, [*steps[:at], square, *steps[at:]]]


def _settings(processor: Any) -> dict[str, Any]:
    """The image processor's settings, with what the processor sets over them."""
    names = (
        "do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale",
        "rescale_factor", "do_normalize", "image_mean", "image_std", "do_pad",
    )  # fmt: skip
    over = getattr(processor, "images_kwargs", None)
    over = over if isinstance(over, Mapping) else {}
    return {name: over.get(name, getattr(processor.image_processor, name, None)) for name in names}


def _size(size: Any) -> dict[str, int]:
    return {key: int(value) for key, value in dict(size or {}).items() if value is not None}


def _three(values: Any) -> list[float]:
    if values is None:
        return []
    return [float(values)] * 3 if isinstance(values, int | float) else [float(value) for value in values]


def _with_pil_backend(processor: Any) -> Any:
    """The processor with the PIL variant of its image processor, where it runs on torchvision.

    The runtime has Pillow only. The two variants resize differently, by about one of the 256 levels of a color.
    """
    images = processor.image_processor
    twin = getattr(transformers, f"{type(images).__name__.removesuffix('Fast')}Pil", None)
    if getattr(images, "backend", "pil") != "torchvision" or twin is None:
        return processor
    processor = copy.copy(processor)
    processor.image_processor = twin.from_dict(images.to_dict())
    return processor
