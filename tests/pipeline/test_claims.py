"""Verdicts: planted effects are found, reversed ones refuted, noise is left undecided."""

import numpy as np
import pytest

from vc2.pipeline.claims import CLAIMS, Claim, Contrast, interval, judged, paper_rows, rank_correlation
from vc2.pipeline.table3 import Row

GAIN = Contrast("", "quality", {(Row.F_SPA_DIR, "end"): 1, (Row.F_BASE, "end"): -1})
BETTER = Claim("x", "F-Spa-DIR over F-base", [GAIN], "")


def lookup_of(gap: float, seed: int = 0):
    """Quality of two rows, three seeds and forty prompts, whose difference is `gap` with a spread of 1."""
    rng = np.random.default_rng(seed)
    rows = {Row.F_SPA_DIR: rng.normal(gap, 0.7, (3, 40)), Row.F_BASE: rng.normal(0, 0.7, (3, 40))}
    return lambda figure, row, end: rows.get(row)


@pytest.mark.parametrize(("gap", "verdict"), [(1.0, "holds"), (-1.0, "fails"), (0.0, "undecided")])
def test_a_planted_effect_is_found_and_a_reversed_one_refuted(gap: float, verdict: str) -> None:
    assert judged(lookup_of(gap), [BETTER])[0].verdict == verdict


def test_a_claim_holds_only_as_a_whole() -> None:
    """One contrast on the wrong side is enough for it to fail, one across the bound to leave it open."""
    good, bad, open_ = (Contrast("", "quality", {(Row.F_SPA_DIR, "end"): 1}, bound) for bound in (0.0, 2.0, 1.0))
    for contrasts, verdict in (([good, bad], "fails"), ([good, open_], "undecided"), ([good, good], "holds")):
        assert judged(lookup_of(1.0), [Claim("x", "", contrasts, "")])[0].verdict == verdict


def test_a_row_that_was_not_run_leaves_the_claim_alone() -> None:
    found = judged(lambda figure, row, end: None)
    assert {finding.verdict for finding in found} == {"not run"} and len(found) == len(CLAIMS)


def test_wins_count_ties_as_half() -> None:
    values = {Row.F_SPA_DIR: np.array([[1.0, 2.0, 3.0, np.nan]]), Row.F_BASE: np.array([[1.0, 3.0, 2.0, 1.0]])}
    contrast = Contrast("", "motion", {(Row.F_SPA_DIR, "end"): 1, (Row.F_BASE, "end"): -1}, 0.5, how="wins")
    found = contrast.of(lambda figure, row, end: values.get(row))
    assert found is not None and found.tolist()[0][:3] == [0.5, 0.0, 1.0] and np.isnan(found[0, 3])


def test_the_interval_is_that_of_the_clips_that_are_there() -> None:
    """Seeds and prompts without any figure change nothing; the same values give the same interval."""
    values = np.random.default_rng(1).normal(0, 1, (3, 30))
    wider = np.full((4, 32), np.nan)
    wider[:3, :30] = values
    assert interval(wider) == interval(values) == interval(values.copy())
    assert interval(values).low < interval(values).mean < interval(values).high


def test_the_interval_covers_the_truth() -> None:
    """Where seeds are alike, at least nine times in ten."""
    covered = [
        (found := interval(np.random.default_rng(n).normal(0.3, 1, (3, 40)))).low < 0.3 < found.high for n in range(60)
    ]
    assert np.mean(covered) >= 0.9


def test_seeds_that_differ_widen_the_interval() -> None:
    alike = np.random.default_rng(2).normal(0, 1, (3, 40))
    apart = alike + np.array([[-2.0], [0.0], [2.0]])
    assert interval(apart).high - interval(apart).low > 2 * (interval(alike).high - interval(alike).low)


def test_the_paper_agrees_with_itself() -> None:
    for place, name in enumerate(("aesthetic", "technical")):
        found = rank_correlation({row: scores[place] for row, scores in paper_rows().items()})
        assert found is not None and found[name] == pytest.approx(1.0)
    reverse = rank_correlation({row: -scores[0] for row, scores in paper_rows().items()})
    assert reverse is not None and reverse["aesthetic"] == pytest.approx(-1.0)
    assert rank_correlation({Row.F_BASE: 1.0, Row.P_BASE: 0.0}) is None
    assert set(paper_rows()) == set(Row)


def test_the_claims_are_those_that_were_asked_for() -> None:
    assert [claim.key for claim in CLAIMS] == [*"abcdefghi", "j1", "j2", "j3"]
