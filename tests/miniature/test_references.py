"""Judges are believed only as far as they tell real clips from damaged ones, and indices have the ends they say."""

import itertools

import numpy as np
import pytest

from vc2.miniature.config import WorldConfig
from vc2.miniature.judges import judge
from vc2.miniature.references import MOTION, QUALITY, Yardstick, separation
from vc2.miniature.scene import Truth, draw_picture_scene, draw_video_scene, parse_caption
from vc2.miniature.world import composed_prompts
from vc2.seeding import generator

FPS = 8.0


@pytest.fixture(scope="module")
def yardstick() -> Yardstick:
    words = itertools.product(("red", "blue"), ("left", "up"))
    captions = [f"a {colour} circle moves {way} over a grey background" for colour, way in words]
    truths = [parse_caption(caption) for caption in captions]
    return Yardstick.made_for(truths, (80, 48), 8, FPS, lambda clip: clip)


def test_every_judge_tells_real_clips_from_damaged_ones() -> None:
    """At least 9 in 10 at the size and length of the study, for every figure that the indices and the table need."""
    found = {(one.figure, one.things): one.accuracy for one in separation(80, 48, 8, FPS, lambda clip: clip)}
    figures = {*QUALITY, *MOTION, "colour", "shape", "background", "count", "direction", "flash"}
    assert {(figure, 1) for figure in figures} <= set(found)
    assert {(figure, 2) for figure in ("colour", "shape", "background", "count")} <= set(found)
    assert min(found.values()) >= 0.9, found


def test_what_an_autoencoder_takes_away_is_told_as_accuracy_through_it() -> None:
    """One that forgets where things are leaves chance of all that is said of their motion."""
    found = {
        (one.figure, one.things): one for one in separation(80, 48, 8, FPS, lambda clip: clip[:1].repeat(8, 0), clips=4)
    }
    assert found["speed", 1].accuracy == 1 and found["speed", 1].through == 0
    assert found["direction", 1].accuracy == 1 and found["direction", 1].through == 0.5
    assert found["colour", 1].through == found["colour", 1].accuracy == 1


def test_quality_is_of_the_look_and_not_of_what_is_shown(yardstick: Yardstick) -> None:
    """A picture of the image set has it also where it shows another colour over another background than asked for."""
    shown = parse_caption("a striped yellow square over a navy background")
    asked = parse_caption("a striped blue square over a pink background")
    for index in range(4):
        picture = draw_picture_scene(generator("look", index), shown, rich=True).render(80, 48)[None]
        right, wrong = (yardstick.quality(judge(picture, truth, FPS)) for truth in (shown, asked))
        assert wrong == pytest.approx(right, abs=0.05)


def test_the_indices_are_0_and_1_at_their_ends(yardstick: Yardstick) -> None:
    assert yardstick.quality(yardstick.video_set) == pytest.approx(0)
    assert yardstick.quality(yardstick.image_set) == pytest.approx(1)
    assert yardstick.motion({**yardstick.unconnected, "visible": 1}) == pytest.approx(0)
    assert yardstick.motion({**yardstick.real, "visible": 1}) == pytest.approx(1)
    assert yardstick.motion({**yardstick.real, "visible": 0}) == 0


def test_a_frozen_and_a_shuffled_clip_move_worse_than_a_real_one(yardstick: Yardstick) -> None:
    truth = parse_caption("a green square moves right over a navy background")
    clip = draw_video_scene(generator("yardstick"), truth, 2.3).render_clip(80, 48, 0.5 + np.arange(8) / FPS)
    real, frozen, shuffled = (
        yardstick.motion(judge(frames, truth, FPS))
        for frames in (clip, np.repeat(clip[:1], 8, axis=0), clip[[4, 0, 6, 2, 7, 1, 5, 3]])
    )
    assert real > frozen + 0.2 and real > shuffled + 0.2


def test_composed_prompts_ask_for_what_they_say() -> None:
    rows = composed_prompts(WorldConfig(num_videos=200, num_prompts=24))
    kinds: dict[str, list[Truth]] = {}
    for row in rows:
        assert parse_caption(row["prompt"]) == Truth.from_json(row["truth"])
        kinds.setdefault(row["kind"], []).append(Truth.from_json(row["truth"]))
    assert {kind: len(found) for kind, found in kinds.items()} == dict.fromkeys(
        ("seen", "recombined", "image", "pair"), 6
    )
    assert all(len(truth.things) == 2 for truth in kinds["pair"])
    assert {truth.things[0].colour for truth in kinds["image"]} <= {"cyan", "purple"}
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert composed_prompts(WorldConfig(num_videos=200, num_prompts=24)) == rows
