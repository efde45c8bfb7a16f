"""Windows that a cache has and the model's mask hasn't, and those that both have."""

import numpy as np
import pytest
import torch
from tests.zoo import models, shrink

from genbundle.builder import build_bundle
from genbundle.builder.windows import cut_window
from genbundle.runtime import load_bundle


@pytest.mark.parametrize(
    ("model", "window"),
    [
        (lambda: shrink.make("MoshiForCausalLM"), 8),
        (lambda: models.make("mistral"), None),
        (lambda: models.make("gemma2"), None),
        (lambda: models.make("llama"), None),
    ],
)
@pytest.mark.parametrize("longer", [False, True])
def test_a_window_that_only_the_cache_has_is_found(model, window, longer):
    """However long it is: Moshi's own is of 3000 tokens."""
    made = model()
    if longer and window is not None:
        window = made.config.sliding_window = 3000
    with torch.no_grad():
        cache = made(input_ids=torch.arange(20)[None], use_cache=True).past_key_values
    assert cut_window(made, cache.layers) == window


@pytest.mark.slow
def test_steps_see_that_window_and_prompts_everything(tmp_path):
    """A padded batch, and prompts of more and of fewer tokens than the window, in a program with fused attention."""
    model = shrink.make("MoshiForCausalLM")
    bundle = load_bundle(build_bundle(model, output=tmp_path / "b", max_length=64, progress=False))
    for length in (3, 8, 30):
        ids = np.arange(10, 10 + length)[None]
        with torch.no_grad():
            expected = model.generate(torch.from_numpy(ids), max_new_tokens=12, do_sample=False)
        assert (
            bundle.generate(input_ids=ids, max_new_tokens=12, do_sample=False).sequences.tolist() == expected.tolist()
        )
    ids = np.stack([np.arange(10, 30), np.arange(50, 70)])
    mask = np.ones_like(ids)
    mask[1, :9] = 0
    tensors = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    with torch.no_grad():
        expected = model.generate(**tensors, max_new_tokens=12, do_sample=False)
    found = bundle.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert found.sequences.tolist() == expected.tolist()
