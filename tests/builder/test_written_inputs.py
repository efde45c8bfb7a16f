"""Programs that write into their inputs."""

import torch

from genbundle.builder.passes.written_inputs import copy_written_inputs


class Writing(torch.nn.Module):
    def forward(self, one: torch.Tensor, other: torch.Tensor, third: torch.Tensor) -> torch.Tensor:
        one += 1
        other[:, 0] = 2
        return one + other.sum() + third


def test_inputs_are_copied_before_they_are_written_into():
    inputs = tuple(torch.rand(2, 3) for _ in range(3))
    expected = Writing()(*(each.clone() for each in inputs))
    program = torch.export.export(Writing(), tuple(each.clone() for each in inputs))
    assert len(program.run_decompositions({}).graph_signature.user_inputs_to_mutate) == 2
    copy_written_inputs(program)
    assert [node.args[0].name for node in program.graph.nodes if "clone" in node.name] == ["one", "other"]
    assert not program.run_decompositions({}).graph_signature.user_inputs_to_mutate
    before = [each.clone() for each in inputs]
    assert torch.equal(program.module()(*inputs), expected)
    assert all(map(torch.equal, inputs, before))
