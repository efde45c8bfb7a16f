"""Models whose cache keeps a window of tokens while their mask shows all: a prompt sees all, a step the window."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from genbundle.builder.cut import attribute
from genbundle.builder.exporting import MODEL_ERRORS
from genbundle.builder.layers import whole_windows

_MASK = "create_causal_mask"
_PROBED = 8  # the window that eager is looked at with: whether a mask has it doesn't depend on how long it is


def cut_window(model: PreTrainedModel, layers: Sequence[Any]) -> int | None:
    """The window of a model whose steps see no more than its cache keeps, though its mask shows them all tokens.

    layers: those of a captured cache. Programs keep every token, since the length decides what is cut off, and leave
    windows to the mask: this one is then `seen_from`'s. None where the model's own mask says all.
    """
    windows = {layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None for layer in layers}
    window = windows.pop() if len(windows) == 1 else None
    config = model.config.get_text_config(decoder=True)
    if window is None or window < 2 or not hasattr(_code(model), _MASK):
        return None
    if getattr(config, "sliding_window", None) != window:
        return None
    probed = min(window, _PROBED)
    try:
        with attribute(config, "sliding_window", probed):
            own, whole = _step(model, probed), _step(model, probed, whole=True)
            if torch.allclose(own, whole, rtol=1e-4, atol=1e-5):
                return None
            with seen_from(model, probed):
                found = _step(model, probed, whole=True)
    except MODEL_ERRORS:
        return None
    return window if torch.allclose(own, found, rtol=1e-4, atol=1e-5) else None


@contextmanager
def seen_from(model: PreTrainedModel, window: int) -> Iterator[None]:
    """Inside the block, the model's mask hides the tokens that a cache of `window` has dropped before the call."""
    code = _code(model)
    original = getattr(code, _MASK)

    def create(*args: Any, **kwargs: Any) -> Any:
        mask, past = original(*args, **kwargs), kwargs.get("past_key_values")
        before = 0 if past is None else past.get_seq_length()
        if isinstance(before, int) and before == 0:
            return mask
        if mask is None:  # one new token sees everything
            mask = torch.ones(1, 1, 1, before + 1, dtype=torch.bool)
        hidden = torch.arange(mask.shape[-1], device=mask.device) < before - (window - 1)
        return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)

    with attribute(code, _MASK, create):
        yield


def _code(model: PreTrainedModel) -> Any:
    """The module of Python code that the model's text decoder is written in."""
    return sys.modules[type(model.get_decoder() or model).__module__]


def _step(model: PreTrainedModel, window: int, *, whole: bool = False) -> torch.Tensor:
    """The logits of a step behind a prompt that is longer than the window; `whole`: of a cache that keeps all of it."""
    ids = torch.arange(window + 3)[None] % model.config.get_text_config(decoder=True).vocab_size
    with torch.no_grad(), whole_windows() if whole else nullcontext():
        past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        return model(input_ids=ids[:, -1:], past_key_values=past, use_cache=True).logits
