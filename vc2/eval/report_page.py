"""The report as a page.

It opens with prompt, sample and real clip side by side, then all videos, before and after stage 2, loss curves,
scores, published rows with ours below, what was not measured, contact sheets of the shards, lineage, settings,
timings. Where nothing was trained, what is about training is left out. It asks nobody for anything: videos and pictures
lie in the page. All text that is not ours (captions, prompts, reasons) passes through `escape`, attributes do so in
`element`.
"""

import json
import math
from collections.abc import Mapping
from html import escape
from typing import Any

from vc2.eval.charts import loss_svg, smoothed
from vc2.eval.graphs import Box, graph_layers, graph_svg
from vc2.eval.leaderboard import results_by_mode
from vc2.eval.page import (
    column,
    data_uri,
    element,
    empty,
    facts_list,
    flat,
    page,
    row_head,
    section,
    table,
)
from vc2.eval.report_data import LossCurve, ReportData, ShardSheet, SheetItem
from vc2.eval.report_scores import comparisons, count_words, headline, missing, scores
from vc2.eval.report_videos import before_after, opening
from vc2.progress import duration_text

__all__ = ["controls", "loss_card", "render_html"]


def render_html(data: ReportData) -> str:
    """The report as one HTML document that needs nothing else."""
    is_trained = data.trained_minutes is not None
    is_benchmarked = bool(results_by_mode(data.benchmark))
    parts = {
        ("samples", "Samples" if is_trained else "Videos"): opening(data, _figures(data)),
        ("stage-2", "Stage 2"): before_after(data) if is_trained or data.before_after else "",
        ("losses", "Losses"): _losses(data) if is_trained or data.curves else "",
        ("scores", "Scores"): scores(data),
        ("published", "Published"): comparisons(data) if is_benchmarked else "",
        ("missing", "Not measured"): missing(data) if is_benchmarked else "",
        ("shards", "Data"): _shards(data) if is_trained or data.shards else "",
        ("lineage", "Lineage"): _lineage(data),
        ("configuration", "Settings"): _configuration(data),
        ("timings", "Timings"): _timings(data),
    }
    links = [element("a", name, href=f"#{anchor}") for (anchor, name), part in parts.items() if part]
    bar = element("nav", *links, aria_label="Parts of the report") + controls()
    footer = f"{escape(data.title)}. {escape(data.created_at)} <code>{escape(data.fingerprint)}</code>"
    body = "\n".join((*filter(None, parts.values()), element("footer", footer)))
    skip = element("a", "To the videos", class_="skip", href="#samples")
    return page(data.title, "\n".join((skip, element("header", element("div", bar)), element("main", body))))


def _figures(data: ReportData) -> dict[str, str]:
    """What is said at the top: given figures, scores, and the shares of samples that the judges are content with."""
    figures = {**data.figures, **(headline(data) if data.trained_minutes is None else {})}
    ours = [row for row in data.scores if not row.is_reference][-1:]
    for row in ours:
        for judge in data.all_judges:
            summary = row.scores.get(judge.name)
            if summary and summary.is_share and judge.better == "up" and len(figures) < 8:
                figures[f"{judge.label} ({count_words(summary)})"] = f"{100 * summary.mean:.0f} %"
    return figures


def controls() -> str:
    """Buttons for all videos; the script knows them by their order and shows them."""
    buttons = (
        element("button", "Pause", type="button", title="play or pause (k)"),
        element("button", "‹ Frame", type="button", title="one frame back (,)", aria_label="one frame back"),
        element("button", "Frame ›", type="button", title="one frame on (.)", aria_label="one frame on"),
        element("button", "Slow", type="button", title="half speed", aria_pressed="false"),
        element("button", "Pixels", type="button", title="show every pixel as it is", aria_pressed="false"),
    )
    return element("div", *buttons, class_="controls", role="group", aria_label="All videos", hidden=True)


# ---- losses ----


def _losses(data: ReportData) -> str:
    charts = [loss_card(curve) for curve in data.curves]
    return section(
        "losses",
        "Losses",
        "Mean squared error of the predicted noise: every logged step faintly, the trend over it. The dashed line is "
        "what a predictor that has learnt nothing would cost.",
        element("div", *charts, class_="charts") if charts else empty("No losses were logged."),
    )


def loss_card(curve: LossCurve) -> str:
    """A loss curve with what it ends at."""
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


# ---- data and lineage ----


def _shards(data: ReportData) -> str:
    sheets = [_sheet(sheet) for sheet in data.shards]
    return section(
        "shards",
        "What the model saw",
        "A contact sheet of the shards of each source, and what became of every row: it is a sample, a duplicate, or "
        "rejected for a reason.",
        element("div", *sheets, class_="sources") if sheets else empty("No shards."),
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
        return section("lineage", "Lineage", lead, empty("No lineage was recorded."))
    nodes = {node.name: node for node in data.lineage}
    inputs = {name: list(node.inputs) for name, node in nodes.items()}
    boxes = {name: Box((name, node.fingerprint[:12], node.note or node.kind)) for name, node in nodes.items()}
    arrows = {name: [("", parent) for parent in parents] for name, parents in inputs.items()}
    listed = []
    for name in (name for layer in graph_layers(inputs) for name in layer):
        node = nodes[name]
        made_from = f", from {' and '.join(node.inputs)}" if node.inputs else ""
        digests = f"fingerprint {escape(node.fingerprint)}<br>content {escape(node.content_digest or 'not recorded')}"
        words = element("span", escape(f"{node.kind}{made_from}"), class_="muted")
        listed.append(element("li", element("b", escape(name)), words, "<br>", element("code", digests)))
    return section(
        "lineage",
        "Lineage",
        lead,
        element("div", graph_svg("Lineage", arrows, boxes), class_="lineage-picture"),
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
    settings = element("details", element("summary", "All settings"), element("pre", text, tabindex=0))
    versions = element("details", element("summary", "Environment"), facts_list(data.environment), class_="more")
    decisive = data.benchmark.get("settings") or {}
    return section(
        "configuration",
        "Settings",
        "The resolved configuration of every stage, and the versions it ran with.",
        element("h3", "What decides the scores") + facts_list(flat(decisive)) if decisive else "",
        _weights(data.benchmark),
        settings if data.config else empty("No configuration."),
        versions if data.environment else "",
    )


def _weights(benchmark: Mapping[str, Any]) -> str:
    """The foreign weights that were used, by digest, and by which metrics."""
    used: dict[tuple[str, str], dict[str, None]] = {}
    for results in results_by_mode(benchmark).values():
        for metric, result in results.get("metrics", {}).items():
            for name, sha256 in (result.get("weights") or {}).items():
                used.setdefault((str(name), str(sha256)), {})[metric] = None
    if not used:
        return ""
    rows = [
        element(
            "tr",
            row_head(name, ", ".join(metrics)),
            element("td", element("code", escape(sha256)), class_="digest"),
        )
        for (name, sha256), metrics in sorted(used.items())
    ]
    head = [column("weights", is_number=False), column("sha256", is_number=False)]
    return element("h3", "Weights", class_="apart") + table("Weights", head, rows)


def _timings(data: ReportData) -> str:
    if not data.timings:
        return section("timings", "Timings", "How long each stage took.", empty("No timings were recorded."))
    longest = max(timing.seconds for timing in data.timings) or 1.0
    bars = []
    for timing in data.timings:
        width = f"width:{100 * timing.seconds / longest:.1f}%"
        fill = element("i", class_="again" if timing.is_reused else None, style=width)
        words = duration_text(timing.seconds) + (", reused" if timing.is_reused else "")
        bars.append(element("b", escape(timing.stage)))
        bars.append(element("span", fill, class_="track") + element("span", words, class_="t"))
    total = f"{duration_text(sum(timing.seconds for timing in data.timings))} in all."
    return section("timings", "Timings", total, element("div", *bars, class_="bars"))


def _bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
