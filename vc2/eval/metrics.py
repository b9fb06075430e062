"""The 17 metrics of EvalCrafter (arXiv 2310.11440) under the names and units of its leaderboard.

Every metric has one shape: videos and prompts in, one number per video out (`Measure`); a table row says what it is
about, which way is better, which prompts it looks at and which foreign weights it needs. Without those it is *not
measured*, and so is every score made from it: nothing is imputed. No metric has a measure in this version, which is
said as plainly.

Units are those of the printed leaderboard: percent, except IS and Warping_Error (plain) and Flow_Score (pixels).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vc2.errors import ConfigError
from vc2.eval.config import Prompt
from vc2.pretrained import is_available

__all__ = ["METRICS", "Aspect", "Measure", "Measured", "Metric", "NotMeasured", "Video", "measure", "measure_all"]

Aspect = Literal["visual_quality", "text_video_alignment", "motion_quality", "temporal_consistency"]
Mode = Literal["compat", "fixed"]


@dataclass(frozen=True, slots=True)
class Video:
    """A video to be scored, decoded when looked at and not kept: a thousand of them weigh nothing."""

    id: str
    fps: float  #: rate at which it is shown
    load: Callable[[], np.ndarray]

    @property
    def frames(self) -> np.ndarray:
        """(T, H, W, 3) uint8 RGB."""
        return self.load()


Measure = Callable[[Sequence[Video], Sequence[Prompt], Mode], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric's value in the leaderboard's unit, and the number of every video by id (raw, before averaging)."""

    value: float
    per_video: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """Why a metric has no value."""

    reason: str


@dataclass(frozen=True, slots=True)
class Metric:
    """What is known of a metric before anything is measured."""

    name: str
    aspect: Aspect
    direction: Literal["up", "down", "neutral"]
    unit: str
    weights: tuple[str, ...]  #: names in `vc2.pretrained.WEIGHTS`; a name that is not there cannot be found
    prompts: str = ""  #: attribute of the prompts it looks at; empty: all
    scale: float = 100.0  #: from the mean of the per-video numbers to the printed unit
    measure: Measure | None = field(default=None, compare=False)

    def missing_weights(self) -> list[str]:
        return [name for name in self.weights if not _is_at_hand(name)]


def _is_at_hand(name: str) -> bool:
    try:
        return is_available(name)
    except KeyError:  # no such entry in the table of foreign weights
        return False


def _percent(name: str, aspect: Aspect, direction: Literal["up", "down"], *weights: str, prompts: str = "") -> Metric:
    return Metric(name, aspect, direction, "%", weights, prompts)


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        _percent("VQA_A", "visual_quality", "up", "dover"),
        _percent("VQA_T", "visual_quality", "up", "dover"),
        Metric("IS", "visual_quality", "up", "", ("inception-2015-12-05",), scale=1.0),
        _percent("CLIP_Temp", "temporal_consistency", "up", "clip-vit-b-32"),
        Metric("Warping_Error", "temporal_consistency", "down", "", ("raft-things",), scale=1.0),
        _percent("Face_Consistency", "temporal_consistency", "up", "clip-vit-b-32"),
        _percent("Action_Score", "motion_quality", "up", "videomae-v2-k400", "clip-vit-b-32", prompts="action"),
        _percent("Motion_AC_Score", "motion_quality", "up", "raft-things", prompts="amplitude"),
        Metric("Flow_Score", "motion_quality", "neutral", "px", ("raft-things",), scale=1.0),
        _percent("CLIP_Score", "text_video_alignment", "up", "clip-vit-b-32"),
        _percent("BLIP_BLEU", "text_video_alignment", "up", "blip2-opt-2.7b"),
        _percent("SD_Score", "text_video_alignment", "up", "sdxl-base", "clip-vit-b-32"),
        _percent("Detection_Score", "text_video_alignment", "up", "grounding-dino-tiny"),
        _percent("Color_Score", "text_video_alignment", "up", "grounding-dino-tiny", "sam2", prompts="color"),
        _percent("Count_Score", "text_video_alignment", "up", "grounding-dino-tiny", "sam2", prompts="count"),
        _percent("OCR_Score", "text_video_alignment", "down", "paddleocr-2.7-en", prompts="text"),
        _percent("Celebrity_ID_Score", "text_video_alignment", "down", "vgg-face", prompts="celebrity"),
    )
}


def measure(
    name: str, videos: Sequence[Video], prompts: Sequence[Prompt], *, mode: Mode = "compat"
) -> Measured | NotMeasured:
    """One metric over the videos of the prompts it looks at.

    Args:
        name: A key of `METRICS`.
        videos: In the order of `prompts`, with their ids.
        prompts: What the videos were made from.
        mode: compat: the published formula with its flaws; fixed: mended.

    Raises:
        ConfigError: If there is no such metric, or videos and prompts do not belong together.
    """
    if name not in METRICS:
        raise ConfigError(f"no metric {name!r}; there are {', '.join(METRICS)}")
    if [video.id for video in videos] != [prompt.id for prompt in prompts]:
        raise ConfigError(f"{len(videos)} videos and {len(prompts)} prompts do not pair by id")
    metric = METRICS[name]
    if missing := metric.missing_weights():
        return NotMeasured(f"weights not found: {', '.join(missing)}")
    if metric.measure is None:
        return NotMeasured("weights are at hand, but vc2 does not implement this metric yet")
    chosen = [i for i, prompt in enumerate(prompts) if not metric.prompts or metric.prompts in prompt.attributes]
    if not chosen:
        return NotMeasured(f"no prompt has the attribute {metric.prompts!r}")
    per_video = metric.measure([videos[i] for i in chosen], [prompts[i] for i in chosen], mode)
    return Measured(metric.scale * float(np.mean(list(per_video.values()))), per_video)


def measure_all(
    names: Sequence[str], videos: Sequence[Video], prompts: Sequence[Prompt], *, mode: Mode = "compat"
) -> dict[str, Measured | NotMeasured]:
    """Several metrics by name; none named: all 17."""
    return {name: measure(name, videos, prompts, mode=mode) for name in names or METRICS}
