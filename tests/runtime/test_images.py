"""Pictures: loading them as transformers does, the described steps against its image processors, hostile files."""

import base64
import io
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import PIL.Image
import pytest
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.image_utils import load_image as reference_load
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from genbundle.bundles import BundleError, InputError
from genbundle.bundles.manifest import Images
from genbundle.runtime.images import expand_placeholders, load_image, pictures_of, preprocess

CLIP = (
    {"op": "convert_rgb"},
    {"op": "resize", "shortest_edge": 48, "resample": "bicubic"},
    {"op": "center_crop", "height": 48, "width": 48},
    {"op": "rescale", "factor": 1 / 255},
    {"op": "normalize", "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]},
)
CLIP_SETTINGS = {
    "size": {"shortest_edge": 48},
    "crop_size": {"height": 48, "width": 48},
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}
SIZES = [(97, 64), (64, 97), (300, 200), (11, 7), (48, 48), (49, 47), (20, 150)]


def picture(width, height, mode="RGB"):
    values = np.random.default_rng(width * 1_000 + height).integers(0, 256, (height, width, 4), np.uint8)
    if mode == "RGBA":
        return PIL.Image.fromarray(values)
    return PIL.Image.fromarray(values[..., :3]).convert(mode)


def description(*steps, **fields):
    return Images(input="pixel_values", steps=steps, **fields)


def check(steps, processor, pictures):
    for image in pictures:
        expected = processor(images=[image], return_tensors="np")["pixel_values"]
        result = preprocess([image], description(*steps))
        assert result.dtype == np.float32
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
def test_clip(mode):
    check(CLIP, CLIPImageProcessorPil(**CLIP_SETTINGS), [picture(*size, mode) for size in SIZES])


def test_clip_on_arrays():
    arrays = [np.asarray(picture(*size, mode)) for size in SIZES for mode in ("RGB", "RGBA")]
    check(CLIP, CLIPImageProcessorPil(**CLIP_SETTINGS), arrays)


@pytest.mark.parametrize("crop", [(31, 60), (60, 31), (50, 51), (20, 21), (100, 7)])
def test_center_crop_pads_and_rounds_as_transformers(crop):
    height, width = crop
    steps = (CLIP[1], {"op": "center_crop", "height": height, "width": width}, *CLIP[3:])
    settings = {**CLIP_SETTINGS, "crop_size": {"height": height, "width": width}}
    check(steps, CLIPImageProcessorPil(**settings), [picture(*size) for size in SIZES])


@pytest.mark.parametrize("resample", list(PIL.Image.Resampling))
def test_fixed_size_and_every_filter(resample):
    settings = {"size": {"height": 40, "width": 52}, "resample": int(resample)}
    steps = (
        {"op": "resize", "height": 40, "width": 52, "resample": resample.name.lower()},
        {"op": "rescale", "factor": 1 / 255},
        {"op": "normalize", "mean": [0.5] * 3, "std": [0.5] * 3},
    )
    check(steps, SiglipImageProcessorPil(**settings), [picture(*size) for size in SIZES])


@pytest.mark.parametrize(
    "size",
    [
        {"shortest_edge": 40, "longest_edge": 70},
        {"shortest_edge": 64, "longest_edge": 97},
        {"shortest_edge": 33, "longest_edge": 1_000},
        {"max_height": 50, "max_width": 90},
    ],
)
def test_other_ways_to_say_a_size(size):
    processor = CLIPImageProcessorPil(size=size, do_center_crop=False, do_rescale=False, do_normalize=False)
    pictures = [picture(*shape) for shape in SIZES if size.get("max_height") is None or shape != (20, 150)]
    check([{"op": "resize", **size, "resample": "bicubic"}], processor, pictures)


def test_pad_square():
    processor = LlavaImageProcessorPil(**CLIP_SETTINGS, do_pad=True, pad_size={"height": 1, "width": 1})
    square = {"op": "pad_square", "background": [int(value * 255) for value in CLIP_SETTINGS["image_mean"]]}
    check((CLIP[0], square, *CLIP[1:]), processor, [picture(*size) for size in SIZES])


def test_several_pictures_make_one_array():
    pictures = [picture(*size) for size in SIZES]
    expected = CLIPImageProcessorPil(**CLIP_SETTINGS)(images=pictures, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(preprocess(pictures, description(*CLIP)), expected, atol=1e-6)
    unequal = description({"op": "resize", "shortest_edge": 30, "resample": "bilinear"})
    with pytest.raises(InputError, match="only of one size"):
        preprocess(pictures, unequal)


@pytest.mark.parametrize(
    ("form", "mode"),
    [(form, mode) for form in ("PNG", "WEBP", "GIF", "BMP") for mode in ("RGB", "RGBA", "L", "P")]
    + [("JPEG", mode) for mode in ("RGB", "L", "CMYK")],
)
def test_files_load_as_in_transformers(tmp_path, form, mode):
    path = tmp_path / "picture"
    picture(30, 20, mode).save(path, form)
    expected = np.asarray(reference_load(str(path)))
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), data, bytearray(data), url):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "picture.jpg"
    picture(30, 20).save(path, exif=exif)
    expected = reference_load(str(path))
    assert expected.size == ((30, 20) if orientation < 5 else (20, 30))
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(expected))
    with PIL.Image.open(path) as opened:
        np.testing.assert_array_equal(np.asarray(load_image(opened)), np.asarray(expected))


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((3, 40, 40), np.uint8), r"\[3, 40, 40\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"\[1, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
    ],
)
def test_arrays_that_are_no_pictures(array, found):
    with pytest.raises(InputError, match=f"height, width, 3.*{found}"):
        load_image(array)


def test_gray_arrays():
    gray = np.asarray(picture(9, 5, "L"))
    for array in (gray, gray[..., None]):
        np.testing.assert_array_equal(np.asarray(load_image(array)), np.repeat(gray[..., None], 3, -1))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IEND", b"")


def good_bytes():
    file = io.BytesIO()
    picture(64, 64).save(file, "PNG")
    return file.getvalue()


BROKEN = {
    "empty": b"",
    "text": b"not a picture at all",
    "truncated": good_bytes()[:200],
    "header only": good_bytes()[:30],
    "bad checksum": good_bytes()[:20] + b"\0\0\0\0" + good_bytes()[24:],
    "no data": png(8, 8),
    "zero size": png(0, 0, chunk(b"IDAT", b"")),
    "text bomb": png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 200_000_000, 9))),
    "jpeg start": b"\xff\xd8\xff\xe0\0\x10JFIF" + b"\0" * 30,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_named(tmp_path, name):
    path = tmp_path / "holiday.png"
    path.write_bytes(BROKEN[name])
    with pytest.raises(InputError, match=r"holiday\.png"):
        load_image(path)
    with pytest.raises(InputError, match=r"image 2 of 2: .*holiday\.png"):
        preprocess([picture(5, 5), path], description(*CLIP))
    with pytest.raises(InputError, match=f"the picture of {len(BROKEN[name])} bytes"):
        load_image(BROKEN[name])


@pytest.mark.parametrize("form", ["EPS", "PPM", "ICO", "TGA", "PCX"])
def test_only_common_formats_are_opened(form):
    file = io.BytesIO()
    picture(16, 16).save(file, form)
    with pytest.raises(InputError, match=r"bytes can't be read as any of PNG, JPEG, WEBP, GIF, BMP, TIFF$"):
        load_image(file.getvalue())


def test_pictures_of_phones_and_scanners():
    for form, options in (("TIFF", {}), ("MPO", {"save_all": True, "append_images": [picture(30, 20)]})):
        file = io.BytesIO()
        picture(30, 20).save(file, form, **options)
        assert load_image(file.getvalue()).size == (30, 20)


@pytest.mark.parametrize(
    ("shape", "step", "made"),
    [
        ((1, 12_000), {"op": "pad_square", "background": [0, 0, 0]}, "put into 12000 x 12000"),
        ((8_000_000, 1), {"op": "pad_square", "background": [0, 0, 0]}, "put into 8000000 x 8000000"),
        ((1, 9_000), {"op": "center_crop", "height": 16_000, "width": 5}, "put into 9000 x 16000"),
        (
            (5, 5),
            {"op": "resize", "height": 16_000, "width": 16_000, "resample": "nearest"},
            "resized to 16000 x 16000",
        ),
    ],
)
def test_small_pictures_that_would_take_gigabytes(shape, step, made):
    pixels = np.zeros((*shape, 3), np.uint8)
    tracemalloc.start()
    with pytest.raises(InputError, match=made):
        preprocess([pixels], description(step))
    assert tracemalloc.get_traced_memory()[1] < 100_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("size", [(10_000, 9_000), (20_000, 20_000), (2_000_000_000, 2_000_000_000)])
def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size, chunk(b"IDAT", zlib.compress(b"\0" * 1000))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        with pytest.raises(InputError, match=r"bomb\.png"):
            load_image(path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("https://example.com/a.png", "download it"),
        ("HTTP://example.com/a.png", "download it"),
        ("no/such/file.png", "no such picture file"),
        (".", "no such picture file"),
        ("data:image/png;base64,@@@", "isn't base64"),
        ("data:image/png,abc", "base64, URL"),
        (None, "got NoneType"),
        (3, "got int"),
    ],
)
def test_sources_that_are_none(source, words):
    with pytest.raises(InputError, match=words):
        load_image(source)


@pytest.mark.parametrize(
    "step",
    [
        {"op": "execute", "code": "1"},
        {},
        {"op": "resize", "height": 10, "width": 10, "resample": "sharp"},
        {"op": "resize", "height": 10, "resample": "bicubic"},
        {"op": "resize", "height": 10**9, "width": 10**9, "resample": "bicubic"},
        {"op": "resize", "shortest_edge": 0, "resample": "bicubic"},
        {"op": "resize", "shortest_edge": True, "resample": "bicubic"},
        {"op": "center_crop", "height": -1, "width": 4},
        {"op": "center_crop", "height": 4.5, "width": 4},
        {"op": "rescale"},
        {"op": "rescale", "factor": "0.1"},
        {"op": "normalize", "mean": [0.5], "std": [0.5, 0.5, 0.5]},
        {"op": "normalize", "mean": [0.5] * 3, "std": ["a"] * 3},
        {"op": "pad_square", "background": 3},
    ],
)
def test_descriptions_that_make_no_sense(step):
    with pytest.raises(BundleError, match=r"images\.steps"):
        preprocess([picture(8, 8)], description({"op": "convert_rgb"}, step))


def test_a_picture_too_long_to_resize():
    with pytest.raises(InputError, match="3000 x 1 pixels would be resized to 144000 x 48"):
        preprocess([np.zeros((1, 3_000, 3), np.uint8)], description(*CLIP))


def test_models_that_take_arrays_say_why():
    rich = Images(input="pixel_values", reason="its processor cuts pictures into tiles")
    with pytest.raises(InputError, match=r"cuts pictures into tiles.*`pixel_values` as an array"):
        preprocess([picture(5, 5)], rich)
    with pytest.raises(InputError, match=r"cuts pictures into tiles.*`input_ids` as an array"):
        expand_placeholders("<image>", 1, rich)
    with pytest.raises(InputError, match="at least one picture"):
        preprocess([], description(*CLIP))


def test_placeholders_are_expanded():
    images = description(*CLIP, placeholder="<image>", expansion="<a><image><image><b>")
    assert expand_placeholders("x <image> y", 1, images) == "x <a><image><image><b> y"
    assert expand_placeholders("<image><image>", 2, images) == "<a><image><image><b>" * 2
    assert expand_placeholders("no picture", 0, images) == "no picture"


def test_text_that_a_processor_adds():
    steps = ({"op": "insert_after_images", "text": "<bos>"}, {"op": "wrap_text", "before": ">", "after": "\n"})
    images = description(*CLIP, *steps, placeholder="<image>", expansion="<image><image>")
    assert expand_placeholders("<image>what?", 1, images) == "><image><image><bos>what?\n"
    assert expand_placeholders("<image>or<image>?", 2, images) == "><image><image>or<image><image><bos>?\n"
    assert preprocess([picture(9, 9)], images).shape == (1, 3, 48, 48)


@pytest.mark.parametrize(("text", "count"), [("<image>", 0), ("<image>", 2), ("none", 1), ("<image><image>", 1)])
def test_a_different_number_of_pictures(text, count):
    images = description(*CLIP, placeholder="<image>", expansion="<image><image>")
    with pytest.raises(InputError, match=f"has {text.count('<image>')} times.*'<image>' and {count} pictures"):
        expand_placeholders(text, count, images)


def test_more_pictures_than_the_model_takes():
    images = description(*CLIP, placeholder="<image>", expansion="<image>", per_prompt=1)
    with pytest.raises(InputError, match="at most 1 pictures per prompt, got 2"):
        expand_placeholders("<image><image>", 2, images)


def test_pictures_in_messages():
    url = "data:image/png;base64,AAAA"
    messages = [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]},
        {"role": "assistant", "content": None},
    ]
    assert pictures_of(messages) == ["a.png", url]
    assert pictures_of([{"role": "user", "content": [{"type": "image"}]}]) == []


@pytest.mark.parametrize("url", ["https://example.org/a.png", "file:///etc/passwd", "/etc/passwd", None, 3])
def test_picture_urls_are_data_and_name_no_file(url):
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    with pytest.raises(InputError, match=r"image_url: expected \{'url': 'data:image"):
        pictures_of(messages)


def test_messages_of_which_only_some_hold_their_picture():
    content = [{"type": "image", "image": "a.png"}, {"type": "image"}]
    with pytest.raises(InputError, match="some of the messages' image parts hold a picture and some don't"):
        pictures_of([{"role": "user", "content": content}])
