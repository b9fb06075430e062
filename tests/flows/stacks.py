"""A Prefect server and worker that tests run the pipeline through, and what they ask of it."""

import atexit
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.follow import FINAL
from flows.server import ROOT, Api
from vc2.ports import free_port

__all__ = [
    "TINY_WORLD",
    "Running",
    "as_option",
    "furnish",
    "processes_of",
    "ranks_of",
    "remember",
    "serving",
    "stack_command",
    "wait_until",
]

TINY_WORLD = {"num_videos": 16, "num_web_images": 24, "num_jdb_images": 16, "num_prompts": 2}


def wait_until(claim: Callable[[], Any], what: str, seconds: float = 240.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := claim()):
        if time.monotonic() > until:
            pytest.fail(f"after {seconds:.0f} s: {what}")
        time.sleep(0.25)
    return found


def stack_command(*arguments: str) -> list[str]:
    """The stack's command line, tied to this process."""
    return [sys.executable, "-m", "flows.tied", "flows.stack", *arguments]


def processes_of(work: Path) -> list[psutil.Process]:
    """Everything that a stack in this work folder started, and that still runs."""
    found = []
    for process in psutil.process_iter():
        try:
            marked = process.environ().get("VC2_STACK") == str(work / "prefect")
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def ranks_of(work: Path) -> list[psutil.Process]:
    """Ranks of a trainer among them."""
    found = []
    for process in processes_of(work):
        try:
            if "LOCAL_RANK" in process.environ():
                found.append(process)
        except psutil.Error:
            continue
    return found


@dataclass
class Running:
    """A stack that is up, and what the tests ask of it."""

    work: Path
    port: int
    process: "subprocess.Popen[bytes]"

    @property
    def api(self) -> Api:
        return Api(f"http://127.0.0.1:{self.port}/api")

    def submit(self, deployment: str = "vc2/full-pipeline", **parameters: Any) -> str:
        """Submit a run as the UI does; its id."""
        found = self.api.get(f"/deployments/name/{deployment}")
        return self.api.post(f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})["id"]

    def run(self, run_id: str) -> Mapping[str, Any]:
        return self.api.get(f"/flow_runs/{run_id}")

    def ended(self, run_id: str) -> Mapping[str, Any]:
        """A run as soon as it has ended."""
        return wait_until(lambda: (run := self.run(run_id))["state_type"] in FINAL and run, f"run {run_id} not ended")

    def retry(self, run_id: str) -> None:
        """What the Retry button of the UI does."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry"}
        self.api.post(f"/flow_runs/{run_id}/set_state", {"state": state, "force": False})

    def children(self, run_id: str) -> dict[str, Mapping[str, Any]]:
        """The runs of the stages that a driver started, by name; each stage has one at most."""
        runs = self.api.flow_runs(parent_flow_run_id={"any_": [run_id]})
        assert len({run["name"] for run in runs}) == len(runs), "a stage was started twice"
        return {run["name"]: run for run in runs}

    def log(self, run_id: str) -> str:
        found = self.api.post("/logs/filter", {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": 200})
        return "\n".join(entry["message"] for entry in found)


def as_option(parameters: Mapping[str, Any]) -> list[str]:
    """Parameters as `prefect deployment run` takes them."""
    return [part for name, value in parameters.items() for part in ("-p", f"{name}={json.dumps(value)}")]


_remembered: list[Path] = []  # what was kept of a stack that had just come up: its database, and what it had deployed


def remember(work: Path) -> None:
    """Keep the database of a stack that has just come up, for those that come after it."""
    kept = Path(tempfile.mkdtemp(prefix="vc2-stack-"))
    atexit.register(shutil.rmtree, kept, ignore_errors=True)
    with closing(sqlite3.connect(work / "prefect/prefect.db")) as source, closing(sqlite3.connect(kept / "db")) as copy:
        source.backup(copy)
    shutil.copy(work / "prefect/deployed", kept / "deployed")
    _remembered[:] = [kept]


def furnish(work: Path) -> None:
    """A stack in this work folder starts with a database that somebody has deployed to, if there is one: sooner."""
    for kept in _remembered:
        (work / "prefect").mkdir(parents=True)
        shutil.copy(kept / "db", work / "prefect/prefect.db")
        shutil.copy(kept / "deployed", work / "prefect/deployed")


@contextmanager
def serving(work: Path, *options: str, **variables: str) -> Iterator[Running]:
    """A stack tied to this process while the block runs, with `variables` in its environment; nothing of it is left."""
    port = free_port()
    furnish(work)
    command = stack_command("serve", "--work", str(work), "--port", str(port), *options)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VC2_")} | {"VC2_TIED": "1"} | variables
    with open(work / "serve.log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        said = work / "serve.log"
        wait_until(lambda: "Ctrl-C" in said.read_text() or process.poll() is not None, "the stack is not up", 600)
        assert process.poll() is None, said.read_text()
        if not _remembered:
            remember(work)
        yield Running(work, port, process)
    finally:
        process.terminate()
        process.wait(180)
    assert processes_of(work) == []
