"""Feed-forward layers with their weights on the left: the same results."""

import numpy as np
import onnx_ir as ir
import pytest
from tests.builder.test_passes import FLOAT, constant, model_of, run, shaped

from genbundle.builder.passes.engine_optimized import optimize
from genbundle.builder.passes.left_products import multiply_from_the_left

RNG = np.random.default_rng(0)
WIDTH, INNER = 6, 10


def product(values: ir.Value, weight: ir.Value, **attributes) -> ir.Node:
    attributes = {"transB": 1, "alpha": 1.0, **attributes}
    return ir.node("FusedMatMul", [values, weight], attributes=attributes, domain="com.microsoft")


def weights(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


class Layer:
    """`x [batch, length, 6]` through a layer; what a test changes of it before `model()`."""

    def __init__(self, *, gated: bool, last: tuple[int, int] = (WIDTH, INNER), **attributes):
        self.x = ir.val("x", dtype=FLOAT, shape=["batch", "length", WIDTH])
        first = constant("first", weights(INNER, WIDTH))
        bias, half = constant("bias", weights(INNER)), constant("half", np.array(0.5, np.float32))
        self.outputs = last[0]
        self.constants = [first, bias, half, constant("last", weights(*last))]
        self.nodes = [product(self.x, first, **attributes)]
        if gated:
            self.constants.append(constant("up", weights(INNER, WIDTH)))
            up, gate = product(self.x, self.constants[-1]), ir.node("Sigmoid", self.nodes[0].outputs)
            self.nodes += [up, gate, ir.node("Mul", [gate.outputs[0], up.outputs[0]])]
        else:
            added = ir.node("Add", [bias, self.nodes[0].outputs[0]])
            self.nodes += [added, ir.node("Tanh", added.outputs)]
            self.nodes.append(ir.node("Mul", [self.nodes[-1].outputs[0], half]))
        self.nodes.append(product(self.nodes[-1].outputs[0], self.constants[3]))
        self.others: list[ir.Value] = []

    def model(self) -> ir.Model:
        (y,) = shaped(self.nodes[-1], ["batch", "length", self.outputs])
        y.name = "y"
        used = {value for node in self.nodes for value in node.inputs}
        return model_of([self.x], [y, *self.others], self.nodes, [item for item in self.constants if item in used])


@pytest.mark.parametrize("gated", [False, True])
def test_tokens_become_columns_between_the_products(tmp_path, gated):
    model = Layer(gated=gated).model()
    arrays = [weights(*shape, WIDTH) for shape in ((1, 1), (1, 7), (3, 1), (2, 5))]
    expected = [run(model, tmp_path / "a.onnx", x=array)[0] for array in arrays]
    assert multiply_from_the_left(model)
    kinds = [node.op_type for node in model.graph]
    assert "FusedMatMul" not in kinds
    assert kinds.count("MatMul") == (3 if gated else 2)
    left = [node.inputs[0] for node in model.graph if node.op_type == "MatMul"]
    assert all(value is not None and value.is_initializer() for value in left)
    assert all(value.uses() for value in model.graph.initializers.values())
    counted = [
        value.shape for node in model.graph if node.op_type in ("Sigmoid", "Tanh", "Mul") for value in node.outputs
    ]
    assert counted == [[INNER, "batch*length"]] * 2
    assert model.graph.outputs[0].shape == ["batch", "length", WIDTH]
    for array, want in zip(arrays, expected, strict=True):
        np.testing.assert_allclose(run(model, tmp_path / "b.onnx", x=array)[0], want, rtol=1e-5, atol=1e-5)
    assert not multiply_from_the_left(model)


def test_gate_and_up_by_weights_of_their_own_stay_in_order(tmp_path):
    """The activation stands between the two products, and what it reads before it."""
    layer = Layer(gated=False)
    up = constant("up", weights(INNER, WIDTH))
    layer.constants.append(up)
    other = product(layer.x, up)
    layer.nodes.insert(3, other)
    layer.nodes[4].replace_input_with(1, other.outputs[0])
    model = layer.model()
    array = weights(2, 3, WIDTH)
    expected = run(model, tmp_path / "a.onnx", x=array)[0]
    assert multiply_from_the_left(model)
    known = {*model.graph.inputs, *model.graph.initializers.values()}
    for node in model.graph:
        assert set(node.inputs) <= known
        known |= set(node.outputs)
    np.testing.assert_allclose(run(model, tmp_path / "b.onnx", x=array)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "tanh"])
def test_gelu_that_the_engine_fused_with_its_bias(tmp_path, kind):
    layer = Layer(gated=False)
    gelu = ir.node("Gelu", layer.nodes[1].outputs, attributes={"approximate": kind})
    layer.nodes[2:4] = [gelu]
    layer.nodes[-1] = product(gelu.outputs[0], layer.constants[3])
    model = layer.model()
    model.graph.opset_imports[""], model.graph.opset_imports["com.microsoft"] = 20, 1
    array = weights(2, 3, WIDTH)
    expected = run(model, tmp_path / "a.onnx", x=array)[0]
    optimized, complete = optimize(model)
    fused = {"none": "BiasGelu", "tanh": "FastGelu"}[kind]
    assert complete and fused in [node.op_type for node in optimized.graph]
    assert multiply_from_the_left(optimized)
    assert "Add" in [node.op_type for node in optimized.graph]
    np.testing.assert_allclose(run(optimized, tmp_path / "b.onnx", x=array)[0], expected, rtol=1e-5, atol=1e-5)


def test_layers_stay_where_tokens_have_to_be_rows():
    assert not multiply_from_the_left(Layer(gated=False, last=(WIDTH + 1, INNER)).model()), "other features come out"
    assert not multiply_from_the_left(Layer(gated=False, alpha=0.5).model())
    layer = Layer(gated=False)
    layer.nodes[2] = ir.node("Softmax", layer.nodes[1].outputs, attributes={"axis": -1})
    layer.nodes[3].replace_input_with(0, layer.nodes[2].outputs[0])
    assert not multiply_from_the_left(layer.model()), "across the features"
    layer = Layer(gated=False)
    read = ir.node("Neg", layer.nodes[2].outputs)
    (value,) = shaped(read, ["batch", "length", INNER])
    value.name = "z"
    layer.nodes.insert(3, read)
    layer.others.append(value)
    assert not multiply_from_the_left(layer.model()), "also an output by another way"
    layer = Layer(gated=False)
    layer.constants[1] = constant("bias", weights(5, INNER))
    layer.nodes[1].replace_input_with(0, layer.constants[1])
    assert not multiply_from_the_left(layer.model()), "a number for each token"
