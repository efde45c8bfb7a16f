"""The position rule of clips, against the models' own positions."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.zoo import sample_media, shrink
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

from genbundle.builder.limits import limits_of
from genbundle.builder.plan import capture, make_plan
from genbundle.builder.samples import make_samples
from genbundle.bundles import UnsupportedModelError
from genbundle.runtime.positions import position_ids

# Padding 0, text 4, pictures 9, clips 8: one picture between two clips, and a clip alone.
TOGETHER = [[*[8] * 12, 4, *[9] * 6, 4, 4, *[8] * 8, 4], [*[0] * 15, 4, *[8] * 12, 4, 4]]
APART = [
    [*[8] * 6, 4, *[8] * 6, 4, *[9] * 6, 4, 4, *[8] * 4, 5, *[8] * 4, 4],
    [*[0] * 16, 4, *[8] * 6, 4, *[8] * 6, 4, 4],
]
TIMES = {"second_per_grid_ts": torch.tensor([0.7, 1.0, 1.5])}
CASES = [
    (modeling_qwen2_5_vl.Qwen2_5_VLModel, TOGETHER, {"tokens_per_second": 2}, TIMES),
    (modeling_qwen2_5_vl.Qwen2_5_VLModel, TOGETHER, {"tokens_per_second": 2}, {}),
    (modeling_qwen3_vl.Qwen3VLModel, APART, {"apart": True}, {}),
]


@pytest.mark.parametrize(("cls", "rows", "options", "times"), CASES)
def test_the_models_own_positions(cls, rows, options, times):
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = partial(cls.get_vision_position_ids, model)
    ids = torch.tensor(rows)
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == 9).int() + 2 * (ids == 8).int(),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "video_grid_thw": torch.tensor([[2, 4, 6], [2, 4, 4], [2, 6, 4]]),
        **times,
    }
    expected, _ = cls.get_rope_index(
        model, ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"], inputs["video_grid_thw"],
        attention_mask=inputs["attention_mask"], **times,
    )  # fmt: skip
    arrays = {name: value.numpy() for name, value in inputs.items()}
    found = position_ids("mrope_clips", arrays, {"spatial_merge_size": 2, "axes": 3, **options})
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Qwen2VLForConditionalGeneration", {}),
        ("Qwen2_5_VLForConditionalGeneration", {"tokens_per_second": 4}),
        ("Qwen3VLForConditionalGeneration", {"apart": True}),
    ],
)
def test_clips_of_one_frame_leave_the_rule_to_the_model(name, options, monkeypatch):
    monkeypatch.setattr(sample_media, "CLIPS", ((1, 4, 4), (1, 4, 12), (1, 8, 4)))
    model = shrink.make(name)
    samples = make_samples(model, shrink.variants(name, model, clip=True)["build"], limits_of(model, "torch", None))
    captures = capture(model, samples.capture)
    found = make_plan(model, captures).step.sources["position_ids"].options
    assert {"spatial_merge_size": 2, "axes": 3, **options} == {**found, "axes": 3}
    owner = next(module for module in model.modules() if hasattr(module, "get_rope_index"))
    monkeypatch.delattr(type(owner), "get_vision_position_ids")  # the captures are all that is left to go by
    with pytest.raises(UnsupportedModelError, match="give a clip of several frames"):
        make_plan(model, captures)
