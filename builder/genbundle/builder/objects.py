"""Tensors and numbers inside any object: found by their path, and put into copies of it."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

Path = tuple[Any, ...]
_SIMPLE = (bool, int, float, str, type(None))
# What state objects refer to and that is no state.
_FACTS = (PreTrainedConfig, torch.nn.Module, torch.dtype, torch.device, type)


def leaves(value: Any) -> dict[Path, Any]:
    """Every tensor and plain value that can be reached from `value` through lists, tuples, dicts and attributes."""
    return dict(_leaves(value, (), set()))


def _leaves(value: Any, path: Path, above: set[int]) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, (torch.Tensor, *_SIMPLE)):
        yield path, value
        return
    inner = _parts(value)
    if id(value) in above or inner is None:
        return
    for key, part in inner.items():
        yield from _leaves(part, (*path, key), above | {id(value)})


def _parts(value: Any) -> dict[Any, Any] | None:
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, dict):
        return value
    return None if isinstance(value, _FACTS) or callable(value) else getattr(value, "__dict__", None)


def with_leaves(value: Any, new: Mapping[Path, Any]) -> Any:
    """A copy of `value` with other leaves at the paths of `new`. A tensor that is at several paths is replaced at all.

    What isn't state (configs, modules) is shared with `value`.
    """
    memo: dict[int, Any] = {}
    _share(value, memo, set())
    numbers = {}
    for path, leaf in leaves(value).items():
        if isinstance(leaf, torch.Tensor):
            # A tracer knows how to clone a tensor, and not how to copy its storage.
            memo[id(leaf)] = new[path] if path in new else memo.get(id(leaf), leaf.clone())
        elif path in new:
            numbers[path] = new[path]
    result = copy.deepcopy(value, memo)
    for path, number in numbers.items():
        _put(result, path, number)
    return result


def _share(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    if isinstance(value, _FACTS):
        memo[id(value)] = value
    elif id(value) not in seen:
        seen.add(id(value))
        for part in (_parts(value) or {}).values():
            _share(part, memo, seen)


def _put(owner: Any, path: Path, leaf: Any) -> None:
    for key in path[:-1]:
        owner = owner[key] if isinstance(owner, list | tuple | dict) else getattr(owner, key)
    if isinstance(owner, list | dict):
        owner[path[-1]] = leaf
    else:
        setattr(owner, path[-1], leaf)  # of a tuple this fails, as it must: it can't be changed
