"""Passes on a traced program, each on what torch's ONNX exporter would fail at without it, run by ONNX Runtime."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from genbundle.builder.exporting import to_onnx


class Cutoff(torch.nn.Module):
    """The logits above a quantile of a normal distribution."""

    config = None

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        cutoff = torch.distributions.normal.Normal(0, 1).icdf(torch.tensor(0.95))
        return {"y": torch.relu(x - cutoff)}


class Rotary(torch.nn.Module):
    """Pairs of numbers turned by angles, as complex numbers."""

    config = None

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        turns = torch.polar(torch.ones(3, 2), torch.arange(6.0).reshape(3, 2))[None].unsqueeze(2)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return {"y": torch.view_as_real(pairs * turns).flatten(-2)}


class Norm(torch.nn.Module):
    """A norm whose epsilon is as small as Helium's."""

    config = None

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8)}


class Mean(torch.nn.Module):
    """A mean over places that are counted as integers, of which there may be none; other multiples of small numbers."""

    config = None

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        count = (x != 0).sum(-1)
        sums = torch.add(x.sum(-1), 1e-8, alpha=2e8)
        return {"y": x.sum(-1) / (count + 1e-8), "sums": sums, "less": torch.add(count, 1e-8, alpha=0.5).rsqrt()}


class Squeezed(torch.nn.Module):
    """An axis of 3 squeezed, which stays."""

    config = None

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x.squeeze(1) * 2}


class Unturned(torch.nn.Module):
    """Keys whose turned part is empty."""

    config = None

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        kept, turned = (x * 2).split([x.shape[-1], 0], -1)
        return {"y": kept, "turned": turned.view(x.shape[0], 15, 0)}


class Chosen(torch.nn.Module):
    """Rows that their values choose, seen as pairs: how many isn't known before it runs."""

    config = None

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = x.flatten(0, 2)
        return {"y": rows[rows.sum(-1) > 0].view(-1, 2, 2)}


@pytest.mark.parametrize("module", [Cutoff(), Rotary(), Norm(), Mean(), Squeezed(), Unturned(), Chosen()])
def test_the_program_computes_what_the_module_does(module, tmp_path):
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    x[0, 1] = 0  # a padding token's embedding
    model = to_onnx(module.eval(), {"x": x}, {"x": {0: "batch"}}, None, None)
    ir.save(model, tmp_path / "model.onnx")
    found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()})
    for result, wanted in zip(found, module(x).values(), strict=True):
        np.testing.assert_allclose(result, wanted.numpy(), atol=1e-5)
