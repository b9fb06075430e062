"""Which pixels show the thing a prompt names: boxes by Grounding DINO, masks by SAM 2.

The benchmark's Detection, Count and Color scores look at some frames of a video, in which every pixel is 0 or the
number of an instance; an instance counts where it has a pixel. Grounding DINO (SwinT-OGC; Liu et al. 2023; short side
800 pixels, long side at most 1333) says where the thing is, more probable than 0.6; SAM 2 (Ravi et al. 2024) makes its
boxes masks.

compat follows the program. It looks at every 5th frame and asks the detector in the first of these and in each 9th;
between, instances are tracked. What is found later is new where at least 80 % of it lies on what nothing else holds,
and that is 200 pixels at least; if all that is new covers more than 40 % of the frame, none of it is taken. Two flaws
come along. Of a video of 16 frames only four are looked at, and only the first by the detector: what is not found there
is never found. And new instances are numbered from the highest number there is, not from the next: the first new one
becomes part of an old one, and where there was none before, the first two get number 0 and are lost.

fixed looks at up to 16 frames spread over the whole video and asks the detector in every one: a clip is short, so that
nothing needs to be guessed by tracking, and a thing that appears, leaves or is drawn anew counts where it is seen.
Instances are taken by falling score, by the same rules for size and overlap, so that a second box around one thing does
not count; a thing may be large. Numbers mean nothing beyond a frame.

The program makes masks by SAM ViT-B and tracks them by DeAOT-L, for which there is no package. SAM 2 does both here, in
both modes, so these scores are near the published ones and not the same (`substitute`). A box in which SAM 2 finds
nothing is its own mask.

Shapes: T frames, K frames looked at, N boxes, H x W pixels; frames uint8, red green blue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    Sam2ImageProcessor,
    Sam2VideoModel,
    Sam2VideoProcessor,
    Sam2VideoVideoProcessor,
)
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from vc2.eval.formulas import Mode
from vc2.eval.networks.folders import WEIGHTS, check_folder, filled, opened

__all__ = [
    "DETECTOR_FILES",
    "SEGMENTER_FILES",
    "Boxes",
    "Instances",
    "Mode",
    "ObjectTracker",
    "instances_apart",
    "is_keyframe",
    "label_map",
    "new_instances",
    "sampled_frames",
]

DETECTOR_FILES = ("config.json", WEIGHTS, "tokenizer_config.json", ("tokenizer.json", "vocab.txt"))
SEGMENTER_FILES = ("config.json", WEIGHTS)

STEP, KEYFRAME = 5, 9  # every 5th frame is looked at; on each 9th of these the detector is asked
MOST_FRAMES = 16  # looked at in `fixed`
LEAST_AREA, LEAST_FREE, MOST_NEW = 200, 0.8, 0.4  # pixels; share of an instance; share of the frame
MOST_INSTANCES = 255
BOX_THRESHOLD = 0.6
SHORT_SIDE, LONG_SIDE = 800, 1333


@dataclass(frozen=True, slots=True)
class Boxes:
    """Where the detector sees something in a frame, in the order of its own."""

    corners: np.ndarray  #: (N, 4) float32: left, top, right, bottom, pixels
    scores: np.ndarray  #: (N,) float32


@dataclass(frozen=True, slots=True)
class Instances:
    """Instances in the frames that were looked at."""

    frames: np.ndarray  #: numbers of these frames, (K,)
    masks: np.ndarray  #: 0, or the number of an instance, (K, H, W) uint8

    @property
    def counts(self) -> list[int]:
        """How many instances each of the frames shows."""
        return [len(np.unique(mask[mask > 0])) for mask in self.masks]


# ---- rules without networks ----


def sampled_frames(num_frames: int, mode: Mode) -> np.ndarray:
    """Numbers of the frames looked at: every 5th (compat), or up to 16 from first to last (fixed)."""
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: a video has one frame at least")
    if mode == "compat":
        return np.arange(0, num_frames, STEP)
    return np.linspace(0, num_frames - 1, min(num_frames, MOST_FRAMES)).round().astype(np.int64)


def is_keyframe(place: int) -> bool:
    """Whether the detector is asked in the frame at this place among those looked at (compat)."""
    return place == 0 or (place + 1) % KEYFRAME == 0


def label_map(masks: np.ndarray, first: int = 1) -> np.ndarray:
    """Masks (N, H, W) as one map (H, W) uint8, numbered from `first` on; later ones lie over earlier ones."""
    labels = np.zeros(masks.shape[1:], np.uint8)
    for number, mask in enumerate(masks[: MOST_INSTANCES + 1 - first], first):
        labels[mask > 0] = number
    return labels


def new_instances(tracked: np.ndarray, found: np.ndarray, first: int) -> np.ndarray:
    """What of the instances found is new, (H, W) uint8, numbered from `first` on: to be added to what is tracked.

    Args:
        tracked: Instances that are tracked, (H, W).
        found: Instances that the detector found, in numbers of their own, (H, W).
        first: Number of the first that is new.
    """
    free, new, number = np.where(tracked == 0, found, 0), np.zeros_like(found), first
    for one in np.unique(free[free > 0]):
        area, whole = np.count_nonzero(free == one), np.count_nonzero(found == one)
        if area < LEAST_FREE * whole or area < LEAST_AREA or number > MOST_INSTANCES:
            continue
        new[free == one] = number
        number += 1
    return new if np.count_nonzero(new) <= MOST_NEW * new.size else np.zeros_like(new)


def instances_apart(masks: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Masks (N, H, W) as one map (H, W) uint8 in which everything counts once: by falling score, each without what is
    held already, and not at all if that leaves less than 80 % of it or 200 pixels."""
    labels, number = np.zeros(masks.shape[1:], np.uint8), 1
    for place in np.argsort(-scores, kind="stable"):
        free = (masks[place] > 0) & (labels == 0)
        area = np.count_nonzero(free)
        if area < LEAST_FREE * np.count_nonzero(masks[place]) or area < LEAST_AREA or number > MOST_INSTANCES:
            continue
        labels[free] = number
        number += 1
    return labels


def _rounded(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Corners cut down to whole pixels inside the frame, (N, 4) int64."""
    return np.clip(np.trunc(corners), 0, [width, height, width, height]).astype(np.int64)


# ---- networks ----


class ObjectTracker:
    """Finds, cuts out and follows what a phrase names.

    Args:
        detector: Grounding DINO.
        tokenizer: Its text's.
        segmenter: SAM 2.
        short_side, long_side: To which frames are scaled for the detector: the shorter to `short_side`, unless the
            longer would exceed `long_side`. Pixels.
        box_threshold: The least probability of a box.
    """

    substitute = "SAM 2 for SAM ViT-B and DeAOT-L"  #: what is not as published

    def __init__(
        self,
        detector: GroundingDinoForObjectDetection,
        tokenizer: Any,
        segmenter: Sam2VideoModel,
        *,
        short_side: int = SHORT_SIDE,
        long_side: int = LONG_SIDE,
        box_threshold: float = BOX_THRESHOLD,
    ) -> None:
        self._detector, self._tokenizer, self._segmenter = detector, tokenizer, segmenter
        self._scaled = GroundingDinoImageProcessor(size={"shortest_edge": short_side, "longest_edge": long_side})
        self._box_threshold = box_threshold

    @classmethod
    def load(
        cls,
        detector_folder: Path,
        segmenter_folder: Path,
        device: torch.device,
        *,
        short_side: int = SHORT_SIDE,
        long_side: int = LONG_SIDE,
        box_threshold: float = BOX_THRESHOLD,
    ) -> Self:
        """Open two folders of the hub's form: `IDEA-Research/grounding-dino-tiny`, `facebook/sam2.1-hiera-tiny` (or
        another size of it).

        Raises:
            PretrainedMissing: If a folder or a file in it is missing.
            WeightsError: If one holds something else.
        """
        check_folder(detector_folder, "Grounding DINO (IDEA-Research/grounding-dino-tiny)", *DETECTOR_FILES)
        check_folder(segmenter_folder, "SAM 2 (facebook/sam2.1-hiera-tiny, or larger)", *SEGMENTER_FILES)
        return cls(
            filled(GroundingDinoForObjectDetection, detector_folder, device),
            opened(AutoTokenizer, detector_folder),
            filled(Sam2VideoModel, segmenter_folder, device),
            short_side=short_side,
            long_side=long_side,
            box_threshold=box_threshold,
        )

    @torch.inference_mode()
    def boxes(self, frames: np.ndarray, phrase: str, *, batch: int = 2) -> list[Boxes]:
        """Where each frame shows what the phrase names.

        Args:
            frames: (T, H, W, 3).
            phrase: A noun such as "traffic light"; capitals and a final dot do not matter.
            batch: Frames on the device at once.
        """
        found: list[Boxes] = []
        for start in range(0, len(frames), batch):
            found += self._boxes(frames[start : start + batch], phrase)
        return found

    def _boxes(self, frames: np.ndarray, phrase: str) -> list[Boxes]:
        height, width = frames.shape[1:3]
        text = phrase.lower().strip().rstrip(".") + "."
        words = self._tokenizer([text] * len(frames), return_tensors="pt", return_token_type_ids=True)
        pixels = self._scaled(list(frames), input_data_format="channels_last", return_tensors="pt")
        inputs = {name: value.to(self._detector.device) for name, value in (*words.items(), *pixels.items())}
        told = self._detector(**inputs)
        scores = told.logits.sigmoid().amax(-1).float().cpu().numpy()
        middles = told.pred_boxes.float().cpu().numpy()
        corners = np.concatenate([middles[..., :2] - middles[..., 2:] / 2, middles[..., :2] + middles[..., 2:] / 2], -1)
        corners *= np.array([width, height, width, height], np.float32)
        kept = scores > self._box_threshold
        return [Boxes(corners[place][kept[place]], scores[place][kept[place]]) for place in range(len(frames))]

    @torch.inference_mode()
    def masks(self, frame: np.ndarray, boxes: Boxes) -> np.ndarray:
        """The thing inside each box of a frame (H, W, 3), as a mask, (N, H, W) bool."""
        return _Tracks(self._segmenter, (1, *frame.shape[:2])).look(frame).masks(boxes)

    @torch.inference_mode()
    def track(self, frames: np.ndarray, phrase: str, mode: Mode, *, batch: int = 2) -> Instances:
        """Instances of what the phrase names, in the frames that are looked at.

        Args:
            frames: All frames of a video, (T, H, W, 3).
            phrase: A noun.
            mode: See the top of the module.
            batch: Frames at once in the detector; SAM 2 takes one.
        """
        chosen = sampled_frames(len(frames), mode)
        if mode == "fixed":
            found = self.boxes(frames[chosen], phrase, batch=batch)
            labels = [
                instances_apart(self.masks(frame, boxes), boxes.scores)
                for frame, boxes in zip(frames[chosen], found, strict=True)
            ]
        else:
            labels = self._followed(frames[chosen], phrase, batch)
        return Instances(chosen, np.stack(labels))

    def _followed(self, frames: np.ndarray, phrase: str, batch: int) -> list[np.ndarray]:
        keyframes = [place for place in range(len(frames)) if is_keyframe(place)]
        found = dict(zip(keyframes, self.boxes(frames[keyframes], phrase, batch=batch), strict=True))
        tracks, labels, highest = _Tracks(self._segmenter, frames.shape[:3]), [], 0
        for place, frame in enumerate(frames):
            tracks.look(frame)
            if place == 0:
                now = label_map(tracks.masks(found[place]))
                tracks.follow(now, np.unique(now[now > 0]))
            else:
                now = tracks.labels()
                if place in found:
                    new = new_instances(now, label_map(tracks.masks(found[place]), first=highest), first=highest)
                    now = now + new
                    tracks.follow(now, np.unique(new[new > 0]))
            highest = max(highest, int(now.max(initial=0))) if place in found else highest
            tracks.forget()
            labels.append(now)
        return labels


_NO_PIXELS = torch.empty(0)


class _Tracks:
    """What SAM 2 remembers of a video, one frame after the other; of frames that are past only what it will ask for.

    Args:
        model: SAM 2.
        shape: Of the video: frames, height, width.
    """

    def __init__(self, model: Sam2VideoModel, shape: tuple[int, ...]) -> None:
        side = model.config.image_size
        side = int(side) if isinstance(side, int) else int(side[0])
        self._model, (self._length, self._height, self._width) = model, shape
        self._images = Sam2ImageProcessor(size={"height": side, "width": side})
        self._processor = Sam2VideoProcessor(self._images, Sam2VideoVideoProcessor(), target_size=side)
        self._session, self._place = self._new_session(), -1

    def _new_session(self) -> Sam2VideoInferenceSession:
        device = self._model.device
        session = Sam2VideoInferenceSession(
            video_height=self._height,
            video_width=self._width,
            inference_device=device,
            inference_state_device=device,
            video_storage_device=device,
            dtype=torch.float32,
        )
        session.processed_frames = dict.fromkeys(range(self._length), _NO_PIXELS)  # it asks how many there are
        return session

    def look(self, frame: np.ndarray) -> Self:
        """Go on to the next frame, (H, W, 3)."""
        prepared = self._images([frame], input_data_format="channels_last", return_tensors="pt")
        self._place += 1
        self._frames[self._place] = prepared["pixel_values"][0].to(self._model.device)
        return self

    @property
    def _frames(self) -> dict[int, Tensor]:
        frames = self._session.processed_frames
        assert frames is not None
        return frames

    def masks(self, boxes: Boxes) -> np.ndarray:
        """What is inside boxes of this frame, (N, H, W) bool; followed no further."""
        corners = _rounded(boxes.corners, self._height, self._width)
        masks = np.zeros((len(corners), self._height, self._width), bool)
        if not len(corners):
            return masks
        once = self._new_session()
        once.processed_frames, once.cache = self._frames, self._session.cache  # a frame is encoded once
        self._processor.add_inputs_to_inference_session(
            once, self._place, list(range(len(corners))), input_boxes=[corners.astype(float).tolist()]
        )
        told = self._model(once, frame_idx=self._place, run_mem_encoder=False)
        for mask, logits, (left, top, right, bottom) in zip(masks, told.pred_masks, corners, strict=True):
            mask[:] = (self._full(logits) > 0).cpu().numpy()
            if not mask.any():
                mask[top:bottom, left:right] = True
        return masks

    def follow(self, labels: np.ndarray, numbers: Sequence[int] | np.ndarray) -> None:
        """Follow instances with these numbers from here on, as this frame's labels (H, W) show them."""
        if not len(numbers):
            return
        masks = [torch.from_numpy(labels == number) for number in numbers]
        self._processor.add_inputs_to_inference_session(
            self._session, self._place, [int(number) for number in numbers], input_masks=masks
        )
        self._model(self._session, frame_idx=self._place)

    def labels(self) -> np.ndarray:
        """Where the instances that are followed are in this frame, (H, W) uint8."""
        labels = torch.zeros((self._height, self._width), dtype=torch.uint8, device=self._model.device)
        if self._session.get_obj_num():
            told = self._model(self._session, frame_idx=self._place)
            best = torch.zeros_like(labels, dtype=torch.float32)
            for number, logits in zip(told.object_ids, told.pred_masks, strict=True):
                full = self._full(logits)
                labels[full > best] = number
                best = torch.maximum(best, full)
        return labels.cpu().numpy()

    def _full(self, logits: Tensor) -> Tensor:
        """Logits of a mask (1, h, w) at the size of the frame, (H, W)."""
        size = (self._height, self._width)
        return F.interpolate(logits[None].float(), size, mode="bilinear", align_corners=False)[0, 0]

    def forget(self) -> None:
        """Drop what no later frame will ask for, so that a long video takes no more memory than a short one."""
        config, session = self._model.config, self._session
        oldest = self._place - max(config.num_maskmem, config.max_object_pointers_in_encoder)
        self._frames[self._place] = _NO_PIXELS
        for outputs in session.output_dict_per_obj.values():
            past = outputs["non_cond_frame_outputs"]
            for place in [place for place in past if place < oldest]:
                del past[place]
            for output in (*past.values(), *outputs["cond_frame_outputs"].values()):
                output.pop("high_res_masks", None)
