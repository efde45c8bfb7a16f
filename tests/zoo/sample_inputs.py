"""Generate kwargs for the tiny models: prompts, and what the classes want around pictures and sounds."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.zoo import sample_media
from tests.zoo.config_rules import PAD

Inputs = dict[str, torch.Tensor]
_CLEAR = 0.02  # of the logits' deviation, between the two best: no rounding crosses it
_TRIES = 8


def text_ids(length: int, seed: int) -> torch.Tensor:
    """`[1, length]` random ids that are no special token."""
    return torch.randint(10, 220, (1, length), generator=torch.Generator().manual_seed(seed))


def text(length: int, seed: int) -> Inputs:
    """A prompt of random tokens."""
    ids = text_ids(length, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def sample(model: PreTrainedModel, before: int, after: int, size: int, seed: int, *, clip: bool = False) -> Inputs:
    """One prompt: `before` and `after` tokens around a picture, clip or sound of the `size`-th size, or text alone."""
    name = type(model).__name__
    if name in sample_media.WHOLE:
        return sample_media.WHOLE[name](model, before + after, size, seed)
    media = sample_media.clip(model, size, seed) if clip else sample_media.media(model, size, seed)
    if media is None:
        return text(before + after, seed)
    if media.only:
        return media.inputs
    parts = [text_ids(before, seed)] if before else []
    parts += [torch.tensor([media.tokens], dtype=torch.long), text_ids(after, seed + 1000)]
    ids = torch.cat(parts, 1)
    result = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media.inputs}
    wanted = inspect.signature(model.forward).parameters
    if "mm_token_type_ids" in wanted:
        result["mm_token_type_ids"] = (ids == media.placeholder).int() * (2 if clip else 1)
    if "moe_mm_token_type_ids" in wanted:
        result["moe_mm_token_type_ids"] = (ids == media.placeholder).int()
    if "token_type_ids" in wanted:
        # PaliGemma's processor marks what is answered, Gemma's what is a picture.
        whole = name.startswith("PaliGemma")
        result["token_type_ids"] = torch.zeros_like(ids) if whole else (ids == media.placeholder).int()
    return sample_media.finished(model, result, media)


def batched(rows: list[Inputs], side: str) -> Inputs:
    """Single samples as one batch, prompts padded on `side`; other inputs joined along their first axis."""
    result: Inputs = {}
    first = rows[0].get("input_ids")
    longest = max(row["input_ids"].shape[1] for row in rows) if first is not None else 0
    for name in rows[0]:
        parts = []
        for row in rows:
            tensor = row[name]
            if first is not None and tensor.dim() > 1 and tensor.shape[:2] == row["input_ids"].shape:
                missing = longest - tensor.shape[1]
                room = (missing, 0) if side == "left" else (0, missing)
                room = (0, 0) * (tensor.dim() - 2) + room
                tensor = torch.nn.functional.pad(tensor, room, value=PAD if name == "input_ids" else 0)
            parts.append(tensor)
        result[name] = torch.cat(parts)
    return result


def variants(
    model: PreTrainedModel, margin: Callable[[PreTrainedModel, Inputs], float], *, clip: bool = False
) -> dict[str, list[Inputs]]:
    """Two samples to build from, and two or three that check; of several contents the first with a clear margin.

    `margin` generates and gives the smallest distance between the two best logits.
    """
    side = "right" if model.config.is_encoder_decoder else "left"

    def row(before: int, after: int, size: int, seed: int) -> Inputs:
        return sample(model, before, after, size, seed, clip=clip)

    makers: list[Callable[[int], Inputs]] = [lambda seed: row(9, 10, 2, seed)]
    if batches(model):
        makers.append(lambda seed: batched([row(2, 4, 0, seed), row(6, 7, 0, seed + 1)], side))
    check = [_clearest(model, maker, 100 * number, margin) for number, maker in enumerate(makers, 1)]
    if len(check) < 2:
        check.append(_clearest(model, lambda seed: row(3, 2, 0, seed), 700, margin))
    return {"build": [row(4, 5, 0, 1), row(6, 8, 1, 2)], "check": check}


def batches(model: PreTrainedModel) -> bool:
    """Whether eager takes a padded batch of this class."""
    return type(model).__name__ not in sample_media.SINGLE


def _clearest(
    model: PreTrainedModel, make: Callable[[int], Inputs], seed: int, margin: Callable[[PreTrainedModel, Inputs], Any]
) -> Inputs:
    best: tuple[float, Inputs] | None = None
    for attempt in range(_TRIES):
        inputs = make(seed + 10 * attempt)
        found = margin(model, inputs)
        if best is None or found > best[0]:
            best = found, inputs
        if found > _CLEAR:
            break
    assert best is not None
    return best[1]
