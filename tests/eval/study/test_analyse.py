"""What votes say: laws of rates and intervals, and populations whose opinion is known."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from vc2.eval.study.analyse import analyse, analyse_votes, sign_test
from vc2.eval.study.answers import Answers, Choice, FileFate, StudyKey, Vote
from vc2.eval.study.build import BuiltStudy
from vc2.eval.study.results import Estimate, StudyResult

Chances = Callable[[int, str, str], tuple[float, float, float]]


def population(
    key: StudyKey, prompts: int, raters: int, chances: Chances, seed: int = 0, *, question: str = "q"
) -> Answers:
    """Raters who each vote on every prompt and pair, by the chances of (a, tie, b) that a prompt has."""
    draws = np.random.default_rng(seed)
    votes = []
    for a, b in key.pairs:
        for prompt in range(prompts):
            says: list[Choice] = list(draws.choice(["a", "tie", "b"], raters, p=chances(prompt, a, b)))
            for number, choice in enumerate(says):
                name = f"{a}-{b}-{prompt}"
                votes.append(Vote(f"r{number}", question, name, str(prompt), (a, b), choice, None, 3.0))
    fates = [FileFate(f"r{number}.json", f"r{number}", "") for number in range(raters)]
    return Answers(files=fates, votes=votes)


def estimates(result: StudyResult) -> Iterator[Estimate]:
    for one in result.partings:
        yield from (one.split, one.dropped, one.chosen_a, one.tied, one.chosen_b)


def holds(estimate: Estimate, value: float) -> bool:
    assert estimate.low is not None and estimate.high is not None
    return estimate.low <= value <= estimate.high


def test_swapping_the_models_mirrors_every_figure(bare_key: Callable) -> None:
    """1 - rate, interval and all; the test and the agreement of raters stay."""
    key, turned = bare_key(["A", "B"], ["q"]), bare_key(["B", "A"], ["q"])
    answers = population(key, 30, 3, lambda prompt, a, b: (0.5, 0.2, 0.3))
    swap: dict[Choice, Choice] = {"a": "b", "b": "a", "tie": "tie"}
    votes = [
        Vote(v.rater, v.question, v.matchup, v.prompt, ("B", "A"), swap[v.choice], None, v.seconds)
        for v in answers.votes
    ]
    one = analyse_votes(key, answers).parting("q", "A", "B")
    result = analyse_votes(turned, Answers(files=answers.files, votes=votes))
    for other, seen in ((result.parting("q", "B", "A"), "B"), (result.parting("q", "A", "B"), "A")):
        assert one is not None and other is not None and (other.a, other.b) == (seen, "A" if seen == "B" else "B")
        mine, theirs = (one.split, other.split), (one.dropped, other.dropped)
        for first, second in (mine, theirs):
            assert first.value is not None and first.low is not None and first.high is not None
            expected = (
                (1 - first.value, 1 - first.high, 1 - first.low)
                if seen == "B"
                else (first.value, first.low, first.high)
            )
            assert (second.value, second.low, second.high) == pytest.approx(expected, abs=1e-12)
        assert other.sign.p == one.sign.p and one.chosen_b.value == pytest.approx(
            other.chosen_a.value if seen == "B" else other.chosen_b.value
        )
    assert result.agreement == analyse_votes(key, answers).agreement


def test_rates_are_the_counts(bare_key: Callable) -> None:
    """6 votes for a, 3 comparable, 1 for b: 75 % split, 6 of 7 dropped, 60 : 30 : 10 as they are."""
    key = bare_key(["A", "B"], ["q"])
    says: list[Choice] = ["a"] * 6 + ["tie"] * 3 + ["b"]
    votes = [Vote("r", "q", str(n), str(n), ("A", "B"), choice, None, 3.0) for n, choice in enumerate(says)]
    one = analyse_votes(key, Answers(files=[FileFate("r", "r", "")], votes=votes)).parting("q", "A", "B")
    assert one is not None
    assert (one.split.value, one.dropped.value) == pytest.approx((0.75, 6 / 7))
    assert (one.chosen_a.value, one.tied.value, one.chosen_b.value) == pytest.approx((0.6, 0.3, 0.1))
    assert (one.sign.a, one.sign.b, one.sign.even) == (6, 1, 3) and one.sign.p == pytest.approx(0.125)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (9, 1), (30, 31), (400, 300)])
def test_the_sign_test_is_exact(wins: int, losses: int) -> None:
    total = wins + losses
    assert sign_test(wins, losses) == pytest.approx(binomtest(wins, total).pvalue if total else 1.0)


def test_intervals_over_prompts_hold_what_intervals_over_votes_miss(bare_key: Callable) -> None:
    """Prompts differ in who wins them. Of 150 studies, about 95 % of our intervals hold the truth; intervals that take
    votes for independent hold it far less often."""
    key = bare_key(["A", "B"], ["q"])
    hits = naive = 0
    for seed in range(150):
        leans = np.random.default_rng((seed, 1)).beta(0.6, 0.6, 40)
        answers = population(key, 40, 6, lambda prompt, a, b, p=leans: (p[prompt], 0.0, 1 - p[prompt]), seed)
        one = analyse_votes(key, answers, resamples=600, seed=seed).parting("q", "A", "B")
        assert one is not None and one.split.value is not None
        hits += holds(one.split, 0.5)
        reach = 1.96 * math.sqrt(one.split.value * (1 - one.split.value) / one.votes)
        naive += abs(one.split.value - 0.5) <= reach
    assert hits >= 0.89 * 150
    assert naive <= 0.8 * 150


def test_a_population_of_known_strengths_is_recovered(bare_key: Callable) -> None:
    """Votes drawn from Davidson's model, 60 times over: about 94 % of the intervals hold the true strengths and rates,
    and with many votes strengths, their order and the readiness for ties come back."""
    models, truth, readiness = ["A", "B", "C", "D"], np.array([0.9, 0.2, -0.3, -0.8]), 0.7
    key = bare_key(models, ["q"])

    def chances(prompt: int, a: str, b: str) -> tuple[float, float, float]:
        one, other = (math.exp(truth[models.index(model)]) for model in (a, b))
        odds = np.array([one, readiness * math.sqrt(one * other), other])
        return tuple(odds / odds.sum())

    hits: list[bool] = []
    for seed in range(60):
        result = analyse_votes(key, population(key, 40, 3, chances, seed), resamples=200, seed=seed)
        for model, strength in zip(result.strengths[0].models, result.strengths[0].strengths, strict=True):
            hits.append(holds(strength, truth[models.index(model)]))
        for one in result.partings:
            a, tie, _ = chances(0, one.a, one.b)
            hits.append(holds(one.split, a + tie / 2))
    assert 0.9 <= np.mean(hits) <= 0.98
    (found,) = analyse_votes(key, population(key, 400, 4, chances), resamples=200).strengths
    assert found.models == ("A", "B", "C", "D")
    assert np.allclose([strength.value for strength in found.strengths], truth, atol=0.1)
    assert found.tie_readiness == pytest.approx(readiness, rel=0.05)


def test_two_models_have_no_strengths_and_unbeaten_ones_no_finite_one(bare_key: Callable) -> None:
    """What a table of rates says already, or what no figure can say, is not given."""
    two = bare_key(["A", "B"], ["q"])
    assert analyse_votes(two, population(two, 5, 2, lambda *_: (0.4, 0.2, 0.4))).strengths == ()
    three = bare_key(["A", "B", "C"], ["q"])
    answers = population(three, 5, 2, lambda prompt, a, b: (1.0, 0, 0) if a == "A" else (0.5, 0, 0.5))
    (found,) = analyse_votes(three, answers).strengths
    assert "never beaten" in found.note and all(strength.value is None for strength in found.strengths)


def test_everybody_of_one_mind_still_leaves_doubt(bare_key: Callable) -> None:
    """All votes for a: a bootstrap would be sure of it; the interval is that of so many prompts, all won."""
    key = bare_key(["A", "B"], ["q"])
    one = analyse_votes(key, population(key, 10, 3, lambda *_: (1.0, 0, 0))).parting("q", "A", "B")
    assert one is not None and one.split.value == 1 and one.split.high == 1
    assert one.split.low == pytest.approx(binomtest(10, 10).proportion_ci(0.95).low)
    result = analyse_votes(key, population(key, 1, 3, lambda *_: (0.5, 0, 0.5)))
    assert all(estimate.low is None and (estimate.note or estimate.value is None) for estimate in estimates(result))
    ties = analyse_votes(key, population(key, 4, 2, lambda *_: (0, 1.0, 0))).parting("q", "A", "B")
    assert ties is not None and ties.dropped.value is None and ties.dropped.note and ties.sign.p == 1


def test_same_votes_give_the_same_result(bare_key: Callable) -> None:
    """Twice, and in another order; another seed moves the intervals alone."""
    key = bare_key(["A", "B", "C"], ["q"])
    answers = population(key, 20, 3, lambda *_: (0.4, 0.2, 0.4))
    shuffled = Answers(files=answers.files, votes=answers.votes[::-1])
    first = analyse_votes(key, answers, resamples=300)
    assert first == analyse_votes(key, answers, resamples=300) == analyse_votes(key, shuffled, resamples=300)
    other = analyse_votes(key, answers, resamples=300, seed=1)
    assert [e.value for e in estimates(first)] == [e.value for e in estimates(other)]
    assert [e.low for e in estimates(first)] != [e.low for e in estimates(other)]


def test_corrected_p_values_are_holms(bare_key: Callable) -> None:
    """The smallest times the number of tests, and so on down, never falling."""
    key = bare_key(["A", "B", "C"], ["q"])
    shares = {("A", "B"): (0.9, 0, 0.1), ("A", "C"): (0.65, 0, 0.35), ("B", "C"): (0.5, 0, 0.5)}
    result = analyse_votes(key, population(key, 40, 1, lambda prompt, a, b: shares[a, b]))
    ranked = sorted((one.sign.p, one.sign.p_holm) for one in result.partings)
    so_far = 0.0
    for number, (p, holm) in enumerate(ranked):
        so_far = max(so_far, min(1, p * (3 - number)))
        assert holm == pytest.approx(so_far)


def test_raters_who_agree_and_raters_who_throw_dice(
    study: BuiltStudy, rate: Callable, likes: Callable, saved: Callable
) -> None:
    """Alpha 1, repeats as before, sides even; against about 0, a third, a side."""
    same = [saved(name, rate(name, likes("Sunrise", "Noonday"))) for name in ("anna", "bert", "cleo")]
    result = analyse(study.key, same, resamples=500)
    assert [one.alpha.value for one in result.agreement] == [1, 1, 1]
    assert all(one.correlation == 1 for one in result.agreement)
    for person in result.raters_themselves:
        assert person.same == person.repeats > 0 and abs(2 * person.left - person.decided) <= 9
        assert person.attention == (6, 6)
    draws = np.random.default_rng(0)
    dice = [
        saved(name, rate(name, lambda *_: str(draws.choice(["left", "right"])))) for name in ("dora", "emil", "finn")
    ]
    result = analyse(study.key, dice, resamples=500)
    assert all(abs(one.alpha.value) < 0.25 for one in result.agreement)  # type: ignore[arg-type]
    biased = analyse(study.key, [saved("gus", rate("gus", lambda *_: "left"))], resamples=500).raters_themselves[0]
    assert biased.left == biased.decided == 81 and biased.same == 0 and biased.attention == (0, 6)


def test_relabelling_models_in_the_key_relabels_the_result(
    study: BuiltStudy, rate: Callable, likes: Callable, saved: Callable, tmp_path: Path
) -> None:
    """Names are names: exchanged in the key, they are exchanged in all that is said of them."""
    files = [saved(name, rate(name, likes(*order))) for name, order in (("anna", ("Sunrise",)), ("bert", ("Moonlit",)))]
    before = analyse(study.key, files, resamples=200)
    data = json.loads(study.key.read_text())
    names = {"Sunrise": "Moonlit", "Moonlit": "Sunrise"}
    for matchup in data["matchups"].values():
        matchup["models"] = [names.get(model, model) for model in matchup["models"]]
    (tmp_path / "key.json").write_text(json.dumps(data))
    after = analyse(tmp_path / "key.json", files, resamples=200)
    pairs: Sequence[tuple[str, str]] = [("Sunrise", "Moonlit"), ("Sunrise", "Noonday"), ("Moonlit", "Noonday")]
    for a, b in pairs:
        one = before.parting("visual_quality", a, b)
        other = after.parting("visual_quality", names.get(a, a), names.get(b, b))
        assert one is not None and other is not None
        assert (one.wins_a, one.ties, one.wins_b) == (other.wins_a, other.ties, other.wins_b)
        assert one.split.value == pytest.approx(other.split.value)
