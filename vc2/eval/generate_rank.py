"""A rank of the sampler: `python -m vc2.eval.generate_rank JOB` under any launcher that sets RANK and WORLD_SIZE.

Ranks do not talk to each other: each takes its share of the pending groups, writes their videos and then their records.
Shapes: B clips of a group, C latent channels, T frames, h x w latent pixels, H x W pixels, L text tokens of width D.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vc2.artifacts import Manifest, load_manifest, put_file
from vc2.data.video_files import encode_mp4
from vc2.eval.config import Prompt, SampleStage
from vc2.eval.generate import Group, GroupRecord, SampleJob, prompt_seed, record_key, samples_prefix
from vc2.eval.ranks import device_of, read_job, work_here
from vc2.launch import report, run_rank, this_rank
from vc2.model.bundle import Parts, VideoModel
from vc2.model.generate import generate_videos
from vc2.storage import Store, open_store

__all__ = ["Generator", "load_generator", "main"]


@dataclass(frozen=True, slots=True)
class Generator:
    """The videos of a sample set."""

    model: VideoModel

    def videos(self, config: SampleStage, prompts: tuple[Prompt, ...]) -> np.ndarray:
        """One video per prompt, (B, T, H, W, 3) uint8; its noise depends on the seed and the prompt's id alone."""
        return generate_videos(
            self.model,
            [prompt.text for prompt in prompts],
            [prompt_seed(config.seed, prompt) for prompt in prompts],
            frames=config.frames,
            height=config.height,
            width=config.width,
            sampler=config.sampler,
            precision=config.precision,
        )


def load_generator(
    store: Store, manifest: Manifest, config: SampleStage, cache: Path, device: torch.device
) -> Generator:
    """The networks of a checkpoint on a device; `config` says which of its weights. Files are fetched to `cache`."""
    parts = Parts.of_checkpoint(store, manifest, cache, weights=config.weights)
    return Generator(parts.load(cache=cache).to(device))


def _store_group(
    store: Store, prefix: str, config: SampleStage, group: Group, videos: np.ndarray, checkpoint: str
) -> None:
    """Videos first, the record last: a group exists when its record does."""
    files = tuple(
        put_file(
            store,
            prefix,
            f"{prompt.id}.mp4",
            encode_mp4(frames, config.play_fps, crf=10, comment=_settings(config, prompt, checkpoint)),
        )
        for prompt, frames in zip(group.prompts, videos, strict=True)
    )
    store.write(
        record_key(prefix, group.number), GroupRecord(asked=group.asked, files=files).model_dump_json().encode()
    )


def _settings(config: SampleStage, prompt: Prompt, checkpoint: str) -> str:
    """What a video says of how it was made, for `vc2 show FILE`."""
    said = {
        "made_by": "vc2",
        "prompt": prompt.text,
        "id": prompt.id,
        "seed": prompt_seed(config.seed, prompt),
        "frames": config.frames,
        "width": config.width,
        "height": config.height,
        "sampler": config.sampler.identity(),
        "precision": config.precision,
        "play_fps": config.play_fps,
        "checkpoint": checkpoint,
        "weights": config.weights,
    }
    return json.dumps(said)


def main(job_uri: str) -> None:
    """Do this rank's share of a job."""
    job = SampleJob.model_validate_json(read_job(job_uri))
    rank = this_rank()
    store = open_store(job.store)
    share = job.groups[rank.rank :: rank.world_size]
    device = device_of(job.config.device, rank.local_rank)
    cache = work_here(job.work) / "cache" / "weights"
    generator = load_generator(store, load_manifest(store, job.checkpoint), job.config, cache, device)
    prefix = samples_prefix(job.fingerprint)
    total = len(job.config.all_prompts())
    for group in share:
        videos = generator.videos(job.config, group.prompts)
        _store_group(store, prefix, job.config, group, videos, job.checkpoint)
        finished = sum(1 for _ in store.list(f"{prefix}/groups/"))
        report("samples", min(total, finished * job.config.group_size), total)


if __name__ == "__main__":
    run_rank(main)
