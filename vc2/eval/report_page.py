"""The report as a page.

It opens with prompt, sample and real clip side by side, then: before and after stage 2, loss curves, scores, contact
sheets of the shards, lineage, configuration, timings. It asks nobody for anything: videos and pictures lie in the
page. All text that is not ours (captions, prompts, reasons) passes through `escape`, attributes do so in `element`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vc2.eval.charts import lineage_layers, lineage_svg, loss_svg, smoothed
from vc2.eval.leaderboard import ASPECTS, PAPER_ROW, RAW, RAW_COLUMNS
from vc2.eval.metrics import METRICS, Metric
from vc2.eval.page import data_uri, element, page
from vc2.eval.report_data import BeforeAfter, Judged, LossCurve, ReportData, SampleRow, ShardSheet, SheetItem
from vc2.eval.scorecard import Summary

__all__ = ["render_html", "summary_words"]

SECTIONS = {
    "samples": "Samples",
    "stage-2": "Before and after",
    "losses": "Losses",
    "scores": "Scores",
    "shards": "Data",
    "lineage": "Lineage",
    "configuration": "Configuration",
    "timings": "Timings",
}
ASPECT_NAMES = {
    "visual_quality": "Visual quality",
    "text_video_alignment": "Text-video alignment",
    "motion_quality": "Motion quality",
    "temporal_consistency": "Temporal consistency",
    "total": "Total",
}


def render_html(data: ReportData) -> str:
    """The report as one HTML document that needs nothing else."""
    links = [element("a", name, href=f"#{anchor}") for anchor, name in SECTIONS.items()]
    bar = element("nav", *links, aria_label="Parts of the report") + _controls()
    footer = f"{escape(data.title)}. {escape(data.created_at)} <code>{escape(data.fingerprint)}</code>"
    parts = (
        _opening(data),
        _before_after(data),
        _losses(data),
        _scores(data),
        _shards(data),
        _lineage(data),
        _configuration(data),
        _timings(data),
        element("footer", footer),
    )
    skip = element("a", "To the samples", class_="skip", href="#samples")
    return page(
        data.title, "\n".join((skip, element("header", element("div", bar)), element("main", "\n".join(parts))))
    )


def _controls() -> str:
    """Buttons for all videos; the script knows them by their order and shows them."""
    buttons = (
        element("button", "Pause", type="button", title="play or pause (k)"),
        element("button", "‹ Frame", type="button", title="one frame back (,)", aria_label="one frame back"),
        element("button", "Frame ›", type="button", title="one frame on (.)", aria_label="one frame on"),
        element("button", "Slow", type="button", title="half speed", aria_pressed="false"),
        element("button", "Pixels", type="button", title="show every pixel as it is", aria_pressed="false"),
    )
    return element("div", *buttons, class_="controls", role="group", aria_label="All videos", hidden=True)


def _section(anchor: str, title: str, lead: str, *parts: str) -> str:
    return element("section", element("h2", title), element("p", lead, class_="lead"), *parts, id=anchor)


def _empty(words: str) -> str:
    return element("p", words, class_="empty")


def _table(label: str, head: Sequence[str], rows: Sequence[str], style: str | None = None) -> str:
    body = element("thead", element("tr", *head)) + element("tbody", *rows)
    return element(
        "div", element("table", body, class_=style), class_="scroll", tabindex=0, role="region", aria_label=label
    )


def _column(name: str, *, is_number: bool = True) -> str:
    return element("th", escape(name), scope="col", class_="num" if is_number else None)


def _row_head(name: str, small: str = "") -> str:
    return element("th", escape(name), element("small", escape(small)) if small else "", scope="row")


# ---- videos ----


def _opening(data: ReportData) -> str:
    lead = "Left, what the model made of a prompt it was given as text; right, a real clip of the same thing."
    if data.hardware:
        lead += f" Hardware: {escape(data.hardware)}."
    cards = "".join(_sample_card(data, row, is_large=True) for row in data.rows[:1]) or _empty("No samples.")
    if rest := [_sample_card(data, row) for row in data.rows[1:]]:
        cards += element("div", *rest, class_="wall")
    figures = [
        element("div", element("dt", escape(label)), element("dd", escape(value)))
        for label, value in _figures(data).items()
    ]
    made = "One video" if len(data.rows) == 1 else f"{len(data.rows) or 'No'} videos"
    return element(
        "section",
        element("h1", escape(f"{made} from a model {data.sentence}")),
        element("p", lead, class_="lead"),
        cards,
        element("dl", *figures, class_="figures") if figures else "",
        id="samples",
        class_="opening",
    )


def _figures(data: ReportData) -> dict[str, str]:
    """What is said at the top, and the shares of the model's samples that the judges are content with."""
    figures = dict(data.figures)
    ours = [row for row in data.scores if not row.is_reference][-1:]
    for row in ours:
        for judge in data.all_judges:
            summary = row.scores.get(judge.name)
            if summary and summary.is_share and judge.better == "up" and len(figures) < 8:
                figures[f"{judge.label} ({_count_words(summary)})"] = f"{100 * summary.mean:.0f} %"
    return figures


def _sample_card(data: ReportData, row: SampleRow, *, is_large: bool = False) -> str:
    made = _figure(data, row.sample, "made", "sample", row.prompt, row.scores, with_numbers=is_large)
    # Beside a small sample only what a judge misses in the real clip is worth a mark.
    marks = {name: value for name, value in row.real_scores.items() if is_large or value == 0.0}
    real = _figure(data, row.real, "real", "real clip", row.prompt, marks, with_numbers=is_large)
    note = element("p", escape(row.note), class_="muted small") if row.note else ""
    return _pair_card(row.prompt, made + real, note, "card hero" if is_large else "card")


def _before_after(data: ReportData) -> str:
    def card(row: BeforeAfter) -> str:
        before = _figure(data, row.before, "", "after stage 1", row.prompt, row.before_scores)
        after = _figure(data, row.after, "made", "after stage 2", row.prompt, row.after_scores)
        return _pair_card(row.prompt, before + after)

    cards = [card(row) for row in data.before_after]
    return _section(
        "stage-2",
        "Before and after stage 2",
        "Stage 1 learns from videos and images how things look and move; stage 2 tunes the spatial modules alone on "
        "crisp pictures. Same prompt, same seed.",
        element("div", *cards, class_="wall") if cards else _empty("No samples from before stage 2."),
    )


def _pair_card(prompt: str, figures: str, note: str = "", style: str = "card") -> str:
    """Two videos that play together under their prompt."""
    pair = element("div", figures, class_="pair")
    return element("article", element("h3", escape(prompt)), pair, note, class_=style, data_together=True)


def _figure(
    data: ReportData,
    video: bytes | None,
    style: str,
    tag: str,
    prompt: str,
    scores: Mapping[str, float],
    *,
    with_numbers: bool = False,
) -> str:
    width, height = data.size
    if video is None:
        scores = {}
        shown = element(
            "div", "no clip in the data shows this", class_="absent", style=f"aspect-ratio:{width}/{height}"
        )
    else:
        shown = element(
            "video",
            src=data_uri("video/mp4", video),
            width=width,
            height=height,
            data_fps=f"{data.fps:g}",
            aria_label=f"{tag}: {prompt}",
            autoplay=True,
            loop=True,
            muted=True,
            playsinline=True,
        )
    told = [(judge, _is_share(data, judge)) for judge in data.all_judges if judge.name in scores]
    chips = [_chip(judge, scores[judge.name], is_share) for judge, is_share in told if is_share or with_numbers]
    return element("figure", shown, element("figcaption", element("span", tag, class_=f"tag {style}".strip()), *chips))


def _chip(judge: Judged, value: float, is_share: bool) -> str:
    if not is_share or value not in (0.0, 1.0):
        return element("span", f"{escape(judge.label)} {_number(value)}", class_="chip")
    good = value == (0.0 if judge.better == "down" else 1.0)
    mark, said = ("✓", "yes") if value == 1.0 else ("✗", "no")
    words = f"{mark} {escape(judge.label)}"
    return element("span", words, class_="chip yes" if good else "chip no", title=f"{judge.label}: {said}")


def _is_share(data: ReportData, judge: Judged) -> bool:
    return all(row.scores[judge.name].is_share for row in data.scores if judge.name in row.scores)


# ---- losses ----


def _losses(data: ReportData) -> str:
    charts = [_loss_card(curve) for curve in data.curves]
    return _section(
        "losses",
        "Losses",
        "Mean squared error of the predicted noise: every logged step faintly, the trend over it. The dashed line is "
        "what a predictor that has learnt nothing would cost.",
        element("div", *charts, class_="charts") if charts else _empty("No losses were logged."),
    )


def _loss_card(curve: LossCurve) -> str:
    points = [(step, loss) for step, loss in curve.points if math.isfinite(loss)]
    last = f"ends at {smoothed(points)[-1][1]:.3f} after {points[-1][0]:g} steps" if points else ""
    return element(
        "div",
        element("h3", escape(curve.stage)),
        element("p", escape(curve.note)) if curve.note else "",
        loss_svg(curve.stage, points, curve.trivial),
        element("div", last, class_="reading"),
        class_="card chart",
        data_curve=json.dumps([[step, round(loss, 5)] for step, loss in points]),
    )


# ---- scores ----


def _scores(data: ReportData) -> str:
    return _section(
        "scores",
        "Scores",
        "Judges that know what each prompt promises look at every video. The real clips stand beside as the reference: "
        "what the judges say of the truth itself."
        if data.scores
        else "Metrics by name, and what could not be measured.",
        _judge_table(data),
        _benchmark(data.benchmark),
    )


def _judge_table(data: ReportData) -> str:
    judges = [judge for judge in data.all_judges if any(judge.name in row.scores for row in data.scores)]
    if not judges:
        return _empty("No judges were asked.")
    rows = []
    for judge in judges:
        arrow = {"up": "higher is better", "down": "lower is better", "": ""}[judge.better]
        cells = [_score_cell(row.scores.get(judge.name), row.is_reference) for row in data.scores]
        words = "; ".join(part for part in (judge.what, arrow) if part)
        rows.append(element("tr", _row_head(judge.label, words), *cells))
    head = [_column("judge", is_number=False), *(_column(row.name) for row in data.scores)]
    return _table("Scores", head, rows, "judges")


def _score_cell(summary: Summary | None, is_reference: bool) -> str:
    style = "num ref" if is_reference else "num"
    if summary is None:
        return element("td", "none", class_=f"{style} muted")
    if not summary.is_share:
        return element("td", _number(summary.mean), element("small", f"n = {summary.n}"), class_=style)
    percent = f"{100 * summary.mean:.0f}"
    bar = element("span", element("i", style=f"width:{percent}%"), class_="bar")
    return element("td", f"{percent} %", element("small", _count_words(summary)), bar, class_=style)


def _count_words(summary: Summary) -> str:
    return f"{round(summary.mean * summary.n)} of {summary.n}"


def summary_words(summary: Summary | None) -> str:
    """A summary in a few words; none where there is none."""
    if summary is None:
        return ""
    value = f"{100 * summary.mean:.0f} %" if summary.is_share else _number(summary.mean)
    return f"{value} (n = {summary.n})"


def _benchmark(benchmark: Mapping[str, Any]) -> str:
    """EvalCrafter's aspects and metrics: ours, or why there are none, beside what is published."""
    results = benchmark.get("metrics")
    if not results:
        return ""
    measured = sum("not_measured" not in result for result in results.values())
    words = (
        f"{measured} of {len(results)} metrics measured (mode: {escape(str(benchmark.get('mode', '')))}). A metric "
        "without its weights is not measured, and a score that needs it is not given. Beside: the published "
        "leaderboard of 2024 for full-size models on 700 prompts, as data; it says nothing about this run."
    )
    aspects = _aspect_rows(benchmark.get("aspects", {}), benchmark.get("withheld", {}))
    metrics = []
    for aspect, name in ASPECT_NAMES.items():
        members = [metric for metric in METRICS.values() if metric.aspect == aspect and metric.name in results]
        if members:
            metrics.append(element("tr", element("th", name, colspan=4, scope="rowgroup"), class_="group"))
        metrics += [_metric_row(metric, results[metric.name]) for metric in members]
    columns = [_column("model", is_number=False), *(_column(name) for name in ASPECT_NAMES.values())]
    metric_columns = [
        _column("metric", is_number=False),
        _column("this run", is_number=False),
        _column(f"published, {len(RAW)} models"),
        _column("unit", is_number=False),
    ]
    return "".join(
        (
            element("h3", "EvalCrafter", class_="apart", id="evalcrafter"),
            element("p", words, class_="muted"),
            _table("EvalCrafter aspects", columns, aspects),
            element(
                "details",
                element("summary", f"The {len(results)} metrics"),
                _table("EvalCrafter metrics", metric_columns, metrics),
                class_="more",
                open=True,
            ),
        )
    )


def _metric_row(metric: Metric, result: Mapping[str, Any]) -> str:
    arrow = {"up": "↑ higher is better", "down": "↓ lower is better", "neutral": "neutral"}[metric.direction]
    published = [row[RAW_COLUMNS.index(metric.name)] for row in RAW.values()]
    if "not_measured" in result:
        words = element("span", f"not measured: {escape(str(result['not_measured']))}", class_="none")
    else:
        words = f"{_number(result['value'])} {metric.unit}" + element("small", f"n = {len(result['per_video'])}")
    return element(
        "tr",
        _row_head(metric.name, arrow),
        element("td", words, class_="words"),
        element("td", f"{min(published):g} – {max(published):g}", class_="num"),
        element("td", metric.unit or "plain"),
    )


def _aspect_rows(ours: Mapping[str, float], withheld: Mapping[str, str]) -> list[str]:
    cells = [
        element("td", f"{ours[name]:.2f}", class_="num")
        if name in ours
        else element("td", "not given", class_="num none", title=withheld.get(name))
        for name in ASPECT_NAMES
    ]
    rows = [element("tr", _row_head("this run"), *cells, class_="ours")]
    for model, (*aspects, total) in ASPECTS.items():
        cells = [element("td", f"{value:.2f}", class_="num") for value in aspects]
        rows.append(element("tr", _row_head(model), *cells, element("td", f"{total:.0f}", class_="num")))
    paper = [element("td", f"{value:.2f}", class_="num") for value in PAPER_ROW]
    head = _row_head("VideoCrafter2, in its paper", "another scoring: not comparable")
    return [*rows, element("tr", head, *paper, element("td"))]


# ---- data and lineage ----


def _shards(data: ReportData) -> str:
    sheets = [_sheet(sheet) for sheet in data.shards]
    return _section(
        "shards",
        "What the model saw",
        "A contact sheet of the shards of each source, and what became of every row: it is a sample, a duplicate, or "
        "rejected for a reason.",
        element("div", *sheets, class_="sources") if sheets else _empty("No shards."),
    )


def _sheet(sheet: ShardSheet) -> str:
    rejected = sum(sheet.rejects.values())
    parts = (
        ("kept", "samples", sheet.samples),
        ("twice", "exact duplicates", sheet.duplicates),
        ("dropped", "rejects", rejected),
    )
    size = f"{sheet.rows:,} rows"
    if sheet.shards:
        size += f", {sheet.shards} shard{'s' * (sheet.shards != 1)}, {_bytes(sheet.size)}"
    meter = [element("i", class_=style, style=f"flex:{count} 0 0") for style, _, count in parts if count]
    key = [element("li", element("i", class_=style), f"{count:,} {name}") for style, name, count in parts]
    reasons = [
        element("li", f"{escape(reason.replace('_', ' '))} {count:,}", class_="chip no")
        for reason, count in sorted(sheet.rejects.items(), key=lambda item: (-item[1], item[0]))
    ]
    is_stills = all(len(item.frames) == 1 for item in sheet.items)
    return element(
        "div",
        element("div", element("h3", escape(sheet.source)), element("span", size, class_="muted"), class_="top"),
        element("div", *meter, class_="meter", aria_hidden="true"),
        element("ul", *key, class_="key"),
        element("ul", *reasons, class_="reasons", aria_label="Reasons") if reasons else "",
        element("div", *(_sheet_item(item) for item in sheet.items), class_="sheet stills" if is_stills else "sheet"),
        class_="card source",
    )


def _sheet_item(item: SheetItem) -> str:
    pictures = [element("img", src=_picture_uri(frame), alt="", loading="lazy") for frame in item.frames]
    fps = " " + element("span", f"{item.fps:g} fps", class_="chip") if item.fps else ""
    strip = element("div", *pictures, class_="strip one" if len(pictures) == 1 else "strip")
    return element("figure", strip, element("figcaption", escape(item.caption), fps))


def _picture_uri(picture: bytes) -> str:
    return data_uri("image/png" if picture.startswith(b"\x89PNG") else "image/jpeg", picture)


def _lineage(data: ReportData) -> str:
    lead = "What was made from what. A fingerprint names what was asked for, a content digest what came out."
    if not data.lineage:
        return _section("lineage", "Lineage", lead, _empty("No lineage was recorded."))
    nodes = {node.name: node for node in data.lineage}
    inputs = {name: list(node.inputs) for name, node in nodes.items()}
    lines = {name: (name, node.fingerprint[:12], node.note or node.kind) for name, node in nodes.items()}
    listed = []
    for name in (name for layer in lineage_layers(inputs) for name in layer):
        node = nodes[name]
        made_from = f", from {' and '.join(node.inputs)}" if node.inputs else ""
        digests = f"fingerprint {escape(node.fingerprint)}<br>content {escape(node.content_digest or 'not recorded')}"
        words = element("span", escape(f"{node.kind}{made_from}"), class_="muted")
        listed.append(element("li", element("b", escape(name)), words, "<br>", element("code", digests)))
    return _section(
        "lineage",
        "Lineage",
        lead,
        element("div", lineage_svg(inputs, lines), class_="lineage-picture"),
        element(
            "details",
            element("summary", "All fingerprints and content digests"),
            element("ol", *listed, class_="steps"),
            class_="more lineage-list",
        ),
    )


# ---- how it was made ----


def _configuration(data: ReportData) -> str:
    text = escape(json.dumps(data.config, indent=2, ensure_ascii=False, default=str))
    facts = [
        element("div", element("dt", escape(name)), element("dd", escape(value)))
        for name, value in data.environment.items()
    ]
    settings = element("details", element("summary", "All settings"), element("pre", text, tabindex=0))
    versions = element(
        "details", element("summary", "Environment"), element("dl", *facts, class_="facts"), class_="more"
    )
    return _section(
        "configuration",
        "Configuration",
        "The resolved configuration of every stage, and the versions it ran with.",
        settings if data.config else _empty("No configuration."),
        versions if facts else "",
    )


def _timings(data: ReportData) -> str:
    if not data.timings:
        return _section("timings", "Timings", "How long each stage took.", _empty("No timings were recorded."))
    longest = max(timing.seconds for timing in data.timings) or 1.0
    bars = []
    for timing in data.timings:
        width = f"width:{100 * timing.seconds / longest:.1f}%"
        fill = element("i", class_="again" if timing.is_reused else None, style=width)
        words = _seconds(timing.seconds) + (", reused" if timing.is_reused else "")
        bars.append(element("b", escape(timing.stage)))
        bars.append(element("span", fill, class_="track") + element("span", words, class_="t"))
    total = f"{_seconds(sum(timing.seconds for timing in data.timings))} in all."
    return _section("timings", "Timings", total, element("div", *bars, class_="bars"))


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "none"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
