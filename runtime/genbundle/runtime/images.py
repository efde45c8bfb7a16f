"""Pictures to `pixel_values`: the steps that the bundle describes, done by Pillow and numpy."""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genbundle.bundles import BundleError, InputError
from genbundle.bundles.manifest import Images

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's own limit against decompression bombs, beyond which it only warns; no vision model sees that many pixels.
MAX_PIXELS = 89_478_485
# The largest edge that a described step may ask for: a manifest must not be able to ask for terabytes.
_MAX_EDGE = 16_384
# Pillow reads many more, some through programs of other makers.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_ACCEPTED = "a path, the bytes of a picture file, a PIL image, a numpy array [height, width, 3] uint8 or a data: URL"


def load_image(source: Any) -> Image:
    """One picture, upright and in RGB.

    A file's transparency is dropped, as transformers' `load_image` does; that of a PIL image or an array is put on
    white, as its image processors do with those.

    Args:
        source: a path, the bytes of a picture file, a `data:image/...;base64,` URL, a PIL image, or a numpy array
            `[height, width]`, `[height, width, 1]`, `[height, width, 3]` or `[height, width, 4]` uint8.

    Raises:
        InputError: no such file, not a picture, broken, too large, or an http URL (nothing is downloaded).
    """
    import PIL.Image

    if isinstance(source, PIL.Image.Image):
        return _finish(source, "the PIL image", flatten=True)
    if isinstance(source, np.ndarray):
        return PIL.Image.fromarray(_array_to_rgb(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return _open(io.BytesIO(source), f"the picture of {len(source)} bytes")
    if isinstance(source, str) and source.startswith("data:"):
        return _open(io.BytesIO(_decode_data_url(source)), f"the picture in {source[:40]!r}...")
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        raise InputError(f"{source}: pictures aren't downloaded here: download it, and give the path of the file")
    if isinstance(source, str | os.PathLike):
        path = Path(os.fsdecode(source))
        if not path.is_file():
            raise InputError(f"{path}: no such picture file; accepted is {_ACCEPTED}")
        return _open(path, str(path))
    raise InputError(f"expected a picture, got {type(source).__name__}: accepted is {_ACCEPTED}")


def pictures_of(messages: Sequence[Any]) -> list[Any]:
    """The pictures that chat messages carry, in order, each as `load_image` takes it.

    An `image` part holds its picture as `image`, `path` or `url`; an OpenAI `image_url` part holds a `data:` URL.

    Raises:
        InputError: parts of which only some hold a picture, or an `image_url` that is no `data:` URL.
    """
    found = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, Mapping) and part.get("type") == "image":
                found.append(next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None))
            elif isinstance(part, Mapping) and part.get("type") == "image_url":
                found.append(_data_url(part.get("image_url")))
    pictures = [picture for picture in found if picture is not None]
    if pictures and len(pictures) != len(found):
        raise InputError("some of the messages' image parts hold a picture and some don't: give all of them there")
    return pictures


def _data_url(value: Any) -> str:
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str) or not url.startswith("data:"):
        raise InputError(
            f"image_url: expected {{'url': 'data:image/...;base64,...'}}, got {value!r:.80}; nothing is downloaded here"
        )
    return url


def preprocess(images: Sequence[Any], description: Images) -> np.ndarray:
    """The pixels of pictures as the model takes them.

    Args:
        images: pictures, each as `load_image` takes it.
        description: the bundle's description of the model's own processor.

    Returns:
        `[pictures, channels, height, width]` float32.

    Raises:
        InputError: a picture that can't be read (says which), or a model whose processing isn't described.
        BundleError: a description that asks for something unknown.
    """
    if not any(step.get("op") in _PICTURE_STEPS for step in description.steps):
        reason = description.reason or "the bundle doesn't describe how its processor prepares them"
        raise InputError(f"this model takes no pictures as they are: {reason}. Give `{description.input}` as an array")
    if not len(images):
        raise InputError("expected at least one picture, got none")
    pixels = []
    for index, source in enumerate(images):
        try:
            image = load_image(source)
        except InputError as error:
            raise InputError(f"image {index + 1} of {len(images)}: {error}") from error
        pixels.append(_run(np.asarray(image), description.steps))
    shapes = sorted({array.shape for array in pixels})
    if len(shapes) > 1:
        raise InputError(f"this model takes several pictures only of one size: these came out as {shapes}")
    return np.stack([np.moveaxis(array, -1, 0) for array in pixels]).astype(np.float32)


def expand_placeholders(text: str, image_count: int, description: Images) -> str:
    """The prompt with each picture's placeholder replaced by the tokens that the model wants in its place.

    Raises:
        InputError: more or fewer pictures than placeholders, or more than the model takes; gives both counts.
    """
    placeholder, expansion = description.placeholder, description.expansion
    if placeholder is None or expansion is None:
        reason = description.reason or "the bundle doesn't describe its placeholder"
        raise InputError(
            f"prompts with pictures aren't prepared for this model: {reason}. Give `input_ids` as an array"
        )
    found = text.count(placeholder)
    if found != image_count:
        raise InputError(
            f"the prompt has {found} times the placeholder {placeholder!r} and {image_count} pictures were given: "
            "put one where each picture belongs"
        )
    if description.per_prompt is not None and image_count > description.per_prompt:
        raise InputError(f"this model takes at most {description.per_prompt} pictures per prompt, got {image_count}")
    if not image_count:
        return text
    *before, after = text.split(placeholder)
    text, last = "".join(part + expansion for part in before), ""
    for step in description.steps:
        if step.get("op") == "insert_after_images":
            last = _option(step, "text", str)
        elif step.get("op") == "wrap_text":
            text, after = _option(step, "before", str) + text, after + _option(step, "after", str)
    return text + last + after


def _open(file: Path | io.BytesIO, name: str) -> Image:
    import PIL.Image

    try:
        with PIL.Image.open(file, formats=_FORMATS) as image:
            return _finish(image, name, flatten=False)
    except InputError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise InputError(f"{name} can't be read as any of {', '.join(_FORMATS)}") from error
    except Exception as error:  # broken files surface as OSError, SyntaxError, ValueError, struct.error ...
        raise InputError(f"{name} can't be read: {error}") from error


def _finish(image: Image, name: str, *, flatten: bool) -> Image:
    """Check the size before anything is decoded, then turn upright and convert."""
    import PIL.Image
    import PIL.ImageOps

    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{name} has {width} x {height} pixels, at most {MAX_PIXELS} are read: make it smaller")
    if not width or not height:
        raise InputError(f"{name} has {width} x {height} pixels")
    image = PIL.ImageOps.exif_transpose(image)
    if flatten and ("A" in image.getbands() or image.info.get("transparency") is not None):
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _array_to_rgb(array: np.ndarray) -> np.ndarray:
    channels = 1 if array.ndim == 2 else array.shape[-1]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        raise InputError(
            f"expected a picture as an array [height, width, 3] uint8 with values from 0 to 255, "
            f"got {list(array.shape)} {array.dtype}"
        )
    array = array.reshape(*array.shape[:2], channels)
    if channels == 1:
        array = np.repeat(array, 3, axis=-1)
    elif channels == 4:
        alpha = array[..., 3:] / 255
        array = np.round(alpha * array[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return np.ascontiguousarray(array)


def _decode_data_url(source: str) -> bytes:
    head, comma, data = source.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InputError(f"expected a data:image/...;base64, URL, got {source[:40]!r}...")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the picture in {source[:40]!r}... isn't base64: {error}") from error


def _run(pixels: np.ndarray, steps: Sequence[Mapping[str, Any]]) -> np.ndarray:
    for step in steps:
        name = step.get("op")
        if name in _TEXT_STEPS:
            continue
        if name not in _PICTURE_STEPS:
            known = ", ".join((*_PICTURE_STEPS, *_TEXT_STEPS))
            raise BundleError(f"$.images.steps asks for the unknown step {name!r}; this version knows {known}")
        pixels = _PICTURE_STEPS[name](pixels, step)
    return pixels


def _convert_rgb(pixels: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    return pixels  # load_image has done it: its result is always RGB


def _resize(pixels: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    import PIL.Image

    filters = {item.name.lower(): item for item in PIL.Image.Resampling}
    if step.get("resample") not in filters:
        raise BundleError(f"$.images.steps: resample is {step.get('resample')!r}, expected one of {', '.join(filters)}")
    height, width = _target_size(pixels.shape[0], pixels.shape[1], step)
    if not 0 < height <= _MAX_EDGE or not 0 < width <= _MAX_EDGE or height * width > MAX_PIXELS:
        given = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise InputError(f"a picture of {given} pixels would be resized to {width} x {height}: crop it first")
    image = PIL.Image.fromarray(pixels.astype(np.uint8))
    return np.asarray(image.resize((width, height), resample=filters[step["resample"]]))


def _target_size(height: int, width: int, step: Mapping[str, Any]) -> tuple[int, int]:
    """Where a resize ends: fixed, by the shorter edge (the longer one limited or not), or inside a box."""
    if "shortest_edge" in step and "longest_edge" in step:
        short, limit = _edge(step, "shortest_edge"), _edge(step, "longest_edge")
        exact: float = short
        if max(height, width) / min(height, width) * short > limit:
            exact = limit * min(height, width) / max(height, width)
            short = round(exact)
        if min(height, width) == short:
            return height, width
        return (int(exact * height / width), short) if width < height else (short, int(exact * width / height))
    if "shortest_edge" in step:
        short = _edge(step, "shortest_edge")
        long = int(short * max(height, width) / min(height, width))
        return (long, short) if width <= height else (short, long)
    if "max_height" in step:
        scale = min(_edge(step, "max_height") / height, _edge(step, "max_width") / width)
        return int(height * scale), int(width * scale)
    return _edge(step, "height"), _edge(step, "width")


def _center_crop(pixels: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    """Cut out the middle; a picture that is smaller gets a black frame first."""
    height, width = _edge(step, "height"), _edge(step, "width")
    _check_frame(pixels, max(height, pixels.shape[0]), max(width, pixels.shape[1]))
    rows, top = _center(pixels.shape[0], height)
    columns, left = _center(pixels.shape[1], width)
    framed = np.pad(pixels, (rows, columns, (0, 0))) if any((*rows, *columns)) else pixels
    return framed[top : top + height, left : left + width]


def _center(size: int, wanted: int) -> tuple[tuple[int, int], int]:
    """The frame to put around an axis, and where the cut then starts; odd remainders go as transformers puts them."""
    missing = max(wanted - size, 0)
    before = (missing + 1) // 2
    return (before, missing - before), (size - wanted) // 2 + before


def _pad_square(pixels: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    """Put the picture in the middle of a square of the color `background`."""
    height, width, channels = pixels.shape
    edge = max(height, width)
    _check_frame(pixels, edge, edge)
    square = np.empty((edge, edge, channels), pixels.dtype)
    square[:] = _numbers(step, "background", channels)
    top, left = (edge - height) // 2, (edge - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def _check_frame(pixels: np.ndarray, height: int, width: int) -> None:
    """InputError for a picture so narrow that a frame around it would be gigabytes."""
    if height * width > MAX_PIXELS:
        raise InputError(
            f"a picture of {pixels.shape[1]} x {pixels.shape[0]} pixels would be put into {width} x {height}, at most "
            f"{MAX_PIXELS} pixels are made: crop it first"
        )


def _rescale(pixels: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    # In float64 and then down, as transformers does: the last bit differs otherwise.
    return (pixels.astype(np.float64) * _option(step, "factor", int | float)).astype(np.float32)


def _normalize(pixels: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    channels = pixels.shape[-1]
    mean, std = _numbers(step, "mean", channels), _numbers(step, "std", channels)
    return (pixels.astype(np.float32) - mean.astype(np.float32)) / std.astype(np.float32)


def _option(step: Mapping[str, Any], name: str, kind: Any) -> Any:
    value = step.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BundleError(f"$.images.steps: `{name}` of {step.get('op')!r} is {value!r}")
    return value


def _edge(step: Mapping[str, Any], name: str) -> int:
    value = _option(step, name, int)
    if not 0 < value <= _MAX_EDGE:
        raise BundleError(f"$.images.steps: `{name}` of {step.get('op')!r} is {value}, expected 1 to {_MAX_EDGE}")
    return value


def _numbers(step: Mapping[str, Any], name: str, count: int) -> np.ndarray:
    value = _option(step, name, list | tuple)
    if len(value) != count or not all(isinstance(item, int | float) for item in value):
        raise BundleError(f"$.images.steps: `{name}` of {step.get('op')!r} is {value!r}, expected {count} numbers")
    return np.array(value)


_PICTURE_STEPS: dict[str, Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]] = {
    "convert_rgb": _convert_rgb,
    "pad_square": _pad_square,
    "resize": _resize,
    "center_crop": _center_crop,
    "rescale": _rescale,
    "normalize": _normalize,
}
# What a processor does to the prompt besides replacing placeholders; `expand_placeholders` does these.
_TEXT_STEPS = ("insert_after_images", "wrap_text")
