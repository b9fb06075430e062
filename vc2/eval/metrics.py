"""What is measured: the 17 metrics of EvalCrafter (arXiv 2310.11440) and the quality half of VBench (2311.17982).

A table row says what a metric is about, which way is better, which prompts it looks at, what it needs (foreign weights,
reference images, photographs) and in which unit it is printed. How a value comes about is in `vc2.eval.look`. A metric
that lacks what it needs is *not measured*, and so is every score made from it: nothing is imputed.

Most metrics have two modes: `compat`, the published program with its flaws, alone comparable with published rows, and
`fixed`, mended. Printed units are those of the leaderboards: percent, except IS and Warping_Error (plain) and
Flow_Score (pixels).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from vc2.config import digest
from vc2.errors import ConfigError
from vc2.eval.formulas import Mode
from vc2.pretrained import at_hand

__all__ = [
    "ASPECT_NAMES",
    "EVALCRAFTER",
    "METRICS",
    "MODES",
    "VBENCH_QUALITY",
    "Aspect",
    "Given",
    "Metric",
    "MetricName",
    "Video",
    "folder_digest",
    "modes_of",
    "what_it_takes",
]

Aspect = Literal["visual_quality", "text_video_alignment", "motion_quality", "temporal_consistency"]
ASPECT_NAMES: tuple[Aspect, ...] = get_args(Aspect)
MODES: tuple[Mode, ...] = get_args(Mode)

EvalCrafterName = Literal[
    "VQA_A", "VQA_T", "IS",
    "CLIP_Temp", "Warping_Error", "Face_Consistency",
    "Action_Score", "Motion_AC_Score", "Flow_Score",
    "CLIP_Score", "BLIP_BLEU", "SD_Score", "Detection_Score", "Color_Score", "Count_Score", "OCR_Score",
    "Celebrity_ID_Score",
]  # fmt: skip
VBenchName = Literal[
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
    "aesthetic_quality", "imaging_quality",
]  # fmt: skip
MetricName = Literal[EvalCrafterName, VBenchName]
EVALCRAFTER: tuple[str, ...] = get_args(EvalCrafterName)
VBENCH_QUALITY: tuple[str, ...] = get_args(VBenchName)

Need = Literal["references", "photos"]


@dataclass(frozen=True, slots=True)
class Video:
    """A video to be scored, decoded when looked at and not kept: a thousand of them weigh nothing."""

    id: str
    fps: float  #: rate at which it is shown
    load: Callable[[], np.ndarray]

    @property
    def frames(self) -> np.ndarray:
        """(T, H, W, 3) uint8 RGB."""
        return self.load()


@dataclass(frozen=True, slots=True)
class Metric:
    """What is known of a metric before anything is measured."""

    name: str
    aspect: Aspect
    direction: Literal["up", "down", "neutral"]
    unit: str
    weights: tuple[str, ...]  #: names in `vc2.pretrained.WEIGHTS`
    prompts: str = ""  #: attribute of the prompts it looks at; empty: all
    scale: float = 100.0  #: from the mean of the per-video numbers to the printed unit
    fixed_weights: tuple[str, ...] | None = None  #: where fixed needs others
    needs: tuple[Need, ...] = ()
    one_mode: bool = False  #: whether there is nothing to mend: both modes have the same number
    flow: bool = False  #: whether optical flow may come from a substitute that needs no weights
    note: str = ""  #: what stands in for what the published program ran
    version: int = 1  #: raised by hand when it says something else of the same video

    def weights_in(self, mode: Mode, flow: str = "raft") -> tuple[str, ...]:
        """Foreign weights that it needs in a mode."""
        if self.flow and flow != "raft":
            return tuple(name for name in self.weights if name != "raft-things")
        return self.weights if mode == "compat" or self.fixed_weights is None else self.fixed_weights


def _percent(name: str, aspect: Aspect, direction: Literal["up", "down"], *weights: str, **more: object) -> Metric:
    return Metric(name, aspect, direction, "%", weights, **more)  # type: ignore[arg-type]


TRACKED = "objects are tracked by SAM 2, where the published program has DeAOT, of which there is no package"
STATIC = "of all videos; VBench's own number is of videos that its filter takes for static"
READ = "text is read by RapidOCR (PP-OCRv6), where the published program has PaddleOCR 2.7"

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        _percent("VQA_A", "visual_quality", "up", "dover"),
        _percent("VQA_T", "visual_quality", "up", "dover"),
        Metric("IS", "visual_quality", "up", "", ("inception-2015-12-05",), scale=1.0, one_mode=True),
        _percent("CLIP_Temp", "temporal_consistency", "up", "clip-vit-b-32"),
        Metric("Warping_Error", "temporal_consistency", "down", "", ("raft-things",), scale=1.0, flow=True),
        _percent("Face_Consistency", "temporal_consistency", "up", "clip-vit-b-32"),
        _percent("Action_Score", "motion_quality", "up", "videomae-k400", "clip-vit-b-32", prompts="action",
                 one_mode=True),
        _percent("Motion_AC_Score", "motion_quality", "up", "raft-things", prompts="amplitude", flow=True),
        Metric("Flow_Score", "motion_quality", "neutral", "px", ("raft-things",), scale=1.0, flow=True),
        _percent("CLIP_Score", "text_video_alignment", "up", "clip-vit-b-32"),
        _percent("BLIP_BLEU", "text_video_alignment", "up", "blip2-opt-2.7b"),
        _percent("SD_Score", "text_video_alignment", "up", "clip-vit-b-32", needs=("references",)),
        _percent("Detection_Score", "text_video_alignment", "up", "grounding-dino-tiny", "sam2", note=TRACKED),
        _percent("Color_Score", "text_video_alignment", "up", "grounding-dino-tiny", "sam2", prompts="color",
                 note=TRACKED),
        _percent("Count_Score", "text_video_alignment", "up", "grounding-dino-tiny", "sam2", prompts="count",
                 note=TRACKED),
        _percent("OCR_Score", "text_video_alignment", "down", "rapidocr", prompts="text", note=READ),
        _percent("Celebrity_ID_Score", "text_video_alignment", "down", "vgg-face", "opencv-haar-face",
                 fixed_weights=("dlib-faces",), prompts="celebrity", needs=("photos",)),
        _percent("subject_consistency", "temporal_consistency", "up", "dino-vit-b-16", one_mode=True),
        _percent("background_consistency", "temporal_consistency", "up", "clip-vit-b-32", one_mode=True),
        _percent("temporal_flickering", "temporal_consistency", "up", one_mode=True, note=STATIC),
        _percent("motion_smoothness", "temporal_consistency", "up", "amt-s"),
        _percent("dynamic_degree", "motion_quality", "up", "raft-things", flow=True),
        _percent("aesthetic_quality", "visual_quality", "up", "clip-vit-l-14", "laion-aesthetic", one_mode=True),
        _percent("imaging_quality", "visual_quality", "up", "musiq-spaq", one_mode=True),
    )
}  # fmt: skip


def modes_of(metric: Metric, asked: Sequence[Mode]) -> tuple[Mode, ...]:
    """The modes in which a metric has to be measured; where there is nothing to mend, compat stands for both."""
    return ("compat",) if metric.one_mode else tuple(asked)


class Given:
    """What an evaluation has: how flow is estimated, weights, images and photographs. Looked up once each; reads no
    weights but those given by path, asks no network."""

    def __init__(
        self, flow: str = "raft", references: str = "", photos: str = "", files: Mapping[str, str] | None = None
    ) -> None:
        self.flow, self.references, self.photos, self.files = flow, references, photos, dict(files or {})
        self._known: dict[str, tuple[str, str]] = {}

    def weights(self, name: str) -> tuple[str, str]:
        """Why weights cannot be used (empty: they can), and what tells them from others."""
        if name not in self._known:
            path = self.files.get(name)
            self._known[name] = at_hand(name, path=Path(path) if path else None)
        return self._known[name]

    def data(self, need: Need) -> tuple[str, str]:
        """The same of what only the user has."""
        if need not in self._known:
            self._known[need] = _references(self.references) if need == "references" else _photos(self.photos)
        return self._known[need]


def _references(folder: str) -> tuple[str, str]:
    if not folder:
        return "no reference images (evaluation.references; `vc2 references` paints them)", ""
    try:
        record = json.loads((Path(folder) / "references.json").read_text(encoding="utf-8"))
        return ("", str(record["digest"])) if record["complete"] else (f"{folder}: not all images are painted", "")
    except (OSError, ValueError, KeyError, TypeError):
        return _files_of(folder, "no images in it")


def _photos(folder: str) -> tuple[str, str]:
    if not folder:
        return "no folder of photographs of the persons (evaluation.photos)", ""
    return _files_of(folder, "no photographs in it")


def _files_of(folder: str, nothing: str) -> tuple[str, str]:
    if not Path(folder).is_dir():
        raise ConfigError(f"{folder}: no such folder; check evaluation.references and evaluation.photos")
    found = folder_digest(Path(folder))
    return ("", found) if found else (f"{folder}: {nothing}", "")


def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of the files in a folder, hidden ones left out; empty if there are none."""
    found = sorted((path.relative_to(folder), path) for path in folder.rglob("*") if path.is_file())
    shown = [(name, path) for name, path in found if not any(part.startswith(".") for part in name.parts)]
    contents = [[name.as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()] for name, path in shown]
    return digest(contents) if shown else ""


def what_it_takes(metric: Metric, mode: Mode, given: Given) -> tuple[str, str]:
    """Why a metric cannot be measured (empty: it can), and a digest of what it would be measured with."""
    reasons, found = [], [str(metric.version)]
    looked_up = {name: given.weights(name) for name in metric.weights_in(mode, given.flow)}
    if missing := [name for name, (why, _) in looked_up.items() if why == "not found"]:
        reasons.append(f"weights not found: {', '.join(missing)}")
    reasons += [f"{name}: {why}" for name, (why, _) in looked_up.items() if why and why != "not found"]
    for need in metric.needs:
        why, what = given.data(need)
        reasons += [why] if why else []
        found.append(what)
    found += [f"{name} {what}" for name, (_, what) in looked_up.items()]
    return "; ".join(reasons), digest(found)[:16]
