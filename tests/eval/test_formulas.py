"""The metrics' arithmetic agrees with recorded inputs and outputs, and behaves on made ones as its meaning demands."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vc2.eval import formulas
from vc2.eval.formulas import NoValue
from vc2.seeding import generator

GOLDEN = Path(__file__).parent.parent / "reference" / "evalcrafter" / "golden"


def arrays(name: str) -> Any:
    return np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


def cases(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["embed_0", "embed_1"])
def test_cosines_are_those_recorded(name: str) -> None:
    case = arrays(name)
    frames = case["frame_embeddings"]
    assert formulas.clip_score(frames, case["text_embedding"]) == pytest.approx(float(case["clip_score"]), abs=1e-6)
    assert formulas.clip_temp(frames) == pytest.approx(float(case["clip_temp"]), abs=1e-6)
    assert formulas.face_consistency(frames) == pytest.approx(float(case["face_consistency"]), abs=1e-6)
    sd = formulas.sd_score(frames, case["reference_image_embeddings"])
    assert sd == pytest.approx(float(case["sd_score"]), abs=1e-6)


@pytest.mark.parametrize("name", ["flow_0", "flow_1", "flow_2", "flow_padded"])
def test_flow_is_that_recorded(name: str) -> None:
    case = arrays(name)
    flow = formulas.flow_score(case["flows"])
    assert flow == pytest.approx(float(case["flow_score"]), abs=1e-5)
    if "ac_large" in case:
        assert formulas.motion_ac(flow, "large", "compat") == case["ac_large"]
        assert formulas.motion_ac(flow, "slow", "compat") == case["ac_slow"]


@pytest.mark.parametrize("name", ["warp_0", "warp_1", "warp_2"])
def test_warping_error_and_occlusion_are_those_recorded(name: str) -> None:
    case = arrays(name)
    error = formulas.warping_error(case["frames"], case["flows_fw"], case["flows_bw"])
    assert error == pytest.approx(float(case["warping_error"]), abs=1e-5)
    hidden = formulas.occluded(case["flows_fw"][0], case["flows_bw"][0])
    assert (hidden == case["occlusion_first_pair"].astype(bool)).all()


@pytest.mark.parametrize("name", ["is_0", "is_1"])
def test_inception_score_is_that_recorded(name: str) -> None:
    case = arrays(name)
    mean, deviation = formulas.inception_score(case["probs"], int(case["splits"]))
    assert mean == pytest.approx(float(case["is_mean"]), abs=1e-4)
    assert deviation == pytest.approx(float(case["is_std"]), abs=1e-4)


@pytest.mark.parametrize("case", cases("blip_bleu"), ids=lambda case: case["prompt"])
def test_bleu_is_that_recorded_and_the_mean_over_captions_is_less(case: Any) -> None:
    assert formulas.blip_bleu(case["prompt"], case["captions"], "compat") == pytest.approx(case["blip_bleu"], abs=1e-9)
    assert formulas.blip_bleu(case["prompt"], case["captions"], "fixed") < case["blip_bleu"]


@pytest.mark.parametrize("case", cases("ocr"), ids=lambda case: case["target"])
def test_reading_errors_are_those_recorded(case: Any) -> None:
    assert formulas.ocr_error(case["target"], case["frames"], "compat") == pytest.approx(case["ocr_error"], abs=1e-9)
    for lines, recorded in zip(case["frames"], case["per_frame_ned_cer_wer"], strict=True):
        assert formulas.ocr_frame_error(case["target"], lines, "compat") == pytest.approx(recorded, abs=1e-9)


def test_who_writes_nothing_is_perfect_only_for_the_published_program() -> None:
    assert formulas.ocr_error("START", [None, None], "compat") == 0.0
    assert formulas.ocr_error("START", [None, []], "fixed") == 1.0
    assert formulas.ocr_error("KEEP OFF", [["KEEP", "OFF"]], "fixed") == 0.0
    assert formulas.ocr_error("KEEP OFF", [["KEEP", "OFF"]], "compat") > 0.0
    assert formulas.ocr_error("A", [["something else altogether"]], "fixed") <= 1.0


@pytest.mark.parametrize("case", cases("count"), ids=lambda case: case["label"])
def test_counts_are_scored_as_recorded(case: Any) -> None:
    wanted = int(case["label"].split()[0])
    assert formulas.count_score(case["per_frame_counts"], wanted) == pytest.approx(case["count_score"])


def test_detections_are_scored_as_recorded() -> None:
    recorded = cases("detection")
    scores = [formulas.detection_score(query["per_frame_counts"]) for query in recorded["queries"]]
    assert scores == [query["score"] for query in recorded["queries"]]
    assert np.mean(scores) == pytest.approx(recorded["average"])


@pytest.mark.parametrize("case", cases("color"), ids=lambda case: case["label"])
def test_colours_are_scored_as_recorded(case: Any) -> None:
    stored, wanted = arrays("color"), case["label"].split()[0]
    frames, masks = stored[f"frames_{case['case']}"], stored[f"masks_{case['case']}"]
    assert formulas.color_score(frames, masks, wanted, "compat") == pytest.approx(case["color_score"])
    assert formulas.color_score(frames, masks, wanted, "fixed") == 1.0  # all six have the colour of their label


def test_a_colour_is_not_changed_by_the_number_of_the_instance() -> None:
    frame, mask = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8), 2, np.uint8)
    frame[...] = (40, 200, 40)
    assert formulas.color_score(frame, mask, "green", "fixed") == 1.0
    assert formulas.color_score(frame, mask, "green", "compat") == 0.0
    assert formulas.color_score(frame, 0 * mask, "red", "compat") == 1.0  # what is not there is red: a flaw
    assert formulas.color_score(frame, 0 * mask, "red", "fixed") == 0.0


def test_celebrities_and_actions_are_scored_as_recorded() -> None:
    faces, action = arrays("celebrity"), arrays("action")
    assert formulas.celebrity_distance(faces["distances"]) == pytest.approx(float(faces["celebrity_distance"]))
    best = np.argsort(-action["class_probs"], kind="stable")[:5]
    assert list(best) == list(action["top5_index"])
    score = formulas.action_score(
        action["class_probs"][best], action["top5_label_embeddings"], action["target_embedding"]
    )
    assert score == pytest.approx(float(action["action_score"]), abs=1e-6)


# ---- laws ----


def texture(height: int = 64, width: int = 96) -> np.ndarray:
    return generator(5, "texture").integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_a_still_video_has_no_flow_and_no_warping_error() -> None:
    frames = np.stack([texture()] * 3)
    still = np.zeros((2, 2, 32, 48))
    assert formulas.flow_score(still) == 0.0
    assert formulas.warping_error(frames, still, still) == 0.0


def test_a_translated_texture_warped_by_its_flow_has_no_error_inside() -> None:
    """Moved by four pixels at full size, two at half size; what leaves the frame is clamped and occluded or wrong."""
    first = texture()
    frames = np.stack([first, np.roll(first, 4, axis=1)])
    small = formulas.half_size(frames / 255.0)
    flow = np.zeros((2, 32, 48))
    flow[0] = 2
    warped = formulas.warp(small[1].transpose(2, 0, 1), flow)
    assert np.abs(warped[:, :, :-2] - small[0].transpose(2, 0, 1)[:, :, :-2]).max() < 1e-12
    assert formulas.flow_score(flow[None]) == 2.0


def test_swapped_frames_lower_consistency() -> None:
    start, end = generator(1, "embeddings").normal(size=(2, 32))
    path = np.stack([(1 - t) * start + t * end for t in np.linspace(0, 1, 8)])
    assert formulas.clip_temp(path[[0, 4, 1, 5, 2, 6, 3, 7]]) < formulas.clip_temp(path)


def test_a_video_of_one_frame_has_no_motion_and_says_so() -> None:
    one = np.ones((1, 8))
    for formula in (formulas.clip_temp, formulas.face_consistency):
        with pytest.raises(NoValue, match="needs two frames, has 1"):
            formula(one)
    with pytest.raises(NoValue, match="two frames"):
        formulas.flow_score(np.zeros((0, 2, 8, 8)))
    with pytest.raises(NoValue, match="two frames"):
        formulas.warping_error(np.zeros((1, 16, 16, 3), np.uint8), np.zeros((0, 2, 8, 8)), np.zeros((0, 2, 8, 8)))


def test_inception_score_is_one_for_equal_frames_and_the_number_of_classes_at_best() -> None:
    assert formulas.inception_score(np.full((50, 7), 1 / 7), 10)[0] == pytest.approx(1.0)
    assert formulas.inception_score(np.tile(np.eye(5), (10, 1)), 10)[0] == pytest.approx(5.0)
    with pytest.raises(NoValue, match="needs 10 frames"):
        formulas.inception_score(np.eye(5), 10)


@pytest.mark.parametrize("shape", [(60, 92), (61, 93), (7, 9)])
def test_odd_sizes_are_halved_and_padded_to_eights(shape: tuple[int, int]) -> None:
    small = formulas.padded(formulas.half_size(np.zeros((2, *shape, 3))))
    assert small.shape[1] % 8 == 0 and small.shape[2] % 8 == 0
    assert small.shape[1] - shape[0] // 2 < 8 and small.shape[2] - shape[1] // 2 < 8
