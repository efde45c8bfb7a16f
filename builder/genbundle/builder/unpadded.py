"""Encoders of pictures as rows of patches, padded to one number of rows, for one picture at its own size a call.

Their Python reads each picture's height and width, and cuts the padding off its features, picture by picture. For one
picture without padding, whose patches go in as `[height, width, ...]`, those numbers are sizes that a tracer knows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from genbundle.builder.components import Component, same_tensors
from genbundle.builder.exporting import MODEL_ERRORS
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Input, Source

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Names:
    """patches: `[pictures, rows, width]`. sizes: `[pictures, 2]`. mask: `[pictures, rows]`, ones before the padding."""

    patches: str
    sizes: str
    mask: str


class _Rows(list):
    """Numbers in rows, read like a tensor's, that a trace knows as sizes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a tensor of these numbers."""
        return (len(self), *(self[0].shape if self and isinstance(self[0], _Rows) else ()))

    def tolist(self) -> list:
        """The numbers."""
        return [item.tolist() if isinstance(item, _Rows) else item for item in self]


class _Counted(TorchFunctionMode):
    """The number of ones in a mask that holds nothing else is its size."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self._mask = mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "sum" and args[0] is self._mask:
            return _Rows([self._mask.shape[1]])
        return func(*args, **(kwargs or {}))


class Unpadded(torch.nn.Module):
    """`run(**inputs)` for the patches of one picture, `[height, width, ...]`, to its features by name."""

    def __init__(self, model: torch.nn.Module, run: Callable[..., Tensors], names: _Names, dtype: torch.dtype):
        super().__init__()
        self.model, self.config, self._run = model, getattr(model, "config", None), run
        self._names, self._dtype = names, dtype

    def forward(self, **inputs: torch.Tensor) -> Tensors:
        """The features of one picture."""
        names, (patches,) = self._names, inputs.values()
        height, width = patches.shape[:2]
        rows = patches.flatten(0, 1)[None]
        mask = torch.ones(rows.shape[:2], dtype=self._dtype)
        given: dict[str, Any] = {names.patches: rows, names.sizes: _Rows([_Rows([height, width])]), names.mask: mask}
        with _Counted(mask):
            return self._run(**given)


def unpadded_component(
    model: torch.nn.Module,
    modality: str,
    run: Callable[..., Tensors],
    given: Sequence[Tensors],
    wanted: Sequence[Tensors],
    why: UnsupportedModelError,
) -> Component:
    """The encoder as a program for one picture; raises `why` where its inputs aren't such rows or it gives others."""
    names = _named(given)
    if names is None:
        raise why
    module = Unpadded(model, run, names, given[0][names.mask].dtype).eval()
    pictures = [_pictures(inputs, names) for inputs in given]
    try:
        with torch.no_grad():
            for each, expected in zip(pictures, wanted, strict=True):
                found = [module(**picture) for picture in each]
                if not same_tensors({name: torch.cat([item[name] for item in found]) for name in expected}, expected):
                    raise why
    except MODEL_ERRORS as error:
        raise why from error
    sample, features = pictures[0][0], wanted[0]
    options = {"pieces": "each", "sizes": names.sizes, "mask": names.mask}
    return Component(
        name=f"{modality}_encoder",
        roles=("encoder", "projector"),
        modality=modality,
        module=module,
        sample=sample,
        axes={names.patches: {0: "height", 1: "width"}, **{name: {0: f"{name}_0"} for name in features}},
        sources={names.patches: Source(kind="user", name=names.patches, options=options)},
        guides={
            names.sizes: _guide(names.sizes, "sizes", ("pictures", 2)),
            names.mask: _guide(names.mask, "mask", ("pictures", "rows")),
        },
    )


def _named(given: Sequence[Tensors]) -> _Names | None:
    """Which of the inputs is which; None where they aren't rows of patches, sizes and a mask, in every sample."""
    rows = [name for name, value in given[0].items() if value.is_floating_point()]
    rest = [name for name in given[0] if name not in rows]
    sizes = [name for name in rest if given[0][name].shape[1:] == (2,)]
    masks = [name for name in rest if name not in sizes]
    if len(rows) != 1 or len(sizes) != 1 or len(masks) != 1 or given[0][rows[0]].dim() != 3:
        return None
    names = _Names(rows[0], sizes[0], masks[0])
    for inputs in given:
        mask = inputs[names.mask]
        if mask.shape != inputs[names.patches].shape[:2]:
            return None
        if not torch.equal(mask.bool(), torch.arange(mask.shape[1]) < inputs[names.sizes].prod(-1, keepdim=True)):
            return None
    return names


def _pictures(inputs: Tensors, names: _Names) -> list[Tensors]:
    """Each picture's patches by height and width."""
    pairs = zip(inputs[names.patches], inputs[names.sizes].tolist(), strict=True)
    return [{names.patches: rows[: height * width].reshape(height, width, -1)} for rows, (height, width) in pairs]


def _guide(name: str, pieces: str, shape: tuple[str | int, ...]) -> Input:
    return Input(
        name=name, dtype="int64", shape=shape, source=Source(kind="user", name=name, options={"pieces": pieces})
    )
