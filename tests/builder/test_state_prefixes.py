"""passes/state_prefixes.py: a state's first tokens are read where they lie, and copied where that would be wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch

from genbundle.builder.formats.executorch_lowering import Runtime, lower_programs
from genbundle.builder.passes.state_prefixes import prefixes
from genbundle.builder.prefix_attention import lengths_for

CAPACITY, LENGTH = 12, 4


class State(torch.nn.Module):
    """Writes tokens `[1, S, 2, 3]` into a state and gives running sums over LENGTH of its rows.

    first: the first of these rows.
    """

    def __init__(self, first: int = 0):
        super().__init__()
        self.first = first
        self.register_buffer("state", torch.zeros(1, CAPACITY, 2, 3), persistent=False)

    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        start = start_pos[0].item()
        torch._check(start >= 0)
        torch._check(start < CAPACITY)
        torch.ops.llama.update_cache(tokens, self.state, start)
        rows = torch.slice_copy(self.state.view(1, CAPACITY, 6), 1, self.first, self.first + LENGTH)
        return rows.cumsum(1)


def lower(module: State, path: Path) -> set[str]:
    """Write the method to `path`; its operators."""
    from executorch.exir._serialize import _deserialize_pte_binary

    sequence = torch.export.Dim("sequence", min=1, max=CAPACITY)
    with torch.no_grad():
        program = torch.export.export(
            module, (torch.ones(1, 3, 2, 3), torch.zeros(1, dtype=torch.long)), dynamic_shapes=({1: sequence}, None)
        )
    lower_programs({"forward": program}, {}, path)
    (plan,) = _deserialize_pte_binary(path.read_bytes()).program.execution_plan
    return {operator.name for operator in plan.operators}


def calls(path: Path, first: int) -> None:
    """Two calls in a row, the second of which sees what the first wrote."""
    method = Runtime.get().load_program(path).load_method("forward")
    state = np.zeros((CAPACITY, 6), np.float32)
    for start, count in ((0, 3), (2, 1), (5, 2)):
        tokens = torch.randn(1, count, 2, 3)
        state[start : start + count] = tokens.reshape(count, 6).numpy()
        (found,) = method.execute((tokens, torch.tensor([start])))
        np.testing.assert_allclose(found[0].numpy(), state[first : first + LENGTH].cumsum(0), rtol=0, atol=1e-5)


def test_the_first_rows_are_not_copied(tmp_path):
    operators = lower(State(), tmp_path / "a.pte")
    assert "aten::slice_copy" not in operators
    assert "aten::cumsum" in operators
    calls(tmp_path / "a.pte", 0)


def test_rows_in_the_middle_are_copied(tmp_path):
    assert "aten::slice_copy" in lower(State(first=2), tmp_path / "a.pte")
    calls(tmp_path / "a.pte", 2)


@pytest.mark.parametrize("late", [False, True])
def test_rows_that_are_written_before_they_are_read_are_copied(late):
    """By a graph made by hand: ExecuTorch moves such a copy behind the second write when it lowers a program."""
    graph = torch.fx.Graph()
    state, tokens, out = (graph.placeholder(name) for name in ("state", "tokens", "out"))
    state.meta["val"] = torch.empty(1, CAPACITY, 6)
    rows = graph.call_function(torch.ops.aten.slice_copy.Tensor_out, (state, 1, 0, LENGTH), {"out": out})
    rows.meta["val"] = torch.empty(1, LENGTH, 6)
    if late:
        graph.call_function(torch.ops.llama.update_cache.out, (tokens, state, 0), {"out": out})
    graph.output(graph.call_function(torch.ops.aten.cumsum.out, (rows, 1), {"out": out}))
    assert prefixes(graph, {"state"}) == ([] if late else [rows])
    assert prefixes(graph, {"tokens"}) == []


@pytest.mark.parametrize(("capacity", "heads", "expected"), [
    (512, 2, ()), (513, 2, (256, 513)), (1024, 8, (256, 1024)), (4096, 1, (256, 1024, 4096)),
    (32768, 2, (256, 1024, 4096)), (4096, 12, ()),
])  # fmt: skip
def test_which_lengths_a_step_is_laid_out_for(capacity, heads, expected):
    assert lengths_for(capacity, heads) == expected
