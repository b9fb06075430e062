"""A rank of the sampler: `python -m vc2.eval.generate_rank JOB.json` under any launcher that sets RANK and WORLD_SIZE.

Ranks do not talk to each other: each takes its share of the pending groups, writes their videos and then their records.
Shapes: B clips of a group, C latent channels, T frames, h x w latent pixels, H x W pixels, L text tokens of width D.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vc2.artifacts import Manifest, load_manifest, put_file
from vc2.data.decode import encode_mp4
from vc2.errors import ConfigError
from vc2.eval.config import Prompt, SampleStage
from vc2.eval.generate import Group, GroupRecord, SampleJob, prompt_seed, record_key, samples_prefix
from vc2.launch import report, run_rank, this_rank
from vc2.model.autoencoder import Autoencoder
from vc2.model.config import AutoencoderConfig, ScheduleConfig, TextConfig
from vc2.model.sampler import ClipNoise, sample
from vc2.model.schedule import NoiseSchedule
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D
from vc2.model.weights import load_unet
from vc2.pretrained import resolve
from vc2.storage import Store, open_store

__all__ = ["Generator", "load_generator", "main"]

WEIGHTS = {"raw": "unet.safetensors", "ema": "unet_ema.safetensors"}  # files of a checkpoint


@dataclass(frozen=True, slots=True)
class Generator:
    """All networks that make a video of a text, on one device."""

    unet: UNet3D
    schedule: NoiseSchedule
    autoencoder: Autoencoder
    text: TextEncoder
    device: torch.device

    @torch.no_grad()
    def videos(self, config: SampleStage, prompts: tuple[Prompt, ...]) -> np.ndarray:
        """One video per prompt, (B, T, H, W, 3) uint8; its noise depends on the seed and the prompt's id alone."""
        downsampling = self.autoencoder.config.downsampling
        if config.width % downsampling or config.height % downsampling:
            raise ConfigError(
                f"{config.width} x {config.height} pixels: the autoencoder needs multiples of {downsampling}"
            )
        height, width = config.height // downsampling, config.width // downsampling
        shape = (self.unet.config.in_channels, config.frames, height, width)
        noise = ClipNoise([prompt_seed(config.seed, prompt) for prompt in prompts], shape, self.device)
        text = self.text.encode([prompt.text for prompt in prompts])
        autocast = torch.autocast(self.device.type, torch.bfloat16) if config.precision == "bfloat16" else nullcontext()
        with autocast:
            latents = sample(
                self.unet,
                self.schedule,
                noise.start(),
                text,
                self.text.encode([""]),
                config.sampler,
                noise_at_step=noise,
            )
            frames = self.autoencoder.decode(latents)
        return as_bytes(frames)


def as_bytes(frames: Tensor) -> np.ndarray:
    """(B, 3, T, H, W) in [-1, 1] -> (B, T, H, W, 3) uint8."""
    levels = ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()


def load_generator(
    store: Store, manifest: Manifest, config: SampleStage, cache: Path, device: torch.device
) -> Generator:
    """The networks of a checkpoint.

    Args:
        store: Where the checkpoint is.
        manifest: Of the checkpoint: its files `unet.safetensors` (raw), `unet_ema.safetensors` and
            `autoencoder.safetensors`, and in its config the shapes of the `model`.
        config: Says which of the two weights.
        cache: Folder that files are fetched to, by their content.
        device: Where the networks go.
    """
    model: Mapping[str, Any] = manifest.config["model"]
    unet = load_unet(_fetch(store, manifest, WEIGHTS[config.weights], cache))
    autoencoder = Autoencoder.from_safetensors(
        _fetch(store, manifest, "autoencoder.safetensors", cache),
        AutoencoderConfig.model_validate(model["autoencoder"]),
    )
    text = _text_encoder(model, cache)
    schedule = NoiseSchedule(ScheduleConfig.model_validate(model["schedule"]))
    return Generator(unet.to(device).eval(), schedule, autoencoder.to(device), text.to(device), device)


def _text_encoder(model: Mapping[str, Any], cache: Path) -> TextEncoder:
    config = TextConfig.model_validate(model["text"])
    if config.seed is not None:
        return TextEncoder(config)
    from safetensors.torch import load_file

    path = resolve(
        model["text_weights"], path=Path(model["text_path"]) if model.get("text_path") else None, cache=cache
    )
    return TextEncoder.from_released(config, load_file(path))


def _fetch(store: Store, manifest: Manifest, name: str, cache: Path) -> Path:
    entry = manifest.file(name)
    path = cache / f"{entry.sha256}.safetensors"
    if not path.is_file() or path.stat().st_size != entry.size:
        cache.mkdir(parents=True, exist_ok=True)
        store.download(entry.key, path, sha256=entry.sha256)
    return path


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu":
        torch.set_num_threads(1)  # sums over threads round differently: bits must not depend on how many there are
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda: no GPU is visible; set device=cpu")
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _store_group(store: Store, prefix: str, config: SampleStage, group: Group, videos: np.ndarray) -> None:
    """Videos first, the record last: a group exists when its record does."""
    files = tuple(
        put_file(store, prefix, f"{prompt.id}.mp4", encode_mp4(frames, config.play_fps, crf=10))
        for prompt, frames in zip(group.prompts, videos, strict=True)
    )
    store.write(
        record_key(prefix, group.number), GroupRecord(asked=group.asked, files=files).model_dump_json().encode()
    )


def main(job_path: str) -> None:
    """Do this rank's share of a job."""
    job = SampleJob.model_validate_json(Path(job_path).read_text())
    rank = this_rank()
    store = open_store(job.store)
    share = job.groups[rank.rank :: rank.world_size]
    device = _device(job.config.device, rank.local_rank)
    generator = load_generator(store, load_manifest(store, job.checkpoint), job.config, Path(job.cache), device)
    prefix = samples_prefix(job.fingerprint)
    total = len(job.config.all_prompts())
    for group in share:
        videos = generator.videos(job.config, group.prompts)
        _store_group(store, prefix, job.config, group, videos)
        finished = sum(1 for _ in store.list(f"{prefix}/groups/"))
        report("samples", min(total, finished * job.config.group_size), total)


if __name__ == "__main__":
    run_rank(main)
