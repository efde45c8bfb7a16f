"""Languages, tasks and times of a transcribing model, against transformers' own generate."""

import numpy as np
import pytest
import torch
import transformers as hf

from genbundle.builder import build_bundle
from genbundle.builder.prefix import describe_prefix
from genbundle.bundles import InputError, UnsupportedModelError
from genbundle.bundles.manifest import PrefixToken, Timestamps
from genbundle.runtime import load_bundle

VOCABULARY, EOS, START, WITHOUT = 120, 60, 61, 67
LANGUAGES, TASKS = {"<|en|>": 62, "<|de|>": 63, "<|fr|>": 64}, {"transcribe": 65, "translate": 66}


def tiny_whisper(**generation) -> hf.WhisperForConditionalGeneration:
    """A random model with the generation config of a multilingual checkpoint."""
    torch.manual_seed(0)
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16, max_source_positions=20,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=EOS, decoder_start_token_id=START,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = hf.WhisperForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.5)
    settings = {
        "lang_to_id": LANGUAGES, "task_to_id": TASKS, "no_timestamps_token_id": WITHOUT, "is_multilingual": True,
        "max_initial_timestamp_index": 5, "forced_decoder_ids": [[1, None], [2, TASKS["transcribe"]]],
        "suppress_tokens": [3, 4], "begin_suppress_tokens": [5, EOS], "return_timestamps": False,
    }  # fmt: skip
    for name, value in {**settings, **generation}.items():
        setattr(model.generation_config, name, value)
    return model


def features(batch: int, seed: int) -> torch.Tensor:
    """Mel features of one window, `[batch, 16, 40]`."""
    return torch.randn(batch, 16, 40, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def transcriber(tmp_path_factory):
    """The eager model and its bundle, loaded."""
    model = tiny_whisper()
    samples = [{"input_features": features(2, 1)}, {"input_features": features(1, 2)}]
    path = tmp_path_factory.mktemp("whisper") / "whisper.bundle"
    return model, load_bundle(build_bundle(model, samples, "torch", output=path, progress=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"language": "german"},
        {"language": "fr", "task": "translate"},
        {"task": "translate"},
        {"language": ["en", "<|de|>"]},
        {"return_timestamps": True},
        {"language": "English", "return_timestamps": True},
    ],
)
def test_the_same_sequences_as_eager(options, transcriber):
    model, bundle = transcriber
    sound = features(2, 3)
    with torch.no_grad():
        expected = model.generate(
            input_features=sound, **options, max_new_tokens=16, return_dict_in_generate=True,
            force_unique_generate_call=True,
        ).sequences.numpy()  # fmt: skip
    found = bundle.generate(input_features=sound.numpy(), **options, max_new_tokens=16).sequences
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_what_is_not_accepted(transcriber):
    _, bundle = transcriber
    sound = features(1, 4).numpy()
    with pytest.raises(InputError, match=r"the option `language` is 'klingon': accepted are <\|de\|>, <\|en\|>, "):
        bundle.generate(input_features=sound, language="klingon")
    with pytest.raises(InputError, match="accepted is a name, or a list of 1 names"):
        bundle.generate(input_features=sound, language=["en", "de"])
    with pytest.raises(InputError, match="unknown generation option 'langage'"):
        bundle.generate(input_features=sound, langage="en")


@pytest.mark.slow
def test_times_need_a_model_that_has_them(loaded):
    with pytest.raises(InputError, match="`return_timestamps` needs a model that generates times"):
        loaded("llama").generate(input_ids=[[5, 6]], return_timestamps=True)


def test_an_english_model_has_no_choice():
    model = tiny_whisper(lang_to_id=None, task_to_id=None, is_multilingual=False, forced_decoder_ids=[[1, WITHOUT]])
    assert describe_prefix(model) == ((), Timestamps(first=WITHOUT + 1, without=WITHOUT, latest=5))


def test_the_models_own_language_is_the_default():
    prefix, _ = describe_prefix(tiny_whisper(forced_decoder_ids=[[1, LANGUAGES["<|de|>"]], [2, TASKS["translate"]]]))
    assert (prefix[0].default, prefix[1].default) == (63, 66)
    assert prefix[0].tokens["german"] == prefix[0].tokens["de"] == prefix[0].tokens["<|de|>"] == 63
    assert prefix[1] == PrefixToken(option="task", tokens=TASKS, default=66, beside={"language": 65})


@pytest.mark.parametrize("forced", [[[1, 65]], [[2, 65]], [[1, 62], [2, 65], [3, 9]]])
def test_other_forced_tokens_are_refused(forced):
    with pytest.raises(UnsupportedModelError, match="forced_decoder_ids"):
        describe_prefix(tiny_whisper(forced_decoder_ids=forced))
