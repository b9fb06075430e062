"""Swin transformer for clips of fragments: the technical branch of DOVER.

Video Swin (Liu et al., arXiv 2106.13230): patches of 2 frames x 4 x 4 pixels become tokens; in four stages, tokens
attend to each other within windows of 8 x 7 x 7 tokens, which every second block shifts by half (4 x 3 x 3); between
stages, 2 x 2 neighbours are merged into one token of twice the channels. A window as large as what there is in an axis
is not shifted there. Windows that a shift lays across the edge hold tokens from both ends: those do not attend to each
other (-100 is added to their logits).

The picture is a grid of 7 x 7 *cells*, patches that do not belong together (FAST-VQA, Wu et al., arXiv 2207.02595).
An offset between two tokens means one thing within a cell, another across cells. So the first three stages learn two
biases per offset and head, and gate them by g, the number of cells from one token to the other, down plus across:

    logits = q k / sqrt(c) + (1 - g) within_cell[offset] + g across_cells[offset]

In one cell g is 0, between neighbours 1. The published network does not stop there: between diagonal neighbours g is
2, and so on, and its weights were trained that way. The last stage has one token per cell and no gate.

Shapes: B clips, T x H x W tokens, C channels; V windows of N tokens each.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn

__all__ = ["WINDOW", "Swin3D", "offset_index"]

Size = tuple[int, int, int]  # frames, height, width

WINDOW: Size = (8, 7, 7)  # tokens
_LOGITS_AT_ONCE = 1 << 22  # 16 MiB of float32: windows are attended in groups of about this, which caches hold


class Swin3D(nn.Module):
    """Clips to features; defaults are Swin-T as FAST-VQA and DOVER have it.

    Args:
        width: Channels of the first stage; each further stage has twice as many.
        depths: Blocks of the stages.
        heads: Attention heads of the stages.
        window: Tokens of a window.
        cells: Rows and columns of cells in the picture.
    """

    def __init__(
        self,
        width: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: Size = WINDOW,
        cells: tuple[int, int] = (7, 7),
    ) -> None:
        super().__init__()
        self.patches = Patches(width)
        last = len(depths) - 1
        self.stages = nn.ModuleList(
            Stage(width << level, depth, num_heads, window, cells if level < last else None, merges=level < last)
            for level, (depth, num_heads) in enumerate(zip(depths, heads, strict=True))
        )
        self.norm = nn.LayerNorm(width << last)

    def forward(self, clips: Tensor) -> Tensor:
        """Features (B, C, T/2, H/32, W/32) of normalised clips (B, 3, T, H, W).

        Raises:
            ValueError: If the tokens of some stage cannot be cut into windows, or merged.
        """
        x = self.patches(clips)
        for stage in self.stages:
            x = stage(x)
        return rearrange(self.norm(x), "b t h w c -> b c t h w")


class Patches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(3, width, kernel_size=(2, 4, 4), stride=(2, 4, 4))
        self.norm = nn.LayerNorm(width)

    def forward(self, clips: Tensor) -> Tensor:
        return self.norm(rearrange(self.convolution(clips), "b c t h w -> b t h w c"))


class Stage(nn.Module):
    def __init__(
        self, width: int, depth: int, heads: int, window: Size, cells: tuple[int, int] | None, merges: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(Block(width, heads, window, cells, is_shifted=index % 2 == 1) for index in range(depth))
        )
        self.merge = Merge(width) if merges else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.blocks(x))


class Merge(nn.Module):
    """Four neighbours, column by column, become one token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"{x.shape[2]} x {x.shape[3]} tokens cannot be merged by 2 x 2; expected even numbers")
        x = rearrange(x, "b t (h rows) (w columns) c -> b t h w (columns rows c)", rows=2, columns=2)
        return self.reduction(self.norm(x))


class Block(nn.Module):
    """Attention within windows, then an MLP, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, window: Size, cells: tuple[int, int] | None, is_shifted: bool) -> None:
        super().__init__()
        self.window, self.cells, self.is_shifted = window, cells, is_shifted
        self.attention_norm = nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, window, is_gated=cells is not None)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x))
        return x + self.contract(nn.functional.gelu(self.expand(self.mlp_norm(x))))

    def attend(self, x: Tensor) -> Tensor:
        size: Size = x.shape[1], x.shape[2], x.shape[3]
        window, shift = _window_and_shift(size, self.window, self.is_shifted)
        windows = _into_windows(torch.roll(x, [-step for step in shift], (1, 2, 3)), window)
        cells = None if self.cells is None else _cells(size, window, shift, self.cells, x.device)
        sides = _sides(size, window, shift, x.device) if any(shift) else None
        windows = self.attention(windows, window, cells, sides)
        return torch.roll(_from_windows(windows, size, window), shift, (1, 2, 3))


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a bias by offset; two biases and a gate between where `is_gated`."""

    def __init__(self, width: int, heads: int, window: Size, is_gated: bool) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        num_offsets = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        self.qkv = nn.Linear(width, 3 * width)
        self.across_cells = nn.Parameter(torch.zeros(num_offsets, heads))
        self.within_cell = nn.Parameter(torch.zeros(num_offsets, heads)) if is_gated else None
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, window: Size, cells: Tensor | None = None, sides: Tensor | None = None) -> Tensor:
        """Attend within windows.

        Args:
            x: Tokens, (B, V, N, C).
            window: Extent of a window, of N tokens; at most that of `__init__`.
            cells: Row and column of every token's cell, (V, N, 2); needed where the bias is gated.
            sides: A number for every token, (V, N): those of unlike numbers do not attend to each other.
        """
        query, key, value = rearrange(
            self.qkv(x), "b v n (three heads c) -> three b v heads n c", three=3, heads=self.heads
        )
        query = query * query.shape[-1] ** -0.5
        offsets = offset_index(window, self.window).to(x.device)
        across = rearrange(self.across_cells[offsets], "n m heads -> heads n m")
        within = None if self.within_cell is None else rearrange(self.within_cell[offsets], "n m heads -> heads n m")
        clips, num_windows, num_tokens, _ = x.shape
        step = max(1, _LOGITS_AT_ONCE // (clips * self.heads * num_tokens**2))
        attended = []
        for some in (slice(start, start + step) for start in range(0, num_windows, step)):
            logits = query[:, some] @ key[:, some].transpose(-1, -2)
            if within is None or cells is None:
                logits += across
            else:  # beyond 1 the gate goes on along the line, as published
                gate = torch.cdist(cells[some], cells[some], p=1)
                logits += torch.lerp(within, across, gate[:, None])
            if sides is not None:
                logits -= 100.0 * (sides[some, None, :, None] != sides[some, None, None, :])
            attended.append(logits.softmax(-1) @ value[:, some])
        return self.output(rearrange(torch.cat(attended, 1), "b v heads n c -> b v n (heads c)"))


# ---------------------------------------------------------------------------------------------------------------------
# Where tokens stand


@lru_cache(maxsize=16)
def offset_index(window: Size, of: Size) -> Tensor:
    """Place in a table of biases of every pair of tokens in a window, (N, N) integers.

    The table has a row for every offset between tokens of a window `of`, of which `window` is a part or all: the place
    of the first token minus that of the second, frames before rows before columns, the most negative first.
    """
    axes = [torch.arange(length) for length in window]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    offsets = places[:, None] - places[None] + torch.tensor(of) - 1
    num = [2 * length - 1 for length in of]
    return (offsets * torch.tensor([num[1] * num[2], num[2], 1])).sum(-1)


def _window_and_shift(size: Size, window: Size, is_shifted: bool) -> tuple[Size, Size]:
    fitting = min(size[0], window[0]), min(size[1], window[1]), min(size[2], window[2])
    if any(length % part for length, part in zip(size, fitting, strict=True)):
        raise ValueError(f"{size} tokens (frames, height, width) cannot be cut into windows of {fitting}")
    shift = [part // 2 if is_shifted and part < length else 0 for length, part in zip(size, window, strict=True)]
    return fitting, (shift[0], shift[1], shift[2])


def _into_windows(x: Tensor, window: Size) -> Tensor:
    i, j, k = window
    return rearrange(x, "b (t i) (h j) (w k) c -> b (t h w) (i j k) c", i=i, j=j, k=k)


def _from_windows(x: Tensor, size: Size, window: Size) -> Tensor:
    i, j, k = window
    return rearrange(x, "b (t h w) (i j k) c -> b (t i) (h j) (w k) c", h=size[1] // j, w=size[2] // k, i=i, j=j, k=k)


def _cells(size: Size, window: Size, shift: Size, cells: tuple[int, int], device: torch.device) -> Tensor:
    """Row and column of every token's cell, (V, N, 2)."""
    _, height, width = size
    rows = torch.arange(height, device=device) * cells[0] // height
    columns = torch.arange(width, device=device) * cells[1] // width
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).roll((-shift[1], -shift[2]), (0, 1))
    return _into_windows(places.float().expand(1, *size, 2), window)[0]


def _sides(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """Over which edges a shift brought every token round, as a sum of 4 (end), 2 (bottom) and 1 (right), (V, N)."""
    axes = [torch.arange(n, device=device) >= n - step for n, step in zip(size, shift, strict=True)]
    came_round = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None]
    return (_into_windows(came_round, window)[0] * torch.tensor([4, 2, 1], device=device)).sum(-1)
