"""A sample set's videos, read by the metrics: one shared pass, resumable, the same on any number of ranks.

What a metric says of a video is a *line*; a video's lines are one small file beside the sample set, written when the
video has been looked at. So a run that was killed goes on with the next video, another list of metrics or another mode
adds to what is there, and a line whose prompt, weights or version differ is made anew. Ranks share the videos and do
not talk to each other; each computes with one CPU thread, so their number changes no bit. Parallelism on a CPU is
therefore `world_size`.

    samples/<fingerprint>/readings/<settings>/<id>.jsonl     lines of a video
    samples/<fingerprint>/readings/<settings>/<id>.IS.*.npy  class probabilities of its frames, pooled over all videos
"""

import hashlib
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from vc2 import pretrained
from vc2.artifacts import Manifest, SampleSet, load_manifest
from vc2.config import Config, digest
from vc2.errors import StoreError
from vc2.eval.config import EvaluateStage
from vc2.eval.formulas import Mode, NoValue, pooled_inception_score
from vc2.eval.look import Look, Networks, Reading, read
from vc2.eval.metrics import METRICS, Given, Metric, Video, modes_of
from vc2.eval.prompts import Prompt, detection_classes, scoring_text
from vc2.eval.ranks import Launch, launch_of
from vc2.progress import Progress, silent
from vc2.storage import Store

__all__ = [
    "UNREADABLE",
    "Line",
    "MeasureJob",
    "Task",
    "applies",
    "line_of",
    "lines_folder",
    "lines_key",
    "measure",
    "pooled",
    "rows_key",
    "take_lines",
    "unreadable",
    "videos_of",
]

UNREADABLE = "unreadable: "  # how the reasons of such lines begin
ATTEMPTS = 3  # at lines that another run may overwrite at the same moment
LAYOUT_VERSION = 1  # of the lines; what a metric says has a version of its own in the table


class Line(Config):
    """What a metric says of a video in a mode."""

    id: str
    metric: str
    mode: Mode
    value: float | None  #: raw, before scaling to the printed unit
    reason: str = ""  #: why there is no value, or what is strange about it
    frames: int = 0  #: how many frames it is made from
    weight: float = 1.0  #: in the mean over videos
    weights: dict[str, str] = {}  #: sha256 of the networks' weights, or versions of packages
    asked: str = ""  #: digest of all that decides the value
    passing: bool = False  #: whether it may be otherwise next time: a deadline, weights that cannot be loaded


class Task(Config):
    """A video and what is to be read of it: `metric/mode`."""

    id: str
    file: str  #: key of the video in the store
    sha256: str
    wanted: tuple[str, ...]


class MeasureJob(Config):
    """What the ranks read."""

    store: str
    prefix: str  #: folder of the lines
    config: EvaluateStage
    tasks: tuple[Task, ...]
    weights: dict[str, dict[str, str]]  #: of each `metric/mode`


def applies(metric: Metric, prompt: Prompt, mode: Mode) -> bool:
    """Whether a metric looks at the videos of a prompt."""
    if metric.name == "Detection_Score":
        return bool(detection_classes(scoring_text(prompt, mode), mode))
    return not metric.prompts or metric.prompts in prompt.attributes


def measure(
    name: str, videos: Sequence[Video], prompts: Sequence[Prompt], mode: Mode, networks: Networks
) -> dict[str, Reading]:
    """One metric in this process: videos and prompts in, what it says of each video out, by id.

    Args:
        name: A key of `METRICS`.
        videos: In the order of `prompts`, with their ids; those of other prompts than the metric looks at are left out.
        prompts: What the videos were made from.
        mode: compat or fixed.
        networks: Loads what the metric needs.
    """
    return {
        prompt.id: read(name, mode, Look(prompt, video.frames, video.fps, networks))
        for video, prompt in zip(videos, prompts, strict=True)
        if applies(METRICS[name], prompt, mode)
    }


# ---- lines ----


def lines_folder(config: EvaluateStage, samples: SampleSet, repeat: int = 0) -> str:
    """Where the lines of a sample set lie: settings that change numbers, and no metric or mode, have folders apart."""
    settings = [LAYOUT_VERSION, config.flow, config.dover_first, config.dover_seed, *([repeat] if repeat else [])]
    return f"{samples.prefix}/readings/{digest(settings)[:16]}"


def lines_key(prefix: str, video: str) -> str:
    return f"{prefix}/{video}.jsonl"


def rows_key(prefix: str, line: Line) -> str:
    """Where the class probabilities behind a line lie."""
    return f"{prefix}/{line.id}.IS.{line.asked}.npy"


def line_of(prompt: Prompt, metric: str, mode: Mode, reading: Reading, weights: Mapping[str, str]) -> Line:
    """A reading as a line."""
    value = reading.value if reading.value is None or math.isfinite(reading.value) else None
    return Line(
        id=prompt.id,
        metric=metric,
        mode=mode,
        value=value,
        reason=reading.reason or ("" if value is not None else "not a number"),
        frames=reading.frames,
        weight=reading.weight,
        weights=dict(weights),
        asked=asked_of(prompt, metric, weights),
        passing=reading.passing,
    )


def asked_of(prompt: Prompt, metric: str, weights: Mapping[str, str]) -> str:
    """Digest of what decides a line besides the video and the folder it is in."""
    known = [prompt.text, {key: prompt.attributes.get(key) for key in (METRICS[metric].prompts, "scoring_text") if key}]
    return digest([METRICS[metric].version, known, dict(weights)])[:16]


def read_lines(store: Store, prefix: str, video: str) -> list[Line]:
    """The lines of a video that are there; what is torn counts as not there."""
    try:
        return [Line.model_validate_json(line) for line in store.read(lines_key(prefix, video)).splitlines()]
    except (KeyError, ValidationError):
        return []


# ---- the whole of a sample set ----


def take_lines(
    config: EvaluateStage,
    store: Store,
    work: Path,
    samples: SampleSet,
    *,
    repeat: int = 0,
    progress: Progress = silent,
    launch: Launch | None = None,
) -> list[Line]:
    """All that the metrics asked for say of a sample set's videos, by id, metric and mode. Safe to repeat.

    Metrics that cannot be measured (`config.missing()`) are left out. A video that cannot be read has, as in the
    published program, the value 0 in DOVER's compat mode.

    Args:
        config: What to measure; its prompts are those of the samples.
        store, work: Where artifacts are; a folder for the job and its logs.
        samples: The videos.
        repeat: Another number measures all once more.
        progress: Told as videos are done.
        launch: Starts the ranks and waits for them; None: the launcher that `config` asks for.

    Raises:
        LaunchFailed: If a rank ends with an error.
        PretrainedMissing, WeightsError: If weights that the config is bound to are not on this machine, or damaged.
        StoreError: If lines that were written do not stay.
    """
    config = config.with_metrics()
    manifest, prefix = load_manifest(store, samples.prefix), lines_folder(config, samples, repeat)
    wanted: list[tuple[str, Mode]] = [
        (name, mode)
        for name in config.metric_names()
        for mode in modes_of(METRICS[name], config.modes)
        if f"{name}/{mode}" not in config.not_measured
    ]
    weights = {f"{name}/{mode}": weights_of(name, mode, config) for name, mode in wanted}
    launch = launch or launch_of(config, store, f"{samples.prefix}/jobs")
    files = videos_of(manifest)
    asked = {
        prompt.id: {
            f"{name}/{mode}": asked_of(prompt, name, weights[f"{name}/{mode}"])
            for name, mode in wanted
            if applies(METRICS[name], prompt, mode)
        }
        for prompt in config.all_prompts()
        if prompt.id in files
    }
    kept: dict[str, dict[str, Line]] = {}
    for attempt in range(1 + ATTEMPTS):
        kept = {video: _kept(store, prefix, video, asked[video], passing=attempt > 0) for video in asked}
        tasks = [
            Task(id=video, file=files[video].key, sha256=files[video].sha256, wanted=todo)
            for video in asked
            if (todo := tuple(which for which in asked[video] if which not in kept[video]))
        ]
        progress("metrics", len(asked) - len(tasks), len(asked))
        if not tasks:
            break
        if attempt == ATTEMPTS:
            raise StoreError(f"{store.uri}/{prefix}: lines of {tasks[0].id} do not stay; does another run delete them?")
        bound = config.evolve(prompts=config.all_prompts())  # a file of them need not be on every machine
        job = MeasureJob(store=store.uri, prefix=prefix, config=bound, tasks=tuple(tasks), weights=weights)
        _run(job, work, progress, launch)
    lines = {video: list(found.values()) for video, found in kept.items()} | _failed(config, manifest, wanted)
    order = {which: number for number, which in enumerate(weights)}
    return [
        line for video in sorted(lines) for line in sorted(lines[video], key=lambda ln: order[f"{ln.metric}/{ln.mode}"])
    ]


def _kept(store: Store, prefix: str, video: str, asked: Mapping[str, str], *, passing: bool) -> dict[str, Line]:
    """The lines of a video that answer what is asked; with `passing` also those that may be otherwise next time."""
    found = {f"{line.metric}/{line.mode}": line for line in read_lines(store, prefix, video)}
    return {
        which: line
        for which, line in found.items()
        if line.asked == asked.get(which)
        and (passing or not line.passing)
        and (line.metric != "IS" or line.value is None or store.entry(rows_key(prefix, line)) is not None)
    }


def _run(job: MeasureJob, work: Path, progress: Progress, launch: Launch) -> None:
    text = job.model_dump_json()
    job_digest = hashlib.sha256(text.encode()).hexdigest()[:12]  # other runs have other jobs
    path = work / "jobs" / f"measure-{job_digest}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    ranks = min(job.config.world_size, len(job.tasks))
    name = f"measure-{digest([job.prefix, job.weights])[:12]}"  # the same when some of it is done
    launch("vc2.eval.measure_rank", str(path), world_size=ranks, work=work, name=name, progress=progress)


def _failed(config: EvaluateStage, manifest: Manifest, wanted: Sequence[tuple[str, Mode]]) -> dict[str, list[Line]]:
    """Lines of videos that could not be read: counted as 0 where the published program does so, else without value."""
    by_id = {prompt.id: prompt for prompt in config.all_prompts()}
    return {
        video: [
            Line(
                id=video,
                metric=name,
                mode=mode,
                value=unreadable(name, mode, why).value,
                reason=unreadable(name, mode, why).reason,
            )
            for name, mode in wanted
            if applies(METRICS[name], by_id[video], mode)
        ]
        for video, why in manifest.facts.get("unreadable", {}).items()
        if video in by_id
    }


def unreadable(name: str, mode: Mode, why: str, passing: bool = False) -> Reading:
    """What a metric says of a video that cannot be read: 0 where the published program counts it so, else nothing."""
    counts_zero = mode == "compat" and name in ("VQA_A", "VQA_T")
    return Reading(0.0 if counts_zero else None, 0, f"{UNREADABLE}{why}", passing=passing)


def videos_of(manifest: Manifest) -> dict[str, Any]:
    """The entries of a sample set's videos by id."""
    return {Path(entry.name).stem: entry for entry in manifest.files if Path(entry.name).suffix != ".jsonl"}


def weights_of(name: str, mode: Mode, config: EvaluateStage) -> dict[str, str]:
    """What a metric's networks are filled with: sha256 by name, versions of packages, digests of what the user gave.

    Raises:
        PretrainedMissing: If weights that the metric is planned to be measured with are not on this machine.
    """
    metric = METRICS[name]
    found = {}
    for weight in metric.weights_in(mode, config.flow):
        given = config.files.get(weight)
        found[weight] = pretrained.identity(weight, path=Path(given) if given else None)
    given_data = Given(config.flow, config.references, config.photos, config.files)
    return found | {need: given_data.data(need)[1] for need in metric.needs}


# ---- from lines to one number ----


def pooled(
    name: str, mode: Mode, lines: Sequence[Line], store: Store, prefix: str
) -> tuple[float | None, int, dict[str, int]]:
    """A metric over all videos, in its printed unit.

    Returns:
        The value (None: no video gave one), how many videos gave one, and how many did not, by reason.
    """
    metric = METRICS[name]
    read_as = "compat" if metric.one_mode else mode
    mine = [line for line in lines if line.metric == name and line.mode == read_as]
    given = [line for line in mine if line.value is not None]
    without = dict(Counter(line.reason for line in mine if line.value is None))
    if not given:
        return None, 0, without
    if name == "IS":
        try:
            frames = sum(line.frames for line in given)
            value = pooled_inception_score(_rows(store, prefix, given), frames)[0]
        except NoValue as reason:
            return None, 0, {str(reason): len(given), **without}
        return value, len(given), without
    total = math.fsum(line.weight for line in given)
    mean = math.fsum(line.weight * line.value for line in given if line.value is not None) / total
    return metric.scale * mean, len(given), without


def _rows(store: Store, prefix: str, lines: Sequence[Line]) -> Iterator[np.ndarray]:
    for line in lines:
        yield np.load(io.BytesIO(store.read(rows_key(prefix, line))), allow_pickle=False)
