"""Judges that know the world's truth and need no weights: the right thing, the right way, how good a picture.

The background is the median colour of a clip. A thing is what differs from it in *chroma*, the plane of red - green
against yellow - blue: all things are strongly coloured and all backgrounds muted, and a white watermark or a grey
flicker hardly shows there. Colour is read from the hue of that difference, shape from the overlap with drawn
templates of the same place and size, direction from a line through the places over time.

    colour      of the thing: 1 right, 0 wrong
    shape       likewise
    background  its colour, likewise
    count       of separate things, likewise
    direction   1 right, 0 wrong; for a thing at rest 1 if it rests (clips only)
    path        cosine between the tracked displacement and the captioned direction (moving things only)
    axis        1 if it moves along that line, either way (moving things only). By chance: a half for one of the four
                ways, 0.41 for any heading
    speed       units a second along its path (clips only)
    jitter      root mean square distance of its places from a straight path, units (clips only)
    visible     share of frames in which a thing is found
    palette     mean distance of the levels from those of image-set pictures of what is seen, right or not
    watermark   estimated opacity of the known watermark
    sharpness   mean slope of the thing's edges, 1 / pixel
    noise       standard deviation, grey levels
    flicker     mean change of the background's level from frame to frame, grey levels (clips only)
    flash       the same of the thing's level (clips only)

Shapes: T frames, H x W pixels.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.ndimage import binary_closing, label

from vc2.miniature.degrade import watermark_alpha
from vc2.miniature.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    ThingTruth,
    Truth,
    draw_picture_scene,
    shape_cover,
)
from vc2.seeding import generator

__all__ = ["RIGHTS", "judge"]

RIGHTS = ("colour", "shape", "direction", "background", "count")  # what a caption claims

FAINTEST = 34.0  # chroma difference below which nothing is seen
SMALLEST = 0.008  # share of the frame below which nothing is seen
ALONG = 0.8  # cosine between path and captioned line above which a thing moves along it
GAP = 0.08  # of a unit: what is nearer to each other is one thing
REST = 0.03  # of a unit: less displacement over the clip is rest
# Blur and coding round corners off and never the reverse, so a rounded square is nearer to a circle than a circle is to
# a square. Overlap given for nothing, half way between what rounded shapes lose and what other shapes reach.
HANDICAP = {"circle": 0.0, "square": 0.048, "triangle": 0.09}


def judge(frames: np.ndarray, truth: Truth, fps: float) -> dict[str, float]:
    """Judge a clip (T, H, W, 3) uint8, T = 1 for a picture, against what its caption says.

    Of several things, colour and shape are the share that is right; direction and speed are the first one's.
    """
    clip = _Clip.of(frames)
    alone = len(truth.things) == 1
    found = [clip.prominent() if alone else clip.of_colour(thing.colour) for thing in truth.things]
    things = [_judge_thing(clip, masks, thing, fps) for masks, thing in zip(found, truth.things, strict=True)]
    scores = dict(things[0])
    for name in ("colour", "shape", "visible"):
        scores[name] = float(np.mean([thing[name] for thing in things]))
    nearest = min(BACKGROUNDS, key=lambda name: float(np.abs(clip.background - BACKGROUNDS[name]).sum()))
    scores["background"] = float(nearest == truth.background)
    scores["count"] = float(_count(clip) == len(truth.things))
    shown = replace(truth, background=nearest, things=tuple(map(clip.as_seen, found, truth.things)))
    scores["palette"] = _palette_distance(frames, shown)
    return scores | _judge_picture(clip, np.any(found, axis=0))


@dataclass(frozen=True, slots=True)
class _Clip:
    rgb: np.ndarray  # (T, H, W, 3) float
    background: np.ndarray  # (3,) median colour
    chroma: np.ndarray  # (T, H, W, 2) difference from the background's

    @classmethod
    def of(cls, frames: np.ndarray) -> "_Clip":
        rgb = frames.astype(np.float32)
        background = np.median(rgb.reshape(-1, 3), axis=0)
        return cls(rgb, background, _chroma(_smooth(rgb)) - _chroma(background))

    @property
    def unit(self) -> float:
        """Pixels in a unit of the scene."""
        return min(self.rgb.shape[1], self.rgb.shape[2] * 0.6)

    @property
    def reach(self) -> int:
        """Pixels around a place that still belong to the thing there."""
        return max(1, round(GAP * self.unit / 2))

    def prominent(self) -> np.ndarray:
        """Where the most colourful thing is, (T, H, W) bool."""
        strength = np.sqrt((self.chroma**2).sum(axis=-1))
        peak = np.quantile(strength, 0.985)
        return self._around_the_densest(strength > max(FAINTEST, 0.42 * peak))

    def of_colour(self, colour: str) -> np.ndarray:
        """Where a thing of the given colour is, (T, H, W) bool."""
        strength = np.sqrt((self.chroma**2).sum(axis=-1))
        mine = self.hues().argmax(axis=-1) == list(COLOURS).index(colour)
        return self._around_the_densest(mine & (strength > FAINTEST))

    def hues(self, chroma: np.ndarray | None = None) -> np.ndarray:
        """Likeness (cosine) of chroma differences (..., 2) to every colour of the world, (..., 6)."""
        chroma = self.chroma if chroma is None else chroma
        wanted = _chroma(np.array(list(COLOURS.values()), np.float32)) - _chroma(self.background)
        wanted /= np.linalg.norm(wanted, axis=-1, keepdims=True)
        return chroma @ wanted.T / (np.linalg.norm(chroma, axis=-1, keepdims=True) + 1e-6)

    def colour_of(self, masks: np.ndarray) -> str:
        """The colour of what the masks show."""
        return list(COLOURS)[int(self.hues(self.chroma[masks].mean(axis=0)).argmax())]

    def as_seen(self, masks: np.ndarray, thing: ThingTruth) -> ThingTruth:
        """A thing in the colour that is seen, if anything is."""
        return replace(thing, colour=self.colour_of(masks)) if masks.any() else thing

    def _around_the_densest(self, masks: np.ndarray) -> np.ndarray:
        """Masks cut to a window around their densest place in each frame; empty where too little is there."""
        reach = int(0.4 * self.unit) + 1
        height, width = masks.shape[1:]
        kept = np.zeros_like(masks)
        for mask, out in zip(masks, kept, strict=True):
            density = _box(mask.astype(np.float32), reach)
            top, left = np.unravel_index(np.argmax(density), density.shape)
            ys, xs = np.nonzero(mask[max(0, top - reach) : top + reach + 1, max(0, left - reach) : left + reach + 1])
            if len(ys) < SMALLEST * height * width:
                continue
            # The densest window may sit off the thing's middle: look again around the centre of what it holds.
            top, left = int(ys.mean()) + max(0, top - reach), int(xs.mean()) + max(0, left - reach)
            window = np.s_[max(0, top - reach) : top + reach + 1, max(0, left - reach) : left + reach + 1]
            out[window] = mask[window]
        return kept


def _judge_thing(clip: _Clip, masks: np.ndarray, thing: ThingTruth, fps: float) -> dict[str, float]:
    num_frames = len(masks)
    seen = np.any(masks, axis=(1, 2))
    scores = {"visible": float(seen.mean()), "colour": 0.0, "shape": 0.0}
    if num_frames > 1:
        scores |= {"direction": 0.0, "speed": 0.0} | ({"path": 0.0, "axis": 0.0} if thing.motion else {})
    if not seen.any():
        return scores
    scores["colour"] = float(clip.colour_of(masks) == thing.colour)
    scores["shape"] = float(_shape(clip, masks) == thing.shape)
    if num_frames > 1 and seen.sum() >= max(2, num_frames // 2):
        moved, jitter = _displacement(masks, seen, clip.unit)
        straight = jitter < 0.5 * np.hypot(*moved) + 0.01
        scores["speed"], scores["jitter"] = float(np.hypot(*moved) * fps / (num_frames - 1)), jitter
        if thing.motion is None:
            scores["direction"] = float(np.hypot(*moved) < 2 * REST)
        else:
            wanted = np.array(DIRECTIONS[thing.motion], float)
            along = float(moved @ wanted)
            scores["path"] = along / (float(np.hypot(*moved)) + 1e-6)
            least = max(REST, ALONG * float(np.hypot(*moved)))
            scores["axis"] = float(straight and abs(along) > least)
            scores["direction"] = float(straight and along > least)
    return scores


def _displacement(masks: np.ndarray, seen: np.ndarray, unit: float) -> tuple[np.ndarray, float]:
    """Displacement (x, y) over the clip, in units, by a line through the places, and how far they stray from it."""
    frames = np.flatnonzero(seen)
    places = np.array([[np.nonzero(masks[t])[1].mean(), np.nonzero(masks[t])[0].mean()] for t in frames]) / unit
    slope, start = np.polyfit(frames, places, 1)
    error = places - (frames[:, None] * slope + start)
    moved = slope * (len(masks) - 1)
    return moved, float(np.sqrt((error**2).sum(axis=1).mean()))


def _count(clip: _Clip) -> int:
    """How many separate things most frames show. What is as near as stripes of a thing is one."""
    strength = np.sqrt((clip.chroma**2).sum(axis=-1))
    masks = strength > max(FAINTEST, 0.42 * np.quantile(strength, 0.985))
    least = SMALLEST * masks[0].size
    regions, counts = np.zeros(masks[0].shape, np.int32), []
    for mask in masks:
        label(_box(mask.astype(np.float32), clip.reach) > 1e-3, output=regions)
        counts.append((np.bincount(regions[mask])[1:] >= least).sum())
    return int(np.median(counts))


def _palette_distance(frames: np.ndarray, truth: Truth) -> float:
    """Mean distance between the sorted levels of a clip and of image-set pictures, channel by channel: the earth
    mover's distance in one dimension."""
    wanted = _image_set_levels(truth, frames.shape[2], frames.shape[1])
    return float(np.abs(_levels(frames) - wanted).mean())


@lru_cache(maxsize=1024)
def _image_set_levels(truth: Truth, width: int, height: int) -> np.ndarray:
    still = replace(truth, things=tuple(replace(thing, motion=None) for thing in truth.things))
    rng = generator(0, "palette", still.caption())
    return _levels(np.stack([draw_picture_scene(rng, still, rich=True).render(width, height) for _ in range(16)]))


def _levels(frames: np.ndarray) -> np.ndarray:
    """Quantiles of the levels of each channel, (Q, 3)."""
    return np.quantile(frames.reshape(-1, 3), np.linspace(0.01, 0.99, 50), axis=0)


def _shape(clip: _Clip, masks: np.ndarray) -> str:
    """The shape whose outline overlaps best with the masks, over the frames that show the whole thing or most."""
    height, width = masks.shape[1:]
    areas = masks.sum(axis=(1, 2))
    inside = np.array([not (m[0].any() or m[-1].any() or m[:, 0].any() or m[:, -1].any()) for m in masks]) & (areas > 0)
    chosen = np.flatnonzero(inside if inside.any() else areas == areas.max())
    reach = clip.reach
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    near = x**2 + y**2 <= reach**2
    overlap = {shape: HANDICAP[shape] * len(chosen) for shape in SHAPES}
    for t in chosen:
        # Between stripes of a faint colour there is nothing: closed, it is the thing again.
        mask = binary_closing(np.pad(masks[t], reach), near)[reach:-reach, reach:-reach] | masks[t]
        ys, xs = np.nonzero(mask)
        y, x, area = ys.mean() + 0.5, xs.mean() + 0.5, mask.sum()
        for shape in SHAPES:
            overlap[shape] += max(
                _likeness(mask, shape_cover(shape, width, height, x, y + dy, area)) for dy in (-0.5, 0.0, 0.5)
            )
    return max(overlap, key=overlap.__getitem__)


def _likeness(mask: np.ndarray, cover: np.ndarray) -> float:
    """Intersection over union of a mask and a soft template."""
    return float(np.minimum(mask, cover).sum() / np.maximum(mask, cover).sum())


def _judge_picture(clip: _Clip, masks: np.ndarray) -> dict[str, float]:
    height, width = masks.shape[1:]
    luma = clip.rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    bare = np.stack([_box(mask.astype(np.float32), 2) < 1e-3 for mask in masks])  # away from things
    alpha = watermark_alpha(width, height)
    scores = {"sharpness": _sharpness(clip, masks), "watermark": _watermark(luma, bare, alpha)}
    # Immerkaer 1996: this kernel answers to noise and not to smooth pictures; the median, so that edges do not count.
    kernel = luma[:, :-2] - 2 * luma[:, 1:-1] + luma[:, 2:]
    kernel = kernel[:, :, :-2] - 2 * kernel[:, :, 1:-1] + kernel[:, :, 2:]
    plain = bare & (_box(alpha, 2) < 1e-3)
    answers = np.abs(kernel[plain[:, 1:-1, 1:-1]])
    scores["noise"] = float(np.median(answers) / (6 * 0.6745)) if answers.size else 0.0
    if len(luma) > 1:
        always = plain.all(axis=0)
        always = always if always.any() else np.ones_like(always)
        level = luma[:, always].mean(axis=1)
        scores["flicker"] = float(np.abs(np.diff(level)).mean())
        levels = np.array([frame[mask].mean() for frame, mask in zip(luma, masks, strict=True) if mask.any()])
        if len(levels) > 1:
            scores["flash"] = float(np.abs(np.diff(levels)).mean())
    return scores


def _sharpness(clip: _Clip, masks: np.ndarray) -> float:
    """Mean slope of the thing's edge, 1 / pixel: squared over plain gradient of its cover. 0 if nothing is there."""
    slopes = []
    for rgb, mask in zip(clip.rgb, masks, strict=True):
        if not mask.any():
            continue
        towards = np.median(rgb[mask], axis=0) - clip.background
        cover = np.clip((rgb - clip.background) @ towards / (towards @ towards), 0, 1)
        gradient = np.hypot(np.diff(cover, axis=0)[:, :-1], np.diff(cover, axis=1)[:-1])
        near = (_box(mask.astype(np.float32), 2) > 1e-3)[:-1, :-1] & (gradient > 0.08)
        if near.any():
            slopes.append((gradient[near] ** 2).sum() / gradient[near].sum())
    return float(np.mean(slopes)) if slopes else 0.0


def _watermark(luma: np.ndarray, bare: np.ndarray, alpha: np.ndarray) -> float:
    """Opacity of the watermark by projection of the mean picture's fine detail on the watermark's."""
    weight = bare.sum(axis=0)
    usable = weight > 0
    if not usable.any():
        return 0.0
    level = float(np.median(luma[bare]))
    mean = np.where(usable, (luma * bare).sum(axis=0) / np.maximum(weight, 1), level)
    detail, wanted = mean - _box(mean, 3), (alpha - _box(alpha, 3)) * usable
    power = float((wanted**2).sum())
    opacity = float((detail * wanted).sum()) / power / max(235 - level, 30) if power > 0 else 0.0
    return max(0.0, opacity)


def _chroma(rgb: np.ndarray) -> np.ndarray:
    """Red - green and yellow - blue of colours (..., 3), as (..., 2)."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.stack([red - green, (red + green) / 2 - blue], axis=-1)


def _smooth(rgb: np.ndarray) -> np.ndarray:
    """A light blur within frames (T, H, W, 3) against noise."""
    wide = np.pad(rgb, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    rows = wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]
    return (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 16


def _box(plane: np.ndarray, reach: int) -> np.ndarray:
    """Mean over (2 reach + 1) squared pixels of a plane (H, W), edges repeated."""
    size = 2 * reach + 1
    sums = np.pad(np.pad(plane.astype(np.float64), reach, mode="edge").cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    return (sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]) / size**2
