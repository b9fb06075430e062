"""How many prompts and raters a study needs.

A vote scores 1, 1/2 (comparable) or 0. With win rate p and share of ties t its variance is p (1 - p) - t / 4. Votes on
one prompt go together (the videos are the same): with correlation rho between two raters' votes on a prompt, k raters
and P prompts, the mean of all votes has variance

    v (1 + (k - 1) rho) / (k P),    v = p (1 - p) - t / 4           Kish 1965, design effect

so more raters help only down to v rho / P. The half-width of an interval is z times its root; a difference from 1/2 is
found with power 1 - beta by a two-sided test of level alpha when it is z_{1 - alpha/2} roots of the variance at 1/2
plus z_{1 - beta} roots of the variance at p away. The paper's 150 votes a cell, taken as independent, give +-8 points.
"""

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from vc2.errors import ConfigError

__all__ = ["Plan", "half_width", "plan_raters"]


@dataclass(frozen=True, slots=True)
class Plan:
    """A study that is large enough."""

    prompts: int  # for each pair of models
    raters: int  # who each see all of them
    votes: int  # for each pair and question
    half_width: float  # of the interval of the win rate, as a share
    rate: float | None  # win rate to be told from one half
    power: float | None  # to find it
    ties: float
    correlation: float
    confidence: float

    def sentence(self) -> str:
        """In words."""
        words = (
            f"{self.prompts} prompts, each judged by {self.raters} raters: {self.votes} votes for each pair of models "
            f"and question. The {self.confidence:.0%} interval of a win rate near 50 % is "
            f"+-{100 * self.half_width:.1f} points"
        )
        if self.rate is not None and self.power is not None:
            words += f"; a true {100 * self.rate:.0f} % is told from 50 % with power {self.power:.0%}"
        return f"{words} (ties {self.ties:.0%}, votes on one prompt correlate by {self.correlation:g})."

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def half_width(
    prompts: int,
    raters: int,
    *,
    rate: float = 0.5,
    ties: float = 0.0,
    correlation: float = 0.3,
    confidence: float = 0.95,
) -> float:
    """Half-width of the interval of a win rate, as a share."""
    return NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(_variance(rate, ties, correlation, raters) / prompts)


def plan_raters(
    *,
    width: float | None = None,
    rate: float | None = None,
    power: float = 0.8,
    prompts: int | None = None,
    raters: int | None = None,
    ties: float = 0.2,
    correlation: float = 0.3,
    confidence: float = 0.95,
) -> Plan:
    """The smallest study that measures finely enough, or finds a difference.

    Args:
        width: Half-width that the interval of a win rate at one half may have, as a share (0.05: +-5 points).
        rate: Win rate to be told from one half, ties counted as half each.
        power: Chance to find it.
        prompts: Prompts there are; None: asked for, with `raters` (default 3) each.
        raters: Raters there are; None, with `prompts` given: asked for.
        ties: Share of votes that say comparable.
        correlation: Between the votes of two raters on one prompt; 0 is too hopeful. A first study tells it.
        confidence: Of the interval, and 1 - level of the test.

    Raises:
        ConfigError: If nothing or too much is asked, or no number of raters is enough for so few prompts.
    """
    if (width is None) == (rate is None):
        raise ConfigError("say either how wide an interval may be or which win rate is to be told from one half")
    if not (0 <= ties < 1 and 0 <= correlation <= 1 and 0 < confidence < 1 and 0 < power < 1):
        raise ConfigError("ties and correlation are shares from 0 to 1 (ties below 1), confidence and power within")
    if (prompts is not None and prompts < 2) or (raters is not None and raters < 1):
        raise ConfigError("expected 2 prompts and 1 rater at least")
    if rate is not None and (not 0 < rate < 1 or rate == 0.5 or min(rate, 1 - rate) < ties / 2):
        raise ConfigError(f"a win rate of {rate:g} with {ties:.0%} ties cannot be told from one half, or cannot be")
    if width is not None and not 0 < width < 0.5:
        raise ConfigError(f"a half-width of {width:g} is none; expected a share between 0 and 0.5 (0.05: +-5 points)")

    def needed(raters: float) -> float:
        """Prompts for so many raters."""
        if width is not None:
            return _z((1 + confidence) / 2) ** 2 * _variance(0.5, ties, correlation, raters) / width**2
        assert rate is not None
        null, real = (math.sqrt(_variance(at, ties, correlation, raters)) for at in (0.5, rate))
        return ((_z((1 + confidence) / 2) * null + _z(power) * real) / abs(rate - 0.5)) ** 2

    if prompts is None:
        raters = raters or 3
        prompts = max(2, math.ceil(needed(raters) - 1e-9))
    elif raters is None:
        if needed(math.inf) >= prompts:
            raise ConfigError(
                f"{prompts} prompts are too few for any number of raters, as votes on one prompt go together "
                f"(correlation {correlation:g}); {math.floor(needed(math.inf)) + 1} prompts or more can do"
            )
        raters = next(number for number in range(1, 10**6) if needed(number) <= prompts + 1e-9)
    return Plan(
        prompts,
        raters,
        prompts * raters,
        half_width(prompts, raters, ties=ties, correlation=correlation, confidence=confidence),
        rate,
        None if rate is None else _power(prompts, raters, rate, ties, correlation, confidence),
        ties,
        correlation,
        confidence,
    )


def _z(share: float) -> float:
    return NormalDist().inv_cdf(share)


def _variance(rate: float, ties: float, correlation: float, raters: float) -> float:
    """Of the mean of one prompt's votes."""
    shared = correlation if math.isinf(raters) else (1 + (raters - 1) * correlation) / raters
    return (rate * (1 - rate) - ties / 4) * shared


def _power(prompts: int, raters: int, rate: float, ties: float, correlation: float, confidence: float) -> float:
    null, real = (math.sqrt(_variance(at, ties, correlation, raters) / prompts) for at in (0.5, rate))
    reach = abs(rate - 0.5) - _z((1 + confidence) / 2) * null
    return float(reach > 0) if real == 0 else NormalDist().cdf(reach / real)
