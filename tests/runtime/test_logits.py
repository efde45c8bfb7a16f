"""The logits functions against transformers' own processors, row by row."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from genbundle.runtime import logits

NO_IDS = np.zeros(0, np.int64)


def rows():
    """Rows of every kind: smooth, peaked, quantized (many ties), constant, with -inf, with extremes, large, tiny."""
    random = np.random.default_rng(0)
    for size in (1, 2, 7, 300, 5_000):
        for scale in (0.1, 1, 5, 40):
            yield (random.standard_normal(size) * scale).astype(np.float32)
        yield np.round(random.standard_normal(size) * 3).astype(np.float32)
        yield np.full(size, -2.5, np.float32)
        partly = random.standard_normal(size).astype(np.float32)
        partly[random.random(size) < 0.5] = -np.inf
        partly[0] = 1
        yield partly
        extreme = random.standard_normal(size).astype(np.float32)
        extreme[size // 2] = 1e30
        extreme[size // 3] = -1e30
        yield extreme


def reference(processor, row, ids=NO_IDS):
    return processor(torch.from_numpy(np.asarray(ids))[None], torch.from_numpy(row.copy())[None])[0].numpy()


def check(function, processor, *arguments, ids=NO_IDS):
    for row in rows():
        before = row.copy()
        result = function(row, *arguments)
        np.testing.assert_array_equal(result, reference(processor, row, ids))
        assert result.dtype == np.float32
        np.testing.assert_array_equal(row, before)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.1, 1.3, 7.0])
def test_repetition_penalty(penalty):
    random = np.random.default_rng(1)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for row in rows():
        # Repeated ids count once; ids beyond the vocabulary are ignored.
        ids = random.integers(0, len(row) + 3, 40)
        before = row.copy()
        result = logits.repetition_penalty(row, ids, penalty)
        np.testing.assert_array_equal(result, reference(processor, row, ids))
        np.testing.assert_array_equal(row, before)


def test_repetition_penalty_leaves_left_padding_out_as_transformers_does():
    row = np.array([2, -2, 4, -4, 1], np.float32)
    processor = RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=torch.tensor([2]))
    result = logits.repetition_penalty(row, np.array([3, 2]), 2.0)
    np.testing.assert_array_equal(result, reference(processor, row, np.array([0, 0, 3, 2])))
    np.testing.assert_array_equal(result, np.array([2, -2, 2, -8, 1], np.float32))


@pytest.mark.parametrize("temperature", [0.01, 0.3, 0.7, 1.0, 1.7, 100.0])
def test_temperature(temperature):
    with np.errstate(over="ignore"):
        check(logits.temperature, TemperatureLogitsWarper(temperature), temperature)


@pytest.mark.parametrize("k", [1, 2, 3, 50, 4_999, 10_000])
def test_top_k(k):
    check(logits.top_k, TopKLogitsWarper(k), k)


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.02, 0.05, 0.31, 1.0])
def test_min_p(p):
    check(logits.min_p, MinPLogitsWarper(p), p)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.77, 0.9, 0.95, 0.999])
def test_top_p(p):
    processor = TopPLogitsWarper(p)
    for row in rows():
        before = row.copy()
        result, expected = logits.top_p(row, p), reference(processor, row)
        np.testing.assert_array_equal(row, before)
        kept, theirs = np.isfinite(result), np.isfinite(expected)
        np.testing.assert_array_equal(result[kept], row[kept])
        # torch sorts unstably: how many of equal logits stay is defined, which ones isn't. The counts may part only
        # where transformers' float32 sum lies within rounding of the border.
        few, many = sorted([np.sort(row[kept])[::-1], np.sort(row[theirs])[::-1]], key=len)
        np.testing.assert_array_equal(few, many[: len(few)])
        assert all(border_distance(row, place, p) < 2e-6 for place in range(len(few), len(many)))


def border_distance(row, place, p):
    """How far the probability of all but the `place` most probable tokens is from what may be cut off, in float64."""
    descending = np.sort(row)[::-1].astype(np.float64)
    weights = np.exp(descending - descending[0])
    return abs(weights[:place].sum() / weights.sum() - p)


def test_top_p_keeps_the_higher_ids_of_tokens_that_tie():
    row = np.zeros(10, np.float32)
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(logits.top_p(row, 0.25))), [7, 8, 9])
    # Up to 16 tokens torch's sort is stable, and the choice can be compared.
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(reference(TopPLogitsWarper(0.25), row))), [7, 8, 9])


def test_top_p_searches_beyond_its_first_candidates():
    row = np.random.default_rng(2).standard_normal(20_000).astype(np.float32) * 0.1
    kept = np.isfinite(logits.top_p(row, 0.9))
    expected = np.isfinite(reference(TopPLogitsWarper(0.9), row))
    assert kept.sum() > 10_000
    assert np.count_nonzero(kept != expected) <= 1


def test_all_in_the_order_of_generate():
    random = np.random.default_rng(3)
    for _ in range(30):
        row = (random.standard_normal(1_000) * 4).astype(np.float32)
        ids = random.integers(0, 1_000, 30)
        ours = logits.repetition_penalty(row, ids, 1.2)
        ours = logits.min_p(logits.top_p(logits.top_k(logits.temperature(ours, 0.8), 40), 0.9), 0.03)
        theirs = row
        for processor in (
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.8),
            TopKLogitsWarper(40),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.03),
        ):
            theirs = reference(processor, theirs, ids)
        np.testing.assert_array_equal(ours, theirs)
