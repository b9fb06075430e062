"""Who sees what, when, and on which side."""

from collections import Counter
from collections.abc import Sequence

import pytest

from vc2.eval.study.order import Matchup, Trial, trials_of


def matchups_of(pairs: int, prompts: int, attention: int = 0) -> tuple[list[Matchup], dict[str, str]]:
    """As `build` lists them: by twos in which the models stand in opposite order. And whose video each is."""
    found, owners = [], {}
    for pair in range(pairs):
        for prompt in range(prompts):
            videos = [f"{pair}-{prompt}-{model}.mp4" for model in "ab"]
            owners |= {video: f"{pair}{model}" for video, model in zip(videos, "ab", strict=True)}
            first, second = reversed(videos) if prompt % 2 else videos
            found.append(Matchup(f"{pair}x{prompt}", "", (first, second), f"{pair}x{prompt // 2}"))
    found += [Matchup(f"attention{n}", "", ("v", "v"), f"attention{n}", True) for n in range(attention)]
    return found, owners


def lefts(trials: Sequence[Trial], owners: dict[str, str]) -> Counter[str]:
    return Counter(owners[trial.left] for trial in trials if not trial.is_repeat and trial.left in owners)


@pytest.mark.parametrize("prompts", [1, 2, 7, 50])
@pytest.mark.parametrize("rater", ["anna", "r0", "b-7"])
def test_every_rater_sees_each_model_as_often_left_as_right(prompts: int, rater: str) -> None:
    """Up to the odd matchup of a pair."""
    matchups, owners = matchups_of(3, prompts)
    counts = lefts(trials_of("seed", rater, matchups, repeats=0.2), owners)
    for pair in range(3):
        assert abs(counts[f"{pair}a"] - counts[f"{pair}b"]) == prompts % 2


def test_the_order_is_a_function_of_study_and_rater() -> None:
    """The same names give the same trials; another study or rater gives others; the order of the list is nothing."""
    matchups, _ = matchups_of(2, 20)
    trials = trials_of("seed", "anna", matchups, repeats=0.2)
    assert trials == trials_of("seed", "anna", matchups[::-1], repeats=0.2)
    assert trials != trials_of("seed", "bert", matchups, repeats=0.2)
    assert trials != trials_of("another", "anna", matchups, repeats=0.2)


@pytest.mark.parametrize("repeats", [0.0, 0.1, 1 / 3])
def test_every_matchup_is_seen_once_and_a_share_of_them_again(repeats: float) -> None:
    """Repeats come with sides changed, at least a third of the matchups later; attention trials are not repeated."""
    matchups, _ = matchups_of(2, 15, attention=3)
    trials = trials_of("seed", "anna", matchups, repeats=repeats)
    first = {trial.matchup: (place, trial) for place, trial in enumerate(trials) if not trial.is_repeat}
    again = {trial.matchup: (place, trial) for place, trial in enumerate(trials) if trial.is_repeat}
    assert len(first) == len(matchups) and len(first) + len(again) == len(trials)
    assert 0 <= round(repeats * 30) - len(again) <= 3  # an attention trial may take the place of one
    for name, (place, trial) in again.items():
        before, shown = first[name]
        assert (trial.left, trial.right) == (shown.right, shown.left)
        assert place - before > len(matchups) // 3
        assert not name.startswith("attention")


def test_raters_of_a_large_study_see_a_part_of_it_each() -> None:
    """So many matchups as were asked for, others for each rater, all seen by somebody, sides even."""
    matchups, owners = matchups_of(1, 40)
    raters = [trials_of("seed", f"r{number}", matchups, repeats=0, most=10) for number in range(40)]
    assert {len(trials) for trials in raters} == {10}
    assert {trial.matchup for trials in raters for trial in trials} == {matchup.id for matchup in matchups}
    assert all(lefts(trials, owners) == {"0a": 5, "0b": 5} for trials in raters)


def test_sides_and_places_are_even_over_raters() -> None:
    """No matchup has a favourite side or place: over many raters all come about equally often."""
    matchups, _ = matchups_of(1, 10)
    many = [trials_of("seed", f"r{number}", matchups, repeats=0) for number in range(600)]
    for matchup in matchups:
        changed = sum(
            trial.left == matchup.videos[1] for trials in many for trial in trials if trial.matchup == matchup.id
        )
        assert 240 < changed < 360
        early = sum(trial.matchup == matchup.id for trials in many for trial in trials[:5])
        assert 240 < early < 360
