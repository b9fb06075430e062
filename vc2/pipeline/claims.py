"""What VideoCrafter2 says of the rows of its Table 3, as contrasts that figures of clips can hold up or not.

Every clip has a seed (of the training and all else) and a prompt. A contrast is a sum of figures of rows, taken clip by
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
End = Literal["start", "end"]  # of the tuning: the first of its checkpoints, or the last
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


def _end(row: Row) -> tuple[Row, End]:
    return (row, "end")


def _retained(first: Row, second: Row) -> dict[tuple[Row, End], float]:
    """What tuning changes in the first row, less what it changes in the second; each against its own base."""
    terms: dict[tuple[Row, End], float] = {}
    for row, sign in ((first, 1.0), (first.base, -1.0), (second, -1.0), (second.base, 1.0)):
        terms[_end(row)] = terms.get(_end(row), 0.0) + sign
    return terms


def _less(first: Row, second: Row) -> dict[tuple[Row, End], float]:
    return {_end(first): 1.0, _end(second): -1.0}


def _pair(first: Row, second: Row) -> Contrast:
    says = f"clips in which {first} moves better than {second}"
    return Contrast(says, "motion", _less(first, second), bound=0.5, how="wins")


CLAIMS = (
    Claim(
        "a",
        "F keeps its motion under spatial tuning better than P",
        [Contrast("change of motion, F-Spa-LoRA less P-Spa-LoRA", "motion", _retained(Row.F_SPA_LORA, Row.P_SPA_LORA))],
        "people prefer the motion of F-Spa-LoRA in 87 % (Table 4)",
    ),
    Claim(
        "b",
        "P shifts its appearance more easily",
        [
            Contrast(
                "change of quality, P-Spa-LoRA less F-Spa-LoRA", "quality", _retained(Row.P_SPA_LORA, Row.F_SPA_LORA)
            )
        ],
        "technical score 42.7 to 72.7 for P, 51.8 to 59.6 for F",
    ),
    Claim(
        "c",
        "direct tuning beats LoRA on quality",
        [Contrast("quality, F-Spa-DIR less F-Spa-LoRA", "quality", _less(Row.F_SPA_DIR, Row.F_SPA_LORA))],
        "82.6 / 70.4 against 78.0 / 59.6",
    ),
    Claim(
        "d",
        "Spa-DIR keeps motion better than Spa&Temp-DIR, at like quality",
        [Contrast("motion, F-Spa-DIR less F-Spa&Temp-DIR", "motion", _less(Row.F_SPA_DIR, Row.F_SPA_TEMP_DIR))],
        "people prefer the motion of F-Spa-DIR in 67 % (Table 4)",
        beside=[
            Contrast("quality, F-Spa-DIR less F-Spa&Temp-DIR", "quality", _less(Row.F_SPA_DIR, Row.F_SPA_TEMP_DIR))
        ],
    ),
    Claim(
        "e",
        "the watermark goes with F-Spa-LoRA, stays with F-Temp-LoRA and mostly with F-Spa&Temp-LoRA, and is gone or "
        "lighter in half of F-Temp-DIR",
        [
            Contrast("F-Spa-LoRA: clips with a watermark", "watermarked", {_end(Row.F_SPA_LORA): 1}, 0.5, above=False),
            Contrast("F-Temp-LoRA: clips with a watermark", "watermarked", {_end(Row.F_TEMP_LORA): 1}, 0.5),
            Contrast("F-Spa&Temp-LoRA: clips with a watermark", "watermarked", {_end(Row.F_SPA_TEMP_LORA): 1}, 0.5),
            Contrast("F-Temp-DIR: clips where it is lighter than in F-base by half or gone", "lightened",
                     {_end(Row.F_TEMP_DIR): 1}, 0.5),
        ],
        "Sec. 4.3, by eye",
    ),
    Claim(
        "f",
        "compositional images beat web-like ones on composition",
        [Contrast("composition, F-Spa-DIR less F-Spa-DIR-LAION", "composition",
                  _less(Row.F_SPA_DIR, Row.F_SPA_DIR_LAION))],
        "Sec. 4.3, by eye; 82.6 / 70.4 against 67.8 / 54.3 on quality",
        beside=[
            Contrast("quality, F-Spa-DIR less F-Spa-DIR-LAION", "quality", _less(Row.F_SPA_DIR, Row.F_SPA_DIR_LAION))
        ],
    ),
    Claim(
        "g",
        "P-Temp-LoRA shakes while F-Temp-LoRA keeps its base's motion",
        [Contrast("change of motion, F-Temp-LoRA less P-Temp-LoRA", "motion",
                  _retained(Row.F_TEMP_LORA, Row.P_TEMP_LORA))],
        "people prefer the motion of F-Temp-LoRA in 73 % (Table 4)",
    ),
    Claim(
        "h",
        "P-base has the video set's look although its spatial weights are frozen",
        [
            Contrast("P-base: clips with a watermark", "watermarked", {_end(Row.P_BASE): 1}, 0.5),
            Contrast("P-base: quality (0: the video set's look)", "quality", {_end(Row.P_BASE): 1}, 0.5, above=False),
        ],
        "34.3 / 42.7, the lowest of all rows",
    ),
    Claim(
        "i",
        "over the steps of spatial tuning the motion of P decays, that of F hardly",
        [
            Contrast(
                "motion, last checkpoint less first, F-Spa-LoRA less P-Spa-LoRA", "motion",
                {(Row.F_SPA_LORA, "end"): 1, (Row.F_SPA_LORA, "start"): -1,
                 (Row.P_SPA_LORA, "end"): -1, (Row.P_SPA_LORA, "start"): 1},
            ),
            Contrast("P-Spa-LoRA: motion, last checkpoint less first", "motion",
                     {(Row.P_SPA_LORA, "end"): 1, (Row.P_SPA_LORA, "start"): -1}, above=False),
        ],
        "Sec. 4.3, by eye",
    ),
    Claim("j1", "Table 4, pair 1: F-Spa-LoRA over P-Spa-LoRA", [_pair(Row.F_SPA_LORA, Row.P_SPA_LORA)], "87 %"),
    Claim("j2", "Table 4, pair 2: F-Temp-LoRA over P-Temp-LoRA", [_pair(Row.F_TEMP_LORA, Row.P_TEMP_LORA)], "73 %"),
    Claim("j3", "Table 4, pair 3: F-Spa-DIR over F-Spa&Temp-DIR", [_pair(Row.F_SPA_DIR, Row.F_SPA_TEMP_DIR)], "67 %"),
)  # fmt: skip


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
    if min(sign * (measured.low - contrast.bound), sign * (measured.high - contrast.bound)) > 0:
        return 1
    return -1 if max(sign * (measured.low - contrast.bound), sign * (measured.high - contrast.bound)) < 0 else 0


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
