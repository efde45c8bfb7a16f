"""Python's `min`, `max` and `int` of sizes that a tracer leaves open, inside the code of a model."""

import builtins
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from types import ModuleType
from typing import Any

import torch


class _Whole(type):
    """Of a type that stands for `int` in code."""

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, int)

    def __call__(cls, *given: Any, **options: Any) -> Any:
        return given[0] if len(given) == 1 and isinstance(given[0], torch.SymInt) else int(*given, **options)


class _Number(int, metaclass=_Whole):
    """`int`, but a size that is open is one already."""


@contextmanager
def open_numbers(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, `int` in the files that define `model`'s modules leaves open sizes as they are.

    Python's own asks for the number, and the tracer fixes the size at the sample's. For models where that happens:
    `int` may also be given to torch as a dtype, which a type of ours is not.
    """
    with _replaced(model, {"int": _Number}):
        yield


@contextmanager
def open_sizes(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, `min` and `max` in the files that define `model`'s modules stay expressions of open sizes.

    Python's own compare, and the tracer then keeps the branch that the sample took: `min(2048, length)` would become
    `length`, right up to 2048 tokens only (torch.sym_min is what tracing is meant to use).
    """
    with _replaced(model, _OWN):
        yield


@contextmanager
def _replaced(model: torch.nn.Module, names: Mapping[str, Any]) -> Iterator[None]:
    """Other values of Python's own `names` in the files that define `model`'s modules."""
    replaced: list[tuple[ModuleType, str]] = []
    try:
        for file in {type(module).__module__ for module in model.modules()}:
            module = sys.modules[file]
            for name, own in names.items():
                # Only what is Python's: a file with a `min` of its own keeps it.
                if not file.startswith(("torch.", "genbundle.")) and name not in vars(module):
                    setattr(module, name, own)
                    replaced.append((module, name))
        yield
    finally:
        for module, name in replaced:
            delattr(module, name)


def _symbolic(plain: Callable[..., Any], pair: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def choose(*given: Any, **options: Any) -> Any:
        one_list = len(given) == 1 and isinstance(given[0], list | tuple)
        values = tuple(given[0]) if one_list else given
        if options or len(values) < 2 or not any(isinstance(value, torch.SymInt) for value in values):
            return plain(*given, **options)
        return reduce(pair, values)

    return choose


_OWN = {"min": _symbolic(builtins.min, torch.sym_min), "max": _symbolic(builtins.max, torch.sym_max)}
