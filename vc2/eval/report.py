"""The report: one HTML page that holds everything it shows, `report.json` for programs and `report.md` for a glance."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from vc2.artifacts import Artifact, Manifest, Report, commit, find, put_file
from vc2.eval.charts import smoothed
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
from vc2.eval.report_page import render_html, summary_words
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
        facts={"trained_minutes": round(data.trained_minutes, 2), "scores": _plain_scores(data)},
        seconds=round(seconds, 3),
    )
    report = commit(store, prefix, manifest)
    assert isinstance(report, Report)
    return report


def render_json(data: ReportData) -> str:
    """The report as JSON; videos by their sha256. Figures that are no number are null."""
    samples = [
        {
            "prompt": row.prompt,
            "note": row.note,
            "sample": _sha256(row.sample),
            "real": row.real and _sha256(row.real),
            "scores": dict(row.scores),
            "real_scores": dict(row.real_scores),
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
        "hardware": data.hardware,
        "figures": dict(data.figures),
        "samples": samples,
        "before_after": pairs,
        "losses": losses,
        "scores": _plain_scores(data),
        "benchmark": dict(data.benchmark),
        "shards": shards,
        "lineage": lineage,
        "timings": [{"stage": time.stage, "seconds": time.seconds, "reused": time.is_reused} for time in data.timings],
        "config": dict(data.config),
        "environment": dict(data.environment),
    }
    return json.dumps(_finite(whole), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def render_markdown(data: ReportData) -> str:
    """The report in a few lines."""
    hardware = f" ({data.hardware})" if data.hardware else ""
    lines = [f"# {data.title}", "", f"{len(data.rows)} videos from a model {data.sentence}{hardware}."]
    if data.scores and data.all_judges:
        head = ["judge", *(row.name for row in data.scores)]
        lines += ["", f"| {' | '.join(head)} |", "|---|" + "---:|" * len(data.scores)]
        for judge in data.all_judges:
            cells = [judge.label, *(summary_words(row.scores.get(judge.name)) for row in data.scores)]
            lines.append(f"| {' | '.join(cells)} |")
    if metrics := data.benchmark.get("metrics"):
        absent = {name: result["not_measured"] for name, result in metrics.items() if "not_measured" in result}
        lines += ["", f"EvalCrafter: {len(metrics) - len(absent)} of {len(metrics)} metrics measured."]
        lines += [f"- {name}: not measured: {reason}" for name, reason in absent.items()]
    for curve in data.curves:
        if curve.points:
            trivial = "" if curve.trivial is None else f"; the trivial predictor has {curve.trivial:.3f}"
            loss, step = smoothed(curve.points)[-1][1], curve.points[-1][0]
            lines += ["", f"Loss of {curve.stage}: {loss:.3f} at step {step:g}{trivial}."]
    for sheet in data.shards:
        rejects = f"{sheet.duplicates} duplicates, {sum(sheet.rejects.values())} rejects"
        lines += ["", f"{sheet.source}: {sheet.rows} rows, {sheet.samples} samples, {rejects}."]
    return "\n".join(lines) + "\n"


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
