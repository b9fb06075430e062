"""Which sample stands at which position: the order of training data, as arithmetic.

Nothing here remembers anything; each question is answered from the numbers in it.

    step     s is of images iff floor((s + 1) a + b) > floor(s a + b): the share a exactly, evenly spread, b drawn from
             the seed; so the number of image steps before s is floor(s a + b), without counting
    mixture  the same rule between the first set and the rest, then between the second and its rest, and so on: which
             set position n of a kind is taken from, and how many positions of that set came before
    epoch    position m of a set of N samples stands in epoch m // N. In each epoch the shards are permuted and cut
             into windows of k; within a window the samples are permuted. What is read at a time lies in k tars, and
             what is held is one permutation of shards and those of a few windows
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from vc2.seeding import derive_seed, generator

__all__ = ["Epochs", "Mixture", "evenly", "image_steps", "is_image_step"]

PHASES = 2**20  # of a schedule


def evenly(*names: int | str) -> Fraction:
    """A phase in [0, 1), drawn from the names."""
    return Fraction(derive_seed(*names) % PHASES, PHASES)


def is_image_step(step: int, share: Fraction, phase: Fraction) -> bool:
    """Whether the batch of a step is of images."""
    return image_steps(step + 1, share, phase) > image_steps(step, share, phase)


def image_steps(step: int, share: Fraction, phase: Fraction) -> int:
    """Image steps before `step`; exact, as are the fractions."""
    return (step * share + phase).__floor__()


class Mixture:
    """Several streams as one, each taken in proportion to its weight.

    Whenever n times a stream's share and what came of the streams before it are whole, the counts are exact; at any
    other time they are off by less than two for each stream.
    """

    def __init__(self, weights: Sequence[Fraction | int], *names: int | str) -> None:
        self._splits: list[tuple[Fraction, Fraction]] = []  # share of a stream in what those before it leave; phase
        rest = Fraction(sum(weights))
        for number, weight in enumerate(weights[:-1]):
            self._splits.append((Fraction(weight) / rest, evenly(*names, number)))
            rest -= weight

    def at(self, position: int) -> tuple[int, int]:
        """Number of the stream that a position is taken from, and the position in that stream."""
        for number, (share, phase) in enumerate(self._splits):
            before = image_steps(position, share, phase)
            if image_steps(position + 1, share, phase) > before:
                return number, before
            position -= before
        return len(self._splits), position


class Epochs:
    """The endless order of one set.

    Args:
        counts: Samples of each shard; its rows follow each other, shard by shard.
        window: Shards whose samples are shuffled among each other.
        names: What the draws are for, the seed among them.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, window: int, *names: int | str) -> None:
        self._counts = np.asarray(counts, np.int64)
        self._first = np.cumsum(self._counts) - self._counts
        self._width, self._names = window, names
        self.length = int(self._counts.sum())
        self._shards = lru_cache(2)(self._permuted_shards)
        self._rows = lru_cache(4)(self._permuted_rows)

    def row(self, position: int) -> int:
        """Row of the sample at a position."""
        epoch, window, place = self._locate(position)
        return int(self._rows(epoch, window)[place])

    def window(self, position: int, ahead: int = 0) -> list[int]:
        """Shards that are read around a position; with `ahead`, so many windows later."""
        epoch, window, _ = self._locate(position)
        further, window = divmod(window + ahead, -(-len(self._counts) // self._width))
        return self._members(epoch + further, window).tolist()

    def _locate(self, position: int) -> tuple[int, int, int]:
        epoch, place = divmod(position, self.length)
        ends = self._shards(epoch)[1]
        window = int(np.searchsorted(ends, place, side="right"))
        return epoch, window, place - (int(ends[window - 1]) if window else 0)

    def _members(self, epoch: int, window: int) -> np.ndarray:
        return self._shards(epoch)[0][window * self._width : (window + 1) * self._width]

    def _permuted_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and the place at which each window ends."""
        shards = generator(*self._names, "shards", epoch).permutation(len(self._counts))
        starts = np.arange(0, len(shards), self._width)
        return shards, np.cumsum(np.add.reduceat(self._counts[shards], starts))

    def _permuted_rows(self, epoch: int, window: int) -> np.ndarray:
        members = self._members(epoch, window).tolist()
        spans = [int(self._first[shard]) + np.arange(int(self._counts[shard])) for shard in members]
        return generator(*self._names, "window", epoch, window).permutation(np.concatenate(spans))
