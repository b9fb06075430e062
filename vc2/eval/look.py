"""One video being looked at: decoded once, each network asked once, whatever metrics want to know.

A metric is a function of a `Look` and a mode. What it asks the look for (embeddings, flow, captions, objects...) is
computed at the first question and kept for the next metric; only small things are kept, and frames go through a network
in bounded batches. Networks are loaded when they are first needed, and stay.

    CLIP_Score, CLIP_Temp, Face_Consistency, SD_Score      one CLIP pass for each way of preparing frames
    Flow_Score, Motion_AC_Score, dynamic_degree            one pass of optical flow
    VQA_A, VQA_T                                           one pass of DOVER
    Detection_Score, Count_Score, Color_Score              one track for each phrase

Shapes: T frames, H x W pixels, P = T - 1 pairs.
"""

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vc2 import pretrained
from vc2.errors import ConfigError, PretrainedMissing, SourceError, WeightsError
from vc2.eval import formulas, vbench
from vc2.eval.config import EvaluateStage
from vc2.eval.dover_scores import NUM_CLIPS, frame_indices, fused
from vc2.eval.formulas import Mode, NoValue
from vc2.eval.metrics import METRICS
from vc2.eval.prompts import Prompt, detection_classes, scoring_text
from vc2.seeding import derive_seed, generator

if TYPE_CHECKING:
    import torch

    from vc2.eval.networks.clip import Clip, Preparation
    from vc2.eval.networks.dover import RawScores

__all__ = ["READINGS", "Look", "Networks", "Reading", "read"]


PART_PIXELS = 2**23  # of frames in float64 at once, where pairs are looked at


@dataclass(frozen=True, slots=True)
class Reading:
    """What a metric says of a video."""

    value: float | None  #: raw: a fraction, pixels, an error; None: none
    frames: int = 0  #: how many frames it is made from
    reason: str = ""  #: why there is no value, or what is strange about it
    weight: float = 1.0  #: in the mean over videos: detection counts once for each class
    passing: bool = False  #: whether it may be otherwise next time
    rows: np.ndarray | None = None  #: what is pooled over all videos (class probabilities), (T, K)


class Networks:
    """The networks of an evaluation, each loaded when first asked for."""

    def __init__(self, config: EvaluateStage, device: "torch.device", cache: Path | None = None) -> None:
        self.config, self.device, self.cache = config, device, cache
        self._texts: dict[str, np.ndarray] = {}
        self.trouble: dict[tuple[str, Mode], Reading] = {}  #: of metrics whose networks cannot be loaded

    def _given(self, name: str) -> Path | None:
        given = self.config.files.get(name)
        return Path(given) if given else None

    def _file(self, name: str) -> Path:
        return pretrained.resolve(name, path=self._given(name), cache=self.cache)

    def _folder(self, name: str) -> Path:
        """The folder of weights of several files; where one is given by path, itself or a file in it."""
        found = self._file(name)
        return found if found.is_dir() else found.parent

    @cached_property
    def clip(self) -> "Clip":
        from vc2.eval.networks.clip import Clip

        return Clip.load(self._file("clip-vit-b-32"), self.device)

    def text(self, text: str) -> np.ndarray:
        """CLIP's embedding of a text, (D,)."""
        if text not in self._texts:
            self._texts[text] = self.clip.texts([text])[0]
        return self._texts[text]

    @cached_property
    def flow(self) -> Any:
        from vc2.eval.networks.flow import DisFlow, Raft

        return DisFlow() if self.config.flow == "dis" else Raft.load(self._file("raft-things"), self.device)

    @cached_property
    def inception(self) -> Any:
        from vc2.eval.networks.inception import Inception

        return Inception.load(self._file("inception-2015-12-05"), self.device)

    @cached_property
    def dover(self) -> Any:
        from vc2.eval.networks.dover import Dover

        return Dover.load(self._file("dover"), self.device)

    @cached_property
    def captioner(self) -> Any:
        from vc2.eval.networks.captions import Captioner

        return Captioner.load(self._folder("blip2-opt-2.7b"), self.device)

    @cached_property
    def tracker(self) -> Any:
        from vc2.eval.networks.detector import ObjectTracker

        return ObjectTracker.load(self._folder("grounding-dino-tiny"), self._folder("sam2"), self.device)

    @cached_property
    def reader(self) -> Any:
        from vc2.eval.networks.ocr import TextReader

        return TextReader.load(self._given("rapidocr"), self.device)

    @cached_property
    def actions(self) -> Any:
        from vc2.eval.networks.action import ActionRecogniser

        return ActionRecogniser.load(self._file("videomae-k400"), self.device)

    @cached_property
    def action_labels(self) -> np.ndarray:
        """CLIP's embeddings of the names of the actions, (K, D)."""
        return self.clip.texts(list(self.actions.labels))

    @cached_property
    def vgg_faces(self) -> Any:
        from vc2.eval.networks.faces import VggFace

        return VggFace.load(self._file("vgg-face"), self._folder("opencv-haar-face"), self.device)

    @cached_property
    def dlib_faces(self) -> Any:
        from vc2.eval.networks.faces import DlibFaces

        return DlibFaces.load(self._given("dlib-faces"), self.device)

    @cached_property
    def references(self) -> Any:
        from vc2.eval.networks.references import load_references

        return load_references(Path(self.config.references))

    @cached_property
    def dino(self) -> Any:
        from vc2.eval.networks.dino import Dino

        return Dino.load(self._file("dino-vit-b-16"), self.device)

    @cached_property
    def amt(self) -> Any:
        from vc2.eval.networks.amt import Amt

        return Amt.load(self._file("amt-s"), self.device)

    @cached_property
    def aesthetic(self) -> Any:
        from vc2.eval.networks.aesthetic import Aesthetic

        return Aesthetic.load(self._file("laion-aesthetic"), self.device, clip=self._file("clip-vit-l-14"))

    @cached_property
    def clip_images(self) -> Any:
        """CLIP ViT-B/32 as VBench prepares its pictures."""
        from vc2.eval.networks.aesthetic import ClipImages

        return ClipImages.load(self._file("clip-vit-b-32"), self.device)

    @cached_property
    def musiq(self) -> Any:
        from vc2.eval.networks.musiq import Musiq

        return Musiq.load(self._file("musiq-spaq"), self.device)


@dataclass(frozen=True, slots=True)
class FlowFacts:
    """Optical flow of a video."""

    padded_length: float  #: mean length over the frames extended to a multiple of 8
    length: float  #: over the frames alone
    motions: list[float]  #: of each pair (`vbench.pair_motion`)


class Look:
    """A video and its prompt, looked at by networks. Frames are (T, H, W, 3) uint8 RGB."""

    def __init__(self, prompt: Prompt, frames: np.ndarray, fps: float, networks: Networks) -> None:
        self.prompt, self.frames, self.fps, self.networks = prompt, frames, fps, networks
        self._kept: dict[Any, Any] = {}

    @property
    def batch(self) -> int:
        return self.networks.config.batch

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, computed at the first call with this key."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def clip(self, how: "Preparation") -> np.ndarray:
        """CLIP's embeddings of the frames, (T, D)."""
        return self.once(("clip", how), lambda: self.networks.clip.frames(self.frames, how, batch=self.batch))

    def flow(self) -> "FlowFacts":
        """What is told of the flow between neighbouring frames, in pixels."""
        return self.once("flow", self._flow)

    @property
    def has_flow(self) -> bool:
        """Whether `flow` has been asked for already."""
        return "flow" in self._kept

    def _flow(self) -> "FlowFacts":
        height, width = self.frames.shape[1:3]
        top, left = (-height) % 8 // 2, (-width) % 8 // 2
        whole: list[float] = []
        inner: list[float] = []
        motions: list[float] = []
        for frames in self.windows(self.frames):
            flows, _ = self.networks.flow.along(formulas.padded(frames), batch=self.batch)
            cut = flows[:, :, top : top + height, left : left + width]
            whole += [formulas.flow_score(flow[None]) for flow in flows]
            inner += [formulas.flow_score(flow[None]) for flow in cut]
            motions += map(vbench.pair_motion, cut) if height * width >= 20 else []
        return FlowFacts(float(np.mean(whole)), float(np.mean(inner)), motions)

    def warping_errors(self, mode: Mode) -> list[float]:
        """Warping error of every pair. In compat the network is given 0..1 where it expects 0..255: a flaw."""
        reach = 255.0 if mode == "fixed" or self.networks.config.flow == "dis" else 1.0
        return self.once(("warping", reach), lambda: self._warping_errors(reach))

    def _warping_errors(self, reach: float) -> list[float]:
        errors: list[float] = []
        for frames in self.windows(self.frames):
            small = formulas.padded(formulas.half_size(frames.astype(np.float64) / 255))
            forward, backward = self.networks.flow.along(small * reach, both_ways=True, batch=self.batch)
            errors += map(formulas.warping_error_of_pair, small, small[1:], forward, backward)
        return errors

    def windows(self, frames: np.ndarray) -> list[np.ndarray]:
        """Frames in parts of at most `batch` pairs of neighbours, each beginning with the last of the one before."""
        if len(frames) < 2:
            raise NoValue(f"needs two frames, has {len(frames)}")
        step = max(1, min(self.batch, PART_PIXELS // (frames.shape[1] * frames.shape[2])))
        return [frames[start : start + step + 1] for start in range(0, len(frames) - 1, step)]

    def dover(self, mode: Mode) -> "tuple[RawScores, int]":
        """Raw scores of DOVER's two branches, and how many different frames these are shown."""
        return self.once(("dover", mode), lambda: self._dover(mode))

    def _dover(self, mode: Mode) -> "tuple[RawScores, int]":
        seed = derive_seed(self.networks.config.dover_seed, "dover", self.prompt.id)
        raw = self.networks.dover.raw_scores(self.frames, seed=seed, mode=mode, batch_clips=1)
        shown = [
            frame_indices(branch, len(self.frames), mode, generator(seed, "dover", branch, "frames"))  # as `clips` does
            for branch in NUM_CLIPS
        ]
        return raw, len(np.unique(np.concatenate(shown)))

    def track(self, phrase: str, mode: Mode) -> Any:
        """Where instances of a phrase are in the frames looked at."""
        return self.once(("track", phrase, mode), lambda: self.networks.tracker.track(self.frames, phrase, mode))


# ---- the metrics ----


def _vqa(look: Look, mode: Mode, which: str) -> Reading:
    raw, num_frames = look.dover(mode)
    scores = fused(raw.aesthetic, raw.technical, first=look.networks.config.dover_first)
    return Reading(float(getattr(scores, which)), num_frames)


def _inception(look: Look, mode: Mode) -> Reading:
    """The video's own part of the score: minus the mean entropy of its frames, in nats; the rest is pooled."""
    rows = look.networks.inception.probabilities(look.frames, batch=look.batch)
    entropy = -(rows * np.log(np.maximum(rows, np.finfo(np.float32).tiny))).sum(-1, dtype=np.float64)
    return Reading(-float(entropy.mean()), len(rows), rows=rows)


def _clip_score(look: Look, mode: Mode) -> Reading:
    text = look.networks.text(scoring_text(look.prompt, mode))
    frames = look.clip("opencv" if mode == "compat" else "proper")
    return Reading(formulas.clip_score(frames, text), len(frames))


def _resized(mode: Mode) -> "Preparation":
    return "torchvision" if mode == "compat" else "proper"


def _clip_temp(look: Look, mode: Mode) -> Reading:
    return Reading(formulas.clip_temp(look.clip(_resized(mode))), len(look.frames))


def _face_consistency(look: Look, mode: Mode) -> Reading:
    return Reading(formulas.face_consistency(look.clip(_resized(mode))), len(look.frames))


def _sd_score(look: Look, mode: Mode) -> Reading:
    from vc2.eval.networks.references import prompt_digest

    how, of_all = "unit" if mode == "compat" else "proper", look.networks.references
    words = prompt_digest(scoring_text(look.prompt, "compat"))  # as upstream paints them, for both modes
    if of_all.prompts.get(look.prompt.id, words) != words:
        raise NoValue("the reference images were painted of other words")
    if look.prompt.id not in of_all.files:
        raise NoValue("no reference images of this prompt")
    try:
        images = look.once("references", lambda: of_all.images(look.prompt.id))
    except (PretrainedMissing, WeightsError) as error:  # of this prompt alone, and mended they are the same again
        why = str(error).replace(f"{of_all.folder}/", "")
        return Reading(None, len(look.frames), f"the reference images cannot be used: {why}", passing=True)
    references = np.concatenate([look.networks.clip.frames(np.array(image)[None], how) for image in images])
    return Reading(formulas.sd_score(look.clip(_resized(mode)), references), len(look.frames))


def _blip_bleu(look: Look, mode: Mode) -> Reading:
    from vc2.eval.networks.captions import caption_frames

    frames = look.frames[caption_frames(len(look.frames))]
    captions = look.networks.captioner.captions(frames, bgr=mode == "compat")
    return Reading(formulas.blip_bleu(scoring_text(look.prompt, mode), captions, mode), len(frames))


def _detection(look: Look, mode: Mode) -> Reading:
    classes = detection_classes(scoring_text(look.prompt, mode), mode)
    tracks = [look.track(name, mode) for name in classes]
    if not tracks:
        raise NoValue("the prompt names no class of COCO")
    value = float(np.mean([formulas.detection_score(track.counts) for track in tracks]))
    return Reading(value, len(tracks[0].counts), weight=len(tracks))


def _count(look: Look, mode: Mode) -> Reading:
    wanted = look.prompt.attributes["count"]
    track = look.track(wanted["object"], mode)
    return Reading(formulas.count_score(track.counts, wanted["n"]), len(track.counts))


def _color(look: Look, mode: Mode) -> Reading:
    wanted = look.prompt.attributes["color"]
    track = look.track(wanted["object"], mode)
    value = formulas.color_score(look.frames[track.frames], track.masks, wanted["color"], mode)
    return Reading(value, len(track.counts))


def _ocr(look: Look, mode: Mode) -> Reading:
    lines = look.once("lines", lambda: look.networks.reader.lines(look.frames))
    return Reading(formulas.ocr_error(look.prompt.attributes["text"], lines, mode), len(lines))


def _celebrity(look: Look, mode: Mode) -> Reading:
    from vc2.eval.networks.photos import photos_of

    folder = look.networks.config.photos
    faces = look.networks.vgg_faces if mode == "compat" else look.networks.dlib_faces
    try:
        photos = photos_of(Path(folder), look.prompt.attributes["celebrity"] or look.prompt.text)
        distances = faces.distances(look.frames, photos).distances
    except (SourceError, ConfigError) as error:  # nobody of that name, a damaged photograph, none with a face
        raise NoValue(str(error).replace(f"{folder}: ", "").replace(f"{folder}/", "")) from None
    return Reading(formulas.celebrity_distance(distances), len(distances))


def _action(look: Look, mode: Mode) -> Reading:
    probabilities = look.networks.actions.probabilities(look.frames)
    best = np.argsort(-probabilities, kind="stable")[:5]
    target = look.networks.text(look.prompt.attributes["action"])
    value = formulas.action_score(probabilities[best], look.networks.action_labels[best], target)
    return Reading(value, len(look.frames))


def _flow_length(look: Look, mode: Mode) -> float:
    return look.flow().length if mode == "fixed" else look.flow().padded_length


def _flow(look: Look, mode: Mode) -> Reading:
    return Reading(_flow_length(look, mode), len(look.frames))


def _motion_ac(look: Look, mode: Mode) -> Reading:
    return Reading(
        formulas.motion_ac(_flow_length(look, mode), look.prompt.attributes["amplitude"], mode), len(look.frames)
    )


def _warping(look: Look, mode: Mode) -> Reading:
    return Reading(float(np.mean(look.warping_errors(mode))), len(look.frames))


# ---- VBench ----


def _subject(look: Look, mode: Mode) -> Reading:
    features = look.networks.dino.features(look.frames, batch=look.batch)
    return _over_frames(vbench.subject_consistency(features), len(features))


def _background(look: Look, mode: Mode) -> Reading:
    features = look.networks.clip_images.features(look.frames, batch=look.batch)
    return _over_frames(vbench.background_consistency(features), len(features))


def _over_frames(value: float, num_frames: int) -> Reading:
    """VBench averages its consistencies over frames after the first: a long video counts more."""
    return Reading(value, num_frames, weight=num_frames - 1)


def _flickering(look: Look, mode: Mode) -> Reading:
    return Reading(vbench.temporal_flickering(look.frames), len(look.frames))


def _smoothness(look: Look, mode: Mode) -> Reading:
    of_both = look.once(
        "smoothness", lambda: vbench.motion_smoothness_by_mode(look.frames, look.networks.amt.interpolate)
    )
    return Reading(of_both[mode], len(look.frames))


def _dynamic(look: Look, mode: Mode) -> Reading:
    frames = look.frames[list(vbench.sampled_at_8_fps(len(look.frames), look.fps))]
    height, width = frames.shape[1:3]

    def motions() -> Iterator[float]:
        if len(frames) == len(look.frames) and look.has_flow:
            yield from look.flow().motions
            return
        for part in look.windows(frames):
            yield from map(vbench.pair_motion, look.networks.flow.along(part, batch=look.batch)[0])

    value = look.once(
        ("dynamic", mode if len(frames) == 2 else "both"),  # of more frames than two both modes say the same
        lambda: vbench.dynamic_degree_of(motions(), num_frames=len(frames), height=height, width=width, mode=mode),
    )
    return Reading(value, len(frames))


def _aesthetic(look: Look, mode: Mode) -> Reading:
    scores = look.networks.aesthetic.scores(look.frames, batch=look.batch)
    return Reading(vbench.aesthetic_quality(scores), len(look.frames))


def _imaging(look: Look, mode: Mode) -> Reading:
    return Reading(vbench.imaging_quality(look.networks.musiq.scores(look.frames, batch=look.batch)), len(look.frames))


READINGS: Mapping[str, Callable[[Look, Mode], Reading]] = {
    "VQA_A": lambda look, mode: _vqa(look, mode, "aesthetic"),
    "VQA_T": lambda look, mode: _vqa(look, mode, "technical"),
    "IS": _inception,
    "CLIP_Temp": _clip_temp,
    "Warping_Error": _warping,
    "Face_Consistency": _face_consistency,
    "Action_Score": _action,
    "Motion_AC_Score": _motion_ac,
    "Flow_Score": _flow,
    "CLIP_Score": _clip_score,
    "BLIP_BLEU": _blip_bleu,
    "SD_Score": _sd_score,
    "Detection_Score": _detection,
    "Color_Score": _color,
    "Count_Score": _count,
    "OCR_Score": _ocr,
    "Celebrity_ID_Score": _celebrity,
    "subject_consistency": _subject,
    "background_consistency": _background,
    "temporal_flickering": _flickering,
    "motion_smoothness": _smoothness,
    "dynamic_degree": _dynamic,
    "aesthetic_quality": _aesthetic,
    "imaging_quality": _imaging,
}
assert READINGS.keys() == METRICS.keys()


def read(name: str, mode: Mode, look: Look) -> Reading:
    """One metric of a video; a reason where it has no value. Weights that cannot be loaded cost the metrics that need
    them, not the others, and are tried once."""
    trouble = look.networks.trouble
    try:
        return trouble.get((name, mode)) or READINGS[name](look, mode)
    except NoValue as reason:
        return Reading(None, len(look.frames), str(reason))
    except (PretrainedMissing, WeightsError) as error:
        trouble[name, mode] = Reading(None, 0, f"cannot be measured: {error}", passing=True)
        return trouble[name, mode]
    except Exception as error:  # a strange video costs its own value; what is the machine's trouble ends the rank
        if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "CUDA" in str(error):
            raise
        print(f"{look.prompt.id}: {name} ({mode}) failed", file=sys.stderr)
        traceback.print_exception(error)
        return Reading(None, len(look.frames), f"failed: {type(error).__name__}: {str(error)[:200]}", passing=True)
