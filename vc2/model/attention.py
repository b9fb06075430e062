"""Attention over tokens, the feed-forward that follows it, and the shell that both kinds of transformer share.

    attention(q, k, v) = softmax(q k' / sqrt(d)) v                                Vaswani et al. 2017, Eq. 1
    feed_forward(x)    = W_2 (value(x) * GELU(gate(x)))                           Shazeer 2020 (GEGLU)
    transformer(x)     = x + proj_out(blocks(proj_in(norm(x))))                   Rombach et al. 2022, App. E.2.1

With relative positions (Shaw et al. 2018, Eq. 3 and 4) a learnt vector per distance s - t, clamped to +-R, joins every
key in the logits and every value in the sum.
Attention runs along the second axis. Axes between it and the last are places that do not see each other, in attention
no different from heads: so frames attend to frames at every pixel without pixels and frames ever changing places.
Shapes: N sequences, L query tokens, S key tokens, P places, W width, h heads of d channels.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vc2.model.config import Recompute
from vc2.model.recompute import recomputed

__all__ = ["Attention", "FeedForward", "RelativePositions", "Transformer", "zeroed"]

_MOST = 65_535  # attention kernels index sequences, and heads, by a 16-bit grid axis


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all its parameters at zero: a branch that ends in it adds nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


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
        self.head_dim = head_dim
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
        """Tokens to tokens of the same shape. Context and image tokens may serve several consecutive sequences each.

        Args:
            x: Tokens, (N, L, W); without a context also (N, L, P, W).
            context: Tokens to read, (N / g, S, context_dim): each is shared by g consecutive sequences.
            image: Image tokens to read as well, (N / g, M, context_dim); None leaves that branch out.
        """
        if context is None and x.shape[1] == 1:
            return self.out(self._value_alone(x))
        return self.out(self._attention(x, context, image))

    def _attention(self, x: Tensor, context: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        query = self.query(x)
        source = x if context is None else context
        attended = self._attend(query, self.key(source), self.value(source))
        if image is not None and self.image_key is not None and self.image_value is not None:
            attended = attended + self._attend(query, self.image_key(image), self.image_value(image))
        return attended

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Sequences that share a context become one long sequence of queries: keys and values are never repeated.
        sharing = query.reshape(key.shape[0], -1, *query.shape[2:])
        q, k, v = (part.reshape(*part.shape[:2], -1, self.head_dim).transpose(1, 2) for part in (sharing, key, value))
        if self.key_positions is None:
            out = _in_parts(q, k, v, is_causal=self.causal)
        else:
            out = self._attend_by_distance(q, k, v)
        return out.transpose(1, 2).reshape(query.shape)

    def _value_alone(self, x: Tensor) -> Tensor:
        """What a token gets that has only itself to attend to: its own value, since a softmax over one is 1.

        Queries and keys decide nothing then; they stay in the graph with a gradient of zero.
        """
        value = self.value(x)
        idle: list[nn.Module] = [self.query, self.key]
        if self.key_positions is not None and self.value_positions is not None:
            value = (value.unflatten(-1, (-1, self.head_dim)) + self.value_positions(1)[0]).flatten(-2)
            idle.append(self.key_positions)
        learning = [parameter for module in idle for parameter in module.parameters() if parameter.requires_grad]
        if not (learning and torch.is_grad_enabled()):
            return value
        return value + 0.0 * torch.stack([parameter.flatten()[0] for parameter in learning]).sum()

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


def _in_parts(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
    """Fused attention over (N, h, L, d), no more sequences or heads at once than a kernel takes."""
    for axis in (0, 1):
        if q.shape[axis] > _MOST:
            parts = zip(*(part.split(_MOST, dim=axis) for part in (q, k, v)), strict=True)
            return torch.cat([_in_parts(*part, is_causal=is_causal) for part in parts], dim=axis)
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


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
        value, gate = self.value_and_gate(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class _PointwiseConv1d(nn.Conv1d):
    """A 1-D convolution of kernel size 1, computed as the linear map of tokens that it is."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, L) -> (N, C_out, L)."""
        return F.linear(input.mT, self.weight[..., 0], self.bias).mT


class _PointwiseConv2d(nn.Conv2d):
    """A 2-D convolution of kernel size 1, computed as the linear map of tokens that it is."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, L, 1) -> (N, C_out, L, 1)."""
        return F.linear(input[..., 0].mT, self.weight[..., 0, 0], self.bias).mT[..., None]


def _projection(channels: int, out_channels: int, kernel_dims: int) -> nn.Module:
    """A linear map of tokens whose weight carries `kernel_dims` axes of length 1."""
    if not kernel_dims:
        return nn.Linear(channels, out_channels)
    return (_PointwiseConv1d, _PointwiseConv2d)[kernel_dims - 1](channels, out_channels, 1)


class Transformer(nn.Module):
    """The shell of a transformer over feature maps: a residual branch that starts as zero.

    Args:
        channels: Width of the feature map.
        width: Width inside, of the blocks.
        blocks: What tokens go through; a block may take more than the tokens.
        groups: Groups of the normalisation.
        kernel_dims: 0: projections are linear layers; 1 or 2: convolutions of kernel size 1 (the same map).
        recompute: What the blocks keep for the backward pass.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        blocks: Iterable[nn.Module],
        *,
        groups: int,
        kernel_dims: int,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.kernel_dims = kernel_dims
        self.recompute: Recompute = recompute
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = _projection(channels, width, kernel_dims)
        self.blocks = nn.ModuleList(blocks)
        self.proj_out = zeroed(_projection(width, channels, kernel_dims))

    def branch(self, tokens: Tensor, *context: Tensor | None) -> Tensor:
        """Normalised tokens (N, L, channels) or (N, L, P, channels) -> what is added to them, the same shape."""
        tokens = self._project(self.proj_in, tokens)
        for block in self.blocks:
            tokens = recomputed(self.recompute, block, tokens, *context)
        return self._project(self.proj_out, tokens)

    def _project(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        if not self.kernel_dims:
            return layer(tokens)
        feature_map = tokens.flatten(1, -2).mT  # to a kernel of size 1 all tokens are alike
        feature_map = layer(feature_map if self.kernel_dims == 1 else feature_map[..., None])
        return feature_map.flatten(2).mT.unflatten(1, tokens.shape[1:-1])
