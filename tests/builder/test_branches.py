"""Branches that are taken always, where that changes nothing, and those that aren't."""

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from genbundle.builder.branches import taken_branches

VALUES = torch.arange(12.0).reshape(4, 3)
SAMPLE = {"values": VALUES, "mask": torch.tensor([1, 0, 0, 1])}


class Marks(torch.nn.Module):
    """Doubles the masked rows; adds one to all of them where `beside`."""

    def __init__(self, beside: bool):
        super().__init__()
        self.beside = beside

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        if mask.any():
            values = values.index_put((mask.bool(),), values[mask.bool()] * 2)
            values = values + 1 if self.beside else values
        return {"values": values}


class Experts(torch.nn.Module):
    """Each row times its expert's number, expert by expert of those that are chosen; one more stands for none."""

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        numbers, result = torch.tensor([2.0, 3.0, 5.0]), torch.zeros_like(values)
        chosen = torch.nn.functional.one_hot(mask, 4).T
        for expert in (chosen.sum(-1) > 0).nonzero():
            (rows,) = torch.where(chosen[expert[0]])
            if rows.numel() == 0:
                continue
            result = result.index_add(0, rows, values[rows] * numbers[expert[0]])
        return {"values": result}


def export(module: torch.nn.Module) -> torch.nn.Module:
    with taken_branches(module, SAMPLE):
        return torch.export.export(module, (), SAMPLE, strict=False).module()


@pytest.mark.parametrize(
    ("module", "masks"), [(Marks(False), [[0, 0, 0, 0], [0, 1, 1, 1]]), (Experts(), [[2, 2, 2, 1]])]
)
def test_the_program_holds_for_other_masks(module, masks):
    program = export(module)
    for mask in masks:
        inputs = {"values": VALUES, "mask": torch.tensor(mask)}
        torch.testing.assert_close(program(**inputs), module(**inputs))


def test_a_branch_that_changes_something_else_is_none(recwarn):
    with pytest.raises(GuardOnDataDependentSymNode):
        export(Marks(True))
