"""Graphs as ONNX Runtime leaves them: the same results, and large weights untouched."""

import numpy as np
import onnx_ir as ir
import onnxruntime
from tests.builder.test_passes import FLOAT, constant, model_of, run

from genbundle.builder.passes.engine_optimized import optimize

RNG = np.random.default_rng(0)
LARGE = RNG.standard_normal((512, 640), np.float32)  # 1.25 MiB


def last(node: ir.Node) -> ir.Value:
    """The node's output as the graph's."""
    (y,) = node.outputs
    y.name, y.dtype = "y", FLOAT
    return y


def test_operators_are_fused_and_large_weights_stay_the_tensors_that_they_are(tmp_path):
    x, weight = ir.val("x", dtype=FLOAT, shape=["batch", 512]), constant("w", LARGE)
    scale = constant("scale", np.array(1.702, np.float32))
    product = ir.node("MatMul", [x, weight])
    scaled = ir.node("Mul", [product.outputs[0], scale])
    gate = ir.node("Sigmoid", scaled.outputs)
    gated = ir.node("Mul", [product.outputs[0], gate.outputs[0]])
    model = model_of([x], [last(gated)], [product, scaled, gate, gated], [weight, scale])
    model.meta["largest"] = {"batch": 8}
    array, stored = RNG.standard_normal((3, 512), np.float32), weight.const_value
    expected = run(model, tmp_path / "a.onnx", x=array)

    optimized, complete = optimize(model)

    assert complete
    assert [node.op_type for node in optimized.graph] == ["MatMul", "QuickGelu"]
    assert list(optimized.graph.initializers) == ["w"] and optimized.graph.initializers["w"].const_value is stored
    assert [value.name for value in optimized.graph.inputs] == ["x"]
    assert optimized.meta["largest"] == {"batch": 8}
    assert set(optimized.graph.opset_imports) == {"", "com.microsoft"}
    np.testing.assert_allclose(run(optimized, tmp_path / "b.onnx", x=array), expected, rtol=1e-6)
    # The given one is as before.
    assert set(model.graph.initializers) == {"w", "scale"}
    np.testing.assert_array_equal(run(model, tmp_path / "c.onnx", x=array), expected)


def test_what_is_folded_from_a_large_weight_is_left_for_opening(tmp_path):
    x, weight = ir.val("x", dtype=FLOAT, shape=["batch", 640]), constant("w", LARGE)
    turned = ir.node("Softmax", [weight])
    turned.outputs[0].name = "turned"
    fourth = ir.node("Transpose", turned.outputs, attributes={"perm": [1, 0]})
    product = ir.node("MatMul", [x, fourth.outputs[0]])
    model = model_of([x], [last(product)], [turned, fourth, product], [weight])
    array = RNG.standard_normal((3, 640), np.float32)
    expected = run(model, tmp_path / "a.onnx", x=array)
    optimized, complete = optimize(model)
    assert not complete
    np.testing.assert_allclose(run(optimized, tmp_path / "b.onnx", x=array), expected, rtol=1e-6)


def test_convolutions_are_laid_out_at_opening(tmp_path):
    x, weight = ir.val("x", dtype=FLOAT, shape=[1, 3, 8, 8]), constant("w", np.ones((4, 3, 3, 3), np.float32))
    convolution = ir.node("Conv", [x, weight])
    model = model_of([x], [last(convolution)], [convolution], [weight])
    assert not optimize(model)[1]


def test_what_the_engine_refuses_is_left_to_its_replay():
    x = ir.val("x", dtype=FLOAT, shape=["batch", 640])
    unknown = ir.node("NoSuchOperator", [x], domain="com.microsoft")
    model = model_of([x], [last(unknown)], [unknown], [])
    model.graph.opset_imports["com.microsoft"] = 1
    assert optimize(model) == (model, False)


def test_a_graph_does_not_grow_by_folding():
    x, sizes = ir.val("x", dtype=FLOAT, shape=["batch", 640]), constant("sizes", np.array([1024, 640]))
    ones = ir.node("ConstantOfShape", [sizes])
    ones.outputs[0].name = "ones"
    sum_ = ir.node("Gemm", [x, ones.outputs[0]], attributes={"transB": 1})
    model = model_of([x], [last(sum_)], [ones, sum_], [sizes])
    assert optimize(model) == (model, False)


def test_a_bundle_opens_without_graph_work(loaded):
    model = loaded("qwen2", "cpu")
    for entry in model.bundle.manifest.programs:
        assert entry.optimized
        options = model.backend.program(entry.name).session.get_session_options()
        assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
