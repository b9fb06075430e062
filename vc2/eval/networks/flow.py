"""Optical flow: where each pixel of a frame is in the next one.

RAFT (Teed and Deng 2020) by torchvision, with the weights trained on FlyingThings that EvalCrafter uses and 20 updates.
Its features need frames of at least 128 pixels a side that 8 divides: smaller ones are extended by their edges, and the
flow is cut back. DIS (Kroeger et al. 2016) by OpenCV needs no weights: a substitute, with other numbers than RAFT.

Shapes: P pairs, H x W pixels; a flow is (P, 2, H, W), x then y, in pixels.
"""

from pathlib import Path
from typing import Protocol, Self

import cv2
import numpy as np
import torch
from einops import rearrange
from torchvision.models.optical_flow import raft_large

from vc2.eval.networks.public_names import fill
from vc2.model.files import open_weights

__all__ = ["DisFlow", "FlowEstimator", "Raft"]

MOST_BYTES = 2**31  # of correlations on the device at once
LEAST_SIDE = 128  # pixels: a sixteenth of an eighth is what the coarsest of four levels needs


class FlowEstimator(Protocol):
    """Tells flow between pairs of frames."""

    def between(self, first: np.ndarray, second: np.ndarray, *, batch: int = 4) -> np.ndarray:
        """Flow (P, 2, H, W) float32 from `first` to `second`, both (P, H, W, 3) with values of 0..255."""
        ...


class Raft:
    """RAFT, large."""

    def __init__(self, network: torch.nn.Module, device: torch.device, *, updates: int = 20) -> None:
        self.network, self.device, self.updates = network.eval().requires_grad_(False).to(device), device, updates

    @classmethod
    def load(cls, path: Path, device: torch.device, *, updates: int = 20) -> Self:
        """RAFT from torchvision's file of weights.

        Raises:
            WeightsError: If its tensors are not those of the network.
        """
        network = raft_large(weights=None)
        fill(network, open_weights(path), cause="not torchvision's raft_large")
        return cls(network, device, updates=updates)

    @torch.inference_mode()
    def between(self, first: np.ndarray, second: np.ndarray, *, batch: int = 4) -> np.ndarray:
        height, width = first.shape[1:3]
        down, across = (_extended(side) - side for side in (height, width))
        top, left = down // 2, across // 2
        flows = np.empty((len(first), 2, height, width), np.float32)
        batch = min(batch, pairs_at_once(height + down, width + across))
        for start in range(0, len(first), batch):
            pair = []
            for frames in (first, second):
                part = torch.from_numpy(np.ascontiguousarray(frames[start : start + batch], dtype=np.float32))
                part = rearrange(part.to(self.device), "p h w c -> p c h w")
                part = torch.nn.functional.pad(part, (left, across - left, top, down - top), mode="replicate")
                pair.append(part / 127.5 - 1)
            flow = self.network(*pair, num_flow_updates=self.updates)[-1]
            flows[start : start + batch] = flow[:, :, top : top + height, left : left + width].cpu().numpy()
        return flows


def pairs_at_once(height: int, width: int) -> int:
    """How many pairs of frames fit: all of a frame's places are correlated with all of the other's, on four levels."""
    places = height * width // 64
    return max(1, MOST_BYTES // (places * places * 4 * 4 // 3))


def _extended(side: int) -> int:
    return max(LEAST_SIDE, -(-side // 8) * 8)


class DisFlow:
    """Dense inverse search, on brightness."""

    def between(self, first: np.ndarray, second: np.ndarray, *, batch: int = 4) -> np.ndarray:
        before = cv2.getNumThreads()
        cv2.setNumThreads(1)  # sums over threads must not differ from run to run
        try:
            return np.stack([self._of_pair(*pair) for pair in zip(first, second, strict=True)])
        finally:
            cv2.setNumThreads(before)

    @staticmethod
    def _of_pair(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        grey = [
            cv2.cvtColor(np.rint(frame).clip(0, 255).astype(np.uint8), cv2.COLOR_RGB2GRAY) for frame in (first, second)
        ]
        height, width = grey[0].shape
        down, across = max(0, 32 - height), max(0, 32 - width)  # its coarsest patches need that much
        grey = [cv2.copyMakeBorder(image, 0, down, 0, across, cv2.BORDER_REPLICATE) for image in grey]
        search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)  # one that was used remembers
        flow = search.calc(grey[0], grey[1], np.zeros((*grey[0].shape, 2), np.float32))
        return rearrange(flow[:height, :width], "h w c -> c h w")
