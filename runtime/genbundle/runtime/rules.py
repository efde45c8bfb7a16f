"""What a generation config forbids or forces at a step, equal to transformers' logits processors of these names."""

from collections.abc import Collection, Iterable

import numpy as np

from genbundle.bundles import InputError
from genbundle.bundles.manifest import Timestamps
from genbundle.runtime.sampling import GenerationOptions


def apply_rules(
    row: np.ndarray,
    options: GenerationOptions,
    ids: np.ndarray,
    *,
    prompt_length: int,
    limit: int,
    given: np.ndarray | None = None,
    times: Timestamps | None = None,
) -> np.ndarray:
    """`row` (logits `[vocabulary]` float32) with forbidden tokens at -inf; a forced one is the only one left.

    Args:
        row: not written to.
        options: the generation's options.
        ids: the sequence so far, int64 `[length]`, padding included.
        prompt_length: tokens of the prompt, padding included.
        limit: the most new tokens that were asked for.
        given: the sequence's `input_ids`, the encoder's where there is one; None for inputs without tokens.
        times: the tokens that are times, where the generation is to have them.
    """
    row = without(row, _repeats_and_early_ends(options, ids, prompt_length, given))
    length = len(ids)
    if length == 1 and options.forced_bos_token_id is not None:
        row = only(row, (options.forced_bos_token_id,))
    if options.forced_eos_token_ids and length == prompt_length + limit - 1:
        row = only(row, options.forced_eos_token_ids)
    # What is forced wins over what is forbidden above, and loses against what is forbidden below.
    suppressed = set(options.suppress_tokens)
    # A forced first token moves the beginning by one, unless the prompt already has more than one.
    if length == prompt_length + (options.forced_bos_token_id is not None and prompt_length == 1):
        suppressed |= set(options.begin_suppress_tokens)
    row = without(row, suppressed)
    return row if times is None else timed(row, ids[prompt_length:], times, min(options.eos_token_ids, default=0))


def _repeats_and_early_ends(
    options: GenerationOptions, ids: np.ndarray, prompt_length: int, given: np.ndarray | None
) -> set[int]:
    forbidden: set[int] = set()
    if options.no_repeat_ngram_size:
        forbidden |= repeating(ids, ids, options.no_repeat_ngram_size)
    if options.encoder_no_repeat_ngram_size and given is not None:
        forbidden |= repeating(ids, given, options.encoder_no_repeat_ngram_size)
    for words in options.bad_words_ids:
        before = len(words) - 1
        if not before and words[0] in options.eos_token_ids:
            continue  # transformers lets a sequence end whatever the bad words are
        if not before or (len(ids) >= before and tuple(ids[len(ids) - before :].tolist()) == words[:-1]):
            forbidden.add(words[-1])
    fewest = max(options.min_length, prompt_length + options.min_new_tokens if options.min_new_tokens else 0)
    return forbidden | set(options.eos_token_ids) if len(ids) < fewest else forbidden


def check_forced(options: GenerationOptions, vocabulary: int) -> None:
    """InputError for a forced token that the logits, of `vocabulary` tokens, don't have."""
    first = () if options.forced_bos_token_id is None else (options.forced_bos_token_id,)
    for token in (*first, *options.forced_eos_token_ids):
        if token >= vocabulary:
            raise InputError(f"the token {token} can't be forced: this model has the tokens 0 to {vocabulary - 1}")


def timed(row: np.ndarray, new: np.ndarray, times: Timestamps, eos: int) -> np.ndarray:
    """A row in which times come in pairs, never go back, begin the sequence, and win where together they are likelier
    than any other token. After https://arxiv.org/abs/2212.04356.

    new: the generated tokens so far. eos: tokens below it are text.
    """
    row, said = row.copy(), new >= times.first
    row[times.without] = -np.inf
    pair_is_open = len(new) > 1 and said[-1] and not said[-2]
    if len(new) and said[-1]:
        if pair_is_open:
            row[:eos] = -np.inf
        else:
            row[times.first :] = -np.inf
    if said.any():
        last = int(new[said][-1])
        row[times.first : last + (not pair_is_open)] = -np.inf
    if not len(new):
        row[: times.first] = -np.inf
        if times.latest is not None:
            row[times.first + times.latest + 1 :] = -np.inf
    weights = np.exp(row - row.max())
    if weights[times.first :].sum() > weights[: times.first].max():
        row[: times.first] = -np.inf
    return row


def without(row: np.ndarray, tokens: Collection[int]) -> np.ndarray:
    """A row in which `tokens` can't be chosen; the row itself where there are none."""
    if not tokens:
        return row
    row = row.copy()
    row[[token for token in tokens if token < len(row)]] = -np.inf
    return row


def only(row: np.ndarray, tokens: Iterable[int]) -> np.ndarray:
    """A row that leaves nothing but `tokens`, alike."""
    forced = np.full_like(row, -np.inf)
    forced[list(tokens)] = 0
    return forced


def repeating(ids: np.ndarray, said: np.ndarray, size: int) -> set[int]:
    """The tokens that would make the last `size` of the sequence a repetition of `size` tokens in `said`."""
    if len(said) < size or len(ids) + 1 < size:
        return set()
    windows = np.lib.stride_tricks.sliding_window_view(said, size)
    last = ids[len(ids) - size + 1 :]
    return set(windows[(windows[:, :-1] == last).all(axis=1), -1].tolist())
