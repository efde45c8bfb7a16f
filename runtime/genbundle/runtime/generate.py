"""The generation loop in layers: `steps` (token ids) under `stream` (text as it comes) and `generate` (the whole)."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from genbundle.bundles import InputError
from genbundle.runtime.inputs import TEXT_INPUTS, token_ids, token_mask
from genbundle.runtime.rules import apply_rules, check_forced
from genbundle.runtime.sampling import GenerationOptions
from genbundle.runtime.wiring import Wiring


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds of one generation. `programs` is what the programs took of `prompt` and `steps` together."""

    prompt: float
    steps: float
    programs: float
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens after the first, per second of stepping (per sequence)."""
        return (self.new_tokens - 1) / self.steps if self.new_tokens > 1 and self.steps else 0.0

    @property
    def overhead(self) -> float:
        """The loop's own seconds: feeding, sampling, decoding."""
        return self.prompt + self.steps - self.programs


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What `generate` returns.

    sequences: int64 `[batch, prompt + new]`, what `PreTrainedModel.generate` returns. texts: the new tokens as text,
    one per sequence (empty without a tokenizer). finish_reasons: "eos", "stop" or "length", one per sequence.
    """

    sequences: np.ndarray
    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    timings: Timings

    @property
    def text(self) -> str:
        """The first sequence's new text."""
        return self.texts[0] if self.texts else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One new token per sequence: `tokens` int64 `[batch]` (pad where a sequence had ended), `logits` float32
    `[batch, vocabulary]` that they were chosen by, and why each sequence that ended did."""

    tokens: np.ndarray
    logits: np.ndarray
    finish_reasons: tuple[str | None, ...]


@dataclass
class Clock:
    """Where the time of a generation goes."""

    prompt: float = 0.0
    steps: float = 0.0
    programs: float = 0.0
    new_tokens: int = 0

    def timings(self, prompt_tokens: int) -> Timings:
        """The frozen result."""
        return Timings(
            prompt=self.prompt,
            steps=self.steps,
            programs=self.programs,
            prompt_tokens=prompt_tokens,
            new_tokens=self.new_tokens,
        )


Stop = Callable[[int, int], bool]  # (row, token) -> whether the row's text has reached a stop string


def steps(
    wiring: Wiring,
    inputs: dict[str, np.ndarray],
    options: GenerationOptions,
    *,
    stop: Stop | None = None,
    clock: Clock | None = None,
    first_row: int = 0,
    forced: np.ndarray | None = None,
) -> Iterator[Step]:
    """Generate one token per sequence and step until every sequence ends.

    inputs: as `complete_inputs` returns them. first_row: the number of the first sequence in the caller's batch, which
    seeds are counted from. forced: tokens `[batch, new]` to take instead of choosing any. The last step's reasons are
    all set.
    """
    clock = clock or Clock()
    ids = token_ids(inputs)
    batch, prompt_length = ids.shape
    limit = asked = options.new_tokens(prompt_length)
    if wiring.manifest.flow.capacity is not None:
        limit = min(limit, wiring.manifest.flow.capacity - prompt_length)
    pad = padding_token(options)
    times = wiring.manifest.generation.timestamps if options.return_timestamps else None
    samplers = [
        options.sampler(None if options.seed is None else options.seed + first_row + row) for row in range(batch)
    ]
    # The repetition penalty leaves padding out, as transformers does; the other rules don't.
    paddings = prompt_length - token_mask(inputs).sum(axis=1)
    seen = ids.astype(np.int64)
    given = inputs.get("input_ids")
    reasons: list[str | None] = [None] * batch
    wiring.open(inputs)
    begun = time.perf_counter()
    most = prompt_length + limit
    logits, sequences = wiring.prompt(inputs, most)
    check_forced(options, logits.shape[-1])
    clock.prompt = clock.programs = time.perf_counter() - begun
    stepping = time.perf_counter()
    for length in range(prompt_length, most):
        if length == seen.shape[1]:
            seen = np.concatenate([seen, np.empty_like(seen)], axis=1)  # room for as many again
        chosen = [pad] * batch
        for row in range(batch):
            if reasons[row] is not None:
                continue
            so_far = seen[row, :length]
            said = None if given is None else given[row]
            scores = apply_rules(
                logits[row], options, so_far, prompt_length=prompt_length, limit=asked, given=said, times=times
            )
            before = so_far[paddings[row] :]
            token = samplers[row](scores, before) if forced is None else int(forced[row, length - prompt_length])
            chosen[row] = token
            if token in options.eos_token_ids:
                reasons[row] = "eos"
            elif stop is not None and stop(row, token):
                reasons[row] = "stop"
            elif length + 1 == most:
                reasons[row] = "length"
        tokens = np.array(chosen, np.int64)
        seen[:, length] = tokens
        clock.new_tokens += 1
        handed = time.perf_counter()
        clock.steps = handed - stepping
        yield Step(tokens=tokens, logits=logits, finish_reasons=tuple(reasons))
        if all(reasons):
            return
        begun = time.perf_counter()
        stepping += begun - handed  # what a stream's reader does meanwhile isn't the loop's time
        if length == wiring.manifest.flow.restart:
            logits, sequences = wiring.prompt(_whole(inputs, seen[:, prompt_length : length + 1]), most)
        else:
            logits = wiring.step(tokens[:, None], sequences)
        clock.programs += time.perf_counter() - begun


def _whole(inputs: dict[str, np.ndarray], new: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of a prompt that the new tokens `[batch, new]` belong to."""
    ids = np.concatenate([inputs["input_ids"], new], axis=1)
    mask = np.concatenate([inputs["attention_mask"], np.ones_like(new)], axis=1)
    # Token types and the like: new tokens are text.
    rest = {
        name: np.concatenate([array, np.zeros_like(new, dtype=array.dtype)], axis=1)
        for name, array in inputs.items()
        if name not in TEXT_INPUTS and array.shape == inputs["input_ids"].shape
    }
    return {**inputs, **rest, "input_ids": ids, "attention_mask": mask}


def padding_token(options: GenerationOptions) -> int:
    """What an ended sequence goes on with: the pad token, else the first end token, as transformers does."""
    return options.pad_token_id if options.pad_token_id is not None else next(iter(options.eos_token_ids), 0)


def single_rows(inputs: dict[str, np.ndarray], *, padded: bool = False) -> list[dict[str, np.ndarray]]:
    """A batch as separate sequences, for programs that take one at a time; with their padding if `padded`.

    An encoder's tokens keep theirs, which it masks itself. Other inputs are dealt out evenly along their first
    axis, packed patches by their patch grids `[pictures, 3]`, of which each sequence has as many; InputError where that
    isn't possible.
    """
    ids, given = token_ids(inputs), token_mask(inputs)
    mask = np.ones_like(given, dtype=bool) if padded else given.astype(bool)
    names = ("decoder_input_ids",) if "decoder_input_ids" in inputs else ("input_ids", "attention_mask")
    media = [array for name, array in inputs.items() if name not in TEXT_INPUTS]
    grids = [array for array in media if array.ndim == 2 and array.shape[1] == 3 and array.dtype.kind in "iu"]
    rows = []
    for row in range(len(ids)):
        of_tokens = (ids[row, mask[row]][None], given[row, mask[row]][None].astype(np.int64))
        single: dict[str, np.ndarray] = dict(zip(names, of_tokens, strict=False))
        for name, array in inputs.items():
            if name in single:
                continue
            packed = next((grid for grid in grids if array.ndim and grid.prod(axis=1).sum() == len(array)), None)
            if array.shape == ids.shape and "input_ids" in single:
                single[name] = array[row, mask[row]][None]
            elif packed is not None and packed is not array and len(packed) % len(ids) == 0:
                ends = np.concatenate([[0], packed.prod(axis=1).cumsum()])[:: len(packed) // len(ids)]
                single[name] = array[ends[row] : ends[row + 1]]
            elif array.ndim and len(array) % len(ids) == 0:
                share = len(array) // len(ids)
                single[name] = array[row * share : (row + 1) * share]
            else:
                raise InputError(f"{name}: {list(array.shape)} can't be shared out evenly to {len(ids)} sequences")
        rows.append(single)
    return rows


def collect(
    wiring: Wiring,
    inputs: dict[str, np.ndarray],
    options: GenerationOptions,
    stop: Stop | None,
    clock: Clock,
    *,
    keep_logits: bool = False,
    forced: np.ndarray | None = None,
) -> tuple[list[Step], np.ndarray]:
    """Run `steps` to the end: the steps, and the new tokens `[batch, new]`, those of `forced` if given.

    A batch that the programs don't take together runs row after row; its steps are put together afterwards. The steps'
    logits are dropped unless `keep_logits`: those of a long generation are gigabytes.
    """
    if wiring.routes.together(inputs):
        run = steps(wiring, inputs, options, stop=stop, clock=clock, forced=forced)
        taken = [_kept(step, keep_logits) for step in run]
        return taken, np.stack([step.tokens for step in taken], axis=1)
    # The batch's own length counts, as in transformers: a row without its padding may be shorter.
    length = token_ids(inputs).shape[1]
    fewest = max(options.min_new_tokens, options.min_length - length)
    options = replace(options, max_new_tokens=options.new_tokens(length), min_new_tokens=fewest, min_length=0)
    runs = []
    for row, single in enumerate(single_rows(inputs, padded=wiring.routes.takes_padding(inputs))):
        own = Clock()
        row_stop = None if stop is None else (lambda _, token, row=row: stop(row, token))
        own_tokens = None if forced is None else forced[row : row + 1]
        each = steps(wiring, single, options, stop=row_stop, clock=own, first_row=row, forced=own_tokens)
        runs.append([_kept(step, keep_logits) for step in each])
        clock.prompt, clock.steps = clock.prompt + own.prompt, clock.steps + own.steps
        clock.programs += own.programs
        clock.new_tokens = max(clock.new_tokens, own.new_tokens)
    taken = [_joined(runs, index, padding_token(options)) for index in range(max(map(len, runs)))]
    return taken, np.stack([step.tokens for step in taken], axis=1)


def _kept(step: Step, keep_logits: bool) -> Step:
    return step if keep_logits else replace(step, logits=step.logits[:, :0].copy())


def _joined(runs: list[list[Step]], index: int, pad: int) -> Step:
    """Step `index` of rows that ran one after another; a row that had ended by then goes on with padding."""
    at = [run[min(index, len(run) - 1)] for run in runs]
    tokens = [step.tokens[0] if index < len(run) else pad for run, step in zip(runs, at, strict=True)]
    return Step(
        tokens=np.array(tokens, np.int64),
        logits=np.concatenate([step.logits for step in at]),
        finish_reasons=tuple(step.finish_reasons[0] for step in at),
    )
