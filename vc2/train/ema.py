"""Exponential moving average of the weights, on float32 masters: bf16 cannot hold a decay of 0.9999.

    ema <- d_n ema + (1 - d_n) weights,    d_n = min(decay, (1 + n) / (10 + n)) at the n-th update

The warm-up d_n lets the average forget the initial weights. Each rank averages its own shard.
"""

import torch
from torch import Tensor

__all__ = ["Ema"]


class Ema:
    """The average of one rank's shard, (n,) float32, and how often it was updated."""

    def __init__(self, master: Tensor, decay: float) -> None:
        self.shard = master.detach().clone()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, master: Tensor) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.shard.lerp_(master, 1.0 - decay)
        self.updates += 1
