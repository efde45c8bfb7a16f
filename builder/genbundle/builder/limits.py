"""How long a bundle's sequences may get, and at which lengths the model begins to work otherwise."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from genbundle.builder.exporting import MODEL_ERRORS
from genbundle.bundles import BuildError

_XNNPACK_CAPACITY = 2048  # the cache is part of the program's memory, so it isn't the model's whole context


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Numbers of tokens, prompt and generated.

    capacity: the most that the bundle holds; None for any number. window: the fewest that a layer looks back on; None
    where every layer sees all. restart: where the model's loop drops its cache and runs the whole sequence again, since
    its positions are computed otherwise from there on; None for a model that doesn't.
    """

    capacity: int | None
    window: int | None
    restart: int | None

    def not_reached(self, longest: int) -> list[str]:
        """What a check of up to `longest` tokens says nothing about, in words."""
        found = []
        if self.window is not None and self.window > longest:
            found.append(f"the layers' window of {self.window}")
        if self.restart is not None and self.restart >= longest:
            found.append(f"the length of {self.restart} after which the model computes positions otherwise")
        return found


def limits_of(model: PreTrainedModel, backend: str, max_length: int | None) -> Limits:
    """The limits of a bundle of `model`; BuildError for a max_length beyond what the model's config allows."""
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    context = context if isinstance(context, int) and context > 0 else None
    if max_length is not None and context is not None and max_length > context:
        raise BuildError(
            f"max_length={max_length} is more than the {context} positions of the model's config: give at most "
            f"{context}, or raise max_position_embeddings there if the model can do more"
        )
    capacity = max_length or context
    if backend == "xnnpack" and max_length is None:
        capacity = min(capacity or _XNNPACK_CAPACITY, _XNNPACK_CAPACITY)
    return Limits(capacity=capacity, window=_smallest_window(config), restart=_restart(model, capacity))


def _smallest_window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None) or ()
    windows = [
        getattr(config, field, None)
        for field, kind in (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention"))
        if not kinds or kind in kinds
    ]
    return min((size for size in windows if isinstance(size, int) and size > 0), default=None)


class _Filled(DynamicCache):
    """A cache that says it holds `length` tokens."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def __bool__(self) -> bool:
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


def _restart(model: PreTrainedModel, capacity: int | None) -> int | None:
    """The number in the config after whose many tokens `prepare_inputs_for_generation` takes the cache no longer."""
    numbers = {number for number in _numbers(model.config.to_dict()) if 1 < number < (capacity or 2**20)}
    # One that never takes a cache in this form begins again at every length.
    found = (n for n in sorted(numbers) if _begins_again(model, n) and not _begins_again(model, n - 1))
    return next(found, None)


def _begins_again(model: Any, length: int) -> bool:
    ids = torch.arange(length + 1)[None]
    cache = _Filled(length)
    try:
        prepared = model.prepare_inputs_for_generation(
            ids, next_sequence_length=1, past_key_values=cache, attention_mask=torch.ones_like(ids), use_cache=True
        )
    except MODEL_ERRORS:
        return False  # a model that asks more of its cache than this one has
    given = prepared.get("input_ids")
    return prepared.get("past_key_values") is None and isinstance(given, torch.Tensor) and torch.equal(given, ids)


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value
