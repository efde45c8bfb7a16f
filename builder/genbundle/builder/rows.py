"""Models whose own generation mixes the rows of a batch: their bundles take one sequence, and refuse more."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from genbundle.builder.exporting import MODEL_ERRORS, quiet
from genbundle.builder.samples import FIRST_LOGITS, Inputs, SampleMaker, Samples
from genbundle.bundles import UnsupportedModelError
from genbundle.runtime.generate import single_rows
from genbundle.runtime.inputs import TEXT_INPUTS
from genbundle.runtime.verify import LOGIT_TOLERANCE


def mixes_rows(model: PreTrainedModel, samples: Samples) -> bool:
    """Whether eager generation answers a sequence otherwise beside another one of its length than alone.

    UnsupportedModelError where it answers one otherwise each time.
    """
    first = next((item for item in samples.held_out.values() if _single(item)), None)
    if first is None:
        return False
    maker = SampleMaker(model, [first])
    text = first.keys() <= set(TEXT_INPUTS) and "input_ids" in first
    other = {**first, **maker.text(first["input_ids"].shape[1])} if text else maker.other_content(first)
    together = {name: torch.cat([tensor, other[name]]) for name, tensor in first.items()}
    try:
        alone = [_first_logits(model, inputs) for inputs in (first, other)]
        again = _first_logits(model, first)
        both = _first_logits(model, together)
    except MODEL_ERRORS:
        return False  # it takes no batch, or not of these
    if not _alike(again, alone[0]):
        raise UnsupportedModelError(
            f"{type(model).__name__}: generate gives other logits for the same inputs each time, greedily too: what it "
            "draws at random can't be replayed"
        )
    return not all(map(_alike, both.chunk(2), alone))


def one_at_a_time(samples: Samples) -> Samples:
    """The rows of `samples` as samples of their own, with their padding."""
    capture = [_rows(item)[0] for item in samples.capture]
    held_out = {}
    for name, item in samples.held_out.items():
        rows = _rows(item)
        held_out |= {name if len(rows) == 1 else f"{name}, row {number}": row for number, row in enumerate(rows, 1)}
    return Samples(capture=capture, held_out=held_out, alone=True)


def _rows(inputs: Inputs) -> list[Inputs]:
    rows = single_rows({name: tensor.numpy() for name, tensor in inputs.items()}, padded=True)
    return [{name: torch.from_numpy(array) for name, array in row.items()} for row in rows]


def _single(inputs: Mapping[str, torch.Tensor]) -> bool:
    return all(tensor.dim() and len(tensor) == 1 for tensor in inputs.values())


def _first_logits(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    generate: Any = model.generate
    with quiet(), torch.no_grad():
        output = generate(**{name: tensor.clone() for name, tensor in inputs.items()}, **FIRST_LOGITS)
    return torch.stack(output.logits, 1).float()


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the logits `[rows, steps, vocabulary]` differ by rounding alone, as long as the tokens are the same."""
    if found.shape != expected.shape:
        return False
    for step, logits in zip(found.unbind(1), expected.unbind(1), strict=True):
        if not torch.allclose(step, logits, rtol=0, atol=LOGIT_TOLERANCE * float(logits.abs().max())):
            return False
        if not torch.equal(step.argmax(-1), logits.argmax(-1)):
            break
    return True
