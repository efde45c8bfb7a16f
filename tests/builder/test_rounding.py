"""Which layers of a program are rounded, and that folding constants leaves their weights rounded."""

from typing import Any

import pytest
import torch
from executorch.runtime import Runtime

from genbundle.builder.components import Component
from genbundle.builder.formats.executorch import Method, lower
from genbundle.builder.packed_weights import from_halves, in_halves
from genbundle.builder.rounding import called_layers, rounded, saved_bytes
from genbundle.bundles.manifest import Source


class Tower(torch.nn.Module):
    """A linear layer over patches with their places, beside a layer that isn't called."""

    def __init__(self, width=32):
        super().__init__()
        self.linear, self.places = torch.nn.Linear(width, 512), torch.nn.Embedding(4, width)
        self.elsewhere = torch.nn.Linear(width, 512)

    def forward(self, patches):
        return {"features": self.linear(patches + self.places(torch.arange(4)))}


class Features(torch.nn.Module):
    """The same with a tensor for an output, as methods have it."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, patches):
        return self.tower(patches)["features"]


def test_layers_that_a_program_calls():
    tower = Tower()
    sample = {"patches": torch.randn(1, 4, 32)}
    component = Component(
        name="image_encoder",
        roles=("encoder",),
        module=tower,
        sample=sample,
        axes={},
        sources={"patches": Source(kind="user", name="pixel_values")},
        modality="image",
    )
    assert called_layers(component) == [tower.places, tower.linear]


@pytest.mark.parametrize(("precision", "bits", "tolerance"), [("int8", 8, 0.01), ("int4", 4, 0.15)])
def test_folding_constants_leaves_weights_rounded(precision, bits, tolerance, tmp_path):
    """Folded too, they'd be float32, and operators that round their inputs would have no kernel."""
    torch.manual_seed(0)
    tower, patches = Tower(width=256).eval(), torch.randn(1, 4, 256)
    with torch.no_grad():
        expected = tower(patches)["features"]
        method = Method(module=Features(tower), args=(patches,), fold_constants=True)
        with rounded([tower.linear], precision, vocabulary=None, activations=True):
            lower({"forward": method}, {}, tmp_path / "model.pte")
    assert (tmp_path / "model.pte").stat().st_size < 256 * 512 * bits / 8 + 40_000
    runtime: Any = Runtime.get()
    (found,) = runtime.load_program(tmp_path / "model.pte").load_method("forward").execute([patches])
    assert 0 < (found - expected).norm() / expected.norm() < tolerance


def test_halves_of_bytes():
    """Every value of 4 bits in every place, and scales that float16 holds."""
    integers = (torch.arange(48)[:, None] * 5 + torch.arange(64)).remainder(16).to(torch.int8) - 8
    scales = 2.0 ** torch.randint(-8, 8, (48, 2))
    halves, kept = in_halves(integers, scales)
    assert (halves.shape, halves.dtype, kept.shape) == ((2, 16, 48), torch.int8, (2, 1, 48))
    expected = (integers.reshape(48, 2, 32) * scales[..., None]).flatten(1)
    assert halves.is_contiguous() and kept.is_contiguous(), "as files hold them"
    assert torch.equal(from_halves(halves, kept), expected.T)


@pytest.mark.parametrize("size", [1e-7, 1e6])
def test_scales_that_float16_has_no_room_for(size):
    integers = torch.randint(-8, 8, (4, 64), dtype=torch.int8)
    scales = torch.rand(4, 2) * size
    weights = from_halves(*in_halves(integers, scales))
    expected = integers.float() * scales.repeat_interleave(32, 1)
    torch.testing.assert_close(weights.T, expected, rtol=1e-6, atol=0)


def test_a_weight_that_programs_share_is_saved_once():
    """An encoder's and a decoder's tables of the same tokens, in programs that are rounded one after another."""
    table = torch.nn.Embedding(100, 64)
    other = torch.nn.Embedding(100, 64)
    other.weight = table.weight
    found = []
    for layer in (table, other, table):
        with rounded([layer], "int8", vocabulary=100, activations=False) as rounding:
            found.append(rounding)
    one = 100 * 64 + 4 * 100  # the numbers, and a scale for each row
    assert saved_bytes(found) == table.weight.nbytes - 2 * one
