"""How much a model magnifies the rounding of float32: eager compared with itself in float64."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from genbundle.builder.loading import borrowed, load
from genbundle.builder.verify import record
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.golden import MOST_ROUNDING, GoldenCase

_MOST_PARAMETERS = 2**28  # a copy in float64 has twice the model's bytes


def with_rounding(
    source: PreTrainedModel | str | Path, parameters: int, cases: Sequence[GoldenCase]
) -> list[GoldenCase]:
    """`cases` with how far eager's logits are from those of the model in float64, of the largest one's size.

    Another program of the same model can't be expected to come nearer. Cases stay as they are where that can't be
    measured, or is more than a record may say. parameters: how many the model has.
    """
    if parameters > _MOST_PARAMETERS:
        return list(cases)
    model = load(source, None).model
    with borrowed(model) as eager:
        double: Any = copy.deepcopy(eager).double()
        double.config.dtype = torch.float64
        with _float64():
            return [replace(case, rounding=_rounding(double, case)) for case in cases]


@contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _rounding(double: PreTrainedModel, case: GoldenCase) -> np.ndarray | None:
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in case.inputs.items()}
    inputs = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    try:
        exact = record(double, case.name, inputs, case.options["max_new_tokens"])
    except UnsupportedModelError:  # operators that know no float64
        return None
    steps = min(exact.top_logits.shape[1], case.top_logits.shape[1])
    found, wanted = case.top_logits[:, :steps], exact.top_logits[:, :steps]
    relative = np.abs(found - wanted).max(-1) / np.abs(wanted).max(-1)
    # Behind another token, another sequence is compared.
    alike = np.cumprod(found.argmax(-1) == wanted.argmax(-1), axis=1)
    before = np.concatenate([np.ones_like(alike[:, :1]), alike[:, :-1]], axis=1)
    found = np.zeros(case.top_logits.shape[:2], np.float32)
    found[:, :steps] = relative * before
    return found if found.max() <= MOST_ROUNDING else None
