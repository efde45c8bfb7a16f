"""The runtime's numpy preparers and position rules against the functions of transformers that they stand for."""

import numpy as np
import pytest
import torch
from tests.zoo import models
from transformers import vision_utils

from genbundle.runtime.positions import position_ids
from genbundle.runtime.preparers import real_images, vision_grid

GRIDS = [[[1, 4, 6]], [[1, 8, 2], [1, 4, 4]], [[3, 6, 4], [1, 2, 10], [2, 4, 4]]]


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("align_corners", [True, False])
def test_vision_grid(grids, align_corners):
    grid = torch.tensor(grids)
    options = {"inputs": ["g"], "spatial_merge_size": 2, "num_grid_per_side": 8, "align_corners": align_corners}
    found = vision_grid({"g": grid.numpy()}, options)
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid, 8, align_corners=align_corners, spatial_merge_size=2
    )
    np.testing.assert_array_equal(found["cu_seqlens"], vision_utils.get_vision_cu_seqlens(grid).numpy())
    np.testing.assert_array_equal(found["position_ids"], vision_utils.get_vision_position_ids(grid, 2).numpy())
    np.testing.assert_array_equal(found["interp_indices"], indices.numpy())
    np.testing.assert_allclose(found["interp_weights"], weights.numpy(), rtol=0, atol=1e-7)


def test_real_images_drops_padding_pictures():
    pixels = np.zeros((2, 2, 3, 4, 4), np.float32)
    pixels[0, 0], pixels[1, 1] = 1.0, 2.0
    found = real_images({"p": pixels}, {"inputs": ["p"]})["pixel_values"]
    np.testing.assert_array_equal(found, np.stack([pixels[0, 0], pixels[1, 1]]))


def test_mrope_counts_as_the_model_does():
    """Two prompts of other lengths, one padded, with pictures of other grids."""
    model = models.make("qwen3_vl")
    rows = [
        models.image_inputs("qwen3_vl", 3, 2, grid=(1, 4, 6)),
        models.image_inputs("qwen3_vl", 6, 5, grid=(1, 8, 4)),
    ]
    longest = max(row["input_ids"].shape[1] for row in rows)
    inputs = {
        name: torch.cat([torch.nn.functional.pad(row[name], (longest - row[name].shape[1], 0)) for row in rows])
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    inputs["image_grid_thw"] = torch.cat([row["image_grid_thw"] for row in rows])
    expected, _ = model.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )  # fmt: skip
    found = position_ids("mrope", {name: value.numpy() for name, value in inputs.items()}, {"spatial_merge_size": 2})
    np.testing.assert_array_equal(found[1:], expected.numpy())
