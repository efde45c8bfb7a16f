"""A step's attention over the part of a state that is filled, as matrix products that XNNPACK runs.

ExecuTorch's fused operator is plain loops where it is built without BLAS, for each query head by itself: with 900
tokens of context they are a quarter of a step's time, with 4,000 two thirds. XNNPACK's products are several times as
fast, but their sizes are fixed when a program is lowered. So a program holds a step's attention for a few lengths and
takes the shortest that does; a prompt goes to the fused operator.
"""

from collections.abc import Callable
from typing import Any, cast

import torch

LENGTHS = (256, 1024, 4096)
"""How many tokens a product may cover; what lies beyond the last is the fused operator's. XNNPACK is about four times
as fast, so that a product of four times the tokens needed takes no longer."""

SHORT = 512
"""A state of at most so many tokens is left to the fused operator: each length costs some seconds a layer when a
bundle is built, and four kilobytes, and a step would gain little."""

MOST_KEY_HEADS = 8
"""One product covers all key heads, which takes as many times the multiplications that are needed: with 8 of them a
step still gains, with 12 no more."""


def lengths_for(capacity: int, key_heads: int) -> tuple[int, ...]:
    """The lengths of a state's prefixes that a step's attention is laid out for; none where that gains nothing."""
    if capacity <= SHORT or key_heads > MOST_KEY_HEADS:
        return ()
    return tuple(sorted({min(length, capacity) for length in LENGTHS}))


class Prefixes:
    """What all layers of one call share: which prefix holds the call's tokens, and the masks.

    start: int64 `[1]`, how many tokens the state held before the call. query_length: how many the call adds; only a
    call of one token (a step) is answered from a prefix.
    """

    def __init__(self, start: torch.Tensor, query_length: Any):
        self.start, self.query_length = start, query_length
        self._shared: dict[tuple[Any, ...], torch.Tensor] = {}

    def attend(
        self,
        states: torch.Tensor,
        buffers: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        scaling: float,
        otherwise: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Attention of `states [1, S, heads, width]` over keys and values `[1, capacity, key heads, width]`.

        mask: float32 `[S, capacity]` to add to the scores; None for plainly causal. otherwise: what answers a call
        that is no step, and one beyond the last prefix: `(states, keys, values, start, *mask) -> [1, S, heads, width]`,
        with `start` a number.
        """
        capacity, key_heads = buffers[0].shape[1:3]
        lengths = lengths_for(capacity, key_heads)
        scaled, plain = (self._own_heads(states.shape[2], key_heads, value) for value in (scaling, 1.0))

        operands = states, *buffers, self.start, *(() if mask is None else (mask,))
        first = len(operands) + 2  # where the four of each length begin in what the branches get

        def whole(*given: torch.Tensor) -> torch.Tensor:
            states, keys, values, start, *mask = given[: len(operands)]
            number = cast(int, start[0].item())
            torch._check(number >= 0)
            torch._check(number < capacity)
            return otherwise(states, keys, values, number, *mask).reshape(states.shape[1], -1)

        def within(place: int) -> Callable[..., torch.Tensor]:
            """The branch of a step whose token stands in the prefix at `place` or in a longer one."""

            def step(*given: torch.Tensor) -> torch.Tensor:
                keys, values, mask, _ = given[first + 4 * place :][:4]
                return _step(given[0], keys, values, mask, *given[first - 2 : first])

            def choose(*given: torch.Tensor) -> torch.Tensor:
                return _cond(given[first + 4 * place + 3], step, within(place + 1), given)

            return step if place == len(lengths) - 1 else choose

        each = [
            (*(_prefix(item, length) for item in buffers), self._mask(mask, length), self._below(length))
            for length in lengths
        ]
        # One choice inside another, since ExecuTorch 1.4.1 keeps the results of all choices of a graph in one place.
        branches = within(0), whole
        result = _cond(each[-1][-1], *branches, (*operands, scaled, plain, *(item for four in each for item in four)))
        return result.reshape(states.shape)

    def _below(self, end: int) -> torch.Tensor:
        """Whether the call is a step whose token stands before `end`."""

        def compute() -> torch.Tensor:
            return (torch.full((), self.query_length) == 1) & (self.start[0] < end)

        return self._once(("below", end), compute)

    def _mask(self, mask: torch.Tensor | None, length: int) -> torch.Tensor:
        """What a step adds to its scores, `[1, length]`."""
        if mask is not None:
            return torch.slice_copy(mask[-1:], 1, 0, length)
        closed = torch.finfo(torch.float32).min
        return self._once(("mask", length), lambda: torch.where(torch.arange(length) > self.start, closed, 0.0)[None])

    def _own_heads(self, heads: int, key_heads: int, value: float) -> torch.Tensor:
        """`value` where a query head belongs to a key head and 0 elsewhere, `[heads, key heads, 1]`."""
        each = heads // key_heads
        rows = [[[value if head // each == group else 0.0] for group in range(key_heads)] for head in range(heads)]
        return self._once(("heads", heads, key_heads, value), lambda: torch.tensor(rows))

    def _once(self, key: tuple[Any, ...], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]


def _step(
    states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scaled: torch.Tensor,
    plain: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """One query over a prefix, `[S, heads * width]` for an S of 1.

    The keys stand on the left, the side that XNNPACK reads as it lies in memory. That all heads fit into one product,
    each query is widened to all key heads, with zeros beside its own.
    """
    heads, width = states.shape[2:]
    queries = (states[:, -1:].view(heads, 1, width) * scaled).view(1, heads, -1)
    scores = torch.bmm(keys, queries.permute(0, 2, 1))
    weights = torch.softmax(scores.permute(0, 2, 1) + mask[None], dim=-1)
    found = torch.bmm(weights, values).view(heads, -1, width)
    return torch.bmm(plain.permute(0, 2, 1), found).view(1, -1).repeat(states.shape[1], 1)


def _prefix(buffer: torch.Tensor, length: int) -> torch.Tensor:
    """The first tokens of a state, all heads side by side `[1, length, heads * width]`.

    No copy is left of it: passes/state_prefixes.py lets it be read where it lies.
    """
    return torch.slice_copy(buffer.view(1, buffer.shape[1], -1), 1, 0, length)


def finite(new: torch.Tensor) -> torch.Tensor:
    """Keys or values for a state, with 0 in the place of what is no finite number.

    A step reads the rows behind its own too, with weights of 0. What an earlier sequence left there must not make that
    anything else: 0 times infinity is no number.
    """
    return torch.where(new - new == 0, new, 0.0)


def _cond(taken: torch.Tensor, one: Any, other: Any, operands: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """`torch.cond` without its first step, in which Dynamo reads the branches, for half a second each."""
    return torch.ops.higher_order.cond(taken, one, other, operands)
