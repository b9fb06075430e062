"""What a study says, as plain values: figures with intervals, by question and pair, by rater, by model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["Agreement", "Estimate", "Parting", "SelfAgreement", "SignTest", "Strengths", "StudyResult"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its interval. None: cannot be said, and `note` says why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class SignTest:
    """Prompts on which a, b or neither had more votes, and how likely that much onesidedness is if both are alike."""

    a: int
    b: int
    even: int
    p: float
    p_holm: float  # corrected for all tests of the study


@dataclass(frozen=True, slots=True)
class Parting:
    """How the votes on one question about one pair parted. Rates are those of `a`."""

    question: str
    a: str
    b: str
    votes: int
    raters: int
    prompts: int
    wins_a: int
    ties: int
    wins_b: int
    split: Estimate  # ties count half
    dropped: Estimate  # ties do not count
    chosen_a: Estimate  # share of all votes, as the other two
    tied: Estimate
    chosen_b: Estimate
    sign: SignTest


@dataclass(frozen=True, slots=True)
class Agreement:
    """Between raters, on one question."""

    question: str
    alpha: Estimate
    units: int  # matchups with two votes or more
    correlation: float | None  # between votes on one matchup: for `plan_raters`


@dataclass(frozen=True, slots=True)
class SelfAgreement:
    """Of one rater: repeated trials, and sides."""

    rater: str
    votes: int
    same: int  # repeated questions answered as before
    repeats: int
    left: int  # times that the left video was chosen
    decided: int  # times that either was
    ties: int
    median_seconds: float
    attention: tuple[int, int]  # right ones, all


@dataclass(frozen=True, slots=True)
class Strengths:
    """Of all models, on one question, strongest first."""

    question: str
    models: tuple[str, ...]
    strengths: tuple[Estimate, ...]  # logits: 1 more is 2.7 : 1 among votes that decide
    tie_readiness: float | None  # nu
    note: str = ""


@dataclass(frozen=True, slots=True)
class StudyResult:
    """All that a study says."""

    study: str
    models: tuple[str, ...]
    questions: Mapping[str, str]  # titles by id
    raters: tuple[str, ...]
    accounts: Mapping[str, Any]
    rejected_files: tuple[tuple[str, str], ...]  # file, reason
    partings: tuple[Parting, ...]
    agreement: tuple[Agreement, ...]
    raters_themselves: tuple[SelfAgreement, ...]
    strengths: tuple[Strengths, ...]
    level: float
    resamples: int
    seed: int
    warnings: tuple[str, ...]

    def parting(self, question: str, a: str, b: str) -> Parting | None:
        """How the votes parted, seen from `a`; None where nobody was asked."""
        for one in self.partings:
            if one.question == question and {one.a, one.b} == {a, b}:
                return one if one.a == a else _turned(one)
        return None

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def _turned(one: Parting) -> Parting:
    """The same seen from the other model."""

    def rest(estimate: Estimate) -> Estimate:
        low, high = estimate.high, estimate.low
        return Estimate(*(None if at is None else 1 - at for at in (estimate.value, low, high)), estimate.note)

    sign = SignTest(one.sign.b, one.sign.a, one.sign.even, one.sign.p, one.sign.p_holm)
    return replace(
        one, a=one.b, b=one.a, wins_a=one.wins_b, wins_b=one.wins_a, split=rest(one.split), dropped=rest(one.dropped),
        chosen_a=one.chosen_b, chosen_b=one.chosen_a, sign=sign,
    )  # fmt: skip
