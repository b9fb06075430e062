"""How far a piece of work has come, told to whoever listens: a terminal, the Prefect UI, a log, nobody."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Progress", "line_progress", "rich_progress", "silent"]


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

    def __call__(self, work: str, done: int, total: int | None = None, **figures: float | str) -> None:
        now = time.monotonic()
        if done != total and now - self.last.get(work, -1e9) < self.interval:
            return
        self.last[work] = now
        print(f"{work}: {_described(done, total, figures)}", file=sys.stderr, flush=True)


def line_progress(interval: float = 15.0) -> Progress:
    """Progress as plain lines on stderr, for logs."""
    return _Lines(interval)


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
