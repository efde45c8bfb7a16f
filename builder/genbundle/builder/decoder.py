"""The decoder as a module with explicit state: token ids or embeddings and the past in, logits and the present out."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from genbundle.builder.attention import attention, group_query_attention, make_cache
from genbundle.builder.layers import Layer, open_layers, present
from genbundle.builder.windows import seen_from


class Decoder(torch.nn.Module):
    """`model` from its inputs and past to the last position's logits `[batch, 1, vocabulary]` and the present.

    One program serves the prompt (an empty past), a continuation and the single step. With `fused`, attention becomes
    ONNX Runtime's GroupQueryAttention, which only traces; without, the module also runs eagerly. With `in_place`, it
    writes the new keys and values into the past's tensors, which have room for them; how many tokens came before is
    then the mask's length without the new ones if `fused`, else the input `start` `[1]`. With `begins`, the program is
    for prompts alone and takes no past.

    Past inputs are named `past_<layer>_<what>` (`key` and `value`, `[batch, heads, length, width]`, or a state of fixed
    size), outputs `present_...`. `constants` are forward arguments that every capture passed alike. `window`: as
    `windows.cut_window` tells.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[Layer],
        *,
        fused: bool,
        in_place: bool = False,
        begins: bool = False,
        cache_argument: str = "past_key_values",
        constants: Mapping[str, Any] | None = None,
        window: int | None = None,
    ):
        super().__init__()
        self.model, self.layers, self.fused, self.begins = model, tuple(layers), fused, begins
        self.in_place, self.window = in_place, window
        self.config, self.cache_argument = model.config, cache_argument
        self.constants = dict(constants or {})
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self.constants["logits_to_keep"] = 1

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model's own forward over a cache made of the past inputs."""
        # Any tensor with the batch's size gives the empty ones theirs.
        like = inputs["input_ids"].to(torch.get_default_dtype())
        past = open_layers(self.layers, inputs, like, fused=self.fused, begins=self.begins, past=self._before(inputs))
        cache = make_cache(past)
        attend = group_query_attention(lambda: cache) if self.fused else None
        windowed = seen_from(self.model, self.window) if self.window is not None else nullcontext()
        with attention(language_model_of(self.model), attend), windowed:
            logits = self.call(inputs, cache)
        return {"logits": logits[:, -1:], **present(past)}

    def _before(self, inputs: dict[str, torch.Tensor]) -> Any:
        if not self.in_place:
            return None
        return inputs["attention_mask"].shape[1] - inputs["input_ids"].shape[1] if self.fused else inputs.pop("start")

    def call(self, inputs: dict[str, torch.Tensor], cache: Any) -> torch.Tensor:
        """The logits of the model's forward."""
        return self.model(**inputs, **self.constants, **{self.cache_argument: cache}, use_cache=True).logits


def language_model_of(model: PreTrainedModel) -> PreTrainedModel:
    """The text decoder inside `model`; `model` itself when it is one."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model
