"""What the votes of a study say, and how surely.

*Win rates* of a over b, by question: ties split ((a + tie / 2) / all, the main figure), ties dropped (a / (a + b)), and
all three shares as they are. Votes on one prompt go together, so whatever is uncertain is asked of prompts: intervals
are percentiles of a bootstrap that draws *prompts* with all of their votes (Efron 1979), the test is an exact sign test
over prompts (which of the two has more votes there; prompts with as many are left out), with Holm's correction for the
number of tests.

*Raters*: Krippendorff's alpha (`agreement`), the share of repeated trials answered as before, and how often the left
video was chosen. *Several models*: strengths by Davidson's model (`davidson`), with intervals from the same bootstrap.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from vc2.errors import ConfigError
from vc2.eval.study.agreement import krippendorff_alpha, unit_counts
from vc2.eval.study.answers import Answers, StudyKey, Vote, read_answers, read_key
from vc2.eval.study.davidson import fit_davidson
from vc2.eval.study.results import Agreement, Estimate, Parting, SelfAgreement, SignTest, Strengths, StudyResult
from vc2.progress import counted
from vc2.seeding import generator

__all__ = ["analyse", "analyse_votes", "sign_test"]

CHOICES = ("a", "tie", "b")
FEW_PROMPTS = 10
MOST_MISSING = 0.05  # share of resamples without a value, above which there is no interval


def analyse(
    key_path: Path,
    answer_files: Iterable[Path],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    min_seconds: float | None = None,
    min_attention: float | None = None,
) -> StudyResult:
    """Read the answers of raters and say what they say.

    Args:
        key_path: The key that `build` wrote beside the study.
        answer_files: What raters saved; a folder stands for the .json files in it.
        resamples: Of the bootstrap.
        level: Of the intervals.
        seed: Of the bootstrap.
        min_seconds: Seconds of looking under which an answer does not count; None: those the page asked for.
        min_attention: Share of attention trials that a rater must get right; None: any.

    Raises:
        ConfigError: If the key is none, or no file can be used; says what was wrong with them.
    """
    key = read_key(key_path)
    files = [file for path in answer_files for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    answers = read_answers(key, files, min_seconds=min_seconds, min_attention=min_attention)
    if not answers.raters:
        reasons = "; ".join(f"{fate.file}: {fate.reason}" for fate in answers.files[:3])
        raise ConfigError(f"no answers to analyse: {reasons or 'no files given'}")
    return analyse_votes(key, answers, resamples=resamples, level=level, seed=seed)


def analyse_votes(
    key: StudyKey, answers: Answers, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> StudyResult:
    """As `analyse`, of answers that were read."""
    if resamples < 100 or not 0.5 <= level < 1:
        raise ConfigError(f"{resamples} resamples, level {level:g}: expected 100 or more, and 0.5 up to 1")
    bootstrap = _Bootstrap(resamples, level, seed)
    partings = _with_holm(
        [
            _parting(question, pair, votes, bootstrap)
            for question in key.questions
            for pair in key.pairs
            if (votes := [vote for vote in answers.votes if vote.question == question and vote.pair == pair])
        ]
    )
    by_question = {
        question: [vote for vote in answers.votes if vote.question == question] for question in key.questions
    }
    strengths = []
    if len(key.models) > 2:
        strengths = [_strengths(question, key.models, votes, bootstrap) for question, votes in by_question.items()]
    return StudyResult(
        study=key.study,
        models=key.models,
        questions=key.titles,
        raters=tuple(answers.raters),
        accounts=answers.accounts(),
        rejected_files=tuple((fate.file, fate.reason) for fate in answers.files if fate.reason),
        partings=tuple(partings),
        agreement=tuple(_agreement(question, votes, bootstrap) for question, votes in by_question.items()),
        raters_themselves=tuple(_self_agreement(rater, answers) for rater in answers.raters),
        strengths=tuple(strengths),
        level=level,
        resamples=resamples,
        seed=seed,
        warnings=tuple(_warnings(answers, partings)),
    )


# ---- the bootstrap ----


class _Bootstrap:
    """Draws of prompts: how often each is drawn, the same for every question asked of the same number of prompts."""

    def __init__(self, resamples: int, level: float, seed: int) -> None:
        self.level = level

        @lru_cache(maxsize=4)
        def weights(prompts: int) -> np.ndarray:
            draws = generator(seed, "study bootstrap", prompts)
            return draws.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples).astype(np.float64)

        self.weights: Callable[[int], np.ndarray] = weights

    def interval(self, values: np.ndarray) -> tuple[float, float] | None:
        """Percentiles of the values (R,) of resamples; None where too many have none."""
        missing = np.isnan(values)
        if missing.mean() > MOST_MISSING:
            return None
        tail = (1 - self.level) / 2
        low, high = np.quantile(values[~missing], (tail, 1 - tail))
        return float(low), float(high)

    def ratio(self, part: np.ndarray, whole: np.ndarray) -> Estimate:
        """A rate sum(part) / sum(whole) over prompts, (P,) each."""
        prompts = len(whole)
        if whole.sum() == 0:
            return Estimate(None, note="no votes that count")
        value = float(part.sum() / whole.sum())
        if (counted := int((whole > 0).sum())) < 2:
            return Estimate(value, note="one prompt: no interval")
        if value in (0.0, 1.0):  # every resample would say the same
            reach = ((1 - self.level) / 2) ** (1 / counted)  # Clopper and Pearson 1934, prompts as trials
            low, high = (reach, 1.0) if value else (0.0, 1 - reach)
            return Estimate(value, low, high, "all alike: exact binomial interval over prompts")
        weights = self.weights(prompts)
        with np.errstate(invalid="ignore"):
            found = self.interval((weights @ part) / (weights @ whole))
        if found is None:
            return Estimate(value, note="too few prompts with votes that count")
        return Estimate(value, *found)


# ---- win rates ----


def _parting(question: str, pair: tuple[str, str], votes: Sequence[Vote], bootstrap: _Bootstrap) -> Parting:
    prompts = sorted({vote.prompt for vote in votes})
    place = {prompt: number for number, prompt in enumerate(prompts)}
    counts = np.zeros((len(prompts), 3))  # a, tie, b
    for vote in votes:
        counts[place[vote.prompt], CHOICES.index(vote.choice)] += 1
    a, tie, b = counts.T
    whole = counts.sum(1)
    more_a, more_b = int((a > b).sum()), int((b > a).sum())
    p = sign_test(more_a, more_b)
    return Parting(
        question,
        *pair,
        votes=len(votes),
        raters=len({vote.rater for vote in votes}),
        prompts=len(prompts),
        wins_a=int(a.sum()),
        ties=int(tie.sum()),
        wins_b=int(b.sum()),
        split=bootstrap.ratio(a + tie / 2, whole),
        dropped=bootstrap.ratio(a, a + b),
        chosen_a=bootstrap.ratio(a, whole),
        tied=bootstrap.ratio(tie, whole),
        chosen_b=bootstrap.ratio(b, whole),
        sign=SignTest(more_a, more_b, len(prompts) - more_a - more_b, p, p),
    )


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of an exact binomial test against one half."""
    total = wins + losses
    tail = sum(math.comb(total, count) for count in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**total)


def _with_holm(partings: Sequence[Parting]) -> list[Parting]:
    corrected, so_far = {}, 0.0
    ranked = sorted(partings, key=lambda parting: parting.sign.p)
    for place, parting in enumerate(ranked):
        so_far = max(so_far, min(1.0, parting.sign.p * (len(ranked) - place)))
        corrected[parting.question, parting.a, parting.b] = so_far
    return [replace(one, sign=replace(one.sign, p_holm=corrected[one.question, one.a, one.b])) for one in partings]


# ---- raters ----


def _agreement(question: str, votes: Sequence[Vote], bootstrap: _Bootstrap) -> Agreement:
    by_matchup: dict[tuple[str, str], list[Vote]] = defaultdict(list)
    for vote in votes:
        by_matchup[vote.prompt, vote.matchup].append(vote)
    units = sorted(by_matchup)
    counts = unit_counts([[vote.choice for vote in by_matchup[unit]] for unit in units], CHOICES)
    num_shared = int((counts.sum(1) >= 2).sum())
    if not num_shared:
        return Agreement(question, Estimate(None, note="no pair of videos was judged by two raters"), 0, None)
    value = float(krippendorff_alpha(counts))
    correlation = _correlation(counts)
    if math.isnan(value):
        note = "all votes are the same: agreement beyond chance is not defined"
        return Agreement(question, Estimate(None, note=note), num_shared, correlation)
    prompts = sorted({prompt for prompt, _ in units})
    if len(prompts) < 2:
        return Agreement(question, Estimate(value, note="one prompt: no interval"), num_shared, correlation)
    which = [prompts.index(prompt) for prompt, _ in units]
    found = bootstrap.interval(krippendorff_alpha(counts, bootstrap.weights(len(prompts))[:, which]))
    estimate = Estimate(value, *found) if found else Estimate(value, note="too few prompts with two votes or more")
    return Agreement(question, estimate, num_shared, correlation)


def _correlation(counts: np.ndarray) -> float | None:
    """Between two votes on one matchup, as scores of a (1, 1/2, 0): the intraclass correlation of a one-way analysis of
    variance, (between - within) / (between + (k - 1) within) of the mean squares, k the mean number of votes (weighted
    as usual for unequal ones)."""
    scores, raters = np.array([1.0, 0.5, 0.0]), counts.sum(1)
    total, groups = raters.sum(), len(raters)
    if groups < 2 or total <= groups:
        return None
    means = counts @ scores / raters
    grand = float(raters @ means / total)
    between = float(raters @ (means - grand) ** 2) / (groups - 1)
    within = float((counts @ scores**2 - raters * means**2).sum()) / (total - groups)
    size = float(total - (raters**2).sum() / total) / (groups - 1)
    spread = between + (size - 1) * within
    return None if spread <= 0 else min(1.0, max(0.0, (between - within) / spread))


def _self_agreement(rater: str, answers: Answers) -> SelfAgreement:
    votes = [vote for vote in answers.votes if vote.rater == rater]
    first = {(vote.matchup, vote.question): vote.choice for vote in votes}
    again = [vote for vote in answers.repeats if vote.rater == rater and (vote.matchup, vote.question) in first]
    sides = [vote.is_left for vote in votes if vote.is_left is not None]
    attention = next(fate.attention for fate in answers.files if fate.rater == rater and not fate.reason)
    return SelfAgreement(
        rater,
        votes=len(votes),
        same=sum(first[vote.matchup, vote.question] == vote.choice for vote in again),
        repeats=len(again),
        left=sum(sides),
        decided=len(sides),
        ties=len(votes) - len(sides),
        median_seconds=float(np.median([vote.seconds for vote in votes])) if votes else 0.0,
        attention=attention,
    )


# ---- several models ----


def _strengths(question: str, models: Sequence[str], votes: Sequence[Vote], bootstrap: _Bootstrap) -> Strengths:
    def none(note: str) -> Strengths:
        return Strengths(question, tuple(models), tuple(Estimate(None) for _ in models), None, note)

    if not votes:
        return none("no votes")
    place = {model: number for number, model in enumerate(models)}
    prompts = sorted({vote.prompt for vote in votes})
    row = {prompt: number for number, prompt in enumerate(prompts)}
    wins = np.zeros((len(prompts), len(models), len(models)))
    ties = np.zeros_like(wins)
    for vote in votes:
        a, b = (place[model] for model in vote.pair)
        if vote.choice == "tie":
            ties[row[vote.prompt], a, b] += 1
        else:
            winner, loser = (a, b) if vote.choice == "a" else (b, a)
            wins[row[vote.prompt], winner, loser] += 1
    fit = fit_davidson(wins.sum(0)[None], ties.sum(0)[None])
    if np.isnan(fit.strengths).any():
        return none("some models were never beaten or tied by the others: their strengths have no finite estimate")
    intervals: list[tuple[float, float] | None] = [None] * len(models)
    note = "one prompt: no interval"
    if len(prompts) > 1:
        weights = bootstrap.weights(len(prompts))[:2000]
        resampled = fit_davidson(*(np.einsum("rp,pij->rij", weights, each, optimize=True) for each in (wins, ties)))
        intervals = [bootstrap.interval(resampled.strengths[:, number]) for number in range(len(models))]
        missing = float(np.isnan(resampled.strengths[:, 0]).mean())
        note = f"{missing:.0%} of resamples have no finite strengths" if missing else ""
    values = fit.strengths[0]
    order: list[int] = np.argsort(-values, kind="stable").tolist()
    estimates = [Estimate(float(values[at]), *(intervals[at] or (None, None))) for at in order]
    names = tuple([models[at] for at in order])
    return Strengths(question, names, tuple(estimates), float(np.exp(fit.log_ties[0])), note)


def _warnings(answers: Answers, partings: Iterable[Parting]) -> Iterable[str]:
    if rejected := [fate for fate in answers.files if fate.reason]:
        yield f"{len(rejected)} of {len(answers.files)} files were rejected"
    if count := answers.rejected.total():
        reasons = ", ".join(f"{reason} {number}" for reason, number in answers.rejected.most_common())
        yield f"{count} answers do not count: {reasons}"
    if few := sorted({parting.prompts for parting in partings if parting.prompts < FEW_PROMPTS}):
        yield f"only {few[0]} prompts in places: intervals from so few are rough, and rather too narrow"
    if answers.unanswered:
        yield f"{answers.unanswered} questions were not answered: raters stopped early"
    if len(answers.raters) < 3:
        yield f"{counted(len(answers.raters), 'rater')}: what one or two like says little about what people like"
