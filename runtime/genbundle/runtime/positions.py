"""Position rules: what position ids a prompt gets. A step continues each row from its last position.

Each rule is `rule(inputs, options) -> int64 array` over generation inputs as numpy arrays (`input_ids`,
`attention_mask`, both `[batch, length]`, and whatever else it names); the builder checks a rule against the model's own
positions before it writes the rule's name into the manifest.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Inputs = dict[str, np.ndarray]


def cumsum(inputs: Inputs, options: dict[str, Any]) -> np.ndarray:
    """Count the unpadded tokens from 0; padding gets 0. `[batch, length]`."""
    mask = inputs["attention_mask"].astype(np.int64)
    return np.where(mask == 0, 0, mask.cumsum(-1) - 1)


def arange(inputs: Inputs, options: dict[str, Any]) -> np.ndarray:
    """0, 1, 2 ... whatever the padding. `[batch, length]`."""
    batch, length = inputs["input_ids"].shape
    return np.broadcast_to(np.arange(length, dtype=np.int64), (batch, length))


def mrope(inputs: Inputs, options: dict[str, Any]) -> np.ndarray:
    """Text positions over the three axes of multimodal rotary positions: `[4, batch, length]`.

    Row 0 counts tokens as `cumsum` does. Rows 1 to 3 (time, height, width) count text tokens alike and give a picture's
    tokens its patch grid, after which text goes on from the largest position: the numbering of Qwen2-VL
    (https://arxiv.org/abs/2409.12191, section 2.1). `mm_token_type_ids` marks text 0, pictures 1. Without pictures all
    rows are row 0.
    """
    if "mm_token_type_ids" not in inputs or "image_grid_thw" not in inputs:
        return np.broadcast_to(cumsum(inputs, options), (4, *inputs["input_ids"].shape))
    ids, kinds, grids = inputs["input_ids"], inputs["mm_token_type_ids"], iter(inputs.get("image_grid_thw", ()))
    merge = int(options["spatial_merge_size"])
    mask = inputs["attention_mask"].astype(bool)
    axes = np.zeros((3, *ids.shape), np.int64)
    for row in range(ids.shape[0]):
        row_kinds, pieces, position, start = kinds[row][mask[row]], [], 0, 0
        while start < len(row_kinds):
            if row_kinds[start] == 0:
                end = start + 1
                while end < len(row_kinds) and row_kinds[end] == 0:
                    end += 1
                pieces.append(np.broadcast_to(np.arange(end - start) + position, (3, end - start)))
                position += end - start
            elif row_kinds[start] == 1:
                time, height, width = (int(size) for size in next(grids))
                height, width = height // merge, width // merge
                end = start + time * height * width
                pieces.append(np.indices((time, height, width)).reshape(3, -1) + position)
                position += max(height, width)
            else:
                raise ValueError(f"mm_token_type_ids {int(row_kinds[start])} has no position rule")
            start = end
        axes[:, row, mask[row]] = np.concatenate(pieces, 1)[:, : len(row_kinds)]
    return np.concatenate([cumsum(inputs, options)[None], axes])


POSITION_RULES: dict[str, Callable[[Inputs, dict[str, Any]], np.ndarray]] = {
    "cumsum": cumsum,
    "arange": arange,
    "mrope": mrope,
}

# The generation inputs, besides text, that a rule reads where they are given.
POSITION_INPUTS: dict[str, tuple[str, ...]] = {"mrope": ("mm_token_type_ids", "image_grid_thw")}


def position_ids(rule: str, inputs: Inputs, options: dict[str, Any]) -> np.ndarray:
    """A prompt's position ids by `rule`, counted from the option `start` (0)."""
    return POSITION_RULES[rule](inputs, options) + np.int64(options.get("start", 0))
