"""Forward diffusion: how clean latents become noisy ones.

With the cumulative signal level a_t (`alphas_cumprod`) a clean latent x_0 is noised to

    x_t = sqrt(a_t) s_t x_0 + sqrt(1 - a_t) eps,    eps ~ N(0, I)        Ho et al. 2020, Eq. 4

The square roots of the betas rise linearly, as in latent diffusion (Rombach et al. 2022). s_t is the *signal scaling*
of the 512 model: 1 at t = 0, falling linearly to a floor, constant from there on; without it s_t = 1. The network
learns eps. Tables are float64: neighbouring signal levels differ by less than half precision can tell.
Shapes: B clips, C latent channels, T frames, H x W latent pixels. T is frames; a diffusion step is a *timestep*.
"""

import math

import numpy as np
import torch
from torch import Tensor

from vc2.errors import ConfigError
from vc2.model.config import ScheduleConfig

__all__ = ["NoiseSchedule", "sinusoidal_features"]


class NoiseSchedule:
    """Noise levels of every timestep, float64, each of shape (num_timesteps,)."""

    def __init__(self, config: ScheduleConfig) -> None:
        if config.signal_scaling and config.signal_knee > config.num_timesteps:
            raise ConfigError(
                f"signal_knee={config.signal_knee} lies beyond num_timesteps={config.num_timesteps}: lower the knee"
            )
        self.config = config
        roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_timesteps, dtype=torch.float64)
        self.betas = roots**2
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        self.signal_scale = torch.ones(config.num_timesteps, dtype=torch.float64)
        if config.signal_scaling:
            self.signal_scale[config.signal_knee :] = config.signal_floor
            ramp = np.linspace(1.0, config.signal_floor, config.signal_knee)  # torch's differs in the last bit
            self.signal_scale[: config.signal_knee] = torch.from_numpy(ramp)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean latents up to the given timesteps (Ho et al. 2020, Eq. 4, with signal scaling).

        Args:
            latents: Clean latents, (B, C, T, H, W), scaled to about unit variance.
            noise: Standard normal noise, shape of `latents`.
            timesteps: One diffusion step per clip, (B,), integers in [0, num_timesteps).

        Returns:
            Noisy latents, shape and dtype of `latents`.

        Raises:
            ValueError: If `noise` and `latents` differ in shape, or `timesteps` is not one per clip.
        """
        if noise.shape != latents.shape:
            raise ValueError(f"noise is {tuple(noise.shape)}, latents are {tuple(latents.shape)}: shapes must match")
        if timesteps.shape != latents.shape[:1]:
            raise ValueError(
                f"timesteps are {tuple(timesteps.shape)}: expected one per clip, {tuple(latents.shape[:1])}"
            )
        steps = timesteps.cpu()
        per_clip = (-1,) + (1,) * (latents.dim() - 1)
        signal = (self.alphas_cumprod[steps].sqrt() * self.signal_scale[steps]).view(per_clip)
        sigma = (1 - self.alphas_cumprod[steps]).sqrt().view(per_clip)
        # The factors are rounded once, to float32, whatever the type of the latents.
        signal, sigma = (factor.to(latents.device, torch.float32) for factor in (signal, sigma))
        return (signal * latents + sigma * noise).to(latents.dtype)


def sinusoidal_features(values: Tensor, width: int, *, max_period: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of values at geometrically falling frequencies (Vaswani et al. 2017, Sec. 3.5).

    Args:
        values: Timesteps or frame rates, (B,), used as they are.
        width: Number of features; an odd width ends in a column of zeros.
        max_period: The longest period is 2 pi times about this.

    Returns:
        (B, width), float32.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    frequencies = torch.exp(-math.log(max_period) * steps / half)
    angles = values.to(torch.float32)[:, None] * frequencies
    return torch.nn.functional.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))
