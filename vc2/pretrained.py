"""Foreign weights: what they are called, which bytes they are, and where they are found.

A weight file is looked for in this order: an explicit path, a mirror (a folder, or `s3://bucket/prefix`, named by
VC2_MIRROR), the model hub. In offline mode (VC2_OFFLINE=1) the network is never asked. The files come with their own
licences, named here; we ship none of them but the miniature's.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vc2.errors import PretrainedMissing
from vc2.storage import open_store

__all__ = ["WEIGHTS", "Weight", "is_available", "is_offline", "resolve"]


@dataclass(frozen=True, slots=True)
class Weight:
    """A file of foreign weights."""

    name: str  # ours
    file: str  # below a mirror's root
    license: str
    used_by: str
    hub: tuple[str, str] | None = None  # repository and file on the model hub
    sha256: str | None = None  # None: recorded on first use, since no copy was at hand to take it from


WEIGHTS: Mapping[str, Weight] = {
    weight.name: weight
    for weight in (
        Weight("sd21-base", "sd21-base/v2-1_512-ema-pruned.safetensors", "CreativeML Open RAIL++-M", "train/full",
               ("stabilityai/stable-diffusion-2-1-base", "v2-1_512-ema-pruned.safetensors")),
        Weight("miniature-image-base", "miniature/image_base.safetensors", "Apache-2.0", "train/full of the miniature"),
        Weight("openclip-vit-h-14", "openclip/ViT-H-14/open_clip_model.safetensors", "MIT", "train, evaluate",
               ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "open_clip_model.safetensors")),
        Weight("videocrafter2", "videocrafter2/model.ckpt", "Apache-2.0", "continue from the released model",
               ("VideoCrafter/VideoCrafter2", "model.ckpt")),
        Weight("clip-vit-b-32", "clip-vit-b-32/model.safetensors", "MIT",
               "evaluate: CLIP_Score, SD_Score, CLIP_Temp, Face_Consistency",
               ("openai/clip-vit-base-patch32", "model.safetensors")),
        Weight("raft-things", "raft/raft_large_C_T_V1-22a6c225.pth", "BSD-3-Clause",
               "evaluate: Flow_Score, Motion_AC_Score, Warping_Error"),
        Weight("inception-2015-12-05", "inception/pt_inception-2015-12-05-6726825d.pth", "Apache-2.0", "evaluate: IS"),
        Weight("dover", "dover/DOVER.pth", "S-Lab (non-commercial)", "evaluate: VQA_A, VQA_T"),
        Weight("blip2-opt-2.7b", "blip2-opt-2.7b/model.safetensors", "MIT", "evaluate: BLIP_BLEU"),
        Weight("sdxl-base", "sdxl-base/sd_xl_base_1.0.safetensors", "CreativeML Open RAIL++-M", "evaluate: SD_Score"),
        Weight("grounding-dino-tiny", "grounding-dino-tiny/model.safetensors", "Apache-2.0",
               "evaluate: Detection_Score, Count_Score, Color_Score"),
        Weight("sam2", "sam2/model.safetensors", "Apache-2.0", "evaluate: Count_Score, Color_Score"),
        Weight("vgg-face", "vgg-face/vgg_face_weights.h5", "non-commercial", "evaluate: Celebrity_ID_Score"),
        Weight("videomae-v2-k400", "videomae-v2/model.safetensors", "CC-BY-NC-4.0", "evaluate: Action_Score"),
    )
}  # fmt: skip


def is_offline() -> bool:
    return os.environ.get("VC2_OFFLINE", "") not in ("", "0")


def is_available(name: str) -> bool:
    """Whether a weight file is at hand without asking the network."""
    try:
        resolve(name, offline=True)
    except PretrainedMissing:
        return False
    return True


def resolve(name: str, *, path: Path | None = None, cache: Path | None = None, offline: bool | None = None) -> Path:
    """A local file with the weights called `name`.

    Args:
        name: A key of `WEIGHTS`.
        path: An explicit file, taken as it is.
        cache: Where files from an `s3://` mirror are kept; without it such a mirror is not asked.
        offline: Never ask the network; default from VC2_OFFLINE.

    Raises:
        PretrainedMissing: If no place has it; the message names all that were tried.
    """
    weight = WEIGHTS[name]
    if path is not None:
        if path.is_file():
            return path
        raise PretrainedMissing(f"{name}: {path} is no file; give the path of {weight.file.rsplit('/', 1)[-1]}")
    tried = []
    mirror = os.environ.get("VC2_MIRROR", "")
    if mirror and "://" not in mirror:
        place = Path(mirror) / weight.file
        if place.is_file():
            return place
        tried.append(str(place))
    elif mirror and cache is not None:
        place = cache / weight.file
        try:
            if not place.is_file():
                open_store(mirror).download(weight.file, place, sha256=weight.sha256)
            return place
        except KeyError:
            tried.append(f"{mirror}/{weight.file}")
    if not (is_offline() if offline is None else offline) and weight.hub is not None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(*weight.hub))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            tried.append(f"hub {weight.hub[0]} ({type(error).__name__})")
    raise PretrainedMissing(
        f"weights {name!r} not found (tried: {', '.join(tried) or 'no VC2_MIRROR set, network not asked'}); "
        f"put {weight.file} below a folder named by VC2_MIRROR; licence: {weight.license}"
    )
