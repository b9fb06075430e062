"""Scores: from raw metrics to EvalCrafter's four aspects, and from judged videos to a scorecard.

EvalCrafter fitted each aspect to people's opinions by least squares (arXiv 2310.11440; weights of 2024, as published):

    aspect = 100 (w . x + b),    total = sum of the four aspects

with x the raw metrics as fractions (IS and Flow_Score divided by 100; errors and distances as 1 - x). Every motion
weight is negative: a still video has the best motion score there is, 64.88 - 8.21 Action - 6.70 Motion_AC (as
fractions). Scores may leave 0..100 and are not clipped. An aspect with a missing metric is withheld, and so is the
total.

A scorecard's files: `videos.jsonl`, one line per video and set with what the judges said of it, and `summary.json`,
means and shares with their n, the benchmark's metrics and aspects or the reason why there are none.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from vc2.artifacts import FileEntry, Manifest, SampleSet, Scorecard, commit, find, load_manifest, put_file
from vc2.errors import ShardCorrupted, Vc2Error
from vc2.eval.config import EvaluateStage, Prompt
from vc2.eval.metrics import METRICS, Measured, NotMeasured, Video, measure_all
from vc2.progress import Progress, silent
from vc2.storage import Store

__all__ = [
    "ASPECTS",
    "STAGE_VERSION",
    "Judge",
    "MetricsMissing",
    "Summary",
    "aspect_scores",
    "judge_videos",
    "partial_aspect_scores",
    "sampled_videos",
    "score",
    "scores_prefix",
    "summarise",
]

STAGE_VERSION = 1

#: What a judge is: frames (T, H, W, 3) uint8, the prompt and the frame rate in, figures by name out; NaN: does not
#: apply.
Judge = Callable[[np.ndarray, Prompt, float], Mapping[str, float]]


class MetricsMissing(Vc2Error, ValueError):
    """An aspect was asked for without all the metrics it is made of."""


@dataclass(frozen=True, slots=True)
class Term:
    """weight * x, where x is the printed metric over `unit`, or one minus that."""

    metric: str
    weight: float
    unit: float = 100.0
    from_one: bool = False

    def __call__(self, raw: Mapping[str, float]) -> float:
        x = float(raw[self.metric]) / self.unit
        return self.weight * (1 - x if self.from_one else x)


@dataclass(frozen=True, slots=True)
class Aspect:
    """A fitted linear form."""

    intercept: float
    terms: tuple[Term, ...]

    def missing(self, raw: Mapping[str, Any]) -> list[str]:
        """Metrics without a finite value."""
        return [term.metric for term in self.terms if not _is_finite(raw.get(term.metric))]

    def __call__(self, raw: Mapping[str, float]) -> float:
        return 100 * (self.intercept + math.fsum(term(raw) for term in self.terms))


#: The regression published in 2024. Its weights came multiplied by 5 here, from opinions of 1..5 to 0..100, as the
#: authors' program does; the intercept of text-video alignment is used as printed, the other three times 5.
ASPECTS: Mapping[str, Aspect] = {
    "visual_quality": Aspect(
        0.43537313482288537,
        (Term("VQA_A", 0.15022775), Term("VQA_T", 0.14437685), Term("IS", -0.0691279)),
    ),
    "text_video_alignment": Aspect(
        -0.30683181901390977,
        (
            Term("CLIP_Score", -0.3507885),
            Term("BLIP_BLEU", 0.1280712),
            Term("SD_Score", 0.27830545),
            Term("Detection_Score", 0.08698700000000001),
            Term("Color_Score", -0.10477),
            Term("Count_Score", 0.15345835),
            Term("OCR_Score", 0.01861755, from_one=True),
            Term("Celebrity_ID_Score", 1.1343101, from_one=True),
        ),
    ),
    "motion_quality": Aspect(
        0.6487810104496774,
        (
            Term("Action_Score", -0.0820756),
            Term("Motion_AC_Score", -0.06704795000000001),
            Term("Flow_Score", -0.52585375),
        ),
    ),
    "temporal_consistency": Aspect(
        -17.1137025449887,
        (
            Term("CLIP_Temp", 14.6246122),
            Term("Warping_Error", 2.2737839, unit=1.0, from_one=True),
            Term("Face_Consistency", 0.8780752000000001),
        ),
    ),
}


def aspect_scores(raw: Mapping[str, float]) -> dict[str, float]:
    """EvalCrafter's four aspects and their sum from the 17 raw metrics.

    Args:
        raw: The metrics by name in the units of the 2024 leaderboard: percent, except IS and Warping_Error (plain) and
            Flow_Score (mean pixels per frame pair). Other keys are ignored.

    Returns:
        visual_quality, text_video_alignment, motion_quality, temporal_consistency, total.

    Raises:
        MetricsMissing: If any of the 17 is missing or no finite number; the message names them all.
    """
    scores, withheld = partial_aspect_scores(raw)
    if withheld:
        missing = [name for name in METRICS if any(name in aspect.missing(raw) for aspect in ASPECTS.values())]
        raise MetricsMissing(
            f"{len(missing)} of {len(METRICS)} metrics missing: {', '.join(missing)}; without them no "
            f"{', '.join(withheld)} can be given (measure them, or use partial_aspect_scores)"
        )
    return scores


def partial_aspect_scores(raw: Mapping[str, float]) -> tuple[dict[str, float], dict[str, str]]:
    """The aspects whose metrics are all there, and for each other (and the total) the reason why it is withheld."""
    scores, withheld = {}, {}
    for name, aspect in ASPECTS.items():
        if missing := aspect.missing(raw):
            withheld[name] = f"needs {', '.join(missing)}"
        else:
            scores[name] = aspect(raw)
    if withheld:
        withheld["total"] = f"needs {', '.join(withheld)}"
    else:
        scores["total"] = math.fsum(scores.values())
    return scores, withheld


def _is_finite(value: Any) -> bool:
    try:
        return value is not None and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


# ---- judged videos ----


@dataclass(frozen=True, slots=True)
class Summary:
    """What a judge said of a set of videos: the mean over those it applies to. A *share* is one of zeros and ones."""

    mean: float
    n: int
    is_share: bool


def judge_videos(videos: Iterable[Video], prompts: Iterable[Prompt], judge: Judge) -> Iterator[dict[str, float]]:
    """What the judge says of each video; figures that do not apply (NaN) are left out."""
    for video, prompt in zip(videos, prompts, strict=True):
        figures = judge(video.frames, prompt, video.fps)
        yield {name: float(value) for name, value in figures.items() if math.isfinite(value)}


def summarise(rows: Sequence[Mapping[str, float]]) -> dict[str, Summary]:
    """Mean of every figure over the videos that have it, in order of first appearance."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {
        name: Summary(math.fsum(found) / len(found), len(found), set(found) <= {0.0, 1.0})
        for name, found in values.items()
    }


def sampled_videos(store: Store, samples: SampleSet, prompts: Sequence[Prompt]) -> list[Video]:
    """The videos of a sample set in the order of `prompts`."""
    manifest = load_manifest(store, samples.prefix)
    fps = float(manifest.config["play_fps"])
    return [Video(prompt.id, fps, partial(_decoded, store, manifest.file(f"{prompt.id}.mp4"))) for prompt in prompts]


def _decoded(store: Store, entry: FileEntry) -> np.ndarray:
    from vc2.data.video_files import read_video

    data = store.read(entry.key)
    if (found := hashlib.sha256(data).hexdigest()) != entry.sha256:
        raise ShardCorrupted(
            f"{entry.key}: sha256 {found[:12]}, manifest says {entry.sha256[:12]}; delete it and sample again"
        )
    return read_video(data)[0]


def scores_prefix(fingerprint: str) -> str:
    return f"scores/{fingerprint}"


def score(
    config: EvaluateStage,
    store: Store,
    *,
    fingerprint: str,
    samples: SampleSet,
    judge: Judge | None = None,
    others: Mapping[str, Sequence[Video]] | None = None,
    progress: Progress = silent,
    repeat: int = 0,
) -> Scorecard:
    """Judge the videos of a sample set and measure the benchmark's metrics: SampleSet -> Scorecard.

    Args:
        config: The evaluation; its prompts are those of the samples.
        store: Where artifacts are kept.
        fingerprint: Name of the scorecard.
        samples: The videos.
        judge: Says what it sees in a video of a prompt; None: only the benchmark's metrics.
        others: Further sets by name (real clips, another checkpoint), judged beside them; ids are those of the prompts,
            of which a set may lack some.
        progress: Told after each video.
        repeat: As in the fingerprint.
    """
    prefix = scores_prefix(fingerprint)
    if done := find(store, prefix, Scorecard):
        return done
    started = time.monotonic()
    prompts = config.all_prompts()
    videos = sampled_videos(store, samples, prompts)
    sets: dict[str, Sequence[Video]] = {"samples": videos, **(others or {})} if judge else {}
    lines: list[dict[str, Any]] = []
    judged: dict[str, Any] = {}
    by_id = {prompt.id: prompt for prompt in prompts}
    for name, members in sets.items():
        assert judge is not None
        shown = [by_id[video.id] for video in members]
        rows = []
        for prompt, row in zip(shown, judge_videos(members, shown, judge), strict=True):
            rows.append(row)
            lines.append({"set": name, "id": prompt.id, "prompt": prompt.text, "judges": row})
            progress("scores", len(lines), sum(map(len, sets.values())))
        judged[name] = {figure: asdict(summary) for figure, summary in summarise(rows).items()}

    benchmark = _benchmark(config, videos, prompts)
    summary = {"judges": judged, "num_prompts": len(prompts), "benchmark": benchmark}
    files = (
        put_file(store, prefix, "videos.jsonl", "".join(f"{_json(line)}\n" for line in lines).encode()),
        put_file(store, prefix, "summary.json", _json(summary, indent=1).encode()),
    )
    manifest = Manifest(
        kind="scorecard",
        stage="score",
        stage_version=STAGE_VERSION,
        fingerprint=fingerprint,
        repeat=repeat,
        config=config.model_dump(mode="json"),
        inputs={"samples": samples},
        files=files,
        counts={"videos": len(prompts), "sets": len(sets), "metrics_measured": benchmark.get("measured", 0)},
        facts={"judges": judged},
        seconds=round(time.monotonic() - started, 3),
    )
    card = commit(store, prefix, manifest)
    assert isinstance(card, Scorecard)
    return card


def _benchmark(config: EvaluateStage, videos: Sequence[Video], prompts: Sequence[Prompt]) -> dict[str, Any]:
    if config.benchmark == "none":
        return {"name": "none"}
    results = measure_all(config.metrics, videos, prompts, mode=config.mode)
    raw = {name: result.value for name, result in results.items() if isinstance(result, Measured)}
    aspects, withheld = partial_aspect_scores(raw)
    return {
        "name": config.benchmark,
        "mode": config.mode,
        "measured": len(raw),
        "metrics": {
            name: {"not_measured": result.reason} if isinstance(result, NotMeasured) else asdict(result)
            for name, result in results.items()
        },
        "aspects": aspects,
        "withheld": withheld,
    }


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False)
