"""What the judges' figures stand beside: drawn clips, so of known truth, good ones and damaged ones.

`separation` says how surely each figure tells a real clip from one that is damaged in the way the figure is for.
`Yardstick` turns figures into two indices whose ends mean something in this world:

    quality   0: looks like the video set (soft, noisy, watermarked)         1: looks like the image set
    motion    0: every frame an unconnected picture of the same caption      1: as real clips move

each the mean of its figures' places between the means at the two ends, cut to [-1, 2]. The ends pass through the
autoencoder first, so that a perfect network reaches them. Figures whose ends it makes alike (sharpness, noise), or that
are alike anyway (flash), are in neither index; nor is what a caption claims.

What this module draws and measures by is part of a comparison's name by `VERSION`.
Shapes: T frames, H x W pixels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vc2.miniature import scene as words
from vc2.miniature.degrade import footage, soften, stamp
from vc2.miniature.judges import judge
from vc2.miniature.scene import Scene, Truth, draw_picture_scene, draw_video_scene
from vc2.seeding import generator

__all__ = ["MOTION", "QUALITY", "VERSION", "WATERMARKED", "Separation", "Yardstick", "separation"]

VERSION = 3  # raised by hand when ends, indices or thresholds change
QUALITY = ("watermark", "palette")
MOTION = ("jitter", "flicker", "speed")
WATERMARKED = 0.05  # opacity above which a watermark is said to be there; how often rightly: `Yardstick.watermarked`
SECONDS = 2.3
Drawn = Sequence[tuple[Scene, np.ndarray]]  # scenes with their clips
Through = Callable[[np.ndarray], np.ndarray]  # what an autoencoder makes of a clip
Damage = Callable[[Scene, np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True, slots=True)
class Separation:
    """How surely a figure tells real clips from damaged ones."""

    figure: str
    damage: str
    accuracy: float  # of `clips` pairs; 0.5 is chance
    through: float  # the same where all clips went through the autoencoder
    clips: int
    things: int = 1  # in a clip


def separation(
    width: int, height: int, num_frames: int, fps: float, through: Through, *, clips: int = 24
) -> tuple[Separation, ...]:
    """Judge drawn clips, of all colours, shapes, backgrounds and textures, beside damaged copies of themselves.

    A figure that is right or wrong has to be right of the real clip and wrong of the other: the mean of both shares. Of
    a figure with a scale it is the share of pairs in the right order.

    Args:
        width, height, num_frames, fps: Of a clip.
        through: What the autoencoder makes of a clip.
        clips: How many of each.
    """
    singles: list[tuple[Scene, np.ndarray]] = []
    doubles: list[tuple[Scene, np.ndarray]] = []
    for index in range(clips):
        rng = generator(0, "separation", index)
        thing = words.ThingTruth(
            words.SHAPES[index % 3],
            list(words.COLOURS)[index // 2 % 6],
            words.TEXTURES[index // 8 % 3],
            list(words.DIRECTIONS)[(index // 2) % 4],
        )
        truth = Truth(_next(_others(thing.colour), thing.colour, index), (thing,))
        singles.append(_drawn(truth, width, height, num_frames, fps, rng))
        one = replace(thing, motion=None)
        other = replace(
            one, colour=_next(words.COLOURS, one.colour), shape=_next(words.SHAPES, one.shape, index // 3 % 3)
        )
        beside = draw_picture_scene(rng, Truth(truth.background, (one, other)), rich=False)
        doubles.append((beside, np.repeat(beside.render(width, height)[None], num_frames, axis=0)))
    return (
        *_asked_wrongly(singles, CAPTIONS, through, fps),
        *_asked_wrongly(doubles, CAPTIONS_OF_TWO, through, fps),
        *_damaged(singles, through, fps),
    )


def _asked_wrongly(
    drawn: Drawn, captions: Mapping[str, tuple[str, Callable[[Truth], Truth]]], through: Through, fps: float
) -> Iterator[Separation]:
    """Clips beside captions that are not theirs."""
    truths, shown = [scene.truth for scene, _ in drawn], [clip for _, clip in drawn]
    judged = []
    for clips in (shown, [through(clip) for clip in shown]):
        judged.append((clips, [judge(clip, truth, fps) for clip, truth in zip(clips, truths, strict=True)]))
    for figure, (said, change) in captions.items():
        accuracies = []
        for clips, right in judged:
            wrong = [judge(clip, change(truth), fps)[figure] for clip, truth in zip(clips, truths, strict=True)]
            accuracies.append(float(0.5 + 0.5 * np.mean([row[figure] for row in right]) - 0.5 * np.mean(wrong)))
        yield Separation(figure, said, *accuracies, len(drawn), len(truths[0].things))


def _damaged(drawn: Drawn, through: Through, fps: float) -> Iterator[Separation]:
    """Clips beside damaged copies."""
    whole = [[judge(each, scene.truth, fps) for each in (clip, through(clip))] for scene, clip in drawn]
    for figure, (said, damage, rises) in DAMAGES.items():
        in_order = []
        for index, (scene, clip) in enumerate(drawn):
            bad = damage(scene, clip, generator(0, "damage", figure, index))
            after = [judge(each, scene.truth, fps)[figure] for each in (bad, through(bad))]
            changes = [new - old[figure] for new, old in zip(after, whole[index], strict=True)]
            in_order.append([(change if rises else -change) > 0 for change in changes])
        accuracy, decoded = np.mean(in_order, axis=0)
        yield Separation(figure, said, float(accuracy), float(decoded), len(drawn))


def _drawn(
    truth: Truth, width: int, height: int, num_frames: int, fps: float, rng: np.random.Generator
) -> tuple[Scene, np.ndarray]:
    """A clean clip, (T, H, W, 3) uint8, and its scene."""
    scene = draw_video_scene(rng, truth, SECONDS)
    start = max(0.0, SECONDS - (num_frames - 1) / fps) / 2
    return scene, scene.render_clip(width, height, start + np.arange(num_frames) / fps)


def _next(known: Iterable[str], word: str, step: int = 1) -> str:
    """The word `step` places after another in a list that begins again."""
    listed = list(known)
    return listed[((listed.index(word) if word in listed else 0) + step) % len(listed)]


def _others(colour: str) -> list[str]:
    """Backgrounds on which a thing of that colour is seen."""
    return [name for name in words.BACKGROUNDS if name != colour]


def _with_thing(truth: Truth, **changes: str) -> Truth:
    return replace(truth, things=(replace(truth.things[0], **changes), *truth.things[1:]))


def _beside_another(truth: Truth) -> Truth:
    other = replace(truth.things[0], colour=_next(words.COLOURS, truth.things[0].colour))
    return replace(truth, things=(*truth.things, other))


def _with_other_colours(truth: Truth) -> Truth:
    """None of its things in a colour that it has."""
    shown, first = {thing.colour for thing in truth.things}, list(words.COLOURS).index(truth.things[0].colour)
    others = iter(colour for colour in [*words.COLOURS][first:] + [*words.COLOURS][:first] if colour not in shown)
    return replace(truth, things=tuple(replace(thing, colour=next(others)) for thing in truth.things))


def _with_other_shapes(truth: Truth) -> Truth:
    """Of two things that differ in shape, each in the other's."""
    shapes = [thing.shape for thing in reversed(truth.things)]
    if len(set(shapes)) < 2:
        shapes = [_next(words.SHAPES, shape) for shape in shapes]
    changed = (replace(thing, shape=shape) for thing, shape in zip(truth.things, shapes, strict=True))
    return replace(truth, things=tuple(changed))


def _on_another_background(truth: Truth) -> Truth:
    return replace(truth, background=_next(words.BACKGROUNDS, truth.background))


OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
CAPTIONS: Mapping[str, tuple[str, Callable[[Truth], Truth]]] = {
    "colour": ("caption with another colour", _with_other_colours),
    "shape": ("caption with another shape", _with_other_shapes),
    "background": ("caption with another background", _on_another_background),
    "count": ("caption with one thing more", _beside_another),
    "direction": (
        "caption with the opposite direction",
        lambda truth: _with_thing(truth, motion=OPPOSITE[truth.things[0].motion or "left"]),
    ),
}
CAPTIONS_OF_TWO: Mapping[str, tuple[str, Callable[[Truth], Truth]]] = {
    "colour": ("caption with two other colours", _with_other_colours),
    "shape": ("caption with their shapes exchanged, or others", _with_other_shapes),
    "background": ("caption with another background", _on_another_background),
    "count": ("caption with one of both", lambda truth: replace(truth, things=truth.things[:1])),
}


def _blurred(scene: Scene, clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return soften(soften(clip))


def _grainy(scene: Scene, clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _added(clip, np.rint(rng.normal(0, 5, (*clip.shape[:3], 1))))


def _flickering(scene: Scene, clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _added(clip, np.rint(rng.normal(0, 4, (len(clip), 1, 1, 1))))


def _flashing(scene: Scene, clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bare = replace(scene, things=()).render(clip.shape[2], clip.shape[1])
    is_thing = (clip != bare).any(axis=-1, keepdims=True)
    return _added(clip, np.rint(rng.normal(0, 12, (len(clip), 1, 1, 1))) * is_thing)


def _shaking(scene: Scene, clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    shifts = rng.integers(-4, 5, (len(clip), 2))
    return np.stack([np.roll(frame, shift, axis=(0, 1)) for frame, shift in zip(clip, shifts, strict=True)])


def _frozen(scene: Scene, clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.repeat(clip[:1], len(clip), axis=0)


def _backwards(scene: Scene, clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return clip[::-1]


def _stamped(scene: Scene, clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return stamp(clip, 0.2)


def _off_palette(scene: Scene, clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The video set's muted middle: half of all contrast gone."""
    return np.rint(clip.mean(axis=(1, 2), keepdims=True) * 0.5 + clip * 0.5).astype(np.uint8)


DAMAGES: Mapping[str, tuple[str, Damage, bool]] = {  # figure: what was done, how, whether the figure rises
    "watermark": ("half of the video set's watermark", _stamped, True),
    "sharpness": ("blurred", _blurred, False),
    "noise": ("grain of 5 grey levels", _grainy, True),
    "palette": ("half of the contrast", _off_palette, True),
    "speed": ("frozen", _frozen, False),
    "path": ("played backwards", _backwards, False),
    "jitter": ("each frame shifted by up to 4 pixels", _shaking, True),
    "flicker": ("level of each frame off by 4 grey levels", _flickering, True),
    "flash": ("level of the thing off by 12 grey levels", _flashing, True),
}


def _added(frames: np.ndarray, change: np.ndarray) -> np.ndarray:
    return np.clip(frames + change, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Yardstick:
    """Mean figures at the ends of the two indices."""

    video_set: Mapping[str, float]
    image_set: Mapping[str, float]
    unconnected: Mapping[str, float]
    real: Mapping[str, float]
    watermarked: Mapping[str, float]  # of each of these the share of clips that are said to have a watermark

    @classmethod
    def made_for(
        cls,
        truths: Sequence[Truth],
        size: tuple[int, int],
        num_frames: int,
        fps: float,
        through: Through,
    ) -> "Yardstick":
        """Ends for these captions.

        Args:
            truths: Of one moving thing each.
            size: Width and height.
            num_frames, fps: Of a clip.
            through: What the autoencoder makes of a clip.
        """
        ends: dict[str, list[Mapping[str, float]]] = {}
        width, height = size
        for index, truth in enumerate(truths):
            rng = generator(0, "yardstick", index)
            _, clean = _drawn(truth, width, height, num_frames, fps, rng)
            stock = np.stack(list(footage(clean, rng, float(rng.uniform(3, 7)))))
            picture = draw_picture_scene(rng, truth, rich=True).render(width, height)
            others = np.stack([_drawn(truth, width, height, 1, fps, rng)[1][0] for _ in range(num_frames)])
            still = np.repeat(picture[None], num_frames, axis=0)
            made = {"video_set": stock, "image_set": still, "unconnected": others, "real": clean}
            for name, clip in made.items():
                ends.setdefault(name, []).append(judge(through(clip), truth, fps))
        seen = {name: float(np.mean([row["watermark"] > WATERMARKED for row in rows])) for name, rows in ends.items()}
        return cls(**{name: _means(rows) for name, rows in ends.items()}, watermarked=seen)

    def quality(self, figures: Mapping[str, float]) -> float:
        """Index of the look of a clip."""
        return _place(figures, QUALITY, self.video_set, self.image_set)

    def motion(self, figures: Mapping[str, float]) -> float:
        """Index of how a clip moves; of a clip in which nothing was found, 0."""
        if not figures.get("visible"):
            return 0.0
        return _place(figures, MOTION, self.unconnected, self.real)


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in (*QUALITY, *MOTION)}


def _place(
    figures: Mapping[str, float], names: Sequence[str], low: Mapping[str, float], high: Mapping[str, float]
) -> float:
    places = [(figures[name] - low[name]) / (high[name] - low[name]) for name in names if name in figures]
    return float(np.mean(np.clip(places, -1, 2))) if places else 0.0
