"""How long sequences may get, and what a model does otherwise from some length on."""

import numpy as np
import pytest
import torch
from tests.zoo import models

from genbundle.builder import build_bundle
from genbundle.builder.limits import limits_of
from genbundle.bundles import BuildError
from genbundle.runtime import load_bundle


def test_a_restart_is_found_in_the_models_own_loop():
    assert limits_of(models.phi3(60), "cpu", None).restart == 60
    assert limits_of(models.phi3(60), "cpu", 40).restart is None  # never reached
    assert limits_of(models.make("llama"), "cpu", None).restart is None
    assert limits_of(models.phi3(2000), "cpu", None).restart is None


def test_what_the_checks_do_not_reach_is_said():
    assert limits_of(models.phi3(60), "cpu", None).not_reached(80) == []
    (missed,) = limits_of(models.phi3(60), "cpu", None).not_reached(50)
    assert "the length of 60" in missed


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "xnnpack"])
def test_a_generation_goes_on_past_the_length_of_a_restart(backend, tmp_path):
    model = models.phi3(60)
    bundle = build_bundle(model, None, backend, output=tmp_path / "b", progress=False, max_length=200)
    assert "past the length of a restart" in {check.name for check in bundle.manifest.verification.checks}
    runtime = load_bundle(bundle)
    for length in (20, 52, 60, 61, 70):
        ids = models.text_ids(length, seed=3)
        with torch.no_grad():
            expected = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
            ).numpy()
        found = runtime.generate(input_ids=ids.numpy(), max_new_tokens=16, do_sample=False).sequences
        np.testing.assert_array_equal(found, expected)


def test_more_tokens_than_the_model_has_positions_for(tmp_path):
    with pytest.raises(BuildError, match="max_length=5000 is more than the 256 positions of the model's config"):
        build_bundle(models.make("gpt2"), output=tmp_path / "b", progress=False, max_length=5000)
    assert list(tmp_path.iterdir()) == []


def test_fewer_tokens_than_a_check_takes(tmp_path):
    with pytest.raises(BuildError, match=r"a bundle of 8 tokens can't be checked: the longest sample takes 45"):
        build_bundle(models.make("llama"), output=tmp_path / "b", progress=False, max_length=8)


@pytest.mark.slow
def test_sparse_attention_that_picks_more_tokens_than_were_traced(tmp_path):
    """A size that the tracer took for fixed, since no traced input reached it, gave other tokens from there on."""
    from tests.zoo import shrink

    model = shrink.make("DeepseekV32ForCausalLM")
    for module in model.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = 20
    model.config.index_topk = 20
    samples = shrink.variants("DeepseekV32ForCausalLM", model)["build"]
    bundle = build_bundle(model, samples, "torch", output=tmp_path / "b", progress=False, max_length=64)
    ids = torch.randint(10, 200, (1, 40), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12).numpy()
    found = load_bundle(bundle).generate(input_ids=ids.numpy(), max_new_tokens=12).sequences
    np.testing.assert_array_equal(found, expected)
