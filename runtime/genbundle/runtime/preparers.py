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

    cu_seqlens: int32, where each frame's patches begin and end, or each clip's with `merge_temporal`. position_ids:
    `[patches, 2]`, row and column in the order of the merge blocks; with `include_temporal` `[patches, 3]`, the frame
    first. interp_indices, interp_weights: `[patches, taps]` into a square table of learned positions, 4 taps for
    `mode` "bilinear" (the default) and 16 for "bicubic"; `padding` "zeros" gives taps beyond it no weight. The option
    `spatial_merge_size` may be the name of an input with one number per picture. After transformers' vision_utils.py.
    """
    grids = inputs[options["inputs"][0]].astype(np.int64)
    merge = options["spatial_merge_size"]
    merges = inputs[merge].astype(np.int64).reshape(-1) if isinstance(merge, str) else np.full(len(grids), int(merge))
    _check_grids(grids, merges[:, None])
    sizes, frames = grids[:, 1] * grids[:, 2], grids[:, 0]
    lengths = sizes * frames if options.get("merge_temporal") else np.repeat(sizes, frames)
    result = {"cu_seqlens": np.concatenate([[0], lengths.cumsum()])}
    positions = np.concatenate(
        [_merge_order(grid, factor) for grid, factor in zip(grids.tolist(), merges.tolist(), strict=True)]
    )
    result["position_ids"] = positions if options.get("include_temporal") else positions[:, 1:]
    side = int(options.get("num_grid_per_side", 0))
    if side:
        counts = grids.prod(axis=1)
        taps = []
        for axis in (1, 2):
            size = np.repeat(grids[:, axis], counts)
            taps.append(_taps(positions[:, axis], size, side, options))
        (rows, row_weights), (columns, column_weights) = taps
        count = rows.shape[1] ** 2
        result["interp_indices"] = (rows[:, :, None] * side + columns[:, None, :]).reshape(-1, count)
        result["interp_weights"] = (row_weights[:, :, None] * column_weights[:, None, :]).reshape(-1, count)
    return result


def vision_windows(inputs: Inputs, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The order in which a tower with windowed attention takes its merge blocks, and where windows begin and end.

    window_index: `[blocks]`. cu_window_seqlens: int32, in patches. After transformers' `get_vision_window_index`.
    """
    grids = inputs[options["inputs"][0]].astype(np.int64)
    merge = int(options["spatial_merge_size"])
    _check_grids(grids, merge)
    window = int(options["window_size"]) // merge // int(options["patch_size"])
    order, lengths, start = [], [], 0
    for time, height, width in grids.tolist():
        rows, columns = height // merge, width // merge
        index = np.arange(start, start + time * rows * columns).reshape(time, rows, columns)
        for frame in index:
            for top in range(0, rows, window):
                for left in range(0, columns, window):
                    block = frame[top : top + window, left : left + window].ravel()
                    order.append(block)
                    lengths.append(len(block) * merge * merge)
        start += index.size
    return {
        "window_index": np.concatenate(order),
        "cu_window_seqlens": np.concatenate([[0], np.cumsum(lengths)]),
    }


def vision_blocks(inputs: Inputs, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """How patches in rows come together in merge blocks of `merge` (height, width) patches.

    pixel_shuffle_index: `[patches]`, block after block. temporal_merge_index: `[blocks, frames, patches of a block]`, a
    clip's frames side by side; clips of one length only. frame_index: `[patches]`, a clip's frames from 1 on, pictures
    0.
    """
    grids = inputs[options["inputs"][0]].astype(np.int64)
    high, wide = (int(size) for size in options["merge"])
    _check_grids(grids, np.array([high, wide]))
    shuffled, merged, frames, start = [], [], [], 0
    for time, height, width in grids.tolist():
        index = np.arange(start, start + time * height * width)
        blocks = index.reshape(time, height // high, high, width // wide, wide).transpose(0, 1, 3, 2, 4)
        shuffled.append(blocks.ravel())
        merged.append(np.moveaxis(blocks.reshape(time, -1, high * wide), 0, 1))
        frames.append(np.repeat(np.arange(time) + (time > 1), height * width))
        start += index.size
    result = {"pixel_shuffle_index": np.concatenate(shuffled), "frame_index": np.concatenate(frames)}
    if len(set(grids[:, 0].tolist())) == 1:
        result["temporal_merge_index"] = np.concatenate(merged)
    return result


def vision_pairs(inputs: Inputs, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Which merge blocks of two frames come together: a clip's even frame and the odd one after, a picture's twice.

    paired_rows: `[2 * blocks]`, the two blocks of each.
    """
    grids = inputs[options["inputs"][0]].astype(np.int64)
    merge = int(options["spatial_merge_size"])
    _check_grids(grids, merge)
    pairs, start = [], 0
    for time, height, width in grids.tolist():
        frames = np.arange(start, start + time * height * width // merge**2).reshape(time, -1)
        even, odd = frames[::2], frames[1::2] if time > 1 else frames
        pairs.append(np.stack([even[: len(odd)], odd], -1).reshape(-1, 2))
        start += frames.size
    return {"paired_rows": np.concatenate(pairs).ravel()}


def image_tiles(inputs: Inputs, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Pictures cut into an overview and tiles of any resolution, and the order in which their features are read.

    Inputs: the tiles `[pictures, n, channels, height, width]`, padded to one number, and the pictures' own sizes.
    Options: `pinpoints`, the sizes that pictures are fitted into; `tile`, a tile's side; `patches`, its features a
    side; `most`, more tiles than which would be resampled. pixel_values: `[tiles, ...]` without padding. image_rows:
    `[features]`, each overview, then the tiles' rows without the fitting's borders, a line's end after each: the number
    behind the last feature.
    """
    pixels, sizes = (inputs[name] for name in options["inputs"])
    tile, side = int(options["tile"]), int(options["patches"])
    kept, orders, start = [], [], 0
    if pixels.ndim != 5 or len(pixels) != len(sizes):
        raise ValueError(f"tiles [pictures, n, channels, height, width] of {len(sizes)} pictures, got {pixels.shape}")
    for picture, (height, width) in zip(pixels, sizes.tolist(), strict=True):
        high, wide = (size // tile for size in _best_size((height, width), options["pinpoints"]))
        count = 1 + high * wide
        if len(picture) < count:
            raise ValueError(f"a picture of {height} x {width} has {count} tiles, {len(picture)} were given")
        kept.append(picture[:count])
        overview = np.arange(start, start + side * side)
        grid = np.arange(side * side, count * side * side).reshape(high, wide, side, side) + start
        grid = _without_border(grid.transpose(0, 2, 1, 3).reshape(high * side, wide * side), height, width)
        if options.get("most") and (grid.size / (int(options["most"]) * side * side)) ** 0.5 > 1.1:
            raise ValueError(f"a picture of {height} x {width} has more than {options['most']} tiles")
        orders.append((overview, grid))
        start += count * side * side
    rows = []
    for overview, grid in orders:
        rows += [overview, np.concatenate([grid, np.full((len(grid), 1), start)], 1).ravel()]
    return {"pixel_values": np.concatenate(kept), "image_rows": np.concatenate(rows)}


def _best_size(size: tuple[int, int], pinpoints: list[list[int]]) -> tuple[int, int]:
    """The one of `pinpoints` that a picture fits into with most of its pixels, and least unused."""
    height, width = size

    def fit(high: int, wide: int) -> tuple[int, int]:
        scale = min(wide / width, high / height)
        used = min(int(width * scale) * int(height * scale), height * width)
        return used, used - high * wide

    high, wide = max(pinpoints, key=lambda pinpoint: fit(*pinpoint))
    return int(high), int(wide)


def _without_border(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """The part of a fitted picture's features that isn't border."""
    rows, columns = grid.shape
    if width / height > columns / rows:
        border = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[border : rows - border]
    border = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, border : columns - border]


def kept_rows(inputs: Inputs, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The rows `[pictures, rows, ...]` that are no padding, counted through all pictures: where no number is -1."""
    places = inputs[options["inputs"][0]]
    return {"image_rows": np.flatnonzero((places != -1).reshape(*places.shape[:2], -1).all(-1))}


def _check_grids(grids: np.ndarray, merge: Any) -> None:
    if (grids < 1).any() or (grids[:, 1:] % merge).any():
        factors = np.ravel(merge).tolist()
        raise ValueError(f"patch grids of at least 1, sides that are multiples of {factors}, got {grids.tolist()}")


def _merge_order(grid: list[int], merge: int) -> np.ndarray:
    """Frame, row and column of every patch `[patches, 3]`, block after block of `merge` x `merge` patches."""
    time, height, width = grid
    places = np.moveaxis(np.indices((time, height, width)), 0, -1)
    blocks = places.reshape(time, height // merge, merge, width // merge, merge, 3).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(-1, 3)


def _taps(index: np.ndarray, size: np.ndarray, side: int, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The table rows that each index of an axis of `size` is made of, and their weights, in float32 as torch."""
    place = index.astype(np.float32)
    if options["align_corners"]:
        source = place * np.float32(side - 1) / np.maximum(size - 1, 1).astype(np.float32)
    else:
        source = (place + np.float32(0.5)) * np.float32(side) / size.astype(np.float32) - np.float32(0.5)
    floor = np.floor(source)
    bicubic = options.get("mode", "bilinear") == "bicubic"
    offsets = np.arange(-1, 3) if bicubic else np.arange(2)
    raw = floor.astype(np.int64)[:, None] + offsets
    taps = np.clip(raw, 0, side - 1)
    distance = np.abs(source[:, None] - floor[:, None] - offsets.astype(np.float32))
    if bicubic:
        # Keys' kernel with a = -0.75.
        a = np.float32(-0.75)
        near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weights = np.where(distance <= 1, near, far)
    else:
        weights = np.maximum(1 - distance, 0)
    if options.get("padding") == "zeros":
        weights = weights * ((raw >= 0) & (raw <= side - 1))
    return taps, weights.astype(np.float32)


PREPARERS: dict[str, Callable[[Inputs, dict[str, Any]], dict[str, np.ndarray]]] = {
    "real_images": real_images,
    "vision_grid": vision_grid,
    "vision_windows": vision_windows,
    "vision_blocks": vision_blocks,
    "vision_pairs": vision_pairs,
    "image_tiles": image_tiles,
    "kept_rows": kept_rows,
}
