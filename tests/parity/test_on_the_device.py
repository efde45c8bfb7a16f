"""What genbundle's runtime does with a .pte that ExecuTorch's own runners don't, up to the last token it holds."""

import numpy as np
import pytest
import torch

from genbundle.builder import build_bundle
from genbundle.bundles import InputError
from genbundle.runtime import load_bundle
from genbundle.runtime.rewind import rewind
from tests.zoo import models

pytestmark = pytest.mark.slow


def eager(name, ids, new, **options):
    """The sequences that the original model generates greedily."""
    with torch.no_grad():
        found = models.make(name).generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, **options)
    return found.numpy()


def test_up_to_the_last_token_that_it_holds(loaded):
    model = loaded("llama", "xnnpack")
    capacity = model.bundle.manifest.flow.capacity
    for length in (capacity - 40, capacity - 1):
        ids = models.text_ids(length, seed=length)
        found = model.generate(input_ids=ids.numpy(), max_new_tokens=100, do_sample=False, eos_token_id=())
        np.testing.assert_array_equal(found.sequences, eager("llama", ids, capacity - length))
        assert found.finish_reasons == ("length",)
    with pytest.raises(InputError, match=f"{capacity}"):
        model.generate(input_ids=models.text_ids(capacity).numpy(), max_new_tokens=1)


def test_the_included_model_takes_little_more_than_its_weights(bundle):
    made = bundle("demo", "xnnpack")
    assert made.size <= 1.1 * made.manifest.model.weight_bytes


def test_another_capacity_at_build(loaded, tmp_path):
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    from tests.zoo.tokenizers import chat_tokenizer

    model = models.make("llama")
    made = build_bundle(
        model, None, "xnnpack", processor=chat_tokenizer(models.VOCABULARY), max_length=48, progress=False,
        output=tmp_path / "b",
    )  # fmt: skip
    own = load_bundle(made)
    assert made.manifest.flow.capacity == 48
    assert made.manifest.programs[0].memory < loaded("llama", "xnnpack").bundle.manifest.programs[0].memory
    found = own.generate("Hello", max_new_tokens=100, do_sample=False, eos_token_id=())
    assert found.sequences.shape == (1, 48)
    said = []
    runner = TextLLMRunner(str(made.path / "model.pte"), str(made.path / "tokenizer.json"))
    runner.generate("Hello", GenerationConfig(temperature=0.0, echo=False), said.append, None)
    new = found.sequences[0, 5:].tolist()
    assert said == [own.text.decode([token], skip_special_tokens=False) for token in new][: len(said)]
    assert len(said) == 43 or said[-1] == "<eos>"


def test_each_prompt_stands_for_itself_without_loading_again(loaded):
    model = loaded("llama", "xnnpack")
    ids = [models.text_ids(length, seed=length) for length in (30, 4, 17)]
    methods = dict(model.backend._methods)
    for each in (*ids, *ids):
        found = model.generate(input_ids=each.numpy(), max_new_tokens=8, do_sample=False, eos_token_id=())
        np.testing.assert_array_equal(found.sequences, eager("llama", each, 8))
    assert all(model.backend._methods[key] is method for key, method in methods.items())


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.3, "top_k": 20},
        {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.3},
        {"temperature": 1.5, "min_p": 0.05, "no_repeat_ngram_size": 2},
    ],
)
def test_sampling_is_that_of_every_backend(options, loaded):
    ids = models.text_ids(9, seed=3).numpy()
    asked = {"input_ids": np.concatenate([ids, ids + 1]), "max_new_tokens": 16, "eos_token_id": (), "seed": 5}
    found = [loaded("llama", backend).generate(**asked, **options).sequences for backend in ("xnnpack", "cpu")]
    np.testing.assert_array_equal(*found)
    assert (found[0] != loaded("llama", "xnnpack").generate(**{**asked, "seed": 6}, **options).sequences).any()


@pytest.mark.parametrize("backend", ["xnnpack", "cpu", "torch"])
def test_tokens_are_taken_back(backend, loaded):
    model, wiring = models.make("llama"), loaded("llama", backend).wiring
    ids, other = models.text_ids(21, seed=1), models.text_ids(6, seed=2)
    with torch.no_grad():
        expected = model(torch.cat([ids[:, :9], other], 1)).logits[:, -1].numpy()
        again = model(ids).logits[:, -1].numpy()
    _, sequences = wiring.prompt({"input_ids": ids[:, :13].numpy(), "attention_mask": np.ones((1, 13), np.int64)})
    np.testing.assert_allclose(wiring.step(ids[:, 13:].numpy(), sequences), again, rtol=0, atol=1e-3)
    for tokens, logits in ((other, expected), (ids[:, 9:], again)):
        rewind(wiring, sequences, 9)
        assert sequences.mask.shape == (1, 9)
        np.testing.assert_allclose(wiring.step(tokens.numpy(), sequences), logits, rtol=0, atol=1e-3)
    for length in (0, -1, 22):
        with pytest.raises(InputError, match="rewind: expected a length from 1 to the 21 tokens that there are"):
            rewind(wiring, sequences, length)


def test_what_cannot_be_taken_back_is_refused(loaded):
    wiring = loaded("llama", "xnnpack").wiring
    ids, mask = models.text_ids(6, seed=1).numpy(), np.array([[0, 1, 1, 1, 1, 1]])
    _, sequences = wiring.prompt({"input_ids": ids, "attention_mask": np.ones_like(mask)})
    sequences.mask = mask
    with pytest.raises(InputError, match="positions don't count the tokens"):
        rewind(wiring, sequences, 3)
