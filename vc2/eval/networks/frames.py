"""Frames on their way into a network: checked, and a few at a time."""

from collections.abc import Iterator

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

__all__ = ["in_batches"]


def in_batches(frames: np.ndarray, batch: int, device: torch.device) -> Iterator[Tensor]:
    """Frames as tensors on a device.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        batch: How many at a time.
        device: Where to.

    Returns:
        Up to `batch` frames each, (B, 3, H, W) float32 in 0..255.

    Raises:
        ValueError: If the frames are of another shape or type, or there is none, or `batch` is below 1.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, expected uint8 (T, H, W, 3)")
    if 0 in frames.shape:
        raise ValueError(f"frames are {frames.shape}: needs one frame of one pixel at least")
    if batch < 1:
        raise ValueError(f"batch is {batch}, expected 1 or more")
    return (
        rearrange(torch.from_numpy(np.array(frames[start : start + batch])).to(device), "b h w c -> b c h w").float()
        for start in range(0, len(frames), batch)
    )
