"""Where the time of a run goes: laps between two lines of metrics, and the attempt as a whole."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Clock"]


class Clock:
    """Seconds by part of the work. What is in no part is the training itself: forward, backward, step."""

    def __init__(self) -> None:
        self._born = self._saved = self._lap = time.perf_counter()
        self._parts: dict[str, float] = {}
        self._useful = 0.0

    def start(self) -> None:
        """The first step begins; what was before (loading, resuming) is no lap but counts against goodput."""
        self._saved = self._lap = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What a `with` block takes belongs to this part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - began

    def saved(self) -> None:
        """A state was taken just now."""
        self._saved = time.perf_counter()

    def since_save(self) -> float:
        """Seconds since the last state, or since the start."""
        return time.perf_counter() - self._saved

    def lap(self) -> dict[str, float]:
        """Figures since the last lap: `seconds`, the share of each part, `goodput` of the attempt so far.

        Goodput is the share of all seconds since the process began that went into training itself.
        """
        now = time.perf_counter()
        seconds = now - self._lap
        self._useful += seconds - sum(self._parts.values())
        shares = {name: self._parts.get(name, 0.0) / seconds for name in ("data_wait", "state_stall", "validation")}
        self._lap, self._parts = now, {}
        return {"seconds": seconds, **shares, "goodput": self._useful / (now - self._born)}
