"""Variants of the caller's samples: what goes with the tokens grows with them, what holds places stays."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from genbundle.builder.samples import SampleMaker, left_padded, padded_single, per_token


def sample(length: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 3 + length)[None]
    places = torch.arange(6.0).reshape(1, 6, 1)
    return {
        "input_ids": ids,
        "boxes": torch.rand(1, length, 4),
        "patches": torch.cat([places, torch.rand(1, 6, 5)], -1),
    }


def maker(*given: dict[str, torch.Tensor]) -> SampleMaker:
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=32)
    return SampleMaker(LlamaForCausalLM(config), given)


def test_only_what_follows_the_tokens_in_every_sample_has_a_row_for_each():
    assert per_token([sample(6), sample(8)]) == {"input_ids", "boxes"}
    assert per_token([sample(6)]) == {"input_ids"}  # as many patches as tokens by chance


def test_boxes_grow_with_the_tokens_and_places_stay():
    given = sample(6), sample(8)
    longer = maker(*given).longer(given[0], 3)
    assert {name: tensor.shape[1] for name, tensor in longer.items()} == {"input_ids": 9, "boxes": 9, "patches": 6}
    other = maker(*given).other_content(longer)
    assert torch.equal(other["boxes"], longer["boxes"])
    assert torch.equal(other["patches"][..., 0], longer["patches"][..., 0])
    assert not torch.equal(other["patches"][..., 1:], longer["patches"][..., 1:])
    batch = left_padded([longer, given[1]], pad=0)
    assert batch["boxes"].shape == (2, 9, 4)
    assert (batch["boxes"][1, 0] == 0).all()


class Generating:
    """Takes whatever it is given."""

    def __init__(self, model: LlamaForCausalLM):
        self.model = model

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def generate(self, **_: object) -> None:
        pass


def test_one_sequence_to_trace_from_has_rows_for_its_padding_and_contents_that_differ():
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=32)
    given = [sample(6), sample(8)]
    found = padded_single(Generating(LlamaForCausalLM(config)), given)
    assert found["boxes"].shape == (1, 18, 4) and found["input_ids"].shape == (1, 18)
    assert (found["boxes"][0, :2] == 0).all()
    first, second = found["patches"]
    assert torch.equal(first, given[1]["patches"][0]) and torch.equal(first[:, 0], second[:, 0])
    assert not torch.equal(first[:, 1:], second[:, 1:])
