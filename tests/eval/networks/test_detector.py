"""Instances in videos: the rules by number, and small networks of random weights in the form that users have."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertTokenizer,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Sam2ImageProcessor,
    Sam2VideoModel,
    Sam2VideoProcessor,
    Sam2VideoVideoProcessor,
)

from tests.eval.small_weights import save_grounding_dino, save_sam2
from vc2.errors import PretrainedMissing, WeightsError
from vc2.eval.networks.detector import (
    Boxes,
    Instances,
    Mode,
    ObjectTracker,
    _Tracks,
    instances_apart,
    is_keyframe,
    label_map,
    new_instances,
    sampled_frames,
)
from vc2.eval.networks.folders import filled, opened

CPU = torch.device("cpu")


def block(top: int, left: int, bottom: int, right: int, size: tuple[int, int] = (40, 50)) -> np.ndarray:
    """A mask that is true inside a rectangle."""
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


# ---- rules ----


@pytest.mark.parametrize(
    ("num_frames", "compat", "fixed"),
    [
        (1, [0], [0]),
        (2, [0], [0, 1]),
        (7, [0, 5], [0, 1, 2, 3, 4, 5, 6]),
        (16, [0, 5, 10, 15], list(range(16))),
        (31, [0, 5, 10, 15, 20, 25, 30], list(range(0, 31, 2))),
        (121, list(range(0, 121, 5)), list(range(0, 121, 8))),
    ],
)
def test_frames_looked_at_are_stated(num_frames: int, compat: list[int], fixed: list[int]) -> None:
    """Every 5th frame as published; in `fixed` up to 16 from first to last."""
    assert sampled_frames(num_frames, "compat").tolist() == compat
    assert sampled_frames(num_frames, "fixed").tolist() == fixed


def test_the_detector_is_asked_first_and_on_each_ninth() -> None:
    """Of the frames looked at these are the 1st, 9th, 18th, 27th: frames 0, 40, 85, 130 of a video."""
    places = [place for place in range(30) if is_keyframe(place)]
    assert places == [0, 8, 17, 26]
    assert sampled_frames(150, "compat")[places].tolist() == [0, 40, 85, 130]


def test_later_masks_lie_over_earlier_ones() -> None:
    """A map has the number of the last mask that covers a pixel; a mask that is covered wholly is not in it."""
    labels = label_map(np.stack([block(0, 0, 10, 10), block(5, 5, 20, 20), block(6, 6, 8, 8), block(0, 0, 20, 20)]))
    assert labels.dtype == np.uint8
    assert (labels[:20, :20] == 4).all() and not labels[20:].any()
    labels = label_map(np.stack([block(0, 0, 10, 10), block(5, 5, 20, 20)]))
    assert labels[0, 0] == 1 and labels[5, 5] == 2 and np.unique(labels).tolist() == [0, 1, 2]
    assert not label_map(np.zeros((0, 4, 4), bool)).any()


def test_only_what_lies_on_free_ground_is_new() -> None:
    """An instance is new from 80 % of free ground on, and only that part of it; 79 % are not enough."""
    tracked = label_map(block(0, 0, 40, 10)[None])
    mostly_free = label_map(block(0, 8, 40, 18)[None])  # 8 of 10 columns are free
    new = new_instances(tracked, mostly_free, first=2)
    assert np.unique(new).tolist() == [0, 2] and np.count_nonzero(new) == 8 * 40
    less_free = label_map(block(0, 7, 40, 17)[None])  # 7 of 10
    assert not new_instances(tracked, less_free, first=2).any()


def test_small_instances_are_not_new() -> None:
    """200 pixels are an instance, 199 are not."""
    nothing = np.zeros((40, 50), np.uint8)
    assert np.count_nonzero(new_instances(nothing, label_map(block(0, 0, 10, 20)[None]), first=1)) == 200
    smaller = block(0, 0, 10, 20)
    smaller[0, 0] = False
    assert not new_instances(nothing, label_map(smaller[None]), first=1).any()


def test_too_much_at_once_is_not_new() -> None:
    """All new instances together may cover 40 % of the frame; beyond that none of them is taken."""
    nothing = np.zeros((40, 50), np.uint8)
    both = np.stack([block(0, 0, 16, 25), block(0, 25, 16, 50)])  # 800 of 2000 pixels
    assert np.unique(new_instances(nothing, label_map(both), first=1)).tolist() == [0, 1, 2]
    both[1, 16, 25] = True
    assert not new_instances(nothing, label_map(both), first=1).any()


def test_new_instances_are_numbered_as_the_program_does() -> None:
    """From the highest number there is: the first new one joins an old one; with none before, two are lost."""
    masks = np.stack([block(0, 0, 15, 15), block(0, 20, 15, 35), block(20, 0, 35, 15)])
    tracked = label_map(block(20, 30, 40, 50)[None])
    new = new_instances(tracked, label_map(masks, first=1), first=1)
    assert np.unique(new).tolist() == [0, 1, 2, 3]
    assert len(np.unique((tracked + new)[tracked + new > 0])) == 3  # four were there
    nothing = np.zeros((40, 50), np.uint8)
    assert np.unique(new_instances(nothing, label_map(masks, first=0), first=0)).tolist() == [0, 1]


def test_gaps_in_numbers_are_closed() -> None:
    """An instance that is not taken leaves no number out."""
    masks = np.stack([block(0, 0, 5, 5), block(0, 20, 15, 35), block(20, 0, 35, 15)])  # the first is too small
    new = new_instances(np.zeros((40, 50), np.uint8), label_map(masks, first=3), first=3)
    assert new[0, 20] == 3 and new[20, 0] == 4 and new[0, 0] == 0


def test_a_thing_counts_once() -> None:
    """Of two masks of one thing the better one is kept, whichever comes first; things side by side both count."""
    one, same, other = block(0, 0, 20, 20), block(1, 1, 20, 20), block(20, 0, 40, 20)
    labels = instances_apart(np.stack([same, other, one]), np.array([0.7, 0.8, 0.9]))
    assert labels[0, 0] == 1 and labels[30, 0] == 2 and np.unique(labels).tolist() == [0, 1, 2]
    assert np.count_nonzero(labels == 1) == 400  # the one with the higher score, whole


def test_a_thing_may_fill_the_frame() -> None:
    """Apart from overlap and 200 pixels there is no limit to the size of a thing."""
    assert (instances_apart(np.ones((1, 40, 50), bool), np.array([0.9])) == 1).all()
    assert not instances_apart(np.ones((1, 14, 14), bool), np.array([0.9])).any()
    assert not instances_apart(np.zeros((0, 40, 50), bool), np.zeros(0)).any()


def test_counts_are_distinct_numbers() -> None:
    """A frame shows as many instances as it has numbers other than 0."""
    masks = np.zeros((3, 4, 4), np.uint8)
    masks[1, 0], masks[2, 0], masks[2, 1] = 7, 7, 9
    assert Instances(np.arange(3), masks).counts == [0, 1, 2]


# ---- networks ----


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_grounding_dino(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def segmenter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sam2(tmp_path_factory.mktemp("segmenter"))


@pytest.fixture(scope="module")
def tracker(detector_folder: Path, segmenter_folder: Path) -> ObjectTracker:
    return ObjectTracker.load(detector_folder, segmenter_folder, CPU, short_side=80, long_side=112, box_threshold=0.5)


def video(num_frames: int, height: int = 50, width: int = 70, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def test_boxes_are_those_of_the_library(tracker: ObjectTracker, detector_folder: Path) -> None:
    """The library's own preparation and post-processing give the same corners and scores."""
    model = filled(GroundingDinoForObjectDetection, detector_folder, CPU)
    processor = GroundingDinoProcessor(tracker._scaled, opened(BertTokenizer, detector_folder))
    frame = video(1)[0]
    inputs = processor(images=frame, text="traffic light.", return_tensors="pt")
    expected = processor.post_process_grounded_object_detection(
        model(**inputs), inputs["input_ids"], threshold=0.5, text_threshold=0.5, target_sizes=[(50, 70)]
    )[0]
    found = tracker.boxes(frame[None], " Traffic light")[0]
    assert len(found.scores) > 1
    assert np.allclose(found.corners, expected["boxes"].numpy(), atol=1e-4)
    assert np.allclose(found.scores, expected["scores"].numpy(), atol=1e-6)


def test_boxes_do_not_depend_on_the_batch(tracker: ObjectTracker) -> None:
    """Frames may be shown to the detector one by one or together."""
    alone, together = (tracker.boxes(video(5), "dog", batch=batch) for batch in (1, 5))
    assert any(len(boxes.scores) for boxes in alone)
    for one, other in zip(alone, together, strict=True):
        assert np.allclose(one.corners, other.corners, atol=1e-3) and np.allclose(one.scores, other.scores, atol=1e-5)


def test_a_threshold_that_nothing_reaches_finds_nothing(detector_folder: Path, segmenter_folder: Path) -> None:
    """No box is no instance, in any frame and mode."""
    strict = ObjectTracker.load(detector_folder, segmenter_folder, CPU, short_side=80, long_side=112, box_threshold=1.0)
    for mode in ("compat", "fixed"):
        assert strict.track(video(16), "dog", mode).counts == [0] * (4 if mode == "compat" else 16)


def test_masks_have_the_size_of_the_frame(tracker: ObjectTracker) -> None:
    """One mask a box; a box in which nothing is seen is its own mask; no boxes, no masks."""
    boxes = Boxes(np.array([[3.7, 4.2, 30.9, 25.5], [40, 10, 69, 49]], np.float32), np.array([0.9, 0.8], np.float32))
    masks = tracker.masks(video(1)[0], boxes)
    assert masks.shape == (2, 50, 70) and masks.dtype == bool and masks.any((1, 2)).all()
    assert tracker.masks(video(1)[0], Boxes(boxes.corners[:0], boxes.scores[:0])).shape == (0, 50, 70)


def test_an_unseen_thing_is_its_box(tracker: ObjectTracker) -> None:
    """Where SAM 2 says that nothing is there, the box counts: cut down to whole pixels inside the frame."""
    score = list(tracker._segmenter.mask_decoder.pred_obj_score_head.parameters())[-1]
    with torch.no_grad():
        score.fill_(-50)
    try:
        corners = np.array([[-3.0, 4.9, 30.9, 25.5]], np.float32)
        masks = tracker.masks(video(1)[0], Boxes(corners, np.array([0.9], np.float32)))
    finally:
        with torch.no_grad():
            score.fill_(50)
    assert (masks[0] == block(4, 0, 25, 30, size=(50, 70))).all()


def test_a_short_clip_is_followed_from_its_first_frame(tracker: ObjectTracker) -> None:
    """Of 16 frames four are looked at; the first shows what the detector found there, the others what was tracked."""
    frames = video(16)
    seen = tracker.track(frames, "dog", "compat")
    assert seen.frames.tolist() == [0, 5, 10, 15]
    assert seen.masks.shape == (4, 50, 70) and seen.masks.dtype == np.uint8
    first = label_map(tracker.masks(frames[0], tracker.boxes(frames[:1], "dog")[0]))
    assert (seen.masks[0] == first).all()
    assert set(np.unique(seen.masks)) <= set(np.unique(first)) | {0}
    assert seen.masks[1:].any()


def test_every_frame_stands_for_itself_in_fixed(tracker: ObjectTracker) -> None:
    """A frame shows the same instances wherever it is in the video."""
    frames = video(8)
    seen, turned = tracker.track(frames, "dog", "fixed"), tracker.track(frames[::-1], "dog", "fixed")
    assert seen.masks.any()
    assert (seen.masks == turned.masks[::-1]).all()


@pytest.mark.parametrize("mode", ["compat", "fixed"])
@pytest.mark.parametrize("shape", [(1, 50, 70), (2, 33, 47), (7, 70, 33), (45, 24, 24), (3, 1, 1)])
def test_any_video_is_looked_at(tracker: ObjectTracker, shape: tuple[int, int, int], mode: Mode) -> None:
    """Short, odd, upright and tiny videos have a map per frame looked at, twice the same, whatever the batch."""
    seen = tracker.track(video(*shape), "dog", mode)
    assert seen.masks.shape == (len(sampled_frames(shape[0], mode)), *shape[1:])
    assert (tracker.track(video(*shape), "dog", mode, batch=1).masks == seen.masks).all()


def test_blank_videos_are_taken(tracker: ObjectTracker) -> None:
    """Black frames give maps like any others."""
    assert tracker.track(np.zeros((16, 40, 60, 3), np.uint8), "dog", "compat").masks.shape == (4, 40, 60)


def test_forgetting_changes_nothing(tracker: ObjectTracker, segmenter_folder: Path) -> None:
    """Tracks of a long video equal those of the library with the whole video and all outputs in memory."""
    frames, start = video(24), label_map(np.stack([block(0, 0, 30, 30, (50, 70)), block(10, 35, 45, 65, (50, 70))]))
    tracks, found = _Tracks(tracker._segmenter, frames.shape[:3]), [start]
    with torch.inference_mode():
        tracks.look(frames[0]).follow(start, [1, 2])
        tracks.forget()
        for frame in frames[1:]:
            found.append(tracks.look(frame).labels())
            tracks.forget()
    assert sum(len(outputs["non_cond_frame_outputs"]) for outputs in tracks._session.output_dict_per_obj.values()) <= 34
    assert not any(pixels.numel() for pixels in tracks._frames.values())

    model = filled(Sam2VideoModel, segmenter_folder, CPU)
    size = {"height": 64, "width": 64}
    processor = Sam2VideoProcessor(Sam2ImageProcessor(size=size), Sam2VideoVideoProcessor(size=size), target_size=64)
    session = processor.init_video_session(video=frames)
    processor.add_inputs_to_inference_session(session, 0, [1, 2], input_masks=[start == 1, start == 2])
    for told in model.propagate_in_video_iterator(session, start_frame_idx=0):
        if told.frame_idx:
            logits = F.interpolate(told.pred_masks.float(), (50, 70), mode="bilinear")[:, 0]
            best = torch.where(logits.amax(0) > 0, logits.argmax(0) + 1, 0).numpy()
            assert (best == found[told.frame_idx]).all()
    assert all({1, 2} <= set(np.unique(labels)) for labels in found)


def test_what_appears_later_is_followed_too(tracker: ObjectTracker) -> None:
    """An instance that comes on the 9th frame, and one that is given there once more, are followed from there on,
    whether or not the past is forgotten."""
    frames = video(30)
    start = label_map(np.stack([block(0, 0, 30, 30, (50, 70)), block(10, 35, 45, 65, (50, 70))]))
    late = np.where(block(35, 0, 50, 30, (50, 70)), 3, np.where(start == 2, 2, 0)).astype(np.uint8)

    def followed(forgets: bool) -> np.ndarray:
        tracks, found = _Tracks(tracker._segmenter, frames.shape[:3]), []
        with torch.inference_mode():
            for place, frame in enumerate(frames):
                tracks.look(frame)
                found.append(tracks.labels())
                if place in (0, 8):
                    tracks.follow(start if place == 0 else late, [1, 2] if place == 0 else [2, 3])
                if forgets:
                    tracks.forget()
        return np.stack(found)

    labels = followed(forgets=True)
    assert (labels == followed(forgets=False)).all()
    assert not (labels[:9] == 3).any() and (labels[9:] == 3).any()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_of_the_detector_is_named(
    detector_folder: Path, segmenter_folder: Path, tmp_path: Path, name: str
) -> None:
    """A folder that lacks a file is refused by the name of that file."""
    lacking = shutil.copytree(detector_folder, tmp_path / "lacking")
    (lacking / name).unlink()
    if name == "tokenizer.json":
        (lacking / "vocab.txt").unlink()
    with pytest.raises(PretrainedMissing, match=rf"lacking.*{re.escape(name)}.*Grounding DINO"):
        ObjectTracker.load(lacking, segmenter_folder, CPU)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_of_the_segmenter_is_named(
    detector_folder: Path, segmenter_folder: Path, tmp_path: Path, name: str
) -> None:
    """The same for SAM 2."""
    lacking = shutil.copytree(segmenter_folder, tmp_path / "lacking")
    (lacking / name).unlink()
    with pytest.raises(PretrainedMissing, match=rf"lacking.*{re.escape(name)}.*SAM 2"):
        ObjectTracker.load(detector_folder, lacking, CPU)


def test_exchanged_folders_are_refused(detector_folder: Path, segmenter_folder: Path, tmp_path: Path) -> None:
    """A network in the place of another is an error, not random numbers."""
    wrong = shutil.copytree(segmenter_folder, tmp_path / "wrong")
    shutil.copy(detector_folder / "model.safetensors", wrong / "model.safetensors")
    with pytest.raises(WeightsError, match="Sam2VideoModel"):
        ObjectTracker.load(detector_folder, wrong, CPU)


@pytest.mark.gpu
def test_the_same_instances_on_a_gpu(detector_folder: Path, segmenter_folder: Path, tracker: ObjectTracker) -> None:
    """CPU and GPU see nearly the same pixels."""
    cuda = torch.device("cuda")
    other = ObjectTracker.load(detector_folder, segmenter_folder, cuda, short_side=80, long_side=112, box_threshold=0.5)
    for mode in ("compat", "fixed"):
        ours, theirs = tracker.track(video(45), "dog", mode), other.track(video(45), "dog", mode)
        assert np.mean(ours.masks != theirs.masks) < 0.02
