"""Branches that are taken always, where that changes nothing, and those that aren't."""

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from genbundle.builder.branches import taken_branches

VALUES = torch.arange(12.0).reshape(4, 3)
SAMPLE = {"values": VALUES, "mask": torch.tensor([1, 0, 0, 1])}
Tensors = dict[str, torch.Tensor]


class Marks(torch.nn.Module):
    """Doubles the masked rows; adds one to all of them where `beside`."""

    def __init__(self, beside: bool):
        super().__init__()
        self.beside = beside

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> Tensors:
        if mask.any():
            values = values.index_put((mask.bool(),), values[mask.bool()] * 2)
            values = values + 1 if self.beside else values
        return {"values": values}


class Experts(torch.nn.Module):
    """Each row times its expert's number, expert by expert of those that are chosen; one more stands for none.

    counting: what comes of that is divided by how many experts there were.
    """

    def __init__(self, counting: bool = False):
        super().__init__()
        self.counting = counting

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> Tensors:
        numbers, result, count = torch.tensor([2.0, 3.0, 5.0]), torch.zeros_like(values), 0
        chosen = torch.nn.functional.one_hot(mask, 4).T
        for expert in (chosen.sum(-1) > 0).nonzero():
            (rows,) = torch.where(chosen[expert[0]])
            count += 1
            if rows.numel() == 0:
                continue
            result = result.index_add(0, rows, values[rows] * numbers[expert[0]])
        return {"values": result / count if self.counting else result}


class Weighted(torch.nn.Module):
    """Adds a weight where it is none but zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> Tensors:
        return {"values": values + self.gate if self.gate[1:].any() else values}


class Nested(torch.nn.Module):
    """One mask says what to do with the rows of another."""

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> Tensors:
        ones, twos = mask == 1, mask == 2
        if ones.any():
            new = torch.where(twos.roll(1)[:, None], values * 3, values) if twos.any() else values * 5
            values = torch.where(ones[:, None], new, values)
        return {"values": values}


class Both(torch.nn.Module):
    """Clears the rows of one mask where there are some of another too."""

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> Tensors:
        ones, twos = mask == 1, mask == 2
        if ones.any() and twos.any():
            values = values.masked_fill(twos[:, None], 0.0)
        return {"values": values}


class Zeros(torch.nn.Module):
    """Halves all rows where the mask leaves one out, which a state of zeros doesn't show."""

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> Tensors:
        return {"values": values * 0.5 if (mask == 0).any() else values}


class While(torch.nn.Module):
    """Goes on until nothing is left."""

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> Tensors:
        while mask.any():
            mask, values = (mask - 1).clamp(min=0), values * 1.1
        return {"values": values}


class Selected(torch.nn.Module):
    """Something else where nothing is selected, beside a branch that changes nothing."""

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> Tensors:
        (rows,) = torch.where(values[:, 0] > 4)
        if mask.any():
            values = torch.where(mask.bool()[:, None], values * 2, values)
        return {"values": values * 7 if rows.numel() == 0 else values}


class Counted(torch.nn.Module):
    """Adds how many rows are selected, beside a branch that changes nothing."""

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> Tensors:
        if mask.any():
            values = torch.where(mask.bool()[:, None], values * 2, values)
        (rows,) = torch.where(mask == 2)
        return {"values": values + rows.numel()}


class Beyond(torch.nn.Module):
    """Experts whose last place is only out of reach where something is masked."""

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> Tensors:
        numbers, result = torch.tensor([2.0, 3.0, 5.0]), torch.zeros_like(values)
        chosen, marks = torch.nn.functional.one_hot(mask, 4).T, mask.bool()
        if marks.any():
            values = torch.where(marks[:, None], values * 2, values)
        for expert in (chosen.sum(-1) > 0).nonzero():
            (rows,) = torch.where(chosen[expert[0]])
            result = result.index_add(0, rows, values[rows] * numbers[expert[0] * marks.max()])
        return {"values": result}


def export(module: torch.nn.Module, sample: Tensors = SAMPLE) -> torch.nn.Module:
    with taken_branches(module, sample):
        return torch.export.export(module, (), sample, strict=False).module()


@pytest.mark.parametrize(
    ("module", "masks"),
    [
        (Marks(False), [[0, 0, 0, 0], [0, 1, 1, 1]]),
        (Experts(), [[2, 2, 2, 1]]),
        (Counted(), [[0, 0, 0, 0], [2, 1, 2, 0]]),
        (Beyond(), [[1, 0, 0, 1], [2, 1, 2, 1]]),
    ],
)
def test_the_program_holds_for_other_masks(module, masks):
    program = export(module)
    for mask in masks:
        inputs = {"values": VALUES, "mask": torch.tensor(mask)}
        torch.testing.assert_close(program(**inputs), module(**inputs))


@pytest.mark.parametrize(
    ("module", "sample"),
    [
        (Marks(True), {}),
        (Experts(counting=True), {"mask": torch.tensor([0, 1, 2, 2])}),
        (Weighted(), {}),
        (Nested(), {"mask": torch.tensor([1, 2, 0, 1])}),
        (Both(), {}),
        (Both(), {"mask": torch.tensor([2, 1, 2, 1])}),
        (Zeros(), {"values": VALUES * 0, "mask": torch.ones(4, dtype=torch.long)}),
        (While(), {}),
        (Selected(), {}),
    ],
)
def test_a_branch_that_changes_something_else_is_none(module, sample, recwarn):
    with pytest.raises(GuardOnDataDependentSymNode):
        export(module, {**SAMPLE, **sample})


def test_weights_stay_what_they_are():
    module = Weighted()
    with taken_branches(module, SAMPLE):
        pass
    assert module.gate.tolist() == [1, 2, 3]
