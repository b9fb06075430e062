"""Videos of anyone's prompts, from any checkpoint, in files that say how they were made.

What is not asked for is what the model was trained with: frames and size are those of the training clips, found by
following a checkpoint's inputs in its store, and the frame rate is one that the network was told (`model.json`). Where
nothing of that is known, frames are `temporal_length`, and size, rate and sampler are those of the released script.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field

from vc2.artifacts import Artifact, Checkpoint, Manifest, load_manifest
from vc2.config import Config
from vc2.errors import ConfigError, StoreError
from vc2.model.config import SamplerConfig, UNetConfig
from vc2.progress import Progress, silent
from vc2.storage import Store

if TYPE_CHECKING:
    import numpy as np

    from vc2.data.video_files import Container
    from vc2.model.bundle import VideoModel

__all__ = [
    "LoadedModel",
    "SampleRequest",
    "check_prompts",
    "load_artifact",
    "load_files",
    "output_files",
    "read_settings",
    "sample_videos",
]

RELEASED_SIZE = (512, 320)  # width and height of the released text-to-video and image-to-video models


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model to sample from, and what is known of its training; 0 where that is nothing."""

    model: "VideoModel"
    name: str  # fingerprint and step, or the path it was read from
    weights: str  # ema or raw: asked for, where the source has both
    frames: int = 0
    width: int = 0
    height: int = 0
    lora: str = ""  # file of low-rank updates that were laid over the weights


class SampleRequest(Config):
    """What videos are asked for; empty: what the model was trained with."""

    prompts: tuple[str, ...]
    negative_prompt: str = ""
    images: tuple[str, ...] = ()  # files; one for all prompts or one for each
    seed: int = Field(123, ge=0)  # of the first prompt; the next has the next
    frames: int | None = Field(None, ge=1, le=10_000)
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    fps: int | None = Field(None, ge=0, le=1000)  # told to the network
    sampler: SamplerConfig = SamplerConfig()  # its fps is not used
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on CUDA, else float32
    device: str = "auto"
    play_fps: int = Field(10, ge=1, le=240)  # written into the files


def load_artifact(
    store: Store, artifact: Artifact, *, weights: Literal["ema", "raw"], cache: Path, lora: str = ""
) -> LoadedModel:
    """The model of a checkpoint in a store. Files are fetched to the folder `cache`.

    Args:
        store: Where it is.
        artifact: The checkpoint.
        weights: Which weights.
        cache: A folder.
        lora: A file of low-rank updates to lay over the weights; empty: none.

    Raises:
        ConfigError: If the artifact is another kind of thing.
        WeightsError: If the updates are not for this model.
    """
    from vc2.model.bundle import Parts

    if not isinstance(artifact, Checkpoint):
        raise ConfigError(f"{artifact.uri} is a {artifact.kind}; expected a checkpoint")
    manifest = load_manifest(store, artifact.prefix)
    model = Parts.of_checkpoint(store, manifest, cache, weights=weights).load(cache=cache)
    _lay_over(model, lora)
    frames, width, height = _trained_form(store, manifest)
    return LoadedModel(model, f"{artifact.fingerprint}@{artifact.step}", weights, frames, width, height, lora)


def load_files(path: Path, *, weights: Literal["ema", "raw"] = "ema", lora: str = "") -> LoadedModel:
    """The model in a folder or file, in any form that `vc2.model.convert.load_model` reads.

    Args:
        path: The folder or file.
        weights: Which weights, where it has both.
        lora: A file of low-rank updates to lay over them; empty: none.

    Raises:
        ConfigError: If there is no such path.
        WeightsError: If it holds no whole model, or the updates are not for this model.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder, and no URI of a checkpoint (<store>/runs/...)")
    from vc2.model.convert import load_model

    model = load_model(path, weights=weights)
    _lay_over(model, lora)
    return LoadedModel(model, str(path), weights, lora=lora)


def _lay_over(model: "VideoModel", lora: str) -> None:
    from vc2.model.lora import load_lora, merge_lora

    if lora:
        load_lora(model.unet, lora)
        merge_lora(model.unet)


def _trained_form(store: Store, manifest: Manifest) -> tuple[int, int, int]:
    """Frames, width and height of the clips that a checkpoint, or the one it started from, was trained on; or zeros."""
    forms, earlier = [], None
    for artifact in manifest.inputs.values():
        try:
            if artifact.kind == "shard_set":
                forms.append(load_manifest(store, artifact.prefix).config["form"])
            elif artifact.kind == "checkpoint":
                earlier = load_manifest(store, artifact.prefix)
        except (StoreError, KeyError):  # a store may hold a checkpoint without what it was made from
            continue
    found = [(form["num_frames"], form["width"], form["height"]) for form in forms]
    best = max(found, default=(0, 0, 0))
    return _trained_form(store, earlier) if best[0] <= 1 and earlier is not None else best


def check_prompts(request: SampleRequest) -> None:
    """Say what is wrong with a request whatever the model.

    Raises:
        ConfigError: If a prompt is empty or there is none, or there are not as many images.
    """
    if not request.prompts or not all(prompt.strip() for prompt in request.prompts):
        raise ConfigError("no prompt: give at least one text, none of them empty")
    if len(request.images) not in (0, 1, len(request.prompts)):
        raise ConfigError(f"{len(request.images)} images for {len(request.prompts)} prompts: give one, or one for each")


def output_files(output: Path | None, container: "Container | None", count: int) -> "tuple[list[Path], Container]":
    """Where the videos go, and in which form: one file where its name ends in a form and there is one prompt, else a
    folder with 0000.mp4 and so on. Nothing is written yet.

    Raises:
        ConfigError: If name, form and number do not go together, or nothing can be written there.
    """
    from vc2.data.video_files import Container

    known = get_args(Container)
    ending = "" if output is None or output.is_dir() else output.suffix.lower().removeprefix(".")
    if output is None:
        files = [Path(f"sample.{container or 'mp4'}")] if count == 1 else None
        output = Path("samples")
    elif ending in known:
        if count > 1:
            raise ConfigError(f"{output} is one file for {count} prompts: give a folder")
        if container not in (None, ending):
            raise ConfigError(f"{output} is to be written as {container}: give it that ending, or leave --format out")
        files, container = [output], ending  # type: ignore[assignment]
    elif ending.isalpha():
        raise ConfigError(f"{output}: cannot write {ending}; give a folder or a name that ends in {', '.join(known)}")
    else:
        files = None
    container = container or "mp4"
    files = files or [output / f"{number:04d}.{container}" for number in range(count)]
    folder = files[0].parent.absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ConfigError(f"{files[0].parent}: cannot be written, because {there} cannot; choose another --output")
    if taken := next((file for file in files if file.is_dir()), None):
        raise ConfigError(f"{taken} is a folder; choose another --output")
    return files, container


def sample_videos(
    loaded: LoadedModel,
    request: SampleRequest,
    files: Sequence[Path],
    container: "Container",
    *,
    progress: Progress = silent,
    warn: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Make a video for every prompt, one after the other, each written as soon as it is done.

    Args:
        loaded: From `load_artifact` or `load_files`.
        request: What to make.
        files, container: From `output_files`, one file per prompt.
        progress: Told every step.
        warn: Told what works but was not trained.

    Returns:
        For every video its file (`video`) and the settings that are kept inside it.

    Raises:
        ConfigError: If the model cannot make what is asked for, or an image cannot be read.
    """
    from vc2.data.video_files import encode_video, write_whole
    from vc2.model.generate import cautions, check_request, generate_videos, pick_device

    check_prompts(request)
    frames, width, height, fps = _filled_in(loaded, request)
    config = loaded.model.config
    check_request(config, frames=frames, height=height, width=width, with_image=bool(request.images))
    told = tuple(loaded.model.fps)
    if request.fps is not None and not config.unet.fps_cond:
        warn("this network is told no frame rate, so the one that was asked for changes nothing")
    for text in cautions(config, frames=frames, fps=(fps,), told=told, trained_frames=loaded.frames):
        warn(text)
    images = [_read_image(Path(path)) for path in request.images]
    device = pick_device(request.device)
    precision = _precision(request.precision, device.type)
    model = loaded.model.to(device)

    made: list[dict[str, Any]] = []
    total = len(request.prompts)
    for number, (prompt, file) in enumerate(zip(request.prompts, files, strict=True)):
        work = "sampling" if total == 1 else f"sampling {number + 1} of {total}"
        seed = request.seed + number
        video = generate_videos(
            model,
            [prompt],
            [seed],
            frames=frames,
            height=height,
            width=width,
            sampler=request.sampler,
            fps=fps,
            negative_prompt=request.negative_prompt,
            images=images[number % len(images)][None] if images else None,
            precision=precision,
            progress=lambda step, steps, work=work: progress(work, step, steps),
        )[0]
        settings = {
            "made_by": _version(),
            "prompt": prompt,
            "negative_prompt": request.negative_prompt,
            "image": Path(request.images[number % len(images)]).name if images else "",
            "seed": seed,
            **_sampler_settings(request.sampler),
            "fps": fps if config.unet.fps_cond else None,
            "frames": frames,
            "width": width,
            "height": height,
            "play_fps": request.play_fps,
            "precision": precision,
            "device": device.type,
            "checkpoint": loaded.name,
            "weights": loaded.weights,
            "lora": Path(loaded.lora).name,
        }
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, encode_video(video, request.play_fps, container, comment=json.dumps(settings)))
        except OSError as error:
            raise ConfigError(f"{file}: cannot be written ({error.strerror}); choose another --output") from None
        made.append({"video": str(file), **settings})
    return made


def read_settings(path: Path) -> dict[str, Any]:
    """What a video of `sample_videos` says about how it was made.

    Raises:
        ConfigError: If the file is no such video.
    """
    from vc2.data.video_files import read_comment

    try:
        settings = json.loads(read_comment(path) or "")
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict) or "made_by" not in settings:
        raise ConfigError(f"{path}: holds no settings; expected an mp4, GIF or WebP file that `vc2 sample` made")
    return settings


def _filled_in(loaded: LoadedModel, request: SampleRequest) -> tuple[int, int, int, int]:
    """Frames, width, height and the rate told to the network."""
    from vc2.model.generate import usual_fps

    unet = loaded.model.config.unet
    trained = (loaded.width, loaded.height)
    if not all(trained) and unet.model_channels == UNetConfig().model_channels:
        trained = RELEASED_SIZE
    width, height = request.width or trained[0], request.height or trained[1]
    if not (width and height):
        raise ConfigError(f"{loaded.name}: nothing says at which size this model was trained; give --size WxH")
    fps = usual_fps(unet, loaded.model.fps) if request.fps is None else request.fps
    return request.frames or loaded.frames or unet.temporal_length, width, height, fps


def _read_image(path: Path) -> "np.ndarray":
    """Its pixels, (H, W, 3) uint8."""
    from PIL import Image

    from vc2.model.image import pixels_of

    if not path.is_file():
        raise ConfigError(f"{path}: no such image file")
    try:
        with Image.open(path) as picture:
            return pixels_of(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: not a readable image ({error}); give a JPEG, PNG or WebP file") from None


def _precision(asked: str, device: str) -> Any:
    import torch

    if asked != "auto":
        return asked
    return "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def _sampler_settings(sampler: SamplerConfig) -> dict[str, Any]:
    settings = sampler.model_dump(exclude={"fps", "batched_guidance"})
    return settings | ({} if sampler.solver == "ddim" else {"eta": 0.0})  # which dpm++ does not have


def _version() -> str:
    from importlib import metadata

    return f"vc2 {metadata.version('vc2')}"
