"""Video beside text, against `model.generate`: frames apart or counted among the positions, packed patches or not."""

from typing import Any

import numpy as np
import pytest

from genbundle.builder import build_bundle
from genbundle.bundles import EngineError, InputError
from genbundle.runtime import load_bundle
from tests.zoo import coverage, shrink

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("Qwen2VLForConditionalGeneration", "cpu"),
        pytest.param("Qwen2_5_VLForConditionalGeneration", "torch", marks=pytest.mark.long),
        ("Qwen3VLForConditionalGeneration", "torch"),
        ("LlavaOnevisionForConditionalGeneration", "torch"),
        ("VideoLlavaForConditionalGeneration", "torch"),
    ],
)
def test_the_same_sequences_as_eager(name, backend, tmp_path):
    model = shrink.make(name)
    inputs = shrink.variants(name, model, clip=True)
    path, room = tmp_path / "clips.bundle", coverage.room_for(inputs)
    build_bundle(model, inputs["build"], backend, output=path, max_length=room, progress=False)
    bundle = load_bundle(path)
    arrays: dict[str, Any] = {}
    for each in inputs["check"]:
        expected = shrink.observed(model, each).sequences.numpy()
        arrays = {key: value.numpy() for key, value in each.items()}
        np.testing.assert_array_equal(bundle.generate(**arrays, max_new_tokens=12, do_sample=False).sequences, expected)
    more = np.concatenate([arrays["input_ids"], arrays["input_ids"][:, ::-1]], 1)
    # Where everything is one program, torch finds it before the features can be counted.
    refusals = r"video tokens, the video gives|can't be computed|expected shape|Number of elements of source"
    with pytest.raises((InputError, EngineError), match=refusals):
        bundle.generate(**{**arrays, "input_ids": more, "attention_mask": more * 0 + 1}, max_new_tokens=2)
