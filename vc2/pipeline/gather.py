"""What a report shows, gathered from the artifacts and their manifests."""

import io
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vc2.artifacts import Artifact, Manifest, SampleSet, Scorecard, load_manifest
from vc2.data.media import encode_jpeg
from vc2.data.shards import read_frames
from vc2.data.video_files import encode_mp4
from vc2.eval.config import Prompt
from vc2.eval.metrics import Video
from vc2.eval.report import (
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
from vc2.eval.scorecard import Summary
from vc2.pipeline.recipes import PipelineConfig
from vc2.storage import Store
from vc2.train.precompute import LATENTS

__all__ = ["BEFORE", "REAL", "gather", "judge_by_truth", "real_clips"]

BEFORE = "before stage 2"
REAL = "real clips"

SHEET_ITEMS = 12  # samples of a source on its contact sheet

JUDGES = (  # of the small world, in the order of the page
    Judged("colour", "colour", "the thing has the colour of its caption"),
    Judged("shape", "shape", "and its shape"),
    Judged("direction", "direction", "its tracked path goes where the caption says"),
    Judged("background", "background", "the backdrop has the colour of the caption"),
    Judged("watermark", "watermark", "energy of the stock footage's watermark", "down"),
    Judged("sharpness", "sharpness", "steepness of edges"),
    Judged("flicker", "flicker", "change between frames that motion does not explain", "down"),
    Judged("noise", "noise", "grain", "down"),
)


def judge_by_truth(frames: np.ndarray, prompt: Prompt, fps: float) -> Mapping[str, float]:
    """The small world's judge: it knows what a prompt promises."""
    from vc2.miniature.judges import judge
    from vc2.miniature.scene import Truth

    return judge(frames, Truth.from_json(prompt.attributes["truth"]), fps)


def real_clips(store: Store, shards: Artifact, prompts: Sequence[Prompt]) -> dict[str, Video]:
    """For each prompt, by id, the first clip of a shard set whose caption begins with it."""
    manifest = _of_frames(store, load_manifest(store, shards.prefix))
    index = _index(store, manifest, ("caption", "key", "shard", "offset", "length", "frame_bytes", "ending", "fps"))
    tars = _tars(manifest)
    found: dict[str, Video] = {}
    for prompt in prompts:
        rows = index.filter(pc.starts_with(index["caption"], prompt.text)).slice(0, 1).to_pylist()  # type: ignore[attr-defined]
        for row in rows:
            place = (row["offset"], row["length"], row["frame_bytes"], row["ending"])
            load = partial(read_frames, store, tars[row["shard"]], *place)
            found[prompt.id] = Video(prompt.id, float(row["fps"]), load)
    return found


def gather(
    config: PipelineConfig,
    store: Store,
    inputs: Mapping[str, Artifact],
    made: Mapping[str, SampleSet],
    scorecard: Scorecard,
    real: Mapping[str, Video],
) -> ReportData:
    """Everything the report shows.

    Args:
        config: The whole run's configuration.
        store: Where the artifacts are.
        inputs: Of the evaluation, by role.
        made: Sample sets by role: `checkpoint`, and `base` for the one before stage 2.
        scorecard: Their scores.
        real: Real clips by prompt id.
    """
    wanted = config.evaluation
    lineage = _lineage(store, inputs, made, scorecard)
    summary, judged = _scores(store, scorecard)
    samples = _videos(store, made["checkpoint"])
    before = _videos(store, made["base"]) if "base" in made else {}
    prompts = wanted.all_prompts()
    trained = [node for node in lineage.values() if node.kind == "checkpoint"]
    on_cpu = all(manifest.facts.get("device") == "cpu" for manifest in trained)
    return ReportData(
        trained_minutes=sum(manifest.seconds for manifest in trained) / 60,
        on="your CPU" if on_cpu else "your GPUs",
        hardware=_hardware(),
        rows=[
            SampleRow(
                prompt=prompt.text,
                sample=samples[prompt.id],
                real=_mp4(real[prompt.id].frames, wanted.play_fps) if prompt.id in real else None,
                scores=judged.get("samples", {}).get(prompt.id, {}),
                real_scores=judged.get(REAL, {}).get(prompt.id, {}),
                note="" if prompt.attributes.get("seen", True) else "no training caption has this combination",
            )
            for prompt in prompts
        ],
        fps=float(wanted.play_fps),
        size=(wanted.width, wanted.height),
        before_after=[
            BeforeAfter(
                prompt=prompt.text,
                before=before[prompt.id],
                after=samples[prompt.id],
                before_scores=judged.get(BEFORE, {}).get(prompt.id, {}),
                after_scores=judged.get("samples", {}).get(prompt.id, {}),
            )
            for prompt in prompts
            if before
        ],
        curves=[_curve(store, manifest) for manifest in trained],
        judges=JUDGES if config.world is not None else (),
        scores=[
            ScoreRow(name, {figure: Summary(**said) for figure, said in figures.items()}, is_reference=name == REAL)
            for name, figures in _in_order(summary["judges"])
        ],
        benchmark=summary["benchmark"],
        shards=[_sheet(store, manifest) for manifest in lineage.values() if manifest.kind == "shard_set"],
        lineage=_nodes(lineage),
        config=config.model_dump(mode="json"),
        timings=[Timing(name, manifest.seconds) for name, manifest in lineage.items()],
        environment=trained[-1].environment if trained else {},
        figures=_figures(trained),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=inputs["checkpoint"].fingerprint,
    )


def _figures(trained: Sequence[Manifest]) -> dict[str, str]:
    """Words for the top of the page."""
    if not trained:
        return {}
    counts = [manifest.counts for manifest in trained]
    steps = ", then ".join(f"{manifest.counts['steps']:,} ({manifest.stage})" for manifest in trained)
    grown_from = next((manifest.config["sd_init"] for manifest in trained if manifest.config.get("sd_init")), "")
    return {
        "grown from": grown_from or "random weights",
        "parameters": f"{counts[-1]['total_parameters']:,}",
        "training steps": steps,
        "samples seen": f"{sum(count['samples'] for count in counts):,}",
    }


def _in_order(judges: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Real clips first, then the model before and after its second stage."""
    names = [name for name in (REAL, BEFORE, "samples") if name in judges]
    return [("after stage 2" if name == "samples" and BEFORE in judges else name, judges[name]) for name in names]


def _scores(store: Store, scorecard: Scorecard) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, float]]]]:
    """The summary, and the figures of every video by set and prompt id."""
    manifest = load_manifest(store, scorecard.prefix)
    judged: dict[str, dict[str, dict[str, float]]] = {}
    for text in store.read(manifest.file("videos.jsonl").key).decode().splitlines():
        line = json.loads(text)
        judged.setdefault(line["set"], {})[line["id"]] = line["judges"]
    return json.loads(store.read(manifest.file("summary.json").key)), judged


def _videos(store: Store, samples: SampleSet) -> dict[str, bytes]:
    files = load_manifest(store, samples.prefix).files
    return {entry.name.removesuffix(".mp4"): store.read(entry.key) for entry in files if entry.name.endswith(".mp4")}


def _mp4(frames: np.ndarray, fps: float) -> bytes:
    return encode_mp4(frames, fps, crf=12)


# ---- lineage ----


def _lineage(
    store: Store, inputs: Mapping[str, Artifact], made: Mapping[str, SampleSet], scorecard: Scorecard
) -> dict[str, Manifest]:
    """Manifests of all that the report rests on, by name, sources first."""
    found: dict[str, Manifest] = {}

    def visit(artifact: Artifact, suffix: str = "") -> None:
        manifest = load_manifest(store, artifact.prefix)
        name = _name(manifest) + suffix
        if name in found:
            return
        for source in manifest.inputs.values():
            visit(source)
        found[name] = manifest

    for artifact in inputs.values():
        visit(artifact)
    for role, samples in made.items():
        visit(samples, "" if role == "checkpoint" else f" ({role})")
    visit(scorecard)
    return found


def _name(manifest: Manifest) -> str:
    if manifest.kind == "shard_set":
        return f"shard/{manifest.facts['source']}"
    return f"train/{manifest.stage}" if manifest.kind == "checkpoint" else manifest.stage


def _nodes(lineage: Mapping[str, Manifest]) -> list[LineageNode]:
    names = {manifest.content_digest: name for name, manifest in lineage.items()}
    return [
        LineageNode(
            name=name,
            kind=manifest.kind,
            fingerprint=manifest.fingerprint,
            content_digest=manifest.content_digest,
            inputs=[
                names[source.content_digest] for source in manifest.inputs.values() if source.content_digest in names
            ],
            note=f"step {manifest.counts['steps']}" if manifest.kind == "checkpoint" else "",
        )
        for name, manifest in lineage.items()
    ]


def _curve(store: Store, manifest: Manifest) -> LossCurve:
    from vc2.train.metrics import read_metrics

    lines = read_metrics(store, manifest.stage, manifest.fingerprint)
    points = [(line["step"], line["loss"]) for line in lines if line["loss"] is not None]
    return LossCurve(
        stage=f"train/{manifest.stage}",
        points=points,
        trivial=manifest.facts.get("trivial_loss"),
        note="mean squared error of the predicted noise; predicting zero costs 1",
    )


def _hardware() -> str:
    name = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        models = [line for line in cpu_info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {os.cpu_count()} cores"


# ---- shards ----


def _index(store: Store, manifest: Manifest, columns: Sequence[str]) -> Any:
    data = store.read(manifest.file("index.parquet").key)
    return pq.read_table(io.BytesIO(data), columns=list(columns), use_threads=False)


def _tars(manifest: Manifest) -> dict[int, str]:
    """Store keys of the tars by shard number."""
    tars = (entry for entry in manifest.files if entry.name.endswith(".tar"))
    return {int(entry.name.removeprefix("shard-").removesuffix(".tar")): entry.key for entry in tars}


def _of_frames(store: Store, manifest: Manifest) -> Manifest:
    """The set itself, or the one that a set of latents was made from."""
    return load_manifest(store, manifest.inputs["shards"].prefix) if LATENTS in manifest.facts else manifest


def _sheet(store: Store, manifest: Manifest) -> ShardSheet:
    manifest = _of_frames(store, manifest)
    counts = manifest.counts
    tars = _tars(manifest)
    index = _index(store, manifest, ("caption", "shard", "offset", "length", "frame_bytes", "ending", "fps"))
    step = max(1, len(index) // SHEET_ITEMS)
    rows = index.take(list(range(0, len(index), step))[:SHEET_ITEMS]).to_pylist()
    return ShardSheet(
        source=manifest.facts["source"],
        rows=counts["rows"],
        samples=counts["samples"],
        rejects=manifest.facts["reasons"],
        duplicates=counts["rows_duplicate"],
        shards=counts["shards"],
        size=sum(entry.size for entry in manifest.files if entry.name.endswith(".tar")),
        items=[
            SheetItem(
                caption=row["caption"],
                frames=_pictures(store, tars[row["shard"]], row),
                fps=float(row["fps"]) or None,
            )
            for row in rows
        ],
    )


def _pictures(store: Store, tar: str, row: Mapping[str, Any]) -> list[bytes]:
    """A sample's frames as JPEG files."""
    if row["ending"] == "mp4":
        frames = read_frames(store, tar, row["offset"], row["length"], row["frame_bytes"], row["ending"])
        return [encode_jpeg(frame, 90) for frame in frames]
    data = io.BytesIO(store.read_range(tar, row["offset"], row["length"]))
    return [data.read(size) for size in row["frame_bytes"]]
