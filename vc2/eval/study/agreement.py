"""How far raters agree beyond chance: Krippendorff's alpha for names without order (nominal).

With n_uc raters who gave unit u the value c, m_u = sum_c n_uc, units with m_u < 2 left out, and n = sum_u m_u,

    D_o = sum_u sum_{c != k} n_uc n_uk / (m_u - 1)          disagreement within units
    D_e = sum_{c != k} n_c n_k / (n - 1)                    disagreement if values were dealt out at random
    alpha = 1 - D_o / D_e

(Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".)

1: raters agree; 0: as chance would have it; below: they disagree on purpose.
"""

from collections.abc import Hashable, Iterable, Sequence

import numpy as np

__all__ = ["krippendorff_alpha", "unit_counts"]


def unit_counts(units: Iterable[Sequence[Hashable]], values: Sequence[Hashable]) -> np.ndarray:
    """How many raters gave each unit each value, (U, C)."""
    place = {value: number for number, value in enumerate(values)}
    given = list(units)
    counts = np.zeros((len(given), len(values)))
    for row, unit in zip(counts, given, strict=True):
        for value in unit:
            row[place[value]] += 1
    return counts


def krippendorff_alpha(counts: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Alpha of units that count several times each.

    Args:
        counts: Raters by unit and value, (U, C).
        weights: How often each unit counts, (R, U), for R resamples; None: each once.

    Returns:
        (R,), or () without weights. NaN where it is not defined: no unit has two raters, or there is but one value.
    """
    raters = counts.sum(1)
    shared = raters >= 2
    counts, raters = counts[shared], raters[shared]
    within = (raters**2 - (counts**2).sum(1)) / np.maximum(raters - 1, 1)
    times = np.ones((1, len(counts))) if weights is None else weights[:, shared]
    totals = times @ counts
    size = totals.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        by_chance = (size**2 - (totals**2).sum(1)) / (size - 1)
        alpha = np.where(by_chance > 0, 1 - (times @ within) / by_chance, np.nan)
    return alpha[0] if weights is None else alpha
