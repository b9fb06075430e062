"""VBench (arXiv 2311.17982): its sixteen dimensions, its totals, and its quality half on network outputs.

Every dimension is brought to 0..1 with the published extremes of real and of bad videos, and averaged in two groups:

    n_d = (x_d - min_d) / (max_d - min_d)
    quality = sum w_d n_d / sum w_d  (seven dimensions),  semantic likewise (nine),  total = (4 quality + semantic) / 5

Numbers may leave 0..1 and are not clipped. A group with a missing dimension is withheld, and so is the total.

The quality half asks nothing of the prompt, so any video can be measured; the published rows are of VBench's own 946
prompts with 5 videos each (25 for temporal flickering, of which those that `is_static` passes are kept), and numbers
of other prompts do not stand in the same table. Formulas here are those of the published program (its release 0.1.5);
where `mode` is taken, compat keeps a flaw of it that fixed mends. A video too short or too small for a dimension
raises `NoValue`, a ValueError, with the reason.

Shapes: T frames, N = T - 1 pairs of neighbours, H x W pixels, D width of features. Frames are uint8 RGB.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from vc2.errors import Vc2Error
from vc2.eval.formulas import Mode, NoValue

__all__ = [
    "DIMENSIONS",
    "Dimension",
    "DimensionsMissing",
    "aesthetic_quality",
    "background_consistency",
    "dynamic_degree",
    "dynamic_degree_of",
    "imaging_quality",
    "is_static",
    "motion_smoothness",
    "motion_smoothness_by_mode",
    "normalised",
    "overall",
    "pair_motion",
    "partial_vbench_scores",
    "sampled_at_8_fps",
    "subject_consistency",
    "temporal_flickering",
    "vbench_scores",
]

Group = Literal["quality", "semantic"]

#: Frames to be interpolated between: (M, H, W, 3) uint8 before and after; out comes (M, H, W, 3) in [0, 1].
Interpolate = Callable[[np.ndarray, np.ndarray], np.ndarray]

QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1


class DimensionsMissing(Vc2Error, ValueError):
    """A total was asked for without all the dimensions it is made of."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """What is published of a dimension; extremes are fractions."""

    name: str
    group: Group
    minimum: float
    maximum: float
    weight: float
    num_prompts: int
    weights: tuple[str, ...] = ()  #: foreign weights that its measure here needs

    def normalised(self, raw: float) -> float:
        """A printed value, in percent, between the extremes."""
        return (raw / 100 - self.minimum) / (self.maximum - self.minimum)


def _quality(
    name: str, minimum: float, maximum: float, num_prompts: int, *weights: str, weight: float = 1
) -> Dimension:
    return Dimension(name, "quality", minimum, maximum, weight, num_prompts, weights)


def _semantic(name: str, minimum: float, maximum: float, num_prompts: int) -> Dimension:
    return Dimension(name, "semantic", minimum, maximum, 1, num_prompts)


#: In the order of the published table. No measure of a semantic dimension is given here: rows of others are read.
DIMENSIONS: Mapping[str, Dimension] = {
    dimension.name: dimension
    for dimension in (
        _quality("subject consistency", 0.1462, 1, 72, "dino-vit-b-16"),
        _quality("background consistency", 0.2615, 1, 86, "clip-vit-b-32"),
        _quality("temporal flickering", 0.6293, 1, 75),
        _quality("motion smoothness", 0.706, 0.9975, 72, "amt-s"),
        _quality("dynamic degree", 0, 1, 72, "raft-things", weight=0.5),
        _quality("aesthetic quality", 0, 1, 93, "clip-vit-l-14", "laion-aesthetic-vit-l-14"),
        _quality("imaging quality", 0, 1, 93, "musiq-spaq"),
        _semantic("object class", 0, 1, 79),
        _semantic("multiple objects", 0, 1, 82),
        _semantic("human action", 0, 1, 100),
        _semantic("color", 0, 1, 85),
        _semantic("spatial relationship", 0, 1, 84),
        _semantic("scene", 0, 0.8222, 86),
        _semantic("appearance style", 0.0009, 0.2855, 90),
        _semantic("temporal style", 0, 0.364, 100),
        _semantic("overall consistency", 0, 0.364, 93),
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Totals


def normalised(raw: Mapping[str, float]) -> dict[str, float]:
    """The dimensions that have a finite value, between their extremes: 0 is the worst, 1 the best that was published.

    Args:
        raw: Printed values by name, in percent; names with underscores, as in VBench's result files, do as well. Other
            keys are ignored.
    """
    known = _by_name(raw)
    return {name: dimension.normalised(known[name]) for name, dimension in DIMENSIONS.items() if name in known}


def vbench_scores(raw: Mapping[str, float]) -> dict[str, float]:
    """VBench's three printed scores from the sixteen raw dimensions.

    Args:
        raw: As in `normalised`.

    Returns:
        quality, semantic and total, in percent.

    Raises:
        DimensionsMissing: If any of the sixteen is missing or no finite number; the message names them all.
    """
    scores, withheld = partial_vbench_scores(raw)
    if withheld:
        known = _by_name(raw)
        missing = [name for name in DIMENSIONS if name not in known]
        raise DimensionsMissing(
            f"{len(missing)} of {len(DIMENSIONS)} dimensions missing: {', '.join(missing)}; without them no "
            f"{', '.join(withheld)} can be given (measure them, or use partial_vbench_scores)"
        )
    return scores


def partial_vbench_scores(raw: Mapping[str, float]) -> tuple[dict[str, float], dict[str, str]]:
    """The scores whose dimensions are all there, and for each other the reason why it is withheld."""
    values, scores, withheld = normalised(raw), {}, {}
    for group in ("quality", "semantic"):
        members = [dimension for dimension in DIMENSIONS.values() if dimension.group == group]
        if missing := [dimension.name for dimension in members if dimension.name not in values]:
            withheld[group] = f"needs {', '.join(missing)}"
        else:
            weighted = math.fsum(dimension.weight * values[dimension.name] for dimension in members)
            scores[group] = 100 * weighted / math.fsum(dimension.weight for dimension in members)
    if withheld:
        withheld["total"] = f"needs {', '.join(withheld)}"
    else:
        together = QUALITY_WEIGHT * scores["quality"] + SEMANTIC_WEIGHT * scores["semantic"]
        scores["total"] = together / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return scores, withheld


def overall(name: str, values: Sequence[float], num_frames: Sequence[int]) -> float:
    """A dimension over all videos, from the number of each: the published program's mean.

    The two consistencies are averaged over frames, so that a long video counts more; all others over videos.

    Args:
        name: A key of `DIMENSIONS`.
        values: One per video.
        num_frames: Frames of each video.

    Raises:
        ValueError: If there is no video, or the lengths differ.
    """
    if not values or len(values) != len(num_frames):
        raise ValueError(f"{len(values)} values, {len(num_frames)} frame counts: expected one of each per video")
    pooled = name in ("subject consistency", "background consistency")
    return float(np.average(values, weights=[count - 1 for count in num_frames] if pooled else None))


def _by_name(raw: Mapping[str, float]) -> dict[str, float]:
    """What has a finite value, under the names of the table."""
    found = {}
    for name, value in raw.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(number):
            found[name.replace("_", " ")] = number
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The seven dimensions of quality, one video each


def subject_consistency(features: np.ndarray) -> float:
    """How much all frames show the same subject: DINO's features of each frame after the first, compared with those of
    the frame before it and of the first, cosines below 0 taken as 0, averaged.

    Args:
        features: (T, D), as `Dino.features` gives them; of any length.

    Returns:
        In [0, 1], 1 for a still video. A feature of zeros is like nothing (cosine 0).

    Raises:
        ValueError: If there are fewer than two frames, or numbers that are not finite.
    """
    return _consistency(features)


def background_consistency(features: np.ndarray) -> float:
    """As `subject_consistency`, of CLIP ViT-B/32 features, (T, D): of the whole picture, whatever the name says."""
    return _consistency(features)


def temporal_flickering(frames: np.ndarray) -> float:
    """How little neighbouring frames differ: 1 - mean absolute difference / 255.

    Motion lowers it as flicker does: the published numbers are of videos without motion (see `is_static`).

    Args:
        frames: (T, H, W, 3) uint8.

    Returns:
        In [0, 1], 1 for a still video.

    Raises:
        ValueError: If there are fewer than two frames.
    """
    _check_frames(frames, at_least=2)
    # Pair by pair: the whole video in wider integers would be four times its size.
    return 1 - _mean(_difference(before, after) for before, after in pairwise(frames)) / 255


PAIRS_AT_ONCE = 8  # of frames whose middles are in memory together


def motion_smoothness(frames: np.ndarray, interpolate: Interpolate, *, mode: Mode = "compat") -> float:
    """One mode of `motion_smoothness_by_mode`."""
    return motion_smoothness_by_mode(frames, interpolate)[mode]


def motion_smoothness_by_mode(frames: np.ndarray, interpolate: Interpolate) -> dict[Mode, float]:
    """How well every second frame follows from its neighbours: 1 - mean absolute error / 255, in [0, 1].

    compat cuts the interpolated colours down to whole numbers, so that a perfect prediction may lack one level; fixed
    rounds them. The last frame of an even number has no later neighbour and is not looked at.

    Args:
        frames: (T, H, W, 3) uint8.
        interpolate: Gives the frame in the middle between two, such as `Amt.interpolate`.

    Raises:
        ValueError: If there are fewer than three frames.
    """
    _check_frames(frames, at_least=3)
    shown, hidden = frames[::2], frames[1::2]
    differences: dict[Mode, list[float]] = {"compat": [], "fixed": []}
    for start in range(0, len(shown) - 1, PAIRS_AT_ONCE):
        before, after = shown[:-1][start : start + PAIRS_AT_ONCE], shown[1:][start : start + PAIRS_AT_ONCE]
        levels = 255 * np.clip(interpolate(before, after), 0, 1)
        if levels.shape != before.shape:
            raise ValueError(f"interpolated frames are {levels.shape}, expected {before.shape}: one between every two")
        truth = hidden[start : start + PAIRS_AT_ONCE]
        differences["compat"] += map(_difference, truth, levels.astype(np.uint8))
        differences["fixed"] += map(_difference, truth, np.rint(levels).astype(np.uint8))
    return {mode: 1 - _mean(of_mode) / 255 for mode, of_mode in differences.items()}


def sampled_at_8_fps(num_frames: int, fps: float) -> range:
    """The frames that `dynamic_degree` looks at: every k-th, so that about eight a second remain.

    Raises:
        ValueError: If the frame rate is not above 0.
    """
    if not fps > 0 or not math.isfinite(fps):
        raise ValueError(f"frame rate is {fps}, expected a number above 0")
    return range(0, num_frames, max(1, round(fps / 8)))


def dynamic_degree(
    flows: Iterable[np.ndarray], *, num_frames: int, height: int, width: int, mode: Mode = "compat"
) -> float:
    """Whether a video moves, from the flow in pixels of each pair of neighbours, N times (2, H, W); see
    `dynamic_degree_of`. The published program leaves on it what it added to reach multiples of 8 pixels."""
    return dynamic_degree_of(map(pair_motion, flows), num_frames=num_frames, height=height, width=width, mode=mode)


def pair_motion(flow: np.ndarray) -> float:
    """Motion of a pair of frames: the mean length of the largest twentieth of its flow (2, H, W), in pixels."""
    return _largest(flow, 0.05)


def dynamic_degree_of(
    motions: Iterable[float], *, num_frames: int, height: int, width: int, mode: Mode = "compat"
) -> float:
    """Whether a video moves: 1 if enough pairs of frames hold large motion, else 0.

    Motion is large above 6 pixels per 256 of the frame's short side. A quarter as many pairs as there are frames must
    have it, rounded to the even number at a tie.

    Args:
        motions: `pair_motion` of each pair of neighbours of the frames `sampled_at_8_fps`. Of an iterator no more are
            taken than decide.
        num_frames: How many frames were sampled, one more than there are pairs.
        height: Of the frames, without padding.
        width: Of the frames, without padding.
        mode: compat asks for no pair at all of a video of two sampled frames, which is so called moving; fixed asks for
            one at least.

    Returns:
        1.0 or 0.0; 0.0 for a still video of three frames and more.

    Raises:
        ValueError: If there are fewer than two sampled frames, or a flow has fewer than 20 pixels.
    """
    _check_count(num_frames, at_least=2, what="two frames at 8 a second")
    threshold = 6.0 * min(height, width) / 256
    needed = round(4 * num_frames / 16)
    needed = needed if mode == "compat" else max(1, needed)
    moving = 0
    for motion in motions:
        moving += motion > threshold
        if moving >= needed:
            return 1.0
    return 0.0


def is_static(flows: Sequence[np.ndarray], *, num_frames: int, height: int, width: int) -> bool:
    """Whether a video is kept for temporal flickering: VBench's filter against motion.

    Args:
        flows: Flow in pixels, (2, H, W) each: of each pair of neighbours of *all* frames, then from the first frame
            to the last and back, N + 2 in all.
        num_frames: N + 1.
        height: Of the frames, without padding.
        width: Of the frames, without padding.

    Raises:
        ValueError: If there are fewer than two frames, or the number of flows is another.
    """
    _check_count(num_frames, at_least=2, what="two frames")
    if len(flows) != num_frames + 1:
        raise ValueError(
            f"{len(flows)} flows of {num_frames} frames, expected {num_frames + 1}: neighbours, then first to last and "
            "back"
        )
    threshold, allowed = 3.0 * min(height, width) / 256, round(2 * num_frames / 16)
    motion = [_largest(flow, 0.02) for flow in flows]
    jumps = sum(length > threshold for length in motion[:-2])
    return jumps <= allowed and max(motion[-2:]) <= 2 * allowed * threshold


def aesthetic_quality(scores: np.ndarray) -> float:
    """Mean over frames of LAION's aesthetic score, 0..10, as a fraction.

    Args:
        scores: (T,), as `Aesthetic.scores` gives them.

    Raises:
        ValueError: If there is no frame, or a number is not finite.
    """
    return _mean_score(scores) / 10


def imaging_quality(scores: np.ndarray) -> float:
    """Mean over frames of MUSIQ's technical score, 0..100, as a fraction.

    Args:
        scores: (T,), as `Musiq.scores` gives them.

    Raises:
        ValueError: If there is no frame, or a number is not finite.
    """
    return _mean_score(scores) / 100


def _consistency(features: np.ndarray) -> float:
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2:
        raise ValueError(f"features are {features.shape}, expected (T, D)")
    _check_count(len(features), at_least=2, what="two frames")
    if not np.isfinite(features).all():
        raise ValueError("features hold numbers that are not finite")
    directions = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    to_previous = np.sum(directions[1:] * directions[:-1], axis=1)
    to_first = directions[1:] @ directions[0]
    return float(np.mean([np.clip(to_previous, 0, 1), np.clip(to_first, 0, 1)]))


def _largest(flow: np.ndarray, share: float) -> float:
    """Mean length of the largest share of a flow's vectors."""
    if flow.ndim != 3 or len(flow) != 2:
        raise ValueError(f"flow is {flow.shape}, expected (2, H, W)")
    lengths = np.linalg.norm(flow.astype(np.float64), axis=0).ravel()
    count = int(lengths.size * share)
    if not count:
        raise NoValue(f"flow of {lengths.size} pixels is too small to take {share:.0%} of it")
    return float(np.mean(np.partition(lengths, -count)[-count:]))


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean(np.abs(one.astype(np.int16) - other)))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def _mean_score(scores: np.ndarray) -> float:
    scores = np.asarray(scores, dtype=np.float64)
    _check_count(scores.size, at_least=1, what="one frame")
    if not np.isfinite(scores).all():
        raise ValueError("scores hold numbers that are not finite")
    return float(scores.mean())


def _check_frames(frames: np.ndarray, *, at_least: int) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, expected uint8 (T, H, W, 3)")
    _check_count(len(frames), at_least=at_least, what={2: "two frames", 3: "three frames"}[at_least])


def _check_count(found: int, *, at_least: int, what: str) -> None:
    if found < at_least:
        raise NoValue(f"needs {what}, has {found}")
