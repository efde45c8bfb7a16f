"""Programs that take one picture at a time: how inputs are dealt out and outputs joined."""

from dataclasses import replace

import numpy as np
import pytest

from genbundle.bundles import InputError
from genbundle.bundles.manifest import Input, Output, Program, Source
from genbundle.runtime import pieces


def entry(**inputs: dict) -> Program:
    return Program(
        name="image_encoder",
        file="image_encoder.onnx",
        roles=("encoder",),
        inputs=tuple(
            Input(name=name, dtype="float32", shape=("rows", 2), source=Source(kind="user", name=name, options=options))
            for name, options in inputs.items()
        ),
        outputs=(Output(name="features", dtype="float32", shape=("rows", 2)),),
    )


def call(described: Program, *given):
    return pieces.Caller(described)(*given)


def recording(calls: list):
    def program(inputs, buffers=None):
        calls.append(dict(inputs))
        return {"features": inputs["patches"] * 10}

    return program


def counting(calls: list):
    def program(inputs, buffers=None):
        calls.append(dict(inputs))
        return {"features": np.ones((1, 2))}

    return program


def test_rows_between_offsets_go_into_one_call_each():
    calls: list = []
    described = entry(patches={"pieces": "ends"}, ends={"pieces": "offsets"}, scale={})
    inputs = {"patches": np.arange(10.0).reshape(5, 2), "ends": np.array([0, 3, 5]), "scale": np.ones(1)}
    result = call(described, recording(calls), inputs, np.asarray)
    assert [call["patches"].shape[0] for call in calls] == [3, 2]
    assert all("ends" not in call and call["scale"].shape == (1,) for call in calls)
    np.testing.assert_array_equal(result["features"], inputs["patches"] * 10)


def test_each_row_is_a_call_of_its_own():
    calls: list = []
    inputs = {"patches": np.arange(6.0).reshape(3, 2)}
    result = call(entry(patches={"pieces": "each"}), recording(calls), inputs, np.asarray)
    assert len(calls) == 3
    np.testing.assert_array_equal(result["features"], inputs["patches"] * 10)


def test_a_picture_is_cut_to_its_own_size():
    calls: list = []
    described = entry(patches={"pieces": "each", "sizes": "sizes"}, sizes={"pieces": "sizes"})
    inputs = {"patches": np.ones((2, 1, 4, 6)), "sizes": np.array([[4, 2], [3, 6]])}
    call(described, counting(calls), inputs, np.asarray)
    assert [call["patches"].shape for call in calls] == [(1, 1, 4, 2), (1, 1, 3, 6)]
    assert all(list(call) == ["patches"] for call in calls)
    with pytest.raises(InputError, match="sizes: 4 x 9 for a picture of 4 x 6"):
        call(described, recording([]), {**inputs, "sizes": np.array([[4, 9], [3, 6]])}, np.asarray)


def test_padded_rows_are_dealt_out_by_height_and_width():
    calls: list = []
    options = {"pieces": "each", "sizes": "sizes", "mask": "mask"}
    described = entry(patches=options, sizes={"pieces": "sizes"}, mask={"pieces": "mask"})
    rows = np.arange(16.0).reshape(2, 4, 2)
    inputs = {"patches": rows, "sizes": np.array([[2, 2], [1, 3]]), "mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]])}
    call(described, counting(calls), inputs, np.asarray)
    assert [call["patches"].tolist() for call in calls] == [
        rows[0].reshape(2, 2, 2).tolist(),
        rows[1, :3].reshape(1, 3, 2).tolist(),
    ]
    for sizes in ([[2, 2], [1, 2]], [[2, 2], [0, 3]], [[2, 2], [2, 4]]):
        with pytest.raises(InputError, match=r"patches, and mask counts 3 of 4 rows"):
            call(described, recording([]), {**inputs, "sizes": np.array(sizes)}, np.asarray)


def test_a_frame_has_the_shape_of_its_grid():
    calls: list = []
    described = entry(
        patches={"pieces": "ends", "grid": "grid", "merge": 2}, ends={"pieces": "offsets"}, grid={"pieces": "grid"}
    )
    inputs = {
        "patches": np.arange(64.0).reshape(32, 2),
        "ends": np.array([0, 8, 16, 32]),
        "grid": np.array([[2, 4, 2], [1, 4, 4]]),
    }
    call(described, counting(calls), inputs, np.asarray)
    assert [call["patches"].shape for call in calls] == [(2, 1, 4, 2), (2, 1, 4, 2), (2, 2, 4, 2)]


def test_no_picture_is_refused():
    with pytest.raises(InputError, match="the inputs of 'image_encoder' hold no picture"):
        call(entry(patches={"pieces": "each"}), recording([]), {"patches": np.zeros((0, 2))}, np.asarray)


def test_a_fixed_input_is_checked_and_not_fed():
    calls: list = []
    described = entry(patches={}, kinds={"equals": 0})
    call(described, recording(calls), {"patches": np.ones((1, 2)), "kinds": np.zeros((1, 4))}, np.asarray)
    assert list(calls[0]) == ["patches"]
    with pytest.raises(InputError, match="kinds: this bundle takes prompts whose kinds is 0 throughout"):
        call(described, recording(calls), {"patches": np.ones((1, 2)), "kinds": np.ones((1, 4))}, np.asarray)


def test_what_is_larger_than_the_program_takes_is_refused():
    described = replace(entry(patches={}), largest={"rows": 3})
    assert call(described, recording([]), {"patches": np.ones((3, 2))}, np.asarray)["features"].shape == (3, 2)
    with pytest.raises(InputError, match="patches: 4 along axis 0, the program 'image_encoder' takes at most 3"):
        call(described, recording([]), {"patches": np.ones((4, 2))}, np.asarray)
    described = replace(entry(patches={"pieces": "ends"}, ends={"pieces": "offsets"}), largest={"rows": 3})
    inputs = {"patches": np.ones((5, 2)), "ends": np.array([0, 3, 5])}
    assert call(described, recording([]), inputs, np.asarray)["features"].shape == (5, 2)
