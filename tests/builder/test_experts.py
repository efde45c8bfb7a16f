"""Experts that all compute every token, against transformers' own."""

from typing import Any

import pytest
import torch
import transformers as hf
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from genbundle.builder.experts import dense_experts

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 50,
}  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_SIZES)),
        lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**_SIZES, head_dim=8)),  # transposed, biases, gate of its own
    ],
)
def test_the_same_logits_and_everything_put_back(make) -> None:
    torch.manual_seed(0)
    model, ids = make().eval(), torch.randint(0, 50, (2, 7))
    before, known = model.config._experts_implementation, set(ALL_EXPERTS_FUNCTIONS)
    with torch.no_grad():
        expected = model(ids).logits
        with dense_experts(model):
            assert model.config._experts_implementation != before
            found = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.config._experts_implementation == before and set(ALL_EXPERTS_FUNCTIONS) == known
