"""How far a piece of work has come, told to whoever listens: a terminal, the Prefect UI, a log, nobody."""

import json
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

__all__ = [
    "Meter",
    "Pace",
    "Progress",
    "counted",
    "duration_text",
    "json_progress",
    "line_progress",
    "rich_progress",
    "silent",
    "size_text",
]


class Progress(Protocol):
    """Called with the name of the work, what is done, what is to do, and figures worth showing."""

    def __call__(self, work: str, done: int, total: int | None = None, **figures: float | str) -> None: ...


def silent(work: str, done: int, total: int | None = None, **figures: float | str) -> None:
    """Tell nobody."""


WINDOW = 180.0  # seconds that a pace is taken over
STANDSTILL = ("waiting_for", "looking_for", "failed", "next_attempt_in")  # figures of work that does not go on


class Pace:
    """How long a piece of work still takes, by how fast it went in the last minutes.

    Not by how fast it went since the start: a start is slow, and what an earlier attempt had done costs nothing. The
    pace is taken anew after a step back and after a standstill, and from the first step forward on.

    Args:
        clock: Seconds, growing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: int | None = None  # what was done when it was last told
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, done: int, figures: Mapping[str, object] = {}) -> None:
        """So much is done by now."""
        now, before = self._clock(), self._known
        stands = any(name in figures for name in STANDSTILL)
        self._known = None if stands else done
        if stands or (before is not None and done < before):
            self._seen.clear()
        elif before is not None and done > before:
            self._seen.append((now, done))
        while len(self._seen) > 2 and self._seen[1][0] < now - WINDOW:
            self._seen.popleft()

    def left(self, total: int | None) -> float | None:
        """Seconds until all is done; None where that cannot be told yet."""
        if total is None or len(self._seen) < 2 or self._known is None or total <= self._known:
            return None
        (start, first), (_, last) = self._seen[0], self._seen[-1]
        # Up to now, not up to the last step: work that hangs has a pace that falls.
        return (total - last) * max(self._clock() - start, 1e-3) / (last - first)


def duration_text(seconds: float) -> str:
    """Seconds in units that suit them: 4.2 s, 48 s, 7 min, 3 h 20 min, 4 d 6 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours + (minutes >= 30), 24)
    return f"{days} d {hours} h"


class _Lines:
    """A line at the start and the end of each piece of work, and at most every `interval` seconds between."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.last: dict[str, float] = {}
        self.paces: dict[str, Pace] = {}

    def __call__(self, work: str, done: int, total: int | None = None, **figures: float | str) -> None:
        now = time.monotonic()
        pace = self.paces.setdefault(work, Pace())
        pace.add(done, figures)
        if (left := pace.left(total)) is not None:
            figures["eta"] = duration_text(left)
        if done != total and now - self.last.get(work, -1e9) < self.interval:
            return
        self.last[work] = now
        print(f"{work}: {_described(done, total, figures)}", file=sys.stderr, flush=True)


def line_progress(interval: float = 15.0) -> Progress:
    """Progress as plain lines on stderr, for logs."""
    return _Lines(interval)


def json_progress(work: str, done: int, total: int | None = None, **figures: float | str) -> None:
    """Progress as one JSON object a line on stderr, for machines."""
    line = {"time": round(time.time(), 3), "work": work, "done": done, "total": total, **figures}
    print(json.dumps(line, ensure_ascii=False), file=sys.stderr, flush=True)


@contextmanager
def rich_progress() -> Iterator[Progress]:
    """Progress as live bars where stderr is a terminal, else as plain lines."""
    if not sys.stderr.isatty():
        yield line_progress()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (SpinnerColumn(), TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
    with Bars(*columns, *times, console=Console(stderr=True)) as bars:
        tasks = {}

        def report(work: str, done: int, total: int | None = None, **figures: float | str) -> None:
            if work not in tasks:
                tasks[work] = bars.add_task(work, total=total, figures="")
            bars.update(tasks[work], completed=done, total=total, figures=_described(None, None, figures))

        yield report


def _described(done: int | None, total: int | None, figures: dict[str, float | str]) -> str:
    parts = [] if done is None else [f"{done}" if total is None else f"{done} of {total}"]
    parts += [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    ]
    return ", ".join(parts)


def counted(number: int, noun: str) -> str:
    """A number of things: 1 shard, 1,200 shards."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_text(size: float) -> str:
    """Bytes in a unit that suits them: 411 kB."""
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


class Meter:
    """Turns finished pieces of work into progress: how much a second, how many bytes, what is being rejected.

    Args:
        progress: Who is told.
        label: Name of the work.
        unit: What is counted a second.
        total: Pieces there are; None: not known before the end.
    """

    def __init__(self, progress: Progress, label: str, unit: str, total: int | None = None) -> None:
        self.progress, self.label, self.unit, self.total = progress, label, unit, total
        self.done, self.things, self.bytes = 0, 0, 0
        self.reasons: Counter[str] = Counter()
        self.started = time.monotonic()

    def found(self, done: int) -> None:
        """Pieces that were there before."""
        self.done += done
        if done:
            self.progress(self.label, self.done, self.total)

    def add(self, done: int, size: int, reasons: Mapping[str, int], things: int | None = None) -> None:
        """Pieces that were done now: how many, of how many bytes and things, what was rejected by reason."""
        self.done += done
        self.things += done if things is None else things
        self.bytes += size
        self.reasons.update(reasons)
        self._tell()

    def end(self) -> None:
        """There are no more."""
        if self.total is None:
            self.total = self.done
        self._tell()

    def _tell(self) -> None:
        seconds = max(1e-3, time.monotonic() - self.started)
        figures: dict[str, float | str] = {
            f"{self.unit}/s": round(self.things / seconds, 1),
            "MB/s": round(self.bytes / seconds / 1e6, 1),
        }
        if self.reasons:
            rejected = ", ".join(f"{name} {count}" for name, count in self.reasons.most_common(3))
            figures["rejected"] = f"{sum(self.reasons.values())} ({rejected})"
        self.progress(self.label, self.done, self.total, **figures)
