"""docs/manifest.schema.json is what the dataclasses say; real manifests satisfy it. Run as a module, it is written."""

import json
from pathlib import Path

import jsonschema
import pytest

from genbundle.bundles import Manifest
from genbundle.bundles.codec import json_schema
from tests.bundles.samples import manifest

SCHEMA = Path(__file__).parents[2] / "docs" / "manifest.schema.json"


def schema_text() -> str:
    """The schema as it stands in docs/."""
    return json.dumps({"title": "genbundle manifest, version 1", **json_schema(Manifest)}, indent=1) + "\n"


def test_the_schema_in_docs_is_current():
    assert SCHEMA.read_text(encoding="utf-8") == schema_text()


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(json.loads(schema_text()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("llama", "cpu"), ("llava", "cpu"), ("chat", "cpu"), ("demo", "cpu")])
def test_real_manifests_satisfy_it(name, backend, bundle):
    manifest = json.loads((bundle(name, backend).path / "manifest.json").read_text(encoding="utf-8"))
    assert list(jsonschema.Draft202012Validator(json.loads(schema_text())).iter_errors(manifest)) == []


def test_what_the_reader_refuses_the_schema_refuses_too():
    validator = jsonschema.Draft202012Validator(json.loads(schema_text()))
    assert not validator.is_valid({"format": "genbundle", "version": 1})
    assert not validator.is_valid([])
    sample = json.loads(manifest().to_json())
    assert validator.is_valid(sample)
    for path, value in ((("programs", 0, "least"), 0), (("programs", 0, "least"), -5), (("flow", "batch"), 0)):
        wrong = json.loads(manifest().to_json())
        part = wrong
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        assert not validator.is_valid(wrong)


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
