"""Near duplicates: the quick search finds what comparing all with all finds."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vc2.data.near import near_duplicates


def by_hand(hashes: np.ndarray, bits: int, groups: list[int]) -> list[int]:
    marked: list[int] = []
    for number, hash_ in enumerate(hashes):
        near = [
            other
            for other in range(number)
            if marked[other] == -1
            and groups[other] != groups[number]
            and (np.bitwise_count(hashes[other] ^ hash_) <= bits).all()
        ]
        marked.append(near[0] if near else -1)
    return marked


@settings(max_examples=100)
@given(
    count=st.integers(0, 60),
    width=st.sampled_from([1, 3]),
    bits=st.integers(0, 5),
    flips=st.integers(0, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_comparing_all_with_all_finds(count: int, width: int, bits: int, flips: int, seed: int) -> None:
    """The first earlier unmarked sample of another video within `bits`, for each of its hashes."""
    random = np.random.default_rng(seed)
    centres = random.integers(0, 2**64, (4, width), np.uint64, endpoint=False)
    hashes = centres[random.integers(0, 4, count)]
    for _ in range(flips):
        flip = random.integers(0, 64, hashes.shape).astype(np.uint64)
        hashes = hashes ^ np.where(random.random(hashes.shape) < 0.5, np.uint64(1) << flip, np.uint64(0))
    groups = random.integers(0, 20, count).tolist()
    assert near_duplicates(hashes.reshape(count, width), bits, groups).tolist() == by_hand(hashes, bits, groups)


def test_the_first_of_all_that_are_alike_may_be_of_the_same_video() -> None:
    """Then it is the next of another video that counts; and one that is marked never is."""
    hashes = np.array([[0], [0], [0], [1], [0]], np.uint64)
    assert near_duplicates(hashes, 1, [0, 0, 1, 0, 1]).tolist() == [-1, -1, 0, -1, 0]
    hashes = np.array([[0b11], [0b01], [0b00], [0b00]], np.uint64)
    assert near_duplicates(hashes, 1, [0, 1, 2, 1]).tolist() == [-1, 0, -1, 2]


def test_many_alike_are_no_trouble() -> None:
    """Thousands of black pictures are copies of the first, at once."""
    hashes = np.zeros((20_000, 1), np.uint64)
    marked = near_duplicates(hashes, 3, np.arange(20_000))
    assert marked[0] == -1 and (marked[1:] == 0).all()
