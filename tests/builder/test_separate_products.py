"""Packed feed-forward projections as products of their own: the same results."""

import numpy as np
import onnx_ir as ir
import pytest
from tests.builder.test_passes import FLOAT, constant, model_of, run, shaped

from genbundle.builder.passes.separate_products import multiply_apart

RNG = np.random.default_rng(0)
WIDTH, INNER = 6, 5


class Packed:
    """`x [batch, length, 6]` by one matrix for the gate and the up projection; what a test changes before `model()`."""

    def __init__(self, *, sizes: list[int] | None = None, parts: int = 2):
        self.x = ir.val("x", dtype=FLOAT, shape=["batch", "length", WIDTH])
        self.constants = [constant("w", RNG.standard_normal((WIDTH, parts * INNER), np.float32))]
        self.product = ir.node("MatMul", [self.x, self.constants[0]])
        (packed,) = shaped(self.product, ["batch", "length", parts * INNER])
        given = [] if sizes is None else [constant("sizes", np.array(sizes))]
        self.constants += given
        attributes = {"axis": -1} if given else {"axis": 2, "num_outputs": parts}
        self.split = ir.node("Split", [packed, *given], attributes=attributes, num_outputs=parts)
        self.nodes = [self.product, self.split]

    def gated(self) -> "Packed":
        gate = ir.node("Sigmoid", [self.split.outputs[0]])
        bias = constant("bias", RNG.standard_normal(INNER).astype(np.float32))
        self.constants.append(bias)
        added = ir.node("Add", [self.split.outputs[1], bias])
        self.nodes += [gate, added, ir.node("Mul", [gate.outputs[0], added.outputs[0]])]
        return self

    def model(self, *others: ir.Value) -> ir.Model:
        (y,) = shaped(self.nodes[-1], ["batch", "length", INNER])
        y.name = "y"
        return model_of([self.x], [y, *others], self.nodes, self.constants)


@pytest.mark.parametrize("sizes", [None, [INNER, INNER]])
def test_gate_and_up_become_products_of_their_own(tmp_path, sizes):
    model = Packed(sizes=sizes).gated().model()
    x = RNG.standard_normal((2, 3, WIDTH), np.float32)
    expected = run(model, tmp_path / "a.onnx", x=x)[0]
    assert multiply_apart(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMul", "Sigmoid", "Add", "Mul"]
    assert set(model.graph.initializers) == {"w_part_0", "w_part_1", "bias"}
    np.testing.assert_allclose(run(model, tmp_path / "b.onnx", x=x)[0], expected, rtol=1e-6, atol=1e-6)
    assert not multiply_apart(model)


def test_parts_of_other_sizes_and_taken_names(tmp_path):
    packed = Packed(sizes=[3, 7])
    taken = constant("w_part_1", RNG.standard_normal(7).astype(np.float32))
    packed.constants.append(taken)
    first, last = ir.node("Neg", [packed.split.outputs[0]]), ir.node("Mul", [packed.split.outputs[1], taken])
    packed.nodes += [first, last]
    (z,), (y,) = shaped(first, ["batch", "length", 3]), shaped(last, ["batch", "length", 7])
    y.name, z.name = "y", "z"
    model = model_of([packed.x], [y, z], packed.nodes, packed.constants)
    x = RNG.standard_normal((2, 3, WIDTH), np.float32)
    expected = run(model, tmp_path / "a.onnx", x=x)
    assert multiply_apart(model)
    for result, want in zip(run(model, tmp_path / "b.onnx", x=x), expected, strict=True):
        np.testing.assert_allclose(result, want, rtol=1e-6, atol=1e-6)


def test_what_attention_reads_stays_together():
    packed = Packed(parts=3)
    heads = constant("heads", np.array([0, 0, -1, 1]))
    bias = constant("bias", np.ones(INNER, np.float32))
    packed.constants += [heads, bias]
    for part in packed.split.outputs:
        added = ir.node("Add", [part, bias])
        packed.nodes += [added, ir.node("Reshape", [added.outputs[0], heads])]
    (y,) = shaped(packed.nodes[-1], ["batch", "length", INNER, 1])
    y.name = "y"
    assert not multiply_apart(model_of([packed.x], [y], packed.nodes, packed.constants))


def test_what_is_read_elsewhere_stays_together():
    packed = Packed().gated()
    other = ir.node("MatMul", [packed.x, packed.constants[0]])
    (z,) = shaped(other, ["batch", "length", 2 * INNER])
    z.name = "z"
    packed.nodes.insert(0, other)
    assert not multiply_apart(packed.model(z)), "the weight"
    packed = Packed().gated()
    z = packed.product.outputs[0]
    z.name = "z"
    assert not multiply_apart(packed.model(z)), "the product"
    packed = Packed().gated()
    (z, _) = shaped(packed.split, *[["batch", "length", INNER]] * 2)
    z.name = "z"
    assert not multiply_apart(packed.model(z)), "a part"
