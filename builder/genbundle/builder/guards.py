"""What a tracer took for granted: sizes that it fixed or bounded, and conditions on sizes that hold for some only."""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from genbundle.bundles import UnsupportedModelError

Axes = Mapping[str, Mapping[int, str]]
"""Input name -> axis -> its symbolic name."""
_UNBOUNDED = 2**31
_LENGTHS = ("sequence", "past", "total", "capacity")  # axes as long as a generation, or nearly (past_plus1)
_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_LONGEST = 4096  # of the prompts whose lengths are tried one by one
_BATCHES = (1, 2, 3)
_PASTS = range(1, 1100)
_NAMES = {"math": math, "torch": torch, "__builtins__": {"max": max, "min": min}}
_SIZES = ("batch", "sequence", "past", "total", "capacity")  # what is known for a call: see _sizes
_RUN = 1100  # tokens of the longest prompt that the module and its program are both run for


def expect_free(program: Any, axes: Axes, longest: int | None) -> None:
    """UnsupportedModelError where the model's code fixed an axis that has to vary, or one of tokens below `longest`."""
    inputs = {node.target: node for node in program.graph.nodes if node.op == "placeholder"}
    for name, named in axes.items():
        node = inputs.get(name)
        if node is None or not node.users:
            continue
        for axis, symbol in named.items():
            size = node.meta["val"].shape[axis]
            if not isinstance(size, int) and (number := size.node.maybe_as_int()) is not None:
                size = number  # what a guard fixed during the trace is still a symbol's value
            if isinstance(size, int):
                raise UnsupportedModelError(
                    f"axis {axis} ({symbol}) of its input {name!r} is fixed at {size} by the model's code"
                )
            known = program.range_constraints.get(size.node.expr)
            if known is None or known.upper >= _UNBOUNDED or symbol.partition("_")[0] not in _LENGTHS:
                continue
            if longest is None or known.upper < longest:
                raise UnsupportedModelError(
                    f"axis {axis} ({symbol}) of its input {name!r} is at most {known.upper} by the model's code, and "
                    f"the bundle is for {'any length' if longest is None else f'up to {longest} tokens'}: "
                    "give a smaller max_length"
                )


def largest(program: Any, axes: Axes) -> dict[str, int]:
    """The most that axes other than those of tokens may have, by the model's code or the memory planned for them."""
    found: dict[str, int] = {}
    for node in program.graph.nodes:
        for axis, symbol in axes.get(node.target, {}).items() if node.op == "placeholder" else ():
            size = node.meta["val"].shape[axis]
            known = None if isinstance(size, int) else program.range_constraints.get(size.node.expr)
            if known is not None and known.upper < _UNBOUNDED and symbol.partition("_")[0] not in ("batch", *_LENGTHS):
                found[symbol] = min(int(known.upper), found.get(symbol, _UNBOUNDED))
    return found


class HoldsFrom(UnsupportedModelError):
    """A program for prompts of `least` tokens and more; shorter ones take another way through the model's code."""

    def __init__(self, least: int, guard: str):
        super().__init__(f"the model's code takes another way for prompts of fewer than {least} tokens: {guard}")
        self.least = least


def expect_open(
    program: Any, module: Any, sample: Mapping[str, torch.Tensor], axes: Axes, longest: int | None, least: int
) -> None:
    """UnsupportedModelError for a condition on lengths that held in the trace and doesn't hold for others.

    The tracer keeps conditions that involve several sizes beside the program, for a check before each call that no
    engine makes. Those on other sizes than lengths are left to the replay. HoldsFrom where they hold for all prompts of
    a length and more, unless that is `least`, the fewest tokens that the program will be called for. Where one fails
    for lengths in between, module and program are run for some of these: a padding to whole chunks is right for any.
    """
    symbols = {symbol for item in axes.values() for symbol in item.values()}
    prompt = not symbols & {"past", "total", "capacity"} and "sequence" in symbols
    fewest, failing = (0, ""), []
    for condition in _conditions(program, axes):
        failed = _failing(condition, symbols, longest, prompt=prompt)
        lengths = {sizes[1] for sizes in failed}
        if prompt and lengths and max(lengths) < _LONGEST // 2 and (longest is None or max(lengths) < longest):
            fewest = max(fewest, (max(lengths), condition.text))
        elif failed:
            failing.append((condition.text, failed))
    if fewest[0] >= least:
        raise HoldsFrom(fewest[0] + 1, fewest[1])
    for text, failed in failing:
        if not all(_same(program, module, sample, axes, sizes) for sizes in _some(failed, least)):
            raise UnsupportedModelError(f"the model's code takes another way unless {text}")


class _Condition:
    """One of the tracer's conditions on sizes: `text` as the tracer has it, `expression` of a call's sizes by name."""

    def __init__(self, text: str, expression: str):
        self.text = text
        self._value = eval(f"lambda {', '.join(_SIZES)}: {expression}", _NAMES)

    def holds(self, batch: int, new: int, past: int) -> bool | None:
        """None where it is on something else than these sizes."""
        try:
            return self._value(**_sizes(batch, new, past))
        except Exception:  # a condition on something else than sizes
            return None


def _conditions(program: Any, axes: Axes) -> list[_Condition]:
    """Those on sizes that are known for a call, each once: tracers write one for every input that has such a size."""
    shapes = {
        node.target: node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)
    }
    found: dict[str, str] = {}
    for text in getattr(program, "_guards_code", None) or ():
        if (expression := _expression(text, axes, shapes)) is not None:
            found.setdefault(expression, text)
    return [_Condition(text, expression) for expression, text in found.items()]


def _expression(text: str, axes: Axes, shapes: Mapping[str, Sequence[Any]]) -> str | None:
    """A condition with its sizes by name, or as numbers where they are fixed; None where one is neither."""
    sizes: dict[tuple[str, int], str] = {}
    for name, digits in _SIZE.findall(text):
        axis = int(digits)
        size = axes.get(name, {}).get(axis, shapes[name][axis] if name in shapes else None)
        if not isinstance(size, int) and not (isinstance(size, str) and size in _SIZES):
            return None
        sizes[name, axis] = str(size)
    return _SIZE.sub(lambda match: sizes[match[1], int(match[2])], text)


def _sizes(batch: int, new: int, past: int) -> dict[str, int]:
    return dict(zip(_SIZES, (batch, new, past, past + new, past + new), strict=True))


def resized(sample: Mapping[str, torch.Tensor], axes: Axes, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """A sample with other sizes of the axes of some names: what it holds, over and over."""
    found = {}
    for name, tensor in sample.items():
        for axis, symbol in axes.get(name, {}).items():
            if symbol in sizes:
                tensor = tensor.index_select(axis, torch.arange(sizes[symbol]) % tensor.shape[axis])
        found[name] = tensor
    return found


def _failing(
    condition: _Condition, symbols: set[str], longest: int | None, *, prompt: bool
) -> list[tuple[int, int, int]]:
    """The sizes (batch, new, past) for which a condition fails: every length of a prompt, every past of a step."""
    batches = _BATCHES if "batch" in symbols else (1,)
    news = (1, 3, 65) if "sequence" in symbols else (1,)
    lengths = [(new, 0) for new in range(1, _LONGEST)] if prompt else [(n, past) for past in _PASTS for n in news]
    failing = []
    for batch in batches:
        failed = [(batch, *each) for each in lengths if condition.holds(batch, *each) is False]
        # That one sequence isn't several, however long, is what the tracer says of any program.
        if not (batch == 1 < len(batches) and len(failed) == len(lengths)):
            failing += [sizes for sizes in failed if longest is None or sum(sizes[1:]) <= longest]
    return failing


def _some(failing: list[tuple[int, int, int]], least: int) -> list[tuple[int, int, int]]:
    """A few of the sizes, short and long ones."""
    short = [sizes for sizes in failing if sizes[1] >= least and sizes[1] + sizes[2] <= _RUN] or failing[:1]
    return list(dict.fromkeys((short[0], short[len(short) // 2], short[-1])))


def _same(
    program: Any, module: Any, sample: Mapping[str, torch.Tensor], axes: Axes, sizes: tuple[int, int, int]
) -> bool:
    """Whether the program gives what the module does, for a sample of other sizes."""
    given = resized(sample, axes, _sizes(*sizes))
    try:
        with torch.no_grad():
            # Not as it is called: upstream's exporter watches that, and would take these inputs for the program's.
            expected = type(module).forward(module, **copy.deepcopy(given))
            traced = program.module(check_guards=False)
            traced._forward_pre_hooks.clear()  # they refuse sizes that weren't traced before the program can show them
            found = traced(**copy.deepcopy(given))
    except Exception:  # whatever the traced code raises for sizes that it isn't for
        return False
    return all(
        found[name].shape == value.shape and torch.allclose(found[name], value, rtol=1e-3, atol=1e-4, equal_nan=True)
        for name, value in expected.items()
    )
