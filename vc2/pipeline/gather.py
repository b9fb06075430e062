"""What a report shows, gathered from the artifacts and their manifests."""

import io
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vc2.artifacts import Artifact, FileEntry, Manifest, SampleSet, Scorecard, environment, load_manifest
from vc2.data.media import encode_jpeg
from vc2.data.shards import read_frames
from vc2.data.video_files import encode_mp4
from vc2.eval.measure import videos_of
from vc2.eval.metrics import Video
from vc2.eval.previews import PREVIEW_BUDGET, Preview, Source, previews
from vc2.eval.prompts import Prompt, detection_classes, scoring_text
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
from vc2.pipeline.driver import IMPORTED
from vc2.pipeline.recipes import PipelineConfig
from vc2.progress import Progress, silent
from vc2.storage import Store
from vc2.train.precompute import LATENTS

__all__ = [
    "BEFORE",
    "REAL",
    "gather",
    "gather_videos",
    "judge_by_truth",
    "judged_figures",
    "loss_curve",
    "real_clips",
    "shown_videos",
]

BEFORE = "before stage 2"
REAL = "real clips"

SHEET_ITEMS = 12  # samples of a source on its contact sheet
MOST_PAIRS = 24  # prompts that are shown from before and after stage 2
USUAL_FPS, USUAL_SIZE = 10.0, (512, 320)  # where nothing is known of the videos

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
    *,
    progress: Progress = silent,
) -> ReportData:
    """Everything the report of a run shows.

    Args:
        config: The whole run's configuration.
        store: Where the artifacts are.
        inputs: Of the evaluation, by role.
        made: Sample sets by role: `checkpoint`, and `base` for the one before stage 2.
        scorecard: Their scores.
        real: Real clips by prompt id.
        progress: Told after each video that is made ready for the page.
    """
    wanted = config.evaluation
    lineage = _lineage(store, inputs, made, scorecard)
    card = _Card.read(store, scorecard)
    prompts = wanted.all_prompts()
    files = videos_of(load_manifest(store, made["checkpoint"].prefix))
    samples = shown_videos(store, made["checkpoint"], progress=progress)
    pairs = [prompt.id for prompt in prompts[:MOST_PAIRS]]
    before = shown_videos(store, made["base"], pairs, PREVIEW_BUDGET // 4) if "base" in made else {}
    trained = [node for node in lineage.values() if node.kind == "checkpoint" and node.stage != IMPORTED]
    on_cpu = all(manifest.facts.get("device") == "cpu" for manifest in trained)
    return ReportData(
        trained_minutes=sum(manifest.seconds for manifest in trained) / 60 if trained else None,
        about=_about(lineage),
        notes=_notes(made["checkpoint"], samples, len(prompts) if before else 0),
        on="your CPU" if on_cpu else "your GPUs",
        hardware=_hardware(),
        rows=[
            replace(
                _row(prompt, samples.get(prompt.id), files.get(prompt.id), card),
                real=_mp4(real[prompt.id].frames, wanted.play_fps) if prompt.id in real else None,
                scores=card.judged.get("samples", {}).get(prompt.id, {}),
                real_scores=card.judged.get(REAL, {}).get(prompt.id, {}),
                note="" if prompt.attributes.get("seen", True) else "no training caption has this combination",
            )
            for prompt in prompts
        ],
        fps=float(wanted.play_fps),
        size=(wanted.width, wanted.height),
        before_after=[
            BeforeAfter(
                prompt=prompt.text,
                before=earlier,
                after=later,
                before_scores=card.judged.get(BEFORE, {}).get(prompt.id, {}),
                after_scores=card.judged.get("samples", {}).get(prompt.id, {}),
            )
            for prompt in prompts[:MOST_PAIRS]
            if prompt.id in before and (earlier := before[prompt.id].data) and (later := samples[prompt.id].data)
        ],
        curves=[loss_curve(store, manifest) for manifest in trained],
        judges=JUDGES if config.world is not None else (),
        scores=[
            ScoreRow(name, {figure: Summary(**said) for figure, said in figures.items()}, is_reference=name == REAL)
            for name, figures in _in_order(card.summary["judges"])
        ],
        benchmark=card.summary["benchmark"],
        shards=[_sheet(store, manifest) for manifest in lineage.values() if manifest.kind == "shard_set"],
        lineage=_nodes(lineage),
        config=config.model_dump(mode="json"),
        timings=[Timing(name, manifest.seconds) for name, manifest in lineage.items()],
        environment=trained[-1].environment if trained else environment(),
        figures=_figures(trained),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=inputs["checkpoint"].fingerprint,
    )


def gather_videos(
    store: Store,
    samples: SampleSet,
    scorecard: Scorecard,
    *,
    prompts: Sequence[Prompt] = (),
    title: str = "vc2: videos and their scores",
    about: str = "",
    compare: Sequence[str] = (),
    progress: Progress = silent,
) -> ReportData:
    """Everything the report of a set of videos shows that need not have been made here: no training, no shards.

    Args:
        store: Where the artifacts are.
        samples: The videos, with `prompts.jsonl` beside them.
        scorecard: Their scores.
        prompts: What was asked for; none: those beside the videos, and ids that the scores name.
        title: Of the page.
        about: Whose videos these are, as in "700 videos of ..."; empty: what the set says of its source.
        compare: Published rows to lay beside them, as in `leaderboard.rows_named`; none: all.
        progress: Told after each video that is made ready for the page.
    """
    manifest = load_manifest(store, samples.prefix)
    card = _Card.read(store, scorecard)
    lineage = _lineage(store, {}, {"checkpoint": samples}, scorecard)
    prompts = prompts or _prompts(store, manifest, card)
    files = videos_of(manifest)
    shown = shown_videos(store, samples, [name for name in files if name not in card.rejected], progress=progress)
    sizes = [(found.width, found.height) for found in shown.values() if found.width]
    width, height = manifest.config.get("width"), manifest.config.get("height")
    return ReportData(
        title=title,
        about=about or _about(lineage),
        notes=_notes(samples, shown, 0),
        hardware=_hardware(),
        rows=[_row(prompt, shown.get(prompt.id), files.get(prompt.id), card) for prompt in prompts],
        fps=float(manifest.config.get("play_fps") or USUAL_FPS),
        size=(width, height) if width and height else sizes[0] if sizes else USUAL_SIZE,
        benchmark=card.summary["benchmark"],
        compare=compare,
        lineage=_nodes(lineage),
        config={name: found.config for name, found in lineage.items()},
        timings=[Timing(name, found.seconds) for name, found in lineage.items()],
        environment=load_manifest(store, scorecard.prefix).environment,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=scorecard.fingerprint,
    )


# ---- videos and their values ----


@dataclass(frozen=True)
class _Card:
    """What a scorecard says of all videos, and of each by its id."""

    summary: Mapping[str, Any]
    judged: Mapping[str, Mapping[str, Mapping[str, float]]]  # by set
    texts: Mapping[str, str]  # prompts, as far as it holds them
    values: Mapping[str, Mapping[str, Mapping[str, float]]]  # by mode and metric
    reasons: Mapping[str, Mapping[str, Mapping[str, str]]]  # why there is no value, or what is strange about it

    @property
    def rejected(self) -> Mapping[str, str]:
        """Why videos were not scored, by id."""
        return self.summary["benchmark"].get("videos", {}).get("rejected", {})

    @classmethod
    def read(cls, store: Store, scorecard: Scorecard) -> "_Card":
        manifest = load_manifest(store, scorecard.prefix)
        judged: dict[str, dict[str, dict[str, float]]] = {}
        texts: dict[str, str] = {}
        values: dict[str, dict[str, dict[str, float]]] = {}
        reasons: dict[str, dict[str, dict[str, str]]] = {}
        for prompt in manifest.config.get("prompts") or ():
            texts[prompt["id"]] = prompt["text"]
        for line in _lines(store, manifest, "videos.jsonl"):
            judged.setdefault(line["set"], {})[line["id"]] = line["judges"]
            texts.setdefault(line["id"], line["prompt"])
        for line in _lines(store, manifest, "metrics.jsonl"):  # of older scorecards there is none
            name, mode, metric, value = (line[key] for key in ("id", "mode", "metric", "value"))
            why = line.get("reason") or ("no reason given" if value is None else "")
            if value is not None:
                values.setdefault(name, {}).setdefault(mode, {})[metric] = value
            if why:
                reasons.setdefault(name, {}).setdefault(mode, {})[metric] = why
        return cls(json.loads(store.read(manifest.file("summary.json").key)), judged, texts, values, reasons)


def judged_figures(store: Store, scorecard: Scorecard) -> Mapping[str, Mapping[str, float]]:
    """What the judges say of the samples of a scorecard, by prompt id."""
    return _Card.read(store, scorecard).judged.get("samples", {})


def _lines(store: Store, manifest: Manifest, name: str) -> list[dict[str, Any]]:
    """The lines of a file of an artifact; none where it has no such file."""
    entry = next((entry for entry in manifest.files if entry.name == name), None)
    return [] if entry is None else [json.loads(text) for text in store.read(entry.key).decode().splitlines()]


def _row(prompt: Prompt, shown: Preview | None, file: FileEntry | None, card: _Card) -> SampleRow:
    missing = shown.missing if shown else "no video of this prompt"
    return SampleRow(
        prompt=prompt.text,
        sample=shown.data if shown else None,
        id=prompt.id,
        tags=_tags(prompt),
        values=card.values.get(prompt.id, {}),
        reasons=card.reasons.get(prompt.id, {}),
        missing=f"not scored: {card.rejected[prompt.id]}" if prompt.id in card.rejected else missing,
        sha256=file.sha256 if file else "",
        size=(shown.width, shown.height) if shown and shown.width else None,
    )


def _tags(prompt: Prompt) -> dict[str, str]:
    """What a prompt of the benchmark asks for, in words."""
    known = prompt.attributes
    if "truth" in known:  # of the small world
        return {}
    tags = {}
    for name in ("count", "color", "text", "action", "amplitude", "celebrity"):
        if said := known.get(name):
            tags[name] = " ".join(map(str, said.values())) if isinstance(said, Mapping) else str(said)
    if classes := detection_classes(scoring_text(prompt, "compat"), "compat"):
        tags["detection"] = ", ".join(classes)
    return tags


def _prompts(store: Store, manifest: Manifest, card: _Card) -> list[Prompt]:
    """The prompts of a set of videos, then those known from its scores or its files alone."""
    found = {
        line["id"]: Prompt(id=line["id"], text=line["prompt"], attributes=line.get("attributes") or {})
        for line in _lines(store, manifest, "prompts.jsonl")
    }
    others = dict.fromkeys((*card.texts, *card.values, *card.reasons, *card.rejected, *videos_of(manifest)))
    for name in others:
        found.setdefault(name, Prompt(id=name, text=card.texts.get(name, name)))
    return sorted(found.values(), key=lambda prompt: prompt.id)


def shown_videos(
    store: Store,
    samples: SampleSet,
    names: Sequence[str] | None = None,
    budget: int | None = None,
    progress: Progress = silent,
) -> dict[str, Preview]:
    """What a page shows of the videos of a set, by id.

    Args:
        store: Where it is.
        samples: The set.
        names: Ids of those wanted; None: all.
        budget: Bytes that they may take in the page.
        progress: Told after each video.
    """
    manifest = load_manifest(store, samples.prefix)
    files = videos_of(manifest)
    wanted = [name for name in (files if names is None else names) if name in files]
    sources = [Source(name, files[name].size, partial(store.read, files[name].key)) for name in wanted]
    return previews(sources, budget=budget or PREVIEW_BUDGET, measure="width" not in manifest.config, progress=progress)


def _notes(samples: SampleSet, shown: Mapping[str, Preview], num_pairs: int) -> list[str]:
    """How the videos of the page differ from those of the set."""
    notes = []
    if copies := sum(found.is_copy for found in shown.values()):
        notes.append(
            f"{copies} of {len(shown)} videos are shown as small or converted copies, with all their frames, so that "
            f"the page stays light and plays everywhere; the videos as they were scored are in {samples.uri}."
        )
    if num_pairs > MOST_PAIRS:
        notes.append(f"Before and after stage 2: the first {MOST_PAIRS} of {num_pairs} prompts.")
    return notes


def _about(lineage: Mapping[str, Manifest]) -> str:
    """Whose videos these are, where no model was trained for them."""
    sets = [manifest for manifest in lineage.values() if manifest.kind == "sample_set"]
    models = [manifest for manifest in lineage.values() if manifest.kind == "checkpoint"]
    found = [manifest.facts.get("source") or manifest.facts.get("origin") for manifest in (*models, *sets)]
    return next((str(name) for name in found if name), "")


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


def loss_curve(store: Store, manifest: Manifest) -> LossCurve:
    """The logged losses of the run that made a checkpoint; none where the store has them no longer."""
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
