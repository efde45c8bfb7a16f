"""What one generation begins with: its options, its inputs, and the tokens that options put before the first one."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from genbundle.bundles import InputError
from genbundle.bundles.manifest import Generation, PrefixToken
from genbundle.runtime.generate import single_rows
from genbundle.runtime.inputs import complete_inputs
from genbundle.runtime.sampling import GenerationOptions, options_from
from genbundle.runtime.wiring import Wiring

Detect = Callable[[list[int], tuple[int, ...]], np.ndarray]  # (tokens before, candidates) -> one of them per row


def split_options(generation: Generation, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The caller's choices of prefix tokens, completed with the model's own, and the other options."""
    names = _names(generation)
    chosen = {name: value for name, value in generation.options.items() if name in names}
    chosen |= {name: value for name, value in given.items() if name in names and value is not None}
    return chosen, {name: value for name, value in given.items() if name not in names}


def generation_options(generation: Generation, given: Mapping[str, Any]) -> GenerationOptions:
    """The options of one generation: those given, else the model's own; InputError for one that can't be had."""
    own = {name: value for name, value in generation.options.items() if name not in _names(generation)}
    ends = {"eos_token_ids": generation.eos_token_ids, "pad_token_id": generation.pad_token_id}
    options = options_from({**own, **ends}, given)
    if options.return_timestamps and generation.timestamps is None:
        raise InputError("the option `return_timestamps` needs a model that generates times: this bundle's doesn't")
    return options


def generation_inputs(
    arrays: Mapping[str, Any], chosen: Mapping[str, Any], options: GenerationOptions, wiring: Wiring
) -> dict[str, np.ndarray]:
    """Generation inputs, completed and checked; where there is a prefix and no decoder tokens are given, with it.

    chosen: prefix option -> a value, or a list with one for each row. A token that is neither chosen nor a default may
    be the most probable of its kind, which the programs are asked for: the encoder runs once more then.

    Raises InputError for inputs that don't fit, and for a value that the bundle doesn't know.
    """
    manifest = wiring.manifest
    inputs = complete_inputs(arrays, manifest, options)
    prefix, times = manifest.generation.prefix, manifest.generation.timestamps
    if arrays.get("decoder_input_ids") is not None or not (prefix or times):
        return inputs
    start = inputs["decoder_input_ids"]

    def detect(before: list[int], candidates: tuple[int, ...]) -> np.ndarray:
        tokens = np.concatenate([start, np.tile(np.array(before, np.int64), (len(start), 1))], axis=1)
        whole = {**inputs, "decoder_input_ids": tokens}
        rows = [whole] if wiring.routes.together(whole) else single_rows(whole)
        logits = np.concatenate([wiring.prompt(row)[0] for row in rows])
        return np.array(candidates, np.int64)[logits[:, list(candidates)].argmax(axis=1)]

    columns = [column[:, None] for column in _prefix(prefix, chosen, len(start), detect)]
    if times is not None and not options.return_timestamps:
        columns.append(np.full_like(start, times.without))
    return {**inputs, "decoder_input_ids": np.concatenate([start, *columns], axis=1)}


def _names(generation: Generation) -> set[str]:
    return {item.option for item in generation.prefix if item.option is not None}


def _prefix(prefix: tuple[PrefixToken, ...], chosen: Mapping[str, Any], rows: int, detect: Detect) -> list[np.ndarray]:
    columns: list[np.ndarray] = []
    for item in prefix:
        if item.option in chosen:
            columns.append(_tokens(item, chosen[item.option or ""], rows))
            continue
        beside = (item.beside[name] for name in chosen if name in item.beside)
        token = next(beside, None) if chosen else item.default
        if token is not None:
            columns.append(np.full(rows, token, np.int64))
        elif item.detect:
            # A kind of token that is detected stands first, so that nothing before it differs from row to row.
            columns.append(detect([int(column[0]) for column in columns], tuple(sorted(set(item.tokens.values())))))
    return columns


def _tokens(item: PrefixToken, value: Any, rows: int) -> np.ndarray:
    values = [value] * rows if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or len(values) != rows or not all(isinstance(each, str) for each in values):
        raise InputError(f"the option `{item.option}` is {value!r}: accepted is a name, or a list of {rows} names")
    unknown = [each for each in values if each.lower() not in item.tokens]
    if unknown:
        raise InputError(f"the option `{item.option}` is {unknown[0]!r}: accepted are {', '.join(sorted(item.tokens))}")
    return np.array([item.tokens[each.lower()] for each in values], np.int64)
