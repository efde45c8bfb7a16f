"""Replay recorded generations on a loaded bundle and compare: the build's check, and a device's own proof."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from genbundle.bundles import EngineError, InputError, VerificationError
from genbundle.bundles.golden import GOLDEN_NAME, GoldenCase, log_sum_exp, read_golden
from genbundle.bundles.report import Check, QualityFloor
from genbundle.runtime.generate import Clock, Step, collect
from genbundle.runtime.inputs import token_ids
from genbundle.runtime.model import Model
from genbundle.runtime.prefix import generation_inputs, generation_options, split_options
from genbundle.runtime.quality import expect_quality, quality_of
from genbundle.runtime.sampling import GenerationOptions

# Of the largest logit's size. float32 programs of one model differ by rounding, far below it; a wrong mask or position
# shows above it even where the same token wins.
LOGIT_TOLERANCE = 1e-3
# Of what eager's own rounding was measured to do to its logits: another program sums in another order.
_ROUNDINGS = 4


def verify_bundle(model: Model) -> tuple[Check, ...]:
    """Replay the bundle's own golden records; VerificationError names the input and step that differ."""
    manifest = model.bundle.manifest
    if GOLDEN_NAME not in manifest.files:
        raise InputError(f"{model.bundle.path} holds no {GOLDEN_NAME}: it was built with verify=False")
    cases = read_golden(model.bundle.file(GOLDEN_NAME))
    if not cases:
        raise VerificationError(f"{model.bundle.path}: its {GOLDEN_NAME} records no generation: it proves nothing")
    return check_cases(model, cases, manifest.verification.floor if manifest.verification is not None else None)


def check_cases(model: Model, cases: list[GoldenCase], floor: QualityFloor | None) -> tuple[Check, ...]:
    """Every case replayed: with equal tokens, or, where there is a `floor`, near enough to eager's.

    Raises VerificationError, naming what differs and by how much.
    """
    if floor is None:
        return tuple(replay(model, case) for case in cases)
    checks = tuple(measure(model, case) for case in cases)
    expect_quality(checks, floor)
    return checks


def replay(model: Model, case: GoldenCase) -> Check:
    """Generate from one case's inputs greedily and compare with what eager gave.

    Raises VerificationError, naming the case and the step, where a token differs, a logit isn't a number, or logits
    differ by more than rounding explains.
    """
    taken, new, expected = _run(model, case, forced=False)
    return Check(
        name=case.name,
        batch=len(new),
        prompt_length=case.sequences.shape[1] - expected.shape[1],
        new_tokens=new.shape[1],
        tokens_equal=True,
        max_logit_difference=_compare(case, taken, new, expected),
    )


def locate(model: Model, cases: Sequence[GoldenCase], error: VerificationError) -> None:
    """Say in `error`, which replaying one of `cases` raised, which programs can be at fault, in the order of the calls.

    At a step those of the prompt can be too, whose state it takes. Of a prompt's programs those are left out that all
    prompts of another route go through and get eager's logits from, if any remain: of a prompt with pictures an encoder
    and the merge do, where text alone holds. Nothing is said of an error that isn't about one step of a case.
    """
    failed = next((case for case in cases if case.name == error.case), None)
    if failed is None or error.step is None:
        return
    routes = {case.name: _route(model, case) for case in cases}
    route = routes[failed.name]
    programs = tuple(dict.fromkeys((*route, *(model.wiring.manifest.flow.step if error.step else ()))))
    others: dict[tuple[str, ...], list[GoldenCase]] = {}
    for case in cases:
        if error.step == 0 and routes[case.name] not in ((), route):
            others.setdefault(routes[case.name], []).append(case)
    held = {name for way, group in others.items() if all(_prompt_holds(model, case) for case in group) for name in way}
    error.programs = tuple(name for name in programs if name not in held) or programs
    error.held = tuple(name for name in programs if name not in error.programs)


def _prompt_holds(model: Model, case: GoldenCase) -> bool:
    """Whether the first new token of a case and its logits are eager's."""
    first = case.sequences.shape[1] - case.top_ids.shape[1] + 1
    try:
        replay(model, replace(case, sequences=case.sequences[:, :first], options={**case.options, "max_new_tokens": 1}))
    except (VerificationError, EngineError, InputError):
        return False
    return True


def _route(model: Model, case: GoldenCase) -> tuple[str, ...]:
    """The programs that a case's prompt goes through; none where the bundle refuses it."""
    try:
        return model.wiring.routes.choose(_inputs(model, case)[0]).programs
    except InputError:
        return ()


def measure(model: Model, case: GoldenCase) -> Check:
    """Run one case along eager's tokens and measure how far the logits are from eager's.

    Tokens that the case doesn't record count together, which makes the divergence a little smaller, never larger.
    Raises VerificationError where a logit isn't a number.
    """
    taken, new, expected = _run(model, case, forced=True)
    places = list(_open_places(taken, expected.shape[1], len(new)))
    found = np.stack([_logits(case, taken, row, index) for row, index in places])
    wanted = np.stack([case.top_logits[row, index] for row, index in places])
    difference = float(np.abs(found - wanted).max())
    if case.rest is not None:
        wanted = np.column_stack([wanted, [case.rest[place] for place in places]])
        found = np.column_stack([found, [_rest(case, taken, row, index) for row, index in places]])
    best = [case.top_ids[row, index, case.top_logits[row, index].argmax()] for row, index in places]
    first = [taken[index].logits[row].argmax() for row, index in places]
    quality = quality_of(wanted, found, np.equal(best, first))
    return Check(
        name=case.name,
        batch=len(new),
        prompt_length=case.sequences.shape[1] - expected.shape[1],
        new_tokens=new.shape[1],
        tokens_equal=quality.agreement == 1.0,
        max_logit_difference=difference,
        quality=quality,
    )


def _run(model: Model, case: GoldenCase, *, forced: bool) -> tuple[list[Step], np.ndarray, np.ndarray]:
    """The steps and new tokens of a generation from the case's inputs, along eager's if `forced`, and eager's."""
    inputs, options = _inputs(model, case)
    ids = token_ids(inputs)
    if ids.shape[0] != len(case.sequences):
        raise VerificationError(f"{case.name}: records {len(case.sequences)} sequences for inputs of {ids.shape[0]}")
    expected = case.sequences[:, ids.shape[1] :]
    along = expected if forced else None
    taken, new = collect(model.wiring, inputs, options, None, Clock(), keep_logits=True, forced=along)
    return taken, new, expected


def _inputs(model: Model, case: GoldenCase) -> tuple[dict[str, np.ndarray], GenerationOptions]:
    """A case's inputs, completed, and its options."""
    generation = model.bundle.manifest.generation
    prefix, given = split_options(generation, case.options)
    options = generation_options(generation, given)
    return generation_inputs(case.inputs, prefix, options, model.wiring), options


def _open_places(taken: list[Step], new_tokens: int, batch: int) -> Iterator[tuple[int, int]]:
    """Row and step of every token before which its sequence hadn't ended."""
    for index in range(min(new_tokens, len(taken))):
        for row in range(batch):
            if index == 0 or taken[index - 1].finish_reasons[row] is None:
                yield row, index


def _logits(case: GoldenCase, taken: list[Step], row: int, index: int) -> np.ndarray:
    """The logits of the tokens that the case records at a step; VerificationError where it doesn't fit."""
    logits = taken[index].logits[row].astype(np.float32)
    if index >= case.top_ids.shape[1] or case.top_ids[row, index].max() >= len(logits):
        raise _differs(
            case, row, index, f": the record has no logits of it, or of tokens beyond the model's {len(logits)}"
        )
    found = logits[case.top_ids[row, index]]
    if not np.isfinite(found).all():
        raise _differs(case, row, index, " gives logits that aren't numbers")
    return found


def _rest(case: GoldenCase, taken: list[Step], row: int, index: int) -> float:
    """What the logits amount to that the case doesn't record."""
    logits = taken[index].logits[row].astype(np.float32)
    return float(log_sum_exp(np.delete(logits, case.top_ids[row, index])))


def _compare(case: GoldenCase, taken: list[Step], new: np.ndarray, expected: np.ndarray) -> float:
    """The largest logit difference over the steps before each sequence ended."""
    worst, steps = 0.0, max(new.shape[1], expected.shape[1])
    tolerances = np.full(case.top_logits.shape[:2], LOGIT_TOLERANCE)
    if case.rounding is not None:
        # What rounding did to a step stays in the state of those behind it.
        tolerances = np.maximum(tolerances, _ROUNDINGS * np.maximum.accumulate(case.rounding, axis=1))
    opened = set(_open_places(taken, steps, len(new)))
    for index in range(steps):
        for row in range(len(new)):
            if (row, index) in opened:
                difference = float(np.abs(_logits(case, taken, row, index) - case.top_logits[row, index]).max())
                worst = max(worst, difference)
                if not difference <= tolerances[row, index] * float(np.abs(case.top_logits[row, index]).max()):
                    raise _differs(case, row, index, f": the logits differ from eager's by {difference:.3g}")
            got = new[row, index] if index < new.shape[1] else None
            want = expected[row, index] if index < expected.shape[1] else None
            if got != want:
                margin = _margin(case, row, index)
                raise _differs(
                    case, row, index, f" gives token {got}, eager gave {want} "
                    f"(largest logit difference so far {worst:.3g}, eager's margin {margin:.3g})",
                )  # fmt: skip
    return worst


def _differs(case: GoldenCase, row: int, index: int, what: str) -> VerificationError:
    return VerificationError(f"{case.name}: step {index} of sequence {row}{what}", case=case.name, step=index)


def _margin(case: GoldenCase, row: int, index: int) -> float:
    """How far eager's first choice was ahead of its second."""
    if index >= case.top_logits.shape[1] or case.top_logits.shape[2] < 2:
        return float("nan")
    first, second = np.sort(case.top_logits[row, index])[::-1][:2]
    return float(first - second)
