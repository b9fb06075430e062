"""DOVER's frames and what is made of its raw scores, without its network."""

import json
from pathlib import Path

import numpy as np
import pytest

from vc2.eval.dover_scores import Branch, frame_indices, fused, fused_as_released
from vc2.eval.formulas import Mode

GOLDEN = Path(__file__).parents[1] / "reference/evalcrafter/golden"
SHORT = [1, 2, 7, 16, 31, 33, 63, 64, 95, 191]  # what the published sampler does not do justice to
BRANCHES: list[Branch] = ["aesthetic", "technical"]
MODES: list[Mode] = ["compat", "fixed"]


def indices(branch: Branch, num_frames: int, mode: Mode, seed: int = 0) -> np.ndarray:
    return frame_indices(branch, num_frames, mode, np.random.default_rng(seed))


@pytest.mark.parametrize("case", json.loads((GOLDEN / "dover_frames.json").read_text()), ids=lambda c: c["num_frames"])
@pytest.mark.parametrize("branch", BRANCHES)
def test_frames_are_the_recorded_ones(case: dict, branch: Branch) -> None:
    """In `compat` the published samplers' frames are taken."""
    assert indices(branch, case["num_frames"], "compat").ravel().tolist() == case[branch]


@pytest.mark.parametrize("num_frames", [*SHORT, 192, 500])
@pytest.mark.parametrize("mode", MODES)
def test_every_clip_has_32_frames_of_the_video(num_frames: int, mode: Mode) -> None:
    """Whatever the length, the clips are full and the frames exist."""
    for branch in BRANCHES:
        found = indices(branch, num_frames, mode)
        assert found.shape == ({"aesthetic": 1, "technical": 3}[branch], 32)
        assert found.min() >= 0 and found.max() < num_frames


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("mode", MODES)
def test_places_in_long_videos_are_drawn_within_their_segments(branch: Branch, mode: Mode) -> None:
    """Each segment of a long video gives its own frames, all that may be drawn are, and a seed repeats them."""
    num_frames, segments = 600, {"aesthetic": 32, "technical": 3}[branch]
    length = num_frames // segments
    drawn = np.array([indices(branch, num_frames, mode, seed).reshape(segments, -1) for seed in range(2000)])
    starts = drawn[:, :, 0] - np.arange(segments) * (length if mode == "compat" else num_frames / segments)
    taken = 64 if branch == "technical" else 2
    assert starts.min() > -1 and starts.max() < length + 1 - taken
    assert len(np.unique(drawn[:, 0, 0])) == length - taken
    assert np.array_equal(drawn[3], indices(branch, num_frames, mode, 3).reshape(segments, -1))
    if branch == "technical":
        assert (np.diff(drawn) == 2).all()


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("num_frames", [192, 288, 960])
def test_modes_agree_where_segments_are_whole_and_long(branch: Branch, num_frames: int) -> None:
    """`fixed` mends short and indivisible videos and leaves the others alone."""
    assert np.array_equal(indices(branch, num_frames, "compat", 5), indices(branch, num_frames, "fixed", 5))


@pytest.mark.parametrize("num_frames", SHORT)
def test_fixed_frames_are_spread_over_the_whole_video(num_frames: int) -> None:
    """In `fixed` clips go forward without a wrap, from end to end, and show a short video's frames equally often."""
    stride = max(2, -(-num_frames // 32))
    for found in (indices("aesthetic", num_frames, "fixed"), indices("technical", num_frames, "fixed")):
        steps = np.diff(found)
        assert steps.min() >= 0 and steps.max() < 2 * stride
        assert found.min() < stride and found.max() >= num_frames - stride
        if num_frames <= 32:
            times = [np.bincount(clip, minlength=num_frames) for clip in found]
            assert np.min(times) >= 1 and np.ptp(times) <= 1


def test_published_frames_of_a_short_video_are_its_first_or_every_second() -> None:
    """The flaws that `compat` keeps: the aesthetic branch sees a still, a technical clip half of 16 frames."""
    assert set(indices("aesthetic", 31, "compat").ravel()) == {0}
    assert [len(set(clip)) for clip in indices("technical", 16, "compat")] == [8, 8, 8]


def test_no_frames_are_an_error() -> None:
    """A video without frames has no clips."""
    with pytest.raises(ValueError, match="at least one"):
        indices("aesthetic", 0, "fixed")


def test_fused_scores_are_the_recorded_ones() -> None:
    """The benchmark's constants, and the release's, give the recorded scores."""
    golden = np.load(GOLDEN / "dover_fusion.npz")
    ours = fused(golden["raw_first_second"][:, 0], golden["raw_first_second"][:, 1])
    for name in ("aesthetic", "technical", "overall"):
        assert getattr(ours, name) == pytest.approx(golden[name], abs=1e-6)
    technical, aesthetic = golden["upstream_raw_technical_aesthetic"].T
    assert fused_as_released(aesthetic, technical).overall == pytest.approx(golden["upstream_overall"], abs=1e-6)


def test_the_order_of_the_branches_is_an_argument() -> None:
    """With the technical branch first, its score goes through what the benchmark calls aesthetic."""
    assert fused(-0.08, 0.12, first="technical") == fused(0.12, -0.08)
    assert fused(-0.08, 0.12, first="technical") != fused(-0.08, 0.12)


def test_fused_scores_of_numbers_are_numbers_between_0_and_1() -> None:
    """A mean score gives a half; far off, scores end at 0 and 1 without a warning."""
    assert fused(0.1253, -0.0758) == pytest.approx((0.5, 0.5, 0.5))
    assert fused_as_released(-0.08285, 0.1107) == pytest.approx((0.5, 0.5, 0.5))
    assert fused(-1e4, 1e4)[:2] == (0.0, 1.0)
    assert all(isinstance(value, float) for value in fused(0.1, 0.1))
