"""Results of a study in words and tables: Markdown, and the layouts of the VideoCrafter2 paper.

Table 2 of the paper has a row for each other model and says how many percent chose *ours*, by question; Table 4 a row
for each pair of training strategies. How the paper treats ties is not said, nor how many votes stand behind a figure:
ours are given with ties split and with the share that chose ours outright, with intervals and n. The paper's own
figures are handed in as rows of its tables.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from vc2.errors import ConfigError
from vc2.eval.study.results import Estimate, Parting, Strengths, StudyResult

__all__ = ["paper_table", "render_markdown"]

PAPER_ORDER = ("text_video_alignment", "motion_quality", "visual_quality")
SHORT = {
    "text_video_alignment": "text-video alignment",
    "motion_quality": "motion quality",
    "visual_quality": "visual quality",
}
Rows = Iterable[Mapping[str, str]]


def render_markdown(result: StudyResult, *, ours: str | None = None, published: Rows = ()) -> str:
    """The whole result.

    Args:
        result: Of `analyse`.
        ours: The model that the others are compared with, as in Table 2; None: every pair as a row, as in Table 4.
        published: Rows of the paper's Table 2 or 4, to print beside ours.

    Raises:
        ConfigError: If no model is called `ours`.
    """
    accounts = result.accounts
    files, answers = accounts["files"], accounts["answers"]
    lines = [
        "# Preference study",
        "",
        f"{_count(files['used'], 'rater')} of {_count(files['in'], 'file')}, {_count(answers['votes'], 'vote')} that "
        f"count of {answers['in']} answers ({answers['repeats']} more to repeated pairs, {answers['attention']} to "
        f"attention trials, {sum(answers['rejected'].values())} rejected). "
        f"Models: {', '.join(map(_safe, result.models))}.",
    ]
    lines += ["", *(f"- {_safe(warning)}" for warning in result.warnings)] if result.warnings else []
    lines += ["", "## As in the paper", "", paper_table(result, ours=ours, published=published).rstrip("\n")]
    lines += ["", "## Every pair", "", *_partings(result)]
    if result.strengths:
        lines += ["", "## All models at once", "", *_strengths(result)]
    lines += ["", "## Raters", "", *_raters(result)]
    if result.rejected_files:
        lines += ["", "## Files that were rejected", ""]
        lines += [f"- {_safe(file)}: {_safe(reason)}" for file, reason in result.rejected_files]
    return "\n".join(lines) + "\n"


def paper_table(result: StudyResult, *, ours: str | None = None, published: Rows = ()) -> str:
    """Percent choosing the first model, by question, in the paper's order of columns; its own figures below ours.

    Raises:
        ConfigError: If no model is called `ours`.
    """
    if ours is not None and ours not in result.models:
        raise ConfigError(f"no model is called {ours!r}; the study has {', '.join(result.models)}")
    questions = sorted(result.questions, key=_paper_place)
    pairs = _pairs(result, ours)
    papers = _published(published)
    head = [
        "ours against" if ours else "preferred, against",
        *(SHORT.get(name, name) for name in questions),
        "votes",
        "prompts",
    ]
    lines = [_row(head), "|---|" + "---:|" * (len(head) - 1)]
    used = set()
    for a, b in pairs:
        paper = next((name for name in papers if _is_row_of(name, (a, b), ours)), None)
        if paper is not None and paper[0] is not None and _plain(paper[0]) == _plain(b):
            a, b = b, a
        found = [result.parting(question, a, b) for question in questions]
        sizes = [one for one in found if one]
        cells = [_safe(b) if ours else f"{_safe(a)}, {_safe(b)}"]
        cells += [_percent_cell(one) if one else "" for one in found]
        cells += [_range([one.votes for one in sizes]), _range([one.prompts for one in sizes])]
        lines.append(_row(cells))
        if paper is not None:
            used.add(paper)
            figures = [papers[paper].get(question, "") for question in questions]
            lines.append(_row(["*paper*", *figures, "", ""]))
    rest = [name for name in papers if name not in used]
    notes = [
        f"Percent choosing {'ours' if ours else 'the first'}, ties counted half, with {result.level:.0%} interval over "
        "prompts; in brackets the percent that chose it outright. Votes and prompts: by question."
    ]
    if papers:
        notes.append(
            "*paper*: as printed; how it treats ties, and how many votes a figure stands on, is not said there."
        )
    if papers and rest:
        names = ", ".join(_safe(f"{a}, {b}" if a else b) for a, b in rest)
        notes.append(f"In the paper, not in this study: {names}.")
    return "\n".join([*lines, "", *notes]) + "\n"


def _pairs(result: StudyResult, ours: str | None) -> list[tuple[str, str]]:
    pairs = list(dict.fromkeys((one.a, one.b) for one in result.partings))
    if ours is None:
        return pairs
    return [(ours, b if a == ours else a) for a, b in pairs if ours in (a, b)]


def _published(rows: Rows) -> dict[tuple[str | None, str], dict[str, str]]:
    """Figures by question, by the models of the row: (None for ours, other)."""
    found = {}
    for row in rows:
        name = (None, row["ours_vs"]) if "ours_vs" in row else (row["preferred"], row["against"])
        found[name] = {column.removesuffix("_pct"): value for column, value in row.items() if column.endswith("_pct")}
    return found


def _is_row_of(name: tuple[str | None, str], pair: tuple[str, str], ours: str | None) -> bool:
    if name[0] is None:
        return ours is not None and _plain(name[1]) == _plain(pair[1])
    return {_plain(name[0]), _plain(name[1])} == {_plain(pair[0]), _plain(pair[1])}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _paper_place(question: str) -> int:
    return PAPER_ORDER.index(question) if question in PAPER_ORDER else len(PAPER_ORDER)


def _partings(result: StudyResult) -> list[str]:
    head = ["question", "a", "b", "a, ties split", "a, ties dropped", "a / comparable / b", "votes", "raters",
            "prompts", "prompts a : b", "p", "p (Holm)"]  # fmt: skip
    lines = [_row(head), "|---|---|---|" + "---:|" * (len(head) - 3)]
    notes: dict[str, None] = {}
    for one in result.partings:
        shares = " / ".join(_percent(each.value) for each in (one.chosen_a, one.tied, one.chosen_b))
        cells = [SHORT.get(one.question, one.question), _safe(one.a), _safe(one.b), _interval(one.split),
                 _interval(one.dropped), shares, one.votes, one.raters, one.prompts, f"{one.sign.a} : {one.sign.b}",
                 _p(one.sign.p), _p(one.sign.p_holm)]  # fmt: skip
        lines.append(_row(cells))
        notes |= dict.fromkeys(each.note for each in (one.split, one.dropped) if each.note)
    lines += [
        "",
        f"Percent, with {result.level:.0%} intervals from {result.resamples} bootstrap resamples of prompts. p: exact "
        "sign test over prompts (those with more votes for a or for b), two-sided; Holm: corrected for all tests here.",
    ]
    return lines + [f"Without the bootstrap: {_safe(note)}." for note in notes]


def _strengths(result: StudyResult) -> list[str]:
    lines = [
        _row(["question", "models, strongest first: log-strength, mean 0", "readiness for ties"]),
        "|---|---|---:|",
    ]
    notes = []
    for one in result.strengths:
        lines.append(_row([SHORT.get(one.question, one.question), _order(one), _number(one.tie_readiness)]))
        if one.note:
            notes.append(f"{SHORT.get(one.question, one.question)}: {one.note}.")
    lines += ["", "Davidson's model of paired comparison with ties; one more is 2.7 : 1 among votes that decide."]
    return lines + notes


def _order(one: Strengths) -> str:
    if one.strengths[0].value is None:
        return "none"
    return "; ".join(
        f"{_safe(model)} {_number(strength.value, sign=True)}"
        + (
            ""
            if strength.low is None
            else f" [{_number(strength.low, sign=True)}, {_number(strength.high, sign=True)}]"
        )
        for model, strength in zip(one.models, one.strengths, strict=True)
    )


def _raters(result: StudyResult) -> list[str]:
    lines = [
        _row(["question", "Krippendorff's alpha", "pairs judged twice or more", "correlation"]),
        "|---|---:|---:|---:|",
    ]
    for one in result.agreement:
        alpha = one.alpha
        shown = alpha.note if alpha.value is None else _number(alpha.value)
        shown += "" if alpha.low is None else f" [{_number(alpha.low)}, {_number(alpha.high)}]"
        lines.append(_row([SHORT.get(one.question, one.question), shown, one.units, _number(one.correlation)]))
    lines += [
        "",
        "Alpha: 1 raters agree, 0 as by chance. Correlation between votes on one pair: for `vc2 study plan`.",
        "",
    ]
    head = ["rater", "votes", "repeats answered as before", "left chosen", "comparable", "median seconds", "attention"]
    lines += [_row(head), "|---|" + "---:|" * (len(head) - 1)]
    people = result.raters_themselves
    for one in people:
        cells = [one.rater, one.votes, _of(one.same, one.repeats), _of(one.left, one.decided), _of(one.ties, one.votes),
                 f"{one.median_seconds:.1f}", _of(*one.attention)]  # fmt: skip
        lines.append(_row(cells))
    if len(people) > 1:
        same, repeats = sum(one.same for one in people), sum(one.repeats for one in people)
        left, decided = sum(one.left for one in people), sum(one.decided for one in people)
        lines.append(
            _row(["*all*", sum(one.votes for one in people), _of(same, repeats), _of(left, decided),
                  _of(sum(one.ties for one in people), sum(one.votes for one in people)), "", ""])
        )  # fmt: skip
    return lines


# ---- cells ----


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.0f}"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None:
        return _percent(estimate.value)
    return f"{_percent(estimate.value)} [{_percent(estimate.low)}, {_percent(estimate.high)}]"


def _percent_cell(one: Parting) -> str:
    return f"{_interval(one.split)} ({_percent(one.chosen_a.value)})"


def _number(value: float | None, *, sign: bool = False) -> str:
    return "none" if value is None else f"{value:+.2f}" if sign else f"{value:.2f}"


def _p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.2g}"


def _of(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.0f} %)" if whole else "none"


def _range(values: Sequence[int]) -> str:
    if not values:
        return ""
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _safe(text: str) -> str:
    """Words of others that can neither break a table nor become markup."""
    text = " ".join(text.split()).replace("\\", "\\\\")
    return re.sub(r"([|<>`*_\[\]])", r"\\\1", text)
