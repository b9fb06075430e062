"""Follow a run of the pipeline in a terminal: one row per stage, live where there is a terminal, else plain lines.

All it knows it reads from the Prefect server: the driver's run, the runs that it started, and the artifacts that they
publish (`plan`, a table; progress artifacts; links; `result`, where the driver put what it made).
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flows.server import Api
from flows.tables import spoken

__all__ = ["Outcome", "follow"]

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
WORDS = {"SCHEDULED": "waiting", "PENDING": "starting", "COMPLETED": "done"}
LINK = re.compile(r"\[([^\]\n]+)\]\((\S+)\)")  # what a link artifact is kept as
RESCUE_PATIENCE = 90.0  # seconds that a crashed run has to be put back to work by the rescue
LINE_EVERY = 15.0  # seconds between progress lines of one stage


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    state: str
    message: str
    result: str  #: path or URI of what was made; empty unless completed
    seconds: float
    links: dict[str, str] = field(default_factory=dict)  #: what there is to look at: text -> link


@dataclass
class Row:
    """What is shown of one stage."""

    name: str
    state: str = "waiting"
    percent: float | None = None
    told: str = ""
    seconds: float = 0.0
    why: str = ""
    started: str = ""  #: time in ISO form; empty: not yet


@dataclass
class View:
    """The rows of a run, read again at every look."""

    api: Api
    run_id: str
    rows: dict[str, Row] = field(default_factory=dict)

    def look(self) -> dict[str, Any]:
        """The driver's run; the rows of its stages are brought up to date."""
        run = self.api.get(f"/flow_runs/{self.run_id}")
        children = self.api.flow_runs(parent_flow_run_id={"any_": [self.run_id]})
        progress = self._artifacts([child["id"] for child in children], "progress") if children else []
        if not self.rows:
            self._read_plan()
        for child in children:
            row = self.rows.setdefault(child["name"], Row(child["name"]))
            row.state = WORDS.get(child["state_type"]) or child["state_name"].lower()
            row.seconds = child["estimated_run_time"] or 0.0
            row.started = child["start_time"] or ""
            if child["state_type"] in ("FAILED", "CRASHED"):
                row.told = child["state"].get("message") or ""
            elif latest := next((item for item in progress if item["flow_run_id"] == child["id"]), None):
                row.percent = float(latest["data"] or 0)
                row.told = spoken(latest["description"] or "").removeprefix(f"{row.name} ")
        return run

    def in_order(self) -> list[Row]:
        """What is reused, then what was started, in that order, then what is still to come."""
        return sorted(self.rows.values(), key=lambda row: (row.state != "reused", row.started or "9"))

    def links(self) -> dict[str, str]:
        """What the driver and its stages made to be looked at: text -> link, the newest of a text."""
        children = self.api.flow_runs(parent_flow_run_id={"any_": [self.run_id]})
        found = self._artifacts([self.run_id, *(child["id"] for child in children)], kind="markdown")
        links = [LINK.fullmatch(item["data"] or "") for item in reversed(found) if item["key"] != "result"]
        return {spoken(link[1]): link[2] for link in links if link}

    def result(self) -> str:
        found = self._artifacts([self.run_id], key="result")
        return spoken(found[0]["description"] or "") if found else ""

    def _read_plan(self) -> None:
        for artifact in self._artifacts([self.run_id], key="plan")[:1]:
            for stage in json.loads(artifact["data"]):
                state = "reused" if stage["state"] == "done" else "waiting"
                self.rows[stage["stage"]] = Row(stage["stage"], state, why=spoken(stage["why"]))

    def _artifacts(self, runs: list[str], kind: str | None = None, key: str | None = None) -> list[dict[str, Any]]:
        filters: dict[str, Any] = {"flow_run_id": {"any_": runs}}
        filters |= {"type": {"any_": [kind]}} if kind else {}
        filters |= {"key": {"any_": [key]}} if key else {}
        return self.api.post("/artifacts/filter", {"artifacts": filters, "sort": "UPDATED_DESC", "limit": 50})


def follow(api: Api, run_id: str, check: Callable[[], None], interval: float = 1.0, *, ui: str = "") -> Outcome:
    """Show a run until it ends. `check` is called at every look and may raise to give up; `ui` is where Prefect's pages
    are."""
    view, started, waits = View(api, run_id), time.monotonic(), False
    crashed_since: float | None = None
    with _shown() as show:
        while True:
            check()
            run = view.look()
            ended = run["state_type"] in FINAL
            if run["state_type"] == "CRASHED":
                crashed_since = crashed_since or time.monotonic()
                ended = time.monotonic() - crashed_since > RESCUE_PATIENCE
            else:
                crashed_since = None
            show(view.in_order(), ended)
            if ended:
                break
            if (run["state_type"] == "PAUSED") != waits:
                waits = not waits
                print(_gate(run, ui) if waits else "approved, it goes on", file=sys.stderr, flush=True)
            time.sleep(interval)
    completed = run["state_type"] == "COMPLETED"
    message = run["state"].get("message") or ""
    result, links = (view.result(), view.links()) if completed else ("", {})
    return Outcome(run["state_type"], message, result, time.monotonic() - started, links)


def _gate(run: Mapping[str, Any], ui: str) -> str:
    """What to do about a run that waits for somebody."""
    message = (run["state"].get("message") or "").strip()
    place = f"{ui}/runs/flow-run/{run['id']}"
    return f"it waits for your approval{f' ({message})' if message else ''}: look at it and press Resume at {place}"


Show = Callable[[list[Row], bool], None]


@contextmanager
def _shown() -> Iterator[Show]:
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=4) as live:
        yield lambda rows, ended: live.update(_table(rows))


class _Lines:
    """A line when a stage changes its state, and now and then how far it is."""

    def __init__(self) -> None:
        self.said: dict[str, tuple[str, str, float]] = {}  # state, what was told, when

    def __call__(self, rows: list[Row], ended: bool) -> None:
        now = time.monotonic()
        for row in rows:
            state, told, last = self.said.get(row.name, ("waiting", "", now))
            is_news = row.told != told and now - last >= LINE_EVERY
            if row.state == state and not (row.state == "running" and is_news):
                continue
            self.said[row.name] = (row.state, row.told, now)
            print(f"{row.name}: {_described(row)}", file=sys.stderr, flush=True)


def _described(row: Row) -> str:
    if row.state == "running":
        return "running" if row.percent is None else f"running, {row.percent:.0f} %, {row.told}"
    if row.state == "done":
        return f"done in {row.seconds:.0f} s"
    return f"{row.state}{f' ({row.told or row.why})' if row.told or row.why else ''}"


def _table(rows: list[Row]) -> Any:
    from rich.markup import escape
    from rich.progress_bar import ProgressBar
    from rich.spinner import Spinner
    from rich.table import Table

    colours = {"done": "green", "reused": "green", "running": "yellow", "failed": "red", "crashed": "red"}
    table = Table.grid(padding=(0, 2))
    for row in rows or [Row("starting the driver", "running")]:
        percent = 100.0 if row.state in ("done", "reused") else row.percent
        bar = (
            Spinner("dots") if percent is None and row.state == "running" else ProgressBar(100, percent or 0, width=24)
        )
        colour = colours.get(row.state, "dim")
        time_taken = f"{row.seconds:.0f} s" if row.seconds else ""
        told = row.why if row.state == "reused" else row.told
        table.add_row(escape(row.name), f"[{colour}]{row.state}[/]", bar, time_taken, escape(told))
    return table
