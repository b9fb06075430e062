"""What makes stock footage look like stock footage: soft optics, sensor noise and a watermark at a fixed place.

The watermark is the word STOCK over a thin line, half transparent white, centred a little below the middle. Its size
follows the frame's width, so that it stays where it is when a frame is fitted and cropped to 5:3. `watermark_alpha`
is also the template by which the judge looks for it.

Shapes: T frames, H x W pixels.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np

__all__ = ["WATERMARK_OPACITY", "footage", "soften", "stamp", "watermark_alpha"]

WATERMARK_OPACITY = 0.42

_LETTERS = {  # 5 x 7 cells
    "S": (".####", "#....", "#....", ".###.", "....#", "....#", "####."),
    "T": ("#####", "..#..", "..#..", "..#..", "..#..", "..#..", "..#.."),
    "O": (".###.", "#...#", "#...#", "#...#", "#...#", "#...#", ".###."),
    "C": (".####", "#....", "#....", "#....", "#....", "#....", ".####"),
    "K": ("#...#", "#..#.", "#.#..", "##...", "#.#..", "#..#.", "#...#"),
}
_WORD = "STOCK"
_WIDTH = 0.62  # of the frame's width
_BELOW = 0.17  # centre of the word below the frame's centre, in frame widths
_GRID = 8  # sub-pixels per pixel and axis when cells are averaged


@lru_cache(maxsize=64)
def watermark_alpha(width: int, height: int) -> np.ndarray:
    """Cover of the watermark, (H, W) float in [0, 1], before its opacity. Shared between calls: do not write to it."""
    rows = np.full((9, 6 * len(_WORD) - 1), False)
    for index, letter in enumerate(_WORD):
        rows[:7, 6 * index : 6 * index + 5] = [[cell == "#" for cell in line] for line in _LETTERS[letter]]
    rows[8] = True  # the line below the word
    cell = _WIDTH * width / rows.shape[1]
    left = (1 - _WIDTH) / 2 * width
    top = height / 2 + _BELOW * width - 4.5 * cell
    x = np.floor(((np.arange(width * _GRID) + 0.5) / _GRID - left) / cell).astype(int)
    y = np.floor(((np.arange(height * _GRID) + 0.5) / _GRID - top) / cell).astype(int)
    inside = ((y >= 0) & (y < rows.shape[0]))[:, None] & ((x >= 0) & (x < rows.shape[1]))[None, :]
    fine = inside & rows[np.clip(y, 0, rows.shape[0] - 1)[:, None], np.clip(x, 0, rows.shape[1] - 1)[None, :]]
    return fine.reshape(height, _GRID, width, _GRID).mean(axis=(1, 3))


def stamp(frames: np.ndarray, opacity: float = WATERMARK_OPACITY) -> np.ndarray:
    """Frames (..., H, W, 3) uint8 with the watermark laid over them."""
    keep, add = _stamp_weights(*frames.shape[-3:-1], opacity)
    return ((frames * keep + add) >> 8).astype(np.uint8)


@lru_cache(maxsize=64)
def _stamp_weights(height: int, width: int, opacity: float) -> tuple[np.ndarray, np.ndarray]:
    weight = np.rint(256 * opacity * watermark_alpha(width, height)).astype(np.uint16)[:, :, None]
    return 256 - weight, 235 * weight + 128


def soften(frames: np.ndarray) -> np.ndarray:
    """Frames (..., H, W, 3) uint8 through a 3 x 3 binomial blur, edges repeated."""
    wide = np.pad(frames, [(0, 0)] * (frames.ndim - 3) + [(1, 1), (1, 1), (0, 0)], mode="edge").astype(np.uint16)
    rows = wide[..., :-2, :, :] + 2 * wide[..., 1:-1, :, :] + wide[..., 2:, :, :]
    return ((rows[..., :-2, :] + 2 * rows[..., 1:-1, :] + rows[..., 2:, :] + 8) >> 4).astype(np.uint8)


def footage(frames: Iterable[np.ndarray], rng: np.random.Generator, noise: float) -> Iterator[np.ndarray]:
    """Clean frames (H, W, 3) uint8 as stock footage shows them: stamped, softened, noisy; made as they are asked for.

    The noise is grey and bell-shaped with standard deviation `noise`. One large field is drawn and every frame cuts
    its own window from it: cheap, and still without a visible repeat.
    """
    field = np.zeros((0, 0, 1), np.int16)
    for frame in frames:
        height, width = frame.shape[:2]
        if not field.size:
            grains = rng.integers(0, 256, (4, height + 64, width + 64), dtype=np.uint8)
            coarse = grains.sum(axis=0, dtype=np.int16) - 510  # mean 0, deviation 147.8
            field = np.rint(coarse * (noise / 147.8)).astype(np.int16)[:, :, None]
        dy, dx = rng.integers(0, 64, 2)
        noisy = soften(stamp(frame)) + field[dy : dy + height, dx : dx + width]
        yield np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)
