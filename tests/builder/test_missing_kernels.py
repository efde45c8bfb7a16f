"""Operators that ExecuTorch has no kernel for, in terms of those that it has."""

import torch

from genbundle.builder.passes.missing_kernels import replace_missing_kernels


class Module(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.erfinv(x), *torch.sort(x, dim=0, descending=True)


def test_the_same_from_other_operators() -> None:
    values = torch.cat([torch.linspace(-0.9999, 0.9999, 5001)[torch.randperm(5001)], torch.zeros(1)])[:5001]
    program = torch.export.export(Module(), (values,))
    replaced = replace_missing_kernels(program)
    targets = {node.target for node in replaced.graph.nodes}
    assert not targets & {torch.ops.aten.erfinv.default, torch.ops.aten.sort.default}
    for found, expected in zip(replaced.module()(values), Module()(values), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_program_without_them_is_left_alone() -> None:
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(3),))
    assert replace_missing_kernels(program) is program
