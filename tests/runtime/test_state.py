"""State that is written in place: buffers with room, grown now and then, and exact tensors for whoever wants those."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
from tests.bundles.samples import CONTENT, manifest, program

from genbundle.bundles import BundleError, EngineError
from genbundle.bundles.manifest import CAPACITY, File, Flow, Input, Output, Program, Route, Source, State
from genbundle.bundles.parsing import parse_manifest
from genbundle.runtime import state
from genbundle.runtime.program import Buffers

ENTRY = State(name="0.key", dtype="float32", shape=("batch", 2, CAPACITY, 8), axis=2)


def written(made: state.State, new: int) -> None:
    """Stand for a program that writes `new` tokens, each its number, into the buffer."""
    buffer = made.buffers("program", {"past": "0.key"}, new, np.asarray)["past"]
    places = np.arange(made.length, made.length + new)
    buffer[:, :, places] = places[:, None]
    made.update({"logits": np.zeros(1)}, {}, {"present": "0.key"})
    made.length += new


@pytest.mark.parametrize("most", [None, 905])
def test_a_buffer_keeps_what_was_written_when_it_grows(most):
    made, sizes = state.State((ENTRY,), 1, most), set()
    written(made, 5)
    for _ in range(900):
        written(made, 1)
        sizes.add(made.tensors["0.key"].shape[2])
    exact = made.exact("0.key", np.asarray)
    assert exact.shape == (1, 2, 905, 8) and (exact[0, 1, :, 3] == np.arange(905)).all()
    assert len(sizes) < 900 / 60, "a copy for every few tokens"
    assert most is None or max(sizes) == most


@pytest.mark.parametrize("heads", [1, 2])
def test_what_is_kept_of_a_buffer_is_a_copy(heads):
    """Of one head the first tokens lie in one piece, and the engine's tensor that they are read from goes."""
    made = state.State((State(name="0.key", dtype="float32", shape=("batch", heads, CAPACITY, 8), axis=2),), 1)
    written(made, 9)
    buffer = made.tensors["0.key"]
    exact = made.exact("0.key", np.asarray)
    made.cut(5, np.asarray)
    assert not np.shares_memory(exact, buffer) and not np.shares_memory(made.tensors["0.key"], buffer)


def test_buffers_are_the_same_object_until_one_is_another():
    entries = (ENTRY, State(name="0.value", dtype="float32", shape=("batch", 2, CAPACITY, 8), axis=2))
    made, both, one = state.State(entries, 1), {"past.key": "0.key", "past.value": "0.value"}, {"past": "0.key"}

    def taken(program: str = "both", new: int = 1) -> Buffers:
        return made.buffers(program, one if program == "one" else both, new, np.asarray)

    first, other = taken(), taken("one")
    assert taken() is first and taken("one") is other and other["past"] is first["past.key"]
    assert taken(new=500) is not first and taken("one")["past"] is taken()["past.key"], "another has grown"

    before, engines = taken(), np.ones((1, 2, 500, 8), np.float32)
    made.update({"present": engines}, {}, {"present": "0.key", "present.value": "0.value"})
    assert taken() is not before and taken()["past.key"] is engines and taken("one")["past"] is engines
    assert taken()["past.value"] is before["past.value"]

    before, made.length = taken(), 3
    made.update({"whole": np.full((1, 2, 3, 8), 2.0, np.float32)}, {"whole": "0.key"}, {})
    assert taken()["past.key"][:, :, :3].min() == 2 and taken()["past.value"] is before["past.value"]

    before = taken()
    made.cut(2, np.asarray)
    assert taken() is not before and not np.shares_memory(taken()["past.value"], before["past.value"])


def test_while_buffers_grow_only_one_is_there_twice(monkeypatch):
    entries = tuple(State(name=f"{i}", dtype="float32", shape=("batch", 2, CAPACITY, 8), axis=2) for i in range(8))
    names, grown, alive = {f"past.{entry.name}": entry.name for entry in entries}, state._grown, []
    made, most = state.State(entries, 1), 0

    def counting(*given):
        nonlocal most
        array = grown(*given)
        alive.append(weakref.ref(array))
        most = max(most, sum(each() is not None for each in alive))
        return array

    monkeypatch.setattr(state, "_grown", counting)
    for _ in range(3):
        made.buffers("program", names, 500, np.asarray)
        made.length += 500
    assert len(alive) > 8 and most <= 9


def test_large_parts_in_a_row_are_not_a_copy_each():
    made, sizes = state.State((ENTRY,), 1), set()
    for _ in range(16):
        written(made, 512)
        sizes.add(made.tensors["0.key"].shape[2])
    assert len(sizes) <= 8 and made.exact("0.key", np.asarray)[0, 0, :, 0].tolist() == list(range(8192))


def test_a_prompt_in_pieces_leaves_no_more_room_than_a_whole_one():
    made = state.State((ENTRY,), 1, 5000, least=1000)
    written(made, 500)
    assert 1000 < made.tensors["0.key"].shape[2] < 1100


def test_a_buffer_begins_with_what_a_program_for_prompts_gave():
    made = state.State((ENTRY,), 1)
    made.update({"present": np.full((1, 2, 7, 8), 3.0, np.float32)}, {"present": "0.key"}, {})
    made.length = 7
    assert made.exact("0.key", np.asarray).shape[2] == 7
    written(made, 1)
    assert made.exact("0.key", np.asarray)[0, 0, :, 0].tolist() == [3.0] * 7 + [7.0]


def test_as_much_room_as_is_needed_where_the_length_is_known():
    made = state.State((ENTRY,), 1, 6)
    written(made, 5)
    assert made.tensors["0.key"].shape[2] == 6


def test_nothing_of_tokens_that_are_taken_back_is_left():
    """Attention over whole buffers multiplies what lies behind the tokens by zero, which numbers outlive that aren't
    finite."""
    made = state.State((ENTRY,), 1)
    written(made, 5)
    made.tensors["0.key"][:, :, 3:] = np.nan
    made.cut(3, np.asarray)
    assert made.exact("0.key", np.asarray)[0, 0, :, 0].tolist() == [0.0, 1.0, 2.0]
    written(made, 1)
    assert np.isfinite(made.tensors["0.key"]).all() and made.room("0.key") > 4
    assert made.exact("0.key", np.asarray)[0, 0, :, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_the_pieces_of_a_prompt_find_room_for_all_of_it():
    made = state.State((ENTRY,), 1, None, least=2000)
    written(made, 5)
    first = made.tensors["0.key"]
    for _ in range(19):
        written(made, 100)
    assert made.tensors["0.key"] is first and first.shape[2] >= 2000
    made.cut(5, np.asarray)
    assert made.buffers("program", {"past": "0.key"}, 0, np.asarray)["past"].shape[2] >= 5
    written(made, 1)
    assert made.tensors["0.key"].shape[2] < 1000, "room for what was taken back"


KEYS = Source(kind="state", name="0.key")
PAST = Input(name="past", dtype="float32", shape=("batch", 2, CAPACITY, 8), source=KEYS)
WRONG = {
    "no output": {"outputs": (Output(name="logits", dtype="float32", shape=("batch", 1, 50)),)},
    "another axis": {"inputs": (Input(name="past", dtype="float32", shape=("batch", CAPACITY, 2, 8), source=KEYS),)},
    "no state": {"inputs": (Input(name="i", dtype="int64", shape=(1, CAPACITY), source=Source(kind="tokens")),)},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_a_manifest_whose_buffer_is_no_state_of_the_program_is_refused(changes):
    assert parse_manifest(_with(program(inputs=(PAST,))))
    with pytest.raises(BundleError, match="grows along that axis"):
        parse_manifest(_with(program(**{"inputs": (PAST,)} | changes)))


LOGITS = Output(name="logits", dtype="float32", shape=("batch", 1, 50))
PRESENT = Output(name="present", dtype="float32", shape=("batch", 2, CAPACITY, 8), state="0.key")
TWICE = {
    "two outputs of a state": ({"outputs": (LOGITS, PRESENT, replace(PRESENT, name="other"))}, "each state once"),
    "two buffers of a state": ({"inputs": (PAST, replace(PAST, name="other"))}, "each state once"),
    "two inputs of a name": ({"inputs": (PAST, PAST)}, "distinct names"),
    "two outputs of a name": ({"outputs": (LOGITS, LOGITS, PRESENT)}, "distinct names"),
    "pieces beside a buffer": (
        {
            "inputs": (
                PAST,
                Input(
                    name="pixels",
                    dtype="float32",
                    shape=("n", 3),
                    source=Source(kind="user", name="pixels", options={"pieces": "each"}),
                ),
            )
        },
        "no `pieces`",
    ),
}


@pytest.mark.parametrize(("changes", "message"), TWICE.values(), ids=TWICE)
def test_what_a_program_can_not_have_beside_its_state(changes, message):
    with pytest.raises(BundleError, match=message):
        parse_manifest(_with(program(**{"inputs": (PAST,), "outputs": (LOGITS, PRESENT)} | changes)))


def test_a_state_grows_along_one_of_its_axes():
    beyond = State(name="0.key", dtype="float32", shape=("batch", 4), axis=5)
    with pytest.raises(BundleError, match=r"Expected one of the shape's axes, got 5 - at `\$.state\[0\].axis`"):
        parse_manifest(_with(program(), state=(beyond,)))


def test_pieces_need_a_step_that_continues():
    flow = Flow(prompt=(Route(programs=("decode",)),), step=("decode",), chunk=2)
    with pytest.raises(BundleError, match=r"don't continue a prompt - at `\$.flow.chunk`"):
        parse_manifest(_with(program(), flow=flow))


def test_a_buffer_that_no_memory_is_there_for():
    huge = State(name="0.key", dtype="float32", shape=("batch", 2**31, CAPACITY), axis=2)
    with pytest.raises(EngineError, match="no memory for a state of"):
        state.State((huge,), 1).buffers("program", {"past": "0.key"}, 2**24, np.asarray)


def _with(entry: Program, **changes) -> str:
    listed = {name: File(size=1, sha256="0" * 64) for name in CONTENT}
    changes = {"state": (ENTRY,)} | changes
    return manifest(programs=(entry,), files=listed, **changes).to_json()
