"""Branches on numbers that a tracer can't know and that change nothing, taken always.

`if mask.any():` before something that happens to the masked places alone, and loops over those experts that any token
chose: where there are no such places, doing it anyway does nothing. That is shown before, by running both.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from genbundle.builder.components import same_tensors
from genbundle.builder.cut import forward_of
from genbundle.builder.exporting import MODEL_ERRORS

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Way:
    """How branches are gone through: as the numbers say, or `taken`, each loop over all places but `spared` last ones.

    emptied: no mask that is asked for any place has one.
    """

    taken: bool = False
    spared: int = 0
    emptied: bool = False


class _Branches(TorchFunctionMode):
    """Goes through branches on `mask.any()`, loops over `hit.nonzero()` and counts of what `where` finds in a way."""

    def __init__(self, way: _Way):
        super().__init__()
        self.way, self.found = way, False
        self._asked: list[torch.Tensor] = []
        self._selected: list[torch.Tensor] = []
        self._hits: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch does, but for the branches."""
        name, alone = getattr(func, "__name__", ""), len(args) == 1 and not kwargs
        if self.way.emptied and alone and name == "any":
            args[0].zero_()
        if self.way.taken and name == "__format__" and args[0].numel() == 1:
            return format(args[0].item(), *args[1:])  # of an expert that a name is made for; a tracer's has another
        if name in ("__bool__", "unbind", "__iter__", "numel"):
            return self._through(name, lambda: func(*args, **(kwargs or {})), args[0])
        result = func(*args, **(kwargs or {}))
        if alone and name == "any":
            self._asked.append(result)
        elif alone and name == "where":
            self._selected.extend(result)
        elif name == "nonzero" and isinstance(result, torch.Tensor) and args[0].dim() == 1:
            self._hits.append((result, args[0].shape[0]))
        return result

    def _through(self, name: str, own: Callable[[], Any], tensor: torch.Tensor) -> Any:
        places = next((count for hits, count in self._hits if hits is tensor), None)
        asked = name == "__bool__" and any(tensor is item for item in self._asked)
        looped = name in ("unbind", "__iter__") and places is not None
        self.found = self.found or asked or looped
        if not self.way.taken:
            return own()
        if asked:
            return True
        if looped:
            every = tuple(torch.tensor([place]) for place in range((places or 0) - self.way.spared))
            return iter(every) if name == "__iter__" else every
        number = own()
        # Code that goes on where nothing is selected.
        return torch.sym_max(number, 1) if any(tensor is item for item in self._selected) else number


@contextmanager
def taken_branches(module: torch.nn.Module, sample: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, `module` takes its branches that change nothing where they aren't taken by themselves on `sample`."""
    way = _way(module, sample)
    if way is None:
        yield
        return
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Branches(way):
            return original(*args, **kwargs)

    with forward_of(module, forward):
        yield


def _way(module: torch.nn.Module, sample: Mapping[str, torch.Tensor]) -> _Way | None:
    """How to take the branches so that all stays as it is, with the sample's masks and with empty ones; None without
    branches, or where taking them changes something."""
    try:
        own, found = _run(module, sample, _Way())
        if not found:
            return None
        empty, _ = _run(module, sample, _Way(emptied=True))
    except MODEL_ERRORS:
        return None
    # One more place than there are experts may stand for none: going there fails, so it is never chosen.
    for spared, emptied in itertools.product((0, 1), (False, True)):
        try:
            result, _ = _run(module, sample, _Way(taken=True, spared=spared, emptied=emptied))
        except IndexError:
            continue
        except MODEL_ERRORS:
            return None
        if not same_tensors(result, empty if emptied else own):
            return None
        if emptied:
            return _Way(taken=True, spared=spared)
    return None


def _run(module: torch.nn.Module, sample: Mapping[str, torch.Tensor], way: _Way) -> tuple[Tensors, bool]:
    """What `module` gives, and whether it has such branches."""
    with torch.no_grad(), _Branches(way) as branches:
        return module(**{name: value.clone() for name, value in sample.items()}), branches.found
