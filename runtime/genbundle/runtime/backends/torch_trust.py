"""What AOTInductor takes on trust, refused before it compiles or checked before its code is called."""

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from genbundle.bundles import EngineError

# Inductor writes an operator's texts into C++ as they are, between quotes: nothing here ends a literal or escapes.
_TEXT = re.compile(r"[A-Za-z0-9 _.,:;<>=()+*/%\[\]'-]*")
# Compiled to reads and writes at any index or stride that is asked for; torch's kernels would raise.
_UNCHECKED = re.compile(r"aten\.(_unsafe_index|_unsafe_masked_index|as_strided|max_unpool)")
# Guards by smaller numbers are what an example's sizes happened to be, and hold for few others. int32's largest number
# is 2 ** 31 - 1, but sympy takes constants to its side and then divides both: 4 * n + 5 becomes n <= 536870910.
_LEAST_BOUND = 2**24
# sympy's classes, and torch's own, as Python computes them on numbers, which don't overflow.
_INEQUALITIES: dict[str, Callable[..., Any]] = {
    "LessThan": operator.le, "StrictLessThan": operator.lt, "GreaterThan": operator.ge,
    "StrictGreaterThan": operator.gt,
}  # fmt: skip
_OPERATIONS: dict[str, Callable[..., Any]] = {
    **_INEQUALITIES,
    "Add": lambda *each: sum(each), "Mul": lambda *each: math.prod(each), "Pow": operator.pow,
    "PowByNatural": operator.pow, "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv, "Mod": operator.mod,
    "PythonMod": operator.mod, "ModularIndexing": lambda base, by, modulus: base // by % modulus,
    "Max": max, "Min": min,
}  # fmt: skip


def expect_harmless(exported: Any, program: str) -> None:
    """EngineError for a program whose text would be code, or whose operators the compiler leaves without any checks."""
    for module in exported.graph_module.modules():  # graphs inside graphs too
        for node in module.graph.nodes if hasattr(module, "graph") else ():
            name = str(node.target)
            if node.op == "call_function" and _UNCHECKED.match(name):
                raise EngineError(f"{program}: calls {name}, which compiled code doesn't check: load it uncompiled")
            for text in _texts((node.args, node.kwargs)):
                if not _TEXT.fullmatch(text):
                    raise EngineError(
                        f"{program}: {name} has the text {text[:80]!r}, which no code may hold: load it uncompiled"
                    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, slice):
        yield from _texts((value.start, value.stop, value.step))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def expect_open_sizes(examples: Sequence[Any]) -> None:
    """ValueError where the compiler took a size for the traced one, which its code doesn't check.

    It takes more for granted, by guards that AOTInductor drops. Those that bound sizes by what 32 bits index are kept
    (`upper_bounds`). By others a result can differ: that sizes aren't 0 or 1, which tests/parity/test_compiled.py runs
    for one decoder, and what else an example's sizes decided, where only `genbundle verify --compiled` would show it,
    for the sizes that a bundle recorded.
    """
    for value in examples:
        fixed = value.fake_mode.shape_env.replacements if value.fake_mode.shape_env is not None else {}
        for size in value.shape:
            for symbol in () if isinstance(size, int) else size.node.expr.free_symbols:
                if symbol in fixed:
                    raise ValueError(f"it would compute one size only, {symbol} = {fixed[symbol]}")


def upper_bounds(exported: Any, examples: Sequence[Any]) -> list[Any]:
    """What has to hold of a call's sizes so that the code's indices, of 32 bits on a GPU, reach: to be kept as JSON.

    Call it after compiling: the compiler adds its guards to the examples' environment, and to its assertions those on
    numbers that only a run shows. ValueError for one that can't be checked before a call.
    """
    known = {
        size.node.expr
        for value in examples
        for size in value.shape
        if not isinstance(size, int) and size.node.expr.is_symbol
    }
    environments = {id(each): each for each in (value.fake_mode.shape_env for value in examples) if each is not None}
    found = [
        condition
        for environment in environments.values()
        for condition in (
            *(guard.expr for guard in environment.guards),
            *(late.expr for each in environment.deferred_runtime_asserts.values() for late in each),
        )
        if _bound(condition) >= _LEAST_BOUND
    ]
    # What the program says of its own sizes is believed too.
    found += [
        symbol <= limits.upper
        for symbol, limits in exported.range_constraints.items()
        if symbol in known and limits.upper.is_Integer
    ]
    for condition in found:
        if not condition.free_symbols <= known:
            raise ValueError(f"its code would hold only for {condition}, which no input's size shows")
    return [[str(condition), _tree(condition)] for condition in found]


def _bound(condition: Any) -> int:
    """The number that sizes are bounded by from above; 0 for any other condition."""
    if type(condition).__name__ not in _INEQUALITIES:
        return 0
    number = (condition.gts - condition.lts).expand().as_coeff_Add()[0]
    return int(number) if number.is_Rational else 0


def broken_bound(bounds: Sequence[Any], sizes: Mapping[Any, int]) -> str | None:
    """The first of `upper_bounds` that doesn't hold for these sizes."""
    numbers = {str(symbol): size for symbol, size in sizes.items()}
    return next((text for text, tree in bounds if not _computed(tree, numbers)), None)


def _tree(expression: Any) -> Any:
    """An expression as JSON: a number, a symbol's name, or a list of an operation's name and its operands."""
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return expression.name
    name = type(expression).__name__
    if name not in _OPERATIONS:
        raise ValueError(f"its code would hold only for some sizes, by {name} in a way that can't be checked")
    return [name, *map(_tree, expression.args)]


def _computed(tree: Any, numbers: Mapping[str, int]) -> Any:
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return numbers[tree]
    return _OPERATIONS[tree[0]](*(_computed(each, numbers) for each in tree[1:]))
