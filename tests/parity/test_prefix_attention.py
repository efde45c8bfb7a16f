"""A step's attention over a prefix of the state in a .pte: the same tokens as eager, on either side of each length."""

import numpy as np
import pytest
import torch
import transformers as hf

from genbundle.builder import build_bundle
from genbundle.builder.prefix_attention import LENGTHS, SHORT, lengths_for
from genbundle.runtime import load_bundle
from genbundle.runtime.rewind import rewind
from tests.zoo import models
from tests.zoo.tokenizers import chat_tokenizer

pytestmark = pytest.mark.slow
ROOM = SHORT + 8
FIRST = LENGTHS[0]
SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=models.VOCABULARY, max_position_embeddings=ROOM, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
KINDS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": lambda **changed: hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, **changed})),
    # Masks: windows that are shorter than the first length, and layers without one.
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=200, layer_types=KINDS)
    ),
}


def make(name, **changed):
    torch.manual_seed(0)
    model = FAMILIES[name](**changed).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in key:
            parameter.data.mul_(8)
    return model


@pytest.fixture(scope="module", params=["llama", pytest.param("gemma3", marks=pytest.mark.long)])
def both(request, tmp_path_factory):
    """A model and its bundle, loaded."""
    model = make(request.param)
    path = tmp_path_factory.mktemp(request.param) / "bundle"
    processor = chat_tokenizer(models.VOCABULARY)
    return model, load_bundle(build_bundle(model, None, "xnnpack", processor=processor, output=path, progress=False))


def eager(model, ids, new):
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None).numpy()


@pytest.mark.parametrize("length", [5, FIRST - 4, FIRST - 1, FIRST, ROOM - 10])
def test_the_tokens_of_eager(both, length):
    model, own = both
    ids = models.text_ids(length, seed=length)
    found = own.generate(input_ids=ids.numpy(), max_new_tokens=10, do_sample=False, eos_token_id=())
    np.testing.assert_array_equal(found.sequences, eager(model, ids, 10))


def test_tokens_are_taken_back(both):
    """Shorter prefixes again after longer ones, and several tokens at once between steps."""
    model, own = both
    ids = models.text_ids(ROOM, seed=7)

    def expected(ids):
        with torch.no_grad():
            return model(ids, logits_to_keep=1).logits[:, -1].numpy()

    def step(tokens):
        return own.wiring.step(tokens.numpy(), sequences)

    _, sequences = own.wiring.prompt({"input_ids": ids[:, :500].numpy(), "attention_mask": np.ones((1, 500), int)})
    for length in (500, 258, 400, 250, 100):
        if length < sequences.mask.shape[1]:
            rewind(own.wiring, sequences, length)
        elif length > sequences.mask.shape[1]:
            step(ids[:, sequences.mask.shape[1] : length])
        for count in (1, 4, 1):
            end = length + count
            np.testing.assert_allclose(step(ids[:, length:end]), expected(ids[:, :end]), rtol=0, atol=2e-3)
            length = end


def test_at_four_bits_a_step_gives_what_the_prompt_gives(tmp_path):
    """Rounded programs are lowered another way; a prompt's attention goes through the fused operator."""
    path = tmp_path / "bundle"
    model = make("llama", num_hidden_layers=1)
    build_bundle(model, None, "xnnpack", precision="int4", quality_floor=0.0, output=path, progress=False)
    wiring = load_bundle(path).wiring
    for length in (20, FIRST + 20):
        ids = models.text_ids(length, seed=length).numpy()
        whole, _ = wiring.prompt({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        _, sequences = wiring.prompt({"input_ids": ids[:, :-1], "attention_mask": np.ones_like(ids[:, :-1])})
        np.testing.assert_allclose(wiring.step(ids[:, -1:], sequences), whole, rtol=0, atol=1e-3)


def test_in_the_stock_runner(both):
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    own, said = both[1], []
    found = own.generate("Hello", max_new_tokens=FIRST + 20, do_sample=False, eos_token_id=())
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
