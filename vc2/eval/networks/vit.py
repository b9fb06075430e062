"""The block of a vision transformer (Dosovitskiy et al. 2021), which DINO and MUSIQ are made of.

Layers are normalised before each part, with 1e-6 under the root:

    x = x + attention(norm(x)),    x = x + mlp(norm(x))

Shapes: B images, N tokens, D width.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = ["EPS", "Block"]

EPS = 1e-6


class Block(nn.Module):
    """Tokens to tokens, (B, N, D)."""

    def __init__(self, width: int, mlp_width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, eps=EPS)
        self.widen = nn.Linear(width, mlp_width)
        self.narrow = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.narrow(F.gelu(self.widen(self.mlp_norm(x))))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            rearrange(project(x), "b n (h d) -> b h n d", h=self.heads)
            for project in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out(rearrange(attended, "b h n d -> b n (h d)"))
