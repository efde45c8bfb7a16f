"""Attention for export: the model's own code calls ours through transformers' attention registry.

Three kinds of key-value cache layer stand in for the model's own. `PastLayer` appends, as a growing cache does, and
serves any attention. `BufferLayer` writes into buffers with room and serves any, too. `FusedLayer` leaves past and new
apart, for ONNX Runtime's GroupQueryAttention, which appends by itself and reads grouped heads without repeating them.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genbundle.bundles import UnsupportedModelError

_NAME = "genbundle"
# What eager attention functions take that changes nothing at inference.
_KNOWN = {"scaling", "softcap", "sliding_window"}
_IGNORED = {"dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
            "is_causal", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}  # fmt: skip


class PastLayer(DynamicLayer):
    """A growing layer that starts from given keys and values, `[batch, heads, past, head_dim]`."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.dtype, self.device = keys, values, keys.dtype, keys.device
        self.is_initialized = True

    def present(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values including the new tokens'."""
        return self.keys, self.values


class BufferLayer(PastLayer):
    """A layer whose keys and values are buffers with room; `start` `[1]` tokens came before, which no shape says."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, start: torch.Tensor):
        super().__init__(keys, values)
        self.start = start

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole buffers with the new tokens' part written."""
        places = self.start + torch.arange(key_states.shape[-2], device=self.start.device)
        self.keys, self.values = _written(self.keys, places, key_states), _written(self.values, places, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: Any) -> tuple[Any, int]:
        """The whole buffer, from position 0."""
        return self.keys.shape[-2], 0

    def get_seq_length(self) -> Any:
        """How many tokens came before, as a number inside the program."""
        return self.start[0]


def _written(buffer: torch.Tensor, places: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return buffer.scatter(2, places[None, None, :, None].expand(new.shape), new)


class FusedLayer(PastLayer):
    """A layer whose new keys and values go to the attention as they are; the attention returns the present.

    past: how many tokens keys and values hold where they are buffers with room for more, into which the attention
    writes the new ones; None where they hold the past alone.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, past: Any = None):
        super().__init__(keys, values)
        self.in_place, self.past = past is not None, keys.shape[-2] if past is None else past
        self.updated: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values alone."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: Any) -> tuple[Any, int]:
        """Past and new tokens, from position 0."""
        length = query_length if isinstance(query_length, int | torch.SymInt) else query_length.shape[0]
        return self.past + length, 0

    def get_seq_length(self) -> Any:
        """How many tokens came before."""
        return self.past

    def present(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the attention returned; UnsupportedModelError if it never ran for this layer."""
        if self.updated is None:
            raise UnsupportedModelError("a layer updates its cache without calling the attention registry")
        return self.updated


def make_cache(layers: list[Any]) -> DynamicCache:
    """A cache over `layers`; sliding-window layers keep their whole past, the model's mask does the windowing."""
    cache: Any = DynamicCache()
    cache.layers = list(layers)
    return cache


def group_query_attention(cache: Callable[[], DynamicCache]) -> Callable:
    """An attention function that emits one com.microsoft GroupQueryAttention node per layer of `cache()`.

    The node masks causally by itself; the model's mask (padding, windows) goes in as the additive bias, so that every
    row's length is the whole length, exact whatever the padding. It takes several new tokens after a past for one
    sequence only. Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    """

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,  # in the mask
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        index: Any = getattr(module, "layer_idx", None)
        if index is None:  # no decoder layer, though of the same config: a projector with attention (Kosmos-2)
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        refuse_unknown(module, kwargs)
        layer: Any = cache().layers[int(index)]
        batch, heads, length, width = query.shape
        key_heads, total_length = key.shape[1], layer.past + length
        total = torch.scalar_tensor(0, dtype=torch.int32) + total_length
        total = total.to(torch.int32)
        attributes = {
            "num_heads": heads,
            "kv_num_heads": key_heads,
            "scale": float(scaling if scaling is not None else width**-0.5),
        }
        if softcap is not None:
            attributes["softcap"] = float(softcap)
        states = (batch, key_heads, layer.keys.shape[2] if layer.in_place else total_length, width)
        output, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            [_flat(query), _flat(key), _flat(value), layer.keys, layer.values,
             (total - 1).to(torch.int32).expand(batch), total, None, None, None, attention_mask],
            attributes,
            dtypes=[query.dtype] * 3,
            shapes=[(batch, length, heads * width), states, states],
            version=1,
        )  # fmt: skip
        layer.updated = tuple(present)
        return output.reshape(batch, length, heads, width), None

    return attend


def refuse_unknown(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    """UnsupportedModelError for an attention argument that would be dropped."""
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in _IGNORED)
    if unknown:
        raise UnsupportedModelError(f"{type(module).__name__} passes attention arguments not known here: {unknown}")


def _flat(states: torch.Tensor) -> torch.Tensor:
    batch, heads, length, width = states.shape
    return states.transpose(1, 2).reshape(batch, length, heads * width)


@contextlib.contextmanager
def attention(model: PreTrainedModel, attend: Callable | str | None) -> Iterator[None]:
    """Run `model`'s attention through `attend` inside the block: a function, the name of a registered one, or None for
    the model's own."""
    if attend is None:
        yield
        return
    before: Any = model.config._attn_implementation
    if callable(attend):
        # An item of the registry's instance can be taken out again. Masks are only looked for among the registered
        # ones (masking_utils.py, `_preprocess_mask_arguments`), where our name for the plain additive mask stays.
        ALL_ATTENTION_FUNCTIONS[_NAME] = attend
        AttentionMaskInterface.register(_NAME, eager_mask)
    try:
        model.set_attn_implementation(_NAME if callable(attend) else attend)
        yield
    finally:
        model.set_attn_implementation(before)
        if callable(attend):
            del ALL_ATTENTION_FUNCTIONS[_NAME]


@dataclass(frozen=True, kw_only=True)
class AttentionFacts:
    """How a model's layers call their attention: in order of the calls, the `(heads, width)` of their keys and values
    there, and what stands against fusing them."""

    layers: tuple[int, ...]
    states: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    obstacle: str | None


def observe_attention(model: PreTrainedModel, run: Callable[[], Any]) -> AttentionFacts:
    """Run `run` with `model`'s attention watched: which layers call it, and if GroupQueryAttention can stand in."""
    layers: list[int] = []
    states: list[tuple[tuple[int, int], tuple[int, int]]] = []
    obstacles: list[str] = []
    eager = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: torch.nn.Module, query, key, value, attention_mask, **kwargs):
        layers.append(getattr(module, "layer_idx", -1))
        states.append(((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3])))
        unknown = sorted(n for n, v in kwargs.items() if v is not None and n not in _IGNORED | _KNOWN)
        if unknown:
            obstacles.append(f"attention arguments {unknown}")
        if query.shape[-1] % 8 or key.shape[-1] != value.shape[-1]:
            obstacles.append(f"head sizes {query.shape[-1]} and {value.shape[-1]}")
        if attention_mask is not None and not _is_causal(attention_mask):
            obstacles.append("attention to later tokens")
        known = {name: value for name, value in kwargs.items() if name == "scaling"}
        return eager(module, query, key, value, attention_mask, **known)

    with attention(model, attend), torch.no_grad():
        run()
    obstacle = obstacles[0] if obstacles else None
    return AttentionFacts(layers=tuple(layers), states=tuple(states), obstacle=obstacle)


def _is_causal(mask: torch.Tensor) -> bool:
    """Whether an additive mask `[batch, 1, new, total]` forbids every later position."""
    new, total = mask.shape[-2:]
    later = torch.ones(new, total, dtype=torch.bool).triu(total - new + 1)
    return not bool((mask[..., later] > torch.finfo(mask.dtype).min).any())
