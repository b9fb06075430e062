"""Strengths of several models from comparisons of two, where two may be comparable: Bradley-Terry with ties.

Davidson 1970, "On extending the Bradley-Terry model to accommodate ties in paired comparison experiments": with
log-strengths s_i and a readiness for ties nu > 0,

    P(i beats j) : P(j beats i) : P(tie) = exp(s_i) : exp(s_j) : nu exp((s_i + s_j) / 2)

So each comparison is a choice among three by a softmax that is linear in (s, log nu), the log-likelihood is concave,
and Newton's method finds its maximum. Strengths sum to 0. The maximum is finite if and only if no group of models was
never beaten or tied by one outside of it (Ford 1957).

Shapes: R data sets fitted at once (resamples of one), M models.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["DavidsonFit", "fit_davidson", "win_chance"]

MOST_STEPS = 100
CLOSE = 1e-10  # gradient per comparison at which a fit is done
LONGEST = 2.0  # step of a parameter


@dataclass(frozen=True, slots=True)
class DavidsonFit:
    """Fits of R data sets; NaN where there is no finite one."""

    strengths: np.ndarray  # (R, M), sum 0
    log_ties: np.ndarray  # (R,), log nu; -inf where nothing was tied


def fit_davidson(wins: np.ndarray, ties: np.ndarray) -> DavidsonFit:
    """Maximum-likelihood strengths.

    Args:
        wins: How often i beat j, (R, M, M).
        ties: How often i and j were comparable, (R, M, M); what counts is the sum of both triangles.
    """
    num_sets, num_models = wins.shape[:2]
    strengths, log_ties = np.full((num_sets, num_models), np.nan), np.full(num_sets, np.nan)
    ok = _is_connected((wins > 0) | (ties > 0) | (ties.transpose(0, 2, 1) > 0))
    if ok.any():
        fitted = _newton(wins[ok].astype(float), (ties + ties.transpose(0, 2, 1))[ok].astype(float))
        strengths[ok], log_ties[ok] = fitted[:, :-1], fitted[:, -1]
    return DavidsonFit(strengths, log_ties)


def win_chance(difference: float, log_ties: float) -> tuple[float, float, float]:
    """Chances that the first beats the second, is beaten, or ties, from the difference of their strengths."""
    odds = np.exp(np.array([difference / 2, -difference / 2, log_ties]) - max(abs(difference) / 2, log_ties))
    first, second, tie = (odds / odds.sum()).tolist()
    return first, second, tie


def _is_connected(beats: np.ndarray) -> np.ndarray:
    """Whether every model reaches every other along edges (R, M, M)."""
    reach = beats | np.eye(beats.shape[1], dtype=bool)
    for _ in range(max(1, int(np.ceil(np.log2(beats.shape[1]))))):
        reach = (reach.astype(np.int64) @ reach.astype(np.int64)) > 0
    return np.asarray(reach.all((1, 2)))


def _newton(wins: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """Parameters (R, M + 1): strengths and log nu."""
    num_sets, num_models = wins.shape[:2]
    size = num_models + 1
    has_ties = ties.sum((1, 2)) > 0
    pairs = [(i, j) for i in range(num_models) for j in range(i + 1, num_models)]
    # What each outcome of a pair adds to the log-odds: a row per outcome.
    features = np.zeros((len(pairs), 3, size))
    for number, (i, j) in enumerate(pairs):
        features[number, 0, i] = features[number, 1, j] = features[number, 2, -1] = 1
        features[number, 2, [i, j]] = 0.5
    i, j = np.array(pairs).T
    counts = np.stack([wins[:, i, j], wins[:, j, i], ties[:, i, j]], axis=-1)  # (R, pairs, 3)
    total = counts.sum(-1)

    def chances(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        odds = np.einsum("rk,pok->rpo", parameters, features)
        odds[..., 2] = np.where(has_ties[:, None], odds[..., 2], -np.inf)
        odds -= odds.max(-1, keepdims=True)
        mass = np.exp(odds)
        sums = mass.sum(-1, keepdims=True)
        logs = np.where(counts > 0, odds - np.log(sums), 0.0)
        return mass / sums, (counts * logs).sum((1, 2))

    parameters = np.zeros((num_sets, size))
    chance, likelihood = chances(parameters)
    level = np.zeros((size, size))  # holds the sum of strengths, which no comparison tells, at 0
    level[:-1, :-1] = 1.0
    for _ in range(MOST_STEPS):
        gradient = np.einsum("rpo,pok->rk", counts - total[..., None] * chance, features)
        if np.abs(gradient).max() <= CLOSE * max(1.0, float(total.sum(1).max())):
            break
        mean = np.einsum("rpo,pok->rpk", chance, features)
        second = np.einsum("rp,rpo,pok,pol->rkl", total, chance, features, features, optimize=True)
        curvature = second - np.einsum("rp,rpk,rpl->rkl", total, mean, mean, optimize=True) + level
        curvature[~has_ties, -1, -1] = 1.0
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        step *= np.minimum(1.0, LONGEST / np.maximum(np.abs(step).max(1, keepdims=True), 1e-300))
        tried = parameters + step
        new_chance, new_likelihood = chances(tried)
        for _ in range(30):
            worse = new_likelihood < likelihood - 1e-9 * np.abs(likelihood)
            if not worse.any():
                break
            step[worse] /= 2
            tried = parameters + step
            new_chance, new_likelihood = chances(tried)
        parameters, chance, likelihood = tried, new_chance, new_likelihood
    parameters[:, :-1] -= parameters[:, :-1].mean(1, keepdims=True)
    parameters[:, -1] = np.where(has_ties, parameters[:, -1], -np.inf)
    return parameters
