"""Within a frame, what things look like: residual block, transformer over pixels and text, resampling.

All of it is Stable Diffusion 2.1's image network (Rombach et al. 2022), applied to every frame alone.
Shapes: N = B T frames (clip-major), C channels, H x W latent pixels, L text tokens, E embedding width. Feature maps are
(N, C, H, W) in channels-last memory, so that pixels are tokens, and frames are time, without copying.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vc2.model.attention import Attention, FeedForward, Transformer, zeroed
from vc2.model.config import Recompute

__all__ = [
    "Downsample",
    "Float32GroupNorm",
    "ResidualBlock",
    "SpatialBlock",
    "SpatialTransformer",
    "Upsample",
]


class Float32GroupNorm(nn.GroupNorm):
    """Group normalisation in float32, whatever the type of its input."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(input.float(), self.num_groups, weight, bias, self.eps).to(input.dtype)


class ResidualBlock(nn.Module):
    """Two convolutions around the embedding of timestep and frame rate.

    Args:
        channels, out_channels: Widths.
        emb_channels: Width E of the embedding.
        groups: Groups of the normalisations.
        dropout: Before the second convolution.
    """

    def __init__(
        self, channels: int, out_channels: int, emb_channels: int, *, groups: int = 32, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm_in = Float32GroupNorm(groups, channels, eps=1e-5)
        self.conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(emb_channels, out_channels)
        self.norm_out = Float32GroupNorm(groups, out_channels, eps=1e-5)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(N, C, H, W) and the embedding of every clip or frame, (B, E) or (N, E) -> (N, C_out, H, W)."""
        branch = self.conv_in(F.silu(self.norm_in(x)))
        shift = self.embedding(F.silu(emb)).repeat_interleave(x.shape[0] // emb.shape[0], dim=0)
        branch = branch + shift[:, :, None, None]
        branch = self.conv_out(self.dropout(F.silu(self.norm_out(branch))))
        return self.skip(x) + branch


class SpatialTransformer(Transformer):
    """Pixels of a frame attend to each other and to the text.

    Args:
        channels: Width of the feature map.
        heads, head_dim: Their product is the width inside.
        context_dim: Width of the text tokens.
        depth: Number of blocks.
        groups: Groups of the normalisation.
        use_linear: Projections are linear layers; False: 1x1 convolutions (the same map), as in Stable Diffusion 1.
        image_context: Blocks read image tokens too.
        recompute: What the blocks keep for the backward pass.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        context_dim: int,
        *,
        depth: int = 1,
        groups: int = 32,
        use_linear: bool = True,
        image_context: bool = False,
        recompute: Recompute = "none",
    ) -> None:
        width = heads * head_dim
        blocks = [SpatialBlock(width, heads, head_dim, context_dim, image_context=image_context) for _ in range(depth)]
        kernel_dims = 0 if use_linear else 2
        super().__init__(channels, width, blocks, groups=groups, kernel_dims=kernel_dims, recompute=recompute)

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        """(N, C, H, W), text (B or N, L, D), image tokens (B or N, M, D) or None -> (N, C, H, W)."""
        tokens = self.branch(rearrange(self.norm(x), "n c h w -> n (h w) c"), text, image)
        return x + rearrange(tokens, "n (h w) c -> n c h w", h=x.shape[2])


class SpatialBlock(nn.Module):
    """Self-attention over pixels, attention to the text, feed-forward."""

    def __init__(self, width: int, heads: int, head_dim: int, context_dim: int, *, image_context: bool) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads, head_dim)
        self.text_norm = nn.LayerNorm(width)
        self.text_attention = Attention(width, heads, head_dim, context_dim=context_dim, image_context=image_context)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, tokens: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        tokens = tokens + self.self_attention(self.self_norm(tokens))
        tokens = tokens + self.text_attention(self.text_norm(tokens), text, image)
        return tokens + self.feed_forward(self.feed_forward_norm(tokens))


class Downsample(nn.Module):
    """Half the height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the height and width: every pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
