"""What is done in a video, in 400 words: VideoMAE ViT-B (Tong et al. 2022; V2: Wang et al. 2023), for Action_Score.

The benchmark runs mmaction2 with its recipe for Kinetics-400. Five clips of 16 frames, 4 apart, start evenly spread
over the video. One that is shorter than a clip (61 frames) is looped, so that all five clips are the same: of a video
of 16 frames they see frames 0, 4, 8 and 12, four times. Frames are scaled to a short side of 224 by OpenCV's bilinear
interpolation, and three squares are cut along the longer side: both ends and the middle. The probabilities of the 15
views are averaged.

The published weights are V2's, distilled from ViT-g, and exist in mmaction2's form alone: a file of torch, with the
names of the classes beside it. A folder of transformers serves too (VideoMAE of the first version, with 400 labels).

Shapes: T frames, H x W pixels, uint8, red green blue; V views, S the network's square.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import cv2
import numpy as np
import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from vc2.errors import PretrainedMissing, WeightsError
from vc2.eval.networks.folders import WEIGHTS, check_folder, filled, frozen, opened
from vc2.model.files import Stored, Tensors, files_of_folder, fill, open_weights

__all__ = ["FILES", "LABEL_FILES", "ActionRecogniser", "action_frames", "crop_places", "scaled_size"]

FILES = ("config.json", WEIGHTS)  #: of a folder of transformers
LABEL_FILES = ("labels.txt", "label_map_k400.txt")  #: beside a file of mmaction2, one class a line

CLASSES = 400
CLIPS, CLIP_LENGTH, STRIDE = 5, 16, 4
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
DEVIATION = np.array([58.395, 57.12, 57.375], np.float32)
HEAD_WIDTH = 64  # of all ViTs published so: width 384, 768, 1024 have 6, 12, 16 heads
NORM_EPS = 1e-6


def action_frames(num_frames: int) -> np.ndarray:
    """Numbers of the frames in every clip, (5, 16): mmaction2's `SampleFrames` in test mode.

    Starts are evenly spread, halves rounded to even; numbers beyond the end begin again at the first frame.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: a video has one frame at least")
    latest = max(num_frames - ((CLIP_LENGTH - 1) * STRIDE + 1), 0)
    starts = np.round(np.arange(CLIPS) * (latest / (CLIPS - 1))).astype(np.int64)
    return (starts[:, None] + np.arange(CLIP_LENGTH) * STRIDE) % num_frames


def scaled_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height after scaling the shorter of them to `short_side`, halves rounded up."""
    factor = short_side / min(width, height)
    return int(width * factor + 0.5), int(height * factor + 0.5)


def crop_places(width: int, height: int, side: int) -> list[tuple[int, int]]:
    """Left and top of the three squares, first both ends and then the middle: mmaction2's `ThreeCrop`."""
    across, down = (width - side) // 2, (height - side) // 2
    return [(0, 0), (2 * across, 2 * down), (across, down)]


class ActionRecogniser:
    """Probabilities of the 400 actions of Kinetics.

    Args:
        model: A classifier of clips of 16 frames.
        labels: Names of its classes.
    """

    def __init__(self, model: VideoMAEForVideoClassification, labels: tuple[str, ...]) -> None:
        self._model, self._side = model, _side(model.config)
        self.labels = labels  #: names of the classes, in the order of the probabilities

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """Open a folder of transformers, or a file of mmaction2 (or its folder) with `labels.txt` beside it.

        Raises:
            PretrainedMissing: If it, or a file that belongs to it, is missing.
            WeightsError: If it holds something else, or tells other than 400 classes.
        """
        if path.is_file() or (path.is_dir() and not (path / "config.json").exists() and files_of_folder(path)):
            tensors = open_weights(path)
            labels = _labels_beside(path if path.is_dir() else path.parent)
            model = frozen(_from_mmaction(tensors), device)
        else:
            check_folder(
                path, "VideoMAE for Kinetics-400 (such as MCG-NJU/videomae-base-finetuned-kinetics), or a file", *FILES
            )
            config = opened(VideoMAEConfig, path)
            labels = tuple(str(config.id2label[number]) for number in sorted(config.id2label))
            if re.fullmatch(r"LABEL_\d+", labels[0]):
                raise WeightsError(f"{path}: config.json names no classes; expected the 400 of Kinetics in id2label")
            model = filled(VideoMAEForVideoClassification, path, device)
        config = model.config
        if not len(labels) == config.num_labels == CLASSES:
            raise WeightsError(
                f"{path}: {config.num_labels} classes and {len(labels)} names; expected the {CLASSES} of Kinetics"
            )
        if config.num_frames != CLIP_LENGTH:
            raise WeightsError(f"{path}: takes clips of {config.num_frames} frames; expected {CLIP_LENGTH}")
        return cls(model, labels)

    @torch.inference_mode()
    def probabilities(self, frames: np.ndarray, *, batch: int = 5) -> np.ndarray:
        """Probabilities of the classes, (400,) float64, averaged over clips and crops.

        Args:
            frames: All frames of a video, (T, H, W, 3).
            batch: Views on the device at once.
        """
        clips, repeats = np.unique(action_frames(len(frames)), axis=0, return_counts=True)  # equal clips once
        size = scaled_size(frames.shape[2], frames.shape[1], self._side)
        seen = np.unique(clips)
        small = {number: cv2.resize(frames[number], size, interpolation=cv2.INTER_LINEAR) for number in seen}
        places = list(dict.fromkeys(crop_places(*size, self._side)))  # of a square video all are one
        views = [(clip, place) for clip in clips for place in places]
        found = [
            self._probabilities([self._view(small, *view) for view in views[start : start + batch]])
            for start in range(0, len(views), batch)
        ]
        by_clip = np.concatenate(found).reshape(len(clips), len(places), -1).mean(1)
        return np.average(by_clip, axis=0, weights=repeats)

    def _view(self, small: Mapping[int, np.ndarray], clip: np.ndarray, place: tuple[int, int]) -> np.ndarray:
        left, top = place
        return np.stack([small[number][top : top + self._side, left : left + self._side] for number in clip])

    def _probabilities(self, views: list[np.ndarray]) -> np.ndarray:
        pixels = torch.from_numpy((np.stack(views) - MEAN) / DEVIATION).to(self._model.device)
        logits = self._model(pixels.permute(0, 1, 4, 2, 3)).logits  # (V, 16, 3, S, S)
        return logits.double().softmax(-1).cpu().numpy()


def _side(config: VideoMAEConfig) -> int:
    size = config.image_size
    return int(size) if isinstance(size, int) else int(size[0])


# ---- files of mmaction2 ----

# Their names, and those of transformers. Queries, keys and values are one tensor there, of which keys have no bias.
_NAMES = (
    (r"backbone\.patch_embed\.projection\.", "videomae.embeddings.patch_embeddings.projection."),
    (r"backbone\.blocks\.(\d+)\.norm1\.", r"videomae.encoder.layer.\1.layernorm_before."),
    (r"backbone\.blocks\.(\d+)\.norm2\.", r"videomae.encoder.layer.\1.layernorm_after."),
    (r"backbone\.blocks\.(\d+)\.attn\.q_bias$", r"videomae.encoder.layer.\1.attention.attention.query.bias"),
    (r"backbone\.blocks\.(\d+)\.attn\.v_bias$", r"videomae.encoder.layer.\1.attention.attention.value.bias"),
    (r"backbone\.blocks\.(\d+)\.attn\.proj\.", r"videomae.encoder.layer.\1.attention.output.dense."),
    (r"backbone\.blocks\.(\d+)\.mlp\.layers\.0\.0\.", r"videomae.encoder.layer.\1.intermediate.dense."),
    (r"backbone\.blocks\.(\d+)\.mlp\.layers\.1\.", r"videomae.encoder.layer.\1.output.dense."),
    (r"backbone\.fc_norm\.", "fc_norm."),
    (r"cls_head\.fc_cls\.", "classifier."),
)
_QKV = re.compile(r"backbone\.blocks\.(\d+)\.attn\.qkv\.weight")
_PLACES = "backbone.pos_embed"  # sines, which transformers makes itself


def _translated(tensors: Tensors) -> Tensors:
    """The same tensors under the names of transformers, unread; what has no name there keeps its own."""
    stored: dict[str, Stored] = {}
    for name, entry in tensors.stored.items():
        if match := _QKV.fullmatch(name):
            for part, kind in enumerate(("query", "key", "value")):
                stored[f"videomae.encoder.layer.{match[1]}.attention.attention.{kind}.weight"] = _third(entry, part)
        elif name != _PLACES:
            for pattern, ours in _NAMES:
                name, count = re.subn(f"^{pattern}", ours, name)
                if count:
                    break
            stored[name] = entry
    return Tensors(stored, what=tensors.what, path=tensors.path)


def _third(entry: Stored, part: int) -> Stored:
    rows = entry.shape[0] // 3
    return Stored((rows, *entry.shape[1:]), entry.dtype, lambda: entry.read()[part * rows : (part + 1) * rows])


def _from_mmaction(tensors: Tensors) -> VideoMAEForVideoClassification:
    patches, head, places = (
        tensors.shapes.get(name, ())
        for name in ("backbone.patch_embed.projection.weight", "cls_head.fc_cls.weight", _PLACES)
    )
    if len(patches) != 5 or len(head) != 2 or len(places) != 3:
        raise WeightsError(
            f"{tensors.what}: not VideoMAE of mmaction2; expected its patches, places and head under the names "
            f"backbone.patch_embed.projection.weight, {_PLACES}, cls_head.fc_cls.weight"
        )
    width, _, tubelet, patch, _ = patches
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"backbone\.blocks\.(\d+)\.", name))}
    inner = tensors.shapes.get("backbone.blocks.0.mlp.layers.0.0.weight", (4 * width,))
    across = math.isqrt(places[1] * tubelet // CLIP_LENGTH)
    config = VideoMAEConfig(
        image_size=across * patch,
        patch_size=patch,
        tubelet_size=tubelet,
        num_frames=CLIP_LENGTH,
        hidden_size=width,
        num_hidden_layers=len(blocks),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        intermediate_size=inner[0],
        layer_norm_eps=NORM_EPS,
        num_labels=head[0],
    )
    model = VideoMAEForVideoClassification(config)
    assert model.fc_norm is not None
    model.fc_norm.eps = NORM_EPS  # transformers leaves it at torch's 1e-5
    fill(model, _translated(tensors), what=tensors.what, cause="it is no VideoMAE of mmaction2")
    sines = model.videomae.embeddings.position_embeddings
    if places != tuple(sines.shape) or not torch.allclose(tensors[_PLACES].float(), sines, atol=1e-4):
        raise WeightsError(f"{tensors.what}: its places are not sines, so it is another network than VideoMAE's ViT")
    return model


def _labels_beside(folder: Path) -> tuple[str, ...]:
    for name in LABEL_FILES:
        if (folder / name).is_file():
            lines = (folder / name).read_text(encoding="utf-8").splitlines()
            return tuple(line.strip() for line in lines if line.strip())
    raise PretrainedMissing(
        f"{folder}: no {' or '.join(LABEL_FILES)} beside the weights (nor a config.json, so they are taken for "
        f"mmaction2's); expected the names of the {CLASSES} classes, one a line, as mmaction2 has them in "
        "tools/data/kinetics/label_map_k400.txt"
    )
