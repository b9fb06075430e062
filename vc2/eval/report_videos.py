"""The videos of a report: the first large, all others on a wall to be filtered and sorted, and their scores as tables.

Everything is in the page without its script: all videos with their controls, and a table of scores for every mode. The
script (`assets/report.js`) adds filters and order. It reads from each card what it needs: the attributes of the prompt
(`data-tags`, `data-classes`) and the values of each mode in the order of the form's `data-columns`: a number, `!3` for
reason number 3, both where a value is strange, nothing where a figure does not apply.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from vc2.eval.metrics import METRICS
from vc2.eval.page import column, data_uri, element, empty, number, row_head, section, table
from vc2.eval.report_data import BeforeAfter, Judged, ReportData, SampleRow

__all__ = ["before_after", "digits_of", "opening", "printed", "wall"]

FEW = 24  # videos of which a browser looks at the first frame at once
FILTERS_FROM = 6  # videos, below which there is nothing to filter
JUDGES = "judges"  # stands for a mode where the figures are those of judges
DETECTION = "detection"
TAGS = ("count", "color", "text", "action", "amplitude", "celebrity", DETECTION)  # in the order of the page
WITHOUT_TAGS = "none"
ARROWS = {"up": "↑", "down": "↓"}


@dataclass(frozen=True)
class Survey:
    """What all cards share."""

    data: ReportData
    is_paired: bool  #: a real clip, or the lack of one, is shown beside each sample
    names: Mapping[str, Sequence[str]]  #: figures by mode, in the order of the page
    reasons: Mapping[str, int]  #: numbers of the reasons why values are missing, from 1
    has_tags: bool

    @classmethod
    def of(cls, data: ReportData) -> "Survey":
        found: dict[str, set[str]] = {}
        reasons: dict[str, int] = {}
        for row in data.rows:
            for part in (row.values, row.reasons):
                for mode, figures in part.items():
                    found.setdefault(mode, set()).update(figures)
            for why in (why for said in row.reasons.values() for why in said.values()):
                reasons.setdefault(why, len(reasons) + 1)
        names = {mode: _in_order(found[mode]) for mode in sorted(found)}
        if judges := [judge.name for judge in data.all_judges if any(judge.name in row.scores for row in data.rows)]:
            names[JUDGES] = judges
        is_paired = data.trained_minutes is not None or any(row.real for row in data.rows)
        return cls(data, is_paired, names, reasons, any(row.tags for row in data.rows))

    def label(self, mode: str, name: str) -> str:
        if mode != JUDGES:
            return name
        return next((judge.label for judge in self.data.all_judges if judge.name == name), name)

    def better(self, mode: str, name: str) -> str:
        if mode == JUDGES:
            return next((judge.better for judge in self.data.all_judges if judge.name == name), "")
        return METRICS[name].direction if name in METRICS else ""


def _in_order(names: set[str]) -> list[str]:
    return [name for name in METRICS if name in names] + sorted(names - set(METRICS))


def digits_of(name: str) -> int:
    """Decimals of a metric as the leaderboard prints it."""
    return 2 if name in METRICS and name != "Warping_Error" else 4


def printed(name: str, value: float) -> str:
    """A video's raw value in the printed unit, without it."""
    return f"{_scale(name) * value:.{digits_of(name)}f}"


def _scale(name: str) -> float:
    return METRICS[name].scale if name in METRICS else 1.0


def _unit(name: str) -> str:
    return METRICS[name].unit if name in METRICS else ""


# ---- the part of the page ----


def opening(data: ReportData, figures: Mapping[str, str]) -> str:
    """What the page opens with: whose videos these are, and the videos.

    Args:
        data: The report.
        figures: Words for the top, by label.
    """
    survey = Survey.of(data)
    told = [element("div", element("dt", escape(k)), element("dd", escape(v))) for k, v in figures.items()]
    listed = element("dl", *told, class_="figures") if told else ""
    is_scored_only = data.trained_minutes is None  # then the scores come first
    cards = [_sample_card(survey, row, is_large=place == 0) for place, row in enumerate(data.rows)]
    wall = "wall all" if survey.is_paired else "wall all small"
    has_filters = len(data.rows) >= FILTERS_FROM
    parts = (
        element("h1", escape(f"{data.videos} {data.sentence}".strip())),
        element("p", _lead(survey), class_="lead"),
        listed if is_scored_only else "",
        element("div", *(cards[:1] or [empty("No samples.")]), class_="stage"),
        _filters(survey) if has_filters else "",
        element("div", *cards[1:], class_=wall) if cards[1:] else "",
        _more() if has_filters else "",
        *(element("p", escape(note), class_="muted small") for note in data.notes),
        *(_score_table(survey, mode) for mode in survey.names if mode != JUDGES),
        "" if is_scored_only else listed,
    )
    return element("section", *parts, id="samples", class_="opening")


def wall(data: ReportData) -> str:
    """All videos side by side, each under its prompt, and nothing else."""
    survey = Survey.of(data)
    cards = [_sample_card(survey, row, is_large=False) for row in data.rows]
    return element("div", *cards, class_="wall all small whole") if cards else empty("No samples.")


def _lead(survey: Survey) -> str:
    if survey.is_paired:
        lead = "Left, what the model made of a prompt it was given as text; right, a real clip of the same thing."
    else:
        lead = "Each video with the prompt it was made of, and what was measured of it."
    return f"{lead} Hardware: {escape(survey.data.hardware)}." if survey.data.hardware else lead


def before_after(data: ReportData) -> str:
    """The same prompts from before and after stage 2."""

    def card(row: BeforeAfter) -> str:
        before = _figure(data, row.before, "", "after stage 1", row.prompt, row.before_scores)
        after = _figure(data, row.after, "made", "after stage 2", row.prompt, row.after_scores)
        return _card(row.prompt, before + after)

    cards = [card(row) for row in data.before_after]
    return section(
        "stage-2",
        "Before and after stage 2",
        "Stage 1 learns from videos and images how things look and move; stage 2 tunes the spatial modules alone on "
        "crisp pictures. Same prompt, same seed.",
        element("div", *cards, class_="wall") if cards else empty("No samples from before stage 2."),
    )


# ---- a card ----


def _sample_card(survey: Survey, row: SampleRow, *, is_large: bool) -> str:
    data = survey.data
    scores = row.scores if row.sample is not None else {}
    figures = _figure(
        data, row.sample, "made", "sample", row.prompt, scores, row.size, row.missing, with_numbers=is_large
    )
    if survey.is_paired:
        # Beside a small sample only what a judge misses in the real clip is worth a mark.
        marks = {name: value for name, value in row.real_scores.items() if is_large or value == 0.0}
        shown = marks if row.real is not None else {}
        figures += _figure(data, row.real, "real", "real clip", row.prompt, shown, with_numbers=is_large)
    tags = [element("li", f"{escape(_tag(name))} {escape(words)}", class_="chip") for name, words in row.tags.items()]
    values = {f"data_{mode}": _encoded(survey, row, mode) for mode in survey.names}
    return _card(
        row.prompt,
        figures,
        element("ul", *tags, class_="tags", aria_label="what the prompt asks for") if tags else "",
        element("p", escape(row.note), class_="muted small") if row.note else "",
        element("p", class_="value", hidden=True) if survey.names else "",
        name=row.id,
        is_large=is_large,
        data_id=row.id or None,
        data_tags=" ".join(row.tags) or None,
        data_classes=row.tags.get(DETECTION, "").replace(", ", ",") or None,
        **values,
    )


def _tag(name: str) -> str:
    return "shows" if name == DETECTION else name.replace("_", " ")


def _card(prompt: str, figures: str, *rest: str, name: str = "", is_large: bool = False, **attributes: object) -> str:
    """Videos that play together under their prompt."""
    label = element("code", escape(name), class_="id") if name else ""
    pair = element("div", figures, class_="pair")
    style = "card shot hero" if is_large else "card shot"
    return element(
        "article", element("h3", escape(prompt)), pair, label, *rest, class_=style, data_together=True, **attributes
    )


def _figure(
    data: ReportData,
    video: bytes | None,
    style: str,
    tag: str,
    prompt: str,
    scores: Mapping[str, float],
    size: tuple[int, int] | None = None,
    missing: str = "",
    *,
    with_numbers: bool = False,
) -> str:
    width, height = size or data.size
    if video is None:
        words = escape(missing or "no clip in the data shows this")
        shown = element("div", words, class_="absent", style=f"aspect-ratio:{width}/{height}")
    else:
        shown = element(
            "video",
            src=data_uri("video/mp4", video),
            width=width,
            height=height,
            data_fps=f"{data.fps:g}",
            aria_label=f"{tag}: {prompt}",
            preload="metadata" if len(data.rows) <= FEW else "none",
            controls=True,
            loop=True,
            muted=True,
            playsinline=True,
        )
    told = [(judge, _is_share(data, judge)) for judge in data.all_judges if judge.name in scores]
    chips = [_chip(judge, scores[judge.name], is_share) for judge, is_share in told if is_share or with_numbers]
    return element("figure", shown, element("figcaption", element("span", tag, class_=f"tag {style}".strip()), *chips))


def _chip(judge: Judged, value: float, is_share: bool) -> str:
    if not is_share or value not in (0.0, 1.0):
        return element("span", f"{escape(judge.label)} {number(value)}", class_="chip")
    good = value == (0.0 if judge.better == "down" else 1.0)
    mark, said = ("✓", "yes") if value == 1.0 else ("✗", "no")
    words = f"{mark} {escape(judge.label)}"
    return element("span", words, class_="chip yes" if good else "chip no", title=f"{judge.label}: {said}")


def _is_share(data: ReportData, judge: Judged) -> bool:
    return all(row.scores[judge.name].is_share for row in data.scores if judge.name in row.scores)


def _encoded(survey: Survey, row: SampleRow, mode: str) -> str:
    values = row.scores if mode == JUDGES else row.values.get(mode, {})
    reasons = row.reasons.get(mode, {})

    def told(name: str) -> str:
        value = f"{values[name]:.7g}" if name in values else ""
        return f"{value}!{survey.reasons[reasons[name]]}" if name in reasons else value

    return ",".join(map(told, survey.names[mode]))


# ---- filters and order ----


def _filters(survey: Survey) -> str:
    """The form, which the script shows and reads."""
    rows = survey.data.rows
    words = element("label", "Words in the prompt", element("input", type="search", name="words", autocomplete="off"))
    counts = {tag: sum(tag in row.tags for row in rows) for tag in _tags(rows)}
    if survey.has_tags:
        counts[WITHOUT_TAGS] = sum(not row.tags for row in rows)
    boxes = [
        element(
            "label",
            element("input", type="checkbox", name="tag", value=tag),
            f" {escape(tag.replace('_', ' '))} ",
            element("span", str(count), class_="muted"),
        )
        for tag, count in counts.items()
        if count
    ]
    asked = (
        element("fieldset", element("legend", "Prompts with any of"), element("div", *boxes, class_="pills"))
        if survey.has_tags
        else ""
    )
    found: dict[str, int] = {}
    for name in (name for row in rows for name in row.tags.get(DETECTION, "").split(", ") if name):
        found[name] = found.get(name, 0) + 1
    classes = [element("option", f"{escape(name)} ({count})", value=name) for name, count in sorted(found.items())]
    detected = (
        element(
            "label", "Detection class", element("select", element("option", "any", value=""), *classes, name="class")
        )
        if classes
        else ""
    )
    shape = {
        mode: [[name, survey.label(mode, name), _unit(name), _scale(name), digits_of(name)] for name in names]
        for mode, names in survey.names.items()
    }
    return element(
        "form",
        element("div", words, detected, *_sorting(survey), class_="fields"),
        asked,
        element(
            "p",
            element("output", "", aria_live="polite"),
            element("button", "Reset", type="reset"),
            class_="told",
        ),
        class_="filters",
        role="search",
        aria_label="Filter and sort the videos",
        hidden=True,
        data_columns=json.dumps(shape, ensure_ascii=False, separators=(",", ":")),
        data_reasons=json.dumps(list(survey.reasons), ensure_ascii=False),
    )


def _tags(rows: Sequence[SampleRow]) -> list[str]:
    found = dict.fromkeys(tag for row in rows for tag in row.tags)
    return [*(tag for tag in TAGS if tag in found), *(tag for tag in found if tag not in TAGS)]


def _sorting(survey: Survey) -> list[str]:
    if not survey.names:
        return []
    modes = [mode for mode in survey.names if mode != JUDGES]
    groups = [("metrics", [(name, "", name) for name in _in_order({n for mode in modes for n in survey.names[mode]})])]
    groups.append(("judges", [(name, JUDGES, survey.label(JUDGES, name)) for name in survey.names.get(JUDGES, ())]))
    options = [
        element(
            "optgroup",
            *(
                element(
                    "option",
                    f"{escape(label)} {ARROWS.get(survey.better(mode or modes[0], name), '')}".rstrip(),
                    value=f"{mode}:{name}",
                )
                for name, mode, label in members
            ),
            label=title,
        )
        for title, members in groups
        if members
    ]
    first = element("option", "as the prompts are listed", value="")
    fields = [element("label", "Sort by", element("select", first, *options, name="metric"))]
    if modes:
        choices = [element("option", mode, value=mode) for mode in modes]
        fields.append(element("label", "Mode", element("select", *choices, name="mode")))
    orders = [
        element("option", words, value=value) for value, words in (("down", "highest first"), ("up", "lowest first"))
    ]
    return [*fields, element("label", "Order", element("select", *orders, name="order"))]


def _more() -> str:
    """For the videos that the script does not show at first."""
    buttons = (element("button", "Show more", type="button"), element("button", "Show all", type="button"))
    return element("p", *buttons, class_="more-videos", hidden=True)


# ---- a table of all scores ----


def _score_table(survey: Survey, mode: str) -> str:
    names = survey.names[mode]
    used: dict[int, str] = {}

    def cell(row: SampleRow, name: str) -> str:
        value, why = row.values.get(mode, {}).get(name), row.reasons.get(mode, {}).get(name)
        if value is None and why is None:
            return "<td></td>"
        if why is not None:
            used[survey.reasons[why]] = why
        note = element("sup", str(survey.reasons[why])) if why is not None else ""
        words = "–" if value is None else printed(name, value)
        return element("td", words, note, class_="num none" if value is None else "num")

    rows = [
        element("tr", row_head(row.id or str(place), row.prompt), *(cell(row, name) for name in names), data_id=row.id)
        for place, row in enumerate(survey.data.rows)
    ]
    heads = [
        column(f"{name} {ARROWS.get(survey.better(mode, name), '')}".rstrip(), data_metric=name, data_mode=mode)
        for name in names
    ]
    head = [column("video", is_number=False), *heads]
    reasons = [element("li", escape(why), value=place) for place, why in sorted(used.items())]
    return element(
        "details",
        element("summary", f"Scores of every video, {escape(mode)}"),
        element(
            "p",
            "↑ more is better, ↓ less is. Empty: the metric does not look at this prompt."
            + (" A dash: no value. Small numbers lead to the reasons below." if used else ""),
            class_="muted small",
        ),
        table(f"Scores of every video, {mode}", head, rows, "videos", "scroll tall"),
        element("ol", *reasons, class_="reasons-list", aria_label="Reasons") if reasons else "",
        class_="more scores-table",
        data_mode=mode,
    )
