"""Chat templates: Jinja in a sandbox that gives them what transformers gives them, with limits on what they make."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from genbundle.bundles import InputError

if TYPE_CHECKING:
    from jinja2 import Template

# The most characters of a prompt, or items of a list that a template makes; far more than any model takes.
LONGEST = 2**24
_MOST_BITS = 4096
# Methods of a text, and filters, that make as many characters or items as a number says.
_WIDENING = ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "wordwrap")
# A width or precision of thousands, or one that a value gives.
_WIDE_FORMAT = re.compile(r"\{[^{}]*[:!][^{}]*(\d{5}|\{)")
_WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[-+ #0]*(\*|\d{5}|\d*\.(\*|\d{5}))")


def _product(left: Any, right: Any) -> bool:
    for several, count in ((left, right), (right, left)):
        if isinstance(several, str | list | tuple) and isinstance(count, int):
            return len(several) * count <= LONGEST
    both = isinstance(left, int) and isinstance(right, int)
    return not both or left.bit_length() + right.bit_length() <= _MOST_BITS


def _power(left: Any, right: Any) -> bool:
    both = isinstance(left, int) and isinstance(right, int)
    return not both or left.bit_length() * right <= _MOST_BITS


def _percent(left: Any, right: Any) -> bool:
    return not isinstance(left, str) or _WIDE_PERCENT.search(left) is None


def _sum(left: Any, right: Any) -> bool:
    both = isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple)
    return not both or len(left) + len(right) <= LONGEST


# Whether an operator may be applied to two values.
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {"*": _product, "**": _power, "%": _percent, "+": _sum}


def _joined(separator: str, parts: Iterable[str]) -> str:
    """`separator.join(parts)`, as far as it isn't too long."""
    taken, length = [], 0
    for part in parts:
        taken.append(part)
        length += len(part) + len(separator)
        if length > LONGEST:
            raise ValueError(f"a text of more than {LONGEST} characters")
    return separator.join(taken)


def _replaced(text: str, old: str, new: str, count: int | None = None) -> str:
    """`text.replace(old, new, count)`, as far as it isn't too long."""
    count = -1 if count is None else count
    places = text.count(old) if count < 0 else min(count, text.count(old))
    if len(text) + places * len(new) > LONGEST:
        raise ValueError(f"a text of more than {LONGEST} characters")
    return text.replace(old, new, count)


def render(template: Template, values: Mapping[str, Any]) -> str:
    """The rendered text; whatever a template does wrong surfaces as any exception at all."""
    pieces, length = [], 0
    for piece in template.generate(values):
        pieces.append(piece)
        length += len(piece)
        if length > LONGEST:
            raise ValueError(f"it gives more than {LONGEST} characters")
    return "".join(pieces)


def compile_template(source: str) -> Template:
    """The template in an environment that gives it what transformers gives it, and nothing more."""
    import jinja2
    from jinja2 import compiler, ext, nodes, sandbox
    from jinja2.filters import make_attrgetter

    class Generation(ext.Extension):
        """`{% generation %}` marks the assistant's words for training; here it renders what it encloses."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it a plain set)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """Without underscored names, which lead to Python's internals."""

        def __init__(*args, **kwargs):
            # `namespace(self=...)` is legal in a template, so this takes no named parameter.
            self, attributes = args[0], dict(*args[1:], **kwargs)
            for name in attributes:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    class Dict:
        """`dict(...)` without the type object."""

        def __call__(self, *args, **kwargs) -> dict:
            return dict(*args, **kwargs)

        def fromkeys(self, *args) -> dict:
            return dict.fromkeys(*args)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace can't hold the underscored name {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    called: Callable[..., Any] = sandbox.ImmutableSandboxedEnvironment.call

    class Generator(compiler.CodeGenerator):
        """`~` as a call, since it is none of the operators that a sandbox can watch."""

        def visit_Concat(self, node: Any, frame: Any) -> None:
            self.write("environment.concatenated((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

    class Environment(sandbox.ImmutableSandboxedEnvironment):
        """Without the ways to make gigabytes of a few words."""

        intercepted_binops = frozenset(_OPERATORS)
        code_generator_class = Generator

        @staticmethod
        def concatenated(parts: Iterable[Any]) -> str:
            return _joined("", map(str, parts))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check = _OPERATORS[operator]
            if not check(left, right):
                raise jinja2.exceptions.SecurityError(f"`{operator}` would make more than {LONGEST} characters")
            return super().call_binop(context, operator, left, right)

        def call(*args, **kwargs) -> Any:
            # `self`, the context, what is called, and its own arguments, which may have any name.
            name, owner = getattr(args[2], "__name__", ""), getattr(args[2], "__self__", None)
            given: tuple[Any, ...] = args[3:]
            if name in _WIDENING:
                _check_numbers((*given, *kwargs.values()))
            if isinstance(owner, str) and name == "join":
                return _joined(owner, *given, **kwargs)
            if isinstance(owner, str) and name == "replace":
                return _replaced(owner, *given, **kwargs)
            return called(*args, **kwargs)

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            if wrapped is not None and _WIDE_FORMAT.search(value.__self__):
                raise jinja2.exceptions.SecurityError("a format of thousands of characters")
            return wrapped

    def _check_numbers(values: Iterable[Any]) -> None:
        if any(isinstance(value, int) and abs(value) > LONGEST for value in values):
            raise jinja2.exceptions.SecurityError(f"a width beyond {LONGEST}")

    def _limited(function: Any) -> Any:
        @functools.wraps(function)
        def limited(*args, **kwargs) -> Any:
            _check_numbers((*args, *kwargs.values()))
            return function(*args, **kwargs)

        return limited

    def _format(value: str, *args, **kwargs) -> str:
        if args and kwargs:
            raise jinja2.exceptions.FilterArgumentError("can't handle positional and keyword arguments at once")
        if not _percent(str(value), None):
            raise jinja2.exceptions.SecurityError("a format of thousands of characters")
        return str(value) % (kwargs or args)

    def _join(value: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
        items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
        return _joined(str(d), map(str, items))

    def _replace(s: Any, old: str, new: str, count: int | None = None) -> str:
        return _replaced(str(s), str(old), str(new), count)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    for name in environment.filters.keys() & set(_WIDENING):
        environment.filters[name] = _limited(environment.filters[name])
    environment.filters |= {"tojson": _tojson, "format": _format, "join": _join, "replace": _replace}
    del environment.globals["lipsum"]
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Namespace,
    }
    try:
        return environment.from_string(source)
    except Exception as error:  # a syntax error, or one in what the compiler folds
        raise InputError(f"the model's chat template can't be compiled: {describe(error)}") from error


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja2's own filter escapes HTML.
    if isinstance(indent, int) and indent > 100:
        raise ValueError(f"an indent of {indent}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def describe(error: Exception) -> str:
    """An exception in words, with the template's line where it has one."""
    line = getattr(error, "lineno", None)
    return f"{type(error).__name__}: {error}" + (f" (line {line})" if line else "")
