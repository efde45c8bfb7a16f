"""What is forbidden and forced at a step, against transformers' own logits processors."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as hf

from genbundle.bundles import InputError
from genbundle.bundles.manifest import Timestamps
from genbundle.runtime.rules import apply_rules, check_forced, timed
from genbundle.runtime.sampling import options_from

VOCABULARY, PROMPT, LIMIT, EOS = 12, 3, 6, [2, 3]
GIVEN = [0, 0, 4, 1, 3, 4, 2, 0, 1, 1]


def processors(**settings) -> LogitsProcessorList:
    """transformers' processors for these settings of a generation config, in generate's order."""
    config, made, eos = GenerationConfig(**settings), LogitsProcessorList(), torch.tensor(EOS)
    if config.no_repeat_ngram_size:
        made.append(hf.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.encoder_no_repeat_ngram_size:
        made.append(hf.EncoderNoRepeatNGramLogitsProcessor(config.encoder_no_repeat_ngram_size, torch.tensor([GIVEN])))
    if config.bad_words_ids:
        made.append(hf.NoBadWordsLogitsProcessor(config.bad_words_ids, eos))
    if config.min_length:
        made.append(hf.MinLengthLogitsProcessor(config.min_length, eos))
    if config.min_new_tokens:
        made.append(hf.MinNewTokensLengthLogitsProcessor(PROMPT, config.min_new_tokens, eos))
    if config.forced_bos_token_id is not None:
        made.append(hf.ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        made.append(hf.ForcedEOSTokenLogitsProcessor(PROMPT + LIMIT, config.forced_eos_token_id))
    if config.suppress_tokens:
        made.append(hf.SuppressTokensLogitsProcessor(config.suppress_tokens))
    if config.begin_suppress_tokens:
        made.append(hf.SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, PROMPT))
    return made


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3},
        {"encoder_no_repeat_ngram_size": 1},
        {"encoder_no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 3, "no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [1, 4], [7, 8, 9], [4, 4], [2], [4, 3, 4]]},
        {"min_length": 6},
        {"min_new_tokens": 2},
        {"forced_bos_token_id": 7},
        {"forced_eos_token_id": 2},
        {"forced_eos_token_id": [2, 3], "suppress_tokens": [1, 9]},
        {"forced_eos_token_id": 2, "min_length": 12, "bad_words_ids": [[2, 2]], "no_repeat_ngram_size": 1},
        {"begin_suppress_tokens": [0, 4]},
        {"begin_suppress_tokens": [0], "suppress_tokens": [11], "min_length": 8, "no_repeat_ngram_size": 2},
    ],
)
def test_rules_are_transformers(settings):
    rng = np.random.default_rng(3)
    options = options_from({"eos_token_ids": EOS}, settings)
    for length in range(1, PROMPT + LIMIT):
        for _ in range(20):
            ids, row = rng.integers(0, 5, length), rng.standard_normal(VOCABULARY).astype(np.float32)
            before = row.copy()
            found = apply_rules(row, options, ids, prompt_length=PROMPT, limit=LIMIT, given=np.array(GIVEN))
            expected = processors(**settings)(torch.tensor(ids)[None], torch.tensor(row)[None])[0].numpy()
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(row, before)


def test_a_forced_first_token_moves_the_beginning():
    options = options_from({}, {"forced_bos_token_id": 7, "begin_suppress_tokens": [4]})
    row = np.zeros(VOCABULARY, np.float32)
    first = apply_rules(row, options, np.array([1]), prompt_length=1, limit=LIMIT)
    assert np.flatnonzero(np.isfinite(first)).tolist() == [7]
    second = apply_rules(row, options, np.array([1, 7]), prompt_length=1, limit=LIMIT)
    assert np.flatnonzero(np.isinf(second)).tolist() == [4]


def test_tokens_beyond_the_head_are_ignored():
    options = options_from({}, {"suppress_tokens": [99]})
    row = np.ones(VOCABULARY, np.float32)
    np.testing.assert_array_equal(apply_rules(row, options, np.array([1]), prompt_length=1, limit=1), row)


@pytest.mark.parametrize("latest", [None, 2])
def test_times_are_whispers(latest):
    rng, eos, without = np.random.default_rng(5), 5, 6
    config = GenerationConfig(eos_token_id=eos)
    config.no_timestamps_token_id, config.max_initial_timestamp_index = without, latest
    times = Timestamps(first=without + 1, without=without, latest=latest)
    for length in range(7):
        for _ in range(60):
            new = rng.choice([1, 2, 7, 8, 9, 10], length)
            row = rng.standard_normal(VOCABULARY).astype(np.float32) * 2
            ids = np.concatenate([np.array([1, 0, 2]), new])
            expected = hf.WhisperTimeStampLogitsProcessor(config, begin_index=PROMPT)(
                torch.tensor(ids)[None], torch.tensor(row)[None]
            )[0].numpy()
            np.testing.assert_array_equal(timed(row, new, times, eos), expected)


@pytest.mark.parametrize("name", ["forced_bos_token_id", "forced_eos_token_id"])
def test_tokens_that_can_not_be_forced(name):
    check_forced(options_from({}, {name: VOCABULARY - 1}), VOCABULARY)
    with pytest.raises(InputError, match="the token 12 can't be forced: this model has the tokens 0 to 11"):
        check_forced(options_from({}, {name: VOCABULARY}), VOCABULARY)
