"""Inception-v3 as the Inception score and FID use it: TensorFlow's graph of 2015-12-05 with 1008 outputs.

torchvision's network (Szegedy et al. 2016) with what differs in that graph: averages leave the padding out, and the
last block takes a maximum where others average. Frames come as 0..1, are brought to 299 x 299 by bilinear interpolation
without antialiasing and to -1..1; probabilities are the softmax of the outputs without their bias, as in the first
program.

The weights are the public port to torch (`pt_inception-2015-12-05-6726825d.pth`).
"""

from pathlib import Path
from typing import Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d
from torchvision.models.inception import Inception3, InceptionA, InceptionC, InceptionE

from vc2.eval.networks.public_names import fill
from vc2.model.files import open_weights

__all__ = ["Inception"]

CLASSES = 1008


def _inner_average(x: Tensor) -> Tensor:
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        wide = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), wide, double, self.branch_pool(_inner_average(x))]


class _BlockC(InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return [self.branch1x1(x), single, double, self.branch_pool(_inner_average(x))]


class _BlockE(InceptionE):
    takes_maximum = False

    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = max_pool2d(x, 3, stride=1, padding=1) if self.takes_maximum else _inner_average(x)
        return [
            self.branch1x1(x),
            torch.cat([self.branch3x3_2a(single), self.branch3x3_2b(single)], 1),
            torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1),
            self.branch_pool(pooled),
        ]


class _LastBlock(_BlockE):
    takes_maximum = True


def _network() -> Inception3:
    network = Inception3(num_classes=CLASSES, aux_logits=False, transform_input=False, init_weights=False)
    for name, channels, pooled in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        setattr(network, name, _BlockA(channels, pool_features=pooled))
    for name, channels in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        setattr(network, name, _BlockC(768, channels_7x7=channels))
    network.Mixed_7b, network.Mixed_7c = _BlockE(1280), _LastBlock(2048)
    return network


def _is_count(name: str) -> bool:
    return name.endswith("num_batches_tracked")


class Inception:
    """Class probabilities of frames."""

    def __init__(self, network: Inception3, device: torch.device) -> None:
        self.network, self.device = network.eval().requires_grad_(False).to(device), device

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """Inception-v3 from its public file.

        Raises:
            WeightsError: If its tensors are not those of the network.
        """
        network = _network()
        fill(network, open_weights(path), spared=_is_count, cause="not the Inception-v3 of 2015-12-05")
        return cls(network, device)

    @torch.inference_mode()
    def probabilities(self, frames: np.ndarray, *, batch: int = 16) -> np.ndarray:
        """Of the 1008 classes for each frame (T, H, W, 3) uint8 RGB, (T, 1008) float32."""
        parts = []
        for start in range(0, len(frames), batch):
            pixels = torch.from_numpy(np.ascontiguousarray(frames[start : start + batch])).to(self.device)
            pixels = rearrange(pixels, "t h w c -> t c h w").float() / 255
            pixels = interpolate(pixels, (299, 299), mode="bilinear", align_corners=False)
            parts.append(self._features(2 * pixels - 1) @ self.network.fc.weight.T)
        return torch.cat(parts).softmax(-1).cpu().numpy()

    def _features(self, pixels: Tensor) -> Tensor:
        """(T, 2048): what the last block gives, averaged over positions."""
        x = pixels
        for name, layer in self.network.named_children():
            if name in ("avgpool", "dropout", "fc"):
                continue
            x = layer(x)
        return x.mean((2, 3))
