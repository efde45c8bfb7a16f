"""Weights in blocks of 4 and 8 bits on ONNX Runtime: near the products that they replace, and shared where tied."""

import numpy as np
import onnx_ir as ir
import pytest

from genbundle.builder.passes.weight_only import quantize_weights

ROWS = 50


def random(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def graph(width: int, **weights: np.ndarray):
    """Inputs `x` and `ids`, `places`; the initializers; and a function that makes the model from nodes."""
    kinds = {"x": (ir.DataType.FLOAT, ["n", width]), "ids": (ir.DataType.INT64, ["n"])}
    kinds["places"] = (ir.DataType.INT64, ["n"])
    values = {name: ir.val(name, dtype=dtype, shape=ir.Shape(shape)) for name, (dtype, shape) in kinds.items()}
    for name, array in weights.items():
        tensor = ir.tensor(array, name=name)
        values[name] = ir.val(name, dtype=tensor.dtype, shape=ir.Shape(array.shape), const_value=tensor)
    return values


def model(values, nodes) -> ir.Model:
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"out{number}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    inputs = [values[name] for name in ("x", "ids", "places")]
    initializers = [value for name, value in values.items() if value.const_value is not None]
    made = ir.Graph(
        inputs,
        [node.outputs[0] for node in nodes],
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": 20, "com.microsoft": 1},
        name="test",
    )
    return ir.Model(made, ir_version=10)


def run(made: ir.Model, feeds):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(made).SerializeToString(), options)
    return session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})


def everything(width: int) -> ir.Model:
    values = graph(
        width,
        linear=random(width, 40),
        gemm=random(48, width),
        bias=random(48),
        tied=random(ROWS, width),
        places_table=random(ROWS, width),
        experts=random(2, width, 20),
    )
    share = {"transB": 1, "alpha": 1.0}
    return model(
        values,
        [
            ir.node("MatMul", [values["x"], values["linear"]]),
            ir.node("Gemm", [values["x"], values["gemm"], values["bias"]], attributes={"transB": 1}),
            ir.node("FusedMatMul", [values["x"], values["tied"]], attributes=share, domain="com.microsoft"),
            ir.node("Gather", [values["tied"], values["ids"]]),
            ir.node("Gather", [values["places_table"], values["places"]]),
            ir.node("MatMul", [values["x"], values["experts"]]),
        ],
    )


@pytest.mark.parametrize("width", [64, 96, 192, 128])
@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.2)])
def test_products_and_tables(width, bits, error):
    feeds = {"x": random(5, width), "ids": np.array([0, 7, 49]), "places": np.array([3, 2, 1])}
    expected = run(everything(width), feeds)
    rounded = everything(width)
    done = quantize_weights(rounded, bits, tokens=["ids"])
    assert done.modified and set(done.kept) == {"places_table", "experts"} and done.rows == {"ids": ROWS}
    for want, got in zip(expected, run(rounded, feeds), strict=True):
        assert got.shape == want.shape
        assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < error
    np.testing.assert_array_equal(run(rounded, feeds)[4], expected[4])
    # Head and embedding read the same bytes, in two shapes.
    tied = [value.const_value for name, value in rounded.graph.initializers.items() if name.startswith("tied_")]
    assert len({tensor.tobytes() for tensor in tied if tensor.dtype == ir.DataType.UINT8 and tensor.nbytes > 900}) == 1
    assert sum(tensor.nbytes for tensor in tied if tensor.dtype == ir.DataType.FLOAT) * 8 / (ROWS * width) <= 1


# 96 has an odd number of blocks of 32, 64 one block, 192 three of 64: zero points of 4 bits stand in half a byte.
@pytest.mark.parametrize("width", [64, 96, 192, 128])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("skewed", [False, True])
def test_zero_points_at_4_bits_where_a_matrix_is_skewed(width, tokens, skewed):
    """The middle that operators take where they are left out is the one meant. One token has kernels of its own."""
    table = np.random.default_rng(0).uniform(0.0 if skewed else -1.0, 1.0, (ROWS, width)).astype(np.float32)
    feeds = {"x": random(tokens, width), "ids": np.array([0, 7, 49]), "places": np.array([0])}

    def both() -> ir.Model:
        values = graph(width, tied=table, columns=np.ascontiguousarray(table.T))
        share = {"transB": 1, "alpha": 1.0}
        product = ir.node("FusedMatMul", [values["x"], values["tied"]], attributes=share, domain="com.microsoft")
        looked_up = ir.node("Gather", [values["tied"], values["ids"]])
        return model(values, [product, looked_up, ir.node("MatMul", [values["x"], values["columns"]])])

    rounded = both()
    assert quantize_weights(rounded, 4, tokens=["ids"]).modified
    stored = {name: value.const_value for name, value in rounded.graph.initializers.items()}
    assert ("tied_4bit_zero_points" in stored) == ("columns_4bit_zero_points" in stored) == skewed
    for name, tensor in stored.items():  # whichever way a matrix lies
        if name.startswith("columns"):
            assert tensor.tobytes() == stored[name.replace("columns", "tied")].tobytes()
    for want, got in zip(run(both(), feeds), run(rounded, feeds), strict=True):
        assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < 0.2


def test_zero_points_where_every_second_row_is_skewed():
    rng = np.random.default_rng(0)
    matrix = rng.uniform(-1.0, 1.0, (2000, 64)).astype(np.float32)
    matrix[1::2] = rng.uniform(0.5, 1.5, (1000, 64))
    made = graph(64, matrix=matrix)
    made = model(made, [ir.node("FusedMatMul", [made["x"], made["matrix"]], attributes={"transB": 1},
                                domain="com.microsoft")])  # fmt: skip
    assert quantize_weights(made, 4).modified and "matrix_4bit_zero_points" in made.graph.initializers


def test_rows_that_no_block_divides():
    """A product's last block is padded; a table can't be, and keeps its head as well."""
    width = 72
    rounded = everything(width)
    done = quantize_weights(rounded, 4, tokens=["ids"])
    assert set(done.kept) == {"places_table", "experts", "tied"} and done.rows == {}
    feeds = {"x": random(5, width), "ids": np.array([1, 2]), "places": np.array([3, 2])}
    for want, got in zip(run(everything(width), feeds), run(rounded, feeds), strict=True):
        assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < 0.2


def test_the_same_bytes_each_time():
    made = [everything(128), everything(128)]
    for each in made:
        quantize_weights(each, 4, tokens=["ids"])
    one, other = ([value.const_value.tobytes() for value in each.graph.initializers.values()] for each in made)
    assert one == other


def test_importing_the_quantizer_leaves_logging_alone():
    import logging

    before = list(logging.root.handlers), logging.root.level
    quantize_weights(everything(64), 4)
    assert (list(logging.root.handlers), logging.root.level) == before


def test_a_weight_that_is_used_otherwise_stays():
    values = graph(64, weight=random(64, 64))
    made = model(values, [ir.node("MatMul", [values["x"], values["weight"]]), ir.node("Relu", [values["weight"]])])
    assert not quantize_weights(made, 8).modified
