"""Descriptions of tokenizers and processors, held against the real ones."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from genbundle.builder.processing import (
    PIXEL_TOLERANCE,
    describe_images,
    describe_text,
    pixel_difference,
)
from genbundle.bundles import BuildError
from genbundle.bundles.codec import decode, encode
from genbundle.bundles.manifest import Images, Text
from genbundle.runtime.images import expand_placeholders, preprocess
from genbundle.runtime.text import TextProcessor

DEMO = Path(__file__).parents[2] / "builder/genbundle/builder/demo/model"
CORPUS = ["What is this picture? It's a red circle, and a green square.", "naïve café 東京"] * 20


def make_tokenizer(*extra, bos=True, **named):
    """A byte-level BPE that puts <s> in front, with the special tokens a processor looks for."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>", *extra, *named.values()]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=special)
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=named
    )


def clip(**settings):
    return CLIPImageProcessorPil(
        **{"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, **settings}
    )


def llava(image_processor=None, **settings):
    settings = {
        "patch_size": 7,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        **settings,
    }
    return LlavaProcessor(image_processor or clip(), make_tokenizer("<image>"), **settings)


def paligemma():
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    return PaliGemmaProcessor(images, make_tokenizer("<image>"))


def picture(width, height, mode="RGB"):
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return PIL.Image.fromarray(values).convert(mode)


def check_against(processor, images, prompt, pictures, directory):
    """The runtime with the description, as read back from a manifest, against the processor itself."""
    text = describe_text(processor, directory)
    images = decode(Images, json.loads(json.dumps(encode(images))))
    text = decode(Text, json.loads(json.dumps(encode(text))))
    expected = processor(text=[prompt], images=pictures, return_tensors="np")
    np.testing.assert_allclose(preprocess(pictures, images), expected["pixel_values"], atol=PIXEL_TOLERANCE)
    ours = TextProcessor.from_files(text, directory)
    ids = ours.encode(expand_placeholders(prompt, len(pictures), images))
    assert ids == expected["input_ids"][0].tolist()
    assert ids.count(images.token_id) == images.tokens_per_image * len(pictures)


def test_llava(tmp_path):
    processor = llava()
    images = describe_images(processor)
    assert images is not None and images.reason is None
    assert [step["op"] for step in images.steps] == ["convert_rgb", "resize", "center_crop", "rescale", "normalize"]
    assert (images.placeholder, images.expansion) == ("<image>", "<image>" * 16)
    assert (images.token_id, images.tokens_per_image, images.per_prompt) == (3, 16, None)
    assert pixel_difference(processor, images) <= PIXEL_TOLERANCE
    check_against(processor, images, "A <image> and <image>?", [picture(70, 51), picture(33, 91, "L")], tmp_path)


def test_llava_that_pads_to_a_square(tmp_path):
    square = LlavaImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        do_pad=True,
        pad_size={"height": 1, "width": 1},
    )
    processor = llava(square)
    images = describe_images(processor)
    assert images is not None and images.reason is None
    assert [step["op"] for step in images.steps][:2] == ["convert_rgb", "pad_square"]
    check_against(processor, images, "<image>", [picture(91, 40)], tmp_path)


@pytest.mark.parametrize("kind", [SiglipImageProcessorPil, ViTImageProcessorPil])
def test_other_image_processors_of_a_fixed_size(tmp_path, kind):
    processor = llava(kind(size={"height": 28, "width": 28}), num_additional_image_tokens=0)
    images = describe_images(processor)
    assert images is not None and images.reason is None
    assert images.tokens_per_image == 15
    check_against(processor, images, "<image> it", [picture(91, 40)], tmp_path)


def test_paligemma_with_the_text_it_adds(tmp_path):
    processor = paligemma()
    images = describe_images(processor)
    assert images is not None and images.reason is None
    assert (images.expansion, images.tokens_per_image) == ("<image>" * 4, 4)
    added = [step for step in images.steps if step["op"] in ("insert_after_images", "wrap_text")]
    assert added == [
        {"op": "insert_after_images", "text": "<s>"},
        {"op": "wrap_text", "before": "", "after": "\n"},
    ]
    check_against(processor, images, "<image>What is this?", [picture(70, 51)], tmp_path)
    check_against(processor, images, "<image><image>Which?", [picture(70, 51), picture(9, 9)], tmp_path)


def test_the_demo_model(tmp_path):
    if not DEMO.is_dir():
        pytest.skip("the demo model isn't in this checkout")
    processor = AutoProcessor.from_pretrained(DEMO)
    config = SimpleNamespace(**json.loads((DEMO / "config.json").read_text(encoding="utf-8")))
    images = describe_images(processor, config)
    assert images is not None and images.reason is None
    assert images.token_id == config.image_token_index
    assert images.tokens_per_image == config.image_seq_length
    check_against(processor, images, "<|user|><image>what?<|end|>", [picture(80, 60)], tmp_path)
    ours = TextProcessor.from_files(describe_text(processor, tmp_path), tmp_path, chat_adds_special_tokens=True)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color?"}]}]
    prompt = ours.apply_chat_template(messages)
    assert prompt == processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = processor(text=[prompt], images=[picture(80, 60)])["input_ids"][0]
    assert ours.encode_chat(expand_placeholders(prompt, 1, images)) == expected


def idefics3():
    tokenizer = make_tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    return Idefics3Processor(images, tokenizer, image_seq_len=4)


def qwen2_vl():
    tokenizer = make_tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    processor = object.__new__(Qwen2VLProcessor)
    # Its __init__ wants a video processor, which needs torchvision.
    vars(processor).update(
        image_processor=Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56),
        tokenizer=tokenizer,
        chat_template=None,
        image_token="<|image_pad|>",
        image_token_id=3,
        video_token="<|video_pad|>",
    )
    return processor


def gemma3():
    named = {"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return Gemma3Processor(images, make_tokenizer(**named), image_seq_length=4)


class Brightening(CLIPImageProcessorPil):
    """Does something that none of its settings says."""

    def normalize(self, image, mean, std, **kwargs):
        return super().normalize(image, mean, std, **kwargs) + np.float32(0.01)


class Shouting(LlavaProcessor):
    """Changes the words of the prompt."""

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        images, text, *rest = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        return images, [item.replace("What", "WHAT") for item in text], *rest


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (idefics3, "Idefics3Processor .*pixel_attention_mask.* besides pixel_values"),
        (qwen2_vl, "Qwen2VLProcessor gives image_grid_thw, .*besides pixel_values"),
        (gemma3, "Gemma3Processor gives token_type_ids that tell pictures from text"),
        (lambda: llava(clip(do_center_crop=False)), "number of image tokens depend on the picture's size"),
        (lambda: llava(Brightening(size={"height": 28, "width": 28}, do_center_crop=False)), "pixels differ by 0.01"),
        (lambda: Shouting(clip(), make_tokenizer("<image>"), patch_size=7), "other tokens of the prompt '<image>What"),
        (lambda: llava(clip(do_rescale=False, do_normalize=False)), "uint8"),
    ],
)
def test_richer_processors_get_a_reason_instead_of_a_guess(make, reason):
    images = describe_images(make(), SimpleNamespace(image_token_id=3))
    assert images is not None
    assert images == Images(input="pixel_values", token_id=3, reason=images.reason)
    assert re.search(reason, images.reason or ""), images.reason


def test_a_processor_that_takes_one_picture():
    class OnePicture(LlavaProcessor):
        def __call__(self, images=None, text=None, **kwargs):
            if len(images) > 1:
                raise ValueError("one picture only")
            return super().__call__(images=images, text=text, **kwargs)

    images = describe_images(OnePicture(clip(), make_tokenizer("<image>"), patch_size=7))
    assert images is not None and images.reason is None
    assert (images.per_prompt, images.tokens_per_image) == (1, 16)


def test_the_real_processor_is_left_as_it_was():
    processor = llava()
    tokenizer = processor.tokenizer
    describe_images(processor)
    assert processor.tokenizer is tokenizer


def test_a_tokenizer_takes_no_pictures():
    assert describe_images(make_tokenizer("<image>")) is None


def test_a_torchvision_processor_is_described_by_its_pil_variant():
    class CLIPImageProcessor(CLIPImageProcessorPil):
        """Named and marked as the torchvision variant is, which can't be imported without torchvision."""

        backend = "torchvision"

        def resize(self, image, *args, **kwargs):
            raise AssertionError("only the PIL variant is run")

    settings = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    images = describe_images(llava(CLIPImageProcessor(**settings)))
    assert images == describe_images(llava())


# Text


def test_the_files_of_a_tokenizer(tmp_path):
    tokenizer = make_tokenizer("<image>")
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    tokenizer("leaves padding and truncation on", padding="max_length", max_length=9, truncation=True)
    text = describe_text(tokenizer, tmp_path)
    assert text == Text(
        tokenizer="tokenizer.json",
        chat_template="chat_template.jinja",
        special_tokens={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        padding_token_id=2,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["padding"] is None
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    ours = TextProcessor.from_files(text, tmp_path)
    messages = [{"role": "user", "content": "What?"}]
    expected = tokenizer.apply_chat_template(messages)["input_ids"]
    assert ours.encode_chat(ours.apply_chat_template(messages)) == expected


def test_the_same_tokenizer_gives_the_same_bytes(tmp_path):
    saved, loaded = tmp_path / "saved", [tmp_path / "a", tmp_path / "b"]
    make_tokenizer("<image>").save_pretrained(saved)
    for directory in loaded:
        directory.mkdir()
        describe_text(PreTrainedTokenizerFast.from_pretrained(saved), directory)
        assert str(tmp_path) not in (directory / "tokenizer_config.json").read_text(encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (loaded[0] / name).read_bytes() == (loaded[1] / name).read_bytes()


@pytest.mark.parametrize(
    ("template", "expected"), [(None, None), ("{{ 1 }}\r\n", "{{ 1 }}\r\n"), ({"default": "d", "tool_use": "t"}, "d")]
)
def test_chat_templates_are_kept_as_they_are(tmp_path, template, expected):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    text = describe_text(tokenizer, tmp_path)
    if expected is None:
        assert text.chat_template is None
        assert not (tmp_path / "chat_template.jinja").exists()
    else:
        assert (tmp_path / "chat_template.jinja").read_bytes().decode() == expected


def test_a_processors_own_template_comes_first(tmp_path):
    processor = llava()
    processor.chat_template, processor.tokenizer.chat_template = "processor", "tokenizer"
    describe_text(processor, tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == "processor"


def test_cleaned_up_spaces_are_part_of_the_decoder(tmp_path):
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    special = ["[UNK]", "[PAD]"]
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", clean_up_tokenization_spaces=True
    )
    ours = TextProcessor.from_files(describe_text(tokenizer, tmp_path), tmp_path)
    ids = tokenizer("What is this? It's a red circle, a square.")["input_ids"]
    assert ours.decode(ids) == tokenizer.decode(ids) == "What is this? It's a red circle, a square."


def test_a_tokenizer_without_a_fast_variant(tmp_path):
    class PythonTokenizer:
        backend_tokenizer = None

    with pytest.raises(BuildError, match=r"PythonTokenizer .*without a tokenizer\.json"):
        describe_text(PythonTokenizer(), tmp_path)


def test_a_tokenizer_that_does_more_than_its_file_says(tmp_path):
    class Reversing(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus(text[::-1] if isinstance(text, str) else text, *args, **kwargs)

    tokenizer = Reversing(tokenizer_object=make_tokenizer().backend_tokenizer)
    with pytest.raises(BuildError, match=r"Reversing does more than its tokenizer\.json says"):
        describe_text(tokenizer, tmp_path)
