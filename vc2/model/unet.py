"""The denoising network of VideoCrafter2: Stable Diffusion's image network with modules that look across frames.

    latents -> conv_in -> first_temporal_attention -> down levels -> middle -> up levels -> norm_out, conv_out -> noise
                                                          \\_______ skips ______/

Timestep and frame rate reach every residual block as one embedding, text reaches every spatial transformer. Spatial
modules see B T separate frames, temporal ones whole clips. At its initial values the video network is the image network
applied to every frame alone: everything temporal adds zero, the frame rate included.
Shapes: B clips, C latent channels, T frames, H x W latent pixels, L text tokens of width D, M image tokens of width D.
Source: Chen et al. 2024 (VideoCrafter2), the released 512 x 320 text-to-video network.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vc2.model.attention import zeroed
from vc2.model.blocks import Conditions, DownLevel, Middle, UpLevel, temporal_transformer
from vc2.model.config import UNetConfig
from vc2.model.schedule import sinusoidal_features
from vc2.model.spatial import Float32GroupNorm

__all__ = ["DEFAULT_FPS", "FIRST_HEADS", "UNet3D"]

DEFAULT_FPS = 16  # what the released network assumes when told nothing
FIRST_HEADS = 8  # of the first temporal transformer, at every width


class UNet3D(nn.Module):
    """Predicts the noise in a clip of latents, from timestep, text, frame rate and, optionally, image tokens."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width, emb_channels = config.model_channels, 4 * config.model_channels

        self.time_embedding = Embedding(width, emb_channels)
        self.fps_embedding = Embedding(width, emb_channels) if config.fps_cond else None
        if self.fps_embedding is not None:
            zeroed(self.fps_embedding.out)

        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        # The one transformer whose projections are convolutions even where use_linear is set.
        self.first_temporal_attention = (
            temporal_transformer(config, width, FIRST_HEADS, use_linear=False) if config.addition_attention else None
        )

        level_widths = [mult * width for mult in config.channel_mult]
        attends = [2**level in config.attention_resolutions for level in range(len(level_widths))]
        last = len(level_widths) - 1
        skip_widths = [width]
        self.down = nn.ModuleList()
        for level, level_width in enumerate(level_widths):
            self.down.append(DownLevel(config, width, level_width, attends=attends[level], is_last=level == last))
            width = level_width
            skip_widths += [width] * (config.num_res_blocks + (level != last))

        self.middle = Middle(config, width)

        self.up = nn.ModuleList()
        for level in reversed(range(len(level_widths))):
            skips = [skip_widths.pop() for _ in range(config.num_res_blocks + 1)]
            self.up.append(
                UpLevel(config, width, skips, level_widths[level], attends=attends[level], is_last=level == 0)
            )
            width = level_widths[level]

        self.norm_out = Float32GroupNorm(config.norm_groups, width, eps=1e-5)
        self.conv_out = zeroed(nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        *,
        fps: int | Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise in noisy latents.

        Args:
            latents: Noisy latents, (B, C, T, H, W); H and W multiples of `config.downsampling`, T any number.
            timesteps: One diffusion step per clip, (B,), integers.
            text: Text tokens of every clip, (B, L, D), or of every frame, (B T, L, D), clip-major.
            fps: Frame rate, one number or one per clip, (B,); None means 16. 0 is a rate like any other. Not used by a
                network without fps_cond.
            image: Image tokens, (B, M, D) or (B T, M, D); needs `config.use_image_attention`.

        Returns:
            The noise, (B, C_out, T, H, W), in the type of `latents`; inside, the type is that of the parameters.

        Raises:
            ValueError: If a shape is none of the above.
        """
        self._check_shapes(latents, timesteps, text, fps, image)
        dtype, num_frames = self.conv_in.weight.dtype, latents.shape[2]
        emb = self._embed(timesteps, fps).to(dtype)
        given = Conditions(emb, text.to(dtype), None if image is None else image.to(dtype), num_frames)

        x = rearrange(latents.to(dtype), "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        if self.first_temporal_attention is not None:
            x = self.first_temporal_attention(x, num_frames)
        skips = [x]
        for level in self.down:
            skips += level(skips[-1], given)
        x = self.middle(skips[-1], given)
        for level in self.up:
            x = level(x, skips, given)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return rearrange(x, "(b t) c h w -> b c t h w", t=num_frames).to(latents.dtype)

    def _embed(self, timesteps: Tensor, fps: int | Tensor | None) -> Tensor:
        emb = self.time_embedding(timesteps)
        if self.fps_embedding is not None:
            rates = torch.as_tensor(DEFAULT_FPS if fps is None else fps, device=timesteps.device)
            emb = emb + self.fps_embedding(rates.expand(timesteps.shape[0]))
        return emb

    def _check_shapes(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, fps: int | Tensor | None, image: Tensor | None
    ) -> None:
        config = self.config
        if latents.dim() != 5 or latents.shape[1] != config.in_channels:
            raise ValueError(f"latents are {tuple(latents.shape)}, expected (B, {config.in_channels}, T, H, W)")
        clips, _, frames, height, width = latents.shape
        if height % config.downsampling or width % config.downsampling:
            raise ValueError(f"latents are {height} x {width} (H x W): need multiples of {config.downsampling}")
        if timesteps.shape != (clips,):
            raise ValueError(f"timesteps are {tuple(timesteps.shape)}, expected one per clip, ({clips},)")
        if isinstance(fps, Tensor) and fps.dim() and fps.shape != (clips,):
            raise ValueError(f"fps is {tuple(fps.shape)}, expected one number or one per clip, ({clips},)")
        if image is not None and not config.use_image_attention:
            raise ValueError("image tokens given to a network without use_image_attention")
        for name, tokens in (("text", text), ("image", image)):
            if tokens is not None and (
                tokens.dim() != 3
                or tokens.shape[0] not in (clips, clips * frames)
                or tokens.shape[2] != config.context_dim
            ):
                expected = f"({clips} or {clips * frames}, tokens, {config.context_dim})"
                raise ValueError(f"{name} is {tuple(tokens.shape)}, expected {expected}")


class Embedding(nn.Module):
    """A number per clip, as sinusoids, through two linear layers."""

    def __init__(self, width: int, emb_channels: int) -> None:
        super().__init__()
        self.width = width
        self.hidden = nn.Linear(width, emb_channels)
        self.out = nn.Linear(emb_channels, emb_channels)

    def forward(self, values: Tensor) -> Tensor:
        """(B,) -> (B, E)."""
        features = sinusoidal_features(values, self.width).to(self.hidden.weight.dtype)
        return self.out(F.silu(self.hidden(features)))
