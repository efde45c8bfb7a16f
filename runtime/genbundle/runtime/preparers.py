"""Integer bookkeeping that stays outside the graphs: one numpy function per upstream preparer, named in the manifest.

Each is `prepare(inputs, options) -> {output: array}` over generation inputs as numpy arrays; the builder compares it
with what the model was really called with before it writes the preparer's name into the manifest.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Inputs = dict[str, np.ndarray]


def real_images(inputs: Inputs, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Pictures of all prompts as one batch: `[batch, n, channels, height, width]` without the all-zero padding ones."""
    pixels = inputs[options["inputs"][0]]
    pixels = pixels.reshape(-1, *pixels.shape[-3:])
    return {"pixel_values": pixels[~(pixels == 0).all(axis=(1, 2, 3))]}


def vision_grid(inputs: Inputs, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """What a packed vision tower needs to know of its patch grids `[pictures, 3]` (time, height, width).

    cu_seqlens: int32, where each frame's patches begin and end. position_ids: `[patches, 2]`, row and column in the
    order of the merge blocks. interp_indices, interp_weights: `[patches, 4]`, the bilinear taps into a square table of
    learned positions. After transformers' vision_utils.py.
    """
    grids = inputs[options["inputs"][0]].astype(np.int64)
    merge = int(options["spatial_merge_size"])
    if (grids < 1).any() or (grids[:, 1:] % merge).any():
        raise ValueError(f"patch grids of at least 1, heights and widths multiples of {merge}, got {grids.tolist()}")
    frames = np.repeat(grids[:, 1] * grids[:, 2], grids[:, 0])
    result = {"cu_seqlens": np.concatenate([[0], frames.cumsum()])}
    positions = np.concatenate([_merge_order(time, height, width, merge) for time, height, width in grids.tolist()])
    result["position_ids"] = positions
    side = int(options.get("num_grid_per_side", 0))
    if side:
        counts = grids.prod(axis=1)
        heights, widths = np.repeat(grids[:, 1], counts), np.repeat(grids[:, 2], counts)
        align = bool(options["align_corners"])
        rows, row_weights = _taps(positions[:, 0], heights, side, align)
        columns, column_weights = _taps(positions[:, 1], widths, side, align)
        result["interp_indices"] = (rows[:, :, None] * side + columns[:, None, :]).reshape(-1, 4)
        result["interp_weights"] = (row_weights[:, :, None] * column_weights[:, None, :]).reshape(-1, 4)
    return result


def _merge_order(time: int, height: int, width: int, merge: int) -> np.ndarray:
    """Row and column of every patch `[time * height * width, 2]`, block after block of `merge` x `merge` patches."""
    grid = np.moveaxis(np.indices((height, width)), 0, -1)
    blocks = grid.reshape(height // merge, merge, width // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    return np.tile(blocks.reshape(-1, 2), (time, 1))


def _taps(index: np.ndarray, size: np.ndarray, side: int, align_corners: bool) -> tuple[np.ndarray, np.ndarray]:
    """The two table rows that each index of an axis of `size` lies between, and their weights, in float32 as torch."""
    place = index.astype(np.float32)
    if align_corners:
        source = place * np.float32(side - 1) / np.maximum(size - 1, 1).astype(np.float32)
    else:
        source = (place + np.float32(0.5)) * np.float32(side) / size.astype(np.float32) - np.float32(0.5)
    floor = np.floor(source)
    offsets = np.arange(2)
    taps = np.clip(floor.astype(np.int64)[:, None] + offsets, 0, side - 1)
    distance = np.abs(source[:, None] - floor[:, None] - offsets.astype(np.float32))
    return taps, np.maximum(1 - distance, 0).astype(np.float32)


PREPARERS: dict[str, Callable[[Inputs, dict[str, Any]], dict[str, np.ndarray]]] = {
    "real_images": real_images,
    "vision_grid": vision_grid,
}
