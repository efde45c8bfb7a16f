"""JSON to dataclasses: exact errors with the path, defaults left out, the schema."""

from dataclasses import dataclass, field
from typing import Any, Literal

import jsonschema
import pytest

from genbundle.bundles import BundleError
from genbundle.bundles.codec import decode, encode, json_schema


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part."""

    kind: Literal["a", "b"]
    size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A whole.

    More of it.
    """

    name: str
    parts: tuple[Part, ...]
    shape: tuple[int | str, ...] = ()
    share: float | None = None
    flag: bool = False
    table: dict[str, Part] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)


FULL = {
    "name": "n",
    "parts": [{"kind": "a", "size": 3}, {"kind": "b"}],
    "shape": [1, "batch"],
    "share": 0.5,
    "flag": True,
    "table": {"x": {"kind": "a"}},
    "anything": {"deep": [1, {"er": None}]},
}


def test_round_trip():
    whole = decode(Whole, FULL)
    assert whole.parts == (Part(kind="a", size=3), Part(kind="b"))
    assert whole.shape == (1, "batch")
    assert encode(whole) == FULL


def test_defaults_are_left_out_and_ints_become_floats():
    whole = decode(Whole, {"name": "n", "parts": [], "share": 1})
    assert type(whole.share) is float
    assert encode(whole) == {"name": "n", "parts": [], "share": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "Expected `str`, got `int` - at `$.name`"),
        ({"parts": {}}, "Expected `array`, got `object` - at `$.parts`"),
        ({"parts": [{}]}, "Missing field `kind` - at `$.parts[0]`"),
        ({"parts": [{"kind": "c"}]}, "Expected one of 'a', 'b', got 'c' - at `$.parts[0].kind`"),
        ({"parts": [{"kind": "a"}, {"kind": "a", "size": True}]}, "Expected `int`, got `bool` - at `$.parts[1].size`"),
        ({"parts": [{"kind": "a", "size": 1.5}]}, "Expected `int`, got `float` - at `$.parts[0].size`"),
        ({"shape": [1, None]}, "Expected `int | str`, got `null` - at `$.shape[1]`"),
        ({"share": "half"}, "Expected `float`, got `str` - at `$.share`"),
        ({"flag": 1}, "Expected `bool`, got `int` - at `$.flag`"),
        ({"table": {"x": []}}, "Expected `object`, got `array` - at `$.table.x`"),
        ({"more": 1}, "Unknown field `more` - at `$`"),
    ],
)
def test_errors(change, message):
    with pytest.raises(BundleError) as raised:
        decode(Whole, {"name": "n", "parts": [], **change})
    assert str(raised.value) == message
    assert not jsonschema.Draft202012Validator(json_schema(Whole)).is_valid({"name": "n", "parts": [], **change})


def test_the_root_must_be_an_object():
    with pytest.raises(BundleError, match=r"Expected `object`, got `array` - at `\$`"):
        decode(Whole, [])


def test_schema():
    schema = json_schema(Whole)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(FULL, schema)
    assert schema["$defs"]["Whole"]["description"] == "A whole."
    assert schema["$defs"]["Whole"]["required"] == ["name", "parts"]
