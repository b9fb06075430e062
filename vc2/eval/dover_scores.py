"""DOVER without its network: which frames it looks at, and what is made of its two raw scores.

DOVER (Wu et al., arXiv 2211.04894) looks at *clips* of 32 frames:

    aesthetic   one clip: the video is cut into 32 equal segments, of each one frame
    technical   three clips: the video is cut into 3 equal segments, of each 32 frames with stride 2

Where a segment is longer than the stride times what is taken of it, the place inside is drawn. In `compat` this is what
the published program does: a segment's length is the whole part of T/32 or T/3, so the end of the video may be left
out; the aesthetic branch sees a video of under 32 frames as its first frame, 32 times; and the technical branch runs on
past the segment and wraps around, with an even T over every second frame only. In `fixed` the segments end where the
video ends, and a technical clip of a video under 192 frames goes once forward, over 64 frames or all there are.

Each branch gives one raw score. EvalCrafter standardises them by mean and deviation over its own 700-prompt videos and
takes the logistic function. Its constants have the signs of the *other* branch's statistics in the DOVER release:
0.1253 is called aesthetic, where DOVER has 0.1107 for technical. So which branch VQA_A is stays an open question, and
an argument: `first`.
"""

from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np

from vc2.eval.formulas import Mode

__all__ = ["CLIP_FRAMES", "NUM_CLIPS", "Branch", "Fused", "frame_indices", "fused", "fused_as_released"]

Branch = Literal["aesthetic", "technical"]

CLIP_FRAMES = 32
NUM_CLIPS: dict[Branch, int] = {"aesthetic": 1, "technical": 3}
_STRIDE = 2
_SEGMENTS: dict[Branch, int] = {"aesthetic": 32, "technical": 3}


def frame_indices(branch: Branch, num_frames: int, mode: Mode, rng: np.random.Generator) -> np.ndarray:
    """Which frames of a video a branch is shown.

    Args:
        branch: The branch.
        num_frames: Frames of the video, at least 1.
        mode: `compat` as published, `fixed` spread over the whole video.
        rng: Draws the place inside segments of more than 2 frames (aesthetic) or 64 (technical). In videos of up to 96
            and 194 frames there is nothing to draw.

    Returns:
        Indices into the video, (clips, 32), 1 clip (aesthetic) or 3 (technical).

    Raises:
        ValueError: If there is no frame.
    """
    if num_frames < 1:
        raise ValueError(f"{num_frames} frames; DOVER needs at least one")
    segments = _SEGMENTS[branch]
    taken = CLIP_FRAMES * NUM_CLIPS[branch] // segments  # frames of one segment
    offsets = np.arange(taken) * _STRIDE
    if mode == "compat":
        starts = np.arange(segments) * (num_frames // segments)
        lengths = np.full(segments, num_frames // segments)
    else:
        bounds = np.arange(segments + 1) * num_frames // segments
        starts, lengths = bounds[:-1], np.diff(bounds)
        if branch == "technical" and lengths.min() < taken * _STRIDE:
            span = min(num_frames, taken * _STRIDE)
            starts = np.arange(segments) * (num_frames - span) // (segments - 1)
            offsets = np.arange(taken) * span // taken
    room = lengths - taken * _STRIDE
    if room.max() > 0:
        starts = starts + rng.integers(0, np.maximum(room, 1))
    return ((starts[:, None] + offsets) % num_frames).reshape(NUM_CLIPS[branch], CLIP_FRAMES)


Number = TypeVar("Number", float, np.ndarray)


class Fused(NamedTuple, Generic[Number]):
    """Scores between 0 and 1, larger is better; numbers or arrays, as given. Tables print 100 times these."""

    aesthetic: Number
    technical: Number
    overall: Number


def fused(aesthetic: Number, technical: Number, *, first: Branch = "aesthetic") -> Fused[Number]:
    """EvalCrafter's VQA_A, VQA_T and overall score from DOVER's raw scores.

    Args:
        aesthetic: Raw score of the aesthetic branch.
        technical: Raw score of the technical branch.
        first: Which of them stands first in the published program, and so is called VQA_A there. As its code is
            written the aesthetic one; its constants suggest the other.
    """
    one, two = (aesthetic, technical) if first == "aesthetic" else (technical, aesthetic)
    return _fused((one - 0.1253) / 0.0318, (two + 0.0758) / 0.0129)


def fused_as_released(aesthetic: Number, technical: Number) -> Fused[Number]:
    """The same with the constants of the DOVER release: statistics of natural videos (KoNViD-1k)."""
    return _fused((aesthetic + 0.08285) / 0.03774, (technical - 0.1107) / 0.07355)


def _fused(aesthetic: Number, technical: Number) -> Fused[Number]:
    overall = 0.6104 * technical + 0.3896 * aesthetic
    return Fused(_logistic(aesthetic), _logistic(technical), _logistic(overall))


def _logistic(value: Number) -> Number:
    # 1 / (1 + exp(-value)), which could overflow
    return 0.5 + 0.5 * np.tanh(0.5 * value)  # type: ignore[return-value]  # a float64 is a float
