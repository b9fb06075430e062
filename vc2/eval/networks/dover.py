"""DOVER: how good a video looks, in two raw scores without a reference (Wu et al., arXiv 2211.04894).

    aesthetic   whole frames at 224 x 224  -> ConvNeXt-T inflated in time (`convnext3d`) -> head -> mean
    technical   fragments, 224 x 224 in all -> Swin-T with gated biases   (`swin3d`)     -> head -> mean

A head is two 1 x 1 x 1 convolutions, 768 -> 64 -> 1, with a GELU between; it scores every position, and the raw score
is the mean over positions and clips. Which frames make a clip, and what is made of the scores: `vc2.eval.dover_scores`.

*Whole frames* are resized bilinearly without antialiasing, whatever their shape, and rounded to integers. *Fragments*
(FAST-VQA, arXiv 2207.02595) are patches at full resolution: one of 32 x 32 pixels from every cell of a 7 x 7 grid, at a
place drawn once for the 32 frames of a clip, put side by side. A frame under 224 pixels in a side is enlarged first,
until neither is. The published program then takes the grid of the *small* frame, so it sees only a corner of the large
one, and it cuts fractions off, half a level on average; in `fixed` the grid spans the enlarged frame and values are
rounded. Frames under 32 pixels in a side have no published score. Places are drawn from a seed (published: from none).

Pixels 0..255 are normalised by ImageNet's mean and deviation. Weights are the public `DOVER.pth`; the names in it are
translated in one table at the end of this file.

Shapes: T frames of H x W pixels; a clip is (1, 3, 32, 224, 224).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from vc2.errors import WeightsError
from vc2.eval.dover_scores import Branch, frame_indices
from vc2.eval.formulas import Mode, NoValue
from vc2.eval.networks.convnext3d import ConvNeXt3D
from vc2.eval.networks.public_names import Found, fill_from
from vc2.eval.networks.swin3d import WINDOW, Swin3D, offset_index
from vc2.model.files import Tensors, open_weights
from vc2.seeding import generator

__all__ = ["Dover", "DoverSizes", "RawScores", "clips", "public_name"]

_GRID = 7  # cells in a row and in a column
_PATCH = 32  # pixels
_SIDE = _GRID * _PATCH
_MEAN = (123.675, 116.28, 103.53)
_DEVIATION = (58.395, 57.12, 57.375)


@dataclass(frozen=True, slots=True)
class DoverSizes:
    """Widths and depths of the two branches. Defaults: the published network, 56.2 million parameters."""

    aesthetic_widths: tuple[int, ...] = (96, 192, 384, 768)
    aesthetic_depths: tuple[int, ...] = (3, 3, 9, 3)
    technical_width: int = 96
    technical_depths: tuple[int, ...] = (2, 2, 6, 2)
    technical_heads: tuple[int, ...] = (3, 6, 12, 24)
    hidden: int = 64


class RawScores(NamedTuple):
    """Means of the two branches over positions and clips; not standardised, about -0.3 to 0.3."""

    aesthetic: float
    technical: float


class Dover(nn.Module):
    """Both branches of DOVER. Made directly it has random weights; see `load`."""

    def __init__(self, sizes: DoverSizes | None = None) -> None:
        super().__init__()
        self.sizes = sizes = sizes or DoverSizes()
        self.aesthetic = ConvNeXt3D(sizes.aesthetic_widths, sizes.aesthetic_depths)
        self.technical = Swin3D(sizes.technical_width, sizes.technical_depths, sizes.technical_heads)
        self.aesthetic_head = Head(sizes.aesthetic_widths[-1], sizes.hidden)
        self.technical_head = Head(sizes.technical_width << len(sizes.technical_depths) - 1, sizes.hidden)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """The network of a file under the names of `DOVER.pth`, of whatever widths and depths its tensors say.

        Args:
            path: A torch or safetensors file, or a folder with one.
            device: Where the network is to run.

        Raises:
            WeightsError: If the file cannot be read, a tensor is missing, unknown or of another shape, or the file
                numbers the offsets between tokens in another way.
        """
        tensors = open_weights(path)
        network = cls(_sizes_of(tensors))
        _fill(network, tensors)
        return network.to(device)

    @torch.inference_mode()
    def raw_scores(self, frames: np.ndarray, *, seed: int, mode: Mode, batch_clips: int = 1) -> RawScores:
        """Raw scores of a video.

        Args:
            frames: RGB frames, (T, H, W, 3), uint8.
            seed: Decides what is drawn: places of fragments, and of frames in long videos.
            mode: `compat` as published, `fixed` mended (see the module and `frame_indices`).
            batch_clips: Clips on the device at once.

        Raises:
            NoValue: In `compat` if the frames are under 32 pixels in a side.
            ValueError: If the frames are of another shape or type, or there is none, or `batch_clips` is below 1.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 (T, H, W, 3), one at least")
        if batch_clips < 1:
            raise ValueError(f"batch_clips is {batch_clips}; expected 1 or more")
        # TF32 would keep 10 bits of a convolution's inputs: scores would depend on the kind of GPU
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return RawScores(
                self._raw_score("aesthetic", frames, seed, mode, batch_clips),
                self._raw_score("technical", frames, seed, mode, batch_clips),
            )

    def _raw_score(self, branch: Branch, frames: np.ndarray, seed: int, mode: Mode, batch_clips: int) -> float:
        backbone, head = {
            "aesthetic": (self.aesthetic, self.aesthetic_head),
            "technical": (self.technical, self.technical_head),
        }[branch]
        device = next(head.parameters()).device
        waiting = clips(branch, frames, seed, mode)
        scores = []
        while batch := list(islice(waiting, batch_clips)):
            scores.append(head(backbone(torch.cat(batch).to(device))).double().mean((1, 2, 3, 4)).cpu())
        return float(torch.cat(scores).mean())


class Head(nn.Module):
    """A score at every position."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Conv3d(width, hidden, 1)
        self.score = nn.Conv3d(hidden, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.score(nn.functional.gelu(self.hidden(features)))


# ---------------------------------------------------------------------------------------------------------------------
# Views


def clips(branch: Branch, frames: np.ndarray, seed: int, mode: Mode) -> Iterator[Tensor]:
    """What a branch is shown, clip by clip.

    Args:
        branch: The branch.
        frames: RGB frames, (T, H, W, 3), uint8.
        seed: Decides what is drawn.
        mode: `compat` as published, `fixed` mended.

    Returns:
        Normalised clips, (1, 3, 32, 224, 224) each: one (aesthetic) or three (technical).

    Raises:
        NoValue: In `compat` if fragments are asked of frames under 32 pixels in a side.
    """
    indices = frame_indices(branch, len(frames), mode, generator(seed, "dover", branch, "frames"))
    places = generator(seed, "dover", branch, "fragments")
    mean, deviation = (torch.tensor(values)[:, None, None, None] for values in (_MEAN, _DEVIATION))
    for clip in indices:
        taken, back = np.unique(clip, return_inverse=True)
        images = rearrange(torch.from_numpy(frames[taken]), "t h w c -> t c h w")
        view = _whole(images) if branch == "aesthetic" else _fragments(images, places, mode)
        pixels = rearrange(view[torch.from_numpy(back)].float(), "t c h w -> c t h w")
        yield ((pixels - mean) / deviation)[None]


def _whole(images: Tensor) -> Tensor:
    """Images resized to 224 x 224, (T, 3, 224, 224) uint8."""
    return torch.cat(
        [_resized(image.float(), (_SIDE, _SIDE)) for image in images.split(1)]
    )  # one large float at a time


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return nn.functional.interpolate(images, size, mode="bilinear").round().to(torch.uint8)


def _fragments(images: Tensor, places: np.random.Generator, mode: Mode) -> Tensor:
    """A patch from every cell of the images, the same places in all of them, (T, 3, 224, 224) uint8."""
    small = images.shape[-2:]
    images = _enlarged(images, mode)
    height, width = small if mode == "compat" else images.shape[-2:]
    if min(height, width) < _PATCH:
        raise NoValue(f"DOVER's published fragments need {_PATCH} pixels in each side, frames are {width}x{height}")
    corners = _corners(height, width, places)
    return torch.cat(
        [
            torch.cat([images[..., y : y + _PATCH, x : x + _PATCH] for y, x in row], dim=-1)  # left to right
            for row in corners.tolist()
        ],
        dim=-2,
    )


def _enlarged(images: Tensor, mode: Mode) -> Tensor:
    """Images none of whose sides is under 224 pixels."""
    height, width = images.shape[-2:]
    ratio = min(height / _SIDE, width / _SIDE)
    if ratio >= 1:
        return images
    if mode == "compat":
        large = nn.functional.interpolate(images / 255.0, scale_factor=1 / ratio, mode="bilinear")
        return (large * 255.0).to(torch.uint8)
    size = max(_SIDE, round(height / ratio)), max(_SIDE, round(width / ratio))
    return _resized(images.float(), size)


def _corners(height: int, width: int, places: np.random.Generator) -> np.ndarray:
    """Top and left of the patch of every cell, (7, 7, 2), drawn inside the cell where the cell is larger."""
    axes = []
    for axis, length in enumerate((height, width)):
        cell = length // _GRID
        starts = np.minimum(cell * np.arange(_GRID), length - _PATCH)
        room = places.integers(0, max(1, cell - _PATCH), (_GRID, _GRID))
        axes.append(room + (starts[:, None] if axis == 0 else starts))
    return np.stack(axes, axis=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The public file

# Our names and those in `DOVER.pth`, without `.weight` and `.bias`; # is a number, of the stage and then of the block.
_NAMES = {
    "aesthetic.stages.0.downsample.convolution": "aesthetic_backbone.downsample_layers.0.0",
    "aesthetic.stages.0.downsample.norm": "aesthetic_backbone.downsample_layers.0.1",
    "aesthetic.stages.#.downsample.norm": "aesthetic_backbone.downsample_layers.#.0",
    "aesthetic.stages.#.downsample.convolution": "aesthetic_backbone.downsample_layers.#.1",
    "aesthetic.stages.#.blocks.#.depthwise": "aesthetic_backbone.stages.#.#.dwconv",
    "aesthetic.stages.#.blocks.#.norm": "aesthetic_backbone.stages.#.#.norm",
    "aesthetic.stages.#.blocks.#.expand": "aesthetic_backbone.stages.#.#.pwconv1",
    "aesthetic.stages.#.blocks.#.contract": "aesthetic_backbone.stages.#.#.pwconv2",
    "aesthetic.stages.#.blocks.#.layer_scale": "aesthetic_backbone.stages.#.#.gamma",
    "aesthetic.norm": "aesthetic_backbone.norm",
    "aesthetic_head.hidden": "aesthetic_head.fc_hid",
    "aesthetic_head.score": "aesthetic_head.fc_last",
    "technical.patches.convolution": "technical_backbone.patch_embed.proj",
    "technical.patches.norm": "technical_backbone.patch_embed.norm",
    "technical.stages.#.blocks.#.attention_norm": "technical_backbone.layers.#.blocks.#.norm1",
    "technical.stages.#.blocks.#.attention.qkv": "technical_backbone.layers.#.blocks.#.attn.qkv",
    "technical.stages.#.blocks.#.attention.across_cells": (
        "technical_backbone.layers.#.blocks.#.attn.relative_position_bias_table"
    ),
    "technical.stages.#.blocks.#.attention.within_cell": (
        "technical_backbone.layers.#.blocks.#.attn.fragment_position_bias_table"
    ),
    "technical.stages.#.blocks.#.attention.output": "technical_backbone.layers.#.blocks.#.attn.proj",
    "technical.stages.#.blocks.#.mlp_norm": "technical_backbone.layers.#.blocks.#.norm2",
    "technical.stages.#.blocks.#.expand": "technical_backbone.layers.#.blocks.#.mlp.fc1",
    "technical.stages.#.blocks.#.contract": "technical_backbone.layers.#.blocks.#.mlp.fc2",
    "technical.stages.#.merge.norm": "technical_backbone.layers.#.downsample.norm",
    "technical.stages.#.merge.reduction": "technical_backbone.layers.#.downsample.reduction",
    "technical.norm": "technical_backbone.norm",
    "technical_head.hidden": "technical_head.fc_hid",
    "technical_head.score": "technical_head.fc_last",
}
_INDEX = re.compile(r"technical_backbone\.layers\.\d+\.blocks\.\d+\.attn\.relative_position_index")


def public_name(name: str) -> str:
    """The name in `DOVER.pth` of one of our tensors."""
    stem, ending = re.fullmatch(r"(.+?)(\.weight|\.bias)?", name).groups(default="")  # type: ignore[union-attr]
    numbers = iter(re.findall(r"\d+", stem))
    public = _NAMES.get(stem) or _NAMES[re.sub(r"\d+", "#", stem)]
    return re.sub("#", lambda _: next(numbers), public) + ending


def _fill(network: Dover, tensors: Tensors) -> None:
    """Fill the network from a public file; the indices of offsets in it are only compared with ours."""
    weights = tensors.renamed(lambda name: None if _INDEX.fullmatch(name) else name)
    fill_from(
        network,
        weights,
        {name: Found(public_name(name)) for name in network.state_dict()},
        cause="not the file DOVER.pth of the DOVER release; DOVER-Mobile and FAST-VQA are other networks",
    )
    ours = offset_index(WINDOW, WINDOW)
    for name in tensors:
        if _INDEX.fullmatch(name) and not torch.equal(tensors[name], ours):
            raise WeightsError(
                f"{tensors.what}: {name} {tensors.shapes[name]} is not the index of windows of {WINDOW} tokens; these "
                "weights are of another network"
            )


def _sizes_of(tensors: Tensors) -> DoverSizes:
    """Widths and depths that the tensors of a file show; where they show none, the published ones."""

    def length(name: str, axis: int, published: int) -> int:
        shape = tensors.shapes.get(public_name(name), ())
        return shape[axis] if axis < len(shape) else published

    def depth(name: str, published: int) -> int:
        found = 0
        while public_name(name.format(found)) in tensors:
            found += 1
        return found or published

    published = DoverSizes()
    return DoverSizes(
        aesthetic_widths=tuple(
            length(f"aesthetic.stages.{stage}.downsample.convolution.weight", 0, width)
            for stage, width in enumerate(published.aesthetic_widths)
        ),
        aesthetic_depths=tuple(
            depth(f"aesthetic.stages.{stage}.blocks.{{}}.layer_scale", blocks)
            for stage, blocks in enumerate(published.aesthetic_depths)
        ),
        technical_width=length("technical.patches.convolution.weight", 0, published.technical_width),
        technical_depths=tuple(
            depth(f"technical.stages.{stage}.blocks.{{}}.attention.across_cells", blocks)
            for stage, blocks in enumerate(published.technical_depths)
        ),
        technical_heads=tuple(
            length(f"technical.stages.{stage}.blocks.0.attention.across_cells", 1, heads)
            for stage, heads in enumerate(published.technical_heads)
        ),
        hidden=length("technical_head.hidden.weight", 0, published.hidden),
    )
