"""Perceptual distance (LPIPS, Zhang et al. 2018) with true weights: they ship in the package stlpips_pytorch.

No metric here uses LPIPS. It is a witness from outside: what people would call a change of a frame must move the
measures of consistency here the same way. The network is the shift-tolerant VGG-16 (Ghildyal and Liu 2022), read from
its file without the package's code: features after each block, of unit length, and weighted squared differences.
"""

import importlib.util
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vc2.eval.formulas import warping_error

skimage_data: Any = pytest.importorskip("skimage.data")

BLOCKS = (0, 2), (6, 8), (12, 14, 16), (20, 22, 24), (28, 30, 32)  # where the convolutions are in the file

Perceptual = Callable[[np.ndarray, np.ndarray], float]


def features(weights: dict[str, Tensor], frame: np.ndarray) -> list[Tensor]:
    """Features of a frame (H, W, 3) uint8 after each block, each of unit length."""
    x = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 127.5 - 1
    x = (x - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
    found = []
    for number, block in enumerate(BLOCKS, start=1):
        if number > 1:  # pooling that does not mind shifts: the largest of every 2 x 2, blurred, then every second one
            blur = weights[f"net.slice{number}.{block[0] - 1}.filt"]
            x = F.pad(F.max_pool2d(x, 2, stride=1), (2, 2, 2, 2), mode="reflect")
            x = F.conv2d(x, blur, stride=2, groups=len(blur))
        for place in block:
            name = f"net.slice{number}.{place}"
            x = F.relu(F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1))
        found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
    return found


@pytest.fixture(scope="module")
def perceptual() -> Perceptual:
    package = importlib.util.find_spec("stlpips_pytorch")
    if package is None or package.origin is None:
        pytest.skip("stlpips_pytorch is not installed (pip install --no-deps stlpips_pytorch==0.0.2; 66 MB)")
    path = Path(package.origin).parent / "weights" / "vST0.0" / "vgg_shift_tolerant.pth"
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)

    @torch.inference_mode()
    def distance(first: np.ndarray, second: np.ndarray) -> float:
        pairs = zip(features(weights, first), features(weights, second), strict=True)
        return sum(
            float(F.conv2d((a - b).square(), weights[f"lin{number}.model.1.weight"]).mean())
            for number, (a, b) in enumerate(pairs)
        )

    return distance


def test_what_looks_more_changed_has_more_warping_error(perceptual: Perceptual) -> None:
    """Frames blurred more are farther away, to the eye (LPIPS) and to the warping error of a video without motion."""
    frame = skimage_data.astronaut()[:96, 160:256]
    changed = [frame, *(cv2.GaussianBlur(frame, (0, 0), sigma) for sigma in (1, 3))]
    seen = [perceptual(frame, other) for other in changed]
    still = np.zeros((1, 2, 48, 48))
    measured = [warping_error(np.stack([frame, other]), still, still) for other in changed]
    for distances in (seen, measured):
        assert distances[0] == 0
        assert all(less < more for less, more in pairwise(distances))


def test_a_small_shift_hardly_shows(perceptual: Perceptual) -> None:
    """One pixel of shift changes what is seen far less than another picture does."""
    frame, shifted = (skimage_data.astronaut()[:96, left : left + 96] for left in (160, 161))
    other = skimage_data.coffee()[:96, :96]
    assert 5 * perceptual(frame, shifted) < perceptual(frame, other)
