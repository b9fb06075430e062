"""Strengths by Davidson's model against a plain maximum of its likelihood, and their laws."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from vc2.eval.study.davidson import fit_davidson, win_chance


def counts(seed: int, models: int, *, ties: bool = True) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    wins = chance.integers(1, 30, (models, models)) * (1 - np.eye(models, dtype=int))
    tied = np.triu(chance.integers(1, 15, (models, models)), 1) * ties
    return wins.astype(float), tied.astype(float)


def brute_force(wins: np.ndarray, ties: np.ndarray) -> tuple[np.ndarray, float]:
    """The likelihood written as in the paper, with strengths themselves, maximised by a method that knows nothing."""
    models = len(wins)

    def loss(parameters: np.ndarray) -> float:
        strength, readiness = np.exp(parameters[:-1]), math.exp(parameters[-1])
        total = 0.0
        for i in range(models):
            for j in range(i + 1, models):
                tie = readiness * math.sqrt(strength[i] * strength[j])
                whole = strength[i] + strength[j] + tie
                total -= wins[i, j] * math.log(strength[i] / whole) + wins[j, i] * math.log(strength[j] / whole)
                total -= ties[i, j] * math.log(tie / whole)
        return total + parameters[:-1].sum() ** 2

    found = minimize(loss, np.zeros(models + 1), method="BFGS", options={"gtol": 1e-9})
    return found.x[:-1], found.x[-1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("models", [2, 3, 5])
def test_the_fit_is_the_maximum_of_the_likelihood(seed: int, models: int) -> None:
    wins, ties = counts(seed, models)
    fit = fit_davidson(wins[None], ties[None])
    strengths, log_ties = brute_force(wins, ties)
    assert np.allclose(fit.strengths[0], strengths, atol=1e-4)
    assert fit.log_ties[0] == pytest.approx(log_ties, abs=1e-4)


def test_two_models_have_a_closed_form() -> None:
    """The difference of strengths is the log-odds of decided votes; nu is ties over the root of the product of wins."""
    wins, ties = np.array([[[0.0, 24], [6, 0]]]), np.array([[[0.0, 10], [0, 0]]])
    fit = fit_davidson(wins, ties)
    assert fit.strengths[0, 0] - fit.strengths[0, 1] == pytest.approx(math.log(24 / 6))
    assert math.exp(fit.log_ties[0]) == pytest.approx(10 / math.sqrt(24 * 6))
    chances = win_chance(float(fit.strengths[0, 0] - fit.strengths[0, 1]), float(fit.log_ties[0]))
    assert chances == pytest.approx((0.6, 0.15, 0.25))


def test_without_ties_it_is_bradley_and_terry() -> None:
    """Expected wins equal the wins that were seen, which characterises their maximum."""
    wins, ties = counts(7, 4, ties=False)
    fit = fit_davidson(wins[None], ties[None])
    assert fit.log_ties[0] == -np.inf
    difference = fit.strengths[0][:, None] - fit.strengths[0][None]
    expected = ((wins + wins.T) / (1 + np.exp(-difference))).sum(1)
    assert np.allclose(expected, wins.sum(1), rtol=1e-8)


def test_names_and_order_of_models_do_not_matter() -> None:
    """Models in another order get the same strengths, in that order; strengths sum to 0."""
    wins, ties = counts(3, 5)
    order = [3, 0, 4, 1, 2]
    both = ties + ties.T
    fit = fit_davidson(wins[None], ties[None]).strengths[0]
    assert np.allclose(
        fit[order], fit_davidson(wins[order][:, order][None], both[order][:, order][None] / 2).strengths[0]
    )
    assert abs(fit.sum()) < 1e-9


def test_what_has_no_finite_maximum_is_not_given() -> None:
    """A model that never lost or tied, or models that never met; the others of a batch are not touched."""
    wins, ties = counts(1, 3)
    never = wins.copy()
    never[1:, 0] = 0
    apart = np.zeros((3, 3))
    apart[0, 1] = apart[1, 0] = 5
    none = np.zeros((3, 3))
    fit = fit_davidson(np.stack([wins, never, apart]), np.stack([ties, none, none]))
    assert np.isnan(fit.strengths[1:]).all() and np.isnan(fit.log_ties[1:]).all()
    assert np.allclose(fit.strengths[0], fit_davidson(wins[None], ties[None]).strengths[0])
    one_sided = np.array([[0.0, 200, 0], [1, 0, 200], [0, 1, 0]])
    assert np.isfinite(fit_davidson(one_sided[None], none[None]).strengths).all()
