"""Inputs that are none: what is wrong with them, in words."""

import numpy as np
import pytest
from tests.bundles.samples import manifest

from genbundle.bundles import InputError
from genbundle.runtime.inputs import complete_inputs
from genbundle.runtime.model import _variables
from genbundle.runtime.positions import position_ids
from genbundle.runtime.sampling import GenerationOptions
from genbundle.runtime.wiring import _check_grids, _refusing


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"input_ids": [[1, 2], [3]]}, "input_ids: can't be made an array"),
        ({"input_ids": [["a", "b"]]}, "input_ids: expected numbers"),
        ({"input_ids": [[None]]}, "input_ids: expected numbers"),
        ({"input_ids": [[10**30]]}, "input_ids: expected numbers"),
        ({"input_ids": [[1, 2]], "attention_mask": [["1", "1"]]}, "attention_mask: expected numbers"),
        ({"input_ids": [[1.0]]}, "expected integers"),
        ({"input_ids": [1, 2]}, "expected integers"),
        ({}, "generation needs input_ids"),
    ],
)
def test_inputs_that_are_none(inputs, words):
    with pytest.raises(InputError, match=words):
        complete_inputs(inputs, manifest(), GenerationOptions())


def test_inputs_as_they_come():
    for ids in ([[1, 2]], ((1, 2),), np.array([[1, 2]], np.int32)):
        assert complete_inputs({"input_ids": ids}, manifest(), GenerationOptions())["input_ids"].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "grid", [[1, 10**6, 10**6], [2**31, 2**31, 2**31], [-1, 10**6, -(10**6)], [1, 5, 5], [10**9, 0, 1]]
)
def test_grids_of_more_patches_than_there_are(grid):
    inputs = {"pixels": np.zeros((4, 6), np.float32), "grids": np.array([[1, 2, 2], grid])}
    with pytest.raises(InputError, match=r"grids: grids of \d+ patches, and the largest input has 24 numbers"):
        _check_grids(inputs, ["grids", "absent"])
    _check_grids({**inputs, "grids": np.array([[1, 2, 2]])}, ["grids", "pixels"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"second_per_grid_ts": np.array([np.nan])}, "second_per_grid_ts: expected numbers"),
        ({"video_grid_thw": np.array([[9, 2, 2]])}, "9 x 1 x 1 tokens, 7 too many"),
        ({"video_grid_thw": np.array([[1, 2, 2]])}, "StopIteration"),
    ],
)
def test_clips_that_are_none(given, words):
    ids = np.array([[1, 1, 5, 5, 1]])
    inputs = {
        "input_ids": ids,
        "attention_mask": ids * 0 + 1,
        "mm_token_type_ids": np.array([[0, 0, 2, 2, 0]]),
        "video_grid_thw": np.array([[2, 2, 2]]),
    }
    options = {"spatial_merge_size": 2, "axes": 3, "tokens_per_second": 2}
    assert position_ids("mrope_clips", inputs, options)[0].tolist() == [[0, 1, 2, 4, 3]]
    with pytest.raises(InputError, match=words), _refusing("positions"):
        position_ids("mrope_clips", {**inputs, **given}, options)


@pytest.mark.parametrize("given", [{1: 2}, {"messages": []}, [1], "x"])
def test_chat_template_kwargs_that_are_none(given):
    with pytest.raises(InputError, match="chat_template_kwargs: expected names with values"):
        _variables(given)
    assert _variables(None) == {}
