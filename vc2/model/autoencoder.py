"""The frozen autoencoder between pixels and latents: Stable Diffusion's KL autoencoder, applied to every frame alone.

The encoder gives a normal distribution per latent pixel, its *moments*: mean and log-variance stacked on channels. A
sample of it, times `scaling_factor`, is what the denoising network works on:

    latents = scaling_factor (mean + exp(logvar / 2) noise)        Rombach et al. 2022, Sec. 3.1

Shapes: B clips, T frames, H x W pixels, C latent channels, h x w latent pixels (H / 8, W / 8 with four levels).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from vc2.errors import WeightsError
from vc2.model.config import AutoencoderConfig
from vc2.model.files import fill, read_weights, write_weights
from vc2.model.weights import autoencoder_from_released

__all__ = ["Autoencoder", "sample_latents"]


class Autoencoder(nn.Module):
    """Frames to latents and back. Frozen, in evaluation mode; who trains one thaws `net`, a plain `AutoencoderKL`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        levels = len(config.block_out_channels)
        shape = {
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "block_out_channels": config.block_out_channels,
            "layers_per_block": config.layers_per_block,
            "latent_channels": config.latent_channels,
            "norm_num_groups": config.norm_groups,
            "scaling_factor": config.scaling_factor,
        }
        self.net: Any = AutoencoderKL(**shape)  # Any: the types it states are not those it takes and gives
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def moments(self, frames: Tensor, *, frames_at_once: int = 16) -> Tensor:
        """Mean and log-variance of the latents of every frame, unscaled.

        Args:
            frames: Pixels in [-1, 1], (B, 3, T, H, W); H and W multiples of `config.downsampling`.
            frames_at_once: Frames encoded together: bounds the memory, changes nothing else.

        Returns:
            (B, 2C, T, h, w): C channels of means, then C of log-variances, clamped to [-30, 20].

        Raises:
            ValueError: If height or width is no multiple of `config.downsampling`.
        """
        factor = self.config.downsampling
        if frames.shape[-1] % factor or frames.shape[-2] % factor:
            raise ValueError(
                f"frames are {frames.shape[-2]} x {frames.shape[-1]} pixels (h x w): need multiples of {factor}"
            )
        images = rearrange(frames, "b c t h w -> (b t) c h w")
        parts = []
        for chunk in images.split(frames_at_once):
            mean, logvar = self.net.encode(chunk, return_dict=False)[0].parameters.chunk(2, dim=1)
            parts.append(torch.cat([mean, logvar.clamp(-30.0, 20.0)], dim=1))
        return rearrange(torch.cat(parts), "(b t) c h w -> b c t h w", b=frames.shape[0])

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents drawn from `moments` with the given standard normal `noise` (see `sample_latents`)."""
        return sample_latents(moments, noise, self.config.scaling_factor)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, frames_at_once: int = 4) -> Tensor:
        """Pixels of scaled latents, (B, C, T, h, w) -> (B, 3, T, H, W), around [-1, 1] but not clamped.

        Args:
            latents: Scaled latents, as `sample` and the sampler give them.
            frames_at_once: Frames decoded together: bounds the memory, changes nothing else.
        """
        images = rearrange(latents, "b c t h w -> (b t) c h w") / self.config.scaling_factor
        frames = torch.cat([self.net.decode(chunk, return_dict=False)[0] for chunk in images.split(frames_at_once)])
        return rearrange(frames, "(b t) c h w -> b c t h w", b=latents.shape[0])

    def save(self, path: str | Path) -> None:
        """Write weights and shape to one safetensors file."""
        write_weights(path, self.net.state_dict(), self.config)

    @classmethod
    def from_safetensors(cls, path: str | Path, config: AutoencoderConfig | None = None) -> "Autoencoder":
        """An autoencoder from weights under diffusers' names or those of LDM.

        Args:
            path: A file of ours (from `save`), of diffusers, or a checkpoint that holds an autoencoder.
            config: The shape; None reads what `save` wrote into the file.

        Raises:
            WeightsError: If the file holds no shape and none is given, or its tensors do not fit.
        """
        state, stored = read_weights(path, AutoencoderConfig)
        config = config or stored
        if config is None:
            raise WeightsError(f"{path}: no shape stored in the file; give an AutoencoderConfig")
        model = cls(config)
        fill(model.net, autoencoder_from_released(state, len(config.block_out_channels)), what=str(path))
        return model

    @classmethod
    def from_released(cls, config: AutoencoderConfig, state_dict: Mapping[str, Tensor]) -> "Autoencoder":
        """An autoencoder from a released or LDM checkpoint, whose names may begin with `first_stage_model.`.

        Raises:
            WeightsError: If any tensor is missing, unexpected, or of another shape.
        """
        model = cls(config)
        renamed = autoencoder_from_released(state_dict, len(config.block_out_channels))
        fill(model.net, renamed, what="released autoencoder")
        return model


def sample_latents(moments: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """Scaled latents from moments: scaling_factor (mean + exp(logvar / 2) noise).

    Args:
        moments: Mean and log-variance on axis 1, (B, 2C, ...), for example (B, 2C, T, h, w).
        noise: Standard normal, (B, C, ...).
        scaling_factor: `AutoencoderConfig.scaling_factor`.

    Raises:
        ValueError: If the shapes do not match.
    """
    mean, logvar = moments.chunk(2, dim=1)
    if noise.shape != mean.shape:
        raise ValueError(f"noise is {tuple(noise.shape)}, means are {tuple(mean.shape)}: shapes must match")
    return scaling_factor * (mean + torch.exp(0.5 * logvar) * noise)
