"""The pass that gives both operands of an elementwise operator as many axes."""

import pytest
import torch

from genbundle.builder.passes.equal_ranks import give_equal_ranks


class Product(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b


@pytest.mark.parametrize(
    ("first", "second", "changed"),
    [((1, 8, 1), (8, 6), True), ((8, 6), (1, 8, 1), True), ((1, 3, 6), (6,), False), ((2, 8, 1), (8, 6), False)],
)
def test_only_where_the_result_may_lose_an_axis(first, second, changed):
    operands = torch.randn(first), torch.randn(second)
    program = torch.export.export(Product(), operands)
    assert give_equal_ranks(program.graph) is changed
    ranks = {node.meta["val"].dim() for node in program.graph.nodes if node.target == torch.ops.aten.unsqueeze.default}
    assert ranks == ({3} if changed else set())
    torch.testing.assert_close(program.module()(*operands), operands[0] * operands[1])
