"""prefix_attention.py by itself in a .pte, at its real lengths, beside attention written out."""

import itertools

import pytest
import torch

from genbundle.builder.formats.executorch_lowering import Runtime, lower_programs
from genbundle.builder.prefix_attention import LENGTHS, Prefixes, lengths_for
from genbundle.builder.stateful_attention import BufferCache, attend

pytestmark = pytest.mark.slow
HEADS, WIDTH, SCALING = 4, 16, 0.3
CAPACITY = LENGTHS[-1] + 100


class Layers(torch.nn.Module):
    """Two layers of attention over states; the first has a window where there is one."""

    def __init__(self, capacity: int, key_heads: int, window: int | None):
        super().__init__()
        self.capacity, self.window = capacity, window
        for name in ("k0", "v0", "k1", "v1"):
            self.register_buffer(name, torch.zeros(1, capacity, key_heads, WIDTH), persistent=False)

    def forward(self, query, key, value, start_pos):
        start = start_pos[0].item()
        torch._check(start >= 0)
        torch._check(start < self.capacity)
        buffers = [(self.k0, self.v0), (self.k1, self.v1)]
        cache = BufferCache(buffers, start, Prefixes(start_pos, query.shape[2]), None)
        mask = None
        if self.window is not None:
            mask = allowed(torch.arange(query.shape[2]) + start, torch.arange(self.capacity), self.window)[None, None]
        for layer in cache.layers:
            found, _ = attend(cache, self, query, *layer.update(key, value), mask, scaling=SCALING)
            query, mask = query + found.transpose(1, 2) / 2, None
        return query


def allowed(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which keys the queries see, by place."""
    seen = keys[None] <= queries[:, None]
    return seen if window is None else seen & (keys[None] > queries[:, None] - window)


def written_out(query, keys, values, start, window):
    """The same for states `[key heads, tokens, width]`."""
    each = HEADS // len(keys)
    keys, values = (item.repeat_interleave(each, 0) for item in (keys, values))
    for own in (window, None):
        open_ = allowed(torch.arange(query.shape[2]) + start, torch.arange(keys.shape[1]), own)
        scores = (query[0] @ keys.transpose(1, 2) * SCALING).masked_fill(~open_, -torch.inf)
        query = query + (scores.softmax(-1) @ values)[None] / 2
    return query


@pytest.mark.parametrize(("capacity", "key_heads", "window"), [(CAPACITY, 2, None), (1100, 1, 300)])
def test_every_length_on_both_sides(capacity, key_heads, window, tmp_path):
    sequence = torch.export.Dim("sequence", min=1, max=capacity)
    new = [torch.zeros(1, heads, 3, WIDTH) for heads in (HEADS, key_heads, key_heads)]
    with torch.no_grad():
        program = torch.export.export(
            Layers(capacity, key_heads, window), (*new, torch.zeros(1, dtype=torch.long)),
            dynamic_shapes=({2: sequence}, {2: sequence}, {2: sequence}, None), strict=False,
        )  # fmt: skip
    lower_programs({"forward": program}, {}, tmp_path / "a.pte")
    method = Runtime.get().load_program(tmp_path / "a.pte").load_method("forward")
    torch.manual_seed(0)
    keys, values = torch.zeros(2, key_heads, capacity, WIDTH)

    def call(start: int, count: int) -> None:
        query, key, value = (torch.randn(1, heads, count, WIDTH) for heads in (HEADS, key_heads, key_heads))
        end = start + count
        keys[:, start:end], values[:, start:end] = key[0], value[0]
        (found,) = method.execute((query, key, value, torch.tensor([start])))
        expected = written_out(query, keys[:, :end], values[:, :end], start, window)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    # What an earlier sequence left behind is no number: nothing of it may be seen.
    for number in (torch.nan, torch.inf):
        method.execute((new[0], new[1] + number, new[2] + number, torch.tensor([5])))
    call(0, 1)
    for start in range(0, capacity, 97):
        call(start, min(97, capacity - start))
        call(start, 1)
    ends = (*lengths_for(capacity, key_heads), capacity)
    places = sorted({end + by for end, by in itertools.product(ends, (-2, -1, 0, 1)) if end + by < capacity})
    for start in (*places, *reversed(places), 3, 0, capacity - 1, 5):
        call(start, 1)
    for start in places[:-1]:
        call(start, 2)
        call(start, 1)
