"""Branches on numbers that a tracer can't know and that change nothing, taken always.

`if mask.any():` before something that happens to the masked places alone, and loops over those experts that any token
chose: where there are no such places, doing it anyway does nothing. That is shown before, by running both.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from genbundle.builder.components import same_tensors
from genbundle.builder.cut import forward_of
from genbundle.builder.exporting import MODEL_ERRORS

Tensors = dict[str, torch.Tensor]
_MOST_ASKED = 1000  # times in a run; a loop until a mask is empty would ask forever, where it is always taken


@dataclass(frozen=True)
class _Way:
    """How branches are gone through: as the numbers say, or `taken`, each loop over all places but `spared` last."""

    taken: bool = False
    spared: int = 0


@dataclass(frozen=True)
class _Case:
    """What the numbers are made to say in a run.

    filled: every mask that is asked for any place has one, but for the one of number `emptied`. unhit: nothing chooses
    every second place of a `one_hot`, from this one on.
    """

    filled: bool = False
    emptied: int | None = None
    unhit: int | None = None


class _Branches(TorchFunctionMode):
    """Goes through branches on `mask.any()`, loops over `hit.nonzero()` and counts of what `where` finds in them in a
    way; in a trace without a case.

    masks: those asked for any place. unhit: for each loop, whether it went to places that it wouldn't by itself.
    """

    def __init__(self, way: _Way, case: _Case | None = None, inputs: Tensors | None = None):
        super().__init__()
        self.way, self.case, self.found = way, case, False
        self.masks: list[torch.Tensor] = []
        self.unhit: list[bool] = []
        self._made = _storages(inputs)
        self._asked: list[tuple[torch.Tensor, bool]] = []
        self._selected: list[torch.Tensor] = []
        self._hits: list[tuple[torch.Tensor, int]] = []
        self._times = self._inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch does, but for the branches."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        alone = len(args) == 1 and not kwargs
        ours = True
        if self.case is not None and alone and name == "any":
            ours = _storages(args) <= self._made
            if ours and self.case.filled:
                self._put(args[0], self.case.emptied)
        if self.way.taken and name == "__format__" and args[0].numel() == 1:
            return format(args[0].item(), *args[1:])  # of an expert that a name is made for; a tracer's has another
        if name in ("__bool__", "numel") or (name == "unbind" and args[1:] in ((), (0,)) and not kwargs):
            result = self._through(name, lambda: func(*args, **kwargs), args[0])
        else:
            result = func(*args, **kwargs)
        if alone and name == "any":
            self._asked.append((result, ours))
        elif alone and name == "where" and self._inside:
            self._selected.extend(result)
        elif name == "nonzero" and isinstance(result, torch.Tensor) and args[0].dim() == 1:
            self._hits.append((result, args[0].shape[0]))
        if self.case is not None:
            if name == "one_hot" and self.case.unhit is not None:
                result[..., self.case.unhit :: 2] = 0
            self._made |= _storages(result) - _storages((args, kwargs))
        return result

    def _put(self, mask: torch.Tensor, emptied: int | None) -> None:
        """Make a mask say what the case does."""
        number = next((number for number, item in enumerate(self.masks) if item is mask), len(self.masks))
        if number == len(self.masks):
            self.masks.append(mask)
        if number == emptied:
            mask.zero_()
        elif not mask.any():
            mask.copy_((torch.arange(mask.numel()) % 2 == 0).reshape(mask.shape))

    def _through(self, name: str, own: Callable[[], Any], tensor: torch.Tensor) -> Any:
        hits, places = next((item for item in self._hits if item[0] is tensor), (tensor, None))
        ours = next((ours for result, ours in self._asked if result is tensor), None)
        if name == "__bool__" and ours is not None:
            self._times += 1
            if not ours or self._times > _MOST_ASKED:
                raise RuntimeError("a branch on a weight, or one too many")
            self.found = True
            return True if self.way.taken else own()
        if name == "unbind" and places is not None:  # which iterating over it calls
            self.found = True
            return self._loop(hits, places) if self.way.taken else own()
        number = own()
        # Code that goes on where nothing is selected.
        selected = name == "numel" and self._inside and any(tensor is item for item in self._selected)
        return torch.sym_max(number, 1) if selected else number

    def _loop(self, hits: torch.Tensor, places: int) -> Iterator[torch.Tensor]:
        every = range(places - self.way.spared)
        if self.case is not None:
            self.unhit.append(not set(every) <= set(hits[:, 0].tolist()))
        return self._inside_of(tuple(torch.tensor([place]) for place in every))

    def _inside_of(self, places: tuple[torch.Tensor, ...]) -> Iterator[torch.Tensor]:
        for place in places:
            self._inside += 1
            try:
                yield place
            finally:
                self._inside -= 1


def _storages(values: Any) -> set[int]:
    """Where the tensors in there keep their numbers."""
    return {item.untyped_storage().data_ptr() for item in pytree.tree_leaves(values) if isinstance(item, torch.Tensor)}


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
    """How to take the branches so that all stays as it is, with the sample's masks, with each of them empty beside
    others that aren't, and with places that nothing chooses; None without branches, or where it doesn't."""
    try:
        if not _run(module, sample, _Way(), _Case())[1].found:
            return None
        masks = _run(module, sample, _Way(), _Case(filled=True))[1].masks
        cases = [_Case(), _Case(unhit=0), _Case(unhit=1)]
        cases += [_Case(filled=True, emptied=number) for number in range(len(masks))]
        expected = {case: _run(module, sample, _Way(), case)[0] for case in cases}
    except MODEL_ERRORS:
        return None
    # One more place than there are experts may stand for none: going there fails, so it is never chosen.
    for spared in (0, 1):
        way = _Way(taken=True, spared=spared)
        try:
            return way if _same(module, sample, way, expected) else None
        except IndexError:
            continue
        except MODEL_ERRORS:
            return None
    return None


def _same(
    module: torch.nn.Module, sample: Mapping[str, torch.Tensor], way: _Way, expected: Mapping[_Case, Tensors]
) -> bool:
    """Whether `module` gives what is expected this way, and each of its loops went where nothing was to do."""
    loops = []
    for case, tensors in expected.items():
        result, branches = _run(module, sample, way, case)
        if not same_tensors(result, tensors):
            return False
        loops.append(branches.unhit)
    return all(any(each) for each in zip(*loops, strict=True))


def _run(
    module: torch.nn.Module, sample: Mapping[str, torch.Tensor], way: _Way, case: _Case
) -> tuple[Tensors, _Branches]:
    """What `module` gives, and how its branches went. Zeros (a first state) are others, to hide nothing."""
    numbers = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.rand(value.shape, generator=numbers, dtype=value.dtype)
        if value.is_floating_point() and not value.any()
        else value.clone()
        for name, value in sample.items()
    }
    with torch.no_grad(), _Branches(way, case, inputs) as branches:
        return module(**inputs), branches
