import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vc2.errors import Vc2Error
from vc2.eval.vbench import (
    DIMENSIONS,
    aesthetic_quality,
    background_consistency,
    dynamic_degree,
    imaging_quality,
    is_static,
    motion_smoothness,
    normalised,
    overall,
    partial_vbench_scores,
    sampled_at_8_fps,
    subject_consistency,
    temporal_flickering,
    vbench_scores,
)

REFERENCE = Path(__file__).parents[1] / "reference" / "evalcrafter"

with open(REFERENCE / "vbench_rows.csv", newline="") as file:
    ROWS = {row["model"]: row for row in csv.DictReader(file)}


def raw_of(model: str) -> dict[str, float]:
    return {name: float(ROWS[model][name]) for name in DIMENSIONS}


# ---- totals ----


def test_constants_are_those_published() -> None:
    """Extremes, weights and groups of all sixteen dimensions are the published ones, in the order of the table."""
    published = json.loads((REFERENCE / "vbench_constants.json").read_text())["dimensions"]
    ours = {
        name: {"min": d.minimum, "max": d.maximum, "weight": d.weight, "group": d.group}
        for name, d in DIMENSIONS.items()
    }
    assert ours == published
    assert list(ours) == list(published)


@pytest.mark.parametrize("model", ROWS)
def test_published_rows_are_reproduced(model: str) -> None:
    """The three scores of every published model follow from its sixteen dimensions to 0.01."""
    scores = vbench_scores(raw_of(model))
    assert scores == pytest.approx({name: float(ROWS[model][name]) for name in scores}, abs=0.01)


def test_videocrafter2_has_its_published_scores() -> None:
    """VideoCrafter2: 82.20 of quality, 73.42 of semantics, 80.44 in all."""
    scores = {name: round(value, 2) for name, value in vbench_scores(raw_of("VideoCrafter-2.0")).items()}
    assert scores == {"quality": 82.20, "semantic": 73.42, "total": 80.44}


def test_normalised_is_zero_at_the_worst_and_one_at_the_best() -> None:
    """A dimension at its published extremes is 0 and 1, and beyond them it is not clipped."""
    worst = normalised({name: 100 * dimension.minimum for name, dimension in DIMENSIONS.items()})
    best = normalised({name: 100 * dimension.maximum for name, dimension in DIMENSIONS.items()})
    assert list(worst.values()) == pytest.approx([0] * 16, abs=1e-12)
    assert list(best.values()) == pytest.approx([1] * 16)
    assert normalised({"scene": 100})["scene"] > 1


def test_names_of_result_files_do_as_well() -> None:
    """Underscores are as good as blanks, and what is no dimension is ignored."""
    raw = raw_of("Gen-2")
    assert vbench_scores({name.replace(" ", "_"): value for name, value in raw.items()} | {"fps": 8.0}) == (
        vbench_scores(raw)
    )


@pytest.mark.parametrize("hole", [None, float("nan"), "", "withheld"])
def test_half_a_table_gives_half_the_scores(hole: object) -> None:
    """A missing dimension withholds its group and the total, with the reason; the other group stands."""
    raw = raw_of("Show-1")
    scores, withheld = partial_vbench_scores(raw | {"scene": hole})  # type: ignore[dict-item]
    assert scores == {"quality": vbench_scores(raw)["quality"]}
    assert withheld == {"semantic": "needs scene", "total": "needs semantic"}


def test_totals_are_refused_without_all_dimensions() -> None:
    """Nothing is imputed: the error names all dimensions that lack."""
    raw = {name: value for name, value in raw_of("Show-1").items() if name not in ("scene", "motion smoothness")}
    with pytest.raises(Vc2Error, match=r"2 of 16 dimensions missing: motion smoothness, scene; .* quality, semantic"):
        vbench_scores(raw)


def test_consistencies_are_averaged_over_frames() -> None:
    """A video of 9 frames has twice the say of one of 5 in the consistencies, and the same in all else."""
    assert overall("subject consistency", [1.0, 0.4], [9, 5]) == pytest.approx((8 * 1.0 + 4 * 0.4) / 12)
    assert overall("imaging quality", [1.0, 0.4], [9, 5]) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="0 values"):
        overall("imaging quality", [], [])


# ---- formulas ----


def video(num_frames: int = 8, height: int = 32, width: int = 48, *, speed: int = 1) -> np.ndarray:
    """A texture that moves to the left by `speed` pixels a frame, (T, H, W, 3) uint8."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (height, width + num_frames * speed, 3), dtype=np.uint8)
    return np.stack([texture[:, t * speed : t * speed + width] for t in range(num_frames)])


def halfway(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The simplest interpolation there is."""
    return (before / 255 + after / 255) / 2


@pytest.mark.parametrize("consistency", [subject_consistency, background_consistency])
def test_still_video_is_consistent(consistency) -> None:
    """Frames that are all alike have consistency 1, whatever the length of their feature."""
    feature = np.random.default_rng(0).normal(size=16)
    assert consistency(np.stack([feature, 3 * feature, feature])) == pytest.approx(1)
    assert consistency(np.stack([feature, feature])) == pytest.approx(1)


def test_consistency_is_the_mean_of_previous_and_first() -> None:
    """Each frame after the first counts by its cosines to the one before and to the first, and none below 0."""
    features = np.array([[1.0, 0.0], [1.0, 1.0], [-1.0, 1.0]])
    cosines = [(0.5**0.5 + 0.5**0.5) / 2, (0.0 + 0.0) / 2]  # the last: at right angles, and more than that
    assert subject_consistency(features) == pytest.approx(np.mean(cosines))


def test_shuffled_frames_are_less_consistent() -> None:
    """Features that turn slowly are more alike in their order than in any other that keeps the first."""
    angles = np.linspace(0, 1, 12)
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    shuffled = features[[0, *(1 + np.random.default_rng(0).permutation(11))]]
    assert subject_consistency(shuffled) < subject_consistency(features)


def test_blank_features_are_like_nothing() -> None:
    """A feature of zeros has no direction: its cosines are 0, not NaN."""
    assert subject_consistency(np.zeros((3, 4))) == 0


def test_still_video_does_not_flicker() -> None:
    """A still video has 1, one that jumps from black to white each frame 0."""
    still = np.repeat(video(1), 5, axis=0)
    assert temporal_flickering(still) == 1
    flashing = np.zeros_like(still)
    flashing[::2] = 255
    assert temporal_flickering(flashing) == 0


def test_flicker_is_the_mean_difference_of_neighbours() -> None:
    """One level between neighbours costs 1 / 255, upwards as downwards."""
    frames = np.full((3, 5, 7, 3), 10, np.uint8)
    frames[1] += 1
    assert temporal_flickering(frames) == pytest.approx(1 - 1 / 255)


def test_still_video_is_smooth() -> None:
    """A still video is predicted by its neighbours: 1 where colours are rounded, less than a level below where cut."""
    still = np.repeat(video(1), 6, axis=0)
    assert motion_smoothness(still, halfway, mode="fixed") == 1
    assert 1 - 1 / 255 <= motion_smoothness(still, halfway) <= 1


def test_published_smoothness_cuts_colours() -> None:
    """In compat an interpolated 100.9 is 100, in fixed 101."""
    frames = np.full((3, 4, 4, 3), 101, np.uint8)

    def almost(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return np.full(before.shape, 100.9 / 255)

    assert motion_smoothness(frames, almost, mode="compat") == pytest.approx(1 - 1 / 255)
    assert motion_smoothness(frames, almost, mode="fixed") == 1


@pytest.mark.parametrize("num_frames", [7, 8])
def test_every_second_frame_is_predicted_from_those_around_it(num_frames: int) -> None:
    """Frames 1, 3, 5 are compared with what lies between 0, 2, 4, 6; the eighth has no later neighbour."""
    frames = np.arange(num_frames, dtype=np.uint8)[:, None, None, None] * np.full((1, 2, 3, 3), 10, np.uint8)
    seen = []

    def watching(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        seen.extend(zip(before[:, 0, 0, 0].tolist(), after[:, 0, 0, 0].tolist(), strict=True))
        return halfway(before, after)

    frames[7:] = 255  # would cost much if it were looked at
    assert motion_smoothness(frames, watching, mode="fixed") == 1
    assert seen == [(0, 20), (20, 40), (40, 60)]


def flows_of(lengths: list[float], height: int = 256, width: int = 320) -> list[np.ndarray]:
    """Flow that is 0 but for its largest twentieth, of that mean length."""
    flows = []
    for length in lengths:
        flow = np.zeros((2, height * width))
        flow[0, : height * width // 20] = 0.6 * length
        flow[1, : height * width // 20] = 0.8 * length
        flows.append(flow.reshape(2, height, width))
    return flows


SIZE = {"height": 256, "width": 320}


def test_still_video_is_not_dynamic() -> None:
    """Without flow a video is not dynamic."""
    assert dynamic_degree(flows_of([0.0] * 7), num_frames=8, **SIZE) == 0


def test_a_quarter_of_the_pairs_must_move() -> None:
    """Of 16 frames, four pairs above 6 pixels make a video dynamic and three do not; 6 itself is not above."""
    moving, slow = 6.01, 5.99
    assert dynamic_degree(flows_of([moving] * 4 + [slow] * 11), num_frames=16, **SIZE) == 1
    assert dynamic_degree(flows_of([moving] * 3 + [slow] * 12), num_frames=16, **SIZE) == 0


def test_the_threshold_goes_with_the_short_side() -> None:
    """Twice the size asks for twice the motion."""
    lengths = [7.0] * 15
    assert dynamic_degree(flows_of(lengths), num_frames=16, height=256, width=512) == 1
    assert dynamic_degree(flows_of(lengths), num_frames=16, height=512, width=512) == 0


def test_no_more_flow_is_asked_for_than_decides() -> None:
    """The flow of a video that moves is not computed to its end."""
    asked = []

    def flows() -> Iterator[np.ndarray]:
        for number, flow in enumerate(flows_of([9.0] * 15)):
            asked.append(number)
            yield flow

    assert dynamic_degree(flows(), num_frames=16, **SIZE) == 1
    assert asked == [0, 1, 2, 3]


def test_two_still_frames_are_called_moving_in_compat_only() -> None:
    """A quarter of two frames rounds to no pair at all, a flaw that fixed mends."""
    still = flows_of([0.0])
    assert dynamic_degree(still, num_frames=2, mode="compat", **SIZE) == 1
    assert dynamic_degree(still, num_frames=2, mode="fixed", **SIZE) == 0


@pytest.mark.parametrize(("fps", "step"), [(4, 1), (8, 1), (10, 1), (16, 2), (24, 3), (30, 4)])
def test_about_eight_frames_a_second_are_looked_at(fps: float, step: int) -> None:
    """Frames are left out of fast videos, and none is added to slow ones."""
    assert list(sampled_at_8_fps(16, fps)) == list(range(0, 16, step))


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_a_frame_rate_is_needed(fps: float) -> None:
    """Without a frame rate there is no choosing of frames."""
    with pytest.raises(ValueError, match="frame rate"):
        sampled_at_8_fps(16, fps)


def test_static_filter() -> None:
    """Kept are still videos, and those with one jump that ends where it began; drift and much motion are not."""
    none, jump = [0.0] * 15, [9.0] + [0.0] * 14
    assert is_static(flows_of([*none, 0.0, 0.0]), num_frames=16, **SIZE)
    assert is_static(flows_of([*jump, 0.0, 0.0]), num_frames=16, **SIZE)
    assert not is_static(flows_of([*none, 0.0, 40.0]), num_frames=16, **SIZE)
    assert not is_static(flows_of([9.0] * 3 + [0.0] * 14), num_frames=16, **SIZE)


def test_scores_of_frames_are_averaged_as_fractions() -> None:
    """Aesthetic scores are of 10, technical ones of 100."""
    assert aesthetic_quality(np.array([4.0, 6.0])) == pytest.approx(0.5)
    assert imaging_quality(np.array([40.0, 60.0])) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (lambda: subject_consistency(np.ones((1, 4))), "needs two frames, has 1"),
        (lambda: subject_consistency(np.ones(4)), r"features are \(4,\)"),
        (lambda: background_consistency(np.full((2, 4), np.nan)), "not finite"),
        (lambda: temporal_flickering(video(1)), "needs two frames, has 1"),
        (lambda: temporal_flickering(video(2).astype(float)), "expected uint8"),
        (lambda: motion_smoothness(video(2), halfway), "needs three frames, has 2"),
        (lambda: motion_smoothness(video(5), lambda before, after: before[:1] / 255.0), "one between every two"),
        (lambda: dynamic_degree([], num_frames=1, height=8, width=8), "needs two frames at 8 a second, has 1"),
        (lambda: dynamic_degree([np.zeros((2, 3, 3))], num_frames=4, height=3, width=3), "too small"),
        (lambda: dynamic_degree([np.zeros((3, 3, 2))], num_frames=4, height=3, width=3), r"expected \(2, H, W\)"),
        (lambda: is_static([], num_frames=1, height=8, width=8), "needs two frames, has 1"),
        (lambda: is_static(flows_of([0.0]), num_frames=2, **SIZE), "1 flows of 2 frames, expected 3"),
        (lambda: aesthetic_quality(np.array([])), "needs one frame, has 0"),
        (lambda: imaging_quality(np.array([np.inf])), "not finite"),
    ],
)
def test_what_cannot_be_measured_says_why(what, reason: str) -> None:
    """A video too short for a dimension, or numbers that are none, give an error with the reason."""
    with pytest.raises(ValueError, match=reason):
        what()


def test_blank_and_odd_sized_videos_have_results() -> None:
    """Black frames of 7 x 5 pixels are measured as any others."""
    blank = np.zeros((7, 7, 5, 3), np.uint8)
    assert temporal_flickering(blank) == 1
    assert motion_smoothness(blank, halfway) == 1
    assert dynamic_degree(np.zeros((6, 2, 7, 5)), num_frames=7, height=7, width=5) == 0
