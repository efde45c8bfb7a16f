"""The manifest: golden bytes, round trip, and every rule that types don't say, with its exact error."""

import json

import pytest

from genbundle.bundles import BundleError, BundleVersionError, open_bundle
from genbundle.bundles.manifest import File, Flow, Input, Route, Source
from genbundle.bundles.parsing import parse_manifest
from tests.bundles.samples import CONTENT, manifest, program

FILES = {name: File(size=len(content), sha256="0" * 64) for name, content in sorted(CONTENT.items())}


def full():
    """The sample manifest as JSON values."""
    return json.loads(manifest(files=FILES).to_json())


def error_of(value):
    """The message of reading `value` (JSON values, or text)."""
    with pytest.raises(BundleError) as raised:
        parse_manifest(value if isinstance(value, str) else json.dumps(value))
    return str(raised.value)


def test_round_trip():
    first = manifest(files=FILES)
    assert parse_manifest(first.to_json()) == first
    assert parse_manifest(first.to_json()).to_json() == first.to_json()


def test_golden_bytes():
    """The exact text of a small manifest: a change here is a change of the format."""
    small = manifest(
        files=FILES, text=None, images=None, notes=(), state=(), generation=manifest().generation,
        programs=(program(inputs=program().inputs[:1], outputs=program().outputs[:1]),),
    )  # fmt: skip
    assert json.dumps(json.loads(small.to_json()), indent=1, ensure_ascii=False) + "\n" == small.to_json()
    assert small.to_json().startswith('{\n "format": "genbundle",\n "version": 1,\n "backend": "cpu",\n "model": {\n')
    value = json.loads(small.to_json())
    assert list(value) == [
        "format", "version", "backend", "model", "flow", "programs", "state", "generation", "files", "weights",
    ]  # fmt: skip
    assert value["flow"] == {
        "prompt": [{"programs": ["decode"]}],
        "step": ["decode"],
        "continues": True,
        "capacity": 64,
    }
    assert value["programs"][0]["inputs"] == [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"], "source": {"kind": "tokens"}}
    ]
    assert value["files"]["decode.onnx"] == {"size": 7, "sha256": "0" * 64}


def test_text_is_readable():
    assert "Grüße & 東京" in manifest().to_json()
    assert manifest().to_json().endswith("}\n")


def test_program_by_name():
    assert manifest().program("decode").file == "decode.onnx"
    with pytest.raises(KeyError):
        manifest().program("prompt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "manifest.json is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ('{"format": "genb', "manifest.json is not JSON: Unterminated string starting at: line 1 column 12 (char 11)"),
        ("[]", "manifest.json is not a genbundle manifest: Expected 'genbundle' - at `$.format`"),
        ('{"format": "other"}', "manifest.json is not a genbundle manifest: Expected 'genbundle' - at `$.format`"),
        ('{"format": "genbundle"}', "Expected a format version, got None - at `$.version`"),
        ('{"format": "genbundle", "version": true}', "Expected a format version, got True - at `$.version`"),
        ('{"format": "genbundle", "version": 0}', "Expected a format version, got 0 - at `$.version`"),
        ('{"format": "genbundle", "format": "genbundle"}', "manifest.json holds the key 'format' twice in one object"),
        ('{"format": "genbundle", "version": 1}', "Missing field `backend` - at `$`"),
    ],
)
def test_not_a_manifest(text, message):
    assert error_of(text) == message


def test_deep_nesting_is_an_error():
    assert error_of("[" * 200_000).startswith("manifest.json is not JSON: ")


def test_a_newer_version_is_told_apart_before_anything_else():
    with pytest.raises(BundleVersionError) as raised:
        parse_manifest('{"format": "genbundle", "version": 2, "new": "things"}')
    assert str(raised.value) == (
        "this bundle is of format version 2, newer than the 1 that is read here: upgrade genbundle, or build the "
        "bundle again with this version"
    )


def test_a_key_twice_deep_inside():
    text = manifest(files=FILES).to_json().replace('"name": "some"', '"name": "some", "name": "other"')
    assert error_of(text) == "manifest.json holds the key 'name' twice in one object"


def change(path, value):
    """The sample manifest with one value replaced; `path` is keys and indices."""
    whole = full()
    place = whole
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return whole


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("backend",), "tpu", "Expected one of 'cpu', 'cuda', 'xnnpack', 'torch', got 'tpu' - at `$.backend`"),
        (("surprise",), 1, "Unknown field `surprise` - at `$`"),
        (("model", "parameters"), 10**4000, "Expected a number of 64 bits, got one of 13288 - at `$.model.parameters`"),
        (("verification",), 2**63, "Expected a number of 64 bits, got one of 64 - at `$.verification`"),
        (
            ("programs", 0, "inputs", 0, "source", "options"),
            {"below": "x"},
            "Expected a number, got 'x' - at `$.programs[0].inputs[0].source.options.below`",
        ),
        (
            ("programs", 0, "inputs", 1, "source", "options"),
            {"inputs": 5},
            "Expected names of inputs, got 5 - at `$.programs[0].inputs[1].source.options`",
        ),
        (
            ("programs", 0, "roles", 1),
            "director",
            "Expected one of 'encoder', 'projector', 'merge', 'language_model', 'lm_head', 'decode', got 'director' - "
            "at `$.programs[0].roles[1]`",
        ),
        (
            ("programs", 0, "inputs", 0, "dtype"),
            "int65",
            "Expected a dtype name, got 'int65' - at `$.programs[0].inputs[0].dtype`",
        ),
        (
            ("programs", 0, "outputs", 1, "shape", 1),
            -2,
            "Expected sizes of at least 0 and at most 2147483648 elements - at `$.programs[0].outputs[1].shape`",
        ),
        (
            ("state", 0, "shape"),
            ["batch", 100_000, 100_000],
            "Expected sizes of at least 0 and at most 2147483648 elements - at `$.state[0].shape`",
        ),
        (("state", 0, "dtype"), "int65", "Expected a dtype name, got 'int65' - at `$.state[0].dtype`"),
        (
            ("programs", 0, "inputs", 1, "source"),
            {"kind": "constant"},
            "Missing field `value` - at `$.programs[0].inputs[1].source`",
        ),
        (
            ("programs", 0, "inputs", 1, "source", "options"),
            {"pieces": "nothing"},
            "Expected an input's name, got 'nothing' - at `$.programs[0].inputs[1].source.options.pieces`",
        ),
        (
            ("programs", 0, "inputs", 1, "source", "options"),
            {"sizes": [[]]},
            "Expected an input's name, got [[]] - at `$.programs[0].inputs[1].source.options.sizes`",
        ),
        (("images", "placeholder"), "", "Expected a text that isn't empty - at `$.images.placeholder`"),
        (("flow", "batch"), 0, "Expected at least 1, got 0 - at `$.flow.batch`"),
        (("programs", 0, "least"), 0, "Expected at least 1, got 0 - at `$.programs[0].least`"),
        (("programs", 0, "least"), -5, "Expected at least 1, got -5 - at `$.programs[0].least`"),
        (("flow", "capacity"), -1, "Expected at least 1, got -1 - at `$.flow.capacity`"),
        (
            ("programs", 0, "inputs", 2, "source"),
            {"kind": "state"},
            "Missing field `name` - at `$.programs[0].inputs[2].source`",
        ),
        (
            ("programs", 0, "inputs", 2, "source", "name"),
            "9.key",
            "Expected a state entry, got '9.key' - at `$.programs[0].inputs[2].source`",
        ),
        (
            ("programs", 0, "outputs", 1, "state"),
            "9.key",
            "Expected a state entry, got '9.key' - at `$.programs[0].outputs[1].state`",
        ),
        (
            ("programs", 0, "file"),
            "other.onnx",
            "Expected a file listed in `$.files`, got 'other.onnx' - at `$.programs[0].file`",
        ),
        (("weights",), "w", "Expected a file listed in `$.files`, got 'w' - at `$.weights`"),
        (("text", "tokenizer"), "t", "Expected a file listed in `$.files`, got 't' - at `$.text.tokenizer`"),
        (("flow", "step"), [], "Expected at least one program - at `$.flow.step`"),
        (("flow", "step"), ["go"], "Expected the name of a program, got 'go' - at `$.flow.step`"),
        (("flow", "prompt"), [], "Expected at least one route - at `$.flow.prompt`"),
        (
            ("flow", "prompt", 0, "programs"),
            ["go"],
            "Expected the name of a program, got 'go' - at `$.flow.prompt[0].programs`",
        ),
        (("files", "decode.onnx", "size"), -1, "Expected a size and a sha256 - at `$.files.decode.onnx`"),
        (("files", "decode.onnx", "sha256"), "abc", "Expected a size and a sha256 - at `$.files.decode.onnx`"),
    ],
)
def test_rules(path, value, message):
    assert error_of(change(path, value)) == message


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../outside",
        "a/../../b",
        "a//b",
        "./a",
        "a/.",
        "c:\\windows",
        "a\\b",
        "con:",
        "a\0b",
        "manifest.json",
    ],
)
def test_file_names_stay_inside(name):
    assert error_of(change(("files", name), {"size": 1, "sha256": "0" * 64})) == (
        f"Expected a file path inside the bundle, got {name!r} - at `$.files`"
    )


def test_programs_have_distinct_names():
    twice = manifest(files=FILES, programs=(program(), program()))
    assert error_of(twice.to_json()) == "Expected distinct program names - at `$.programs`"


def test_every_route_is_checked():
    flow = Flow(
        prompt=(Route(programs=("decode",)), Route(programs=("decode", "more"), needs=("pixels",))), step=("decode",)
    )
    assert error_of(manifest(files=FILES, flow=flow).to_json()) == (
        "Expected the name of a program, got 'more' - at `$.flow.prompt[1].programs`"
    )


def test_prepared_inputs_have_a_name():
    nameless = Input(name="x", dtype="int64", shape=(1,), source=Source(kind="prepared", rule="vision_grid"))
    assert error_of(manifest(files=FILES, programs=(program(inputs=(nameless,)),)).to_json()) == (
        "Missing field `name` - at `$.programs[0].inputs[0].source`"
    )


def test_a_number_of_thousands_of_digits():
    with pytest.raises(BundleError, match="is not JSON"):
        parse_manifest('{"format": "genbundle", "version": ' + "1" * 5000 + "}")


def test_a_manifest_that_never_ends_is_not_read(tmp_path):
    (tmp_path / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(BundleError, match=r"not a bundle, it holds no manifest\.json"):
        open_bundle(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(2**27)
    with pytest.raises(BundleError, match="which no manifest needs"):
        open_bundle(tmp_path)
