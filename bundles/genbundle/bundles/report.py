"""What a build found when it replayed its bundle: the part of the manifest that is called `verification`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How near the next-token distributions of a lossy precision are to eager's, along eager's own tokens.

    kl_divergence: of the bundle's distribution from eager's, in nats; the mean over `positions` new tokens. agreement:
    the share of those where both give the same token the largest logit.
    """

    kl_divergence: float
    agreement: float
    positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityFloor:
    """What a bundle of a lossy precision has to reach: the least `agreement` over all inputs, and the most
    `kl_divergence` of any one; None for any."""

    agreement: float
    kl_divergence: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One input that the finished bundle was replayed on, compared with eager; `quality` of a lossy precision."""

    name: str
    batch: int
    prompt_length: int
    new_tokens: int
    tokens_equal: bool
    max_logit_difference: float
    quality: Quality | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The report of the build's replay; `provider` is where the programs ran, `pending` what could not be run there.

    quality, floor: of a lossy precision, over all checks, and what was asked for; None where tokens had to be equal.
    """

    provider: str
    checks: tuple[Check, ...]
    pending: str | None = None
    quality: Quality | None = None
    floor: QualityFloor | None = None
