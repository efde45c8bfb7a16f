"""A batch dealt out to programs that take one sequence at a time."""

import numpy as np
import pytest

from genbundle.bundles import InputError
from genbundle.runtime.generate import single_rows


def batch(**more):
    ids = np.array([[0, 0, 5, 6], [7, 8, 9, 4]])
    return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64), **more}


def test_padding_is_taken_off():
    first, second = single_rows(batch(token_type_ids=np.array([[0, 0, 1, 2], [3, 4, 5, 6]])))
    assert first["input_ids"].tolist() == [[5, 6]] and first["token_type_ids"].tolist() == [[1, 2]]
    assert second["attention_mask"].tolist() == [[1, 1, 1, 1]]


def test_padding_stays_for_programs_that_mask_it():
    first, second = single_rows(batch(token_type_ids=np.array([[0, 0, 1, 2], [3, 4, 5, 6]])), padded=True)
    assert first["input_ids"].tolist() == [[0, 0, 5, 6]] and first["attention_mask"].tolist() == [[0, 0, 1, 1]]
    assert first["token_type_ids"].tolist() == [[0, 0, 1, 2]] and second["input_ids"].tolist() == [[7, 8, 9, 4]]


def test_pictures_are_dealt_out_evenly():
    rows = single_rows(batch(pixel_values=np.arange(4)))
    assert [row["pixel_values"].tolist() for row in rows] == [[0, 1], [2, 3]]
    with pytest.raises(InputError, match=r"pixel_values: \[3\] can't be shared out evenly to 2 sequences"):
        single_rows(batch(pixel_values=np.arange(3)))


def test_packed_patches_follow_their_grids():
    """8 patches would be even shares of 4; the grids say 2 and 6."""
    grids = np.array([[1, 1, 2], [1, 2, 3]])
    first, second = single_rows(batch(patches=np.arange(16).reshape(8, 2), image_grid_thw=grids))
    assert first["patches"].shape == (2, 2) and second["patches"].shape == (6, 2)
    assert first["image_grid_thw"].tolist() == [[1, 1, 2]]


def test_an_encoders_tokens_keep_their_padding():
    first, second = single_rows(batch(decoder_input_ids=np.array([[3, 1], [3, 2]]), features=np.arange(4)))
    assert first["input_ids"].tolist() == [[0, 0, 5, 6]] and first["attention_mask"].tolist() == [[0, 0, 1, 1]]
    assert second["decoder_input_ids"].tolist() == [[3, 2]] and second["features"].tolist() == [2, 3]
