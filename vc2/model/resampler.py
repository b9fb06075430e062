"""Image tokens for image-to-video: many tokens of an image tower to a few that the network reads.

Learnt queries look at the image's tokens and at each other, layer by layer (Alayrac et al. 2022, the Perceiver
resampler of Flamingo), through one matrix for keys and values. The coarse form has no tokens to look at, only the
tower's one vector for the whole image, and makes the few of it by one linear layer.
Shapes: B images, S tokens of the tower, M queries, W working width.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vc2.model.config import ResamplerConfig
from vc2.model.files import fill
from vc2.model.weights import resampler_from_released

__all__ = ["CoarseTokens", "Resampler"]


class Resampler(nn.Module):
    """(B, S, embedding_dim) tokens of an image tower -> (B, M, output_dim) tokens for the network."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.randn(1, config.num_queries, config.dim) * config.dim**-0.5)
        self.proj_in = nn.Linear(config.embedding_dim, config.dim)
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.depth))
        self.proj_out = nn.Linear(config.dim, config.output_dim)
        self.norm_out = nn.LayerNorm(config.output_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.proj_in(tokens)
        queries = self.queries.expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, tokens)
        return self.norm_out(self.proj_out(queries))

    @classmethod
    def from_released(cls, config: ResamplerConfig, state_dict: Mapping[str, Tensor]) -> "Resampler":
        """The resampler of a released checkpoint, whose names may begin with `image_proj_model.`.

        Raises:
            WeightsError: If any tensor is missing, unexpected, or of another shape.
        """
        resampler = cls(config)
        fill(resampler, resampler_from_released(state_dict), what="image-token resampler")
        return resampler.eval()


class ResamplerLayer(nn.Module):
    """Queries attend to image tokens and queries together, then a feed-forward."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads = config.heads
        self.token_norm = nn.LayerNorm(config.dim)
        self.query_norm = nn.LayerNorm(config.dim)
        self.query = nn.Linear(config.dim, inner, bias=False)
        self.key_and_value = nn.Linear(config.dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, config.dim, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(config.dim),
            nn.Linear(config.dim, config.ff_mult * config.dim, bias=False),
            nn.GELU(),
            nn.Linear(config.ff_mult * config.dim, config.dim, bias=False),
        )

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """(B, M, W) and (B, S, W) -> (B, M, W)."""
        asked = self.query_norm(queries)
        key, value = self.key_and_value(torch.cat([self.token_norm(tokens), asked], dim=1)).chunk(2, dim=-1)
        q, k, v = (rearrange(part, "b l (h d) -> b h l d", h=self.heads) for part in (self.query(asked), key, value))
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)")
        queries = queries + self.out(attended)
        return queries + self.feed_forward(queries)


class CoarseTokens(nn.Module):
    """(B, input_dim) vector of an image -> (B, M, output_dim) tokens for the network."""

    def __init__(self, input_dim: int, num_tokens: int, output_dim: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.proj = nn.Linear(input_dim, num_tokens * output_dim)
        self.norm = nn.LayerNorm(output_dim)

    def forward(self, vector: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(vector), "b (m d) -> b m d", m=self.num_tokens))
