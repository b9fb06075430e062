"""Krippendorff's alpha against worked examples, and its laws."""

import numpy as np
import pytest

from vc2.eval.study.agreement import krippendorff_alpha, unit_counts


def alpha_of(rows: tuple[str, ...]) -> float:
    """A row per rater, a column per unit, a dot where a rater said nothing."""
    units = [[value for value in column if value != "."] for column in zip(*rows, strict=True)]
    return float(krippendorff_alpha(unit_counts(units, sorted(set("".join(rows)) - {"."}))))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (("0100000010", "1110010000"), 0.095),
        (("123321412...", "1233224125.3", ".3332342251.", "12332441251."), 0.743),
    ],
    ids=["two observers", "four observers, some missing"],
)
def test_alpha_equals_the_textbook(rows: tuple[str, ...], expected: float) -> None:
    """The nominal examples of Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"."""
    assert round(alpha_of(rows), 3) == expected


def test_alpha_is_one_for_raters_who_agree_and_none_for_chance() -> None:
    """Identical raters: 1. Raters who throw dice: about 0. Raters who contradict each other: below 0."""
    chance = np.random.default_rng(0)
    said = "".join(chance.choice(list("abt"), 600))
    assert alpha_of((said, said, said)) == 1
    dice = tuple("".join(chance.choice(list("abt"), 600)) for _ in range(3))
    assert abs(alpha_of(dice)) < 0.05
    assert alpha_of((said, said.translate(str.maketrans("abt", "bta")))) < -0.2


def test_alpha_is_not_defined_without_two_raters_or_two_values() -> None:
    assert np.isnan(alpha_of(("ab.", "..a")))
    assert np.isnan(alpha_of(("aaa", "aaa")))


def test_weights_are_repetitions() -> None:
    """A unit that counts twice is as two units that were said the same of; one that counts not is as if left out."""
    rows = ("abtab", "abttb", "aat.b")
    units = [[value for value in column if value != "."] for column in zip(*rows, strict=True)]
    times = np.array([2, 1, 0, 3, 1])
    repeated = [unit for unit, number in zip(units, times, strict=True) for _ in range(number)]
    weighted = krippendorff_alpha(unit_counts(units, "abt"), times[None].astype(float))
    assert weighted[0] == pytest.approx(float(krippendorff_alpha(unit_counts(repeated, "abt"))))
