"""One layer of the video network: the image network's modules, each followed by its companion in time.

    residual (+ temporal_conv) -> spatial_attention -> temporal_attention

Layers and resampling form levels; levels form the network (`vc2/model/unet.py`).
Shapes: B clips, T frames, N = B T (clip-major), C channels, H x W latent pixels, E embedding width, L and M tokens of
width D. Feature maps are (N, C, H, W) in channels-last memory.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from vc2.model.config import Recompute, UNetConfig
from vc2.model.recompute import recomputed
from vc2.model.spatial import Downsample, ResidualBlock, SpatialTransformer, Upsample
from vc2.model.temporal import TemporalConv, TemporalTransformer

__all__ = ["Conditions", "DownLevel", "Layer", "Middle", "UpLevel", "temporal_transformer"]


@dataclass(frozen=True, slots=True)
class Conditions:
    """What every layer is told besides its feature map."""

    emb: Tensor  # (B, E), timestep and frame rate
    text: Tensor  # (B or N, L, D)
    image: Tensor | None  # (B or N, M, D)
    num_frames: int  # T


class Layer(nn.Module):
    """A residual block with its temporal convolution, and transformers where the level has them."""

    def __init__(self, config: UNetConfig, channels: int, out_channels: int, *, attends: bool) -> None:
        super().__init__()
        self.recompute: Recompute = config.gradient_checkpointing
        groups, emb_channels = config.norm_groups, 4 * config.model_channels
        self.residual = ResidualBlock(channels, out_channels, emb_channels, groups=groups, dropout=config.dropout)
        self.temporal_conv = (
            TemporalConv(out_channels, groups=groups, dropout=config.temporal_conv_dropout)
            if config.temporal_conv
            else None
        )
        heads, head_dim = out_channels // config.num_head_channels, config.num_head_channels
        self.spatial_attention = (
            SpatialTransformer(
                out_channels,
                heads,
                head_dim,
                config.context_dim,
                depth=config.transformer_depth,
                groups=groups,
                use_linear=config.use_linear,
                image_context=config.use_image_attention,
                recompute=config.gradient_checkpointing,
            )
            if attends
            else None
        )
        self.temporal_attention = (
            temporal_transformer(config, out_channels, heads, use_linear=config.use_linear)
            if attends and config.temporal_attention
            else None
        )

    def forward(self, x: Tensor, given: Conditions) -> Tensor:
        """(N, C, H, W) -> (N, C_out, H, W)."""
        x = recomputed(self.recompute, self._convolve, x, given.emb, given.num_frames)
        if self.spatial_attention is not None:
            x = self.spatial_attention(x, given.text, given.image)
        if self.temporal_attention is not None:
            x = self.temporal_attention(x, given.num_frames)
        return x

    def _convolve(self, x: Tensor, emb: Tensor, num_frames: int) -> Tensor:
        x = self.residual(x, emb)
        return x if self.temporal_conv is None else self.temporal_conv(x, num_frames)


class DownLevel(nn.Module):
    """Layers at one resolution on the way down, then half the resolution (not after the last level)."""

    def __init__(self, config: UNetConfig, channels: int, out_channels: int, *, attends: bool, is_last: bool) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * config.num_res_blocks
        self.layers = nn.ModuleList(
            Layer(config, width, following, attends=attends) for width, following in pairwise(widths)
        )
        self.downsample = None if is_last else Downsample(out_channels)

    def forward(self, x: Tensor, given: Conditions) -> list[Tensor]:
        """All feature maps made on the way: the skips, the last of which goes on down."""
        made = []
        for layer in self.layers:
            x = layer(x, given)
            made.append(x)
        if self.downsample is not None:
            made.append(self.downsample(x))
        return made


class Middle(nn.Module):
    """The bottom: a layer that always attends, and one that never does."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, channels, channels, attends=attends) for attends in (True, False))

    def forward(self, x: Tensor, given: Conditions) -> Tensor:
        for layer in self.layers:
            x = layer(x, given)
        return x


class UpLevel(nn.Module):
    """Layers at one resolution on the way up, each joined by the skip it answers, then twice the resolution."""

    def __init__(
        self,
        config: UNetConfig,
        channels: int,
        skip_channels: list[int],
        out_channels: int,
        *,
        attends: bool,
        is_last: bool,
    ) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * (len(skip_channels) - 1)
        self.layers = nn.ModuleList(
            Layer(config, width + skip, out_channels, attends=attends)
            for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.upsample = None if is_last else Upsample(out_channels)

    def forward(self, x: Tensor, skips: list[Tensor], given: Conditions) -> Tensor:
        """Takes its skips from the end of `skips`."""
        for layer in self.layers:
            x = layer(torch.cat([x, skips.pop()], dim=1), given)
        return x if self.upsample is None else self.upsample(x)


def temporal_transformer(config: UNetConfig, channels: int, heads: int, *, use_linear: bool) -> TemporalTransformer:
    """A temporal transformer with the options of the network."""
    return TemporalTransformer(
        channels,
        heads,
        config.num_head_channels,
        depth=config.transformer_depth,
        groups=config.norm_groups,
        use_linear=use_linear,
        relative_reach=config.temporal_length if config.use_relative_position else None,
        causal=config.use_causal_attention,
        recompute=config.gradient_checkpointing,
    )
