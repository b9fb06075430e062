"""Every judge tells real clips from damaged ones, at the size at which the miniature model makes them."""

import numpy as np
import pytest
from PIL import Image

from vc2.miniature import scene as words
from vc2.miniature.degrade import footage, soften, stamp
from vc2.miniature.judges import RIGHTS, judge
from vc2.miniature.scene import DIRECTIONS, SHAPES, ThingTruth, Truth, draw_picture_scene, draw_video_scene
from vc2.seeding import generator

COUNT = 24
FPS = 8.0
OTHER = {"red": "blue", "green": "yellow", "blue": "green", "yellow": "red"}
NEXT = {"circle": "square", "square": "triangle", "triangle": "circle"}


@pytest.fixture(scope="module")
def truths() -> list[Truth]:
    return [
        Truth(
            words.VIDEO_BACKGROUNDS[(index + index // 4) % 4],
            (
                ThingTruth(
                    SHAPES[index % 3], words.VIDEO_COLOURS[index // 3 % 4], "plain", list(DIRECTIONS)[(index // 2) % 4]
                ),
            ),
        )
        for index in range(COUNT)
    ]


@pytest.fixture(scope="module")
def clean(truths: list[Truth]) -> list[np.ndarray]:
    """Eight frames at 80 x 48 of each."""
    return [_small(_clip(index, truth)) for index, truth in enumerate(truths)]


@pytest.fixture(scope="module")
def stock(truths: list[Truth]) -> list[np.ndarray]:
    """The same as stock footage shows it."""
    return [
        _small(np.stack(list(footage(_clip(index, truth), generator("noise", index), 5.0))))
        for index, truth in enumerate(truths)
    ]


@pytest.mark.parametrize("kind", ["clean", "stock", "blurred"])
def test_real_clips_are_judged_right(kind: str, clean: list, stock: list, truths: list[Truth]) -> None:
    """At least 97 in 100 on each count: clean, as stock footage, and blurred as a small model's samples are."""
    clips = {"clean": clean, "stock": stock, "blurred": [_blur(clip) for clip in stock]}[kind]
    scores = [judge(clip, truth, FPS) for clip, truth in zip(clips, truths, strict=True)]
    assert {name: np.mean([score[name] for score in scores]) >= 0.97 for name in RIGHTS} == dict.fromkeys(RIGHTS, True)


@pytest.mark.parametrize("texture", words.TEXTURES)
@pytest.mark.parametrize("number", [1, 2])
def test_stripes_and_dots_of_a_thing_are_not_counted_as_things(number: int, texture: str) -> None:
    """Of all colours, neighbours in hue and brightness among them: at least 97 in 100."""
    right = []
    for index in range(36):
        rng = generator("count", number, texture, index)
        colours = [str(colour) for colour in rng.permutation(list(words.COLOURS))[:number]]
        grounds = [name for name in words.BACKGROUNDS if name not in colours]
        things = tuple(ThingTruth(SHAPES[index % 3], colour, texture) for colour in colours)
        truth = Truth(grounds[index % len(grounds)], things)
        picture = draw_picture_scene(rng, truth, rich=index % 2 == 0).render(80, 48)
        right.append(judge(picture[None], truth, FPS)["count"])
    assert np.mean(right) >= 0.97


def test_another_colour_is_wrong(clean: list, truths: list[Truth]) -> None:
    assert _mean("colour", clean, [_changed(truth, colour=OTHER[truth.things[0].colour]) for truth in truths]) <= 0.03


def test_another_shape_is_wrong(stock: list, truths: list[Truth]) -> None:
    assert _mean("shape", stock, [_changed(truth, shape=NEXT[truth.things[0].shape]) for truth in truths]) <= 0.03


def test_another_background_is_wrong(stock: list, truths: list[Truth]) -> None:
    other = [
        Truth(words.VIDEO_BACKGROUNDS[words.VIDEO_BACKGROUNDS.index(truth.background) - 1], truth.things)
        for truth in truths
    ]
    assert _mean("background", stock, other) <= 0.03


def test_a_reversed_a_shuffled_and_a_frozen_clip_move_wrongly(stock: list, truths: list[Truth]) -> None:
    assert _mean("direction", [clip[::-1] for clip in stock], truths) == 0
    assert _mean("direction", [np.repeat(clip[:1], 8, axis=0) for clip in stock], truths) <= 0.03
    assert _mean("direction", [clip[[4, 0, 6, 2, 7, 1, 5, 3]] for clip in stock], truths) <= 0.2


def test_an_empty_clip_is_wrong_on_every_count_but_the_background(truths: list[Truth]) -> None:
    for truth in truths[:8]:
        empty = np.full((8, 48, 80, 3), words.BACKGROUNDS[truth.background], np.uint8)
        scores = judge(empty, truth, FPS)
        assert [scores[name] for name in ("colour", "shape", "direction", "visible", "sharpness")] == [0] * 5
        assert scores["background"] == 1


def test_the_speed_is_the_true_speed(clean: list, truths: list[Truth]) -> None:
    for index, (clip, truth) in enumerate(zip(clean, truths, strict=True)):
        speed = _scene(index, truth).things[0].speed
        assert judge(clip, truth, FPS)["speed"] == pytest.approx(speed, rel=0.25)


def test_the_watermark_is_seen_when_it_is_there_and_only_then(clean: list, stock: list, truths: list[Truth]) -> None:
    """The opacity is that of the stamp, within a quarter; never a false alarm."""
    for before, truth in zip(clean[::2], truths[::2], strict=True):
        assert judge(before, truth, FPS)["watermark"] < 0.05
        assert judge(stamp(before), truth, FPS)["watermark"] == pytest.approx(0.42, rel=0.25)
    assert all(judge(clip, truth, FPS)["watermark"] > 0.2 for clip, truth in zip(stock, truths, strict=True))


def test_blur_lowers_sharpness_always(clean: list, truths: list[Truth]) -> None:
    for clip, truth in zip(clean[::2], truths[::2], strict=True):
        assert judge(_blur(clip), truth, FPS)["sharpness"] < 0.6 * judge(clip, truth, FPS)["sharpness"]


def test_flicker_and_noise_are_measured_in_grey_levels(clean: list, truths: list[Truth]) -> None:
    rng = generator("flicker")
    for clip, truth in zip(clean[::3], truths[::3], strict=True):
        level = np.array([0, 12] * 4)[:, None, None, None]
        assert judge(clip, truth, FPS)["flicker"] < 0.1
        assert judge(_add(clip, level), truth, FPS)["flicker"] == pytest.approx(12, rel=0.2)
        grain = np.rint(rng.normal(0, 6, (8, 48, 80, 1)))
        assert judge(clip, truth, FPS)["noise"] < 1
        assert judge(_add(clip, grain), truth, FPS)["noise"] == pytest.approx(6, rel=0.2)


def test_pictures_of_two_things_are_judged_too() -> None:
    """Rich stills at 64 x 64, textures and all: at least nine in ten on each count; direction is not asked."""
    scores = []
    for index in range(24):
        rng = generator("pictures", index)
        colours = rng.permutation(list(words.COLOURS))[: 1 + index % 2]
        things = tuple(
            ThingTruth(SHAPES[(index + i) % 3], str(c), words.TEXTURES[(index // 3 + i) % 3])
            for i, c in enumerate(colours)
        )
        truth = Truth(words.VIDEO_BACKGROUNDS[index % 4], things)
        picture = Image.fromarray(draw_picture_scene(rng, truth, rich=True).render(192, 192)).resize(
            (64, 64), Image.Resampling.BICUBIC
        )
        scores.append(judge(np.asarray(picture)[None], truth, FPS))
    assert "direction" not in scores[0] and "flicker" not in scores[0]
    for name in ("colour", "shape", "background"):
        assert np.mean([score[name] for score in scores]) >= 0.9, name


def _scene(index: int, truth: Truth):
    return draw_video_scene(generator("judged", index), truth, 2.3)


def _clip(index: int, truth: Truth) -> np.ndarray:
    return _scene(index, truth).render_clip(160, 96, 0.5 + np.arange(8) / FPS)


def _small(frames: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(frame).resize((80, 48), Image.Resampling.BICUBIC)) for frame in frames])


def _blur(frames: np.ndarray) -> np.ndarray:
    for _ in range(6):
        frames = soften(frames)
    return frames


def _add(frames: np.ndarray, change: np.ndarray) -> np.ndarray:
    return np.clip(frames + change, 0, 255).astype(np.uint8)


def _changed(truth: Truth, **changes: str) -> Truth:
    (thing,) = truth.things
    known = {"shape": thing.shape, "colour": thing.colour, "texture": thing.texture, "motion": thing.motion}
    return Truth(truth.background, (ThingTruth(**(known | changes)),))


def _mean(name: str, clips: list[np.ndarray], truths: list[Truth]) -> float:
    return float(np.mean([judge(clip, truth, FPS)[name] for clip, truth in zip(clips, truths, strict=True)]))
