"""Graphs in 16 bits: what has to stay in float32 does, and what a GPU computes in bfloat16 runs here through a twin."""

import numpy as np
import onnx_ir as ir
import pytest
from tests.builder.test_passes import FLOAT, constant, model_of, run

from genbundle.builder.passes.half_precision import compute_in_float32, halve

FLOAT16, BFLOAT16, INT64 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT64
RNG = np.random.default_rng(0)
MATRIX = RNG.standard_normal((32, 32), np.float32) / 6


def graph(inputs: list[ir.Value], nodes: list[ir.Node], constants: list[ir.Value], output: str, last: str) -> ir.Model:
    """A graph of nodes with one float result each; the last node's is the output, `[last, 32]`."""
    for index, node in enumerate(nodes):
        node.outputs[0].type, node.outputs[0].name = ir.TensorType(FLOAT), f"value_{index}"
    (y,) = nodes[-1].outputs
    y.name, y.shape = output, ir.Shape([last, 32])
    return model_of(inputs, [y], nodes, constants)


def typed_operators(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {node.op_type: node.outputs[0].dtype for node in model.graph if node.op_type != "Cast"}


def rotated(dtype: ir.DataType) -> tuple[ir.Model, np.ndarray, np.ndarray]:
    """`(x @ W) * cos(positions * frequencies)` in `dtype`."""
    x = ir.val("x", dtype=FLOAT, shape=["batch", 32])
    positions = ir.val("positions", dtype=INT64, shape=["batch", 1])
    frequencies = constant("f", (10000.0 ** (-np.arange(32) / 32)).astype(np.float32)[None])
    weight = constant("w", MATRIX)
    product = ir.node("MatMul", [x, weight])
    number = ir.node("Cast", [positions], attributes={"to": int(FLOAT)})
    angle = ir.node("Mul", [number.outputs[0], frequencies])
    turn = ir.node("Cos", angle.outputs)
    result = ir.node("Mul", [product.outputs[0], turn.outputs[0]])
    model = graph([x, positions], [product, number, angle, turn, result], [frequencies, weight], "y", "batch")
    halve(model, (), dtype)
    places = np.array([[3], [2047], [4097], [30001]])
    return model, RNG.standard_normal((4, 32), np.float32), places


def test_positions_stay_in_float32(tmp_path):
    """In float16, 4097 is 4096, and the frequencies' rounding alone turns a place beyond 2000 by more than a radian."""
    model, x, places = rotated(FLOAT16)
    assert typed_operators(model) == {"MatMul": FLOAT16, "Mul": FLOAT, "Cos": FLOAT}
    assert [value.dtype for value in model.graph.outputs] == [FLOAT]
    assert model.graph.initializers["w.float16"].dtype == FLOAT16 and "w" not in model.graph.initializers
    expected = (x @ MATRIX) * np.cos(places * 10000.0 ** (-np.arange(32) / 32))
    (found,) = run(model, tmp_path / "a.onnx", x=x, positions=places)
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_a_twin_computes_what_bfloat16_means(tmp_path):
    model, x, places = rotated(BFLOAT16)
    path = tmp_path / "a.onnx"
    with pytest.raises(Exception, match=r"Could not find an implementation for MatMul\(13\)|NOT_IMPLEMENTED"):
        run(model, path, x=x, positions=places)
    twin = ir.load(path)
    compute_in_float32(twin)
    assert {node.outputs[0].dtype for node in twin.graph if node.op_type == "MatMul"} == {FLOAT}
    (found,) = run(twin, tmp_path / "b.onnx", x=x, positions=places)
    expected = (x @ MATRIX) * np.cos(places * 10000.0 ** (-np.arange(32) / 32))
    difference = np.abs(found - expected).max()
    assert 1e-3 < difference < 0.05  # eight bits of mantissa, and no fewer


def test_squares_of_large_numbers_do_not_overflow(tmp_path):
    x = ir.val("x", dtype=FLOAT, shape=["batch", 32])
    two, weight = constant("two", np.array(2.0, np.float32)), constant("w", np.eye(32, dtype=np.float32))
    product = ir.node("MatMul", [x, weight])
    square = ir.node("Pow", [product.outputs[0], two])
    mean = ir.node("ReduceMean", square.outputs, attributes={"keepdims": 1})
    root = ir.node("Sqrt", mean.outputs)
    scaled = ir.node("Div", [product.outputs[0], root.outputs[0]])
    model = graph([x], [product, square, mean, root, scaled], [two, weight], "y", "batch")
    halve(model, (), FLOAT16)
    array = RNG.standard_normal((4, 32), np.float32) * 1000
    (found,) = run(model, tmp_path / "a.onnx", x=array)
    np.testing.assert_allclose(found, array / np.sqrt(np.mean(array**2)), atol=0.01)


def test_a_masks_smallest_number_stays_one(tmp_path):
    """Infinite in float16, it would make NaN of a row that is hidden as a whole."""
    x, hidden = ir.val("x", dtype=FLOAT, shape=["batch", 32]), ir.val("hidden", dtype=ir.DataType.BOOL, shape=[32])
    least, weight = constant("least", np.array(np.finfo(np.float32).min)), constant("w", MATRIX)
    product = ir.node("MatMul", [x, weight])
    masked = ir.node("Where", [hidden, least, product.outputs[0]])
    chances = ir.node("Softmax", masked.outputs)
    model = graph([x, hidden], [product, masked, chances], [least, weight], "y", "batch")
    halve(model, (), FLOAT16)
    assert typed_operators(model) == {"MatMul": FLOAT16, "Where": FLOAT16, "Softmax": FLOAT}
    array = RNG.standard_normal((2, 32), np.float32)
    (found,) = run(model, tmp_path / "a.onnx", x=array, hidden=np.ones(32, bool))
    np.testing.assert_allclose(found, 1 / 32, atol=1e-3)


def test_state_goes_in_and_out_in_16_bits(tmp_path):
    past, x = ir.val("past", dtype=FLOAT, shape=["past", 32]), ir.val("x", dtype=FLOAT, shape=["new", 32])
    weight = constant("w", MATRIX)
    product = ir.node("MatMul", [x, weight])
    square = ir.node("Mul", [product.outputs[0], product.outputs[0]])
    joined = ir.node("Concat", [past, square.outputs[0]], attributes={"axis": 0})
    model = graph([past, x], [product, square, joined], [weight], "present", "total")
    halve(model, {"past", "present"}, FLOAT16)
    before, array = np.ones((3, 32), np.float16), RNG.standard_normal((2, 32), np.float32)
    (found,) = run(model, tmp_path / "a.onnx", past=before, x=array)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, np.concatenate([before, (array @ MATRIX) ** 2]), atol=0.01)


def test_what_a_branch_reads_is_float32(tmp_path):
    x, chosen = ir.val("x", dtype=FLOAT, shape=["batch", 32]), ir.val("chosen", dtype=ir.DataType.BOOL, shape=[])
    weight = constant("w", MATRIX)
    product = ir.node("MatMul", [x, weight])
    product.outputs[0].type, product.outputs[0].name = ir.TensorType(FLOAT), "product"
    negative = ir.node("Neg", product.outputs)
    negative.outputs[0].type, negative.outputs[0].name = ir.TensorType(FLOAT), "negative"
    same = ir.node("Identity", product.outputs)
    same.outputs[0].type, same.outputs[0].name = ir.TensorType(FLOAT), "same"
    bodies = {
        "then_branch": ir.Graph([], [negative.outputs[0]], nodes=[negative], name="then"),
        "else_branch": ir.Graph([], [same.outputs[0]], nodes=[same], name="else"),
    }
    branch = ir.node("If", [chosen], attributes=bodies)
    y = branch.outputs[0]
    y.type, y.name, y.shape = ir.TensorType(FLOAT), "y", ir.Shape(["batch", 32])
    model = model_of([x, chosen], [y], [product, branch], [weight])
    halve(model, (), FLOAT16)
    array = RNG.standard_normal((2, 32), np.float32)
    for taken, sign in ((True, -1), (False, 1)):
        (found,) = run(model, tmp_path / "a.onnx", x=array, chosen=np.array(taken))
        np.testing.assert_allclose(found, sign * (array @ MATRIX), atol=0.01)
