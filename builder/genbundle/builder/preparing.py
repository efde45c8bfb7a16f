"""Find, for every input of a vision tower, the preparer of the runtime that computes it from the user's inputs."""

from typing import Any

import numpy as np
import torch

from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Source
from genbundle.runtime.preparers import PREPARERS

Inputs = dict[str, torch.Tensor]


def explain_prepared(
    name: str, tower: torch.nn.Module, given: list[Inputs], samples: list[Inputs]
) -> dict[str, Source]:
    """The source of each of the tower's inputs `samples`, from the user's inputs `given`; one pair per capture.

    A user's input as it is comes first, then each preparer's outputs; UnsupportedModelError names an input that neither
    gives.
    """
    sources = {}
    for key in samples[0]:
        source = _as_given(key, given, samples) or _as_prepared(key, tower, given, samples)
        if source is None:
            raise UnsupportedModelError(f"the {name}'s input {key!r} has no explanation: no preparer computes it")
        sources[key] = source
    return sources


def _as_given(key: str, given: list[Inputs], samples: list[Inputs]) -> Source | None:
    for name in given[0]:
        if all(_equal(inputs[name].numpy(), sample[key]) for inputs, sample in zip(given, samples, strict=True)):
            return Source(kind="user", name=name)
    return None


def _as_prepared(key: str, tower: torch.nn.Module, given: list[Inputs], samples: list[Inputs]) -> Source | None:
    for rule, prepare in PREPARERS.items():
        for name in given[0]:
            options = _options(rule, tower, name)
            if options is None:
                continue
            try:
                results = [prepare({k: v.numpy() for k, v in inputs.items()}, options) for inputs in given]
            except (ValueError, IndexError, TypeError):
                continue
            for output in results[0]:
                if output == key and all(
                    _equal(result[output], sample[key]) for result, sample in zip(results, samples, strict=True)
                ):
                    return Source(kind="prepared", rule=rule, name=output, options=options)
    return None


def _options(rule: str, tower: torch.nn.Module, name: str) -> dict[str, Any] | None:
    """What a preparer must know of the tower, read off its modules' attributes."""
    if rule != "vision_grid":
        return {"inputs": [name]}
    merge = _attribute(tower, "spatial_merge_size")
    if not isinstance(merge, int):
        return None
    options: dict[str, Any] = {"inputs": [name], "spatial_merge_size": merge}
    side = _attribute(tower, "num_grid_per_side")
    if side is not None and (_attribute(tower, "interpolation_mode") or "bilinear") == "bilinear":
        align = _attribute(tower, "interpolation_align_corners") is True
        options |= {"num_grid_per_side": int(side), "align_corners": align}
    return options


def _attribute(module: torch.nn.Module, name: str) -> Any:
    return next((value for item in module.modules() if (value := getattr(item, name, None)) is not None), None)


def _equal(found: np.ndarray, expected: torch.Tensor) -> bool:
    if tuple(found.shape) != tuple(expected.shape):
        return False
    return bool(np.allclose(found.astype(np.float64), expected.double().numpy(), rtol=0, atol=1e-6))
