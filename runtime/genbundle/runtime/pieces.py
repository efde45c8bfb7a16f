"""Programs that take one picture (or frame) at a time: several are dealt out to several calls, the outputs joined.

The option `pieces` of an input's source says how that input is divided: "each" takes one row per call, the name of an
offsets input the rows between two of its numbers. A picture may go in at its own size: with `sizes`, the name of an
input of heights and widths, the rest is padding and cut off; with `mask` too, the name of the padding's mask, a picture
is rows of patches and goes in as `[height, width, ...]`; with `grid`, the name of an input of patch grids, a
frame's rows become `[height, width, merge * merge, ...]` in blocks of `merge` x `merge`. The inputs marked "offsets",
"sizes", "mask" and "grid" themselves go into no call. The option `equals` marks an input that goes into no call either:
its numbers must all be that one. So does `unread`, whose numbers may be any.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from genbundle.bundles import InputError
from genbundle.bundles.manifest import Input
from genbundle.bundles.manifest import Program as ProgramEntry
from genbundle.runtime.program import Buffers, Program, Tensor


def taken_inputs(entry: ProgramEntry) -> tuple[str, ...]:
    """The inputs that go into a call, in the manifest's order."""
    return tuple(
        item.name
        for item in entry.inputs
        if item.source.options.get("pieces") not in ("offsets", "sizes", "mask", "grid")
        and not item.source.options.keys() & {"equals", "unread"}
    )


def whole_shape(item: Input) -> tuple[int | str, ...]:
    """The shape of an input before it is divided between calls."""
    options = item.source.options
    if "grid" in options:
        return ("patches", *item.shape[3:])
    if "mask" in options:
        return ("pictures", "rows", *item.shape[2:])
    return ("pictures", *item.shape[1:]) if options.get("pieces") == "each" else item.shape


class Caller:
    """Calls a program once, or once per piece with the outputs joined along their first symbolic axis. What its entry
    says is looked up once."""

    def __init__(self, entry: ProgramEntry):
        buffers = {item.name for item in entry.buffers}
        self._entry, self._names = entry, tuple(name for name in taken_inputs(entry) if name not in buffers)
        options = {item.name: item.source.options for item in entry.inputs}
        self._fixed = {name: each["equals"] for name, each in options.items() if each.get("equals") is not None}
        self._divided = {name: each for name, each in options.items() if each.get("pieces")}

    def __call__(
        self,
        program: Program,
        inputs: Mapping[str, Tensor],
        to_numpy: Callable[[Tensor], np.ndarray],
        buffers: Buffers | None = None,
    ) -> dict[str, Tensor]:
        """The outputs; InputError where an input isn't the one number that the program was made for, or is larger than
        it takes."""
        entry = self._entry
        for name, fixed in self._fixed.items():
            if name in inputs and not (inputs[name] == fixed).all():
                raise InputError(f"{name}: this bundle takes prompts whose {name} is {fixed} throughout")
        if not self._divided:
            return program(_expect_sizes(entry, {name: inputs[name] for name in self._names}), buffers)
        results = [program(_expect_sizes(entry, part), buffers) for part in _parts(self._names, self._divided, inputs)]
        if not results:
            raise InputError(f"the inputs of {entry.name!r} hold no picture")
        if len(results) == 1:
            return results[0]
        axes = {out.name: next((i for i, n in enumerate(out.shape) if isinstance(n, str)), 0) for out in entry.outputs}
        return {name: np.concatenate([to_numpy(part[name]) for part in results], axis) for name, axis in axes.items()}


def _expect_sizes(entry: ProgramEntry, part: dict[str, Tensor]) -> dict[str, Tensor]:
    """`part`; InputError for what is larger than the program takes."""
    for item in entry.inputs if entry.largest else ():
        for axis, size in enumerate(item.shape if item.name in part else ()):
            most = entry.largest.get(size) if isinstance(size, str) else None
            if most is not None and part[item.name].shape[axis] > most:
                raise InputError(
                    f"{item.source.name or item.name}: {part[item.name].shape[axis]} along axis {axis}, the program "
                    f"{entry.name!r} takes at most {most}"
                )
    return part


def _parts(
    names: tuple[str, ...], divided: Mapping[str, Mapping[str, Any]], inputs: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    rows = [name for name in names if name in divided]
    by = divided[rows[0]]["pieces"]
    offsets = range(len(inputs[rows[0]]) + 1) if by == "each" else [int(offset) for offset in inputs[by]]
    if offsets[-1] != len(inputs[rows[0]]):
        raise InputError(f"{rows[0]} has {len(inputs[rows[0]])} rows, the pictures' grids have {offsets[-1]}")
    for index, (start, end) in enumerate(itertools.pairwise(offsets)):
        yield {
            name: _shaped(inputs[name][start:end], index, divided[name], inputs) if name in divided else inputs[name]
            for name in names
        }


def _shaped(part: Tensor, index: int, options: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> Tensor:
    """The `index`-th picture or frame at its own size, where the options say how that is known."""
    if "mask" in options:
        return _unpadded(part[0], index, options, inputs)
    if "sizes" in options:
        height, width = (int(size) for size in inputs[options["sizes"]][index])
        if not (0 < height <= part.shape[-2] and 0 < width <= part.shape[-1]):
            raise InputError(
                f"{options['sizes']}: {height} x {width} for a picture of {part.shape[-2]} x {part.shape[-1]}"
            )
        return np.ascontiguousarray(part[..., :height, :width])
    if "grid" in options:
        grid, merge = np.asarray(inputs[options["grid"]]), int(options["merge"])
        height, width = np.repeat(grid[:, 1:], grid[:, 0], axis=0)[index] // merge
        return part.reshape(int(height), int(width), merge * merge, *part.shape[1:])
    return part


def _unpadded(rows: Tensor, index: int, options: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> Tensor:
    """The `index`-th picture's patches by height and width, without the padding behind them."""
    (height, width), mask = (int(size) for size in inputs[options["sizes"]][index]), inputs[options["mask"]][index]
    if height < 1 or width < 1 or (mask.astype(bool) != (np.arange(len(rows)) < height * width)).any():
        raise InputError(
            f"{options['sizes']}: {height} x {width} patches, and {options['mask']} counts {int(mask.sum())} "
            f"of {len(rows)} rows"
        )
    return np.ascontiguousarray(rows[: height * width].reshape(height, width, *rows.shape[1:]))
