import itertools

import numpy as np
import pytest

from vc2.miniature.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    TEXTURES,
    Scene,
    Thing,
    ThingTruth,
    Truth,
    draw_picture_scene,
    draw_video_scene,
    parse_caption,
    shape_cover,
)
from vc2.seeding import generator

THINGS = [ThingTruth(*words) for words in itertools.product(SHAPES, COLOURS, TEXTURES, (None, *DIRECTIONS))]


def test_a_caption_says_all_of_the_truth() -> None:
    """parse_caption is the inverse of caption, for one thing and for two, over every background."""
    for index, thing in enumerate(THINGS):
        background = list(BACKGROUNDS)[index % len(BACKGROUNDS)]
        for truth in (Truth(background, (thing,)), Truth(background, (thing, THINGS[-index]))):
            assert parse_caption(truth.caption()) == truth
            assert Truth.from_json(truth.as_json()) == truth


def test_captions_read_like_english() -> None:
    assert (
        Truth("grey", (ThingTruth("circle", "red", "plain", "right"),)).caption()
        == "a red circle moves right over a grey background"
    )
    pair = (ThingTruth("square", "red", "striped"), ThingTruth("circle", "blue"))
    assert Truth("green", pair).caption() == "a striped red square beside a blue circle over a green background"


def test_words_around_a_caption_are_passed_over() -> None:
    text = 'A Red circle moves left over a navy background, "stock" footage --ar 1:1 --v 5'
    assert parse_caption(text) == Truth("navy", (ThingTruth("circle", "red", "plain", "left"),))


@pytest.mark.parametrize(
    "text", ["", "a red circle", "a mauve circle over a grey background", "red circle over a grey background"]
)
def test_other_text_is_no_caption(text: str) -> None:
    with pytest.raises(ValueError, match="an example"):
        parse_caption(text)


def test_drawing_is_deterministic_at_any_time_and_size() -> None:
    """A frame drawn alone is the frame of the clip."""
    scene = _video_scene(0)
    clip = scene.render_clip(80, 48, [0.0, 0.7, 1.4])
    assert clip.shape == (3, 48, 80, 3) and clip.dtype == np.uint8
    assert np.array_equal(clip[1], scene.render(80, 48, 0.7))
    assert scene.render(33, 57).shape == (57, 33, 3)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_thing_moves_the_way_it_should_by_speed_times_time(direction: str) -> None:
    thing = Thing(ThingTruth("circle", "red", "plain", direction), 0.0, 0.0, 0.3, speed=0.2)
    first, second = Scene("grey", (thing,), contrast=0.0).render_clip(160, 96, [0.0, 1.0]).astype(float)
    moved = (_centre(second) - _centre(first)) / 96
    assert np.allclose(moved, 0.2 * np.array(DIRECTIONS[direction]), atol=0.005)


def test_a_moving_thing_stays_in_sight() -> None:
    for index in range(20):
        scene = _video_scene(index)
        for t in (0.0, 1.2, 2.4):
            x, y = scene.things[0].centre(t)
            assert abs(x) < 0.75 and abs(y) < 0.5


def test_fit_and_crop_to_five_by_three_keeps_places() -> None:
    """A taller frame shows the same middle: a thing keeps its place in units of the frame's width."""
    scene = _video_scene(3)
    tall, flat = scene.render(160, 120), scene.render(160, 96)
    assert np.array_equal(tall[12:-12], flat)


@pytest.mark.parametrize("shape", SHAPES)
def test_templates_have_the_area_and_centre_asked_for(shape: str) -> None:
    cover = shape_cover(shape, 80, 48, 40.0, 24.0, 300.0)
    assert cover.sum() == pytest.approx(300, rel=0.03)
    ys, xs = np.mgrid[:48, :80] + 0.5
    assert (cover * xs).sum() / cover.sum() == pytest.approx(40, abs=0.2)
    assert (cover * ys).sum() / cover.sum() == pytest.approx(24, abs=0.4)


def test_pictures_show_two_things_apart() -> None:
    truth = Truth("brown", (ThingTruth("square", "red"), ThingTruth("circle", "blue")))
    left, right = draw_picture_scene(generator("pair"), truth, rich=True).things
    assert right.x - left.x > (left.size + right.size) / 2


def _video_scene(index: int) -> Scene:
    truth = Truth("grey", (ThingTruth(SHAPES[index % 3], "red", "plain", list(DIRECTIONS)[index % 4]),))
    return draw_video_scene(generator("test scene", index), truth, 2.4)


def _centre(frame: np.ndarray) -> np.ndarray:
    redness = np.clip(frame[..., 0] - frame[..., 1], 0, None)
    ys, xs = np.mgrid[: frame.shape[0], : frame.shape[1]]
    return np.array([(redness * xs).sum(), (redness * ys).sum()]) / redness.sum()
