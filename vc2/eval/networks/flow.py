"""Optical flow: where each pixel of a frame is in the next one.

RAFT (Teed and Deng 2020) by torchvision, with the weights trained on FlyingThings that EvalCrafter uses and 20 updates.
Its features need frames of at least 128 pixels a side that 8 divides: smaller ones are extended by their edges, and the
flow is cut back. DIS (Kroeger et al. 2016) by OpenCV needs no weights: a substitute, with other numbers than RAFT.

Shapes: T frames, P pairs, H x W pixels; a flow is (P, 2, H, W), x then y, in pixels.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self

import cv2
import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torchvision.models.optical_flow import raft_large
from torchvision.models.optical_flow._utils import make_coords_grid, upsample_flow

from vc2.eval.networks.public_names import fill
from vc2.model.files import open_weights

__all__ = ["DisFlow", "FlowEstimator", "Raft"]

MOST_BYTES = 2**31  # of correlations on the device at once
Flows = tuple[np.ndarray, np.ndarray | None]  #: (T - 1, 2, H, W) float32 there, and back
LEAST_SIDE = 128  # pixels: a sixteenth of an eighth is what the coarsest of four levels needs


class FlowEstimator(Protocol):
    """Tells flow between neighbouring frames."""

    def along(self, frames: np.ndarray, *, both_ways: bool = False, batch: int = 4) -> Flows:
        """Flow from each frame to the next, and back where `both_ways`.

        Args:
            frames: (T, H, W, 3), values of 0..255.
            both_ways: Whether the way back is wanted, too.
            batch: Pairs on the device at once, at most.
        """
        ...


class Raft:
    """RAFT, large."""

    def __init__(self, network: torch.nn.Module, device: torch.device, *, updates: int = 20) -> None:
        self.network: Any = network.eval().requires_grad_(False).to(device)
        self.device, self.updates = device, updates

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
    def along(self, frames: np.ndarray, *, both_ways: bool = False, batch: int = 4) -> Flows:
        """As the network does it for a pair, with what it makes of a frame made once, and the fine flow only at the
        end: the same numbers."""
        height, width = frames.shape[1:3]
        down, across = (_extended(side) - side for side in (height, width))
        top, left = down // 2, across // 2
        batch = min(batch, pairs_at_once(height + down, width + across))
        features, contexts = [], []
        for start in range(0, len(frames), batch):
            part = torch.from_numpy(np.ascontiguousarray(frames[start : start + batch], dtype=np.float32))
            part = rearrange(part.to(self.device), "t h w c -> t c h w")
            part = torch.nn.functional.pad(part, (left, across - left, top, down - top), mode="replicate") / 127.5 - 1
            features.append(self.network.feature_encoder(part))
            contexts.append(self.network.context_encoder(part))
        feature, context = torch.cat(features), torch.cat(contexts)

        def flows(first: slice, second: slice) -> np.ndarray:
            parts = zip(
                *(of_all.split(batch) for of_all in (feature[first], feature[second], context[first])), strict=True
            )
            found = torch.cat([self._flow(*part) for part in parts])
            return found[:, :, top : top + height, left : left + width].cpu().numpy()

        before, after = slice(None, -1), slice(1, None)
        return flows(before, after), flows(after, before) if both_ways else None

    def _flow(self, first: Tensor, second: Tensor, context: Tensor) -> Tensor:
        """(P, 2, H, W) from features of both frames and context of the first, at an eighth of the size."""
        network = self.network
        network.corr_block.build_pyramid(first, second)
        size = network.update_block.hidden_state_size
        hidden, context = context.split([size, context.shape[1] - size], 1)
        hidden, context = hidden.tanh(), context.relu()
        start = make_coords_grid(len(first), first.shape[-2], first.shape[-1]).to(self.device)
        place = start
        for _ in range(self.updates):
            correlation = network.corr_block.index_pyramid(centroids_coords=place)
            hidden, change = network.update_block(hidden, context, correlation, place - start)
            place = place + change
        return upsample_flow(flow=place - start, up_mask=network.mask_predictor(hidden))


def pairs_at_once(height: int, width: int) -> int:
    """How many pairs of frames fit: all of a frame's places are correlated with all of the other's, on four levels."""
    places = height * width // 64
    return max(1, MOST_BYTES // (places * places * 4 * 4 // 3))


def _extended(side: int) -> int:
    return max(LEAST_SIDE, -(-side // 8) * 8)


class DisFlow:
    """Dense inverse search, on brightness."""

    def along(self, frames: np.ndarray, *, both_ways: bool = False, batch: int = 4) -> Flows:
        before = cv2.getNumThreads()
        cv2.setNumThreads(1)  # sums over threads must not differ from run to run
        try:
            there = np.stack([self._of_pair(*pair) for pair in pairwise(frames)])
            return there, np.stack([self._of_pair(*pair[::-1]) for pair in pairwise(frames)]) if both_ways else None
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
