"""Samples of the coming steps, read and decoded in threads before they are asked for.

Threads suffice: reading, hashing and JPEG decoding leave Python's lock alone. Samples are asked for in the order in
which they will be used, as many as memory allows, and handed out in that order; what goes wrong with one is raised
where that one is due. There is no state: any step may be asked for at any time, and one that was not expected is merely
not there yet.
"""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

__all__ = ["Prefetch", "Sample", "Samples"]

MOST_AHEAD = 1024  # samples, where they take no memory
MOST_AT_ONCE = 8  # samples that are handed over together ...
HAND_OVER = 4 * 2**20  # ... and bytes


class Sample(Protocol):
    """What is known of a sample before its frames are read."""

    @property
    def kind(self) -> str:
        """video or image"""
        ...

    @property
    def position(self) -> int:
        """In the stream of its kind."""
        ...

    @property
    def key(self) -> str: ...

    @property
    def identity(self) -> Hashable:
        """What its frames are; its key alone need not tell."""
        ...

    @property
    def caption(self) -> str: ...

    @property
    def fps(self) -> Any: ...


class Samples(Protocol):
    """Samples by step: `loader.Loader`, or anything like it."""

    def refs(self, step: int, rank: int, world_size: int) -> Sequence[Any]:
        """This rank's samples of a step, all of one kind."""
        ...

    def read(self, ref: Any) -> tuple[Any, np.ndarray]:
        """The sample that serves for `ref` (itself, unless it is damaged) and its frames, uint8 (T, H, W, 3)."""
        ...


Found = tuple[Any, np.ndarray] | Exception


@dataclass(slots=True)
class _Asked:
    step: int
    ref: Any
    read: Future[list[Found]] | None = None  # None: not needed when it was asked for
    place: int = 0  # in what is read

    def result(self) -> tuple[Any, np.ndarray]:
        assert self.read is not None
        found = self.read.result()[self.place]
        if isinstance(found, Exception):
            raise found
        return found


class Prefetch:
    """This rank's samples, in order, read ahead.

    Args:
        samples: Where they come from.
        rank: Of this process.
        world_size: Ranks in all.
        threads: That read and decode.
        memory_bytes: Frames that may wait; at least one sample per thread is always under way.
        is_known: Of an identity: whether its frames are not needed, because what was made of them is remembered. What
            is being read already is not read again then.

    Raises:
        ConfigError: If the batch cannot be split over the ranks.
    """

    def __init__(
        self,
        samples: Samples,
        rank: int,
        world_size: int,
        *,
        threads: int = 4,
        memory_bytes: int = 2**29,
        is_known: Callable[[Hashable], bool] | None = None,
    ) -> None:
        samples.refs(0, rank, world_size)
        self._samples, self._rank, self._world_size = samples, rank, world_size
        self._threads, self._memory, self._is_known = threads, memory_bytes, is_known
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="frames")
        self._sizes: dict[str, int] = {}  # bytes of a sample, by kind
        self._start(0)

    def at(self, step: int) -> Iterator[tuple[Any, np.ndarray | None]]:
        """The samples of a step, in order; frames are None where they are known (or about to be).

        Those that follow are read meanwhile. Errors of reading are raised where their sample is due.
        """
        while self._queue and self._queue[0].step < step:  # left over where a step was not used up
            self._reading.discard(self._take().ref.identity)
        if (self._queue[0].step if self._queue else self._first) != step:
            self._start(step)
        while True:
            self._fill()
            if self._queue[0].step != step:
                return
            asked = self._take()
            if asked.read is None:
                yield asked.ref, None
                continue
            found, frames = asked.result()
            self._sizes[asked.ref.kind] = frames.nbytes
            self._fill()
            yield found, frames
            self._reading.discard(asked.ref.identity)  # by now it is known, or will be read again

    def read(self, ref: Any) -> tuple[Any, np.ndarray]:
        """The frames of a sample now: of one that was expected to be known and is not."""
        return self._pool.submit(self._samples.read, ref).result()

    def restart(self, step: int) -> None:
        """Forget what was read ahead, and what went wrong with it; the next samples asked for are those of `step`."""
        self._start(step)

    def close(self) -> None:
        """End the threads; what they are at is finished first."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, step: int) -> None:
        """Forget what was asked for, and begin at a step."""
        for asked in getattr(self, "_queue", ()):
            if asked.read is not None:
                asked.read.cancel()
        self._queue: deque[_Asked] = deque()  # in the order of use
        self._reading: set[Hashable] = set()  # identities
        self._reads: Counter[str] = Counter()  # by kind
        self._first, self._coming = step, self._from(step)

    def _from(self, step: int) -> Iterator[tuple[int, Any]]:
        while True:
            for ref in self._samples.refs(step, self._rank, self._world_size):
                yield step, ref
            step += 1

    def _take(self) -> _Asked:
        asked = self._queue.popleft()
        if asked.read is not None:
            self._reads[asked.ref.kind] -= 1
        return asked

    def _fill(self) -> None:
        """Ask for samples until the memory that they will take is used up; for some in any case."""
        while not self._queue or self._has_room():
            group = [_Asked(*next(self._coming)) for _ in range(self._at_once())]
            needed: list[_Asked] = []
            for asked in group:
                identity = asked.ref.identity
                if self._is_known is None or not (identity in self._reading or self._is_known(identity)):
                    asked.place = len(needed)
                    needed.append(asked)
                    self._reading.add(identity)
                    self._reads[asked.ref.kind] += 1
            if needed:
                read = self._pool.submit(self._read_all, [asked.ref for asked in needed])
                for asked in needed:
                    asked.read = read
            self._queue.extend(group)

    def _read_all(self, refs: list[Any]) -> list[Found]:
        found: list[Found] = []
        for ref in refs:
            try:
                found.append(self._samples.read(ref))
            except Exception as error:  # raised where the sample is due
                found.append(error)
        return found

    def _at_once(self) -> int:
        """Samples that a thread reads in one go: handing a small one over costs a good part of reading it."""
        largest = max(self._sizes.values(), default=HAND_OVER)
        return max(1, min(MOST_AT_ONCE, HAND_OVER // max(1, largest)))

    def _has_room(self) -> bool:
        unknown = max(self._sizes.values(), default=self._memory)
        waiting = sum(count * self._sizes.get(kind, unknown) for kind, count in self._reads.items())
        few = self._reads.total() < self._threads
        return len(self._queue) < MOST_AHEAD and (few or waiting < self._memory)
