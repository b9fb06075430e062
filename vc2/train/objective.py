"""What is learnt: to predict the noise in noisy latents.

    x_t = schedule(x_0, eps, t),   loss = mean over (C, T, H, W) of (network(x_t, t, text, fps) - eps)^2

(Ho et al. 2020), averaged per sample, then over the global batch. x_0 is a sample from the autoencoder's moments. An
image is a clip of one frame. A caption is dropped, replaced by the empty text, with a given probability, so that the
network also learns the unconditional noise that guidance needs (Ho and Salimans 2022).

All draws belong to samples: they are functions of (seed, kind, position in the stream), whatever rank computes them.
Shapes: B clips, C latent channels, T frames, H x W latent pixels, L text tokens of width D.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vc2.model.autoencoder import sample_latents
from vc2.model.schedule import NoiseSchedule
from vc2.seeding import derive_seed
from vc2.train.engine import Engine

__all__ = ["Batch", "Draws", "best_linear_loss", "draw", "micro_batches", "predict_noise_losses"]


@dataclass(frozen=True)
class Batch:
    """Encoded samples of one shape, on the CPU."""

    keys: tuple[str, ...]  # of the samples, for messages
    kind: str  # "video" or "image"
    positions: tuple[int, ...]  # in the stream of that kind
    moments: Tensor  # (B, 2C, T, H, W): mean and log-variance of the latents
    text: Tensor  # (B, L, D)
    empty_text: Tensor  # (L, D): the text of no caption
    fps: Tensor  # (B,) integers

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch."""

    latent_noise: Tensor  # (B, C, T, H, W): which latents are taken from the moments
    noise: Tensor  # (B, C, T, H, W): what the network has to find
    timesteps: Tensor  # (B,) integers
    dropped: Tensor  # (B,) booleans: the caption is left out


def draw(seed: int, batch: Batch, *, num_timesteps: int, caption_dropout: float) -> Draws:
    """The draws of a batch, sample by sample, so that any grouping of samples gives the same."""
    channels = batch.moments.shape[1] // 2
    shape = (channels, *batch.moments.shape[2:])
    latent_noise, noise, timesteps, dropped = [], [], [], []
    for position in batch.positions:
        randoms = torch.Generator().manual_seed(derive_seed(seed, "draws", batch.kind, position))
        dropped.append(torch.rand((), generator=randoms) < caption_dropout)
        timesteps.append(torch.randint(num_timesteps, (), generator=randoms))
        latent_noise.append(torch.randn(shape, generator=randoms))
        noise.append(torch.randn(shape, generator=randoms))
    return Draws(torch.stack(latent_noise), torch.stack(noise), torch.stack(timesteps), torch.stack(dropped))


def micro_batches(batch: Batch, size: int) -> Sequence[Batch]:
    """A batch in parts of `size` samples."""
    return [_part(batch, slice(start, start + size)) for start in range(0, len(batch), size)]


def _part(batch: Batch, part: slice) -> Batch:
    return Batch(
        batch.keys[part],
        batch.kind,
        batch.positions[part],
        batch.moments[part],
        batch.text[part],
        batch.empty_text,
        batch.fps[part],
    )


def predict_noise_losses(
    engine: Engine, schedule: NoiseSchedule, scaling_factor: float, batch: Batch, draws: Draws, device: torch.device
) -> tuple[Tensor, Tensor]:
    """One forward pass.

    Args:
        scaling_factor: That of the autoencoder: brings latents to about unit variance.

    Returns:
        The loss of each sample, (B,), with its graph; and the mean square of the clean latents.
    """
    latents = sample_latents(batch.moments, draws.latent_noise, scaling_factor)
    noisy = schedule.add_noise(latents, draws.noise, draws.timesteps)
    text = torch.where(draws.dropped[:, None, None], batch.empty_text, batch.text)
    prediction = engine.forward(noisy.to(device), draws.timesteps.to(device), text.to(device), batch.fps.to(device))
    squares = (prediction.float() - draws.noise.to(device)).square()
    return squares.flatten(1).mean(1), latents.square().mean()


def best_linear_loss(schedule: NoiseSchedule, latent_power: float) -> float:
    """Expected loss of the best predictor that only scales its input, c_t x_t: a network that learns must beat it.

    With x_t = A x_0 + S eps and E x_0^2 = v it is A^2 v / (A^2 v + S^2), averaged over timesteps. Predicting 0 costs 1.
    """
    signal = schedule.alphas_cumprod * schedule.signal_scale**2 * latent_power
    return float((signal / (signal + 1 - schedule.alphas_cumprod)).mean())
