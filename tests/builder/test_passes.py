"""Graph passes: the same results from fewer nodes."""

import io
import math

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from genbundle.builder.passes.batch_transposes import unfuse_batch_transposes
from genbundle.builder.passes.ceilings import divide_upwards
from genbundle.builder.passes.output_rows import keep_output_rows
from genbundle.builder.passes.packed_biases import add_biases_before_split
from genbundle.builder.passes.reshapes import remove_round_trips
from genbundle.builder.passes.tied_weights import share_transposed_weights

FLOAT = ir.DataType.FLOAT


def constant(name: str, array: np.ndarray) -> ir.Value:
    return ir.val(
        name, const_value=ir.tensor(array, name=name), dtype=ir.DataType.from_numpy(array.dtype), shape=array.shape
    )


def shaped(node: ir.Node, *shapes: list) -> list[ir.Value]:
    for output, shape in zip(node.outputs, shapes, strict=True):
        output.shape, output.dtype = ir.Shape(shape), FLOAT
    return list(node.outputs)


def model_of(inputs, outputs, nodes, constants) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": 18})
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, path, **feeds) -> list[np.ndarray]:
    ir.save(model, path)
    return [np.asarray(item) for item in onnxruntime.InferenceSession(path).run(None, feeds)]


def test_a_fused_product_with_a_transposed_batch_is_taken_apart(tmp_path):
    x, weight = ir.val("x", dtype=FLOAT, shape=["length", "batch", 6]), constant("w", np.eye(4, 6, dtype=np.float32))
    options = {"transBatchA": 1, "transB": 1, "alpha": 0.5}
    fused = ir.node("FusedMatMul", [x, weight], domain="com.microsoft", attributes=options)
    (y,) = shaped(fused, ["batch", "length", 4])
    y.name = "y"
    model = model_of([x], [y], [fused], [weight])
    assert unfuse_batch_transposes(model)
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul", "Constant", "Mul", "Transpose"]
    array = np.random.default_rng(0).standard_normal((3, 2, 6), np.float32)
    expected = array.transpose(1, 0, 2)[..., :4] / 2
    np.testing.assert_array_equal(run(model, tmp_path / "a.onnx", x=array)[0], expected)
    assert not unfuse_batch_transposes(model)


def heads_and_back(last: list) -> ir.Model:
    """`[batch, length, 6]` split into heads and joined again, behind and before a Relu; the last shape is given."""
    x = ir.val("x", dtype=FLOAT, shape=["batch", "length", 6])
    apart, together = constant("apart", np.array([0, 0, 3, 2])), constant("together", np.array([0, 0, -1]))
    first = ir.node("Relu", [x])
    (relu,) = shaped(first, ["batch", "length", 6])
    second = ir.node("Reshape", [relu, apart])
    (heads,) = shaped(second, ["batch", "length", 3, 2])
    third = ir.node("Reshape", [heads, together])
    (joined,) = shaped(third, last)
    fourth = ir.node("Neg", [joined])
    (y,) = shaped(fourth, last)
    y.name = "y"
    return model_of([x], [y], [first, second, third, fourth], [apart, together])


def test_reshapes_that_cancel_out_go(tmp_path):
    x = np.random.default_rng(0).standard_normal((2, 5, 6), np.float32)
    model = heads_and_back(["batch", "length", 6])
    expected = run(model, tmp_path / "a.onnx", x=x)
    assert remove_round_trips(model)
    assert [node.op_type for node in model.graph] == ["Relu", "Neg"] and not model.graph.initializers
    np.testing.assert_array_equal(run(model, tmp_path / "b.onnx", x=x), expected)
    assert not remove_round_trips(model)


def test_reshapes_of_unknown_or_other_sizes_stay():
    for last in (["batch", None, 6], ["batch", "other", 6], ["batch", "length", 3, 2][:3]):
        model = heads_and_back(last)
        assert not remove_round_trips(model)
        assert len(model.graph) == 4


def packed(*biases: np.ndarray | None, read_twice: bool = False) -> ir.Model:
    """`[batch, 6]` split into 3, 2 and 1, a bias added to some parts."""
    x, sizes = ir.val("x", dtype=FLOAT, shape=["batch", 6]), constant("sizes", np.array([3, 2, 1]))
    split = ir.node("Split", [x, sizes], attributes={"axis": -1}, num_outputs=3)
    parts = shaped(split, ["batch", 3], ["batch", 2], ["batch", 1])
    nodes, constants, outputs = [split], [sizes], []
    for index, (part, bias) in enumerate(zip(parts, biases, strict=True)):
        if bias is not None:
            constants.append(constant(f"bias{index}", bias))
            nodes.append(ir.node("Add", [constants[-1], part] if index else [part, constants[-1]]))
            (part,) = shaped(nodes[-1], list(part.shape))
        nodes.append(ir.node("Relu", [part]))
        outputs += shaped(nodes[-1], list(part.shape))
    if read_twice:
        nodes.append(ir.node("Neg", [parts[0]]))
        outputs += shaped(nodes[-1], ["batch", 3])
    for index, output in enumerate(outputs):
        output.name = f"y{index}"
    return model_of([x], outputs, nodes, constants)


def test_biases_behind_a_split_become_one_before_it(tmp_path):
    x = np.random.default_rng(0).standard_normal((4, 6), np.float32)
    for biases in ((np.float32([1, 2, 3]), np.float32([4, 5]), np.float32([6])), (None, np.float32([4, -5]), None)):
        model = packed(*biases)
        expected = run(model, tmp_path / "a.onnx", x=x)
        assert add_biases_before_split(model)
        assert [node.op_type for node in model.graph].count("Add") == 1
        for found, want in zip(run(model, tmp_path / "b.onnx", x=x), expected, strict=True):
            np.testing.assert_array_equal(found, want)
        assert not add_biases_before_split(model)


def test_a_part_that_is_also_read_without_its_bias_keeps_it():
    model = packed(np.float32([1, 2, 3]), None, None, read_twice=True)
    assert not add_biases_before_split(model)
    assert not add_biases_before_split(packed(np.ones((4, 3), np.float32), None, None)), "no bias of one row"


class _Blocks(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, math.ceil(x.shape[1] / 4) * 4 - x.shape[1])).cumsum(1)


def test_a_size_rounded_up_can_be_saved():
    exported = torch.export.export(_Blocks(), (torch.randn(2, 9),), dynamic_shapes=({1: torch.export.Dim.AUTO},))
    assert divide_upwards(exported.graph)
    assert not divide_upwards(exported.graph)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for size in (8, 9, 11):
        torch.testing.assert_close(loaded(torch.ones(2, size)), _Blocks()(torch.ones(2, size)))


def test_weights_keep_a_row_for_each_output(tmp_path):
    rng = np.random.default_rng(0)
    x = ir.val("x", dtype=FLOAT, shape=["batch", "length", 32])
    weight, other = (rng.standard_normal((32, 48), np.float32) for _ in range(2))
    one, two = constant("one", weight), constant("two", other)
    products = [ir.node("MatMul", [x, one]), ir.node("MatMul", [x, one]), ir.node("Add", [x, two])]
    outputs = [output for node in products for output in shaped(node, ["batch", "length", 48])]
    for name, output in zip("abc", outputs, strict=True):
        output.name = name
    model = model_of([x], outputs[:2], products[:2], [one, two])
    assert keep_output_rows(model) and tuple(one.shape or ()) == (48, 32)
    assert [node.op_type for node in model.graph] == ["FusedMatMul"] * 2
    assert tuple(two.const_value.shape) == (32, 48), "not a product's"
    array = rng.standard_normal((2, 3, 32), np.float32)
    for found in run(model, tmp_path / "a.onnx", x=array):
        np.testing.assert_allclose(found, array @ weight, rtol=1e-5, atol=1e-5)
    assert not keep_output_rows(model)


def test_a_product_in_the_body_of_an_if_keeps_its_weight(tmp_path):
    rng = np.random.default_rng(0)
    x, taken = ir.val("x", dtype=FLOAT, shape=["length", 32]), ir.val("taken", dtype=ir.DataType.BOOL, shape=[])
    weight = rng.standard_normal((32, 48), np.float32)
    one, table, index = constant("one", weight), constant("table", weight.T.copy()), constant("row", np.int64(0))
    product, other = ir.node("MatMul", [x, one]), ir.node("Sub", [x, x])
    nothing = ir.node("MatMul", [other.outputs[0], one])
    bodies = {
        "then_branch": ir.Graph([], shaped(product, ["length", 48]), nodes=[product], name="then"),
        "else_branch": ir.Graph([], shaped(nothing, ["length", 48]), nodes=[other, nothing], name="else"),
    }
    chosen, row = ir.node("If", [taken], attributes=bodies), ir.node("Gather", [table, index])
    outputs = [*shaped(chosen, ["length", 48]), *shaped(row, [32])]
    outputs[0].name, outputs[1].name = "a", "b"
    model = model_of([x, taken], outputs, [chosen, row], [one, table, index])
    assert not keep_output_rows(model)
    assert not share_transposed_weights(model)
    array = rng.standard_normal((3, 32), np.float32)
    for said in (True, False):
        found = run(model, tmp_path / "a.onnx", x=array, taken=np.array(said))[0]
        np.testing.assert_allclose(found, array @ weight * said, rtol=1e-5, atol=1e-5)
