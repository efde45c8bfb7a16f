"""Weights that a torch.export program doesn't read."""

import io

import torch

from genbundle.builder.passes.unused_weights import drop_unused_weights


class Whole(torch.nn.Module):
    """A layer that is called, beside a tied one and a table that aren't."""

    def __init__(self):
        super().__init__()
        self.read, self.idle = torch.nn.Linear(8, 8), torch.nn.Embedding(4, 8)
        self.tied = torch.nn.Linear(8, 8, bias=False)
        self.tied.weight = self.read.weight
        self.register_buffer("places", torch.arange(4))
        self.register_buffer("scratch", torch.arange(4), persistent=False)

    def forward(self, x):
        return self.read(x)


def test_only_what_is_read_stays():
    module, x = Whole().eval(), torch.randn(2, 8)
    exported = torch.export.export(module, (x,))
    assert drop_unused_weights(exported)
    assert len(exported.state_dict) == 2 and not exported.constants  # the tied one under either name
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    assert torch.equal(torch.export.load(buffer).module()(x), module(x))
    assert not drop_unused_weights(exported)
