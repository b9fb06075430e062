"""LAION's first aesthetic score: a linear head on CLIP ViT-L/14's image vector of length 1, trained on people's votes.

VBench hands pictures to CLIP as CLIP wants them: bicubic without blur to a short side of 224, the middle square of
that, brought to CLIP's mean and spread. So do `ClipImages` here, of which the one of ViT-B/32 serves background
consistency. (EvalCrafter does not: its ways are in `vc2.eval.networks.clip`.) Both compute in float32, where the
published program on a GPU computes CLIP in float16: numbers may differ from it in the fourth digit.

Weights: CLIP as transformers has it (`openai/clip-vit-large-patch14`; one file will do, its sizes are read off the
tensors), and `sa_0_4_vit_l_14_linear.pth` of LAION-AI/aesthetic-predictor.
Shapes: T frames, B of them at once, S side of the tower's square, D width of the shared space.
"""

import re
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pictures
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vc2.errors import WeightsError
from vc2.eval.networks.frames import in_batches
from vc2.model.files import Tensors, fill, open_weights

__all__ = ["Aesthetic", "ClipImages"]

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels in [0, 1], by channel
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipImages(nn.Module):
    """Frames to vectors in the space that CLIP's pictures and texts share. Arbitrary until weights are loaded.

    Args:
        config: Shape of the image tower.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.tower = CLIPVisionModelWithProjection(config)
        assert isinstance(config.image_size, int)
        self.image_size = config.image_size
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """The image tower of a file or folder of weights; text half and temperature are left aside.

        Raises:
            WeightsError: If a tensor is missing, unexpected or of another shape.
        """
        tensors = open_weights(path).renamed(_of_the_tower)
        images = cls(_config(tensors))
        fill(images.tower, tensors, what=tensors.what, cause="not CLIP as transformers stores it")
        return images.to(device)

    @torch.inference_mode()
    def features(self, frames: np.ndarray, *, batch: int = 16) -> np.ndarray:
        """One vector of length 1 per frame.

        Args:
            frames: (T, H, W, 3) uint8 RGB, of any size.
            batch: Frames on the device at once.

        Returns:
            (T, D) float32.

        Raises:
            ValueError: If the frames are of another shape or type, or there is none.
        """
        device = self.tower.visual_projection.weight.device
        return torch.cat([self(self.pixels(images)).cpu() for images in in_batches(frames, batch, device)]).numpy()

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..255 -> (B, 3, S, S) as the tower takes them."""
        images = pictures.resize(images, [self.image_size], InterpolationMode.BICUBIC, antialias=False)
        images = pictures.center_crop(images, [self.image_size])
        return pictures.normalize(images / 255, list(MEAN), list(STD))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) from `pixels` -> (B, D), of length 1."""
        return F.normalize(self.tower(pixel_values=pixels).image_embeds, dim=-1)


class Aesthetic(nn.Module):
    """Frames to aesthetic scores. Arbitrary until weights are loaded.

    Args:
        clip: The image tower.
    """

    def __init__(self, clip: ClipImages) -> None:
        super().__init__()
        self.clip = clip
        self.head = nn.Linear(clip.tower.config.projection_dim, 1)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path, device: torch.device, *, clip: Path) -> Self:
        """The head of the file `path` on the image tower of `clip`, a file or folder.

        Raises:
            WeightsError: If a tensor is missing, unexpected or of another shape.
        """
        network = cls(ClipImages.load(clip, device))
        fill(
            network.head, open_weights(path), what=str(path), cause="the head of another CLIP, or another kind of head"
        )
        return network.to(device)

    @torch.inference_mode()
    def scores(self, frames: np.ndarray, *, batch: int = 16) -> np.ndarray:
        """One score per frame, about 0..10; see `scores_of` for features that are there already.

        Args:
            frames: (T, H, W, 3) uint8 RGB, of any size.
            batch: Frames on the device at once.

        Returns:
            (T,) float32.

        Raises:
            ValueError: If the frames are of another shape or type, or there is none.
        """
        return self.scores_of(self.clip.features(frames, batch=batch))

    @torch.inference_mode()
    def scores_of(self, features: np.ndarray) -> np.ndarray:
        """(T, D) from `ClipImages.features` -> (T,)."""
        return self.head(torch.from_numpy(features).to(self.head.weight))[:, 0].cpu().numpy()


def _of_the_tower(name: str) -> str | None:
    """The image tower's part of a whole CLIP; positions 0, 1, 2, ... that old files hold are no weights."""
    if name.startswith("text_") or name == "logit_scale" or name.endswith(".position_ids"):
        return None
    return name


def _config(tensors: Tensors) -> CLIPVisionConfig:
    """Sizes from the shapes of a checkpoint; 64 channels to a head, as in all of OpenAI's."""
    shapes, start = tensors.shapes, "vision_model."
    patches = shapes.get(f"{start}embeddings.patch_embedding.weight", ())
    positions = shapes.get(f"{start}embeddings.position_embedding.weight", ())
    inside = shapes.get(f"{start}encoder.layers.0.mlp.fc1.weight", ())
    projection = shapes.get("visual_projection.weight", ())
    if (len(patches), len(positions), len(inside), len(projection)) != (4, 2, 2, 2):
        raise WeightsError(
            f"{tensors.what}: lacks {start}embeddings, {start}encoder.layers.0 or visual_projection; expected CLIP as "
            "transformers stores it (openai/clip-vit-large-patch14)"
        )
    numbers = [int(found[1]) for name in shapes if (found := re.match(r"vision_model\.encoder\.layers\.(\d+)\.", name))]
    width, patch = patches[0], patches[-1]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=inside[0],
        projection_dim=projection[0],
        num_hidden_layers=max(numbers) + 1,
        num_attention_heads=max(1, width // 64),
        image_size=patch * round((positions[0] - 1) ** 0.5),
        patch_size=patch,
    )
