"""Programs that take and return their state, as methods of one .pte."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.zoo import models

from genbundle.builder import build_bundle
from genbundle.builder.components import Component
from genbundle.builder.exporting import to_exported_program
from genbundle.builder.formats.executorch_explicit import export_explicit, largest_sizes, one_sequence
from genbundle.builder.verify import verify_staged
from genbundle.bundles import Bundle, VerificationError
from genbundle.bundles.manifest import FORMAT, FORMAT_VERSION, File, Flow, Generation, Manifest, Model, Route, Source
from genbundle.runtime import load_bundle
from genbundle.runtime.backends import open_backend
from genbundle.runtime.state import State

CAPACITY = 16


class Appending(torch.nn.Module):
    """Appends what it is given to its past; counts; notes which numbers are odd."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 3)

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        ids = inputs["input_ids"]
        new = torch.stack([ids, ids + 1, ids + 2, ids * 2], -1).to(torch.float32)
        values = torch.cat([inputs["past_0_value"], new], 1)
        return {
            "logits": self.head(values.sum(1, keepdim=True)),
            "present_0_value": values,
            "present_0_count": inputs["past_0_count"] + ids.shape[1],
            "present_0_odd": torch.cat([inputs["past_0_odd"], ids % 2 == 1], 1),
        }


def appending() -> Component:
    axes = {
        "input_ids": {0: "batch", 1: "sequence"},
        **{f"past_0_{kind}": {0: "batch", 1: "past"} for kind in ("value", "odd")},
        **{f"present_0_{kind}": {0: "batch", 1: "total"} for kind in ("value", "odd")},
        "past_0_count": {0: "batch"},
        "present_0_count": {0: "batch"},
        "logits": {0: "batch"},
    }
    kinds = ("value", "count", "odd")
    sources = {f"past_0_{kind}": Source(kind="state", name=f"0.{kind}") for kind in kinds}
    return Component(
        name="decode",
        roles=("language_model", "lm_head", "decode"),
        module=Appending().eval(),
        sample={
            "input_ids": torch.arange(6).reshape(2, 3),
            "past_0_value": torch.zeros(2, 5, 4),
            "past_0_count": torch.zeros(2, 1, dtype=torch.long),
            "past_0_odd": torch.zeros(2, 5, dtype=torch.bool),
        },
        axes=axes,
        sources={"input_ids": Source(kind="tokens"), **sources},
        states={f"present_0_{kind}": f"0.{kind}" for kind in kinds},
    )


def test_a_component_for_one_sequence() -> None:
    single = one_sequence(appending())
    assert {name: tuple(tensor.shape) for name, tensor in single.sample.items()} == {
        "input_ids": (1, 3), "past_0_value": (1, 5, 4), "past_0_count": (1, 1), "past_0_odd": (1, 5)
    }  # fmt: skip
    assert single.axes["past_0_value"] == {1: "past"} and single.axes["logits"] == {}


def test_every_axis_has_a_largest_size() -> None:
    """What counts tokens is bounded by the capacity; frames that were more than that by a multiple."""
    sizes = largest_sizes([one_sequence(appending())], CAPACITY)
    assert sizes == {"sequence": CAPACITY, "past": CAPACITY, "total": CAPACITY}
    frames = Component(
        name="encoder", roles=("encoder",), module=torch.nn.Identity(), sample={"x": torch.zeros(1, 100)},
        axes={"x": {1: "x_1"}}, sources={},
    )  # fmt: skip
    assert largest_sizes([frames], CAPACITY)["x_1"] == 400
    grid = replace(frames, sample={"x": torch.zeros(1, 6, 3)}, axes={"x": {1: "x_1", 2: "x_2"}})
    assert largest_sizes([grid], CAPACITY) == {"x_1": 12, "x_2": 6}
    assert largest_sizes([grid], 100) == {"x_1": 12, "x_2": 10}
    # What a decoder is traced with says nothing of how long its encoder's output is.
    sound = torch.zeros(1, 64, 50)
    encoder = replace(
        frames, module=Convolution(), sample={"sound": sound}, axes={"sound": {2: "frames"}, "found": {2: "source"}}
    )
    decoder = replace(frames, sample={"found": torch.zeros(1, 8, 7)}, axes={"found": {2: "source"}})
    assert largest_sizes([encoder, decoder], CAPACITY) == {"frames": 200, "source": 192}
    assert largest_sizes([encoder], CAPACITY)["source"] == CAPACITY


@pytest.mark.slow
def test_state_in_and_out(tmp_path: Path) -> None:
    """From an empty past, in any dtype; what a call returned is not overwritten by the next."""
    component = appending()
    exported = export_explicit([component], CAPACITY, tmp_path / "model.pte", lambda _: None)
    manifest = Manifest(
        format=FORMAT, version=FORMAT_VERSION, backend="xnnpack", generation=Generation(), state=exported.state,
        model=Model(architecture="", name="", parameters=0, weight_bytes=0), programs=exported.programs,
        flow=Flow(prompt=(Route(programs=("decode",)),), step=("decode",), batch=1),
        files={"model.pte": File(size=1, sha256="0" * 64)},
    )  # fmt: skip
    backend = open_backend(Bundle(path=tmp_path, manifest=manifest), device=None, threads=None)
    state, program = State(exported.state, 1), backend.program("decode")
    outputs = []
    for ids in ([[3, 4, 5]], [[6]], [[7, 9]]):
        inputs = {f"past_{name.replace('.', '_')}": tensor for name, tensor in state.tensors.items()}
        found = program({"input_ids": np.array(ids), **inputs})
        outputs.append(found)
        state.update(found, {f"present_0_{kind}": f"0.{kind}" for kind in ("value", "count", "odd")}, {})
    assert [backend.to_numpy(item["present_0_count"]).item() for item in outputs] == [3, 4, 6]
    assert [backend.to_numpy(item["present_0_value"])[0, :, 0].tolist() for item in outputs] == [
        [3, 4, 5], [3, 4, 5, 6], [3, 4, 5, 6, 7, 9]
    ]  # fmt: skip
    assert backend.to_numpy(outputs[-1]["present_0_odd"])[0].tolist() == [True, False, True, False, True, True]
    values = torch.from_numpy(backend.to_numpy(state.tensors["0.value"]))
    with torch.no_grad():
        expected = component.module.get_submodule("head")(values.sum(1, keepdim=True))
    np.testing.assert_allclose(backend.to_numpy(outputs[-1]["logits"]), expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_state_goes_out_where_it_fails_its_check_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle is built once more, says why, and gives eager's tokens."""
    checks: list[Manifest] = []

    def verify(cases: Any, limits: Any, manifest: Manifest, writer: Any, floor: Any, measure: Any) -> Manifest:
        checks.append(manifest)
        if len(checks) == 1:
            raise VerificationError("as given: step 0 of sequence 0: the logits differ")
        return verify_staged(cases, limits, manifest, writer, floor, measure)

    monkeypatch.setattr("genbundle.builder.attempts.verify_staged", verify)
    model, ids = models.make("llama"), models.text_ids(5, seed=1)
    generate: Any = model.generate
    bundle = build_bundle(model, backend="xnnpack", output=tmp_path / "out", max_length=64, progress=False)
    assert [bool(manifest.state) for manifest in checks] == [False, True]
    assert any("the logits differ" in note for note in bundle.manifest.notes)
    expected = generate(ids, max_new_tokens=8, do_sample=False)
    found = load_bundle(bundle.path).generate(input_ids=ids.numpy(), max_new_tokens=8, do_sample=False)
    assert found.sequences.tolist() == expected.tolist()


@pytest.mark.slow
def test_sequences_of_any_number_and_length_are_convolved(tmp_path: Path) -> None:
    """XNNPACK refuses such a convolution only when it is serialized."""
    free = {0: torch.export.Dim.AUTO(max=8), 2: torch.export.Dim.AUTO(max=64)}
    module = torch.nn.Conv1d(4, 6, 3, padding=1)
    program = torch.export.export(module, (torch.zeros(2, 4, 9),), dynamic_shapes=(free,))
    from genbundle.builder.formats.executorch_lowering import lower_programs
    from genbundle.builder.formats.executorch_partitioning import ProductPartitioner

    lower_programs({"forward": program}, {}, tmp_path / "model.pte", ProductPartitioner)
    assert (tmp_path / "model.pte").stat().st_size


class Convolution(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv1d(64, 8, 3)

    def forward(self, sound: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"found": self.convolution(sound)}


@pytest.mark.slow
def test_a_convolution_takes_sequences_of_every_length_that_was_asked_for(tmp_path: Path) -> None:
    """oneDNN would be taken from 20480 numbers on, by one thread, which bounded the length below that."""
    module, threads = Convolution(), torch.get_num_threads()
    from genbundle.builder.formats.executorch_lowering import Runtime, lower_programs
    from genbundle.builder.formats.executorch_partitioning import ProductPartitioner

    try:
        torch.set_num_threads(1)
        sample, axes = {"sound": torch.zeros(1, 64, 50)}, {"sound": {2: "length"}}
        program = to_exported_program(module, sample, axes, None, {"length": 4096})
        lower_programs({"forward": program}, {}, tmp_path / "model.pte", ProductPartitioner)
    finally:
        torch.set_num_threads(threads)
    sound = torch.randn(1, 64, 2000, generator=torch.Generator().manual_seed(0))
    (found,) = Runtime.get().load_program(tmp_path / "model.pte").load_method("forward").execute([sound])
    with torch.no_grad():
        torch.testing.assert_close(found, module(sound)["found"], rtol=1e-4, atol=1e-4)


class Picked(torch.nn.Module):
    """The rows that a mask picks, doubled in place; and where they are."""

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        places = mask.nonzero()
        return values.index_put((mask,), values[mask] * 2), places[:, 0] * 10 + places[:, 1]


@pytest.mark.slow
def test_places_that_a_mask_picks_lie_in_rows(tmp_path: Path) -> None:
    from genbundle.builder.formats.executorch_lowering import Runtime, lower_programs
    from genbundle.builder.formats.executorch_partitioning import ProductPartitioner

    mask = torch.tensor([[True, False, True], [False, True, False]])
    values = torch.arange(12.0).reshape(2, 3, 2)
    program = torch.export.export(Picked(), (values, mask))
    lower_programs({"forward": program}, {}, tmp_path / "model.pte", ProductPartitioner)
    found = Runtime.get().load_program(tmp_path / "model.pte").load_method("forward").execute([values, mask])
    for own, expected in zip(found, Picked()(values, mask), strict=True):
        torch.testing.assert_close(own, expected)


def test_parts_that_wait_for_one_another_are_left_out() -> None:
    """The first needs what the second gives, and the other way round."""
    from types import SimpleNamespace

    from genbundle.builder.formats.executorch_partitioning import parts_in_order

    graph = torch.fx.Graph()
    given, weight = graph.placeholder("given"), graph.placeholder("weight")
    a, b = (graph.call_function(torch.add, (given, weight)) for _ in range(2))
    c, d = graph.call_function(torch.mul, (a, weight)), graph.call_function(torch.mul, (b, weight))
    graph.output((c, d))
    first, second = SimpleNamespace(nodes=[a, d, weight]), SimpleNamespace(nodes=[b, c, weight])
    assert parts_in_order([first, second], graph) == [first]
    whole = [SimpleNamespace(nodes=[a, c]), SimpleNamespace(nodes=[b, d])]
    assert parts_in_order(whole, graph) == whole
    assert parts_in_order([SimpleNamespace(nodes=[a]), second], graph) == [SimpleNamespace(nodes=[a]), second]
