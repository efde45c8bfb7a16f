"""Cutting into a model's forward: one module's forward replaced for a while, or its output taken."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside the block, `owner`, an object, a class or a module, has another value under `name`."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def forward_of(module: torch.nn.Module, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    """`module` called with another forward inside the block, on this instance alone."""
    return attribute(module, "forward", forward)


def output_inside(module: torch.nn.Module, run: Callable[[], Any]) -> Any:
    """What `module` returns inside `run`.

    `run` goes on with zeros for a batch of two, so that what it does afterwards is dead code, and a Python loop over
    the output runs a fixed number of times. (An exception can't end it here: tracers don't survive one.)
    """
    original, found = module.forward, []

    def record(*args: Any, **kwargs: Any) -> Any:
        found.append(original(*args, **kwargs))
        return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.new_zeros(2, *tensor.shape[1:]), found[0])

    with forward_of(module, record):
        run()
    if not found:
        raise RuntimeError(f"{type(module).__name__} was not called")
    return found[0]


def output_tensors(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of a module's output by path."""
    flat, _ = pytree.tree_flatten_with_path(output)
    return {pytree.keystr(path): leaf for path, leaf in flat if isinstance(leaf, torch.Tensor)}
