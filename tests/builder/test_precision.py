"""What `precision=` takes, and the parts of a model that it names."""

import pytest
from tests.zoo import models

from genbundle.builder import build_bundle
from genbundle.builder.precision import FLOORS, Precisions, parse_precision
from genbundle.bundles import BuildError
from genbundle.bundles.report import QualityFloor


@pytest.mark.parametrize(
    ("given", "language_model", "image_encoder"),
    [
        ("fp32", "fp32", "fp32"),
        ("int4", "int4", "fp32"),
        ("language_model=int4, image_encoder=int8", "int4", "int8"),
        ({"language_model": "int4", "encoder": "int8"}, "int4", "int8"),
        ({"encoder": "int8", "image_encoder": "fp32"}, "fp32", "fp32"),
    ],
)
def test_parts(given, language_model, image_encoder):
    found = parse_precision(given, "cpu")
    assert (found.of_part("language_model"), found.of_part("image_encoder")) == (language_model, image_encoder)


def test_floors():
    assert Precisions().floor(None) is None
    assert Precisions(language_model="int8", encoders={"encoder": "int4"}).floor(None) == FLOORS["int4"]
    assert Precisions(language_model="int8").floor(0.4) == QualityFloor(agreement=0.4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int3"}, "precision 'int3' isn't available on 'cpu': it can fp32, int8, int4"),
        ({"precision": "encoder=int2"}, "precision 'int2' isn't available on 'cpu'"),
        ({"precision": "encoder=int8, encoder=int4"}, "precision: the part 'encoder' is given twice"),
        ({"precision": {"tower": "int4"}}, "precision: unknown part 'tower': name some of language_model, encoder,"),
        ({"precision": "int4", "quality_floor": 2}, "quality_floor: expected a share from 0 to 1, got 2"),
        ({"quality_floor": 0.9}, "quality_floor: at fp32 every token has to be the model's own"),
    ],
)
def test_refused(arguments, message, tmp_path):
    with pytest.raises(BuildError) as raised:
        build_bundle(models.make("llama"), output=tmp_path / "b", progress=False, **arguments)
    assert message in str(raised.value)


@pytest.mark.slow
def test_a_part_that_the_model_lacks(tmp_path):
    asked = {"language_model": "int4", "encoder": "int8"}
    with pytest.raises(BuildError, match="this model has no 'encoder': its parts are language_model"):
        build_bundle(models.make("llama"), precision=asked, output=tmp_path / "b", progress=False)
    assert list(tmp_path.iterdir()) == []
