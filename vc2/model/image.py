"""Image tokens: what the image-to-video network is told about a picture.

A picture in [-1, 1] is stretched to the size of the video, bilinear and without blur, as in the released script. It is
then scaled to the square that the image tower takes, whatever its shape: blurred along every axis that shrinks by a
factor f > 1 with a Gaussian of standard deviation (f - 1) / 2, then bicubic with the corner pixels of both pictures in
the same place, then brought to the tower's mean and spread. The tower (Radford et al. 2021, OpenCLIP) gives one token
for the whole and one per patch after *all* its layers, without its final norm and projection; the resampler makes few
of them. The coarse form takes the tower's projected vector for the whole instead.

Of a guided prediction the unconditional call sees the tokens of a picture of zeros, mid-grey, not tokens of zero.
Shapes: B images, H x W pixels, S side of the tower's square, N = 1 + patches, M tokens for the network, D width.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from open_clip.transformer import VisionTransformer
from PIL import Image, ImageOps
from torch import Tensor, nn

from vc2.model.config import ImageConfig, ImageTowerConfig
from vc2.model.files import fill
from vc2.model.resampler import CoarseTokens, Resampler
from vc2.model.weights import part_of_checkpoint, resampler_from_released

__all__ = ["ImageEncoder", "pixels_of", "scale_to_square", "stretched"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels in [0, 1], by channel
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TOWER_PREFIX = "embedder.model.visual."


class ImageEncoder(nn.Module):
    """Pictures to image tokens. Frozen and in evaluation mode; arbitrary until weights are loaded."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = _tower(config.tower)
        few = config.resampler
        self.resampler = (
            Resampler(few)
            if config.finegrained
            else CoarseTokens(config.tower.output_dim, few.num_queries, few.output_dim)
        )
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokens of pictures.

        Args:
            images: Pixels in [-1, 1], (B, 3, H, W), of any size.

        Returns:
            (B, M, D), in the encoder's type and on its device.
        """
        tokens = self.tower_tokens(self.preprocess(images))
        return self.resampler(tokens if self.config.finegrained else self.tower.ln_post(tokens[:, 0]) @ self.tower.proj)

    def encode_nothing(self) -> Tensor:
        """Tokens of the unconditional call, (1, M, D)."""
        side = self.config.tower.image_size
        return self.encode(torch.zeros(1, 3, side, side))

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 3, S, S) as the tower takes them.

        Raises:
            ValueError: If the shape is another.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {tuple(images.shape)}, expected (B, 3, H, W)")
        images = images.to(self.tower.conv1.weight.device, torch.float32)
        square = (scale_to_square(images, self.config.tower.image_size) + 1) / 2
        mean, std = (torch.tensor(values, device=square.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return ((square - mean) / std).to(self.tower.conv1.weight.dtype)

    def tower_tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) from `preprocess` -> (B, N, tower width): the whole first, then patches row by row."""
        tower = self.tower
        patches = rearrange(tower.conv1(pixels), "b d h w -> b (h w) d")
        whole = tower.class_embedding.expand(patches.shape[0], 1, -1)
        tokens = tower.ln_pre(torch.cat([whole, patches], dim=1) + tower.positional_embedding)
        # The whole transformer, not block by block: only it knows whether its blocks want the batch axis first.
        return tower.transformer(tokens)

    @classmethod
    def from_released(cls, config: ImageConfig, state_dict: Mapping[str, Tensor]) -> "ImageEncoder":
        """The image tower and the resampler of a released image-to-video checkpoint.

        Args:
            config: Their shapes.
            state_dict: Names that begin with `embedder.model.visual.` and `image_proj_model.`; the other networks of
                the checkpoint, and the text half that the tower was stored with, are left aside.

        Raises:
            WeightsError: If any tensor is missing, unexpected, or of another shape.
        """
        encoder = cls(config)
        tower = part_of_checkpoint(state_dict, TOWER_PREFIX)
        tower = tower.renamed(lambda name: None if name.startswith("embedder.") else name)  # the text half
        fill(encoder.tower, tower, what="image tower", cause="" if tower else "there is no image tower in it")
        fill(encoder.resampler, resampler_from_released(state_dict), what="image-token resampler")
        return encoder


def _tower(config: ImageTowerConfig) -> VisionTransformer:
    return VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        mlp_ratio=4.0,
        output_dim=config.output_dim,  # its head is a part of the weights, and not used
    )


def pixels_of(picture: Image.Image) -> np.ndarray:
    """A picture of any kind as bytes, (H, W, 3): the right way up, without palette and transparency."""
    picture = ImageOps.exif_transpose(picture)
    if "transparency" in picture.info:  # of a palette: Pillow wants it spelled out before it is dropped
        picture = picture.convert("RGBA")
    return np.asarray(picture.convert("RGB"))


def stretched(images: Tensor, height: int, width: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, height, width), the size of the video: what the released script makes of a picture."""
    return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)


def scale_to_square(images: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, side, side), the shape of the picture given up, as the released program does."""
    for axis in (2, 3):
        if (factor := images.shape[axis] / side) > 1:
            images = _blurred(images, axis, spread=max((factor - 1) / 2, 0.001))
    return F.interpolate(images, size=(side, side), mode="bicubic", align_corners=True)


def _blurred(images: Tensor, axis: int, spread: float) -> Tensor:
    """Weighted means along an axis, the picture mirrored at its borders."""
    reach = max(int(4 * spread), 3) // 2
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    weights = torch.exp(-((offsets / spread) ** 2) / 2)
    channels = images.shape[1]
    kernel = (weights / weights.sum()).view(1, 1, *((1, -1) if axis == 3 else (-1, 1))).repeat(channels, 1, 1, 1)
    padding = (reach, reach, 0, 0) if axis == 3 else (0, 0, reach, reach)
    return F.conv2d(F.pad(images, padding, mode="reflect"), kernel, groups=channels)
