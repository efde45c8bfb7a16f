"""A step's attention over the part of a state that is filled, as matrix products that XNNPACK runs.

ExecuTorch's fused operator is plain loops where it is built without BLAS, for each query head by itself: what a step
takes with 900 tokens of context is a quarter of it, with 4,000 two thirds. XNNPACK's products are several times as
fast, but their sizes are fixed when a program is lowered. So a program holds the step's attention for a few lengths and
`torch.cond` takes the shortest that does; a prompt goes to the fused operator as before.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

LENGTHS = (256, 1024, 4096)
"""How many tokens a product may cover; a shorter state, and what lies beyond the last, is the fused operator's. Each
costs about a second a layer when a bundle is built, and a factor of four is about what XNNPACK is faster by."""

MOST_KEY_HEADS = 8
"""One product covers all key heads, which takes as many times the multiplications that are needed: with 8 of them a
step still gains, with 12 no more."""


def lengths_for(capacity: int, key_heads: int) -> tuple[int, ...]:
    """The lengths of a state's prefixes that a step's attention is laid out for; none where that gains nothing."""
    if capacity <= LENGTHS[0] or key_heads > MOST_KEY_HEADS:
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

        def nothing(states: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return torch.zeros(states.shape[1], states.shape[2] * states.shape[3])

        def whole(
            states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: torch.Tensor, *mask: Any
        ) -> Any:
            number = start[0].item()
            torch._check(number >= 0)
            torch._check(number < capacity)
            return otherwise(states, keys, values, number, *mask).reshape(states.shape[1], -1).clone()

        def keep(result: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return result.clone()

        # One after another and not inside one another, as every pass over a program goes through the branches of
        # branches several times. Results are matrices: the strides of more axes would differ where S is 1.
        operands = states, *buffers, self.start, *(() if mask is None else (mask,))
        result = _cond(self._at(0, lengths[-1]), nothing, whole, operands)
        for below, length in pairwise((0, *lengths)):
            rows = [_prefix(item, length) for item in buffers]
            added = self._mask(length) if mask is None else torch.slice_copy(mask[-1:], 1, 0, length)
            result = _cond(self._at(below, length), _step, keep, (result, states, *rows, added, scaled, plain))
        return result.reshape(states.shape)

    def _at(self, start: int, end: int) -> torch.Tensor:
        """Whether the call is a step whose token stands between the two."""

        def compute() -> torch.Tensor:
            return (torch.full((), self.query_length) == 1) & (self.start[0] >= start) & (self.start[0] < end)

        return self._once(("at", start, end), compute)

    def _mask(self, length: int) -> torch.Tensor:
        """What a step's plainly causal attention adds to its scores, `[1, length]`."""
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
    result: torch.Tensor, states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor,
    scaled: torch.Tensor, plain: torch.Tensor,
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
    return torch.bmm(plain.permute(0, 2, 1), found).view(1, -1).repeat(result.shape[0], 1)


def _prefix(buffer: torch.Tensor, length: int) -> torch.Tensor:
    """The first tokens of a state, all heads side by side `[1, length, heads * width]`.

    No copy is left of it: passes/state_prefixes.py lets it be read where it lies.
    """
    rows = buffer.view(1, buffer.shape[1], -1)
    return rows if length == buffer.shape[1] else torch.slice_copy(rows, 1, 0, length)


def _cond(taken: torch.Tensor, one: Any, other: Any, operands: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """`torch.cond` without its first step, in which Dynamo reads the branches, for half a second each."""
    return torch.ops.higher_order.cond(taken, one, other, operands)
