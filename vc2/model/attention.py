"""Attention over tokens, and the feed-forward that follows it: the parts both kinds of transformer are made of.

    attention(q, k, v) = softmax(q k' / sqrt(d)) v                                Vaswani et al. 2017, Eq. 1
    feed_forward(x)    = W_2 (value(x) * GELU(gate(x)))                           Shazeer 2020 (GEGLU)

With relative positions (Shaw et al. 2018, Eq. 3 and 4) a learnt vector per distance s - t, clamped to +-R, joins every
key in the logits and every value in the sum.
Shapes: N sequences, L query tokens, S key tokens, W width, h heads of d channels.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = ["Attention", "FeedForward", "Projection", "RelativePositions"]

_MOST_SEQUENCES = 65_535  # attention kernels index sequences by a 16-bit grid axis


class Attention(nn.Module):
    """Multi-head attention, over the tokens themselves or over a context.

    Args:
        width: Channels of the tokens.
        heads: Number of heads.
        head_dim: Channels per head.
        context_dim: Channels of the context; None: the tokens attend to themselves.
        image_context: Also read image tokens, with keys and values of their own (the IP-Adapter way).
        relative_reach: Largest distance that relative positions tell apart; None: no positions.
        causal: A token sees only itself and earlier ones.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        context_dim: int | None = None,
        image_context: bool = False,
        relative_reach: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        inner, source = heads * head_dim, context_dim or width
        self.heads = heads
        self.causal = causal
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(source, inner, bias=False)
        self.value = nn.Linear(source, inner, bias=False)
        self.image_key = nn.Linear(source, inner, bias=False) if image_context else None
        self.image_value = nn.Linear(source, inner, bias=False) if image_context else None
        self.key_positions = RelativePositions(head_dim, relative_reach) if relative_reach else None
        self.value_positions = RelativePositions(head_dim, relative_reach) if relative_reach else None
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor, context: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        """(N, L, W) -> (N, L, W). Context and image tokens may serve several consecutive sequences each.

        Args:
            x: Tokens, (N, L, W).
            context: Tokens to read, (N / g, S, context_dim): each is shared by g consecutive sequences.
            image: Image tokens to read as well, (N / g, M, context_dim); None leaves that branch out.
        """
        query = self.query(x)
        source = x if context is None else context
        attended = self._attend(query, self.key(source), self.value(source))
        if image is not None and self.image_key is not None and self.image_value is not None:
            attended = attended + self._attend(query, self.image_key(image), self.image_value(image))
        return self.out(attended)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Sequences that share a context become one long sequence of queries: keys and values are never repeated.
        sharing = query.reshape(key.shape[0], -1, query.shape[-1])
        q, k, v = (rearrange(part, "n l (h d) -> n h l d", h=self.heads) for part in (sharing, key, value))
        if self.key_positions is None:
            parts = zip(*(part.split(_MOST_SEQUENCES) for part in (q, k, v)), strict=True)
            attended = [F.scaled_dot_product_attention(*part, is_causal=self.causal) for part in parts]
            out = attended[0] if len(attended) == 1 else torch.cat(attended)
        else:
            out = self._attend_by_distance(q, k, v)
        return rearrange(out, "n h l d -> n l (h d)").reshape(query.shape)

    def _attend_by_distance(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.key_positions is not None and self.value_positions is not None
        length = q.shape[-2]
        q = q * q.shape[-1] ** -0.5
        logits = q @ k.transpose(-1, -2) + torch.einsum("nhld,lsd->nhls", q, self.key_positions(length))
        if self.causal:
            later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            logits = logits.masked_fill(later, float("-inf"))
        weights = logits.softmax(dim=-1)
        return weights @ v + torch.einsum("nhls,lsd->nhld", weights, self.value_positions(length))


class RelativePositions(nn.Module):
    """A learnt vector for every distance between two tokens."""

    def __init__(self, head_dim: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.table = nn.Parameter(torch.empty(2 * reach + 1, head_dim))
        nn.init.xavier_uniform_(self.table)

    def forward(self, length: int) -> Tensor:
        """Vectors (L, L, d): entry [l, s] stands for the distance s - l, clamped to the reach."""
        places = torch.arange(length, device=self.table.device)
        distances = (places[None, :] - places[:, None]).clamp(-self.reach, self.reach)
        return self.table[distances + self.reach]


class FeedForward(nn.Module):
    """Two linear maps with a gate between them, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value_and_gate = nn.Linear(width, 8 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        # Two maps instead of one that is then cut: both results lie densely in memory, which is faster.
        (value, gate), (value_bias, gate_bias) = self.value_and_gate.weight.chunk(2), self.value_and_gate.bias.chunk(2)
        return self.out(F.linear(x, value, value_bias) * F.gelu(F.linear(x, gate, gate_bias)))


class Projection(nn.Module):
    """A linear map of tokens whose weight may have the shape of a convolution of kernel size 1.

    Args:
        in_channels, out_channels: Widths.
        kernel_dims: How many axes of length 1 the weight carries: 0 linear, 1 or 2 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel_dims: int) -> None:
        super().__init__()
        linear = nn.Linear(in_channels, out_channels)
        self.weight = nn.Parameter(linear.weight.detach().reshape(linear.weight.shape + (1,) * kernel_dims))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)
