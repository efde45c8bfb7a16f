"""Decoders that own their key/value cache, as the ExecuTorch runtimes need them.

`probe_layers` runs the model once to see what each layer keeps and how it calls attention; `StatefulDecoder` holds that
state in buffers and is exported with its attention replaced (`StatefulDecoder.exporting`).
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from genbundle.builder.prefix_attention import Prefixes
from genbundle.builder.stateful_attention import BufferCache, attend, check_attention_call, stateful_attention
from genbundle.bundles import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerState:
    """The shapes of what one layer keeps for each token: `[heads, width]` of its keys and of its values."""

    keys: tuple[int, int]
    values: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderCall:
    """How a model's own forward calls its decoder; the defaults are what plain text decoders do.

    embeds: with embeddings that a merge made, instead of tokens. position_offset: the position of the first token.
    position_axes: rows of explicit position ids, 0 where positions count up. both_ways: the prompt's tokens see each
    other in both directions. deepstack: how many layers get image features added to their outputs.
    """

    embeds: bool = False
    position_offset: int = 0
    position_axes: int = 0
    both_ways: bool = False
    deepstack: int = 0


class StatefulDecoder(torch.nn.Module):
    """A generative model whose cache is in its buffers: `(tokens [1, S], start_pos [1]) -> logits [1, 1, V]`.

    One method serves a prompt, its continuation and the step; a smaller `start_pos` rewinds. `capacity` tokens fit.
    With `call.embeds` the first input is `embeds [1, S, D]`, and what the call needs follows `start_pos` in this order:
    `position_ids [axes, 1, S]`, `both_ways [1]` (1 in a prompt, else 0), `deepstack [layers, 1, S, D]` (zeros where
    there is no image).
    """

    def __init__(self, model: PreTrainedModel, *, capacity: int, call: DecoderCall | None = None):
        super().__init__()
        self.capacity, self.call = capacity, call or DecoderCall()
        # Of an image-text model only the language model and the head belong to this program: the model around them is
        # kept out of the module tree, else its towers would be exported too.
        self.decoder, self.head = decoder_of(model), head_of(model)
        self._model = (model,)
        self.layers = probe_layers(model)
        for index, layer in enumerate(self.layers):
            for kind, (heads, width) in (("keys", layer.keys), ("values", layer.values)):
                buffer = torch.zeros(1, capacity, heads, width)
                self.register_buffer(f"{kind}{index}", buffer, persistent=False)
        self.cache: BufferCache | None = None

    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
        """Logits after the last of `tokens` (or embeddings), which follow the first `start_pos` tokens of the state."""
        start = cast(int, start_pos[0].item())
        torch._check(start >= 0)
        torch._check(start < self.capacity)
        rest = list(extra)
        positions = rest.pop(0) if self.call.position_axes else None
        both_ways = rest.pop(0) if self.call.both_ways else None
        deepstack = rest.pop(0) if self.call.deepstack else None
        buffers = [(getattr(self, f"keys{i}"), getattr(self, f"values{i}")) for i in range(len(self.layers))]
        self.cache = BufferCache(buffers, start, Prefixes(start_pos, tokens.shape[1]), both_ways)
        try:
            if not self.call.embeds:
                return _last_logits(self._model[0], input_ids=tokens, past_key_values=self.cache)
            if positions is None:
                positions = (torch.arange(tokens.shape[1]) + start + self.call.position_offset)[None]
            return self._from_embeds(tokens, positions, deepstack)
        finally:
            self.cache = None

    def _from_embeds(self, embeds: torch.Tensor, positions: torch.Tensor, deepstack: torch.Tensor | None) -> Any:
        """The model's own forward, resumed at its decoder: what comes after it is the model's own."""
        original = self.decoder.forward

        def resume(*_: Any, **__: Any) -> Any:
            return original(inputs_embeds=embeds, position_ids=positions, past_key_values=self.cache, use_cache=True)

        # What stands before the decoder is dead code here: any ids do.
        ids = torch.zeros(1, embeds.shape[1], dtype=torch.long)
        with _deepstack(self.decoder, deepstack), instead_of(self.decoder, resume):
            return _last_logits(self._model[0], input_ids=ids)

    @contextmanager
    def exporting(self) -> Iterator[None]:
        """While open, the model's attention runs on this decoder's buffers; the model is as before on leaving."""

        def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
            assert self.cache is not None
            return attend(self.cache, module, query, key, value, attention_mask, **kwargs)

        def mask(**kwargs: Any) -> torch.Tensor | None:
            assert self.cache is not None
            return self.cache.mask(**kwargs)

        with stateful_attention(self.decoder, attention, mask):
            yield


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The language model inside `model`, without its head; UnsupportedModelError when there is none."""
    decoder = None if model.config.is_encoder_decoder else model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder of its own to keep a cache for, which the xnnpack backend needs: "
            "build for another backend, for instance cpu"
        )
    return decoder


def head_of(model: PreTrainedModel) -> torch.nn.Linear:
    """The head that gives logits; UnsupportedModelError when there is none."""
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no lm_head, so that it can't generate tokens")
    return cast(torch.nn.Linear, head)


def probe_layers(model: PreTrainedModel) -> tuple[LayerState, ...]:
    """What each layer of the decoder keeps, seen by running it on two tokens.

    Raises UnsupportedModelError for a state other than keys and values, for attention that does not go through
    transformers' AttentionInterface, and for keywords of attention that the xnnpack backend doesn't know.
    """
    decoder, attended = decoder_of(model), 0

    def attention(module: Any, query: torch.Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        nonlocal attended
        check_attention_call(module, kwargs)
        attended += 1
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    cache = DynamicCache(config=decoder.config)
    with torch.no_grad(), stateful_attention(decoder, attention, lambda **_: None):
        embeds = model.get_input_embeddings()(torch.zeros(1, 2, dtype=torch.long))
        decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    shapes = []
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or keys is None or values is None:
            raise UnsupportedModelError(
                f"language_model: layer {index} keeps {type(layer).__name__.removesuffix('Layer')} state, and the "
                "xnnpack backend knows keys and values of every token only: build for another backend, for instance cpu"
            )
        shapes.append(LayerState(keys=(keys.shape[1], keys.shape[3]), values=(values.shape[1], values.shape[3])))
    if attended < len(shapes):
        raise UnsupportedModelError(
            f"language_model: {attended} of the {len(shapes)} layers of {type(decoder).__name__} call attention "
            "through transformers' AttentionInterface, which the xnnpack backend needs of all: build for another "
            "backend, for instance cpu"
        )
    return tuple(shapes)


def _last_logits(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """The model's logits of the last position, computing no others where its forward allows that."""
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        inputs["logits_to_keep"] = 1
    return model(**inputs, use_cache=True).logits[:, -1:].float()


@contextmanager
def instead_of(module: torch.nn.Module, function: Any) -> Iterator[None]:
    """While open, calling `module` calls `function`."""
    module.forward = function
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _deepstack(decoder: PreTrainedModel, features: torch.Tensor | None) -> Iterator[None]:
    """While open, the outputs of the decoder's first layers have `features [layers, 1, S, D]` added."""
    layers = cast(torch.nn.ModuleList, decoder.layers) if features is not None else []
    handles = [
        layers[index].register_forward_hook(lambda _module, _inputs, output, added=added: output + added)
        for index, added in enumerate([] if features is None else features)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
