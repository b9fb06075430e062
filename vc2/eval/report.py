"""The report: one HTML page that holds everything it shows, `report.json` for programs and `report.md` for a glance."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vc2.artifacts import Artifact, Manifest, Report, commit, find, put_file
from vc2.eval.charts import smoothed
from vc2.eval.leaderboard import ASPECT_LABELS, as_json, as_markdown, comparison, results_by_mode
from vc2.eval.metrics import METRICS
from vc2.eval.page import number
from vc2.eval.report_data import (
    BeforeAfter,
    Judged,
    LineageNode,
    LossCurve,
    ReportData,
    SampleRow,
    ScoreRow,
    ShardSheet,
    SheetItem,
    Timing,
)
from vc2.eval.report_page import render_html
from vc2.eval.report_scores import valueless, withheld_words
from vc2.eval.report_videos import digits_of
from vc2.eval.scorecard import Summary
from vc2.storage import Store

__all__ = [
    "BeforeAfter",
    "Judged",
    "LineageNode",
    "LossCurve",
    "ReportData",
    "SampleRow",
    "ScoreRow",
    "ShardSheet",
    "SheetItem",
    "Timing",
    "publish",
    "render_html",
    "render_json",
    "render_markdown",
]

STAGE_VERSION = 1


def publish(
    store: Store,
    data: ReportData,
    *,
    fingerprint: str,
    inputs: Mapping[str, Artifact],
    config: Mapping[str, Any],
    stage: str = "evaluate/evalcrafter",
    stage_version: int = STAGE_VERSION,
    repeat: int = 0,
    seconds: float = 0.0,
    counts: Mapping[str, int] | None = None,
) -> Report:
    """Write the three files of a report, then its manifest: report.html, report.json, report.md."""
    prefix = f"reports/{fingerprint}"
    if done := find(store, prefix, Report):
        return done
    texts = {"report.html": render_html(data), "report.json": render_json(data), "report.md": render_markdown(data)}
    manifest = Manifest(
        kind="report",
        stage=stage,
        stage_version=stage_version,
        fingerprint=fingerprint,
        repeat=repeat,
        config=dict(config),
        inputs=dict(inputs),
        files=tuple(put_file(store, prefix, name, text.encode()) for name, text in texts.items()),
        counts={"videos": len(data.rows), **(counts or {})},
        facts={**_trained(data), "scores": _plain_scores(data)},
        seconds=round(seconds, 3),
    )
    report = commit(store, prefix, manifest)
    assert isinstance(report, Report)
    return report


def render_json(data: ReportData) -> str:
    """The report as JSON; videos by their sha256. Figures that are no number are null."""
    samples = [
        {
            "id": row.id,
            "prompt": row.prompt,
            "note": row.note,
            "tags": dict(row.tags),
            "sample": row.sha256 or (row.sample and _sha256(row.sample)),
            "missing": row.missing,
            "real": row.real and _sha256(row.real),
            "scores": dict(row.scores),
            "real_scores": dict(row.real_scores),
            "values": row.values,
            "reasons": row.reasons,
        }
        for row in data.rows
    ]
    pairs = [
        {
            "prompt": row.prompt,
            "before": _sha256(row.before),
            "after": _sha256(row.after),
            "before_scores": dict(row.before_scores),
            "after_scores": dict(row.after_scores),
        }
        for row in data.before_after
    ]
    losses = [
        {"stage": curve.stage, "points": [list(point) for point in curve.points], "trivial": curve.trivial}
        for curve in data.curves
    ]
    shards = [
        {
            "source": sheet.source,
            "rows": sheet.rows,
            "samples": sheet.samples,
            "duplicates": sheet.duplicates,
            "rejects": dict(sheet.rejects),
            "shards": sheet.shards,
            "bytes": sheet.size,
        }
        for sheet in data.shards
    ]
    lineage = [
        {
            "name": node.name,
            "kind": node.kind,
            "fingerprint": node.fingerprint,
            "content_digest": node.content_digest,
            "inputs": list(node.inputs),
        }
        for node in data.lineage
    ]
    whole = {
        "title": data.title,
        "created_at": data.created_at,
        "fingerprint": data.fingerprint,
        "trained_minutes": data.trained_minutes,
        "about": data.about,
        "notes": list(data.notes),
        "hardware": data.hardware,
        "figures": dict(data.figures),
        "samples": samples,
        "before_after": pairs,
        "losses": losses,
        "scores": _plain_scores(data),
        "benchmark": dict(data.benchmark),
        "published": as_json(comparison(data.benchmark, data.compare)) if data.benchmark else [],
        "shards": shards,
        "lineage": lineage,
        "timings": [{"stage": time.stage, "seconds": time.seconds, "reused": time.is_reused} for time in data.timings],
        "config": dict(data.config),
        "environment": dict(data.environment),
    }
    return json.dumps(_finite(whole), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def render_markdown(data: ReportData) -> str:
    """The report in words and tables: everything but the videos and pictures."""
    hardware = f" ({data.hardware})" if data.hardware else ""
    lines = [f"# {_one_line(data.title)}", "", _one_line(f"{data.videos} {data.sentence}{hardware}.")]
    lines += [f"\n{_one_line(note)}" for note in data.notes]
    if data.scores and data.all_judges:
        lines += ["", *_grid(["judge", *(row.name for row in data.scores)], _judge_cells(data))]
    lines += _benchmark_lines(data)
    for curve in data.curves:
        if curve.points:
            trivial = "" if curve.trivial is None else f"; the trivial predictor has {curve.trivial:.3f}"
            loss, step = smoothed(curve.points)[-1][1], curve.points[-1][0]
            lines += ["", f"Loss of {curve.stage}: {loss:.3f} at step {step:g}{trivial}."]
    for sheet in data.shards:
        rejects = f"{sheet.duplicates} duplicates, {sum(sheet.rejects.values())} rejects"
        lines += ["", f"{sheet.source}: {sheet.rows} rows, {sheet.samples} samples, {rejects}."]
    for node in data.lineage:
        made_from = f" from {' and '.join(node.inputs)}" if node.inputs else ""
        lines += ["", f"{node.name}: {node.kind}{made_from}, fingerprint {node.fingerprint[:12]}."]
    return "\n".join(lines) + "\n"


def _judge_cells(data: ReportData) -> list[list[str]]:
    return [
        [judge.label, *(_summary_words(row.scores.get(judge.name)) for row in data.scores)] for judge in data.all_judges
    ]


def _summary_words(summary: Summary | None) -> str:
    if summary is None:
        return ""
    value = f"{100 * summary.mean:.0f} %" if summary.is_share else number(summary.mean)
    return f"{value} (n = {summary.n})"


def _benchmark_lines(data: ReportData) -> list[str]:
    """Metrics and aspects of every mode, published rows, and all that is missing, with the reasons."""
    modes = results_by_mode(data.benchmark)
    if not modes:
        return []
    lines = ["", "## EvalCrafter" if data.benchmark.get("name", "evalcrafter") == "evalcrafter" else "## Benchmark"]
    for mode, results in modes.items():
        measured = sum("value" in result for result in results["metrics"].values())
        lines += ["", f"{mode}: {measured} of {len(results['metrics'])} metrics measured."]
        if quality := results.get("vbench", {}).get("quality"):
            lines += [f"VBench's quality half is {quality:.2f}."]
    if warnings := data.benchmark.get("warnings"):
        lines += ["", "**Read these numbers with care**", "", *(f"- {_one_line(words)}" for words in warnings)]
    rows = [
        [f"{label}, {mode}", *(_given(results.get(part, {}).get(name), label) for name in ASPECT_LABELS)]
        for mode, results in modes.items()
        for label, part in (("fitted", "aspects"), ("plain average", "averages"))
        if part == "aspects" or results.get(part)
    ]
    lines += ["", *_grid(["score", *ASPECT_LABELS.values()], rows)]
    found = {name for results in modes.values() for name in results["metrics"]}
    names = [*(name for name in METRICS if name in found), *sorted(found - set(METRICS))]
    cells = [
        [name, *(_result_words(name, results["metrics"].get(name)) for results in modes.values())] for name in names
    ]
    lines += ["", *_grid(["metric", *modes], cells), ""]
    for mode, results in modes.items():
        absent = ((name, result) for name, result in results["metrics"].items() if "value" not in result)
        lines += [f"- {name} ({mode}): not measured: {_one_line(said.get('not_measured'))}" for name, said in absent]
        lines += [f"- {mode}: {_one_line(words)}" for words in withheld_words(results)]
    videos = data.benchmark.get("videos", {})
    if videos:
        lines += ["", f"Videos: {videos.get('scored')} scored of {videos.get('expected')}."]
        lines += [f"- {name}: not scored: {_one_line(why)}" for name, why in sorted(videos.get("rejected", {}).items())]
    if lost := valueless(data.rows):
        lines += ["", "Videos without a value:", ""]
        lines += [f"- {what}: {_one_line(why)}: {', '.join(ids)}" for what, why, ids in lost]
    return [
        *lines,
        "",
        "## Beside published results",
        "",
        as_markdown(comparison(data.benchmark, data.compare)).rstrip(),
    ]


def _given(value: float | None, label: str) -> str:
    if value is None:
        return "not given" if label == "fitted" else ""
    return f"{value:.2f}"


def _result_words(name: str, result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    if "value" not in result:
        return "not measured"
    notes = [f"n = {result.get('n', 0)}"]
    notes += [f"{count} without a value: {why}" for why, count in result.get("without_value", {}).items()]
    notes += [str(result["note"])] if result.get("note") else []
    return f"{result['value']:.{digits_of(name)}f} ({'; '.join(notes)})"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown."""
    cells = [[_one_line(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    written = [f"| {' | '.join(row)} |" for row in cells]
    return [written[0], "|---|" + "---:|" * (len(head) - 1), *written[1:]]


def _one_line(words: object) -> str:
    """Text that came from elsewhere cannot begin a line of its own."""
    return " ".join(str(words).split())


def _trained(data: ReportData) -> dict[str, float]:
    return {} if data.trained_minutes is None else {"trained_minutes": round(data.trained_minutes, 2)}


def _plain_scores(data: ReportData) -> dict[str, dict[str, dict[str, float]]]:
    return {
        row.name: {name: {"mean": summary.mean, "n": summary.n} for name, summary in row.scores.items()}
        for row in data.scores
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
