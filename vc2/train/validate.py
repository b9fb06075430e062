"""What is looked at while training goes on: the loss on samples that never change, and videos for the eyes.

Samples, noise and timesteps of a validation are the same every time, so two numbers differ by the weights alone; the
timesteps are spread evenly over each medium's samples instead of drawn, and all is done in the size of the last phase.
The samples are those that `loader.holdout` keeps out of training; without any they are taken from the training samples,
and then the loss shows that the run learns, not that it generalises. Both the raw weights and their average (EMA) are
looked at. Nothing of the training is touched: its draws have their own seeds, the weights are put back bit for bit.
"""

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vc2.errors import StoreError
from vc2.launch import Rank
from vc2.model.bundle import VideoModel
from vc2.model.config import SamplerConfig
from vc2.model.generate import generate_videos, usual_fps
from vc2.model.schedule import NoiseSchedule
from vc2.model.unet import UNet3D
from vc2.storage import join_uri
from vc2.train.attempts import Run
from vc2.train.config import TrainStage
from vc2.train.encode import Batches, Encoders
from vc2.train.engine import Engine, gather_objects, sum_over_ranks
from vc2.train.objective import Draws, draw, predict_noise_losses

__all__ = ["Validator", "grid"]

log = logging.getLogger(__name__)

PLAY_FPS = 8  # of the videos that are written


@dataclass
class Validator:
    """One rank's side of a validation.

    Args:
        refs: All samples that are looked at, the same on every rank.
        clip_size: Frames, height, width of the videos that are made.
    """

    config: TrainStage
    run: Run
    rank: Rank
    device: torch.device
    engine: Engine
    schedule: NoiseSchedule
    encoders: Encoders
    batches: Batches
    refs: Sequence[Any]
    clip_size: tuple[int, int, int]
    fps: Mapping[int, int]

    def validate(self, step: int, ema: Tensor, *, beat: Callable[[], None]) -> dict[str, Any]:
        """Losses and videos by raw weights and by their average, the same answer on every rank.

        Args:
            step: Optimizer steps taken.
            ema: This rank's shard of the averaged weights.
            beat: Called while it goes on.

        Returns:
            `step`; `val_loss_raw`, `val_loss_ema` and the same by medium (`val_loss_ema_video`); `samples`, the URI of
            a page of videos, where captions are asked for.
        """
        line: dict[str, Any] = {"step": step}
        videos = {}
        for name in ("raw", "ema"):
            with self.engine.showing(ema) if name == "ema" else nullcontext(), self._evaluating():
                line |= {f"val_loss_{name}{part}": loss for part, loss in self._losses(beat).items()}
                videos[name] = self._videos(beat)
        if self.config.validation.prompts:
            rows = [rows for _, rows in sorted(gather_objects((self.rank.rank, self._rows(videos))))]
            if self.rank.is_first:
                key = f"{self.run.prefix}/validation/{step:08d}.webp"
                try:
                    self.run.store.write(key, grid([row for own in in_turn(rows) for row in own]))
                    line["samples"] = join_uri(self.run.store.uri, key)
                except StoreError as error:  # states are worth an end, pictures are not
                    log.warning("videos of step %d are not kept: %s", step, error)
        return line

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Dropout off; torch's random state afterwards as before."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), torch.no_grad():
            self.engine.module.eval()
            try:
                yield
            finally:
                self.engine.module.train()

    def _losses(self, beat: Callable[[], None]) -> dict[str, float]:
        sums = {kind: [0.0, 0.0] for kind in ("video", "image")}
        num_timesteps = self.config.model.schedule.num_timesteps
        for number in range(self.rank.rank, len(self.refs), self.rank.world_size):
            batch = self.batches.of([self.refs[number]], self.config.last_phase)
            drawn = draw(
                self.config.seed + 1,  # not the noise that the same sample is trained with
                batch,
                num_timesteps=num_timesteps,
                caption_dropout=0.0,
            )
            alike = [other for other, ref in enumerate(self.refs) if ref.kind == batch.kind]
            spread = (2 * alike.index(number) + 1) * num_timesteps // (2 * len(alike))
            drawn = Draws(drawn.latent_noise, drawn.noise, torch.full_like(drawn.timesteps, spread), drawn.dropped)
            scaling = self.config.model.autoencoder.scaling_factor
            losses, _ = predict_noise_losses(self.engine, self.schedule, scaling, batch, drawn, self.device)
            sums[batch.kind][0] += float(losses.sum())
            sums[batch.kind][1] += len(losses)
            beat()
        total = sum_over_ranks([number for kind in sums.values() for number in kind])
        found = {kind: (total[2 * place], total[2 * place + 1]) for place, kind in enumerate(sums)}
        all_loss, all_count = (sum(part) for part in zip(*found.values(), strict=True))
        by_kind = {f"_{kind}": loss / count for kind, (loss, count) in found.items() if count}
        return {"": all_loss / all_count, **by_kind} if all_count else {}

    def _videos(self, beat: Callable[[], None]) -> list[np.ndarray]:
        """(T, H, W, 3) uint8 of each caption that is this rank's."""
        wanted, unet = self.config.validation, self.engine.module
        assert isinstance(unet, UNet3D)
        frames, height, width = self.clip_size
        model = VideoModel(
            self.config.model, unet, self.schedule, self.encoders.autoencoder, self.encoders.text_encoder, self.fps
        )
        made = []
        for number in range(self.rank.rank, len(wanted.prompts), self.rank.world_size):
            made.append(
                generate_videos(
                    model,
                    [wanted.prompts[number]],
                    [number],
                    frames=frames,
                    height=height,
                    width=width,
                    sampler=SamplerConfig(
                        num_steps=wanted.sampler_steps,
                        guidance_scale=wanted.guidance_scale,
                        fps=usual_fps(self.config.model.unet, self.fps),
                    ),
                    precision="bfloat16" if self.config.precision == "bf16" else "float32",
                    progress=lambda *_: beat(),
                )[0]
            )
        return made

    def _rows(self, videos: Mapping[str, Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Raw and averaged side by side, (T, H, 2 W, 3), of each caption that is this rank's."""
        return [np.concatenate(pair, axis=2) for pair in zip(videos["raw"], videos["ema"], strict=True)]


def in_turn(rows: Sequence[Sequence[np.ndarray]]) -> Iterator[list[np.ndarray]]:
    """Rows in the order of their captions: the first of each rank, the second of each rank, ..."""
    for place in range(max(map(len, rows))):
        yield [own[place] for own in rows if place < len(own)]


def grid(rows: Sequence[np.ndarray]) -> bytes:
    """Videos below each other as one animated WebP.

    Args:
        rows: (T, H, W, 3) uint8, all of one shape.
    """
    frames = [Image.fromarray(frame) for frame in np.concatenate(rows, axis=1)]
    page = io.BytesIO()
    frames[0].save(page, "WEBP", save_all=True, append_images=frames[1:], duration=1000 // PLAY_FPS, loop=0, quality=85)
    return page.getvalue()
