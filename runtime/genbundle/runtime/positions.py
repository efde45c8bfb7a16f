"""Position rules: what position ids a prompt gets. A step continues each row from its last position.

Each rule is `rule(inputs, options) -> int64 array` over generation inputs as numpy arrays (`input_ids`,
`attention_mask`, both `[batch, length]`, and whatever else it names); the builder checks a rule against the model's own
positions before it writes the rule's name into the manifest.
"""

import itertools
from collections.abc import Callable, Iterator
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

    Row 0 counts tokens as `cumsum` does; with the option `axes` 3 it isn't there. The others (time, height, width)
    count text tokens alike and give a picture's tokens its patch grid, after which text goes on from the largest
    position: the numbering of https://arxiv.org/abs/2409.12191, section 2.1. `mm_token_type_ids` marks text
    0, pictures 1; with the option `image_token_id` pictures are this token instead. Padding gets the option `padding`
    (0) there. Without pictures all rows are row 0.
    """
    counted = cumsum(inputs, options)
    kinds = _kinds(inputs, options)
    if kinds is None:
        axes = np.broadcast_to(counted, (3, *counted.shape))
        return axes if options.get("axes") == 3 else np.broadcast_to(counted, (4, *counted.shape))
    return _mrope(inputs, options, kinds, {1: ((grid, 1.0) for grid in inputs["image_grid_thw"])}, counted)


def mrope_clips(inputs: Inputs, options: dict[str, Any]) -> np.ndarray:
    """As `mrope` (without its `image_token_id`), beside pictures also clips: `mm_token_type_ids` 2, `video_grid_thw`.

    With the option `apart` each frame of a clip is a picture by itself. With `tokens_per_second` a clip's times are
    that and its `second_per_grid_ts` (1 where not given) times as large, in float32, fractions cut off.
    """
    counted, kinds = cumsum(inputs, options), inputs.get("mm_token_type_ids")
    clips = inputs.get("video_grid_thw")
    if kinds is None or clips is None:
        return mrope(inputs, options)
    seconds = inputs.get("second_per_grid_ts", np.ones(len(clips))).astype(np.float32)
    paces = np.float32(options["tokens_per_second"]) * seconds if "tokens_per_second" in options else seconds * 0 + 1
    if not np.isfinite(paces).all():
        raise ValueError(f"second_per_grid_ts: expected numbers, got {seconds.tolist()}")
    times = np.maximum(clips[:, 0], 0)
    if options.get("apart"):
        paces, clips = np.repeat(paces, times), np.repeat(clips, times, axis=0)
        clips[:, 0] = 1
    pictures = ((grid, 1.0) for grid in inputs.get("image_grid_thw", ()))
    return _mrope(inputs, options, kinds, {1: pictures, 2: zip(clips, paces, strict=True)}, counted)


def _mrope(
    inputs: Inputs, options: dict[str, Any], kinds: np.ndarray, grids: dict[int, Iterator[Any]], counted: np.ndarray
) -> np.ndarray:
    """The axes of `mrope` for `kinds` of tokens, whose grids and paces of time `grids` holds in order."""
    merge = int(options["spatial_merge_size"])
    mask = inputs["attention_mask"].astype(bool)
    axes = np.full((3, *kinds.shape), options.get("padding", 0), np.int64)
    for row in range(len(kinds)):
        pieces, position = [], 0
        for kind, start, end in _runs(kinds[row][mask[row]]):
            if kind == 0:
                pieces.append(np.broadcast_to(np.arange(end - start) + position, (3, end - start)))
                position += end - start
                continue
            if kind not in grids:
                raise ValueError(f"mm_token_type_ids {kind} has no position rule")
            while start < end:  # pictures side by side
                grid, pace = next(grids[kind])
                time, height, width = (int(size) for size in grid)
                height, width = height // merge, width // merge
                start += time * height * width
                if start > end:
                    raise ValueError(f"a grid of {time} x {height} x {width} tokens, {start - end} too many")
                places = np.indices((time, height, width)).reshape(3, -1)
                if pace != 1:
                    places[0] = (places[0].astype(np.float32) * np.float32(pace)).astype(np.int64)
                pieces.append(places + position)
                position += max(height, width)
        axes[:, row, mask[row]] = np.concatenate(pieces, 1)
    return axes if options.get("axes") == 3 else np.concatenate([counted[None], axes])


def mrope_in_place(inputs: Inputs, options: dict[str, Any]) -> np.ndarray:
    """Positions over `axes` rows of multimodal rotary positions, pictures counted as text: `[axes, batch, length]`.

    All rows count tokens as `cumsum` does, but a picture's tokens have their column, their row and the picture's number
    in the last three. A picture has one more column than its patch grid, and may have a token before it and one after.
    """
    counted, kinds = cumsum(inputs, options), _kinds(inputs, options)
    rows = np.array(np.broadcast_to(counted, (int(options["axes"]), *counted.shape)))
    if kinds is None:
        return rows
    merge, number = int(options["spatial_merge_size"]), 0
    mask = inputs["attention_mask"].astype(bool)
    for row in range(len(kinds)):
        places = np.flatnonzero(mask[row])
        for kind, start, end in _runs(kinds[row][mask[row]]):
            if kind == 0:
                continue
            if kind != 1:
                raise ValueError(f"mm_token_type_ids {kind} has no position rule")
            _, height, width = (int(size) // merge for size in inputs["image_grid_thw"][number])
            grid = np.indices((height, width + 1)).reshape(2, -1)
            spare = end - start - grid.shape[1]
            if spare not in (0, 2):
                raise ValueError(f"a picture of {end - start} tokens, its patch grid says {grid.shape[1]}")
            here = places[start + spare // 2 : end - spare // 2]
            rows[-3, row, here], rows[-2, row, here], rows[-1, row, here] = grid[1], grid[0], number
            number += 1
    return rows


def _kinds(inputs: Inputs, options: dict[str, Any]) -> np.ndarray | None:
    """Text 0 and pictures 1, `[batch, length]`; None without pictures."""
    if "image_grid_thw" not in inputs:
        return None
    if "image_token_id" in options:
        return (inputs["input_ids"] == int(options["image_token_id"])).astype(np.int64)
    return inputs.get("mm_token_type_ids")


def _runs(kinds: np.ndarray) -> list[tuple[int, int, int]]:
    """Kind, beginning and end of each run of one kind."""
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    return [(int(kinds[start]), start, end) for start, end in itertools.pairwise(edges) if end > start]


POSITION_RULES: dict[str, Callable[[Inputs, dict[str, Any]], np.ndarray]] = {
    "cumsum": cumsum,
    "arange": arange,
    "mrope": mrope,
    "mrope_clips": mrope_clips,
    "mrope_in_place": mrope_in_place,
}

# The generation inputs, besides text, that a rule reads where they are given.
POSITION_INPUTS: dict[str, tuple[str, ...]] = {
    "mrope": ("mm_token_type_ids", "image_grid_thw"),
    "mrope_clips": ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts"),
    "mrope_in_place": ("mm_token_type_ids", "image_grid_thw"),
}


def position_ids(rule: str, inputs: Inputs, options: dict[str, Any]) -> np.ndarray:
    """A prompt's position ids by `rule`, counted from the option `start` (0)."""
    return POSITION_RULES[rule](inputs, options) + np.int64(options.get("start", 0))
