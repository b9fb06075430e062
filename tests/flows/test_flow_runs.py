"""Runs through a real Prefect server and worker: what a retry, a cancel and a kill leave behind."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from flows.follow import FINAL
from flows.server import ROOT, Api, StackError, free_port
from vc2.miniature.config import WorldConfig
from vc2.pipeline.driver import STAGES
from vc2.pipeline.recipes import world_folder

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


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    work = tmp_path_factory.mktemp("flows-work")
    port = free_port()
    command = stack_command("serve", "--work", str(work), "--port", str(port))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VC2_")} | {"VC2_TIED": "1"}
    with open(work / "serve.log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        said = work / "serve.log"
        wait_until(lambda: "Ctrl-C" in said.read_text() or process.poll() is not None, "the stack is not up")
        assert process.poll() is None, said.read_text()
        yield Running(work, port, process)
    finally:
        process.terminate()
        process.wait(60)
    assert processes_of(work) == []


@pytest.fixture(scope="module")
def shard_parameters(running: Running) -> dict[str, Any]:
    """Two stages on a tiny world; the table of the second is not there yet."""
    world = world_folder(WorldConfig(**TINY_WORLD), running.work)
    videos = {"kind": "webvid", "table": f"{world}/webvid", "videos": f"{world}/webvid/videos", "min_yield": 0}
    images = {"kind": "laion-coco", "table": str(running.work / "not-yet"), "min_yield": 0}
    overrides = {"world": TINY_WORLD, "webvid": {"source": videos}, "laion_coco": {"source": images}}
    return {"stop_after": "shard/laion-coco", "overrides": overrides}


@pytest.fixture(scope="module")
def train_parameters(shard_parameters: dict[str, Any]) -> dict[str, Any]:
    """Training on those two; longer than any test waits."""
    overrides = shard_parameters["overrides"] | {"full": {"num_steps": 100_000}}
    return {"start_at": "train/full", "stop_after": "train/full", "overrides": overrides}


def as_option(parameters: Mapping[str, Any]) -> list[str]:
    """Parameters as `prefect deployment run` takes them."""
    return [part for name, value in parameters.items() for part in ("-p", f"{name}={json.dumps(value)}")]


# ---- what is deployed ----


def test_the_deployments_of_the_design_exist(running: Running) -> None:
    """One per stage of the DAG and the driver, each in its queue; no two trainings of a stage at once."""
    pools = {}
    for name in ("vc2/full-pipeline", *STAGES):
        found = running.api.get(f"/deployments/name/{name}")
        assert found is not None, name
        assert found["description"] and found["tags"]
        assert found["parameters"]["recipe"] == "miniature"
        limit = found["global_concurrency_limit"]
        assert (limit["limit"] if limit else None) == (1 if name.startswith("train/") else None)
        pools[name] = (found["work_pool_name"], found["work_queue_name"])
    assert pools.pop("vc2/full-pipeline") == ("vc2", "driver")
    assert set(pools.values()) == {("vc2", "stages")}


def test_the_file_of_deployments_names_no_other_place() -> None:
    """prefect.yaml holds no path of a machine."""
    text = (ROOT / "prefect.yaml").read_text()
    assert str(ROOT) not in text
    assert len(yaml.safe_load(text)["deployments"]) == len(STAGES) + 1


@pytest.mark.parametrize(
    "nonsense",
    [
        {"recipe": "minature"},
        {"repeat": -1},
        {"stop_after": "train/ful"},
        {"overrides": {"full": {"num_stepz": 3}}},
        {"overrides": {"full": {"num_steps": -3}}},
        {"overrides": {"nothing": 1}},
    ],
    ids=str,
)
def test_nonsense_is_refused_before_anything_runs(running: Running, nonsense: dict[str, Any]) -> None:
    with pytest.raises(StackError, match="refused"):
        running.submit(**nonsense)


def test_the_command_line_refuses_nonsense_in_one_line(running: Running) -> None:
    command = stack_command("demo", "--work", str(running.work.parent / "other"), "--port", str(running.port))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: port {running.port} is in use")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["up", "demo", "serve", "down"])
def test_a_work_folder_has_one_stack(running: Running, command: str) -> None:
    """Whoever comes second is told who is there, in one line."""
    done = subprocess.run(
        stack_command(command, "--work", str(running.work)), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "is in use by pid" in done.stderr


# ---- runs ----


def test_a_retry_does_only_what_is_left(running: Running, shard_parameters: dict[str, Any]) -> None:
    """Finished stages are not run again, the failed one goes on under its old id, and a new run finds all done."""
    missing = Path(shard_parameters["overrides"]["laion_coco"]["source"]["table"])
    first = running.submit(**shard_parameters)
    failed = running.ended(first)
    children = running.children(first)
    assert failed["state_type"] == "FAILED", failed["state"]
    assert str(missing) in failed["state"]["message"]
    assert "Traceback" not in running.log(first) + running.log(children["shard/laion-coco"]["id"])
    assert {name: run["state_type"] for name, run in children.items()} == {
        "shard/webvid": "COMPLETED",
        "shard/laion-coco": "FAILED",
    }

    # A stage that Prefect calls completed and the store does not have is an error.
    manifest = next(running.work.glob("store/shards/webvid/*/manifest.json"))
    hidden = manifest.rename(manifest.with_suffix(".hidden"))
    running.retry(first)
    lost = running.ended(first)
    assert lost["state_type"] == "FAILED"
    assert "no manifest" in lost["state"]["message"]
    hidden.rename(manifest)

    missing.symlink_to(next((running.work / "world").iterdir()) / "laion")
    running.retry(first)
    completed = running.ended(first)
    assert completed["state_type"] == "COMPLETED", completed["state"]
    again = running.children(first)
    assert {name: run["id"] for name, run in again.items()} == {name: run["id"] for name, run in children.items()}
    assert {name: run["run_count"] for name, run in again.items()} == {"shard/webvid": 1, "shard/laion-coco": 2}

    second = running.submit(**shard_parameters)
    assert running.ended(second)["state_type"] == "COMPLETED"
    assert running.children(second) == {}


def test_cancelling_the_driver_ends_the_ranks(running: Running, train_parameters: dict[str, Any]) -> None:
    run = running.submit(**train_parameters)
    wait_until(lambda: ranks_of(running.work) or running.run(run)["state_type"] in FINAL, "no rank started")
    assert running.run(run)["state_type"] == "RUNNING", running.run(run)["state"]
    running.api.cancel(run)
    wait_until(lambda: not ranks_of(running.work), "ranks are left", seconds=40)
    assert running.ended(run)["state_type"] == "CANCELLED"
    child = running.children(run)["train/full"]["id"]
    assert running.ended(child)["state_type"] == "CANCELLED"


def test_a_killed_stack_leaves_nothing_and_goes_on(running: Running, train_parameters: dict[str, Any]) -> None:
    """kill -9 ends server, worker, flow runs and ranks within ten seconds; the demo then finishes what they began.

    The last test of this file, since it kills the stack of all the others.
    """
    running.submit(**train_parameters)
    wait_until(lambda: ranks_of(running.work), "no rank started")
    running.process.kill()
    running.process.wait()
    wait_until(lambda: not processes_of(running.work), "processes are left", seconds=10)

    parameters = train_parameters | {"overrides": train_parameters["overrides"] | {"full": {"num_steps": 1}}}
    command = stack_command("demo", "--work", str(running.work), "--port", str(running.port), "--")
    done = subprocess.run([*command, *as_option(parameters)], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1], "manifest.json").is_file()
    assert processes_of(running.work) == []
