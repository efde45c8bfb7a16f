"""JSON to frozen dataclasses and back, with errors that give the path: "Expected `int`, got `str` - at `$.a[1].b`"."""

import dataclasses
import functools
import types
import typing
from typing import Any, Literal, TypeVar, get_args, get_origin

from genbundle.bundles.errors import BundleError

T = TypeVar("T")
_NAMES = {str: "str", int: "int", float: "float", bool: "bool", dict: "object", list: "array", type(None): "null"}


def decode(cls: type[T], value: Any, path: str = "$") -> T:
    """`value` (parsed JSON) as an instance of the dataclass `cls`; BundleError where it doesn't fit."""
    return _decode(cls, value, path)


def encode(value: Any) -> Any:
    """A dataclass as plain JSON values, leaving out fields that hold their default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: encode(item)
            for f in dataclasses.fields(value)
            if not _is_default(f, item := getattr(value, f.name))
        }
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def json_schema(cls: type) -> dict[str, Any]:
    """The JSON Schema (2020-12) of what `decode(cls, ...)` accepts."""
    definitions: dict[str, Any] = {}
    root = _schema(cls, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


def _is_default(field: dataclasses.Field, value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return value == field.default_factory()
    return field.default is not dataclasses.MISSING and value == field.default


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(kind: Any, value: Any, path: str) -> Any:
    origin = get_origin(kind)
    _expect_64_bits(value, path)
    if kind is Any:
        return value
    if origin is Literal:
        if value not in get_args(kind) or isinstance(value, bool):
            raise BundleError(f"Expected one of {', '.join(map(repr, get_args(kind)))}, got {value!r} - at `{path}`")
        return value
    if origin in (types.UnionType, typing.Union):
        return _decode_union(get_args(kind), value, path)
    if origin is tuple:
        _expect(list, value, path)
        return tuple(_decode(get_args(kind)[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        _expect(dict, value, path)
        return {key: _decode(get_args(kind)[1], item, f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_object(typing.cast(type, kind), value, path)
    if kind is float and type(value) is int:
        return float(value)
    _expect(kind, value, path)
    return value


def _decode_union(kinds: tuple, value: Any, path: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:
        return _decode(kinds[0], value, path)
    for kind in kinds:
        if type(value) is kind:
            return value
    expected = " | ".join(_NAMES.get(kind, str(kind)) for kind in kinds)
    raise BundleError(f"Expected `{expected}`, got `{_name(value)}` - at `{path}`")


def _decode_object(cls: type, value: Any, path: str) -> Any:
    _expect(dict, value, path)
    hints, found = _hints(cls), {}
    for key, item in value.items():
        if key not in hints:
            raise BundleError(f"Unknown field `{key}` - at `{path}`")
        found[key] = _decode(hints[key], item, f"{path}.{key}")
        least = cls.__dataclass_fields__[key].metadata.get("minimum")
        if least is not None and found[key] is not None and found[key] < least:
            raise BundleError(f"Expected at least {least}, got {item} - at `{path}.{key}`")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in found:
            raise BundleError(f"Missing field `{field.name}` - at `{path}`")
    return cls(**found)


def _expect_64_bits(value: Any, path: str) -> None:
    if isinstance(value, int) and value.bit_length() > 63:
        raise BundleError(f"Expected a number of 64 bits, got one of {value.bit_length()} - at `{path}`")


def _expect(kind: type, value: Any, path: str) -> None:
    if type(value) is not kind:
        raise BundleError(f"Expected `{_NAMES.get(kind, str(kind))}`, got `{_name(value)}` - at `{path}`")


def _name(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin = get_origin(kind)
    if kind is Any:
        return {}
    if origin is Literal:
        return {"enum": list(get_args(kind))}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_schema(item, definitions) for item in get_args(kind)]}
    if origin is tuple:
        return {"type": "array", "items": _schema(get_args(kind)[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(get_args(kind)[1], definitions)}
    if dataclasses.is_dataclass(kind):
        return _object_schema(typing.cast(type, kind), definitions)
    name = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}[kind]
    return {"type": name}


def _object_schema(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    if cls.__name__ not in definitions:
        definitions[cls.__name__] = {}
        required = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ]
        definitions[cls.__name__] = {
            "type": "object",
            "description": (cls.__doc__ or "").split("\n")[0],
            "properties": {
                field.name: {**_schema(_hints(cls)[field.name], definitions), **field.metadata}
                for field in dataclasses.fields(cls)
            },
            "required": required,
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{cls.__name__}"}
