"""What a model's own code raises where it can't take its inputs is an answer, whatever it raises."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genbundle.builder import towers
from genbundle.builder.components import Component
from genbundle.builder.exporting import MODEL_ERRORS
from genbundle.builder.feeds import Feed
from genbundle.builder.lengths import loop_over_length
from genbundle.builder.packed import steering
from genbundle.builder.plan import Capture, _needed


class Raises(torch.nn.Module):
    """Takes nothing but a mask."""

    def __init__(self, error: type[Exception]):
        super().__init__()
        self.error = error

    def forward(self, mask: Any = None, **_: Any) -> Any:
        if mask is None:
            raise self.error("not like this")
        return SimpleNamespace(logits=mask)


@pytest.mark.parametrize("error", MODEL_ERRORS)
def test_no_error_of_a_models_code_gets_through(error, monkeypatch):
    module: Any = Raises(error)
    ids = torch.ones(1, 4, dtype=torch.long)
    assert loop_over_length(module, lambda length: {"ids": ids}) is None
    component = Component(name="c", roles=("decode",), module=module, sample={"ids": ids}, axes={}, sources={})
    monkeypatch.setattr("genbundle.builder.packed._steers", lambda *_: False)
    assert steering(component)
    given = Capture(inputs={"input_ids": ids}, prompt={"mask": ids}, step={})
    assert _needed(module, "mask", [given], "prompt")

    def refuse(*_: Any) -> None:
        raise error("no clips")

    monkeypatch.setattr(towers, "prepare_inputs", refuse)
    stage = towers.Stage(module=module, feeds={"grid": Feed(stage=None, name="grid")})
    assert towers._probes(module, stage, {"grid": torch.tensor([[1, 4, 4]])}) == []
