"""Complex numbers as pairs of real ones."""

import torch

from genbundle.builder.passes.complex_pairs import pair_complex_numbers


class Rotated(torch.nn.Module):
    """Values turned by angles, as Llama 4 and DeepSeek-V2 turn queries."""

    def forward(self, values: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        turns = torch.polar(torch.ones_like(angles), angles) * 1.5
        turns = turns[:, :, None, :].to(torch.complex64) * angles[:, :, None, :]
        pairs = torch.view_as_complex(values.float().reshape(*values.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(3)


def test_the_same_without_complex_numbers() -> None:
    free = {"values": {1: torch.export.Dim.AUTO}, "angles": {1: torch.export.Dim.AUTO}}
    inputs = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 4)
    program = torch.export.export(Rotated(), inputs, dynamic_shapes=free)
    assert pair_complex_numbers(program)
    values = [node.meta.get("val") for node in program.graph.nodes]
    assert not any(isinstance(value, torch.Tensor) and value.is_complex() for value in values)
    more = torch.randn(2, 7, 3, 8), torch.randn(2, 7, 4)
    for given in (inputs, more):
        torch.testing.assert_close(program.module()(*given), Rotated()(*given))
    assert not pair_complex_numbers(program)


class Conjugated(torch.nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(values).conj().resolve_conj())


def test_other_operators_on_them_are_left_alone() -> None:
    program = torch.export.export(Conjugated(), (torch.randn(3, 2),))
    before = str(program.graph)
    assert not pair_complex_numbers(program) and str(program.graph) == before
