import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from vc2.data.prefetch import HAND_OVER, Prefetch
from vc2.errors import ConfigError, ShardCorrupted


@dataclass(frozen=True)
class Ref:
    kind: str
    position: int
    key: str
    caption: str = ""
    fps: int = 8

    @property
    def identity(self) -> str:
        return self.key


class Counted:
    """A loader of four samples a step that says what it was asked for; reads from `held` on wait at the gate."""

    def __init__(self, *, known: int = 10**9, broken: int | None = None, held: int = 10**9, size: int = 100) -> None:
        self.known, self.broken, self.held, self.size = known, broken, held, size
        self.reads: list[int] = []
        self.gate = threading.Event()

    def refs(self, step: int, rank: int, world_size: int) -> list[Ref]:
        if world_size == 3:
            raise ConfigError("4 cannot be split over 3")
        each = 4 // world_size
        first = 4 * step + rank * each
        kind = "image" if step % 3 == 2 else "video"
        return [Ref(kind, place, f"{kind}{place % self.known}") for place in range(first, first + each)]

    def read(self, ref: Ref) -> tuple[Ref, np.ndarray]:
        if ref.position >= self.held:
            self.gate.wait(60)
        self.reads.append(ref.position)
        if ref.position == self.broken:
            raise ShardCorrupted("nine")
        return ref, np.full(self.size, ref.position, np.uint8)


def threads_of(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


@pytest.mark.parametrize("memory", [0, 250, 10**6])
@pytest.mark.parametrize("threads", [1, 3])
def test_samples_come_in_order_whatever_the_threads_and_the_memory(memory: int, threads: int) -> None:
    """Each step yields its samples in order, asked for from the start or from anywhere; nothing is left running."""
    samples = Counted()
    with Prefetch(samples, 1, 2, threads=threads, memory_bytes=memory) as ahead:
        for step in (0, 1, 5, 6, 7, 3):
            found = list(ahead.at(step))
            assert [ref for ref, _ in found] == samples.refs(step, 1, 2)
            assert all(frames is not None and frames[0] == ref.position for ref, frames in found)
    assert not threads_of("frames")


def test_what_is_read_ahead_is_bounded_by_memory() -> None:
    """Frames that wait are as many as fit, no more; and the step after is ready before it is asked for."""
    samples = Counted(size=HAND_OVER)
    with Prefetch(samples, 0, 1, threads=2, memory_bytes=8 * HAND_OVER) as ahead:
        list(ahead.at(0))
        for read in [asked.read for asked in ahead._queue]:
            if read is not None:
                read.result()
        assert sorted(samples.reads) == list(range(12))


def test_an_error_is_raised_where_its_sample_is_due() -> None:
    """Sample 9 cannot be read: steps 0 and 1 are whole, step 2 yields what comes before it."""
    with Prefetch(Counted(broken=9), 0, 1, threads=2, memory_bytes=10**4) as ahead:
        assert len(list(ahead.at(0))) == len(list(ahead.at(1))) == 4
        step = ahead.at(2)
        assert next(step)[0].position == 8
        with pytest.raises(ShardCorrupted, match="nine"):
            next(step)
        assert [ref.position for ref, _ in ahead.at(3)] == [12, 13, 14, 15]


def test_what_is_known_is_not_read() -> None:
    """What is remembered, or is being read already, comes without frames; it can still be read."""
    samples = Counted(known=3)
    remembered: set[str] = set()
    with Prefetch(samples, 0, 1, threads=1, memory_bytes=10**4, is_known=remembered.__contains__) as ahead:
        found: list[Any] = []
        for ref, frames in ahead.at(0):
            found.append(frames is None)
            remembered.add(ref.identity)
        assert found == [False, False, False, True]
        assert all(frames is None for _, frames in ahead.at(1))
        again, frames = ahead.read(samples.refs(1, 0, 1)[0])
        assert again.key == "video1" and frames[0] == 4


def test_closing_does_not_wait_for_what_was_only_asked_for() -> None:
    """Reads that have not begun are given up."""
    samples = Counted(held=1, size=HAND_OVER)
    ahead = Prefetch(samples, 0, 1, threads=1, memory_bytes=100 * HAND_OVER)
    next(ahead.at(0))
    last = ahead._queue[-1].read
    closing = threading.Thread(target=ahead.close)
    closing.start()
    while last is not None and not last.done():
        time.sleep(0.01)
    samples.gate.set()
    closing.join()
    assert samples.reads in ([0], [0, 1]) and not threads_of("frames")  # the second may have begun


def test_a_world_that_does_not_divide_the_batch_is_refused_before_anything_is_read() -> None:
    """The mistake shows when the reader is made."""
    with pytest.raises(ConfigError, match="split"):
        Prefetch(Counted(), 0, 3)
