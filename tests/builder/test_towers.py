"""Encoders cut into the modules that they call."""

import pytest
import torch

from genbundle.builder.packed import Packed, segment_attention
from genbundle.builder.towers import _patch_axes, chain_component
from genbundle.bundles import UnsupportedModelError


class Tower(torch.nn.Module):
    """Patches [n, 4] to [n, 3], with a token for the whole picture before them."""

    def __init__(self):
        super().__init__()
        self.linear, self.whole = torch.nn.Linear(4, 3), torch.nn.Parameter(torch.randn(1, 3))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        found = self.linear(patches)
        return torch.cat([self.whole[None].expand(len(found), 1, 3), found], 1)


class Model(torch.nn.Module):
    """A picture's features are its kept patches' and a line's end, dealt out in Python."""

    def __init__(self):
        super().__init__()
        self.tower, self.projector, self.end = Tower(), torch.nn.Linear(3, 5), torch.nn.Parameter(torch.randn(5))

    def get_image_features(self, pixels: torch.Tensor, places: torch.Tensor) -> list[torch.Tensor]:
        projected = self.projector(self.tower(pixels.unsqueeze(0)[0])[:, 1:])
        return [rows[place[:, 0] != -1] for rows, place in zip(projected, places, strict=True)]


def samples() -> list[dict[str, torch.Tensor]]:
    """Two pictures of four places, and one."""
    result = []
    for pictures, last in ((2, 3), (1, 2)):
        places = torch.arange(4 * pictures).reshape(pictures, 4, 1)
        places[:, last:] = -1
        result.append({"pixels": torch.randn(pictures, 4, 4), "places": places})
    return result


def wanted(model: Model, given: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    with torch.no_grad():
        return [{"features": torch.cat(model.get_image_features(**item))} for item in given]


def test_a_chain_with_rows_left_out():
    model, given = Model().requires_grad_(False), samples()
    expected = wanted(model, given)
    component = chain_component(model, "image", lambda item: model.get_image_features(**item), given, expected)
    assert component.sources["pixels"].kind == "user"
    assert (component.sources["image_rows"].rule, component.roles) == ("kept_rows", ("encoder", "projector"))
    torch.testing.assert_close(component.module(**component.sample)["features"], expected[0]["features"])


def test_features_of_no_module_are_refused():
    model, given = Model().requires_grad_(False), samples()
    expected = [{"features": item["features"] * 2} for item in wanted(model, given)]
    with pytest.raises(UnsupportedModelError, match="features is no output of a module that the image_encoder calls"):
        chain_component(model, "image", lambda item: model.get_image_features(**item), given, expected)


def test_attention_stays_within_segments():
    query, key, value = (torch.randn(1, heads, 7, 8) for heads in (4, 2, 2))
    offsets = torch.tensor([0, 3, 4, 7], dtype=torch.int32)
    found, _ = segment_attention(torch.nn.Identity(), query, key, value, None, cu_seq_lens_q=offsets, scaling=0.3)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, a:b],
            key[:, :, a:b].repeat_interleave(2, 1),
            value[:, :, a:b].repeat_interleave(2, 1),
            scale=0.3,
        )
        for a, b in ((0, 3), (3, 4), (4, 7))
    ]
    torch.testing.assert_close(found, torch.cat(parts, 2).transpose(1, 2))
    assert not list(Packed(torch.nn.Identity())._towers)


def test_blocks_of_patches_are_told_from_numbers_that_users_give():
    def sample(patches: int, pictures: int) -> dict[str, torch.Tensor]:
        sizes = {"pixels": patches, "sizes": pictures, "order": patches // 4, "cu_seqlens": pictures + 1}
        tensors = {name: torch.zeros(size, dtype=torch.int32) for name, size in sizes.items()}
        tensors["cu_seqlens"][-1] = patches
        return tensors

    samples = [sample(64, 4), sample(32, 2)]  # pictures of one size
    assert _patch_axes(samples, {"order"}) == {(64, 32): "blocks_times4", (16, 8): "blocks"}
    assert _patch_axes(samples, ()) == {(64, 32): "patches"}
    assert _patch_axes([{"pixels": torch.zeros(3)}], ()) == {}
