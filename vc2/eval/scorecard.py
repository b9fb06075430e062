"""Scores: from raw metrics to EvalCrafter's four aspects, and from judged videos to a scorecard.

EvalCrafter fitted each aspect to people's opinions by least squares (arXiv 2310.11440; weights of 2024, as published):

    aspect = 100 (w . x + b),    total = sum of the four aspects

with x the raw metrics as fractions (IS and Flow_Score divided by 100; errors and distances as 1 - x). Every motion
weight is negative: a still video has the best motion score there is, 64.88 - 8.21 Action - 6.70 Motion_AC (as
fractions). Scores may leave 0..100 and are not clipped. An aspect with a missing metric is withheld, and so is the
total.

A scorecard's files: `videos.jsonl`, one line per video and set with what the judges said of it; `metrics.jsonl`, one
line per video, metric and mode (`vc2.eval.measure.Line`); `summary.json`, means and shares with their n, the
benchmark's metrics and aspects by mode or the reason why there are none.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vc2.artifacts import FileEntry, Manifest, SampleSet, Scorecard, commit, find, load_manifest, put_file
from vc2.errors import ShardCorrupted, Vc2Error
from vc2.eval.config import EvaluateStage, Prompt
from vc2.eval.formulas import Mode
from vc2.eval.measure import UNREADABLE, Line, applies, lines_folder, pooled, take_lines, videos_of
from vc2.eval.metrics import EVALCRAFTER, METRICS, VBENCH_QUALITY, Video
from vc2.eval.prompts import NUM_BENCHMARK_PROMPTS, num_of_benchmark, num_without_scoring_text
from vc2.eval.ranks import Launch
from vc2.eval.vbench import partial_vbench_scores
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
    "plain_averages",
    "sampled_videos",
    "score",
    "scores_prefix",
    "summarise",
    "warnings_of",
]

STAGE_VERSION = 5  # raised, too, when the judges of the small world change

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
        missing = [name for name in EVALCRAFTER if any(name in aspect.missing(raw) for aspect in ASPECTS.values())]
        raise MetricsMissing(
            f"{len(missing)} of {len(EVALCRAFTER)} metrics missing: {', '.join(missing)}; without them no "
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
    work: Path,
    *,
    fingerprint: str,
    samples: SampleSet,
    judge: Judge | None = None,
    others: Mapping[str, Sequence[Video]] | None = None,
    progress: Progress = silent,
    repeat: int = 0,
    launch: Launch | None = None,
) -> Scorecard:
    """Judge the videos of a sample set and measure the benchmark's metrics: SampleSet -> Scorecard.

    Args:
        config: The evaluation; its prompts are those of the samples.
        store, work: Where artifacts are kept; a folder for the metrics' job, its logs and fetched weights.
        fingerprint: Name of the scorecard.
        samples: The videos.
        judge: Says what it sees in a video of a prompt; None: only the benchmark's metrics.
        others: Further sets by name (real clips, another checkpoint), judged beside them; ids are those of the prompts,
            of which a set may lack some.
        progress: Told after each video.
        repeat: As in the fingerprint.
        launch: Starts the ranks that measure and waits for them; None: the launcher that `config` asks for.
    """
    prefix = scores_prefix(fingerprint)
    if done := find(store, prefix, Scorecard):
        return done
    started = time.monotonic()
    config = config.with_metrics()
    prompts = config.all_prompts()
    sets: dict[str, Sequence[Video]] = {}
    if judge:
        sets = {"samples": sampled_videos(store, samples, prompts), **(others or {})}
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

    there = store.list(f"{lines_folder(config, samples, repeat)}/")
    resumed = sum(entry.key.endswith(".jsonl") for entry in there)  # videos of which no second is counted
    measured = take_lines(config, store, work, samples, repeat=repeat, progress=progress, launch=launch)
    benchmark = _benchmark(config, store, samples, measured, prompts, repeat)
    summary = {"judges": judged, "num_prompts": len(prompts), "benchmark": benchmark}
    read = [line.model_dump(mode="json", exclude={"asked", "passing"}) for line in measured]
    files = (
        put_file(store, prefix, "videos.jsonl", "".join(f"{_json(line)}\n" for line in lines).encode()),
        put_file(store, prefix, "metrics.jsonl", "".join(f"{_json(line)}\n" for line in read).encode()),
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
        counts={
            "videos": benchmark.get("videos", {}).get("scored", len(prompts)),
            "sets": len(sets),
            "metrics_measured": _num_measured(benchmark),
        },
        facts={"judges": judged, "resumed_videos": resumed},
        seconds=round(time.monotonic() - started, 3),
    )
    card = commit(store, prefix, manifest)
    assert isinstance(card, Scorecard)
    return card


def _benchmark(
    config: EvaluateStage,
    store: Store,
    samples: SampleSet,
    lines: Sequence[Line],
    prompts: Sequence[Prompt],
    repeat: int,
) -> dict[str, Any]:
    """What a scorecard says of the benchmark: metrics, aspects and averages by mode, and what to beware of."""
    if config.benchmark == "none":
        return {"name": "none"}
    manifest = load_manifest(store, samples.prefix)
    prefix = lines_folder(config, samples, repeat)
    undecoded = {line.id: line.reason.removeprefix(UNREADABLE) for line in lines if line.reason.startswith(UNREADABLE)}
    rejected = manifest.facts.get("unreadable", {}) | manifest.facts.get("missing", {}) | undecoded
    scored = [prompt for prompt in prompts if prompt.id in videos_of(manifest) and prompt.id not in rejected]
    of_benchmark, texts = num_of_benchmark(scored), num_without_scoring_text(scored)
    modes = {mode: _in_mode(config, mode, lines, store, prefix, prompts) for mode in config.modes}
    return {
        "name": config.benchmark,
        "prompts": {
            "total": len(prompts),
            "of_benchmark": of_benchmark,
            "whole_list": of_benchmark == NUM_BENCHMARK_PROMPTS,
            "without_scoring_text": texts,
        },
        "videos": {"expected": len(prompts), "scored": len(scored), "rejected": rejected},
        "settings": {
            "flow": config.flow,
            "dover_first": config.dover_first,
            "dover_seed": config.dover_seed,
            **{name: manifest.facts[name] for name in ("sizes", "rates", "origin") if name in manifest.facts},
        },
        "modes": modes,
        "warnings": list(warnings_of(config, modes, of_benchmark, texts)),
    }


def _in_mode(
    config: EvaluateStage, mode: Mode, lines: Sequence[Line], store: Store, prefix: str, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    missing, metrics = config.missing(), {}
    for name in config.metric_names():
        metric = METRICS[name]
        read_as = "compat" if metric.one_mode else mode
        value, count, without = pooled(name, mode, lines, store, prefix)
        if f"{name}/{read_as}" in missing:
            metrics[name] = {"not_measured": missing[f"{name}/{read_as}"]}
        elif not any(applies(metric, prompt, read_as) for prompt in prompts):
            what = f"has the attribute {metric.prompts!r}" if metric.prompts else "names a class of COCO"
            metrics[name] = {"not_measured": f"no prompt {what}"}
        elif value is None:
            why = "; ".join(without) if len(without) < 3 else f"{next(iter(without))}, and other reasons"
            metrics[name] = {"not_measured": f"no video gave a value: {why}", "without_value": without}
        else:
            of_metric = (line.weights for line in lines if line.metric == name and line.mode == read_as)
            weights = next(filter(None, of_metric), {})  # a line of an unreadable video names none
            note = SUBSTITUTE_FLOW if metric.flow and config.flow != "raft" else metric.note
            metrics[name] = {"value": value, "n": count, "without_value": without, "weights": weights, "note": note}
    raw = {name: found["value"] for name, found in metrics.items() if "value" in found}
    aspects, withheld = partial_aspect_scores(raw)
    if mode == "fixed":
        aspects, withheld = {}, dict.fromkeys((*ASPECTS, "total"), "the coefficients were fitted to compat values")
    more: dict[str, Any] = {}
    if set(VBENCH_QUALITY) <= raw.keys():
        more["vbench"] = partial_vbench_scores(raw)[0]
    return {"metrics": metrics, "aspects": aspects, "withheld": withheld, "averages": plain_averages(raw), **more}


SUBSTITUTE_FLOW = "flow by DIS, which needs no weights, in place of RAFT: other numbers"


def plain_averages(raw: Mapping[str, float]) -> dict[str, float]:
    """Per aspect the plain mean of its metrics in percent, larger is better; given where all of them are.

    Errors and distances count as 100 minus their percentage; IS (no percentage) and Flow_Score (neutral) are left out,
    so that motion is the mean of Action_Score and Motion_AC_Score, which the benchmark's authors suggest in place of
    their formula. By their own figures the fitted formulas agree with people hardly better, except for motion.
    """
    found: dict[str, float] = {}
    for aspect, form in ASPECTS.items():
        terms = [term for term in form.terms if term.metric not in ("IS", "Flow_Score")]
        if all(_is_finite(raw.get(term.metric)) for term in terms):
            percents = [100 * float(raw[term.metric]) / term.unit for term in terms]
            turned = [
                100 - percent if term.from_one else percent for term, percent in zip(terms, percents, strict=True)
            ]
            found[aspect] = math.fsum(turned) / len(turned)
    return found


def warnings_of(
    config: EvaluateStage, modes: Mapping[str, Mapping[str, Any]], of_benchmark: int, without_text: int = 0
) -> Iterator[str]:
    """What a reader of the numbers has to know, for those numbers that are there."""
    if of_benchmark < NUM_BENCHMARK_PROMPTS:
        yield (
            f"videos of {of_benchmark} of the benchmark's {NUM_BENCHMARK_PROMPTS} prompts: not comparable with "
            "published rows, which are means over all of them"
        )
    if without_text and "compat" in modes:
        yield (
            f"{without_text} prompts are scored by another text upstream, which is not at hand (prompts/NNNN.txt "
            "beside the list): these are compared with the prompt itself"
        )
    compat = modes.get("compat", {"metrics": {}, "aspects": {}})
    metrics = {name: found for name, found in compat["metrics"].items() if "value" in found}
    if "motion_quality" in compat["aspects"]:
        still = 100 * ASPECTS["motion_quality"].intercept
        yield (
            f"motion_quality: every weight is negative, so a still video has the best score there is ({still:.2f} less "
            "what it gets for actions and amplitude); Flow_Score here is "
            f"{metrics['Flow_Score']['value']:.2f} px. The plain average leaves flow out"
        )
    if "temporal_consistency" in compat["aspects"]:
        yield (
            "temporal_consistency: a thousandth of CLIP_Temp moves it by 1.46 points, so any other way of decoding or "
            "resizing frames does, too"
        )
    if metrics.get("OCR_Score", {}).get("value") == 0.0:
        yield "OCR_Score is 0: the published program takes a frame without any text for perfect; see the fixed mode"
    if notes := sorted({found["note"] for found in metrics.values() if found.get("note")}):
        for note in notes:
            names = ", ".join(name for name, found in metrics.items() if found["note"] == note)
            yield f"{names}: {note}"
    if "SD_Score" in metrics:
        yield "SD_Score compares with reference images; only scores with the same images (their digest) are comparable"


def _num_measured(benchmark: Mapping[str, Any]) -> int:
    modes = benchmark.get("modes", {}).values()
    return len({name for said in modes for name, found in said["metrics"].items() if "value" in found})


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False)
