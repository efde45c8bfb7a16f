"""Steps attending by products: ONNX Runtime's own operator is what they are compared with."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from tests.builder.test_passes import FLOAT, constant, model_of

from genbundle.builder.passes.step_attention import LEAST_GROUP, attend_in_products

WIDTH, ROOM, SCALE = 8, 21, 0.3
INT32 = ir.DataType.INT32


def attention(number: int, groups: int, heads: int, given, shared, *, room: str = "capacity", **attributes):
    """A layer's inputs, outputs and node."""
    keys, values = (
        ir.val(f"past.{number}.{kind}", dtype=FLOAT, shape=["batch", groups, room, WIDTH]) for kind in ("key", "value")
    )
    attributes = {"num_heads": heads, "kv_num_heads": groups, "scale": SCALE, **attributes}
    lengths, total, bias = shared
    node = ir.node(
        "GroupQueryAttention", [*given, keys, values, lengths, total, None, None, None, bias], num_outputs=3,
        attributes=attributes, domain="com.microsoft",
    )  # fmt: skip
    for output, name, like in zip(node.outputs[1:], ("key", "value"), (keys, values), strict=True):
        output.name, output.dtype, output.shape = f"present.{number}.{name}", FLOAT, like.shape
    return [keys, values], list(node.outputs[1:]), node


def model(*, groups: int = 2, heads: int = 8, layers: int = 2, room: str = "capacity", **attributes) -> ir.Model:
    """Layers of attention to the same keys and values, each of the one before's result."""
    given = [
        ir.val(name, dtype=FLOAT, shape=["batch", "sequence", count * WIDTH])
        for name, count in (("query", heads), ("key", groups), ("value", groups))
    ]
    shared = [
        ir.val("lengths", dtype=INT32, shape=["batch"]),
        ir.val("total", dtype=INT32, shape=[]),
        ir.val("bias", dtype=FLOAT, shape=["batch", 1, "sequence", "total"]),
    ]
    inputs, outputs, nodes, query = [*given, *shared], [], [], given[0]
    for number in range(layers):
        ends = attention(number, groups, heads, [query, *given[1:]], shared, room=room, **attributes)
        inputs += ends[0]
        outputs += ends[1]
        nodes.append(ends[2])
        query = nodes[-1].outputs[0]
        query.name, query.dtype, query.shape = f"attended.{number}", FLOAT, given[0].shape
    made = model_of(inputs, [query, *outputs], nodes, [])
    made.graph.opset_imports["com.microsoft"] = 1
    return made


def feeds(groups: int, heads: int, layers: int, batch: int, new: int, past: int) -> dict[str, np.ndarray]:
    """Random ones; of several sequences the first is padded on the left, which only the bias says."""
    rng = np.random.default_rng(new + past)
    arrays: dict[str, np.ndarray] = {
        name: rng.standard_normal((batch, new, count * WIDTH), np.float32)
        for name, count in (("query", heads), ("key", groups), ("value", groups))
    }
    arrays["lengths"] = np.full(batch, past + new - 1, np.int32)
    arrays["total"] = np.array(past + new, np.int32)
    arrays["bias"] = np.zeros((batch, 1, new, past + new), np.float32)
    if batch > 1:
        arrays["bias"][0, ..., :2] = np.finfo(np.float32).min
    for number in range(layers):
        for kind in ("key", "value"):
            buffer = rng.standard_normal((batch, groups, ROOM, WIDTH), np.float32)
            arrays[f"past.{number}.{kind}"] = buffer
    return arrays


def run(session: onnxruntime.InferenceSession, arrays: dict[str, np.ndarray]) -> tuple[list[np.ndarray], dict]:
    """The results and the buffers, which are bound to what is written as the runtime does it."""
    arrays = {name: array.copy() for name, array in arrays.items()}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        if output.name.startswith("present"):
            binding.bind_ortvalue_output(output.name, values[output.name.replace("present", "past")])
        else:
            binding.bind_output(output.name, "cpu")
    session.run_with_iobinding(binding)
    buffers = {name: np.array(value.numpy()) for name, value in values.items() if name.startswith("past")}
    return [np.array(value.numpy()) for value in binding.get_outputs()], buffers


def both(made: ir.Model, folder) -> list[onnxruntime.InferenceSession]:
    """The model as it is and with the pass, as the runtime opens them."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    ir.save(made, folder / "a.onnx")
    assert attend_in_products(made)
    ir.save(made, folder / "b.onnx")
    return [onnxruntime.InferenceSession(folder / f"{name}.onnx", options) for name in "ab"]


@pytest.mark.parametrize("batch", [1, 3])
def test_one_new_token_attends_as_the_operator_does(tmp_path, batch):
    groups, heads, layers = 2, 8, 2
    made = model()
    before, after = both(made, tmp_path)
    assert [node.op_type for node in made.graph].count("If") == layers + 1
    assert not any(node.op_type == "GroupQueryAttention" for node in made.graph)
    assert [value.name for value in made.graph.outputs][:2] == ["attended.1", "present.0.key"]
    # Several new tokens after a past are for one sequence only, says the operator.
    sizes = [(1, 0), (1, 7), (1, ROOM - 1), (5, 0), *([(5, 9)] if batch == 1 else [])]
    for new, past in sizes:
        arrays = feeds(groups, heads, layers, batch, new, past)
        (expected, kept), (found, written) = run(before, arrays), run(after, arrays)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        for name, buffer in written.items():
            np.testing.assert_array_equal(buffer, kept[name])
            changed = (buffer != arrays[name]).any((0, 1, 3))
            assert changed.nonzero()[0].tolist() == list(range(past, past + new)), "in place, and nothing else"


@pytest.mark.parametrize(
    "changed",
    [
        {"groups": 3, "heads": 3 * (LEAST_GROUP - 1)},
        {"softcap": 20.0},
        {"local_window_size": 4},
        {"room": "total"},
        {"do_rotary": 1},
        {"smooth_softmax": 1},
        {"scale": 0.0},
        {"causal": 0},
        {"unheard_of": 0},
    ],
)
def test_what_products_do_not_compute_or_gain_nothing_from_stays(changed):
    made = model(**changed)
    assert not attend_in_products(made)
    assert [node.op_type for node in made.graph] == ["GroupQueryAttention"] * 2


def test_without_the_bias_or_with_a_sink_it_stays():
    made = model(layers=1)
    (node,) = made.graph
    sink = constant("sink", np.zeros(8, np.float32))
    made.graph.register_initializer(sink)
    node.resize_inputs(12)
    node.replace_input_with(11, sink)
    assert not attend_in_products(made)
    node.replace_input_with(11, None)
    node.replace_input_with(10, None)
    assert not attend_in_products(made)


def test_each_head_may_have_a_bias_of_its_own(tmp_path):
    made = model(layers=1)
    (bias,) = [value for value in made.graph.inputs if value.name == "bias"]
    bias.shape = ir.Shape(["batch", 8, "sequence", "total"])
    before, after = both(made, tmp_path)
    arrays = feeds(2, 8, 1, 2, 1, 6)
    arrays["bias"] = np.random.default_rng(1).standard_normal((2, 8, 1, 7), np.float32)
    for one, other in zip(run(after, arrays)[0], run(before, arrays)[0], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_layers_with_masks_of_their_own_keep_them(tmp_path):
    made = model(layers=2)
    second = made.graph[1]
    (bias,) = [value for value in made.graph.inputs if value.name == "bias"]
    further = constant("further", np.array([[[[-1e9] + [0] * 5]]], np.float32))
    made.graph.register_initializer(further)
    hides = ir.node("Add", [bias, further])
    made.graph.insert_before(second, hides)
    second.replace_input_with(10, hides.outputs[0])
    hides.outputs[0].name = "windowed"
    before, after = both(made, tmp_path)
    arrays = feeds(2, 8, 2, 1, 1, 5)
    for one, other in zip(run(after, arrays)[0], run(before, arrays)[0], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
