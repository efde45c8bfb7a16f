"""The runtime's numpy preparers and position rules against the functions of transformers that they stand for."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from tests.zoo import models
from transformers import vision_utils
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe
from transformers.models.hunyuan_vl import modeling_hunyuan_vl
from transformers.models.kimi_k25 import modeling_kimi_k25
from transformers.models.llava_next import modeling_llava_next
from transformers.models.muse_glimmer import modeling_muse_glimmer
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni

from genbundle.runtime.positions import position_ids
from genbundle.runtime.preparers import (
    image_tiles,
    kept_rows,
    real_images,
    vision_blocks,
    vision_grid,
    vision_pairs,
    vision_windows,
)  # fmt: skip

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


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_bicubic_taps_and_clips(grids, padding):
    grid = torch.tensor(grids)
    options = {"inputs": ["g"], "spatial_merge_size": 1, "num_grid_per_side": 5, "align_corners": False}
    options |= {"mode": "bicubic", "padding": padding, "merge_temporal": True, "include_temporal": True}
    found = vision_grid({"g": grid.numpy()}, options)
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid, 5, mode="bicubic", align_corners=False, spatial_merge_size=1, padding=padding
    )
    np.testing.assert_array_equal(found["interp_indices"], indices.numpy())
    np.testing.assert_allclose(found["interp_weights"], weights.numpy(), rtol=0, atol=1e-6)
    lengths = vision_utils.get_vision_cu_seqlens(grid, merge_temporal=True)
    np.testing.assert_array_equal(found["cu_seqlens"], lengths.numpy())
    positions = vision_utils.get_vision_position_ids(grid, 1, include_temporal=True)
    np.testing.assert_array_equal(found["position_ids"], positions.numpy())


def test_merge_sizes_of_each_picture():
    grid, merges = torch.tensor([[1, 4, 6], [1, 3, 3]]), torch.tensor([2, 1])
    found = vision_grid({"g": grid.numpy(), "m": merges.numpy()}, {"inputs": ["g", "m"], "spatial_merge_size": "m"})
    expected = vision_utils.get_vision_position_ids(grid, merges)
    np.testing.assert_array_equal(found["position_ids"], expected.numpy())


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("window", [8, 16, 24])
def test_vision_windows(grids, window):
    grid = torch.tensor(grids)
    options = {"inputs": ["g"], "spatial_merge_size": 2, "window_size": window, "patch_size": 4}
    found = vision_windows({"g": grid.numpy()}, options)
    index, lengths = vision_utils.get_vision_window_index(grid, 2, window, 4)
    np.testing.assert_array_equal(found["window_index"], index.numpy())
    np.testing.assert_array_equal(found["cu_window_seqlens"], lengths.numpy())


@pytest.mark.parametrize("grids", [[[1, 4, 6], [1, 8, 2]], [[3, 4, 4]]])
def test_vision_blocks(grids):
    grid = torch.tensor(grids)
    found = vision_blocks({"g": grid.numpy()}, {"inputs": ["g"], "merge": [2, 2]})
    expected = {
        "frame_index": modeling_kimi_k25.get_vision_frame_index(grid),
        "temporal_merge_index": modeling_kimi_k25.get_vision_temporal_merge_index(grid, 2, 2),
        "pixel_shuffle_index": modeling_muse_glimmer.get_vision_pixel_shuffle_index(grid, 2),
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.numpy())


@pytest.mark.parametrize("height", [17, 60, 64, 100])
@pytest.mark.parametrize("width", [31, 64, 90, 201])
def test_image_tiles(height, width):
    """The features of a picture, read in the preparer's order, as LLaVA-NeXT packs them."""
    config = hf.LlavaNextConfig(image_grid_pinpoints=[[32, 64], [64, 32], [64, 64], [32, 96]])
    config.vision_config.image_size, config.vision_config.patch_size = 32, 8
    sizes = torch.tensor([[height, width]])
    count = modeling_llava_next.image_size_to_num_patches(sizes[0], config.image_grid_pinpoints, 32)
    features, newline = torch.randn(count, 16, 6), torch.randn(6)
    packer = SimpleNamespace(config=config)
    packed, _ = modeling_llava_next.LlavaNextModel.pack_image_features(packer, [features], sizes, "full", newline)
    options = {"inputs": ["p", "s"], "pinpoints": config.image_grid_pinpoints, "tile": 32, "patches": 4}
    pixels = np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1, 1)
    found = image_tiles({"p": pixels, "s": sizes.numpy()}, options)
    table = torch.cat([features.reshape(-1, 6), newline[None]])
    np.testing.assert_array_equal(table[torch.from_numpy(found["image_rows"])], packed[0])
    np.testing.assert_array_equal(found["pixel_values"].ravel(), np.arange(count))


@pytest.mark.parametrize("grids", [[[1, 4, 6], [1, 2, 2]], [[4, 4, 2], [1, 2, 2], [3, 2, 2]]])
def test_vision_pairs(grids):
    grid = torch.tensor(grids)
    cls = modeling_ernie4_5_vl_moe.Ernie4_5_VLMoeVariableResolutionResamplerModel
    blocks = torch.arange(grid.prod(1).sum() // 4, dtype=torch.float32)[:, None]
    expected = cls._temporal_slicing(SimpleNamespace(spatial_merge_size=2), blocks, grid)
    found = vision_pairs({"g": grid.numpy()}, {"inputs": ["g"], "spatial_merge_size": 2})["paired_rows"]
    np.testing.assert_array_equal(found.reshape(-1, 2), expected.numpy())


def test_rows_that_are_kept():
    places = np.array([[[0, 0], [0, 1], [-1, -1]], [[2, 0], [-1, -1], [-1, -1]]])
    np.testing.assert_array_equal(kept_rows({"p": places}, {"inputs": ["p"]})["image_rows"], [0, 1, 3])


def _prompts(image_token: int) -> dict[str, torch.Tensor]:
    """Two prompts with a picture each, the first padded; tokens 7 and 8 stand around pictures."""
    rows = [[0, 0, 0, 11, 7, *[image_token] * 6, 8, 12, 13], [14, 15, 7, *[image_token] * 8, 8, 16]]
    ids = torch.tensor([row + [17] * (14 - len(row)) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 8, 4]]),
    }


def test_mrope_of_prompts_without_token_types():
    config = SimpleNamespace(
        image_token_id=99, video_token_id=98, audio_token_id=97, vision_start_token_id=7, audio_start_token_id=6,
        position_id_per_seconds=25, seconds_per_chunk=2,
    )  # fmt: skip
    cls = modeling_qwen2_5_omni.Qwen2_5OmniPreTrainedModelForConditionalGeneration
    model = SimpleNamespace(config=config, spatial_merge_size=2)
    model.get_llm_pos_ids_for_vision = partial(cls.get_llm_pos_ids_for_vision, model)
    inputs = _prompts(99)
    expected, _ = cls.get_rope_index(
        model, inputs["input_ids"], inputs["image_grid_thw"], attention_mask=inputs["attention_mask"]
    )
    options = {"spatial_merge_size": 2, "image_token_id": 99, "axes": 3, "padding": 1}
    found = position_ids("mrope", {name: value.numpy() for name, value in inputs.items()}, options)
    np.testing.assert_array_equal(found, expected.numpy())


def test_mrope_in_place():
    config = SimpleNamespace(
        text_config=SimpleNamespace(rope_parameters={"mrope_section": [2, 2, 2, 2]}),
        vision_config=SimpleNamespace(spatial_merge_size=2),
    )
    cls = modeling_hunyuan_vl.HunYuanVLModel
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = partial(cls.get_vision_position_ids, model)
    ids = torch.tensor([[0, 0, *[9] * 8, 5, 5, 5, 5, 5, 5], [4, *[9] * 14, 5]])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == 9).int(),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 6, 6]]),
    }
    expected, _ = cls.get_rope_index(
        model, ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"], inputs["attention_mask"]
    )
    options = {"spatial_merge_size": 2, "axes": 4}
    found = position_ids("mrope_in_place", {name: value.numpy() for name, value in inputs.items()}, options)
    np.testing.assert_array_equal(found, expected.numpy())
