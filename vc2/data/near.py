"""Near duplicates: samples whose perceptual hashes differ in a few bits only.

Hashes that differ in at most `bits` of 64 agree in at least one of `bits + 1` bands, so only samples that share a band
are compared (a pigeonhole argument; Manku et al. 2007). A sample is marked with the first earlier one, itself not
marked, that it is near to. Clips have three hashes (first, middle, last frame) and all must be near. Clips of one video
are alike by nature and never marked for each other.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

__all__ = ["near_duplicates"]

BLOCK = 2048  # samples that are compared with each other at a time
NONE = -1


def near_duplicates(hashes: np.ndarray, bits: int, groups: Sequence[int] | np.ndarray) -> np.ndarray:
    """For each sample the number of the earlier one that it nearly repeats, or -1.

    Args:
        hashes: (N, K) uint64, K hashes of every sample.
        bits: Most bits by which each of the K pairs may differ.
        groups: (N,) numbers; samples of the same group are never compared.

    Returns:
        (N,) int64.
    """
    groups = np.asarray(groups)
    marked = np.full(len(hashes), NONE, np.int64)
    if not len(hashes):
        return marked
    distinct, members = np.unique(hashes, axis=0, return_inverse=True)
    near: dict[int, list[int]] = {}  # of distinct hashes, others that they are near to
    for one, other in _pairs(distinct, bits).tolist():
        near.setdefault(one, []).append(other)
        near.setdefault(other, []).append(one)
    # Of each distinct hash the first sample that is not marked. All later ones of it are of the same group, or they
    # would have been marked with it: so no other need be looked at.
    kept = [NONE] * len(distinct)
    for number, member in enumerate(members.reshape(-1).tolist()):
        first = [kept[other] for other in (member, *near.get(member, ())) if kept[other] != NONE]
        if found := [other for other in first if groups[other] != groups[number]]:
            marked[number] = min(found)
        elif kept[member] == NONE:
            kept[member] = number
    return marked


def _pairs(hashes: np.ndarray, bits: int) -> np.ndarray:
    """Numbers (first < second) of all pairs of rows that are near."""
    middle = hashes[:, hashes.shape[1] // 2]
    found = [np.zeros((0, 2), np.int64)]
    edges = np.linspace(0, 64, bits + 2).astype(int)
    for low, high in pairwise(edges.tolist()):
        band = (middle >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=band[order[0]] ^ np.uint64(1)))
        for bucket in np.split(order, starts[1:]):
            if len(bucket) > 1:
                found += _near_in(hashes, bucket, bits)
    return np.unique(np.concatenate(found), axis=0)


def _near_in(hashes: np.ndarray, bucket: np.ndarray, bits: int) -> list[np.ndarray]:
    found = []
    for start in range(0, len(bucket), BLOCK):
        left = bucket[start : start + BLOCK]
        for other in range(start, len(bucket), BLOCK):
            right = bucket[other : other + BLOCK]
            differing = np.bitwise_count(hashes[left][:, None] ^ hashes[right][None])
            first, second = np.nonzero((differing <= bits).all(axis=-1))
            pairs = np.sort(np.stack([left[first], right[second]], axis=1), axis=1)
            found.append(pairs[pairs[:, 0] < pairs[:, 1]])
    return found
