"""Prompts that go through a program token by token, with programs that compute nothing."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.bundles.samples import manifest

from genbundle.bundles import BundleError, EngineError, InputError
from genbundle.bundles.manifest import CAPACITY, Flow, Input, Output, Program, Route, Source
from genbundle.runtime.rewind import rewind
from genbundle.runtime.wiring import Wiring

IDS = np.arange(5)[None]
TEXT = {"input_ids": IDS, "attention_mask": IDS * 0 + 1}


class Backend:
    """Keeps what each program is called with."""

    device = "cpu"

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.converted = 0

    def program(self, name: str) -> Any:
        def run(feeds: dict[str, Any], buffers: Any = None) -> dict[str, Any]:
            self.calls.append((name, feeds))
            return {"logits": np.zeros((1, 1, 4), np.float32), "features": np.zeros((1, 5, 3), np.float32)}

        return run

    def to_numpy(self, tensor: Any) -> np.ndarray:
        self.converted += tensor.shape == (1, 5, 3)
        return np.asarray(tensor)


def program(name: str, shape: tuple, *more: Input) -> Program:
    ids = Input(name="input_ids", dtype="int64", shape=shape, source=Source(kind="tokens"))
    outputs = tuple(Output(name=key, dtype="float32", shape=("batch", 1, 4)) for key in ("logits", "features"))
    return Program(name=name, file="decode.onnx", roles=("decode",), inputs=(ids, *more), outputs=outputs)


def wiring(route: tuple[str, ...], *programs: Program) -> tuple[Wiring, Backend]:
    backend = Backend()
    flow = Flow(prompt=(Route(programs=route, one_by_one=True),), step=("step",))
    made = manifest(flow=flow, programs=(*programs, program("step", ("batch", 1))), state=())
    return Wiring(made, backend), backend


@pytest.mark.parametrize("shape", [("batch", 1, 1), ("batch", "total", 1, 1)])
def test_more_axes_than_what_feeds_them_has(shape):
    flow, _ = wiring(("first", "token"), program("first", ("batch", "sequence")), program("token", shape))
    with pytest.raises(BundleError, match=rf"'token'.s input 'input_ids' has {len(shape)} axes in the manifest.*has 2"):
        flow.prompt(TEXT)


def test_a_number_without_axes_goes_in_as_one():
    scale = Input(name="scale", dtype="float32", shape=(), source=Source(kind="user", name="scale"))
    flow, backend = wiring(("first",), program("first", ("batch", "sequence"), scale))
    flow.prompt({**TEXT, "scale": np.full((), 2, np.float64)})
    given = backend.calls[0][1]["scale"]
    assert given.shape == () and given.dtype == np.float32 and given == 2


def test_what_is_written_in_place_feeds_no_other_program():
    """It is only among a program's outputs where it's another tensor than before."""
    shape = ("batch", 2, CAPACITY, 8)
    past = Input(name="past", dtype="float32", shape=shape, source=Source(kind="state", name="0.key"))
    reads = Input(name="keys", dtype="float32", shape=shape, source=Source(kind="output", name="present"))
    writes = program("first", ("batch", "sequence"), past)
    present = Output(name="present", dtype="float32", shape=shape, state="0.key")
    with pytest.raises(BundleError, match="needs the output 'present', which no program before it gives"):
        wiring(
            ("first", "token"),
            replace(writes, outputs=(*writes.outputs, present)),
            program("token", ("batch", 1), reads),
        )


def test_a_decoders_tokens_one_by_one():
    flow, backend = wiring(("step",))
    inputs = {"decoder_input_ids": IDS}
    assert flow.routes.together(inputs)
    flow.prompt(inputs)
    assert [feeds["input_ids"].tolist() for _, feeds in backend.calls] == [[[place]] for place in range(5)]


def test_features_are_converted_once_for_all_tokens():
    features = Input(
        name="features", dtype="float32", shape=("batch", 1, 3), source=Source(kind="output", name="features")
    )
    flow, backend = wiring(
        ("first", "token"), program("first", ("batch", "sequence")), program("token", ("batch", 1), features)
    )
    flow.prompt(TEXT)
    assert [feeds["features"].shape for name, feeds in backend.calls if name == "token"] == [(1, 1, 3)] * 5
    assert backend.converted == 1


@pytest.mark.parametrize(("inputs", "pieces"), [
    (TEXT, [[0, 1], [2, 3], [4]]),
    ({"input_ids": IDS[:, :2], "attention_mask": IDS[:, :2] * 0 + 1}, [[0, 1]]),
    ({"input_ids": IDS, "attention_mask": (IDS > 0).astype(np.int64)}, [[0, 1, 2, 3, 4]]),
])  # fmt: skip
def test_a_long_prompt_without_padding_goes_in_pieces(inputs, pieces):
    backend = Backend()
    flow = Flow(prompt=(Route(programs=("step",)),), step=("step",), continues=True, chunk=2)
    made = manifest(flow=flow, programs=(program("step", ("batch", "sequence")),), state=())
    Wiring(made, backend).prompt(inputs)
    assert [feeds["input_ids"][0].tolist() for _, feeds in backend.calls] == pieces


def chunked(chunk: int = 2, **changes) -> tuple[Wiring, Backend]:
    backend = Backend()
    flow = Flow(prompt=(Route(programs=("step",)),), step=("step",), continues=True, chunk=chunk, **changes)
    made = manifest(flow=flow, programs=(program("step", ("batch", "sequence")),), state=())
    return Wiring(made, backend), backend


def test_pieces_are_of_about_the_same_length():
    """One token of its own would cost as much as a step."""
    flow, backend = chunked(chunk=4)
    ids = np.arange(1, 10)[None]
    flow.prompt({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert [feeds["input_ids"].shape[1] for _, feeds in backend.calls] == [3, 3, 3]


@pytest.mark.parametrize(("restart", "lengths"), [(4, [5]), (5, [2, 2, 1])])
def test_a_prompt_behind_the_restart_goes_through_whole(restart, lengths):
    flow, backend = chunked(restart=restart)
    flow.prompt(TEXT)
    assert [feeds["input_ids"].shape[1] for _, feeds in backend.calls] == lengths


def test_nothing_is_taken_back_from_behind_the_restart():
    flow, _ = chunked(restart=4)
    _, sequences = flow.prompt(TEXT)
    with pytest.raises(InputError, match="from 4 tokens on"):
        rewind(flow, sequences, 3)


def test_a_step_that_fails_leaves_the_mask_as_it_was():
    flow, backend = chunked()
    _, sequences = flow.prompt(TEXT)
    working, backend.program = backend.program, lambda name: (_ for _ in ()).throw(EngineError("no memory"))
    with pytest.raises(EngineError):
        flow.step(IDS[:, :1], sequences)
    assert sequences.mask.shape == (1, 5) and sequences.state.length == 5
    backend.program = working
    flow.step(IDS[:, :1], sequences)
    assert sequences.mask.shape == (1, 6)


@pytest.mark.parametrize(("options", "largest", "refusal"), [
    ({"equals": 1}, {}, "takes prompts whose kinds is 1 throughout"),
    ({}, {"kinds": 3}, "kinds: 5 along axis 1, the program 'first' takes at most 3"),
])  # fmt: skip
def test_what_a_program_looks_for_in_its_inputs_is_looked_for(options, largest, refusal):
    source = Source(kind="user", name="kinds", options=options)
    kinds = Input(name="kinds", dtype="int64", shape=("batch", "kinds"), source=source)
    first = replace(program("first", ("batch", "sequence"), kinds), largest=largest)
    flow, backend = wiring(("first", "token"), first, program("token", ("batch", 1)))
    with pytest.raises(InputError, match=refusal):
        flow.prompt({**TEXT, "kinds": IDS})
    assert not backend.calls
