"""Generation inputs as arrays, completed and checked."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from genbundle.bundles import InputError, Manifest
from genbundle.bundles.manifest import PromptEdit
from genbundle.runtime.sampling import GenerationOptions

# What every text model takes; `decoder_input_ids` belongs to an encoder-decoder.
TEXT_INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")


def complete_inputs(inputs: Mapping[str, Any], manifest: Manifest, options: GenerationOptions) -> dict[str, np.ndarray]:
    """Generation inputs as arrays with `input_ids` `[batch, length]` and a mask; InputError for what doesn't fit.

    Of an encoder-decoder `decoder_input_ids` `[batch, length]` is completed too, from its start token.
    """
    arrays = {name: _as_array(name, value) for name, value in inputs.items() if value is not None}
    start = manifest.generation.decoder_start_token_id
    if start is not None:
        return _complete_encoder_inputs(arrays, manifest, options, start)
    ids = arrays.get("input_ids")
    if ids is None:
        raise InputError("generation needs input_ids [batch, length], a prompt, or messages")
    _check_ids("input_ids", ids)
    edit, given = manifest.generation.prompt_edit, arrays.get("attention_mask")
    if edit is not None:
        ids = _edited(ids, edit)
        if given is not None and given.ndim == 2:
            arrays["attention_mask"] = given[:, : given.shape[1] - edit.dropped]
    mask = arrays.setdefault("attention_mask", _default_mask(ids, options))
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask: expected shape {list(ids.shape)}, got {list(mask.shape)}")
    if not np.isin(mask, (0, 1)).all() or not mask.any(axis=1).all():
        raise InputError("attention_mask: expected 0 or 1, with at least one 1 in every row")
    if not mask[:, -1].all():
        raise InputError("attention_mask: pad prompts on the left; the last token of every row must be attended to")
    _check_room(ids, manifest)
    return {**arrays, "input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}


def _edited(ids: np.ndarray, edit: PromptEdit) -> np.ndarray:
    """What the model's own generate makes of the prompt's tokens."""
    kept = ids.shape[1] - edit.dropped
    if kept < 1:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens, of which this model leaves out the last {edit.dropped}"
        )
    ids = ids[:, :kept].copy()
    if edit.first is not None:
        ids[:, 0] = edit.first
    return ids


def _as_array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # rows of several lengths; a tensor on a GPU
        raise InputError(f"{name}: can't be made an array: {error}") from error
    if array.dtype.kind in "OSUMmc":
        raise InputError(f"{name}: expected numbers, got {value!r:.80}")
    return array


def _complete_encoder_inputs(
    arrays: dict[str, np.ndarray], manifest: Manifest, options: GenerationOptions, start: int
) -> dict[str, np.ndarray]:
    """The encoder's inputs as they are (a mask of ones or without pad tokens is added to ids), the decoder's begun."""
    ids = arrays.get("input_ids")
    # Pictures may be more than sequences; what says how many those are is the ids, where there are any.
    given = ids if ids is not None else next(iter(arrays.values()), None)
    if given is None or not given.ndim:
        raise InputError("generation needs the encoder's input: input_ids [batch, length], features, or text")
    if ids is not None:
        _check_ids("input_ids", ids)
        mask = arrays.setdefault("attention_mask", _default_mask(ids, options))
        if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
            raise InputError(f"attention_mask: expected 0 or 1 of shape {list(ids.shape)}, got {list(mask.shape)}")
    tokens = arrays.get("decoder_input_ids")
    if tokens is None:
        tokens = np.full((len(given), 1), start)
    _check_ids("decoder_input_ids", tokens)
    if (tokens[:, 0] != start).all():
        tokens = np.concatenate([np.full((len(tokens), 1), start), tokens], axis=1)
    _check_room(tokens, manifest)
    integers = {name: array.astype(np.int64) for name, array in arrays.items() if array.dtype.kind in "iub"}
    return {**arrays, **integers, "decoder_input_ids": tokens.astype(np.int64)}


def _check_ids(name: str, ids: np.ndarray) -> None:
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or 0 in ids.shape:
        raise InputError(f"{name}: expected integers [batch, length], got {ids.dtype} {list(ids.shape)}")
    if ids.min() < 0:
        raise InputError(f"{name}: expected token ids of at least 0, got {int(ids.min())}")


def _check_room(ids: np.ndarray, manifest: Manifest) -> None:
    capacity, batch = manifest.flow.capacity, manifest.flow.batch
    if manifest.flow.alone and batch is not None and len(ids) > batch:
        raise InputError(
            f"the batch has {len(ids)} sequences, this bundle takes {batch}: the original model mixes the sequences of "
            "a batch with each other, so that together they'd be answered otherwise: generate them one after another"
        )
    if capacity is not None and ids.shape[1] >= capacity:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens, this bundle holds {capacity} (prompt and generated): shorten it, "
            "or build the bundle with a larger max_length"
        )


def token_ids(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The ids `[batch, length]` that new ones are appended to: the decoder's, where there is an encoder before it."""
    return inputs["decoder_input_ids"] if "decoder_input_ids" in inputs else inputs["input_ids"]


def token_mask(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which of `token_ids` aren't padding, int64 `[batch, length]`; a decoder behind an encoder has no padding."""
    if "decoder_input_ids" in inputs:
        return np.ones_like(inputs["decoder_input_ids"])
    return inputs["attention_mask"]


def _default_mask(ids: np.ndarray, options: GenerationOptions) -> np.ndarray:
    """The mask that transformers makes when none is given: pad tokens are padding, unless they also end sequences."""
    pad = options.pad_token_id
    if pad is None or pad in options.eos_token_ids:
        return np.ones_like(ids)
    return (ids != pad).astype(np.int64)
