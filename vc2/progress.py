"""How far a piece of work has come, told to whoever listens: a terminal, the Prefect UI, a log, nobody."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

__all__ = [
    "Meter",
    "Progress",
    "counted",
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


class _Lines:
    """A line at the start and the end of each piece of work, and at most every `interval` seconds between."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.last: dict[str, float] = {}
        self.first: dict[str, tuple[float, int]] = {}

    def __call__(self, work: str, done: int, total: int | None = None, **figures: float | str) -> None:
        now = time.monotonic()
        start, before = self.first.setdefault(work, (now, done))
        if total is not None and before < done < total:
            figures["eta"] = f"{(now - start) * (total - done) / (done - before):.0f} s"
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
