"""How far work has come, and how long it still takes."""

from dataclasses import dataclass

import pytest

from vc2.progress import WINDOW, Pace, duration_text


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def paced(*told: tuple[float, int]) -> tuple[Pace, Clock]:
    """A pace that was told what was done at which second."""
    clock = Clock()
    pace = Pace(clock)
    for clock.now, done in told:
        pace.add(done)
    return pace, clock


def test_a_steady_pace_goes_on() -> None:
    pace, _ = paced((0, 0), (10, 1), (20, 2), (30, 3))
    assert pace.left(10) == pytest.approx(70)


def test_a_slow_start_does_not_count() -> None:
    """Loading a model takes its time once."""
    pace, _ = paced((0, 0), (600, 1), (610, 2), (620, 3))
    assert pace.left(10) == pytest.approx(70)


def test_what_was_done_before_does_not_count() -> None:
    """A resumed run starts at the step of its state, and is not fast for it."""
    pace, _ = paced((0, 500), (60, 501), (70, 502), (80, 503))
    assert pace.left(1000) == pytest.approx(4970)


def test_a_jump_after_a_standstill_does_not_count() -> None:
    """While it waits for a store or another attempt, work is told to be at 0; then it is where its state is."""
    pace, clock = paced((0, 500), (10, 501), (20, 502))
    clock.now = 30
    pace.add(0, {"waiting_for": "the store"})
    assert pace.left(1000) is None
    for clock.now, done in ((40, 490), (50, 491), (60, 492)):
        pace.add(done)
    assert pace.left(1000) == pytest.approx(5080)


def test_only_the_last_minutes_count() -> None:
    fast = [(float(second), second) for second in range(100)]
    slow = [(100 + 10.0 * step, 99 + step) for step in range(1, 60)]
    pace, _ = paced(*fast, *slow)
    assert slow[-1][0] - 100 > WINDOW
    assert pace.left(258) == pytest.approx(1000)


def test_rare_steps_count_however_old() -> None:
    """A line an hour is a pace too."""
    pace, _ = paced((0, 0), (3600, 100), (7200, 200))
    assert pace.left(300) == pytest.approx(3600)


def test_work_that_hangs_takes_ever_longer() -> None:
    pace, clock = paced((0, 0), (10, 1), (20, 2), (30, 3))
    before = pace.left(10)
    clock.now = 100
    after = pace.left(10)
    assert before is not None and after is not None and after > before


@pytest.mark.parametrize("told", [(), ((0, 0),), ((0, 0), (5, 1)), ((0, 0), (1, 1), (2, 2), (3, 10))], ids=str)
def test_nothing_is_guessed(told: tuple[tuple[float, int], ...]) -> None:
    """Before two steps there is no pace, after the last one nothing is left, and without a total nobody knows."""
    pace, _ = paced(*told)
    assert pace.left(10) is None
    assert pace.left(None) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0.4 s"),
        (9.96, "10 s"),
        (48, "48 s"),
        (420, "7 min"),
        (12_000, "3 h 20 min"),
        (367_200, "4 d 6 h"),
        (172_799, "2 d 0 h"),
    ],
)
def test_durations_are_said_in_units_that_suit_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
