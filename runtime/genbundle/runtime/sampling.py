"""Generation options, and the sampler made from them: a closure that picks a token from a row of logits."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from genbundle.bundles import EngineError, InputError
from genbundle.runtime import logits

Sampler = Callable[[np.ndarray, np.ndarray], int]

# What transformers generates when nobody set a length.
_DEFAULT_NEW_TOKENS = 20
# transformers' names for two options, accepted beside ours.
_ALIASES = {
    "eos_token_id": "eos_token_ids",
    "forced_eos_token_id": "forced_eos_token_ids",
    "stop_strings": "stop",
}
_SEVERAL = ("stop", "eos_token_ids", "forced_eos_token_ids", "suppress_tokens", "begin_suppress_tokens")
_FILTERS = ("top_k", "top_p", "min_p")
_ASK_FOR_SAMPLING = ("temperature", *_FILTERS, "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """Every option that `generate` takes, with transformers' defaults.

    max_new_tokens: the most tokens to generate; wins over max_length, the most tokens with the prompt. min_new_tokens:
    no end-of-sequence token before so many; min_length the same, the prompt counted. no_repeat_ngram_size: no sequence
    of so many tokens twice; encoder_no_repeat_ngram_size: none that stands in input_ids. bad_words_ids,
    suppress_tokens, begin_suppress_tokens: token sequences, tokens, and first tokens that are never generated.
    forced_bos_token_id, forced_eos_token_ids: the token after a prompt of one, and the last that max_new_tokens allows.
    do_sample: sample, or take the most probable token; the sampling options (temperature, top_k, top_p, min_p, seed)
    count only then. top_k: 0 or None for no limit. stop: strings that end the text, left out of it. seed: None for a
    new random sequence each time. return_timestamps: tokens that are times too, from a model that has such.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    return_timestamps: bool = False

    def new_tokens(self, prompt_length: int) -> int:
        """The most tokens to generate after a prompt of that length; InputError when max_length leaves none."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return _DEFAULT_NEW_TOKENS
        if self.max_length <= prompt_length:
            raise InputError(
                f"the prompt has {prompt_length} tokens and `max_length`={self.max_length} counts them too: "
                "raise it, or give `max_new_tokens`, which doesn't"
            )
        return self.max_length - prompt_length

    def sampler(self, seed: int | None = None) -> Sampler:
        """A sampler with these options; `seed` in place of theirs (each row of a batch has its own)."""
        return make_sampler(
            do_sample=self.do_sample,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed if seed is None else seed,
        )


OPTION_NAMES = tuple(field.name for field in fields(GenerationOptions))


def options_from(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> GenerationOptions:
    """The options of one generation: what the caller gave, else the model's own defaults, else transformers'.

    Sampling follows the model's `do_sample`, except that a caller who gives temperature, top_k, top_p, min_p or a seed
    and says nothing about `do_sample` means to sample, and that temperature=0 always means the most probable token.
    With do_sample=False the sampling options are ignored, as transformers does. None stands for "not given", save for
    top_k, top_p and min_p, where it switches the model's own filter off.

    Args:
        defaults: the bundle's options (`manifest.generation`), in the same names.
        given: the caller's options; transformers' `eos_token_id` and `stop_strings` work as well.

    Raises:
        InputError: an unknown option, or a value out of its range; says what is accepted.
    """
    given = {name: value for name, value in _named(given).items() if value is not None or name in _FILTERS}
    values = {name: value for name, value in _named(defaults).items() if value is not None} | given
    if "do_sample" not in given and any(given.get(name) is not None for name in _ASK_FOR_SAMPLING):
        values["do_sample"] = True
    for name in _SEVERAL:
        if name in values:
            values[name] = _as_tuple(values[name])
    if "bad_words_ids" in values:
        several = _as_tuple(values["bad_words_ids"])
        values["bad_words_ids"] = tuple(_as_tuple(words) if isinstance(words, Iterable) else words for words in several)
    _check_values(values)
    if values.get("temperature") == 0:
        values |= {"temperature": 1.0, "do_sample": False}
    return GenerationOptions(**values)


def make_sampler(
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> Sampler:
    """A function from logits `[vocabulary]` float32 and the sequence's ids `[length]`, padding left out, to a token id.

    Greedy without `do_sample` (or at temperature 0): the first of the largest logits, after the repetition penalty.
    Otherwise one draw per call from the filtered distribution, from numpy's PCG64 seeded with `seed`: the same seed and
    logits give the same tokens, though not the tokens that torch's generator gives.

    Raises:
        InputError: a value out of its range. The sampler raises EngineError for logits that aren't a distribution.
    """
    # This function's parameters shadow the logits functions of the same names, so those are called through `logits.`.
    _check_values(
        {
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
    )
    temperature = min(float(temperature), float(np.finfo(np.float32).max))
    sampling = do_sample and temperature > 0
    nucleus = float(top_p) if top_p is not None and top_p < 1 else None
    random = np.random.Generator(np.random.PCG64(seed)) if sampling else None

    def filtered(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may be left, and their logits."""
        total = None
        if top_k:
            tokens = logits.among_largest(row, top_k)
        elif nucleus is not None:
            total = logits.Weights(row, temperature).total
            tokens = logits.among_nucleus(row, nucleus, temperature, total)
        else:
            assert min_p
            tokens = logits.among_probable(row, min_p, temperature)
        left = logits.temperature(row[tokens], temperature)
        if top_k:
            left = logits.top_k(left, top_k)
        if nucleus is not None:
            left = logits.top_p(left, nucleus, total)
        return tokens, logits.min_p(left, min_p) if min_p else left

    def sample(row: np.ndarray, ids: np.ndarray) -> int:
        if repetition_penalty != 1:
            row = logits.repetition_penalty(row, ids, repetition_penalty)
        if random is None:
            return int(row.argmax())
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            largest = row.max(initial=-np.inf) / np.float32(temperature)
        if not np.isfinite(largest):
            left = np.count_nonzero(row != -np.inf)
            raise EngineError(f"can't sample: the largest logit is {largest} ({left} of {len(row)} tokens are left)")
        if not (top_k or nucleus is not None or min_p):
            return _draw(row, random.random(), temperature)
        tokens, left = filtered(row)
        return int(tokens[_draw(left, random.random())])

    return sample


def _draw(row: np.ndarray, uniform: float, temperature: float = 1.0) -> int:
    """The token where the cumulative distribution of the softmax of `row / temperature` passes `uniform`, in [0, 1)."""
    weights = logits.Weights(row, temperature)
    border = uniform * weights.total
    block = _first_beyond(weights.sums, border)
    start = weights.starts[block]
    before = weights.sums[block - 1] if block else 0.0
    return start + _first_beyond(before + np.cumsum(weights.block(start), dtype=np.float64), border)


def _first_beyond(cumulative: np.ndarray, border: float) -> int:
    """The first place beyond the border; where rounding put that on the end, the last place that adds anything."""
    return int(min(np.searchsorted(cumulative, border, side="right"), cumulative.argmax()))


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` under this module's names; InputError for an unknown one."""
    named: dict[str, Any] = {}
    for name, value in options.items():
        known = _ALIASES.get(name, name)
        if known not in OPTION_NAMES:
            import difflib  # only for this message

            similar = difflib.get_close_matches(name, [*OPTION_NAMES, *_ALIASES], n=1)
            hint = f", did you mean {similar[0]!r}?" if similar else ":"
            raise InputError(f"unknown generation option {name!r}{hint} accepted are {', '.join(OPTION_NAMES)}")
        if known in named:
            raise InputError(f"the option {known!r} is given twice, once as {name!r}")
        named[known] = value
    return named


def _as_tuple(value: Any) -> tuple:
    """One string or id, or several of them, as a tuple; arrays give plain ints."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else (value,)


def _check_values(values: dict[str, Any]) -> None:
    for name, value in values.items():
        accepted, fits = _ACCEPTED[name]
        if not fits(value):
            huge = isinstance(value, int) and value.bit_length() > 1000  # Python refuses to write thousands of digits
            shown = "a number of hundreds of digits" if huge else repr(value)
            raise InputError(f"the option `{name}` is {shown}: accepted is {accepted}")


def _is_int(value: Any, least: int) -> bool:
    # True and False are ints to Python, and a mistake here.
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    try:
        return number and math.isfinite(float(value))
    except OverflowError:  # a whole number of hundreds of digits
        return False


_TOKEN_IDS: tuple[str, Callable[[Any], bool]] = (
    "a token id, or several",
    lambda value: all(_is_int(item, 0) for item in value),
)
_ACCEPTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "max_new_tokens": ("a whole number of at least 1", lambda value: value is None or _is_int(value, 1)),
    "max_length": ("a whole number of at least 1", lambda value: value is None or _is_int(value, 1)),
    "min_new_tokens": ("a whole number of at least 0", lambda value: _is_int(value, 0)),
    "min_length": ("a whole number of at least 0", lambda value: _is_int(value, 0)),
    "no_repeat_ngram_size": ("a whole number of at least 0", lambda value: _is_int(value, 0)),
    "encoder_no_repeat_ngram_size": ("a whole number of at least 0", lambda value: _is_int(value, 0)),
    "bad_words_ids": (
        "a list of lists of token ids, none empty",
        lambda value: all(isinstance(words, tuple) and words and all(_is_int(i, 0) for i in words) for words in value),
    ),
    "forced_bos_token_id": ("a token id, or None", lambda value: value is None or _is_int(value, 0)),
    **dict.fromkeys(("forced_eos_token_ids", "suppress_tokens", "begin_suppress_tokens"), _TOKEN_IDS),
    "do_sample": ("True or False", lambda value: isinstance(value, bool | np.bool_)),
    "temperature": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
    "top_k": (
        "a whole number of at least 1, or 0 or None for no limit",
        lambda value: value is None or _is_int(value, 0),
    ),
    "top_p": ("a number from 0 to 1, or None", lambda value: value is None or (_is_number(value) and 0 <= value <= 1)),
    "min_p": ("a number from 0 to 1, or None", lambda value: value is None or (_is_number(value) and 0 <= value <= 1)),
    "repetition_penalty": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "seed": ("a whole number of at least 0, or None", lambda value: value is None or _is_int(value, 0)),
    "stop": (
        "a string, or several, none empty",
        lambda value: all(isinstance(item, str) and item for item in value),
    ),
    "eos_token_ids": _TOKEN_IDS,
    "pad_token_id": ("a token id, or None", lambda value: value is None or _is_int(value, 0)),
    "return_timestamps": ("True or False", lambda value: isinstance(value, bool | np.bool_)),
}
