"""Every weight once: the pool, and the pass that reads a folded transpose from its original."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from safetensors.numpy import load_file

from genbundle.builder.passes.tied_weights import share_transposed_weights
from genbundle.builder.weights import WeightPool


def test_pool_stores_equal_tensors_once(tmp_path):
    pool, one, other = WeightPool(), torch.randn(40, 30), torch.randn(40, 30)
    keys = [pool.add("a", one), pool.add("b", one.clone()), pool.add("a", other), pool.add("c", one.reshape(30, 40))]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    size = pool.write(tmp_path / "weights.safetensors")
    stored = load_file(tmp_path / "weights.safetensors")
    assert size == 3 * one.numel() * 4
    assert list(stored) == ["a", "a.1", "c"]
    np.testing.assert_array_equal(stored["a.1"], other.numpy())
    slot = pool.slots[keys[2]]
    raw = (tmp_path / "weights.safetensors").read_bytes()[slot.offset : slot.offset + slot.length]
    np.testing.assert_array_equal(np.frombuffer(raw, np.float32).reshape(40, 30), other.numpy())


def test_pool_writes_the_same_bytes_again(tmp_path):
    tensors = [torch.arange(600.0).reshape(20, 30), torch.ones(500, dtype=torch.int64)]
    for name in ("one", "two"):
        pool = WeightPool()
        for index, tensor in enumerate(tensors):
            pool.add(str(index), tensor)
        pool.write(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_pool_keeps_a_number_without_axes(tmp_path):
    pool, number = WeightPool(), torch.tensor(7)
    assert pool.add("number", number) != pool.add("list", number[None])
    pool.write(tmp_path / "weights.safetensors")
    stored = load_file(tmp_path / "weights.safetensors")
    assert {name: array.shape for name, array in stored.items()} == {"number": (), "list": (1,)}
    assert stored["number"] == 7


def _tied_model() -> tuple[ir.Model, np.ndarray]:
    table = np.random.default_rng(0).standard_normal((50, 16), np.float32)
    ids = ir.val("ids", dtype=ir.DataType.INT64, shape=[3])
    embedding = ir.val(
        "embedding", const_value=ir.tensor(table, name="embedding"), dtype=ir.DataType.FLOAT, shape=[50, 16]
    )
    head = ir.val("head", const_value=ir.tensor(table.T.copy(), name="head"), dtype=ir.DataType.FLOAT, shape=[16, 50])
    gather = ir.node("Gather", [embedding, ids])
    multiply = ir.node("MatMul", [gather.outputs[0], head])
    logits = multiply.outputs[0]
    logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape([3, 50])
    graph = ir.Graph([ids], [logits], nodes=[gather, multiply], initializers=[embedding, head], opset_imports={"": 18})
    return ir.Model(graph, ir_version=10), table


def test_share_transposed_weights(tmp_path):
    model, table = _tied_model()
    assert share_transposed_weights(model)
    assert list(model.graph.initializers) == ["embedding"]
    ir.save(model, tmp_path / "tied.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "tied.onnx")
    ids = np.array([4, 0, 49])
    np.testing.assert_allclose(session.run(["logits"], {"ids": ids})[0], table[ids] @ table.T, rtol=1e-5, atol=1e-5)
    assert not share_transposed_weights(model)
