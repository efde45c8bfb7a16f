"""Programs that would hold for some sizes only are refused."""

from types import SimpleNamespace

import pytest
import torch

from genbundle.builder import guards
from genbundle.builder.exporting import _without_moves, to_exported_program
from genbundle.builder.guards import HoldsFrom, expect_open, largest
from genbundle.bundles import UnsupportedModelError

AXES = {"input_ids": {0: "batch", 1: "sequence"}}
SAMPLE = {"input_ids": torch.ones(2, 9)}


class Chunks(torch.nn.Module):
    """Adds a prompt up in chunks of 64: a trace of a short one has a single chunk."""

    config = None

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        length = input_ids.shape[1]
        padded = torch.nn.functional.pad(input_ids, (0, -length % 64))
        total = sum(padded[:, 64 * i : 64 * i + 64].sum(1) for i in range(padded.shape[1] // 64))
        return {"total": total}


class Sum(torch.nn.Module):
    """The same in one go."""

    config = None

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"total": input_ids.sum(1)}


def test_a_loop_over_chunks_is_seen():
    with pytest.raises(UnsupportedModelError, match=r"takes another way unless|is at most|fixed at"):
        to_exported_program(Chunks(), SAMPLE, AXES, 512)


def test_what_holds_for_every_size_is_taken():
    program = to_exported_program(Sum(), SAMPLE, AXES, 512)
    assert program.module()(input_ids=torch.ones(3, 100))["total"].tolist() == [100.0] * 3


class Blocks(torch.nn.Module):
    """Sums of chunks of 64, each with the one before it: a single chunk is no case that a tracer generalizes to."""

    config = None

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        padded = torch.nn.functional.pad(input_ids, (0, -input_ids.shape[1] % 64))
        chunks = padded.reshape(input_ids.shape[0], -1, 64).sum(2)
        return {"total": (chunks[:, :, None] * chunks[:, None]).sum((1, 2))}


def test_a_program_for_prompts_from_a_length_on():
    sample = {"input_ids": torch.ones(2, 293)}
    with pytest.raises(HoldsFrom) as error:
        to_exported_program(Blocks(), sample, AXES, 512)
    assert error.value.least == 65
    program = to_exported_program(Blocks(), sample, AXES, 512, least=65)
    assert program.module()(input_ids=torch.ones(3, 65))["total"].tolist() == [65.0**2] * 3


class Capped(torch.nn.Module):
    """Takes another way once two lengths together are long, which no size says alone."""

    config = None

    def forward(self, input_ids: torch.Tensor, past: torch.Tensor) -> dict[str, torch.Tensor]:
        both = torch.cat([past, input_ids], 1)
        return {"total": both.sum(1) if past.shape[1] + input_ids.shape[1] <= 100 else -both.sum(1)}


def test_a_condition_on_two_lengths_together_is_seen():
    sample = {"input_ids": torch.ones(2, 3), "past": torch.ones(2, 5)}
    axes = {"input_ids": {0: "batch", 1: "sequence"}, "past": {0: "batch", 1: "past"}}
    with pytest.raises(UnsupportedModelError, match=r"takes another way unless|is at most"):
        to_exported_program(Capped(), sample, axes, 512)
    assert to_exported_program(Capped(), sample, axes, 64) is not None  # never so long


class Multiples(torch.nn.Module):
    """Takes another way for whole chunks; `harmless` is the same on both."""

    config = None

    def __init__(self, harmless: bool):
        super().__init__()
        self.harmless = harmless

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        total = input_ids.sum(1)
        if input_ids.shape[1] % 64 == 0:
            return {"total": total * 1 if self.harmless else -total}
        return {"total": total}


@pytest.mark.parametrize("longest", [None, 512])
def test_lengths_in_between_are_run_where_a_condition_fails(longest):
    sample = {"input_ids": torch.ones(2, 293)}
    assert to_exported_program(Multiples(harmless=True), sample, AXES, longest) is not None
    with pytest.raises(UnsupportedModelError, match="takes another way unless"):
        to_exported_program(Multiples(harmless=False), sample, AXES, longest)


class Product(torch.nn.Module):
    """Takes another way from a number of tokens on, in all sequences together."""

    config = None

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        total = input_ids.sum(1)
        return {"total": total if input_ids.shape[0] * input_ids.shape[1] < self.most else -total}


def test_a_condition_on_batch_and_length_together_is_seen():
    with pytest.raises(UnsupportedModelError, match="takes another way unless"):
        to_exported_program(Product(9000), SAMPLE, AXES, None)
    with pytest.raises(HoldsFrom) as error:
        to_exported_program(Product(20), {"input_ids": torch.ones(2, 31)}, AXES, 512)
    assert error.value.least == 20  # of a single sequence


@pytest.mark.parametrize(("text", "longest", "differs"), [
    ("L['input_ids'].size()[0] != 1", None, False),  # tracers say so of any program
    ("L['input_ids'].size()[0] != 1", 32, False),
    ("L['input_ids'].size()[0] * L['input_ids'].size()[1] >= 64", 32, True),  # for one sequence too
    ("L['input_ids'].size()[1] < 33", 32, False),  # never so long
    ("L['input_ids'].size()[1] < 33", 33, True),
    ("L['other'].size()[1] < 3", 33, False),  # on what isn't known for a call
])  # fmt: skip
def test_conditions_within_the_longest_length(text, longest, differs, monkeypatch):
    monkeypatch.setattr(guards, "_same", lambda *_: False)
    graph = torch.export.export(Sum(), (SAMPLE["input_ids"],)).graph
    try:
        expect_open(SimpleNamespace(graph=graph, _guards_code=[text]), Sum(), SAMPLE, AXES, longest, 1)
    except UnsupportedModelError as error:
        assert differs and type(error) is UnsupportedModelError
    else:
        assert not differs


def test_a_condition_is_tried_once_however_often_it_is_written():
    texts = [f"L['{name}'].size()[1] < 9" for name in ("input_ids", "attention_mask")]
    shapes = {"input_ids": (2, 5), "attention_mask": (2, 5)}
    axes = {"input_ids": {1: "sequence"}, "attention_mask": {1: "sequence"}}
    assert {guards._expression(text, axes, shapes) for text in texts} == {"sequence < 9"}
    assert guards._expression("L['input_ids'].size()[0] < 9", axes, shapes) == "2 < 9"


class Reordered(torch.nn.Module):
    """Patches, four in each block, with the blocks in another order."""

    config = None

    def forward(self, patches: torch.Tensor, order: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"patches": patches.reshape(patches.shape[0] // 4, -1, 3)[order].reshape(-1, 3)}


def test_patches_are_so_many_times_the_blocks_where_memory_is_planned():
    """The size of what is computed from both has a bound, which ExecuTorch replaces by the sample's size otherwise."""
    sample = {"patches": torch.randn(32, 3), "order": torch.arange(8).flip(0)}
    axes = {"patches": {0: "blocks_times4"}, "order": {0: "blocks"}}
    program = to_exported_program(Reordered(), sample, axes, 64, {"blocks_times4": 78, "blocks": 78})
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    rows = output.args[0][0].meta["val"].shape[0].node
    assert rows.shape_env.bound_sympy(rows.expr).upper == 80


def test_modules_whose_buffers_have_another_type_are_moved():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    with _without_moves():
        assert module.to(torch.float32) is module
        module[1].running_mean.data = torch.zeros(2, dtype=torch.float64)
        assert module.to(torch.float32)[1].running_mean.dtype == torch.float32


class Sources(torch.nn.Module):
    """Takes another way for a long source."""

    config = None

    def forward(self, source: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": source * 2 if source.shape[1] <= 128 else source * 3}


def test_the_most_that_another_axis_may_be_is_known():
    program = to_exported_program(Sources(), {"source": torch.ones(2, 9)}, {"source": {0: "batch", 1: "source"}}, None)
    assert largest(program, {"source": {0: "batch", 1: "source"}}) == {"source": 128}
