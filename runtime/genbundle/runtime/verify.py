"""Replay recorded generations on a loaded bundle and compare: the build's check, and a device's own proof."""

import numpy as np

from genbundle.bundles import InputError, VerificationError
from genbundle.bundles.golden import GOLDEN_NAME, GoldenCase, read_golden
from genbundle.bundles.manifest import Check
from genbundle.runtime.generate import Clock, Step, collect
from genbundle.runtime.inputs import token_ids
from genbundle.runtime.model import Model
from genbundle.runtime.prefix import generation_inputs, generation_options, split_options

# Of the largest logit's size. float32 programs of one model differ by rounding, far below it; a wrong mask or position
# shows above it even where the same token wins.
LOGIT_TOLERANCE = 1e-3


def verify_bundle(model: Model) -> tuple[Check, ...]:
    """Replay the bundle's own golden records; VerificationError names the input and step that differ."""
    if GOLDEN_NAME not in model.bundle.manifest.files:
        raise InputError(f"{model.bundle.path} holds no {GOLDEN_NAME}: it was built with verify=False")
    cases = read_golden(model.bundle.file(GOLDEN_NAME))
    if not cases:
        raise VerificationError(f"{model.bundle.path}: its {GOLDEN_NAME} records no generation: it proves nothing")
    return tuple(replay(model, case) for case in cases)


def replay(model: Model, case: GoldenCase) -> Check:
    """Generate from one case's inputs greedily and compare with what eager gave.

    Raises VerificationError, naming the case and the step, where a token differs, a logit isn't a number, or logits
    differ by more than rounding explains.
    """
    prefix, given = split_options(model.bundle.manifest.generation, case.options)
    options = generation_options(model.bundle.manifest.generation, given)
    inputs = generation_inputs(case.inputs, prefix, options, model.wiring)
    if token_ids(inputs).shape[0] != len(case.sequences):
        raise VerificationError(
            f"{case.name}: records {len(case.sequences)} sequences for inputs of {token_ids(inputs).shape[0]}"
        )
    taken, new = collect(model.wiring, inputs, options, None, Clock(), keep_logits=True)
    length = token_ids(inputs).shape[1]
    expected = case.sequences[:, length:]
    difference = _compare(case, taken, new, expected)
    return Check(
        name=case.name,
        batch=len(new),
        prompt_length=length,
        new_tokens=new.shape[1],
        tokens_equal=True,
        max_logit_difference=difference,
    )


def _compare(case: GoldenCase, taken: list[Step], new: np.ndarray, expected: np.ndarray) -> float:
    """The largest logit difference over the steps before each sequence ended."""
    worst = 0.0
    for index in range(max(new.shape[1], expected.shape[1])):
        for row in range(len(new)):
            ended = index > 0 and taken[min(index, len(taken)) - 1].finish_reasons[row] is not None
            if not ended and index < len(taken):
                logits = taken[index].logits[row].astype(np.float32)
                if index >= case.top_ids.shape[1] or case.top_ids[row, index].max() >= len(logits):
                    raise VerificationError(
                        f"{case.name}: step {index} of sequence {row}: the record has no logits of it, or of tokens "
                        f"beyond the model's {len(logits)}"
                    )
                if not np.isfinite(logits[case.top_ids[row, index]]).all():
                    raise VerificationError(
                        f"{case.name}: step {index} of sequence {row} gives logits that aren't numbers"
                    )
                difference = float(np.abs(logits[case.top_ids[row, index]] - case.top_logits[row, index]).max())
                worst = max(worst, difference)
                if not difference <= LOGIT_TOLERANCE * float(np.abs(case.top_logits[row, index]).max()):
                    raise VerificationError(
                        f"{case.name}: step {index} of sequence {row}: the logits differ from eager's by "
                        f"{difference:.3g}"
                    )
            got = new[row, index] if index < new.shape[1] else None
            want = expected[row, index] if index < expected.shape[1] else None
            if got != want:
                raise VerificationError(
                    f"{case.name}: step {index} of sequence {row} gives token {got}, eager gave {want} "
                    f"(largest logit difference so far {worst:.3g}, eager's margin {_margin(case, row, index):.3g})"
                )
    return worst


def _margin(case: GoldenCase, row: int, index: int) -> float:
    """How far eager's first choice was ahead of its second."""
    if index >= case.top_logits.shape[1] or case.top_logits.shape[2] < 2:
        return float("nan")
    first, second = np.sort(case.top_logits[row, index])[::-1][:2]
    return float(first - second)
