"""Samplers and options: what a caller gives, what then happens to a row of logits."""

import inspect

import numpy as np
import pytest

from genbundle.bundles import EngineError, InputError
from genbundle.runtime import logits
from genbundle.runtime.sampling import OPTION_NAMES, GenerationOptions, make_sampler, options_from

NO_IDS = np.zeros(0, np.int64)


def row(*values):
    return np.array(values, np.float32)


def test_greedy_takes_the_first_of_the_largest():
    assert make_sampler()(row(1, 3, 3, 2), NO_IDS) == 1


def test_greedy_is_after_the_repetition_penalty_and_leaves_the_row_alone():
    values = row(1, 3, 2.9)
    assert make_sampler(repetition_penalty=1.5)(values, np.array([1])) == 2
    np.testing.assert_array_equal(values, row(1, 3, 2.9))


def test_greedy_ignores_the_sampling_options():
    values = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    assert make_sampler(temperature=9.0, top_k=1, top_p=0.1, min_p=1.0, seed=3)(values, NO_IDS) == values.argmax()


def test_frequencies_follow_the_distribution():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    sample = make_sampler(do_sample=True, seed=0)
    values = np.log(probabilities).astype(np.float32) + 7
    counts = np.bincount([sample(values, NO_IDS) for _ in range(20_000)], minlength=4)
    np.testing.assert_allclose(counts / 20_000, probabilities, atol=0.012)


def test_filters_leave_only_what_they_keep():
    values = np.log(np.array([0.4, 0.3, 0.2, 0.1])).astype(np.float32)

    def drawn(**options):
        sample = make_sampler(do_sample=True, seed=1, **options)
        return {sample(values, NO_IDS) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.85) == {0, 1, 2}
    assert drawn(min_p=0.45) == {0, 1, 2}
    assert drawn(temperature=0.01) == {0}
    assert drawn(temperature=0) == {0}
    assert drawn(top_k=0, top_p=1.0, min_p=0.0) == {0, 1, 2, 3}


def test_a_seed_repeats_and_another_differs():
    values = np.zeros(1_000, np.float32)

    def tokens(seed):
        sample = make_sampler(do_sample=True, seed=seed)
        return [sample(values, NO_IDS) for _ in range(20)]

    assert tokens(5) == tokens(5)
    assert tokens(5) != tokens(6)
    assert tokens(None) != tokens(None)


def test_a_seed_gives_these_tokens():
    sample = make_sampler(do_sample=True, seed=42)
    assert [sample(np.arange(50, dtype=np.float32) / 10, NO_IDS) for _ in range(6)] == [47, 41, 48, 46, 27, 49]


def test_a_uniform_draw_at_the_very_end_takes_the_last_token():
    from genbundle.runtime.sampling import _draw

    values = row(-np.inf, 0, 0, -np.inf)
    assert _draw(values, 0.0) == 1
    assert _draw(values, np.nextafter(1, 0)) == 2
    behind = np.concatenate([values, np.full(40_000, -np.inf, np.float32)])
    assert _draw(behind, np.nextafter(1, 0)) == _draw(behind, 1.0) == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_distribution(value):
    with pytest.raises(EngineError, match="can't sample"):
        make_sampler(do_sample=True)(row(1, value, 0), NO_IDS)
    with pytest.raises(EngineError, match="can't sample"):
        make_sampler(do_sample=True)(row(-np.inf, -np.inf), NO_IDS)
    for filters in ({}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5}):
        with pytest.raises(EngineError, match="can't sample: the largest logit is"):
            make_sampler(do_sample=True, temperature=1e-40, **filters)(row(1, value, 0), NO_IDS)
        with pytest.raises(EngineError, match="can't sample: the largest logit is inf"):
            make_sampler(do_sample=True, temperature=1e-40, **filters)(row(1, 2, 0), NO_IDS)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("temperature", -0.1, "at least 0"),
        ("temperature", np.nan, "at least 0"),
        ("temperature", True, "at least 0"),
        ("temperature", "1", "at least 0"),
        ("temperature", 10**400, "hundreds of digits.*at least 0"),
        ("repetition_penalty", 10**4200, "hundreds of digits.*above 0"),
        ("bad_words_ids", 5, "list of lists"),
        ("bad_words_ids", [5], "list of lists"),
        ("bad_words_ids", [[5], "a"], "list of lists"),
        ("bad_words_ids", [[]], "list of lists"),
        ("top_k", -1, "whole number"),
        ("top_k", 2.0, "whole number"),
        ("top_k", True, "whole number"),
        ("top_p", 1.1, "from 0 to 1"),
        ("top_p", -0.1, "from 0 to 1"),
        ("min_p", 2, "from 0 to 1"),
        ("repetition_penalty", 0, "above 0"),
        ("seed", -1, "whole number"),
        ("seed", 1.5, "whole number"),
        ("do_sample", 1, "True or False"),
        ("max_new_tokens", 0, "at least 1"),
        ("max_new_tokens", True, "at least 1"),
        ("max_length", "9", "at least 1"),
        ("min_new_tokens", -1, "at least 0"),
        ("stop", "", "none empty"),
        ("stop", ["a", 3], "none empty"),
        ("eos_token_ids", [1, "a"], "token id"),
        ("eos_token_ids", -1, "token id"),
        ("pad_token_id", False, "token id"),
    ],
)
def test_values_out_of_range_name_the_option_and_what_is_accepted(name, value, accepted):
    with pytest.raises(InputError, match=f"`{name}` is .*{accepted}"):
        options_from({}, {name: value})
    if name in inspect.signature(make_sampler).parameters:
        with pytest.raises(InputError, match=f"`{name}` is .*{accepted}"):
            make_sampler(**{name: value})


def test_an_unknown_option_is_named_with_the_nearest_and_all_accepted():
    with pytest.raises(InputError, match="'max_token', did you mean 'max_new_tokens'") as caught:
        options_from({}, {"max_token": 3})
    assert all(name in str(caught.value) for name in OPTION_NAMES)
    with pytest.raises(InputError, match="unknown generation option 'num_beams'"):
        options_from({}, {"num_beams": 4})
    with pytest.raises(InputError, match="'stop' is given twice"):
        options_from({}, {"stop": "a", "stop_strings": ["b"]})


def test_defaults_are_the_models_then_transformers():
    assert options_from({}, {}) == GenerationOptions()
    assert GenerationOptions().top_k == 50  # transformers samples with it when nobody says otherwise
    options = options_from(
        {"temperature": 0.6, "eos_token_ids": [1, 2], "top_k": None}, {"max_new_tokens": np.int64(5)}
    )
    assert (options.temperature, options.eos_token_ids, options.max_new_tokens, options.top_k) == (0.6, (1, 2), 5, 50)
    assert options_from({"max_new_tokens": 7, "eos_token_ids": (1,)}, {"eos_token_id": 9}).eos_token_ids == (9,)
    assert options_from({"max_new_tokens": 7}, {"max_new_tokens": None}).max_new_tokens == 7
    assert options_from({"top_p": 0.5, "do_sample": True}, {"top_p": None}).top_p is None
    assert options_from({}, {"stop": "END"}).stop == ("END",)
    assert options_from({}, {"stop_strings": ["a", "b"]}).stop == ("a", "b")


@pytest.mark.parametrize(
    ("default", "given", "samples"),
    [
        (False, {}, False),
        (True, {}, True),
        (False, {"do_sample": True}, True),
        (False, {"temperature": 0.7}, True),
        (False, {"top_k": 5}, True),
        (False, {"top_p": 0.9}, True),
        (False, {"min_p": 0.1}, True),
        (False, {"seed": 0}, True),
        (False, {"repetition_penalty": 1.2}, False),
        (False, {"top_p": None}, False),
        (False, {"do_sample": False, "temperature": 0.7}, False),
        (True, {"do_sample": False}, False),
        (True, {"temperature": 0}, False),
        (False, {"temperature": 0.0, "seed": 1}, False),
        (False, {"temperature": 0.0, "do_sample": True}, False),
    ],
)
def test_who_samples(default, given, samples):
    assert options_from({"do_sample": default}, given).do_sample is samples


def test_how_many_new_tokens():
    assert options_from({}, {}).new_tokens(100) == 20
    assert options_from({"max_length": 30}, {}).new_tokens(10) == 20
    assert options_from({"max_length": 30}, {"max_new_tokens": 4}).new_tokens(50) == 4
    with pytest.raises(InputError, match="prompt has 30 tokens and `max_length`=30"):
        options_from({"max_length": 30}, {}).new_tokens(30)


def test_options_make_their_sampler():
    values = np.zeros(1_000, np.float32)
    options = options_from({}, {"seed": 3, "top_k": 0})
    ours = [options.sampler()(values, NO_IDS), options.sampler(4)(values, NO_IDS)]
    assert ours == [make_sampler(do_sample=True, seed=seed)(values, NO_IDS) for seed in (3, 4)]


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 2.5])
@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 1}, {"top_k": 50}, {"top_k": 40_000}, {"top_p": 0.0}, {"top_p": 0.5}, {"top_p": 0.99}, {"min_p": 1},
     {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9, "min_p": 0.05}, {"top_p": 0.9, "min_p": 0.2}],
)  # fmt: skip
def test_a_large_vocabulary_is_sampled_as_its_whole_rows_are(spread, temperature, filters):
    """Only the tokens that may be left are looked at; what is left is what the filters leave of the whole row."""
    values = (np.random.default_rng(0).standard_normal(40_000) * spread).astype(np.float32)
    values[::7], values[5:400] = -np.inf, values.max()
    whole = logits.temperature(values, temperature)
    if filters.get("top_k"):
        whole = logits.top_k(whole, filters["top_k"])
    if "top_p" in filters:
        whole = logits.top_p(whole, filters["top_p"])
    if filters.get("min_p"):
        whole = logits.min_p(whole, filters["min_p"])
    weights = np.exp(whole.astype(np.float64) - whole.max())
    share = np.cumsum(weights) / weights.sum()
    random = np.random.Generator(np.random.PCG64(3))
    sample = make_sampler(do_sample=True, temperature=temperature, seed=3, **filters)
    for _ in range(40):
        token, uniform = sample(values, NO_IDS), random.random()
        assert whole[token] > -np.inf
        assert share[token] > uniform - 1e-5 and (token == 0 or share[token - 1] < uniform + 1e-5)


def test_tokens_at_the_border_of_min_p_are_looked_at():
    """The border is the difference of two numbers that are nearly alike, and as exact as these."""
    p, temperature = 5.0744e-8, 2.44665
    values = np.random.default_rng(0).uniform(-4e-6, 4e-6, 50).astype(np.float32)
    values[0] = -temperature * np.log(p)
    kept = np.flatnonzero(logits.min_p(logits.temperature(values, temperature), p) > -np.inf)
    assert set(kept) <= set(logits.among_probable(values, p, temperature))


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 1}])
def test_a_temperature_beyond_float32_draws_from_all_that_are_left(filters):
    values = row(-np.inf, 1, 2, 3, -np.inf)
    sample = make_sampler(do_sample=True, temperature=1e39, seed=0, **filters)
    assert {sample(values, NO_IDS) for _ in range(60)} <= {1, 2, 3}
