"""Pure functions on one row of logits `[vocabulary]` float32, equal to transformers' logits processors.

The order in which transformers applies them: `repetition_penalty` always; `temperature`, `top_k`, `top_p`, `min_p` only
when sampling. None changes the row it is given; a filtered-out token has the logit -inf.
"""

import numpy as np

# Candidates that top_p looks at first, before it takes eight times as many: the nucleus of a trained model is small.
_FIRST_CANDIDATES = 256
_BLOCK = 1 << 14
_PEAK_OF = 64
# Logits that differ by so little may be the same once they are divided by a temperature.
_MARGIN = 1e-6


def repetition_penalty(row: np.ndarray, ids: np.ndarray, penalty: float) -> np.ndarray:
    """Divide the positive logits of tokens in `ids` by `penalty`, multiply the negative ones; each token once.

    Args:
        row: logits `[vocabulary]` float32.
        ids: token ids `[length]` of the sequence, prompt included, padding left out. Ids beyond the vocabulary (an
            embedding may be larger than the head) are ignored.
        penalty: above 0; 1 changes nothing.
    """
    row = row.copy()
    ids = ids[ids < len(row)]
    seen = row[ids]
    factor = np.float32(penalty)
    row[ids] = np.where(seen < 0, seen * factor, seen / factor)
    return row


def temperature(row: np.ndarray, temperature: float) -> np.ndarray:
    """Divide the logits by `temperature`, above 0: below 1 sharpens the distribution, above 1 flattens it."""
    return row / np.float32(temperature)


def top_k(row: np.ndarray, k: int) -> np.ndarray:
    """Keep the `k` largest logits and all that tie with the smallest of them."""
    if k >= len(row):
        return row.copy()
    smallest = np.partition(row, len(row) - k)[len(row) - k]
    return np.where(row < smallest, np.float32(-np.inf), row)


def top_p(row: np.ndarray, p: float, total: float | None = None) -> np.ndarray:
    """Keep the fewest most probable tokens whose probabilities add up to `p`, at least one.

    Of tokens with equal logits on the border, the ones with the higher ids stay; how many is what transformers gives,
    which ones isn't defined there (it sorts unstably). transformers decides by a cumulative sum in float32: where that
    lies within rounding of the border, the two may differ by the token on it.

    total: `Weights.total` of the whole row, where this one is only a part of it with the largest logits.
    """
    if p >= 1:
        return row.copy()
    # top_k may have left a handful: only those count, and partitioning the many that tie at -inf would be slow.
    left = np.flatnonzero(row > -np.inf)
    kept = left[_nucleus(row[left] if len(left) < len(row) else row, p, total)] if len(left) else left
    result = np.full_like(row, -np.inf)
    result[kept] = row[kept]
    return result


def min_p(row: np.ndarray, p: float) -> np.ndarray:
    """Keep the tokens at least `p` times as probable as the most probable one."""
    if p <= 0:
        return row.copy()
    # exp(logit - largest) is the ratio of the two probabilities: the softmax's sum cancels out.
    border = row.max() + np.float32(np.log(p))
    return np.where(row < border, np.float32(-np.inf), row)


def among_largest(row: np.ndarray, k: int) -> np.ndarray:
    """Places `[n]`, ascending: all that `top_k` keeps after any `temperature`, and few others. The largest logit has to
    be finite.

    Of blocks of tokens, `k` have a peak of at least the `k`th largest peak: so many tokens are as large.
    """
    peaks = row[: len(row) // _PEAK_OF * _PEAK_OF].reshape(-1, _PEAK_OF).max(axis=1)
    if k > len(peaks):
        return np.arange(len(row))
    return _from(row, float(np.partition(peaks, len(peaks) - k)[len(peaks) - k]), 0.0)


def among_nucleus(row: np.ndarray, p: float, temperature: float, total: float) -> np.ndarray:
    """Places `[n]`, ascending: all that `top_p` (below 1) keeps after `temperature`, and few others. The largest logit
    has to be finite; total: the row's `Weights.total`.

    All tokens with less than an equal share of `1 - p` have less than `1 - p` together.
    """
    return _from(row, float(row.max()), temperature * float(np.log((1 - p) * total / len(row))))


def among_probable(row: np.ndarray, p: float, temperature: float) -> np.ndarray:
    """Places `[n]`, ascending: all that `min_p` (above 0) keeps after `temperature`, and few others. The largest logit
    has to be finite."""
    return _from(row, float(row.max()), temperature * float(np.log(p)))


class Weights:
    """exp((logit - largest) / temperature) of a row, whose largest logit has to be finite, block by block: arrays as
    large as a vocabulary take longer to get from the system than to compute.

    starts: where the blocks begin. sums: float64 `[blocks]`, of all weights up to a block's end. total: of all.
    """

    def __init__(self, row: np.ndarray, temperature: float):
        self._row, self._scale = row, np.float32(temperature)
        self._largest = row.max() / self._scale
        self.starts = range(0, len(row), _BLOCK)
        self.sums = np.cumsum([self.block(start).sum(dtype=np.float64) for start in self.starts])
        self.total = float(self.sums[-1])

    def block(self, start: int) -> np.ndarray:
        """Those of the block that begins at `start`, float32."""
        return np.exp(self._row[start : start + _BLOCK] / self._scale - self._largest)


def _from(row: np.ndarray, logit: float, offset: float) -> np.ndarray:
    """Places of the finite logits from `logit + offset` on, and of those that rounding may put there."""
    bound = logit + offset - _MARGIN * (abs(logit) + abs(offset))
    return np.flatnonzero(row >= np.float32(max(bound, float(np.finfo(np.float32).min))))


def _nucleus(row: np.ndarray, p: float, total: float | None) -> np.ndarray:
    """The places in `row` (finite logits) that `top_p` keeps, found by partitioning instead of sorting everything."""
    weights = np.exp(row - row.max())
    border = p * (weights.sum(dtype=np.float64) if total is None else total)
    candidates, count = np.arange(len(row)), _FIRST_CANDIDATES
    while count < len(row):
        likely = np.flatnonzero(row >= np.partition(row, -count)[-count])
        if weights[likely].sum(dtype=np.float64) > border:
            candidates = likely
            break
        count *= 8
    descending = candidates[np.argsort(row[candidates], kind="stable")[::-1]]
    above = np.cumsum(weights[descending], dtype=np.float64) - weights[descending]
    return descending[: max(1, np.count_nonzero(above < border))]
