"""ConvNeXt for clips: the aesthetic branch of DOVER.

ConvNeXt (Liu et al., arXiv 2201.03545) with its convolutions inflated in time. Patches of 2 frames x 4 x 4 pixels
become tokens; four stages follow, and before all but the first the picture is halved by 2 x 2 patches. A block is

    x + layer_scale * contract(GELU(expand(norm(depthwise(x)))))

where the depthwise convolution is 7 x 7 in space. In time it is 1, 3, 1, 1, 3, 1, ... tokens long: the second of every
three blocks of a stage looks at its neighbours, and beyond the ends of the clip stand zeros. All norms are over
channels, with eps 1e-6; the last one follows the last stage.

Shapes: B clips, C channels, T frames (or tokens of two frames), H x W pixels (or tokens).
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

__all__ = ["ConvNeXt3D"]

_EPS = 1e-6
_TIME_KERNELS = (1, 3, 1)


class ConvNeXt3D(nn.Module):
    """Clips to features; defaults are ConvNeXt-T.

    Args:
        widths: Channels of the stages.
        depths: Blocks of the stages.
    """

    def __init__(self, widths: Sequence[int] = (96, 192, 384, 768), depths: Sequence[int] = (3, 3, 9, 3)) -> None:
        super().__init__()
        incoming = (3, *widths[:-1])
        self.stages = nn.ModuleList(
            Stage(before, width, depth, is_first=level == 0)
            for level, (before, width, depth) in enumerate(zip(incoming, widths, depths, strict=True))
        )
        self.norm = ChannelNorm(widths[-1], eps=_EPS)

    def forward(self, clips: Tensor) -> Tensor:
        """Features (B, C, T/2, H/32, W/32) of normalised clips (B, 3, T, H, W); a rest of a patch is left out."""
        x = clips
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, T, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(input, "b c t h w -> b t h w c")), "b t h w c -> b c t h w")


class Stage(nn.Module):
    """Fewer pixels of more channels, then blocks. The first stage cuts the clip into patches and norms after that."""

    def __init__(self, before: int, width: int, depth: int, is_first: bool) -> None:
        super().__init__()
        patch = (2, 4, 4) if is_first else (1, 2, 2)
        convolution = nn.Conv3d(before, width, kernel_size=patch, stride=patch)
        norm = ChannelNorm(width if is_first else before, eps=_EPS)
        parts = {"convolution": convolution, "norm": norm} if is_first else {"norm": norm, "convolution": convolution}
        self.downsample = nn.ModuleDict(parts)
        self.blocks = nn.Sequential(*(Block(width, _TIME_KERNELS[i % len(_TIME_KERNELS)]) for i in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.downsample.values():  # in the order given
            x = part(x)
        return self.blocks(x)


class Block(nn.Module):
    def __init__(self, width: int, time_kernel: int) -> None:
        super().__init__()
        kernel = (time_kernel, 7, 7)
        self.depthwise = nn.Conv3d(width, width, kernel, padding=(time_kernel // 2, 3, 3), groups=width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.layer_scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        inner = rearrange(self.depthwise(x), "b c t h w -> b t h w c")
        inner = self.contract(nn.functional.gelu(self.expand(self.norm(inner))))
        return x + rearrange(self.layer_scale * inner, "b t h w c -> b c t h w")
