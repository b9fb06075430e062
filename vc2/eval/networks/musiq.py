"""MUSIQ (Ke et al. 2021, arXiv 2108.05997): how good a picture is technically, seen at several scales at once.

A picture is taken as it is and scaled (bicubic without blur, shape kept) to a long side of 224 and of 384. Each of the
three is cut into patches of 32 x 32, zeros filling the edges. A patch passes a small ResNet of five layers and becomes
one token; added to it are what its place is hashed to, on a grid of 10 x 10 that is laid over the picture whatever its
shape, and which scale it is of. A transformer reads all tokens, and one more whose last state is turned into a score.
The ResNet's kernels are standardised each time (weight standardisation, Qiao et al. 2019), its edges padded as
TensorFlow pads them: the odd pixel after, not before.

VBench scales pictures with a long side above 512 to that, bilinear without blur, before it hands them over, and takes
the weights trained on SPAQ, whose scores are 0..100.

Weights: `musiq_spaq_ckpt-358bb6af.pth` of pyiqa (or another of its MUSIQ files with one output: KonIQ, PaQ-2-PiQ).
Shapes: T frames, B of them at once, N tokens, D width.
"""

import re
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.transforms import functional as pictures

from vc2.errors import WeightsError
from vc2.eval.networks.frames import in_batches
from vc2.eval.networks.public_names import Found, fill_from
from vc2.eval.networks.vit import EPS, Block
from vc2.model.files import Tensors, open_weights

__all__ = ["Musiq"]

PATCH = 32  # pixels; the ResNet halves them twice
LONG_SIDES = (224, 384)  # of the scaled pictures; the third scale is the picture itself
LONGEST = 512  # what VBench lets through unscaled


class Musiq(nn.Module):
    """Frames to scores. Arbitrary until weights are loaded.

    Args:
        width: Of the tokens.
        mlp_width: Inside the blocks.
        depth: Number of blocks.
        heads: Of the attention.
        channels: Of the ResNet's first layer; four times as many leave it. A multiple of 32.
        grid: Side of the grid that places are hashed to.
    """

    def __init__(
        self,
        *,
        width: int = 384,
        mlp_width: int = 1152,
        depth: int = 14,
        heads: int = 6,
        channels: int = 64,
        grid: int = 10,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.root = StandardisedConv(3, channels, 7, stride=2)
        self.root_norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.residual = Bottleneck(channels, 4 * channels)
        self.token = nn.Linear(4 * channels * (PATCH // 4) ** 2, width)
        self.places = nn.Parameter(torch.zeros(1, grid**2, width))
        self.scales = nn.Parameter(torch.zeros(1 + len(LONG_SIDES), width))
        self.whole = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList([Block(width, mlp_width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.score = nn.Linear(width, 1)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """The network of a file of weights; its sizes are read off the tensors.

        Raises:
            WeightsError: If a tensor is missing, unexpected or of another shape.
        """
        tensors = open_weights(path).renamed(lambda name: name.removeprefix("module."))
        network = cls(**_sizes(tensors))
        fill_from(network, tensors, _public_names(network), cause="not MUSIQ as pyiqa stores it, with one output")
        return network.to(device)

    @torch.inference_mode()
    def scores(self, frames: np.ndarray, *, batch: int = 8) -> np.ndarray:
        """One score per frame.

        Args:
            frames: (T, H, W, 3) uint8 RGB, of any size.
            batch: Frames on the device at once.

        Returns:
            (T,) float32, 0..100 with the weights of SPAQ.

        Raises:
            ValueError: If the frames are of another shape or type, or there is none.
        """
        found = [self(self.pixels(images)).cpu() for images in in_batches(frames, batch, self.whole.device)]
        return torch.cat(found).numpy()

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..255 -> (B, 3, h, w) in [-1, 1], the long side 512 at most."""
        height, width = images.shape[-2:]
        if (longest := max(height, width)) > LONGEST:
            scale = LONGEST / longest
            size = [max(1, int(scale * height)), max(1, int(scale * width))]
            images = pictures.resize(images, size, antialias=False)
        return (images / 255 - 0.5) * 2

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, h, w) from `pixels` -> (B,)."""
        at_scales = [*(_scaled(pixels, side) for side in LONG_SIDES), pixels]
        tokens = [self.tokens(images, scale) for scale, images in enumerate(at_scales)]
        x = torch.cat([self.whole.expand(len(pixels), -1, -1), *tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.score(self.norm(x)[:, 0])[:, 0]

    def tokens(self, images: Tensor, scale: int) -> Tensor:
        """(B, 3, h, w) -> (B, N, D), row by row."""
        padded = _padded(images, PATCH, PATCH)
        patches = rearrange(padded, "b c (h p) (w q) -> (b h w) c p q", p=PATCH, q=PATCH)
        x = F.max_pool2d(_padded(F.relu(self.root_norm(self.root(patches))), 3, 2), 3, stride=2)
        x = self.token(rearrange(self.residual(x), "(b n) d p q -> b n (p q d)", b=len(images)))
        rows, columns = (length // PATCH for length in padded.shape[-2:])
        return x + self.places[0, _hashed(rows, columns, self.grid).to(x.device)] + self.scales[scale]


class Bottleneck(nn.Module):
    """(B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = _normed(channels, channels, 1)
        self.second = _normed(channels, channels, 3)
        self.third = _normed(channels, out_channels, 1)
        self.around = _normed(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        inside = F.relu(self.second(F.relu(self.first(x))))
        return F.relu(self.third(inside) + self.around(x))


def _normed(channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(StandardisedConv(channels, out_channels, kernel), nn.GroupNorm(32, out_channels, eps=1e-4))


class StandardisedConv(nn.Conv2d):
    """A convolution whose kernels have mean 0 and spread 1, each over its own inputs."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels, out_channels, kernel, stride=stride, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        spread, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        input = _padded(input, self.kernel_size[0], self.stride[0])
        return F.conv2d(input, (self.weight - mean) / (spread + 1e-5), stride=self.stride)


def _padded(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around (..., H, W), so that a kernel fits in ceil(H / stride) times; the odd one after."""
    missing = [max(0, (-(-length // stride) - 1) * stride + kernel - length) for length in x.shape[-2:]]
    (top, bottom), (left, right) = ((count // 2, count - count // 2) for count in missing)
    return F.pad(x, (left, right, top, bottom))


def _scaled(images: Tensor, long_side: int) -> Tensor:
    height, width = images.shape[-2:]
    ratio = long_side / max(height, width)
    size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    return F.interpolate(images, size, mode="bicubic", align_corners=False)


def _hashed(rows: int, columns: int, grid: int) -> Tensor:
    """Where on the grid the patches of a picture lie, (rows * columns,), row by row."""

    def along(count: int) -> Tensor:  # in float32 as in the published program, whose rounding decides at edges
        return F.interpolate(torch.arange(float(grid))[None, None], count, mode="nearest")[0, 0].long()

    return (along(rows)[:, None] * grid + along(columns)).flatten()


# ---------------------------------------------------------------------------------------------------------------------
# Public names

_PYIQA = {
    "root": "conv_root",
    "root_norm": "gn_root",
    "residual.first.0": "block1.conv1",
    "residual.second.0": "block1.conv2",
    "residual.third.0": "block1.conv3",
    "residual.around.0": "block1.conv_proj",
    "residual.first.1": "block1.gn1",
    "residual.second.1": "block1.gn2",
    "residual.third.1": "block1.gn3",
    "residual.around.1": "block1.gn_proj",
    "token": "embedding",
    "places": "transformer_encoder.posembed_input.position_emb",
    "scales": "transformer_encoder.scaleembed_input.scale_emb",
    "whole": "transformer_encoder.cls",
    "norm": "transformer_encoder.encoder_norm",
    "score": "head",
    "attention_norm": "norm1",
    "mlp_norm": "norm2",
    "widen": "mlp.fc1",
    "narrow": "mlp.fc2",
}
_BLOCK = "transformer_encoder.transformer.encoderblock_"


def _public_names(network: Musiq) -> dict[str, Found]:
    places = {}
    for name in network.state_dict():
        block = re.match(r"blocks\.(\d+)\.", name)
        start, rest = (f"{_BLOCK}{block[1]}.", name[block.end() :]) if block else ("", name)
        stem, dot, kind = rest.rpartition(".") if rest.endswith((".weight", ".bias")) else (rest, "", "")
        places[name] = Found(start + _PYIQA.get(stem, stem) + dot + kind)
    return places


def _sizes(tensors: Tensors) -> dict[str, int]:
    """The constructor's arguments, from the shapes of a checkpoint."""
    shapes = tensors.shapes
    root, token, places = (shapes.get(name, ()) for name in ("conv_root.weight", "embedding.weight", _PYIQA["places"]))
    inside = shapes.get(f"{_BLOCK}0.mlp.fc1.weight", ())
    if (len(root), len(token), len(places), len(inside)) != (4, 2, 3, 2):
        raise WeightsError(
            f"{tensors.what}: lacks conv_root.weight, embedding.weight, {_PYIQA['places']} or "
            f"{_BLOCK}0.mlp.fc1.weight; expected MUSIQ as pyiqa stores it (musiq_spaq_ckpt-358bb6af.pth)"
        )
    numbers = [int(found[1]) for name in shapes if (found := re.match(rf"{re.escape(_BLOCK)}(\d+)\.", name))]
    return {
        "width": token[0],
        "mlp_width": inside[0],
        "depth": max(numbers) + 1,
        "heads": max(1, token[0] // 64),
        "channels": root[0],
        "grid": round(places[1] ** 0.5),
    }
