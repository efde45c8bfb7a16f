"""What a generation config asks for: kept, refused, or without effect; nothing is dropped unseen."""

from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from genbundle.builder.generation_config import _NOT_REPLAYED, _REPLAYED, describe_generation
from genbundle.bundles import UnsupportedModelError
from genbundle.runtime.sampling import options_from


def model_with(**settings):
    config = SimpleNamespace(is_encoder_decoder=False)
    return SimpleNamespace(generation_config=GenerationConfig(**settings), config=config)


def test_what_differs_from_transformers_defaults_is_kept():
    generation = describe_generation(
        model_with(
            eos_token_id=[7, 8], bos_token_id=1, do_sample=True, temperature=0.6, top_k=20, top_p=1.0,
            repetition_penalty=1.1, max_new_tokens=30, min_new_tokens=2, stop_strings="END", num_beams=1,
        )
    )  # fmt: skip
    assert generation.eos_token_ids == (7, 8)
    assert (generation.bos_token_id, generation.pad_token_id) == (1, None)
    assert generation.options == {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "repetition_penalty": 1.1,
        "max_new_tokens": 30,
        "min_new_tokens": 2,
        "stop": ["END"],
    }
    options = options_from(generation.options, {})
    assert options.do_sample and options.stop == ("END",) and options.top_k == 20


def test_defaults_leave_nothing():
    generation = describe_generation(model_with())
    assert (generation.eos_token_ids, generation.pad_token_id, generation.options) == ((), None, {})
    generation = describe_generation(
        model_with(eos_token_id=3, pad_token_id=0, temperature=1.0, top_k=50, max_length=20)
    )
    assert (generation.eos_token_ids, generation.pad_token_id, generation.options) == ((3,), 0, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("exponential_decay_length_penalty", (3, 1.2)),
        ("watermarking_config", {"greenlist_ratio": 0.3}),
        ("sequence_bias", {(1,): 2.0}),
        ("guidance_scale", 1.5),
        ("encoder_repetition_penalty", 1.2),
        ("typical_p", 0.9),
        ("epsilon_cutoff", 0.1),
        ("num_return_sequences", 2),
    ],
)
def test_what_the_runtime_does_not_replay_is_an_error(name, value):
    settings = {"do_sample": True} if name == "num_return_sequences" else {}
    with pytest.raises(UnsupportedModelError, match=rf"{name}=.*set model\.generation_config\.{name} = None"):
        describe_generation(model_with(eos_token_id=1, **settings, **{name: value}))
    off = {"num_beams": 1, "typical_p": 1.0, "guidance_scale": 1.0}
    assert describe_generation(model_with(eos_token_id=1, **{name: off.get(name)})).options == {}


def test_every_option_of_the_generation_config_is_accounted_for():
    """A new transformers version may add an option that changes tokens: then this fails, and it must be classified."""
    neutral = {
        "early_stopping", "length_penalty",  # beams only
        "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "prompt_lookup_num_tokens",
        "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
        "target_lookbehind", "assistant_ensemble_weight", "speculation_type",  # speculation: an assistant is needed
        "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory",
        "compile_config", "disable_compile", "continuous_batching_config",  # how it is computed
        "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
        "renormalize_logits", "remove_invalid_values",  # no effect on the choice among finite logits
        "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "transformers_version",
    }  # fmt: skip
    public = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert public - neutral - set(_REPLAYED) - set(_NOT_REPLAYED) == set()
