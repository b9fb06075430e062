"""A whole model: every network that makes a video of a text, and what they were told in training.

On disk it is a folder of our own names:

    model.json                    a `ModelConfig`, and the frame rates the network was told, with their weights
    unet.safetensors              `vc2.model.weights.save_unet`
    autoencoder.safetensors       `Autoencoder.save`
    text.safetensors              the text tower under OpenCLIP's names; absent where the tower is seeded
    image.safetensors             image tower and resampler under released names; only of an image-to-video model

A checkpoint of the pipeline holds the same files (and `unet_ema.safetensors`), less the text tower, which it names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vc2.model.autoencoder import Autoencoder
from vc2.model.config import ModelConfig
from vc2.model.schedule import NoiseSchedule
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D

__all__ = ["VideoModel"]


@dataclass(frozen=True)
class VideoModel:
    """All networks of a text-to-video model, in evaluation mode, on one device."""

    config: ModelConfig
    unet: UNet3D
    schedule: NoiseSchedule
    autoencoder: Autoencoder
    text: TextEncoder
    fps: Mapping[int, int] = field(default_factory=dict)  # frame rates told in training, with their weights

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "VideoModel":
        """The same model there; its networks move, they are not copied. `dtype` is of the denoising network alone."""
        self.unet.to(device, dtype)
        self.autoencoder.to(device)
        self.text.to(device)
        return self
