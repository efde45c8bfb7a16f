"""Find, for every input of a program, the preparer of the runtime that computes it from the user's inputs."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Source
from genbundle.runtime.preparers import PREPARERS

Inputs = Mapping[str, torch.Tensor]


def explain_prepared(
    name: str, module: torch.nn.Module, given: list[Inputs], samples: list[Inputs], keys: Iterable[str] | None = None
) -> dict[str, Source]:
    """The source of each of the inputs `samples` (or of `keys` alone), from the user's inputs `given`; pairs of both.

    A user's input as it is comes first, then each preparer's outputs, with what it must know read off the attributes of
    `module`'s parts; UnsupportedModelError names an input that neither gives. Pairs may hold some of the inputs only.
    """
    sources: dict[str, Source] = {}
    for key in samples[0] if keys is None else keys:
        known = [(source.rule or "", source.options) for source in sources.values() if source.kind == "prepared"]
        source = _as_given(key, given, samples) or _as_prepared(key, module, given, samples, known)
        if source is None:
            raise UnsupportedModelError(f"the {name}'s input {key!r} has no explanation: no preparer computes it")
        sources[key] = source
    return sources


def _as_given(key: str, given: list[Inputs], samples: list[Inputs]) -> Source | None:
    for name in given[0]:
        if all(
            name in inputs and _equal(inputs[name].numpy(), sample[key])
            for inputs, sample in zip(given, samples, strict=True)
            if key in sample
        ):
            return Source(kind="user", name=name)
    return None


def _as_prepared(
    key: str, module: torch.nn.Module, given: list[Inputs], samples: list[Inputs], known: list[tuple[str, dict]]
) -> Source | None:
    pairs = [
        ({name: value.numpy() for name, value in inputs.items()}, sample[key])
        for inputs, sample in zip(given, samples, strict=True)
        if key in sample
    ]
    for rule, options in itertools.chain(known, _candidates(module, given[0])):
        if _prepares(rule, options, key, pairs):
            return Source(kind="prepared", rule=rule, name=key, options=options)
    return None


def _prepares(rule: str, options: dict[str, Any], key: str, pairs: list[tuple[dict, torch.Tensor]]) -> bool:
    for inputs, expected in pairs:
        try:
            found = PREPARERS[rule](inputs, options).get(key)
        except (ValueError, IndexError, TypeError, KeyError, ZeroDivisionError):
            return False
        if found is None or not _equal(found, expected):
            return False
    return True


def _candidates(module: torch.nn.Module, given: Inputs) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every preparer with every set of options that may fit."""
    merges = [*_numbers(module, "spatial_merge_size"), 1]
    integers = [name for name, value in given.items() if not value.is_floating_point()]
    for name in integers:
        yield from (("vision_grid", options) for options in _grids(module, name, merges, integers))
        for merge, size, patch in itertools.product(
            merges, _numbers(module, "window_size"), _numbers(module, "patch_size")
        ):
            options = {"inputs": [name], "spatial_merge_size": merge, "window_size": size, "patch_size": patch}
            yield "vision_windows", options
        for merge in (*_pairs(module, "merge_kernel_size"), *_pairs(module, "merge_size"), (1, 1)):
            yield "vision_blocks", {"inputs": [name], "merge": list(merge)}
        yield "kept_rows", {"inputs": [name]}
        yield from (("vision_pairs", {"inputs": [name], "spatial_merge_size": merge}) for merge in merges)
        yield from (("image_tiles", options) for options in _tiles(module, name, given))
    # Last: tiles that are no pictures look like padding too.
    for name in given:
        yield "real_images", {"inputs": [name]}


def _tiles(module: torch.nn.Module, name: str, given: Inputs) -> Iterator[dict[str, Any]]:
    pinpoints = [value for value in _values(module, "image_grid_pinpoints") if isinstance(value, list | tuple)]
    pixels = [other for other, value in given.items() if value.dim() == 5]
    ratios = [value for value in _values(module, "vision_aspect_ratio") if isinstance(value, str)]
    most = {"most": int(ratios[0].rpartition("_")[2])} if ratios and ratios[0].startswith("anyres_max_") else {}
    for sizes, pixel, tile, patch, part in itertools.product(
        pinpoints[:1], pixels, _numbers(module, "image_size"), _numbers(module, "patch_size"), (1, 2, 4)
    ):
        pairs = [[int(high), int(wide)] for high, wide in sizes]
        options = {"inputs": [pixel, name], "pinpoints": pairs, "tile": tile, "patches": tile // patch // part}
        yield {**options, **most}


def _grids(module: torch.nn.Module, name: str, merges: list[int], integers: list[str]) -> Iterator[dict[str, Any]]:
    per_picture = [other for other in integers if other != name]
    flags = [
        {},
        {"merge_temporal": True},
        {"include_temporal": True},
        {"merge_temporal": True, "include_temporal": True},
    ]
    tables: list[dict[str, Any]] = [{}]
    for side, align, mode, padding in itertools.product(
        _numbers(module, "num_grid_per_side"), (False, True), ("bilinear", "bicubic"), ("border", "zeros")
    ):
        table: dict[str, Any] = {"num_grid_per_side": side, "align_corners": align}
        table |= {"mode": mode} if mode != "bilinear" else {}
        tables.append(table | ({"padding": padding} if padding != "border" else {}))
    for table, merge, flag in itertools.product(tables, [*merges, *per_picture], flags):
        inputs = [name, merge] if isinstance(merge, str) else [name]
        yield {"inputs": inputs, "spatial_merge_size": merge, **table, **flag}


def _values(module: torch.nn.Module, name: str) -> list[Any]:
    """What parts of `module`, or their configs, call so."""
    parts = list(module.modules())
    owners = (*parts, *(part.config for part in parts if getattr(part, "config", None) is not None))
    return [value for owner in owners if (value := getattr(owner, name, None)) is not None]


def _numbers(module: torch.nn.Module, name: str) -> list[int]:
    """The different whole numbers that parts of `module` call so."""
    found = _values(module, name)
    return list(dict.fromkeys(value for value in found if isinstance(value, int) and not isinstance(value, bool)))


def _pairs(module: torch.nn.Module, name: str) -> list[tuple[int, int]]:
    found = _values(module, name)
    pairs = [(value, value) if isinstance(value, int) else value for value in found]
    return list(
        dict.fromkeys((pair[0], pair[1]) for pair in pairs if isinstance(pair, tuple | list) and len(pair) == 2)
    )


def _equal(found: np.ndarray, expected: torch.Tensor) -> bool:
    if tuple(found.shape) != tuple(expected.shape):
        return False
    return bool(np.allclose(found.astype(np.float64), expected.double().numpy(), rtol=0, atol=1e-6))
