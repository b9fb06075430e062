"""Across frames, how things move: the modules VideoCrafter adds to the image network.

The temporal convolution looks at neighbouring frames, the temporal transformer at all frames, both at one pixel at a
time; text never reaches them. Their normalisations take statistics over the whole clip. Both start as the identity.
Nothing tells frames their place except the zeros that the convolution meets at the ends of a clip (and the optional
relative positions of VideoCrafter1), so any number of frames will do; an image is a clip of one.
Shapes: B clips, T frames (B T: clip-major), C channels, H x W latent pixels. Feature maps are (B T, C, H, W) in
channels-last memory.
Sources: Wang et al. 2023 (ModelScope) for the convolution, Chen et al. 2023 (VideoCrafter1) for the transformer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vc2.model.attention import Attention, FeedForward, Transformer, zeroed
from vc2.model.config import Recompute

__all__ = ["FrameConv", "TemporalBlock", "TemporalConv", "TemporalTransformer"]


class FrameConv(nn.Conv3d):
    """A convolution over neighbouring frames, pixel by pixel: of size (k, 1, 1), padded with zero frames.

    Its weight can be taken apart (`split_taps`), so that only the tap that acts within a frame learns.
    """

    is_split = False
    middle: nn.Parameter  # (C_out, C, 1, 1, 1), once taken apart
    outer: nn.Parameter  # (C_out, C, k - 1, 1, 1), likewise: the taps before and after it

    def split_taps(self) -> None:
        """Make the middle tap and the others two parameters in place of `weight`. State dicts keep the plain name."""
        if not self.is_split:
            self.middle, self.outer = map(nn.Parameter, self._split(self.weight.detach()))
            self.register_parameter("weight", None)
            self.is_split = True

    def taps(self) -> Tensor:
        """All taps, (C_out, C, k, 1, 1), whether or not they are one parameter."""
        if not self.is_split:
            return self.weight
        before = int(self.padding[0])
        return torch.cat([self.outer[:, :, :before], self.middle, self.outer[:, :, before:]], dim=2)

    def _split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        at = int(self.padding[0])
        return weight[:, :, at : at + 1].clone(memory_format=torch.contiguous_format), torch.cat(
            [weight[:, :, :at], weight[:, :, at + 1 :]], dim=2
        )

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C_out, T, H, W), as a 2D convolution over (T, H W): equal numbers, faster."""
        clip, padding = input.flatten(3), int(self.padding[0])
        if input.shape[2] == 1:  # all neighbours are padding: only the middle tap acts
            middle = self.middle if self.is_split else self.weight[:, :, padding : padding + 1]
            frames = F.conv2d(clip, middle.squeeze(-1), self.bias)
        else:
            frames = F.conv2d(clip, self.taps().squeeze(-1), self.bias, padding=(padding, 0))
        return frames.unflatten(3, input.shape[3:])

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_split:
            del destination[f"{prefix}middle"], destination[f"{prefix}outer"]
            destination[f"{prefix}weight"] = self.taps() if keep_vars else self.taps().detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.is_split and f"{prefix}weight" in state_dict:
            middle, outer = self._split(state_dict.pop(f"{prefix}weight"))
            state_dict |= {f"{prefix}middle": middle, f"{prefix}outer": outer}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class TemporalConv(nn.Module):
    """Four convolutions over time; the last starts at zero.

    Args:
        channels: Width.
        groups: Groups of the normalisations.
        dropout: Before each but the first convolution; 0.1 in every released model.
    """

    def __init__(self, channels: int, *, groups: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels, eps=1e-5) for _ in range(4))
        self.convs = nn.ModuleList(FrameConv(channels, channels, (3, 1, 1), padding=(1, 0, 0)) for _ in range(4))
        self.dropout = nn.Dropout(dropout)
        zeroed(self.convs[-1])

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """(B T, C, H, W) -> the same; `num_frames` is T."""
        clip = branch = rearrange(x, "(b t) c h w -> b c t h w", t=num_frames)
        for stage, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            branch = F.silu(norm(branch))
            branch = conv(self.dropout(branch) if stage else branch)
        return rearrange(clip + branch, "b c t h w -> (b t) c h w")


class TemporalTransformer(Transformer):
    """The frames of a clip attend to each other, at every pixel.

    Args:
        channels: Width of the feature map.
        heads, head_dim: Their product is the width inside.
        depth: Number of blocks.
        groups: Groups of the normalisation.
        use_linear: Projections are linear layers; False: 1-D convolutions of kernel size 1 (the same map).
        relative_reach: Largest frame distance that relative positions tell apart; None: no positions.
        causal: A frame sees only itself and earlier ones.
        recompute: What the blocks keep for the backward pass.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        *,
        depth: int = 1,
        groups: int = 32,
        use_linear: bool = True,
        relative_reach: int | None = None,
        causal: bool = False,
        recompute: Recompute = "none",
    ) -> None:
        width = heads * head_dim
        blocks = [
            TemporalBlock(width, heads, head_dim, relative_reach=relative_reach, causal=causal) for _ in range(depth)
        ]
        kernel_dims = 0 if use_linear else 1
        super().__init__(channels, width, blocks, groups=groups, kernel_dims=kernel_dims, recompute=recompute)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """(B T, C, H, W) -> the same; `num_frames` is T."""
        clip = self.norm(rearrange(x, "(b t) c h w -> b c t (h w)", t=num_frames))
        tokens = self.branch(rearrange(clip, "b c t p -> b t p c"))
        return x + rearrange(tokens, "b t (h w) c -> (b t) c h w", h=x.shape[2])


class TemporalBlock(nn.Module):
    """Self-attention over frames, twice, and feed-forward. The second one stands where the image network reads text."""

    def __init__(self, width: int, heads: int, head_dim: int, *, relative_reach: int | None, causal: bool) -> None:
        super().__init__()
        self.first_norm = nn.LayerNorm(width)
        self.first_attention = Attention(width, heads, head_dim, relative_reach=relative_reach, causal=causal)
        self.second_norm = nn.LayerNorm(width)
        self.second_attention = Attention(width, heads, head_dim, relative_reach=relative_reach, causal=causal)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.first_attention(self.first_norm(tokens))
        tokens = tokens + self.second_attention(self.second_norm(tokens))
        return tokens + self.feed_forward(self.feed_forward_norm(tokens))
