"""DINO ViT-B/16 (Caron et al. 2021): features in which frames of one subject are alike, for subject consistency.

A frame is scaled, bilinear without blur, until its short side is 224, and keeps its shape: nothing is cropped. Its
patches of 16 x 16 become tokens; positions were learned on a square and are stretched, bicubic, to the frame's grid.
The feature is the token of the whole after the last norm. Pixels in [0, 1] are brought to ImageNet's mean and spread.

Weights: the released `dino_vitbase16_pretrain.pth` or the same as transformers has it (`facebook/dino-vitb16`).
Shapes: T frames, B of them at once, H x W pixels, D width, P x P learned positions.
"""

import math
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

__all__ = ["Dino"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels in [0, 1], by channel


class Dino(nn.Module):
    """Frames to features. Arbitrary until weights are loaded.

    Args:
        width: Of the tokens.
        depth: Number of blocks.
        heads: Of the attention; 64 channels each in the released networks.
        patch: Side of a patch, in pixels.
        image_size: Short side of the frames as the network sees them; positions are learned for its square.
    """

    def __init__(
        self, *, width: int = 768, depth: int = 12, heads: int = 12, patch: int = 16, image_size: int = 224
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.whole = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, width))
        self.blocks = nn.ModuleList([Block(width, 4 * width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """The network of a file or folder of weights; its sizes are read off the tensors.

        Raises:
            WeightsError: If a tensor is missing, unexpected or of another shape.
        """
        tensors = open_weights(path)
        released = "cls_token" in tensors
        tensors = tensors if released else tensors.renamed(_without_pooler)
        network = cls(**_sizes(tensors, released=released))
        places = _released_names(network) if released else _transformers_names(network)
        fill_from(network, tensors, places, cause="not the weights of DINO ViT-B/16")
        return network.to(device)

    @torch.inference_mode()
    def features(self, frames: np.ndarray, *, batch: int = 16) -> np.ndarray:
        """One feature per frame.

        Args:
            frames: (T, H, W, 3) uint8 RGB, of any size.
            batch: Frames on the device at once.

        Returns:
            (T, D) float32.

        Raises:
            ValueError: If the frames are of another shape or type, or there is none.
        """
        found = [self(self.pixels(images)).cpu() for images in in_batches(frames, batch, self.whole.device)]
        return torch.cat(found).numpy()

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..255 -> (B, 3, h, w) as the network takes them, the short side being `image_size`."""
        images = pictures.resize(images, [self.image_size], antialias=False)
        return pictures.normalize(images / 255, list(MEAN), list(STD))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, h, w) from `pixels` -> (B, D)."""
        grid = self.patches(pixels)
        whole = self.whole.expand(len(grid), -1, -1)
        x = torch.cat([whole, rearrange(grid, "b d h w -> b (h w) d")], dim=1)
        x = x + self.positions_on(*grid.shape[-2:])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def positions_on(self, rows: int, columns: int) -> Tensor:
        """Positions of a grid of patches, (1, 1 + rows * columns, D)."""
        side = math.isqrt(self.positions.shape[1] - 1)
        if (rows, columns) == (side, side):
            return self.positions
        learned = rearrange(self.positions[:, 1:], "1 (h w) d -> 1 d h w", h=side)
        # A tenth of a patch is added as in the released program, which so kept rounding from losing a row; it moves
        # every sample a little.
        factors = ((rows + 0.1) / side, (columns + 0.1) / side)
        stretched = F.interpolate(learned, scale_factor=factors, mode="bicubic")
        return torch.cat([self.positions[:, :1], rearrange(stretched, "1 d h w -> 1 (h w) d")], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Public names

_RELEASED = {
    "whole": "cls_token",
    "positions": "pos_embed",
    "patches": "patch_embed.proj",
    "attention_norm": "norm1",
    "mlp_norm": "norm2",
    "widen": "mlp.fc1",
    "narrow": "mlp.fc2",
    "attention.out": "attn.proj",
}

_TRANSFORMERS = {
    "whole": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "patches": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "attention_norm": "layernorm_before",
    "mlp_norm": "layernorm_after",
    "widen": "intermediate.dense",
    "narrow": "output.dense",
    "attention.query": "attention.attention.query",
    "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value",
    "attention.out": "attention.output.dense",
}


def _released_names(network: Dino) -> dict[str, Found]:
    """Of `dino_vitbase16_pretrain.pth`, where queries, keys and values are one tensor."""
    places = {}
    for name in network.state_dict():
        if joined := re.fullmatch(r"(blocks\.\d+)\.attention\.(query|key|value)\.(weight|bias)", name):
            block, what, kind = joined.groups()
            places[name] = Found(f"{block}.attn.qkv.{kind}", ("query", "key", "value").index(what), 3)
        else:
            places[name] = Found(_translated(name, _RELEASED, "blocks"))
    return places


def _transformers_names(network: Dino) -> dict[str, Found]:
    """Of `facebook/dino-vitb16`."""
    return {name: Found(_translated(name, _TRANSFORMERS, "encoder.layer")) for name in network.state_dict()}


def _translated(name: str, words: dict[str, str], blocks: str) -> str:
    block = re.match(r"blocks\.(\d+)\.", name)
    start, rest = (f"{blocks}.{block[1]}.", name[block.end() :]) if block else ("", name)
    stem, dot, kind = rest.rpartition(".") if rest.endswith((".weight", ".bias")) else (rest, "", "")
    return start + words.get(stem, stem) + dot + kind


def _without_pooler(name: str) -> str | None:
    """Transformers may add a layer on top that DINO does not have; it is not used."""
    name = name.removeprefix("vit.")
    return None if name.startswith("pooler.") else name


def _sizes(tensors: Tensors, *, released: bool) -> dict[str, int]:
    """The constructor's arguments, from the shapes of a checkpoint."""
    words, blocks = (_RELEASED, r"blocks") if released else (_TRANSFORMERS, r"encoder\.layer")
    patches = tensors.shapes.get(f"{words['patches']}.weight", ())
    positions = tensors.shapes.get(words["positions"], ())
    if len(patches) != 4 or len(positions) != 3:
        raise WeightsError(
            f"{tensors.what}: no tensors {words['patches']}.weight (4 axes) and {words['positions']} (3 axes) among "
            f"its {len(tensors)}; expected dino_vitbase16_pretrain.pth or facebook/dino-vitb16"
        )
    width, patch = patches[0], patches[-1]
    numbers = [int(found[1]) for name in tensors if (found := re.match(rf"{blocks}\.(\d+)\.", name))]
    return {
        "width": width,
        "depth": max(numbers, default=-1) + 1,
        "heads": max(1, width // 64),
        "patch": patch,
        "image_size": patch * math.isqrt(positions[1] - 1),
    }
