"""From prompts to videos: text tower, image encoder, sampler and autoencoder in a row.

Every clip has a seed of its own, its noise is drawn on the CPU, so neither its company nor the device decides what it
begins with. Shapes: B clips, C latent channels, T frames, H x W pixels, h x w latent pixels, L text tokens of width D.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from numbers import Integral
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vc2.errors import ConfigError, WeightsError
from vc2.model.bundle import VideoModel
from vc2.model.config import ModelConfig, SamplerConfig, UNetConfig
from vc2.model.image import stretched
from vc2.model.sampler import ClipNoise, StepResult, sample

__all__ = [
    "Precision",
    "as_bytes",
    "cautions",
    "check_request",
    "generate_videos",
    "pick_device",
    "size_multiple",
    "usual_fps",
]

Precision = Literal["float32", "bfloat16", "float16"]
RELEASED_IMAGE_FPS = 8  # the rate that the released script tells the image-to-video network


@torch.no_grad()
def generate_videos(
    model: VideoModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    frames: int,
    height: int,
    width: int,
    sampler: SamplerConfig | None = None,
    fps: int | Sequence[int] | None = None,
    negative_prompt: str = "",
    images: np.ndarray | None = None,
    precision: Precision = "float32",
    progress: Callable[[int, int], None] | None = None,
    on_step: Callable[[StepResult], Tensor | None] | None = None,
) -> np.ndarray:
    """One video per prompt, all sampled together, on the model's device.

    Args:
        model: The networks.
        prompts: What the videos show, (B,).
        seeds: Of the noise, (B,).
        frames: T; `cautions` tells which numbers the network has not seen.
        height, width: Pixels, multiples of `size_multiple`.
        sampler: Solver, steps, guidance; None: those of the released script.
        fps: Frame rate told to the network, one or one per clip; None: `sampler.fps`.
        negative_prompt: What guidance leads away from.
        images: For an image-to-video model what the videos show, (B, H, W, 3) or (1, H, W, 3) for all, uint8; of any
            size, since they are stretched to that of the video.
        precision: Of the arithmetic; weights stay what they are.
        progress: Called after every step with the steps done and the steps there are.
        on_step: As in `sample`.

    Returns:
        (B, T, H, W, 3) uint8.

    Raises:
        ConfigError: If a size, a number of seeds, rates or images, or an option does not fit the model.
    """
    sampler = sampler or SamplerConfig()
    check_request(model.config, frames=frames, height=height, width=width, with_image=images is not None)
    fps = int(fps) if isinstance(fps, Integral) else fps
    _check_numbers(len(prompts), seeds=len(seeds), fps=1 if fps is None or isinstance(fps, int) else len(fps),
                   images=1 if images is None else len(images))  # fmt: skip
    device, downsampling = model.device, model.autoencoder.config.downsampling
    shape = (model.unet.config.in_channels, frames, height // downsampling, width // downsampling)
    noise = ClipNoise(seeds, shape, device)
    text, uncond = model.text.encode(list(prompts)), model.text.encode([negative_prompt])
    image, uncond_image = _image_tokens(model, images, height, width)
    rates = fps if fps is None or isinstance(fps, int) else torch.tensor(fps, device=device).expand(len(prompts))
    autocast = nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))
    with autocast:
        latents = sample(
            model.unet,
            model.schedule,
            noise.start(),
            text,
            uncond,
            sampler,
            rates,
            noise,
            progress,
            image=image,
            uncond_image=uncond_image,
            on_step=on_step,
        )
        if not torch.isfinite(latents).all():
            raise WeightsError(
                f"{sampler.num_steps} steps at guidance {sampler.guidance_scale} ended in latents that are no numbers: "
                "lower the guidance, or take another checkpoint, this one's weights may be damaged"
            )
        pixels = model.autoencoder.decode(latents)
    return as_bytes(pixels)


def _image_tokens(
    model: VideoModel, images: np.ndarray | None, height: int, width: int
) -> tuple[Tensor | None, Tensor | None]:
    if images is None:
        return None, None
    if model.image is None:
        raise ConfigError("this model came without its image encoder, so it cannot be shown an image: load it whole")
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
    return model.image.encode(stretched(pixels, height, width)), model.image.encode_nothing()


def _check_numbers(prompts: int, *, seeds: int, fps: int, images: int) -> None:
    if not prompts:
        raise ConfigError("no prompt: give at least one")
    if seeds != prompts:
        raise ConfigError(f"{seeds} seeds for {prompts} prompts: give one for each")
    for name, number in (("frame rates", fps), ("images", images)):
        if number not in (1, prompts):
            raise ConfigError(f"{number} {name} for {prompts} prompts: give one for all, or one for each")


def usual_fps(config: UNetConfig, told: Mapping[int, int]) -> int:
    """The frame rate to tell a network when nobody says one.

    Args:
        config: Of the network.
        told: Frame rates that it was told in training, with their weights; empty: not known.

    Returns:
        That of the released script, if it was told in training or that is not known; else the one told most.
    """
    usual = RELEASED_IMAGE_FPS if config.use_image_attention else SamplerConfig().fps
    return usual if usual in told or not told else max(sorted(told), key=told.__getitem__)


def size_multiple(config: ModelConfig) -> int:
    """Heights and widths must be multiples of this many pixels."""
    return config.autoencoder.downsampling * config.unet.downsampling


def check_request(config: ModelConfig, *, frames: int, height: int, width: int, with_image: bool) -> None:
    """Say what a model cannot make, before it is loaded.

    Raises:
        ConfigError: If the size is no multiple of what the networks halve, there are no frames, or an image is given
            to a text-to-video network or none to an image-to-video one.
    """
    whole = size_multiple(config)
    for who, multiple in (("autoencoder", config.autoencoder.downsampling), ("network", whole)):
        if height < 1 or width < 1 or height % multiple or width % multiple:
            near = " x ".join(str(max(1, round(side / whole)) * whole) for side in (width, height))
            raise ConfigError(f"{width} x {height} pixels: the {who} needs multiples of {multiple}, for example {near}")
    if frames < 1:
        raise ConfigError(f"frames={frames}: a video needs at least 1")
    if with_image and not config.unet.use_image_attention:
        raise ConfigError("an image was given, but this is a text-to-video network, which reads none: leave it out")
    if config.unet.use_image_attention and not with_image:
        raise ConfigError("this is an image-to-video network: give it an image")


def cautions(
    config: ModelConfig, *, frames: int, fps: Sequence[int] = (), told: Sequence[int] = (), trained_frames: int = 0
) -> list[str]:
    """What will work but was not trained, one sentence each.

    Args:
        config: The model's.
        frames: Asked for. One frame is an image, which a network trained on images too knows.
        fps: Frame rates asked for.
        told: Frame rates that the network was told in training; empty: not known.
        trained_frames: Frames of its training clips; 0: `config.unet.temporal_length`.
    """
    said, trained_frames = [], trained_frames or config.unet.temporal_length
    if frames not in (1, trained_frames):
        said.append(
            f"{frames} frames from a network trained on {trained_frames}: it takes any number, but what it makes "
            f"gets worse away from {trained_frames}"
        )
    foreign = sorted({rate for rate in fps if told and rate not in told})
    if foreign:
        said.append(
            f"fps {', '.join(map(str, foreign))} was never told to this network in training; it knows "
            f"{', '.join(map(str, sorted(told)))}"
        )
    return said


def as_bytes(frames: Tensor) -> np.ndarray:
    """(B, 3, T, H, W) in [-1, 1] -> (B, T, H, W, 3) uint8."""
    levels = ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()


def pick_device(name: str = "auto") -> torch.device:
    """A device that is there: `auto` is the accelerator (CUDA, MPS, XPU, ...) if there is one, else the CPU.

    Raises:
        ConfigError: If there is no such device.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name}: no such kind; take auto, cpu, cuda, mps or xpu") from None
    usable = found is not None and device.type == found.type and (device.index or 0) < torch.accelerator.device_count()
    if device.type != "cpu" and not usable:
        raise ConfigError(f"device={name} is not here; this machine has cpu{f' and {found.type}' if found else ''}")
    return device
