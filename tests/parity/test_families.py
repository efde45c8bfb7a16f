"""A few classes for each kind of generation state, against `model.generate`; the whole sweep is `make coverage`."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from genbundle.builder import build_bundle
from genbundle.bundles import InputError
from genbundle.runtime import load_bundle
from genbundle.runtime.wiring import Wiring
from tests.zoo import shrink

# LONG: what other tests cover as well, if not on a whole model of that class.
LONG = pytest.mark.long
# Convolution states beside attention; a scan that goes token by token; an index for sparse attention; encoders;
# sound beside text and pictures before it in one program; a generate inside another; a merge before an encoder.
CASES = [
    ("Lfm2ForCausalLM", "cpu"),
    pytest.param("Lfm2ForCausalLM", "torch", marks=LONG),
    ("MambaForCausalLM", "torch"),
    ("DeepseekV32ForCausalLM", "torch"),
    # State in and out of a .pte: a fixed size, and an encoder's.
    ("MambaForCausalLM", "xnnpack"),
    ("MarianMTModel", "xnnpack"),
    # Rows computed from patches and blocks of them.
    pytest.param("HyperCLOVAXVisionV2ForConditionalGeneration", "xnnpack", marks=LONG),
    pytest.param("Dots3NoteForConditionalGeneration", "xnnpack", marks=LONG),  # experts in its tower
    pytest.param("DbrxForCausalLM", "xnnpack", marks=LONG),  # rows that a mask picks
    ("Llama4ForCausalLM", "xnnpack"),  # complex numbers
    # Pictures before an encoder, for programs of one sequence.
    pytest.param("T5Gemma2ForConditionalGeneration", "xnnpack", marks=LONG),
    # Any object's tensors; memories and the last tokens; nothing but the tokens; padding that counts.
    ("MiniMaxForCausalLM", "torch"),
    ("XLNetLMHeadModel", "torch"),
    ("RwkvForCausalLM", "torch"),  # one sequence alone
    ("MoshiForCausalLM", "torch"),  # a window that its cache has and its mask hasn't
    ("MptForCausalLM", "cpu"),
    ("xLSTMForCausalLM", "torch"),
    pytest.param("MarianMTModel", "cpu", marks=LONG),
    ("EncoderDecoderModel", "cpu"),  # its encoder gives more than its decoder reads
    ("T5ForConditionalGeneration", "torch"),
    ("Pix2StructForConditionalGeneration", "torch"),  # its decoder keeps nothing
    # One token after a past, and that past as a number.
    pytest.param("ProphetNetForConditionalGeneration", "torch", marks=LONG),
    # A cross-attention of another length than its encoder.
    pytest.param("PPFormulaNetForConditionalGeneration", "torch", marks=LONG),
    ("Pop2PianoForConditionalGeneration", "torch"),  # its own generate puts a style before the sound
    ("Speech2TextForConditionalGeneration", "torch"),
    # Windows among packed patches; grids read as numbers; pictures of their own sizes; tiles; rows without padding.
    ("Qwen2_5_VLForConditionalGeneration", "cpu"),
    ("PaddleOCRVLForConditionalGeneration", "torch"),
    ("Mistral3ForConditionalGeneration", "cpu"),
    ("LlavaNextForConditionalGeneration", "torch"),
    ("Gemma3ForConditionalGeneration", "torch"),  # a mask made by vmap
    ("Qwen3_5ForConditionalGeneration", "torch"),  # pictures before a scan over the prompt
    pytest.param("Gemma4UnifiedForConditionalGeneration", "torch", marks=LONG),
    # Branches on what a mask holds that change nothing where it holds nothing; loops over the experts that were chosen.
    pytest.param("Ovis2ForConditionalGeneration", "torch", marks=LONG),
    # Pictures as rows of patches, padded to one number.
    ("Lfm2VlForConditionalGeneration", "torch"),
    ("DbrxForCausalLM", "torch"),
    pytest.param("Qwen3OmniMoeThinkerForConditionalGeneration", "torch", marks=LONG),  # positions as floats
    ("GlmAsrForConditionalGeneration", "torch"),
    ("GitForCausalLM", "cpu"),
    pytest.param("Blip2ForConditionalGeneration", "torch", marks=LONG),
    ("BlipForConditionalGeneration", "torch"),  # its generate changes the prompt's tokens, and a cache of two kinds
    # A projector with attention of the decoder's config.
    ("Kosmos2ForConditionalGeneration", "cpu"),
    pytest.param("Florence2ForConditionalGeneration", "torch", marks=LONG),
    # Cross-attention to a picture beside the tokens' own.
    pytest.param("IdeficsForVisionText2Text", "torch", marks=LONG),
    ("MllamaForConditionalGeneration", "torch"),
    pytest.param("MllamaForCausalLM", "torch", marks=LONG),  # and none where there is no picture
]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_the_same_sequences_as_eager(name, backend, loaded):
    model, bundle = shrink.make(name), loaded(name, backend)
    for inputs in shrink.variants(name, model)["check"]:
        expected = shrink.observed(model, inputs).sequences.numpy()
        arrays = {key: value.numpy() for key, value in inputs.items()}
        np.testing.assert_array_equal(bundle.generate(**arrays, max_new_tokens=12, do_sample=False).sequences, expected)


@pytest.mark.long
def test_a_program_for_long_prompts_is_run_on_one(tmp_path):
    model = shrink.make("Mamba2ForCausalLM")
    config = copy.deepcopy(model.config)
    config.chunk_size = 256  # the library's own
    long = type(model)(config).eval()
    long.load_state_dict(model.state_dict())
    manifest = build_bundle(long, backend="torch", output=tmp_path / "b", progress=False).manifest
    assert [(program.name, program.least) for program in manifest.programs][:2] == [
        ("prompt", 257),
        ("short_prompt", 1),
    ]
    assert max(check.prompt_length for check in manifest.verification.checks) == 260


def test_prompts_of_one_chunk_go_another_way_than_longer_ones(tmp_path):
    whole = shrink.make("Mamba2ForCausalLM")
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = 1  # every layer is traced seven times
    model = type(whole)(config).eval()
    assert not model.load_state_dict(whole.state_dict(), strict=False).missing_keys
    build_bundle(model, backend="torch", output=tmp_path / "b", progress=False)
    bundle = load_bundle(tmp_path / "b")
    prompt = next(program for program in bundle.bundle.manifest.programs if program.name == "prompt")
    assert prompt.least == model.config.chunk_size + 1
    assert [route.programs for route in bundle.bundle.manifest.flow.prompt][:2] == [("prompt",), ("short_prompt",)]
    for length in (1, prompt.least - 1, prompt.least, 3 * prompt.least):
        ids = torch.arange(10, 10 + length)[None]
        with torch.no_grad():
            expected = model.generate(ids, max_new_tokens=6, do_sample=False).numpy()
        found = bundle.generate(input_ids=ids.numpy(), max_new_tokens=6, do_sample=False).sequences
        np.testing.assert_array_equal(found, expected)


def test_a_prompt_with_a_picture_that_is_too_short_isnt_taken_for_text(loaded):
    name = "LlavaNextForConditionalGeneration"
    model, bundle = shrink.make(name), loaded(name, "torch")
    manifest = bundle.bundle.manifest
    assert any(not route.needs for route in manifest.flow.prompt)
    programs = tuple(replace(each, least=500 if each.name == "prompt" else 1) for each in manifest.programs)
    wiring = Wiring(replace(manifest, programs=programs), bundle.wiring.backend)
    arrays = {key: value.numpy() for key, value in shrink.variants(name, model)["check"][0].items()}
    with pytest.raises(InputError, match="this bundle takes such prompts of 500 and more"):
        wiring.prompt(arrays)


def test_a_model_that_mixes_the_rows_of_a_batch_takes_none(loaded):
    model, bundle = shrink.make("RwkvForCausalLM"), loaded("RwkvForCausalLM", "torch")
    ids = torch.arange(10, 20).reshape(2, 5)
    with torch.no_grad():
        together, alone = (model.generate(each, max_new_tokens=6, do_sample=False)[:1] for each in (ids, ids[:1]))
    assert not torch.equal(together, alone)
    with pytest.raises(InputError, match="the batch has 2 sequences, this bundle takes 1"):
        bundle.generate(input_ids=ids.numpy(), max_new_tokens=6)


def test_a_prompt_that_the_models_own_generate_changes(loaded):
    name = "BlipForConditionalGeneration"
    model, bundle = shrink.make(name), loaded(name, "torch")
    edit, config = bundle.bundle.manifest.generation.prompt_edit, model.config.text_config
    assert (edit.first, edit.dropped) == (config.bos_token_id, 1)
    assert bundle.bundle.manifest.generation.eos_token_ids == (config.sep_token_id,)
    inputs = {key: value[:1] for key, value in shrink.variants(name, model)["check"][0].items()}
    ids = inputs["input_ids"].clone()
    ids[0, :2] = model.generation_config.pad_token_id  # the first of them becomes a token: the default mask knows
    for mask in ({}, {"attention_mask": (ids > 9).long()}):
        given = {**inputs, "input_ids": ids} | mask
        given = given if mask else {key: value for key, value in given.items() if key != "attention_mask"}
        with torch.no_grad():
            expected = model.generate(**{k: v.clone() for k, v in given.items()}, max_new_tokens=6, do_sample=False)
        arrays = {key: value.numpy() for key, value in given.items()}
        found = bundle.generate(**arrays, max_new_tokens=6, do_sample=False).sequences
        np.testing.assert_array_equal(found, expected.numpy())
    with pytest.raises(InputError, match="the prompt has 1 tokens, of which this model leaves out the last 1"):
        bundle.generate(input_ids=ids[:, :1].numpy(), pixel_values=inputs["pixel_values"].numpy())


def test_an_encoder_decoder_goes_on_from_given_tokens(loaded):
    name = "T5ForConditionalGeneration"
    model, bundle = shrink.make(name), loaded(name, "torch")
    inputs = shrink.variants(name, model)["check"][0]
    start = torch.full((len(inputs["input_ids"]), 1), bundle.bundle.manifest.generation.decoder_start_token_id)
    inputs = {**inputs, "decoder_input_ids": torch.cat([start, start + 7, start + 9], 1)}
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False).numpy()
    arrays = {key: value.numpy() for key, value in inputs.items()}
    np.testing.assert_array_equal(bundle.generate(**arrays, max_new_tokens=6, do_sample=False).sequences, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 2},
        {"forced_bos_token_id": 7, "forced_eos_token_id": 9},
        {"suppress_tokens": [3, 4, 5], "begin_suppress_tokens": [11], "min_length": 5},
        {"bad_words_ids": [[6], [8, 10]], "repetition_penalty": 1.3},
    ],
)
def test_the_generation_configs_rules(options, loaded):
    name = "T5ForConditionalGeneration"
    model, bundle = shrink.make(name), loaded(name, "torch")
    inputs = shrink.variants(name, model)["check"][0]
    with torch.no_grad():
        expected = model.generate(**inputs, **options, max_new_tokens=10, do_sample=False).numpy()
    arrays = {key: value.numpy() for key, value in inputs.items()}
    found = bundle.generate(**arrays, **options, max_new_tokens=10, do_sample=False).sequences
    np.testing.assert_array_equal(found, expected)


def test_sounds_that_do_not_fit_the_placeholders_are_refused(loaded):
    name = "GlmAsrForConditionalGeneration"
    bundle = loaded(name, "torch")
    inputs = {key: value.numpy() for key, value in shrink.variants(name, shrink.make(name))["check"][0].items()}
    ids = inputs["input_ids"].copy()
    place = int(np.argmax(ids[0] == bundle.bundle.manifest.programs[0].placeholder_id))
    ids[0, place] = 10
    with pytest.raises(InputError, match=r"the prompt holds \d+ audio tokens, the audio gives \d+ features"):
        bundle.generate(**{**inputs, "input_ids": ids}, max_new_tokens=2)
    with pytest.raises(InputError, match="'input_features' needs input_features_mask beside it"):
        bundle.generate(input_ids=inputs["input_ids"], input_features=inputs["input_features"], max_new_tokens=2)


def test_experts_need_no_transformers(bundle):
    """A process that can't import transformers opens and runs a mixture of experts on torch."""
    code = (
        "import sys; sys.modules['transformers'] = None; from genbundle.runtime import load_bundle; "
        f"print(load_bundle({str(bundle('MixtralForCausalLM', 'torch').path)!r})"
        ".generate(input_ids=[[11, 12, 13]], max_new_tokens=6, do_sample=False).sequences.tolist()[0])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([[11, 12, 13]])
    with torch.no_grad():
        expected = shrink.make("MixtralForCausalLM").generate(ids, max_new_tokens=6, do_sample=False)
    assert json.loads(done.stdout) == expected[0].tolist()
