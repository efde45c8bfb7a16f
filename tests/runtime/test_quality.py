"""KL divergence and agreement of logits, and what is asked of them."""

from dataclasses import replace

import numpy as np
import pytest
from tests.runtime.test_verify import VOCABULARY, Engine, FakeBundle, case

from genbundle.bundles import VerificationError
from genbundle.bundles.golden import GoldenCase, log_sum_exp
from genbundle.bundles.report import Check, Quality, QualityFloor
from genbundle.runtime.model import Model
from genbundle.runtime.quality import expect_quality, overall, quality_of
from genbundle.runtime.verify import check_cases, measure


def check(name: str, divergence: float, agreement: float, positions: int) -> Check:
    quality = Quality(kl_divergence=divergence, agreement=agreement, positions=positions)
    return Check(
        name=name, batch=1, prompt_length=3, new_tokens=positions, tokens_equal=False, max_logit_difference=1.0,
        quality=quality,
    )  # fmt: skip


def test_figures():
    wanted, got = np.log([[0.5, 0.5], [0.75, 0.25]]), np.log([[0.5, 0.5], [0.5, 0.5]])
    found = quality_of(wanted, got + 3, np.array([True, False]))
    by_hand = (0.75 * np.log(1.5) + 0.25 * np.log(0.5)) / 2
    assert (found.agreement, found.positions) == (0.5, 2)
    np.testing.assert_allclose(found.kl_divergence, by_hand)
    total = overall([found, Quality(kl_divergence=0.0, agreement=1.0, positions=6)])
    assert (total.agreement, total.positions) == (7 / 8, 8)


def test_floor():
    checks = [check("short", 0.1, 0.5, 10), check("long", 0.01, 1.0, 30)]
    assert expect_quality(checks, QualityFloor(agreement=0.8, kl_divergence=0.2)).agreement == 0.875
    with pytest.raises(VerificationError, match=r"mean KL divergence 0\.033, the same first token in 87\.5%; asked"):
        expect_quality(checks, QualityFloor(agreement=0.9))
    with pytest.raises(VerificationError, match=r"short: .* divergence 0\.1, the same .* 50\.0% .* at most 0\.05"):
        expect_quality(checks, QualityFloor(agreement=0.8, kl_divergence=0.05))
    with pytest.raises(VerificationError):
        expect_quality([check("nan", float("nan"), 1.0, 3)], QualityFloor(agreement=0.5, kl_divergence=1.0))


def measured(given: GoldenCase) -> Check:
    return measure(Model(FakeBundle(), Engine()), given)  # pyright: ignore[reportArgumentType]


def test_along_eagers_tokens():
    """The recorded tokens are taken, not those that the programs would choose."""
    other = case().sequences.copy()
    other[:, 3:] = 0
    found = measured(replace(case(), sequences=other))
    assert found.quality == Quality(kl_divergence=0.0, agreement=1.0, positions=2)
    reversed_logits = case().top_logits[..., ::-1].copy()
    found = measured(replace(case(), top_logits=reversed_logits))
    assert found.quality is not None and found.quality.agreement == 0 and found.quality.kl_divergence > 1
    assert not found.tokens_equal


def test_a_record_of_the_largest_logits_only():
    whole = replace(case(), top_logits=case().top_logits * np.float32(0.5))
    cut = whole.truncated(3)
    assert cut.rest is not None and cut.top_ids[0, 0].tolist() == [VOCABULARY - 1, VOCABULARY - 2, VOCABULARY - 3]
    np.testing.assert_allclose(cut.rest, log_sum_exp(whole.top_logits[..., :3]), rtol=1e-6)
    all_of_it, part = measured(whole).quality, measured(cut).quality
    assert all_of_it is not None and part is not None
    assert 0 < part.kl_divergence < all_of_it.kl_divergence and part.agreement == all_of_it.agreement == 1


def test_cases_with_and_without_a_floor():
    model = Model(FakeBundle(), Engine())  # pyright: ignore[reportArgumentType]
    off = replace(case(), top_logits=case().top_logits * np.float32(1.1))
    assert check_cases(model, [off], QualityFloor(agreement=1.0, kl_divergence=0.1))[0].tokens_equal
    with pytest.raises(VerificationError, match="the logits differ from eager's"):
        check_cases(model, [off], None)
