"""Probes: prompts and pictures that a processor is run on, and what it then did."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image


class Undescribed(Exception):
    """Why a processor's work isn't described; the words end up in the manifest."""


class _Recorder:
    """A tokenizer that keeps the texts it is called with; everything else is the tokenizer's own."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self.texts = tokenizer, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.texts.append(text)
        return self._tokenizer(text, *args, **kwargs)


def run_processor(processor: Any, text: str, pictures: Sequence[Any]) -> tuple[dict[str, Any], str]:
    """What the processor gives for a prompt with pictures, and the text that its tokenizer got."""
    processor = copy.copy(processor)
    processor.tokenizer = recorder = _Recorder(processor.tokenizer)
    try:
        output = dict(processor(text=[text], images=list(pictures), return_tensors="np"))
    except Exception as error:  # processors are model code, and may fail in any way
        raise Undescribed(f"{class_name(processor)} fails on a probe: {type(error).__name__}: {error}") from error
    if len(recorder.texts) != 1:
        raise Undescribed(f"{class_name(processor)} calls its tokenizer {len(recorder.texts)} times for one prompt")
    (seen,) = recorder.texts
    return output, seen if isinstance(seen, str) else seen[0]


def token_ids(output: Mapping[str, Any]) -> list[int]:
    """The ids of the one prompt that the processor ran on."""
    return [int(token) for token in np.asarray(output["input_ids"])[0]]


def pixel_values(output: Mapping[str, Any], count: int) -> np.ndarray:
    """The processor's pixels for `count` pictures, `[count, channels, height, width]` float32 or Undescribed."""
    pixels = np.asarray(output.get("pixel_values"))
    if pixels.dtype != np.float32 or pixels.ndim != 4 or len(pixels) != count:
        raise Undescribed(f"its pixel_values for {count} pictures are {list(pixels.shape)} {pixels.dtype}")
    return pixels


def probe_pictures(*, every_mode: bool) -> list[Any]:
    """Pictures unlike each other: both orientations, smaller and larger than any crop, and every mode it converts."""
    pictures: list[Any] = [
        probe_picture(*size) for size in ((97, 64), (64, 97), (512, 384), (11, 7), (224, 224), (12, 150))
    ]
    pictures.append(np.asarray(probe_picture(75, 58)))
    if every_mode:
        pictures += [probe_picture(83, 91).convert(mode) for mode in ("L", "P", "CMYK")]
        transparent = probe_picture(90, 70)
        transparent.putalpha(probe_picture(90, 70).convert("L"))
        pictures.append(transparent)
    return pictures


def probe_picture(width: int, height: int) -> PIL.Image.Image:
    """A picture of smooth colors with noise on them, the same every time."""
    rows, columns = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(width * 10_007 + height).integers(0, 64, (height, width, 3))
    colors = np.stack([rows * 191 // height, columns * 191 // width, (rows + columns) % 192], axis=-1)
    return PIL.Image.fromarray((colors + noise).astype(np.uint8))


def class_name(owner: Any) -> str:
    """What a message calls a processor or tokenizer."""
    return type(owner).__name__
