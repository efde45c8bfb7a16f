"""What goes into ONNX programs and comes out of them, on graphs of one operator."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from tests.bundles.samples import fill, manifest, program

from genbundle.bundles import BundleError
from genbundle.bundles.manifest import Input, Output, Source
from genbundle.bundles.writer import new_bundle
from genbundle.runtime import load_bundle
from genbundle.runtime.backends.onnxruntime import OnnxProgram


def negative(shape: list, *, handed_on: bool = False) -> bytes:
    """A program `logits = -past`; with `handed_on`, `past` comes out too."""
    past = ir.Value(name="past", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Neg", [past])
    logits = node.outputs[0]
    logits.name, logits.shape, logits.type = "logits", past.shape, past.type
    outputs = [past, logits] if handed_on else [logits]
    graph = ir.Graph([past], outputs, nodes=[node], opset_imports={"": 20}, name="graph")
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()


def opened(shape: list) -> OnnxProgram:
    session = onnxruntime.InferenceSession(negative(shape), providers=["CPUExecutionProvider"])
    return OnnxProgram(onnxruntime, session, "negative", "cpu", {})


def test_a_number_stays_one():
    assert opened([])({"past": np.full((), 3, np.float32)})["logits"].numpy().shape == ()


@pytest.mark.parametrize(
    "array",
    [
        np.broadcast_to(np.float32(2), (3, 4)),
        np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
        np.arange(24, dtype=np.float32).reshape(3, 8)[:, ::2],
        np.zeros((0, 4), np.float32),
    ],
    ids=["broadcast", "columns", "strides", "empty"],
)
def test_arrays_however_they_lie(array):
    np.testing.assert_array_equal(opened(["a", 4])({"past": array})["logits"].numpy(), -array)


def test_a_program_whose_output_is_its_input_is_refused(tmp_path):
    """ONNX Runtime gives back the memory that it was given, which nobody keeps."""
    past = Input(name="past", dtype="float32", shape=("batch", 4), source=Source(kind="state", name="0.key"))
    outputs = (
        Output(name="logits", dtype="float32", shape=("batch", 4)),
        Output(name="past", dtype="float32", shape=("batch", 4), state="0.key"),
    )
    state = replace(manifest().state[0], shape=("batch", 4), axis=None)
    with new_bundle(tmp_path / "sample.bundle") as writer:
        fill(writer.path)
        (writer.path / "decode.onnx").write_bytes(negative(["batch", 4], handed_on=True))
        made = writer.commit(manifest(programs=(program(inputs=(past,), outputs=outputs),), state=(state,)))
    with pytest.raises(BundleError, match=r"decode\.onnx: the output past is an input"):
        load_bundle(made.path).generate(input_ids=[[1, 2]])
