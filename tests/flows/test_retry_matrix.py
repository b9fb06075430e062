"""Whatever fails, is killed, cancelled or lost: no finished stage runs twice, and no failed one is skipped.

One story on one stack whose processes outlive each other, told by the tests in their order. What was done is not asked
of Prefect: a finished stage was left alone if no file of its artifact, its parts or its attempts has changed; how often
training began is the number of attempts in the store.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.server import ROOT, Stack
from flows.supervise import AWAY
from tests.flows.stacks import TINY_WORLD, Running, as_option, furnish, processes_of, ranks_of, wait_until
from vc2.miniature.config import WorldConfig
from vc2.pipeline.recipes import world_folder
from vc2.ports import free_port

SETTLED = ("COMPLETED", "FAILED", "CANCELLED")  # a crashed run goes on by itself


def stack(work: Path, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VC2_")}
    environment |= {"VC2_RESCUE_SECONDS": "1"}
    command = [sys.executable, "-m", "flows.stack", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1200)


def up(work: Path, port: int) -> None:
    done = stack(work, "up", "--work", str(work), "--port", str(port))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A stack that is left up, so that its parts can be killed one by one."""
    work, port = tmp_path_factory.mktemp("matrix"), free_port()
    furnish(work)
    try:
        up(work, port)
        yield Running(work, port, None)  # pyright: ignore[reportArgumentType]
    finally:
        stack(work, "down", "--work", str(work))
    assert processes_of(work) == []


@pytest.fixture(scope="module")
def shards(running: Running) -> dict[str, Any]:
    """Two stages on a tiny world; the table of the second is not there yet."""
    world = world_folder(WorldConfig(**TINY_WORLD), running.work)
    videos = {"kind": "webvid", "table": f"{world}/webvid", "videos": f"{world}/webvid/videos", "min_yield": 0}
    images = {"kind": "laion-coco", "table": str(running.work / "not-yet"), "min_yield": 0}
    overrides = {"world": TINY_WORLD, "webvid": {"source": videos}, "laion_coco": {"source": images}}
    return {"stop_after": "shard/laion-coco", "overrides": overrides, "preflight": False}


@pytest.fixture(scope="module")
def training(shards: dict[str, Any]) -> dict[str, Any]:
    """Training on those two; longer than any test waits."""
    overrides = shards["overrides"] | {"full": {"num_steps": 100_000, "state_every_seconds": 1}}
    return {"start_at": "train/full", "stop_after": "train/full", "overrides": overrides, "preflight": False}


def settled(running: Running, run_id: str) -> Mapping[str, Any]:
    return wait_until(lambda: (run := running.run(run_id))["state_type"] in SETTLED and run, f"{run_id} goes on")


def state(running: Running, run_id: str) -> str:
    return str(running.run(run_id)["state_type"])


def made(running: Running, folder: str) -> dict[str, int]:
    """Files below a folder of the store, and when each was written."""
    files = (running.work / "store" / folder).rglob("*")
    return {str(path): path.stat().st_mtime_ns for path in files if path.is_file()}


def attempts(running: Running) -> int:
    return len([*(running.work / "store/runs/full").glob("*/attempts/*.json")])


def process_of(running: Running, run_id: str) -> psutil.Process:
    """The process that works on a flow run."""
    found = []
    for one in processes_of(running.work):
        with contextlib.suppress(psutil.NoSuchProcess):
            if one.environ().get("PREFECT__FLOW_RUN_ID") == run_id and "prefect.engine" in one.cmdline():
                found.append(one)
    return min(found, key=lambda one: one.create_time())


def trains(running: Running, run_id: str, more_than: int = 0) -> str:
    """The run of train/full as soon as its ranks work in a new attempt."""
    wait_until(
        lambda: (attempts(running) > more_than and ranks_of(running.work)) or state(running, run_id) in SETTLED,
        "no rank started",
    )
    assert state(running, run_id) not in SETTLED, running.run(run_id)["state"]
    return str(running.children(run_id)["train/full"]["id"])


# ---- shards: failures, and the ways that meet ----


def test_of_two_runs_of_the_same_stage_one_works(running: Running, shards: dict[str, Any]) -> None:
    """The other waits for it and then finds it made: of what the first one wrote nothing changes."""
    twins = [running.submit("shard/webvid", overrides=shards["overrides"], fresh=True) for _ in range(2)]
    wait_until(lambda: any(state(running, run) in SETTLED for run in twins), "neither has ended")
    first = made(running, "shards/webvid")
    assert first
    assert [settled(running, run)["state_type"] for run in twins] == ["COMPLETED", "COMPLETED"]
    assert made(running, "shards/webvid") == first
    waited = ["waiting for it" in running.log(run) for run in twins]
    assert waited.count(True) <= 1


def test_a_failed_stage_is_made_by_the_next_retry_of_any_kind(running: Running, shards: dict[str, Any]) -> None:
    """Retry on the stage, then Retry on the driver: each goes on under its old id; what was done stays as it was."""
    missing = Path(shards["overrides"]["laion_coco"]["source"]["table"])
    driver = running.submit(**shards)
    failed = settled(running, driver)
    assert failed["state_type"] == "FAILED", failed["state"]
    assert str(missing) in failed["state"]["message"]
    children = running.children(driver)
    assert set(children) == {"shard/laion-coco"}  # the other was found in the store
    child = children["shard/laion-coco"]["id"]
    assert "Traceback" not in running.log(driver) + running.log(child)
    videos = made(running, "shards/webvid")

    running.retry(driver)  # the cause is still there
    wait_until(lambda: running.run(child)["run_count"] == 2, "the stage was not tried again")
    assert settled(running, driver)["state_type"] == "FAILED"

    missing.symlink_to(next((running.work / "world").iterdir()) / "laion")
    running.retry(child)
    wait_until(lambda: running.run(child)["run_count"] == 3, "the stage was not tried again")
    assert settled(running, child)["state_type"] == "COMPLETED"
    images = made(running, "shards/laion-coco")
    running.retry(driver)
    wait_until(lambda: running.run(driver)["run_count"] == 3, "the driver was not tried again")
    assert settled(running, driver)["state_type"] == "COMPLETED"
    assert {name: (run["id"], run["run_count"]) for name, run in running.children(driver).items()} == {
        "shard/laion-coco": (child, 3)
    }
    assert made(running, "shards/webvid") == videos
    assert made(running, "shards/laion-coco") == images


def test_a_run_by_hand_a_new_run_and_the_command_line_find_all_done(running: Running, shards: dict[str, Any]) -> None:
    before = made(running, "shards")
    by_hand = running.submit("shard/webvid", overrides=shards["overrides"])
    new = running.submit(**shards)
    assert settled(running, by_hand)["state_type"] == "COMPLETED"
    assert settled(running, new)["state_type"] == "COMPLETED"
    assert running.children(new) == {}
    assert made(running, "shards") == before


def test_completed_in_prefect_and_gone_from_the_store_is_an_error(running: Running, shards: dict[str, Any]) -> None:
    """The run that Prefect calls completed is not believed."""
    (driver,) = [
        run["id"]
        for run in running.api.flow_runs(state={"type": {"any_": ["COMPLETED"]}})
        if run["parameters"].get("stop_after") and running.children(run["id"])
    ]
    manifest = next(running.work.glob("store/shards/laion-coco/*/manifest.json"))
    hidden = manifest.rename(manifest.with_suffix(".hidden"))
    running.api.set_state(driver, "FAILED", "Failed", "as if it had been lost in the meantime")
    running.retry(driver)
    wait_until(lambda: running.run(driver)["run_count"] == 4, "the driver was not tried again")
    lost = settled(running, driver)
    hidden.rename(manifest)
    assert lost["state_type"] == "FAILED"
    assert "no manifest" in lost["state"]["message"]


# ---- training: kills, a restart, a cancel ----


@pytest.fixture(scope="module")
def driver(running: Running, training: dict[str, Any]) -> str:
    """A driver whose training stage is at work."""
    run_id = running.submit(**training)
    trains(running, run_id)
    return run_id


def test_a_killed_stage_goes_on_in_place(running: Running, driver: str) -> None:
    """kill -9 of its flow run: its ranks end with it, and the driver puts it back to work under its old id."""
    child = trains(running, driver)
    ranks = ranks_of(running.work)
    process_of(running, child).kill()
    wait_until(lambda: not any(rank.is_running() for rank in ranks), "orphans are left")
    assert trains(running, driver, more_than=1) == child
    assert running.run(child)["run_count"] == 2
    assert state(running, driver) == "RUNNING"


def test_a_killed_driver_comes_back_to_what_still_runs(running: Running, driver: str) -> None:
    """kill -9 of the driver: its stage does not notice, and the automation puts the driver back to work."""
    child, count = trains(running, driver), attempts(running)
    ranks = {rank.pid for rank in ranks_of(running.work)}
    process_of(running, driver).kill()
    wait_until(lambda: running.run(driver)["run_count"] == 2, "nobody put the driver back to work")
    wait_until(lambda: state(running, driver) == "RUNNING", "the driver does not run")
    assert {rank.pid for rank in ranks_of(running.work)} == ranks
    assert (attempts(running), running.run(child)["run_count"]) == (count, 2)


def alive_again(running: Running) -> set[str]:
    """Runs that told a server which came back that they are there."""
    asked = {"filter": {"event": {"prefix": ["prefect.flow-run.heartbeat"]}}, "limit": 50}
    beats = running.api.post("/events/filter", asked)["events"]
    return {one["resource"]["prefect.resource.id"].rpartition(".")[2] for one in beats if one["payload"]}


def test_a_restart_of_the_server_disturbs_nothing(running: Running, driver: str) -> None:
    """kill -9 of the server in mid-stage, and a new one on the same database: it hears at once who is alive."""
    ranks = {rank.pid for rank in ranks_of(running.work)}
    end(running, "server")
    time.sleep(AWAY)
    up(running.work, running.port)
    wait_until(lambda: alive_again(running) >= {driver, trains(running, driver)}, "a run did not beat")
    assert {rank.pid for rank in ranks_of(running.work)} == ranks
    assert state(running, driver) == "RUNNING"


def test_a_run_that_lost_its_worker_can_be_cancelled(running: Running, driver: str) -> None:
    """kill -9 of the worker: flow runs go on; a new one knows nothing of them, so they see to it themselves."""
    child = trains(running, driver)
    ranks = ranks_of(running.work)
    end(running, "worker")
    up(running.work, running.port)
    assert all(rank.is_running() for rank in ranks)
    running.api.cancel(driver)
    wait_until(lambda: not ranks_of(running.work), "ranks are left")
    assert settled(running, driver)["state_type"] == "CANCELLED"
    assert settled(running, child)["state_type"] == "CANCELLED"


def test_a_cancelled_run_goes_on_when_it_is_retried(running: Running, driver: str) -> None:
    """And cancelling it once more, with a worker that knows it, ends its ranks."""
    count = attempts(running)
    running.retry(driver)
    child = trains(running, driver, more_than=count)
    assert running.run(child)["run_count"] == 3
    running.api.cancel(driver)
    wait_until(lambda: not ranks_of(running.work), "ranks are left")
    assert settled(running, driver)["state_type"] == "CANCELLED"


@pytest.mark.timeout(1500)
def test_a_lost_database_loses_nothing(running: Running, training: dict[str, Any]) -> None:
    """On a server that knows of nothing, finished stages are found and training goes on from its newest state.

    The last test of this file, since it ends the stack of all the others.
    """
    shards_before, count = made(running, "shards"), attempts(running)
    assert stack(running.work, "down", "--work", str(running.work)).returncode == 0
    for path in (running.work / "prefect").glob("*.db*"):
        path.unlink()
    states = (running.work / "store/runs/full").glob("*/states/*/*/manifest.json")
    short = training["overrides"] | {"full": {"num_steps": 2 + max(int(path.parent.name) for path in states)}}
    parameters = training | {"overrides": short, "start_at": None}
    done = stack(
        running.work,
        "demo",
        *("--work", str(running.work), "--port", str(running.port), "--"),
        *as_option({name: value for name, value in parameters.items() if value is not None}),
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1], "manifest.json").is_file()
    assert shards_before.items() <= made(running, "shards").items(), "the third set was never asked for until now"
    assert attempts(running) <= count + 1
    assert processes_of(running.work) == []


def end(running: Running, name: str) -> None:
    """kill -9 of a process of the stack."""
    recorded = Stack.recorded(running.work)
    assert recorded is not None
    process = recorded.owned[name].process()
    assert process is not None
    process.send_signal(signal.SIGKILL)
    process.wait(30)
