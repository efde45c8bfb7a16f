"""What is done to programs for other runtimes: each sequence's own last token, weights in files beside each program."""

import shutil

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from genbundle.builder.also import expect_generation
from genbundle.builder.also.data_files import move_programs
from genbundle.builder.limits import Limits
from genbundle.builder.passes.last_tokens import take_last_tokens
from genbundle.bundles.manifest import Generation


def constant(name, array):
    return ir.val(
        name, const_value=ir.tensor(array, name=name), dtype=ir.DataType.from_numpy(array.dtype), shape=array.shape
    )


def head(*, masked=True):
    """Embeddings of 4 tokens, of which the last position goes into the head."""
    ids = ir.val("input_ids", dtype=ir.DataType.INT64, shape=["batch", "sequence"])
    mask = ir.val("attention_mask", dtype=ir.DataType.INT64, shape=["batch", "total"])
    table, weight = (constant(n, np.eye(4, dtype=np.float32) * f) for n, f in (("table", 1), ("head", 2)))
    numbers = [constant(f"n{number}", np.array([number])) for number in (-1, 2**63 - 1, 1)]
    embed = ir.node("Gather", [table, ids])
    last = ir.node("Slice", [embed.outputs[0], numbers[0], numbers[1], numbers[2], numbers[2]])
    product = ir.node("MatMul", [last.outputs[0], weight])
    product.outputs[0].name, product.outputs[0].dtype = "logits", ir.DataType.FLOAT
    product.outputs[0].shape = ir.Shape(["batch", 1, 4])
    graph = ir.Graph(
        [ids, mask] if masked else [ids], product.outputs, nodes=[embed, last, product],
        initializers=[table, weight, *numbers], opset_imports={"": 18},
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def test_each_sequence_has_its_own_last_token(tmp_path):
    model = head()
    assert take_last_tokens(model)
    assert not take_last_tokens(model)
    assert not take_last_tokens(head(masked=False))
    ir.save(model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    ids = np.array([[3, 1, 2], [3, 1, 2], [3, 1, 2]])

    def best(ids, mask):
        logits = session.run(None, {"input_ids": ids, "attention_mask": np.array(mask)})[0]
        assert logits.shape == (len(ids), 1, 4)
        return logits[:, 0].argmax(-1).tolist()

    # Padded on the right, on the left, and not at all; then a step behind five tokens, three of them padding.
    assert best(ids, [[1, 1, 0], [0, 0, 1], [1, 1, 1]]) == [1, 2, 2]
    assert best(ids[:1, :1], [[1, 1, 0, 0, 0, 1]]) == [3]


def outputs(path, feeds):
    return [np.asarray(item) for item in onnxruntime.InferenceSession(path).run(None, feeds)]


@pytest.mark.slow
def test_weights_in_several_files(bundle, tmp_path):
    """A page takes no file larger than 2 GB; here the limit is smaller."""
    shutil.copytree(bundle("chat").path, tmp_path / "b")
    folder = tmp_path / "b"
    (folder / "other.onnx").write_bytes((folder / "decode.onnx").read_bytes())
    (folder / "twin.onnx").write_bytes((folder / "decode.onnx").read_bytes())
    feeds = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    for item in onnxruntime.InferenceSession(folder / "decode.onnx").get_inputs():
        if item.name == "position_ids":
            feeds[item.name] = np.array([[0, 1, 2]])
        elif item.name not in feeds:
            feeds[item.name] = np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32)
    expected = outputs(folder / "decode.onnx", feeds)
    size = (folder / "weights.safetensors").stat().st_size
    files = {"decode.onnx": "onnx/model.onnx", "twin.onnx": "onnx/twin.onnx"}
    counts = move_programs(folder, files, ["other.onnx"], largest=150_000)
    assert counts == {"onnx/model.onnx": 3, "onnx/twin.onnx": 3}
    assert {path.name for path in (folder / "onnx").glob("model*")} == {
        "model.onnx", "model.onnx_data", "model.onnx_data_1", "model.onnx_data_2"
    }  # fmt: skip
    # Each has its own; what stays behind reads theirs.
    assert not (folder / "weights.safetensors").exists()
    assert sum(path.stat().st_size for path in (folder / "onnx").glob("*data*")) < 2.1 * size
    for name in ("onnx/model.onnx", "onnx/twin.onnx", "other.onnx"):
        for found, value in zip(outputs(folder / name, feeds), expected, strict=True):
            np.testing.assert_array_equal(found, value)


def test_what_sampling_and_windows_are_said():
    options = {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "max_new_tokens": 9}
    limits = Limits(capacity=9, window=4, restart=None)
    genai, js = expect_generation(("ort-genai", "transformers.js"), Generation(options=options), limits)
    assert genai.name == "ONNX Runtime GenAI" and len(genai.differs) == 1
    assert genai.differs[0].endswith("through the window of 4 there than alone")
    assert js.differs == ("transformers.js samples without the model's top_p=0.9, which it doesn't know",)
    assert expect_generation(("transformers.js",), Generation(options={"top_p": 0.9}), limits)[0].differs == ()
