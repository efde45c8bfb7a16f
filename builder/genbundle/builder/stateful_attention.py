"""Attention over a key/value cache that the exported program owns: transformers' cache, mask and attention functions.

The model's own code runs unchanged. It meets three things of ours: a `Cache` whose layers write into a module's buffers
(`BufferCache`), a mask function that answers None where plain causal attention is meant, and an attention function that
takes ExecuTorch's fused operator where it can and plain mathematics where it must.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, or_masks, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genbundle.builder.prefix_attention import Prefixes, finite, lengths_for
from genbundle.bundles import UnsupportedModelError

IMPLEMENTATION, FLASH_IMPLEMENTATION = "genbundle_stateful", "genbundle_flash_stateful"
"""The names our functions are registered under while `stateful_attention` is open."""

_WITHOUT_EFFECT = frozenset(
    {"cache_position", "layer_idx", "logits_to_keep", "output_attentions", "output_hidden_states", "past_key_values",
     "position_ids", "return_dict", "sliding_window", "use_cache"}
)  # fmt: skip
"""Keywords that reach attention but change nothing there: the mask already holds the window, the cache the past."""


class BufferCacheLayer(CacheLayerMixin):
    """One layer's keys and values `[1, capacity, heads, width]`, written from the cache's start on."""

    is_sliding = False

    def __init__(self, cache: "BufferCache", keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.cache, self.buffers = cache, (keys, values)
        self.keys, self.values = self.buffers
        self.returned: tuple[torch.Tensor, torch.Tensor] | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the buffers exist from the start."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any):
        """Write the new keys and values `[1, heads, S, width]`; returns the whole buffers, heads first."""
        read_beyond = bool(lengths_for(*self.buffers[0].shape[1:3]))
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            rows = new.transpose(1, 2).contiguous()
            torch.ops.llama.update_cache(finite(rows) if read_beyond else rows, buffer, self.cache.start)
        self.returned = self.buffers[0].transpose(1, 2), self.buffers[1].transpose(1, 2)
        return self.returned

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask must cover."""
        return self.get_max_length(), 0

    def get_seq_length(self) -> Any:
        """How many tokens the state held before this call."""
        return self.cache.start

    def get_max_length(self) -> int:
        """How many tokens the state can hold."""
        return self.buffers[0].shape[1]


class BufferCache(Cache):
    """transformers' cache interface over the buffers of one decoder, for one call that starts at `start`.

    buffers: keys and values of every layer, in order. start: the number in `prefixes.start`. prefixes: what the call's
    layers share. both_ways: int64 `[1]`, 1 where new tokens also see the new tokens after them; None for a model that
    never does that.
    """

    def __init__(
        self,
        buffers: list[tuple[torch.Tensor, torch.Tensor]],
        start: Any,
        prefixes: Prefixes,
        both_ways: torch.Tensor | None,
    ):
        self._own = [BufferCacheLayer(self, *pair) for pair in buffers]
        super().__init__(layers=list(self._own))
        self.start, self.prefixes, self.both_ways = start, prefixes, both_ways
        self._additive: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def is_initialized(self) -> bool:
        """Whether there is a past, as models ask before they take a prompt's inputs: here every call continues one."""
        return True

    def buffers_of(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The buffers behind keys and values that some layer's `update` returned, None for any other tensors."""
        for layer in self._own:
            if layer.returned is not None and layer.returned[0] is key and layer.returned[1] is value:
                return layer.buffers
        return None

    def mask(self, *, mask_function: Callable, local_size: int | None = None, **kwargs: Any) -> torch.Tensor | None:
        """The boolean mask `[1, 1, S, capacity]` that `mask_function` means, None where it is plainly causal."""
        plain = mask_function is causal_mask_function
        whole_window = local_size is not None and local_size >= kwargs["kv_length"]
        if self.both_ways is None and (plain or (whole_window and kwargs.get("allow_is_causal_skip", True))):
            return None
        return self._expand(mask_function, **kwargs)

    def additive_mask(self, mask: torch.Tensor | None, query_length: Any, capacity: int) -> torch.Tensor:
        """`mask` (None for plainly causal) as float32 `[S, capacity]` to add to the scores, made once per call."""
        if id(mask) not in self._additive:
            allowed = mask
            if allowed is None:
                allowed = self._expand(
                    causal_mask_function, batch_size=1, q_length=query_length, kv_length=capacity, q_offset=self.start
                )
            # The smallest float and not -inf: a block of keys that is masked as a whole would give NaN in the fused
            # operator's running softmax. The mask stands beside its float form so that its id is not used again.
            closed = torch.finfo(torch.float32).min
            self._additive[id(mask)] = torch.where(allowed[0, 0], 0.0, closed), allowed
        return self._additive[id(mask)][0]

    def _expand(self, mask_function: Callable, **kwargs: Any) -> torch.Tensor:
        if self.both_ways is not None:
            start, end, open_ = self.start, self.start + kwargs["q_length"], self.both_ways.bool()
            mask_function = or_masks(mask_function, lambda batch, head, q, kv: (kv >= start) & (kv < end) & open_)
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "local_size": None}
        mask = sdpa_mask(mask_function=mask_function, **kwargs)
        assert mask is not None
        return mask


def attend(
    cache: BufferCache,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query [1, heads, S, width]` over the state; returns `[1, S, heads, width]`."""
    scaling = float(query.shape[-1] ** -0.5) if scaling is None else scaling
    buffers = cache.buffers_of(key, value)
    if softcap is None and s_aux is None and buffers is not None and buffers[0].shape == buffers[1].shape:
        states, mask = query.transpose(1, 2).contiguous(), None
        if attention_mask is not None:
            mask = cache.additive_mask(attention_mask, query.shape[2], key.shape[2])

        def fused(states: torch.Tensor, keys: Any, values: Any, start: Any, mask: Any = None) -> torch.Tensor:
            return torch.ops.llama.custom_sdpa(states, keys, values, start, mask, 0.0, mask is None, scaling)

        if lengths_for(*buffers[0].shape[1:3]):
            return cache.prefixes.attend(states, buffers, mask, scaling, fused), None
        return fused(states, *buffers, cache.start, mask), None
    mask = cache.additive_mask(attention_mask, query.shape[2], key.shape[2])
    return _plain_attention(query, key, value, mask, scaling, softcap, s_aux), None


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The textbook formula over the whole state, for what the fused operator lacks (softcap, sinks, uneven widths)."""
    groups, length, capacity = key.shape[1], query.shape[2], key.shape[2]
    # The query heads of one key head become rows of one product, so that keys and values are never repeated.
    rows = (query * scaling).reshape(groups, -1, query.shape[3])
    scores = torch.bmm(rows, key[0].transpose(1, 2)).view(groups, -1, length, capacity)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(groups, -1, 1, 1).expand(-1, -1, length, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :capacity]
    result = torch.bmm(weights.reshape(groups, -1, capacity), value[0])
    result = result.view(groups, -1, length, value.shape[3]).flatten(0, 1)
    return result.transpose(0, 1)[None].contiguous()


def check_attention_call(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    """UnsupportedModelError when a layer asks attention for something that `attend` doesn't do."""
    known = _WITHOUT_EFFECT | {"scaling", "softcap", "s_aux", "dropout", "is_causal"}
    for name, value in kwargs.items():
        if name not in known and value is not None:
            raise UnsupportedModelError(
                f"language_model: layer {_layer(module)} calls attention with `{name}`, which the xnnpack backend does "
                f"not implement (it knows {', '.join(sorted(known - _WITHOUT_EFFECT))}): build for another backend, "
                "for instance cpu"
            )
    if kwargs.get("dropout"):
        raise UnsupportedModelError(
            f"language_model: layer {_layer(module)} applies dropout {kwargs['dropout']}: call model.eval() first"
        )


def _layer(module: torch.nn.Module) -> Any:
    return getattr(module, "layer_idx", type(module).__name__)


@contextmanager
def stateful_attention(
    model: PreTrainedModel, attention: Callable[..., Any], mask: Callable[..., Any], *, flash: bool = False
) -> Iterator[None]:
    """Send the attention and the masks of `model` to the two functions; everything is as before on leaving.

    flash: under a name that models take for a flash attention, which gets packed sequences undivided.

    Raises UnsupportedModelError when the model's attention can't be replaced.
    """
    before, name = str(model.config._attn_implementation), FLASH_IMPLEMENTATION if flash else IMPLEMENTATION
    registries = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    for registry, function in zip(registries, (attention, mask), strict=True):
        registry.register(name, function)
    try:
        _set_attention(model, name)
        if model.config._attn_implementation != name:
            raise UnsupportedModelError(
                f"language_model: the attention of {type(model).__name__} can't be replaced (it does not go through "
                "transformers' AttentionInterface), which the xnnpack backend needs: build for another backend, for "
                "instance cpu"
            )
        yield
    finally:
        _set_attention(model, before)
        for registry in registries:
            registry._global_mapping.pop(name, None)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    if FLASH_IMPLEMENTATION in (name, model.config._attn_implementation):
        # set_attn_implementation would look for a kernel library of that name.
        model.config._attn_implementation = name
        return
    # It warns where it can't, which the caller finds out itself.
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        model.set_attn_implementation(name)
    finally:
        logger.setLevel(level)
