"""A step's attention over a prefix of the state in a .pte: the same tokens as eager, on either side of each length."""

import numpy as np
import pytest
import torch
import transformers as hf

from genbundle.builder import build_bundle
from genbundle.builder.prefix_attention import LENGTHS, lengths_for
from genbundle.runtime import load_bundle
from genbundle.runtime.rewind import rewind
from tests.zoo import models
from tests.zoo.tokenizers import chat_tokenizer

pytestmark = pytest.mark.slow
ROOM = 1100
SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=models.VOCABULARY, max_position_embeddings=ROOM, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
KINDS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    # Masks: windows that are longer than the first length, and layers without one.
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=300, layer_types=KINDS)
    ),
}


def make(name):
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in key:
            parameter.data.mul_(8)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """A model and its bundle, loaded."""
    model = make(request.param)
    path = tmp_path_factory.mktemp(request.param) / "bundle"
    processor = chat_tokenizer(models.VOCABULARY)
    return model, load_bundle(build_bundle(model, None, "xnnpack", processor=processor, output=path, progress=False))


def eager(model, ids, new):
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None).numpy()


@pytest.mark.parametrize("length", [5, LENGTHS[0] - 4, LENGTHS[0] - 1, LENGTHS[0], 700, LENGTHS[1] - 4, ROOM - 10])
def test_the_tokens_of_eager(both, length):
    model, own = both
    ids = models.text_ids(length, seed=length)
    found = own.generate(input_ids=ids.numpy(), max_new_tokens=10, do_sample=False, eos_token_id=())
    np.testing.assert_array_equal(found.sequences, eager(model, ids, 10))


def test_tokens_are_taken_back(both):
    """Shorter prefixes again after longer ones, and several tokens at once between steps."""
    model, own = both
    ids = models.text_ids(1040, seed=7)

    def expected(ids):
        with torch.no_grad():
            return model(ids, logits_to_keep=1).logits[:, -1].numpy()

    def step(tokens):
        return own.wiring.step(tokens.numpy(), sequences)

    _, sequences = own.wiring.prompt({"input_ids": ids[:, :1030].numpy(), "attention_mask": np.ones((1, 1030), int)})
    for length in (1030, 260, 1000, 250):
        if length < sequences.mask.shape[1]:
            rewind(own.wiring, sequences, length)
        elif length > sequences.mask.shape[1]:
            step(ids[:, sequences.mask.shape[1] : length])
        for count in (1, 4, 1):
            end = length + count
            np.testing.assert_allclose(step(ids[:, length:end]), expected(ids[:, :end]), rtol=0, atol=2e-3)
            length = end


def test_in_the_stock_runner(both):
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    own, said = both[1], []
    found = own.generate("Hello", max_new_tokens=LENGTHS[0] + 20, do_sample=False, eos_token_id=())
    expected = [own.text.decode([token], skip_special_tokens=False) for token in found.sequences[0, 5:].tolist()]
    runner = TextLLMRunner(str(own.bundle.path / "model.pte"), str(own.bundle.path / "tokenizer.json"))
    asked = GenerationConfig(temperature=0.0, echo=False, max_new_tokens=len(expected))
    runner.generate("Hello", asked, said.append, None)
    assert said == expected[: len(said)]
    assert len(said) == len(expected) or said[-1] == "<eos>"


def test_a_step_is_products_that_xnnpack_runs(both):
    from executorch.exir._serialize import _deserialize_pte_binary

    path = both[1].bundle.path / "model.pte"
    program = _deserialize_pte_binary(path.read_bytes()).program
    (plan,) = (plan for plan in program.execution_plan if plan.name == "forward")
    assert "aten::bmm" not in {operator.name for operator in plan.operators}
    assert len(plan.delegates) >= len(KINDS) * len(lengths_for(ROOM, SIZES["num_key_value_heads"]))
