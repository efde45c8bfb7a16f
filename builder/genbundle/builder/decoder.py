"""The decoder as a module with explicit state: token ids or embeddings and the past in, logits and the present out."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from genbundle.builder.attention import FusedLayer, PastLayer, attention, group_query_attention, make_cache


class Decoder(torch.nn.Module):
    """`model` from its inputs and past to the last position's logits `[batch, 1, vocabulary]` and the present.

    One program serves the prompt (an empty past), a continuation and the single step. With `fused`, attention becomes
    ONNX Runtime's GroupQueryAttention, which only traces; without, the module also runs eagerly.

    Past inputs are named `past_<layer>_key` and `past_<layer>_value`, outputs `present_...`, `[batch, heads, length,
    width]`. `constants` are forward arguments that every capture passed alike.
    """

    def __init__(self, model: PreTrainedModel, layers: int, *, fused: bool, constants: Mapping[str, Any] | None = None):
        super().__init__()
        self.model, self.layers, self.fused = model, layers, fused
        self.config = model.config
        self.constants = dict(constants or {})
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self.constants["logits_to_keep"] = 1

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model's own forward over a cache made of the past inputs."""
        make = FusedLayer if self.fused else PastLayer
        past = [
            make(inputs.pop(f"past_{index}_key"), inputs.pop(f"past_{index}_value")) for index in range(self.layers)
        ]
        cache = make_cache(self.model, past)
        attend = group_query_attention(lambda: cache) if self.fused else None
        with attention(language_model_of(self.model), attend):
            logits = self.call(inputs, cache)
        outputs = {"logits": logits[:, -1:]}
        for index, layer in enumerate(past):
            outputs[f"present_{index}_key"], outputs[f"present_{index}_value"] = layer.present()
        return outputs

    def call(self, inputs: dict[str, torch.Tensor], cache: Any) -> torch.Tensor:
        """The logits of the model's forward."""
        return self.model(**inputs, **self.constants, past_key_values=cache, use_cache=True).logits


def language_model_of(model: PreTrainedModel) -> PreTrainedModel:
    """The text decoder inside `model`; `model` itself when it is one."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model
