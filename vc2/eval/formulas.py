"""The arithmetic of EvalCrafter's metrics (arXiv 2310.11440), from what networks saw to one number per video.

Everything here is a function of arrays and words: embeddings, flow fields, captions, boxes, masks, probabilities. Which
network made them is not known here, so every formula is checked against recorded inputs and outputs.

Most metrics exist twice. `compat` is the arithmetic of the released program, with its flaws, and alone comparable with
published rows; `fixed` mends what the docstring calls a flaw. Scores are fractions (0..1) unless a docstring says
pixels; an *error* or *distance* is better when smaller. A video that a formula says nothing about raises `NoValue`.

Shapes: T frames, P = T - 1 pairs of neighbouring frames, H x W pixels, D width of an embedding, K classes.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

__all__ = [
    "Mode",
    "NoValue",
    "action_score",
    "bleu_orders",
    "blip_bleu",
    "celebrity_distance",
    "clip_score",
    "clip_temp",
    "color_score",
    "count_score",
    "detection_score",
    "face_consistency",
    "flow_score",
    "frame_color",
    "half_size",
    "hue_color",
    "inception_score",
    "inception_splits",
    "motion_ac",
    "occluded",
    "ocr_error",
    "ocr_frame_error",
    "padded",
    "pooled_inception_score",
    "sd_score",
    "warp",
    "warping_error",
    "warping_error_of_pair",
]

Mode = Literal["compat", "fixed"]


class NoValue(ValueError):
    """Why a formula has no value for a video."""


def _need_two(count: int) -> None:
    if count < 2:
        raise NoValue(f"needs two frames, has {count}")


# ---- cosines of CLIP embeddings ----


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def clip_score(frames: np.ndarray, text: np.ndarray) -> float:
    """Mean over frames of the cosine between frame and prompt.

    Args:
        frames: Embeddings of the frames, (T, D), of any length.
        text: Embedding of the prompt, (D,).
    """
    return float((_unit(frames) @ _unit(text)).mean())


def sd_score(frames: np.ndarray, references: np.ndarray) -> float:
    """Mean cosine between the frames (T, D) and images that SDXL painted of the prompt (N, D)."""
    return float((_unit(frames) @ _unit(references).T).mean())


def clip_temp(frames: np.ndarray) -> float:
    """Mean cosine between each frame (T, D) and the next."""
    _need_two(len(frames))
    unit = _unit(frames)
    return float((unit[:-1] * unit[1:]).sum(-1).mean())


def face_consistency(frames: np.ndarray) -> float:
    """Mean cosine between frames 2..T and the first, (T, D). Despite its name no face is looked for."""
    _need_two(len(frames))
    unit = _unit(frames)
    return float((unit[1:] @ unit[0]).mean())


# ---- Inception score ----


def inception_splits(num_frames: int, splits: int = 10) -> list[tuple[int, int]]:
    """Where the contiguous splits start and end, their sizes differing by one at most.

    Raises:
        NoValue: If there are fewer frames than splits.
    """
    if num_frames < splits:
        raise NoValue(f"needs {splits} frames in all, there are {num_frames}")
    edges = [number * num_frames // splits for number in range(splits + 1)]
    return list(pairwise(edges))


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp of the mean Kullback-Leibler divergence to the split's mean (Salimans et al. 2016), over splits.

    Args:
        probabilities: Of all frames of all videos, in the order of the videos, (N, K).
        splits: Contiguous parts, see `inception_splits`.

    Returns:
        Mean over splits, and their standard deviation with one degree of freedom taken off.
    """
    return pooled_inception_score([probabilities], len(probabilities), splits)


def pooled_inception_score(parts: Iterable[np.ndarray], num_frames: int, splits: int = 10) -> tuple[float, float]:
    """As `inception_score`, from parts (n, K) that come one after the other and hold `num_frames` rows in all.

    The mean of KL(p || m) over rows p with mean m is the mean of p . log p, minus m . log m: only sums are kept.
    """
    edges = inception_splits(num_frames, splits)
    sums, purity, place = [], [0.0] * splits, 0
    for part in parts:
        rows = np.asarray(part, np.float64)
        for number, (start, end) in enumerate(edges):
            inside = rows[max(0, start - place) : max(0, end - place)]
            if len(inside):
                if len(sums) <= number:
                    sums.append(np.zeros(rows.shape[1]))
                sums[number] += inside.sum(0)
                purity[number] += float((inside * _log(inside)).sum())
        place += len(rows)
    scores = []
    for (start, end), total, pure in zip(edges, sums, purity, strict=True):
        mean = total / (end - start)
        scores.append(math.exp(pure / (end - start) - float(mean @ _log(mean))))
    return float(np.mean(scores)), float(np.std(scores, ddof=1)) if splits > 1 else 0.0


def _log(values: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(values, np.finfo(np.float64).tiny))


# ---- captions ----


def bleu_orders(reference: str, candidate: str, highest: int = 4) -> list[float]:
    """BLEU-1 to BLEU-`highest` of a sentence against one reference (Papineni et al. 2002), with brevity penalty.

    Words are what stands between spaces, as they are. Counts are softened by 1e-15 above and 1e-9 below the fraction
    bar, as in the captioning toolkits, so that no match gives a tiny number and not an error.
    """
    words, expected = candidate.split(), reference.split()
    product, scores = 1.0, []
    for order in range(1, highest + 1):
        matches = sum((_grams(words, order) & _grams(expected, order)).values())
        product *= (matches + 1e-15) / (max(0, len(words) - order + 1) + 1e-9)
        scores.append(product ** (1 / order))
    ratio = (len(words) + 1e-15) / (len(expected) + 1e-9)
    penalty = math.exp(max(-700.0, 1 - 1 / ratio)) if ratio < 1 else 1.0
    return [score * penalty for score in scores]


def _grams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))


def blip_bleu(prompt: str, captions: Sequence[str], mode: Mode) -> float:
    """How well captions of some frames repeat the prompt.

    compat: for n = 1..4 the best of BLEU-1 to BLEU-n over all captions, and the mean of these four. Since BLEU-1 is the
    largest, this is the best caption's BLEU-1: a flaw. fixed: mean over captions of the mean of BLEU-1 to BLEU-4,
    without regard to case and punctuation, as the paper's equation says.
    """
    if not captions:
        raise NoValue("no captions")
    if mode == "compat":
        scores = [bleu_orders(prompt, caption) for caption in captions]
        return float(np.mean([max(max(of_one[:highest]) for of_one in scores) for highest in (1, 2, 3, 4)]))
    plain = _plain_words(prompt)
    return float(np.mean([np.mean(bleu_orders(plain, _plain_words(caption))) for caption in captions]))


def _plain_words(text: str) -> str:
    return " ".join(re.findall(r"\w+(?:'\w+)?", text.lower()))


# ---- objects ----


def detection_score(counts: Sequence[int]) -> float:
    """Share of the frames looked at in which at least one instance was found."""
    if not len(counts):
        raise NoValue("no frame was looked at")
    return float(np.mean([count > 0 for count in counts]))


def count_score(counts: Sequence[int], wanted: int) -> float:
    """1 minus the mean over frames of |found - wanted| / wanted, which is capped at 1."""
    if not len(counts):
        raise NoValue("no frame was looked at")
    error = float(np.mean([abs(count - wanted) / wanted for count in counts]))
    return 1 - min(1.0, error)


def hue_color(hue: float) -> str:
    """The colour of a hue in OpenCV's half degrees (0..179); no hue (NaN) is called red, as the program does."""
    names = ((15, "red"), (22, "orange"), (39, "yellow"), (78, "green"), (131, "blue"))
    return next((name for limit, name in names if hue < limit), "red")


def color_score(frames: np.ndarray, masks: np.ndarray, wanted: str, mode: Mode) -> float:
    """Share of the frames looked at in which the object has the wanted colour.

    compat: the mean of hue times instance number over the pixels where that is not zero. Flaws: hue is circular, so
    the mean of two reds is green or blue; instance 2 counts double (and wraps around at 256 in the program, which is
    not followed here); white and black have no hue; a frame without the object is called red. fixed: the commonest
    colour name of the object's pixels, see `frame_color`; no object is no colour.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        masks: Instance numbers, 0 elsewhere, (T, H, W).
        wanted: red, orange, yellow, green, blue; in fixed also white, black, gray, pink, purple, brown.
    """
    if not len(frames):
        raise NoValue("no frame was looked at")
    if mode == "compat":
        return float(np.mean([hue_color(_mean_hue(*pair)) == wanted for pair in zip(frames, masks, strict=True)]))
    wanted = {"grey": "gray"}.get(wanted, wanted)
    return float(np.mean([frame_color(*pair) == wanted for pair in zip(frames, masks, strict=True)]))


def _mean_hue(frame: np.ndarray, mask: np.ndarray) -> float:
    import cv2

    hue = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2HSV)[..., 0]
    product = hue * mask.astype(np.float64)
    count = np.count_nonzero(product)
    return float(product.sum() / count) if count else math.nan


def frame_color(frame: np.ndarray, mask: np.ndarray) -> str | None:
    """The commonest colour name among an object's pixels; None where there is no object.

    Pixels of little saturation are white, gray or black by their brightness; the others are named by hue, dark orange
    is brown and pale red is pink.
    """
    import cv2

    inside = mask > 0
    if not inside.any():
        return None
    hue, saturation, value = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2HSV)[inside].astype(int).T
    names = np.select(
        [
            value < 40,
            (saturation < 45) & (value > 190),
            saturation < 45,
            (hue < 8) | (hue >= 170),
            (hue < 22) & (value < 130),
            hue < 22,
            hue < 36,
            hue < 85,
            hue < 131,
            hue < 150,
        ],
        ["black", "white", "gray", "red", "brown", "orange", "yellow", "green", "blue", "purple"],
        default="pink",
    )
    found, counts = np.unique(names, return_counts=True)
    return str(found[counts.argmax()])


# ---- written words ----


def ocr_error(target: str, frames: Sequence[Sequence[str] | None], mode: Mode) -> float:
    """How far what is written in the frames is from what should be: mean over frames of `ocr_frame_error`'s mean.

    Args:
        target: The words that should be read.
        frames: Lines recognised in each frame, in reading order; None or empty where nothing was found.
        mode: compat: a frame without any text has error 0, and lines are joined without a space. Flaws: a model that
            never writes is perfect. fixed: such a frame has error 1, lines are joined with a space, and no error
            exceeds 1, so that writing something wrong is never worse than writing nothing.
    """
    if not len(frames):
        raise NoValue("no frame was read")
    return float(np.mean([np.mean(ocr_frame_error(target, lines, mode)) for lines in frames]))


def ocr_frame_error(target: str, lines: Sequence[str] | None, mode: Mode) -> tuple[float, float, float]:
    """Normalised edit distance (over the longer text), character error rate, word error rate; case matters.

    The character error rate is taken over the length of what was read in compat (a flaw), over the target's in fixed;
    the word error rate over the target's words in both.
    """
    read = (" " if mode == "fixed" else "").join(lines or ())
    if not read:
        return (1.0, 1.0, 1.0) if mode == "fixed" else (0.0, 0.0, 0.0)
    from rapidfuzz.distance import Levenshtein

    edits, words = Levenshtein.distance(target, read), Levenshtein.distance(target.split(), read.split())
    characters = len(read) if mode == "compat" else max(1, len(target))
    errors = (edits / max(len(target), len(read)), edits / characters, words / max(1, len(target.split())))
    return (min(1.0, errors[0]), min(1.0, errors[1]), min(1.0, errors[2])) if mode == "fixed" else errors


# ---- faces, actions ----


def celebrity_distance(distances: np.ndarray) -> float:
    """Mean over frames of the distance to the nearest reference photograph, from (T, photographs)."""
    return float(np.asarray(distances, np.float64).min(1).mean())


def action_score(confidences: np.ndarray, labels: np.ndarray, target: np.ndarray) -> float:
    """The most probable actions' likeness to the one asked for: confidences times cosines, not renormalised.

    Args:
        confidences: Probabilities of the five most probable classes, (5,).
        labels: CLIP text embeddings of their names, (5, D).
        target: CLIP text embedding of the action asked for, (D,).
    """
    return float(np.asarray(confidences, np.float64) @ (_unit(labels) @ _unit(target)))


# ---- motion ----


def flow_score(flows: np.ndarray) -> float:
    """Mean length of the flow vectors, in pixels per pair of frames, from (P, 2, H, W); padding counts in."""
    if not len(flows):
        raise NoValue("needs two frames, has 1")
    return float(np.mean([np.hypot(*flow.astype(np.float64)).mean() for flow in flows]))


def motion_ac(flow: float, wanted: str, mode: Mode) -> float:
    """1 if the motion is as large as the prompt says, else 0.

    Args:
        flow: The video's `flow_score`, pixels.
        wanted: large or slow.
        mode: The program calls more than 5 pixels large (compat), the paper more than 2 (fixed). Either depends on the
            size of the frames and on their rate.
    """
    return float(("large" if flow > (5.0 if mode == "compat" else 2.0) else "slow") == wanted)


def half_size(frames: np.ndarray) -> np.ndarray:
    """Frames halved by bilinear interpolation with half-pixel centres: (T, H, W, 3) in, (T, H // 2, W // 2, 3) out."""
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    if not height or not width:
        raise NoValue(f"frames of {frames.shape[2]}x{frames.shape[1]} cannot be halved")
    even = frames[:, :height, :width]
    return (even[:, ::2, ::2] + even[:, 1::2, ::2] + even[:, ::2, 1::2] + even[:, 1::2, 1::2]) / 4


def padded(frames: np.ndarray, multiple: int = 8) -> np.ndarray:
    """Frames (T, H, W, C) whose edges are repeated on both sides until `multiple` divides height and width."""
    down, across = (-frames.shape[1]) % multiple, (-frames.shape[2]) % multiple
    margins = ((0, 0), (down // 2, down - down // 2), (across // 2, across - across // 2), (0, 0))
    return np.pad(frames, margins, "edge")


def warp(values: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Values (C, H, W) looked up where the flow (2, H, W; x then y, pixels) points, bilinear, clamped to the border."""
    height, width = values.shape[1:]
    y, x = np.mgrid[0:height, 0:width]
    x = np.clip(x + flow[0], 0, width - 1)
    y = np.clip(y + flow[1], 0, height - 1)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    dx, dy = x - left, y - top
    upper = values[:, top, left] * (1 - dx) + values[:, top, right] * dx
    lower = values[:, bottom, left] * (1 - dx) + values[:, bottom, right] * dx
    return upper * (1 - dy) + lower * dy


def occluded(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Pixels (H, W) of the first frame that the second does not show (Ruder et al. 2016), or on edges of motion.

    With w the backward flow resampled by the forward flow f: |w + f|^2 > 0.01 (|w|^2 + |f|^2) + 0.5, or squared
    differences of f to the neighbours right and below above 0.01 |f|^2 + 0.002.
    """
    forward, backward = forward.astype(np.float64), backward.astype(np.float64)
    back = warp(backward, forward)
    lengths = (forward**2).sum(0)
    is_hidden = ((back + forward) ** 2).sum(0) > 0.01 * ((back**2).sum(0) + lengths) + 0.5
    slopes = np.zeros_like(lengths)
    slopes[:, :-1] += (np.diff(forward, axis=2) ** 2).sum(0)
    slopes[:-1] += (np.diff(forward, axis=1) ** 2).sum(0)
    return is_hidden | (slopes > 0.01 * lengths + 0.002)


def warping_error_of_pair(this: np.ndarray, following: np.ndarray, forward: np.ndarray, backward: np.ndarray) -> float:
    """Squared error of the next frame warped back onto this one, over visible pixels.

    Summed over the three channels and divided by the number of pixels, so it may reach 3 (Lai et al. 2018). Where all
    is occluded it is 0.

    Args:
        this, following: Two frames in 0..1, (H, W, 3).
        forward, backward: Flow from this to the next and back, (2, H, W), pixels.
    """
    visible = ~occluded(forward, backward)
    warped = warp(following.transpose(2, 0, 1).astype(np.float64), forward.astype(np.float64))
    errors = ((warped - this.transpose(2, 0, 1)) ** 2).sum(0)
    return float(errors[visible].sum() / visible.sum()) if visible.any() else 0.0


def warping_error(frames: np.ndarray, forward: np.ndarray, backward: np.ndarray) -> float:
    """Mean of `warping_error_of_pair` over pairs, on halved and padded frames.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        forward, backward: Flows of the halved, padded frames, (T - 1, 2, h, w).
    """
    _need_two(len(frames))
    small = padded(half_size(frames.astype(np.float64) / 255))
    pairs = zip(small, small[1:], forward, backward, strict=False)
    return float(np.mean([warping_error_of_pair(*pair) for pair in pairs]))
