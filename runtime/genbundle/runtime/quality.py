"""How near a lossy precision comes to eager: KL divergence and top-1 agreement along eager's own tokens."""

from collections.abc import Iterable, Sequence

import numpy as np

from genbundle.bundles import VerificationError
from genbundle.bundles.golden import log_sum_exp
from genbundle.bundles.report import Check, Quality, QualityFloor


def quality_of(expected: np.ndarray, found: np.ndarray, same_first: np.ndarray) -> Quality:
    """Eager's and a bundle's logits `[positions, tokens]` compared; several tokens may be put together as one.

    same_first: bool `[positions]`, where both give the same one of all tokens the largest logit.
    """
    wanted, got = (array - log_sum_exp(array)[:, None] for array in (expected, found))
    divergence = (np.exp(wanted) * (wanted - got)).sum(axis=1)
    return Quality(
        kl_divergence=float(divergence.mean()),
        agreement=float(same_first.mean()),
        positions=len(expected),
    )


def overall(parts: Sequence[Quality]) -> Quality:
    """Several qualities as one, each weighing as much as it has positions."""
    weights = [part.positions for part in parts]
    return Quality(
        kl_divergence=float(np.average([part.kl_divergence for part in parts], weights=weights)),
        agreement=float(np.average([part.agreement for part in parts], weights=weights)),
        positions=sum(weights),
    )


def expect_quality(checks: Iterable[Check], floor: QualityFloor) -> Quality:
    """The quality over all checks; VerificationError, with both figures, where it is below `floor`."""
    measured = {check.name: check.quality for check in checks if check.quality is not None}
    total = overall(list(measured.values()))
    said = f"over {total.positions} tokens of {len(measured)} inputs: {in_words(total)}"
    if not total.agreement >= floor.agreement:
        raise VerificationError(
            f"this precision's tokens are too far from the original model's, {said}; asked for is an agreement of at "
            f"least {floor.agreement:.1%}: choose a finer precision, or a lower quality_floor"
        )
    worst = max(measured, key=lambda name: measured[name].kl_divergence)
    if floor.kl_divergence is not None and not measured[worst].kl_divergence <= floor.kl_divergence:
        raise VerificationError(
            f"{worst}: this precision's probabilities are too far from the original model's: "
            f"{in_words(measured[worst])} (and {said}); asked for is a divergence of at most "
            f"{floor.kl_divergence:g} for each input: choose a finer precision, or give a quality_floor of your own"
        )
    return total


def in_words(quality: Quality) -> str:
    """Both figures, for people."""
    return f"mean KL divergence {quality.kl_divergence:.2g}, the same first token in {quality.agreement:.1%}"
