"""How many prompts and raters a study needs."""

import math

import numpy as np
import pytest

from vc2.errors import ConfigError
from vc2.eval.study.planner import half_width, plan_raters


def test_the_papers_votes_give_eight_points() -> None:
    """50 prompts and three raters, votes taken as independent and decided; more when votes on a prompt go together."""
    assert half_width(50, 3, ties=0, correlation=0) == pytest.approx(0.08, abs=5e-4)
    assert half_width(50, 3, ties=0, correlation=1) == pytest.approx(0.1386, abs=5e-4)
    assert plan_raters(width=0.0801, raters=3, ties=0, correlation=0).prompts == 50


@pytest.mark.parametrize("correlation", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("width", [0.03, 0.08])
def test_a_plan_is_the_smallest_that_does(width: float, correlation: float) -> None:
    """Its interval is narrow enough; with one prompt less it is not."""
    plan = plan_raters(width=width, raters=4, correlation=correlation, ties=0.3)
    assert plan.half_width <= width < half_width(plan.prompts - 1, 4, correlation=correlation, ties=0.3)
    assert plan.votes == plan.prompts * plan.raters
    assert f"{plan.prompts} prompts, each judged by 4 raters" in plan.sentence()


def test_raters_cannot_stand_in_for_prompts() -> None:
    """With votes that go together there is a floor, and the error says where it lies; above it, raters are counted."""
    with pytest.raises(
        ConfigError, match=r"20 prompts are too few for any number of raters.* 93 prompts or more can do"
    ):
        plan_raters(width=0.05, prompts=20, correlation=0.3, ties=0.2)
    plan = plan_raters(width=0.05, prompts=93, correlation=0.3, ties=0.2)
    assert plan.half_width <= 0.05 and plan.raters > 50
    assert plan_raters(width=0.05, prompts=200, correlation=0.3, ties=0.2).raters < 10


@pytest.mark.parametrize("rate", [0.6, 0.42])
def test_power_is_what_a_simulation_finds(rate: float) -> None:
    """Votes drawn with the planned correlation: the test on their mean finds the difference as often as planned."""
    plan = plan_raters(rate=rate, power=0.8, raters=3, ties=0.2, correlation=0.3)
    chance, repeats = np.random.default_rng(2), 4000
    outcomes, shares = np.array([1, 0.5, 0]), [rate - 0.1, 0.2, 0.9 - rate]
    own = chance.choice(outcomes, (repeats, plan.prompts, plan.raters), p=shares)
    common = chance.choice(outcomes, (repeats, plan.prompts, 1), p=shares)
    # Two raters share their vote with chance c * c: so it correlates by 0.3.
    is_common = chance.random(own.shape) < math.sqrt(0.3)
    means = np.where(is_common, common, own).mean(2)
    z = (means.mean(1) - 0.5) / (means.std(1, ddof=1) / math.sqrt(plan.prompts))
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.04)
    assert plan.power is not None and 0.8 <= plan.power < 0.82


@pytest.mark.parametrize(
    "asked",
    [
        {}, {"width": 0.05, "rate": 0.6}, {"rate": 0.5}, {"rate": 0.05, "ties": 0.5}, {"width": 0.7},
        {"width": 0.05, "raters": 0}, {"width": 0.05, "prompts": 1}, {"width": 0.05, "ties": 1.0},
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(asked: dict) -> None:
    with pytest.raises(ConfigError):
        plan_raters(**asked)
