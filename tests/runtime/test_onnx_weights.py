"""Weights that sessions are handed: the same results after their memory was given back, and files that lack them."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from tests.builder.test_passes import constant, model_of, shaped

from genbundle.bundles import BundleError
from genbundle.runtime.backends.onnx_weights import DeviceWeights, ScalesOfBlocks


@pytest.fixture
def program(tmp_path):
    """`y = x * scales + offset`, 300 kB of each in one file beside the program, none of it at the start of a page."""
    rng = np.random.default_rng(0)
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=[75_001])
    parts = [constant(name, rng.standard_normal(75_001).astype(np.float32)) for name in ("scales", "offset")]
    scaled = ir.node("Mul", [x, parts[0]])
    added = ir.node("Add", [scaled.outputs[0], parts[1]])
    (y,) = shaped(added, [75_001])
    y.name = "y"
    ir.save(model_of([x], [y], [scaled, added], parts), tmp_path / "p.onnx", external_data="weights")
    return tmp_path / "p.onnx"


MAKE = pytest.mark.parametrize(
    "make", [ScalesOfBlocks, lambda value: DeviceWeights(value, "cpu")], ids=["on the CPU", "on a device"]
)


def beside_zeros(program):
    """A copy of the program, whose weights are all zero."""
    other = program.parent / "zeros"
    other.mkdir()
    (other / "p.onnx").write_bytes(program.read_bytes())
    (other / "weights").write_bytes(bytes((program.parent / "weights").stat().st_size))
    return other / "p.onnx"


def opened(program, weights):
    """A session of a copy of the program that is handed the program's own weights."""
    options = onnxruntime.SessionOptions()
    weights.share(options, program)
    return onnxruntime.InferenceSession(str(beside_zeros(program)), options, providers=["CPUExecutionProvider"])


@MAKE
def test_a_session_reads_what_it_is_handed(program, make):
    x = np.random.default_rng(1).standard_normal(75_001).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(str(program)).run(None, {"x": x})
    weights = make(onnxruntime.OrtValue)
    session = opened(program, weights)
    if isinstance(weights, ScalesOfBlocks):
        weights.give_back()
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], expected)


def test_programs_in_two_folders_read_each_their_own(program):
    weights, x = DeviceWeights(onnxruntime.OrtValue, "cpu"), np.ones(75_001, np.float32)
    for path in (program, beside_zeros(program)):
        options = onnxruntime.SessionOptions()
        weights.share(options, path)
        (expected,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})
        np.testing.assert_array_equal(onnxruntime.InferenceSession(str(path), options).run(None, {"x": x})[0], expected)


@MAKE
@pytest.mark.parametrize("left", [0, 1000, 300_000])
def test_a_file_that_ends_before_its_weights(program, make, left):
    file = program.parent / "weights"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(BundleError, match=r"doesn't hold the weight '(scales|offset)' as its program has it"):
        opened(program, make(onnxruntime.OrtValue))
