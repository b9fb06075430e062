"""What VideoCrafter2 says of the rows of its Table 3, as contrasts that figures of clips can hold up or not.

Every clip has a seed (of its model's training) and a prompt. A contrast is a sum of figures of rows, taken clip by
clip at the same seed and prompt; its mean has an interval of 95 % by a bootstrap that draws seeds and prompts anew. A
claim *holds* if all its contrasts lie, with their whole interval, on the side that it says; it *fails* if one of them
lies with its whole interval on the other; else it is *undecided*.

Shapes: S seeds, P prompts; NaN where a clip has no such figure.
Source: Chen et al. 2024 (VideoCrafter2), Sec. 3 and 4.3, Tables 3 and 4.
"""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

import numpy as np
from scipy.stats import spearmanr

from vc2.pipeline.table3 import Row, named_row

__all__ = [
    "CLAIMS",
    "Claim",
    "Contrast",
    "Finding",
    "Interval",
    "Lookup",
    "interval",
    "judged",
    "paper_rows",
    "rank_correlation",
]

DRAWS = 4000
LIKE = 0.1  # of an index: a difference of less is "like", or "kept"
End = Literal["start", "end"]  # of the tuning: its base judged by the prompts of the curve, or its last checkpoint
# Figures are those of `vc2.pipeline.compare.Comparison.values`.
Lookup = Callable[[str, Row, End], np.ndarray | None]  # figure, row, end -> (S, P), or None if the row was not run


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and where 95 % of its bootstrap lies."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Contrast:
    """A sum over rows of a figure, and on which side of `bound` a claim sees it."""

    says: str
    figure: str
    terms: Mapping[tuple[Row, End], float]
    bound: float = 0.0
    above: bool = True
    how: Literal["sum", "wins"] = "sum"  # wins: share of clips in which the first row has more than the second

    def of(self, lookup: Lookup) -> np.ndarray | None:
        """The contrast clip by clip, (S, P); None if a row is not there."""
        parts = [(factor, lookup(self.figure, row, end)) for (row, end), factor in self.terms.items()]
        if any(part is None for _, part in parts):
            return None
        total = sum(factor * part for factor, part in parts if part is not None)
        assert isinstance(total, np.ndarray)
        if self.how == "sum":
            return total
        return np.where(np.isnan(total), np.nan, 0.5 + 0.5 * np.sign(total))


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of the paper: all its contrasts."""

    key: str
    says: str
    contrasts: Sequence[Contrast]
    paper: str  # what the paper reports for it
    beside: Sequence[Contrast] = ()  # told with it, no part of the verdict


@dataclass(frozen=True, slots=True)
class Finding:
    """What came out for a claim."""

    key: str
    says: str
    paper: str
    verdict: Literal["holds", "fails", "undecided", "not run"]
    contrasts: Sequence[tuple[str, Interval | None]]
    beside: Sequence[tuple[str, Interval | None]]


def _of(row: Row) -> dict[tuple[Row, End], float]:
    return {(row, "end"): 1.0}


def _less(first: Row, second: Row) -> dict[tuple[Row, End], float]:
    return {(first, "end"): 1.0, (second, "end"): -1.0}


def _changes(first: Row, second: Row) -> dict[tuple[Row, End], float]:
    """What tuning changes in the first row, less what it changes in the second; each against its own base."""
    return {(first, "end"): 1.0, (first.base, "end"): -1.0, (second, "end"): -1.0, (second.base, "end"): 1.0}


def _change(row: Row) -> dict[tuple[Row, End], float]:
    return _less(row, row.base)


def _over_steps(row: Row, sign: float = 1.0) -> dict[tuple[Row, End], float]:
    return {(row, "end"): sign, (row, "start"): -sign}


def _quality(first: Row, second: Row) -> Contrast:
    return Contrast(f"quality, {first} less {second}", "quality", _less(first, second))


def _like_quality(first: Row, second: Row) -> list[Contrast]:
    return [
        Contrast(f"quality, {first} less {second}, above -{LIKE}", "quality", _less(first, second), -LIKE),
        Contrast(f"quality, {first} less {second}, below {LIKE}", "quality", _less(first, second), LIKE, above=False),
    ]


def _kept(row: Row) -> Contrast:
    return Contrast(f"change of motion, {row}, above -{LIKE}", "motion", _change(row), -LIKE)


def _still_there(row: Row, *, above: bool) -> Contrast:
    says = f"{row}: of the clips with a watermark in {row.base}, those that have it still"
    return Contrast(says, "still watermarked", _of(row), 0.5, above=above)


def _lightened(bound: float, *, above: bool) -> Contrast:
    says = (
        f"F-Temp-DIR: of the same, those where it is gone or lighter by half, {'above' if above else 'below'} {bound}"
    )
    return Contrast(says, "lightened", _of(Row.F_TEMP_DIR), bound, above=above)


def _pair(key: str, first: Row, second: Row, paper: str) -> Claim:
    says = f"clips in which {first} moves better than {second}"
    contrast = Contrast(says, "motion", _less(first, second), bound=0.5, how="wins")
    return Claim(key, f"Table 4: {first} moves better than {second}", [contrast], paper)


CLAIMS = (
    Claim(
        "a",
        "F keeps its motion under spatial tuning, and better than P",
        [
            Contrast(
                "change of motion, F-Spa-LoRA less P-Spa-LoRA", "motion", _changes(Row.F_SPA_LORA, Row.P_SPA_LORA)
            ),
            _kept(Row.F_SPA_LORA),
        ],
        "people prefer the motion of F-Spa-LoRA in 87 % (Table 4)",
    ),
    Claim(
        "b",
        "P shifts its appearance more easily",
        [
            Contrast(
                "change of quality, P-Spa-LoRA less F-Spa-LoRA", "quality", _changes(Row.P_SPA_LORA, Row.F_SPA_LORA)
            )
        ],
        "technical score 42.7 to 72.7 for P, 51.8 to 59.6 for F",
    ),
    Claim(
        "c",
        "direct tuning beats LoRA on quality",
        [_quality(Row.F_SPA_DIR, Row.F_SPA_LORA)],
        "82.6 / 70.4 against 78.0 / 59.6",
        beside=[_quality(Row.F_TEMP_DIR, Row.F_TEMP_LORA), _quality(Row.F_SPA_TEMP_DIR, Row.F_SPA_TEMP_LORA)],
    ),
    Claim(
        "d",
        "Spa-DIR keeps motion better than Spa&Temp-DIR, at like quality",
        [
            Contrast("motion, F-Spa-DIR less F-Spa&Temp-DIR", "motion", _less(Row.F_SPA_DIR, Row.F_SPA_TEMP_DIR)),
            *_like_quality(Row.F_SPA_DIR, Row.F_SPA_TEMP_DIR),
        ],
        "people prefer the motion of F-Spa-DIR in 67 % (Table 4)",
    ),
    Claim(
        "e",
        "the watermark goes with F-Spa-LoRA, stays with F-Temp-LoRA and mostly with F-Spa&Temp-LoRA, and is gone or "
        "lighter in about half of F-Temp-DIR",
        [
            _still_there(Row.F_SPA_LORA, above=False),
            _still_there(Row.F_TEMP_LORA, above=True),
            _still_there(Row.F_SPA_TEMP_LORA, above=True),
            _lightened(0.25, above=True),
            _lightened(0.75, above=False),
        ],
        "Sec. 4.3, by eye",
        beside=[Contrast("F-base: clips with a watermark", "watermarked", _of(Row.F_BASE), 0.5)],
    ),
    Claim(
        "f",
        "compositional images beat web-like ones on composition",
        [
            Contrast(
                "composition, F-Spa-DIR less F-Spa-DIR-LAION", "composition", _less(Row.F_SPA_DIR, Row.F_SPA_DIR_LAION)
            )
        ],
        "Sec. 4.3, by eye; 82.6 / 70.4 against 67.8 / 54.3 on quality",
        beside=[_quality(Row.F_SPA_DIR, Row.F_SPA_DIR_LAION)],
    ),
    Claim(
        "g",
        "P-Temp-LoRA shakes while F-Temp-LoRA keeps its base's motion",
        [
            Contrast(
                "change of motion, F-Temp-LoRA less P-Temp-LoRA", "motion", _changes(Row.F_TEMP_LORA, Row.P_TEMP_LORA)
            ),
            Contrast("change of motion, P-Temp-LoRA", "motion", _change(Row.P_TEMP_LORA), above=False),
            _kept(Row.F_TEMP_LORA),
        ],
        "people prefer the motion of F-Temp-LoRA in 73 % (Table 4)",
    ),
    Claim(
        "h",
        "P-base has the video set's look although its spatial weights are frozen",
        [
            Contrast("P-base: clips with a watermark", "watermarked", _of(Row.P_BASE), 0.5),
            Contrast("P-base: quality (0: the video set's look)", "quality", _of(Row.P_BASE), 0.5, above=False),
        ],
        "34.3 / 42.7, the lowest of all rows",
    ),
    Claim(
        "i",
        "over the steps of spatial tuning the motion of P decays, that of F hardly",
        [
            Contrast(
                "motion of the curve's prompts, last step less base, F-Spa-LoRA less P-Spa-LoRA",
                "motion",
                {**_over_steps(Row.F_SPA_LORA), **_over_steps(Row.P_SPA_LORA, -1.0)},
            ),
            Contrast("P-Spa-LoRA: last step less base", "motion", _over_steps(Row.P_SPA_LORA), above=False),
            Contrast(f"F-Spa-LoRA: last step less base, above -{LIKE}", "motion", _over_steps(Row.F_SPA_LORA), -LIKE),
        ],
        "Sec. 4.3, by eye",
    ),
    _pair("j1", Row.F_SPA_LORA, Row.P_SPA_LORA, "87 %"),
    _pair("j2", Row.F_TEMP_LORA, Row.P_TEMP_LORA, "73 %"),
    _pair("j3", Row.F_SPA_DIR, Row.F_SPA_TEMP_DIR, "67 %"),
)


def interval(values: np.ndarray) -> Interval:
    """Mean of (S, P) values and its interval: the bootstrap draws seeds and, the same for all of them, prompts.

    One seed alone is not drawn anew: then the interval tells how sure one is of that training, not of another.
    """
    known = ~np.isnan(values)
    values = values[known.any(axis=1)][:, known.any(axis=0)]
    rng = np.random.Generator(np.random.Philox(20240117))
    seeds, prompts = values.shape
    which_seeds = rng.integers(seeds, size=(DRAWS, seeds))
    which_prompts = rng.integers(prompts, size=(DRAWS, prompts))
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    sums, counts = np.zeros(DRAWS), np.zeros(DRAWS)
    for column in which_seeds.T:  # (DRAWS,)
        sums += filled[column[:, None], which_prompts].sum(axis=1)
        counts += known[column[:, None], which_prompts].sum(axis=1)
    means = sums[counts > 0] / counts[counts > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.nanmean(values)), float(low), float(high))


def judged(lookup: Lookup, claims: Sequence[Claim] = CLAIMS) -> list[Finding]:
    """Every claim with its verdict."""
    return [_judge(claim, lookup) for claim in claims]


def _judge(claim: Claim, lookup: Lookup) -> Finding:
    found = [_measured(contrast, lookup) for contrast in claim.contrasts]
    sides = [
        None if measured is None else _side(measured, contrast)
        for contrast, measured in zip(claim.contrasts, found, strict=True)
    ]
    if None in sides:
        verdict = "not run"
    elif -1 in sides:
        verdict = "fails"
    else:
        verdict = "holds" if all(sides) else "undecided"
    return Finding(
        claim.key,
        claim.says,
        claim.paper,
        verdict,
        [(contrast.says, measured) for contrast, measured in zip(claim.contrasts, found, strict=True)],
        [(contrast.says, _measured(contrast, lookup)) for contrast in claim.beside],
    )


def _measured(contrast: Contrast, lookup: Lookup) -> Interval | None:
    values = contrast.of(lookup)
    return None if values is None or np.isnan(values).all() else interval(values)


def _side(measured: Interval, contrast: Contrast) -> int:
    """1 with the whole interval where the claim wants it, -1 on the other side, 0 across the bound."""
    sign = 1 if contrast.above else -1
    low, high = sorted((sign * (measured.low - contrast.bound), sign * (measured.high - contrast.bound)))
    return 1 if low > 0 else -1 if high < 0 else 0


@cache
def paper_rows() -> Mapping[Row, tuple[float, float]]:
    """DOVER's aesthetic and technical score of each row, as Table 3 prints them."""
    text = (files("vc2.eval") / "published" / "videocrafter2_paper_table3.csv").read_text(encoding="utf-8")
    lines = csv.DictReader(text.splitlines())
    return {named_row(line["variant"]): (float(line["aesthetic"]), float(line["technical"])) for line in lines}


def rank_correlation(ours: Mapping[Row, float]) -> dict[str, float] | None:
    """Spearman's rank correlation of a figure of the rows with the paper's two; None with fewer than four rows."""
    rows = [row for row in paper_rows() if row in ours and math.isfinite(ours[row])]
    if len(rows) < 4:
        return None
    found = {}
    for place, name in enumerate(("aesthetic", "technical")):
        found[name] = float(
            np.asarray(spearmanr([ours[row] for row in rows], [paper_rows()[row][place] for row in rows]))[0]
        )
    return found
