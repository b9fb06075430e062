"""What our server is told, how its processes are told from others, and a stack that stays up: started twice, with parts
of it killed, ended twice."""

import argparse
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
import yaml
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from flows import automations, server
from flows.follow import Row, _Lines
from flows.server import ROOT, Api, Owned, Stack, StackError, environment, held_lock
from flows.stack import _new
from tests.flows.stacks import TINY_WORLD, Running, processes_of, remember, wait_until
from vc2.ports import free_port
from vc2.storage import LocalStore


def test_the_callers_own_prefect_stays_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Settings of another Prefect neither reach our server nor are reached by it."""
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("PREFECT_API_URL", "https://example.org/api")
    settings = environment(tmp_path, "store", 4711, tied=True)
    assert "PREFECT_API_KEY" not in settings
    assert settings["PREFECT_API_URL"] == "http://127.0.0.1:4711/api"
    assert settings["PREFECT_HOME"].startswith(str(tmp_path))
    assert settings["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert settings["DO_NOT_TRACK"] == "1"
    assert settings["VC2_FILES_URL"] == "", "nothing is served where nobody said so"


def test_what_ranks_say_reaches_the_log_of_the_run(tmp_path: Path) -> None:
    """Prefect is given the loggers of vc2, and they let through what is no warning."""
    program = """
import logging
import flows.train
from prefect.logging.configuration import setup_logging
setup_logging()
setup_logging()
assert logging.getLogger("vc2.ranks").isEnabledFor(logging.INFO)
assert [type(handler).__name__ for handler in logging.getLogger("vc2").handlers] == ["APILogHandler"]
"""
    settings = environment(tmp_path, str(tmp_path / "store"), free_port(), tied=False)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_pid_that_was_used_again_is_not_ours() -> None:
    started = psutil.Process().create_time()
    assert Owned(os.getpid(), started).process() is not None
    assert Owned(os.getpid(), started - 100).process() is None


def test_a_lock_is_free_when_its_holder_is_done(tmp_path: Path) -> None:
    with held_lock(tmp_path):
        with pytest.raises(StackError, match=f"pid {os.getpid()}"), held_lock(tmp_path):
            pass
    with held_lock(tmp_path):
        pass


def test_nothing_is_recorded_where_nothing_ran(tmp_path: Path) -> None:
    assert Stack.recorded(tmp_path) is None


def test_a_server_that_does_not_answer_is_no_traceback(tmp_path: Path) -> None:
    stack = Stack(tmp_path, str(tmp_path / "store"), free_port())
    assert not stack.is_up()
    with pytest.raises(StackError, match="does not answer"):
        stack.api.get("/health")


@pytest.mark.parametrize(("path", "asked"), [("/flow_runs/filter", 2), ("/flow_runs/one/set_state", 1)])
def test_a_busy_server_is_asked_again_what_only_reads_and_waited_for_otherwise(
    path: str, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes something is said once: the server may have heard it."""
    heard: list[str] = []
    is_over = threading.Event()

    class Late(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(self.path)
            if len(heard) == 1:
                is_over.wait(6)
            with suppress(OSError):
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"[]")

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setattr("flows.server.READ_LIMIT", 2.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Late) as late:
        threading.Thread(target=late.serve_forever, daemon=True).start()
        api = Api(f"http://127.0.0.1:{late.server_port}")
        try:
            assert api.post(path) == []
            assert len(heard) == 1 if asked == 1 else len(heard) >= asked
            heard.clear()
            monkeypatch.setattr("flows.server.BUSY_LIMIT", 1.0)
            with pytest.raises(StackError, match="does not answer"):
                api.post(path)
        finally:
            is_over.set()
            late.shutdown()


def test_a_line_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal there is a line when a stage changes its state, not at every look."""
    show = _Lines()
    for state in ("waiting", "running", "running", "done"):
        show([Row("shard/webvid", state, seconds=3.0)], False)
    assert capsys.readouterr().err.splitlines() == ["shard/webvid: running", "shard/webvid: done in 3 s"]


def test_every_flow_run_beats_as_often_as_the_automations_expect() -> None:
    """Wherever it runs: its deployment says so, not the environment of the worker that happens to take it."""
    for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        settings = deployment["work_pool"]["job_variables"]["env"]
        assert settings["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == f"{automations.BEAT:.0f}", deployment["name"]


def test_a_stack_comes_back_from_a_reboot_where_it_was(tmp_path: Path) -> None:
    """With the store and ports that it had, and that links name, unless others are asked for; `down` forgets them."""

    def asked(store: str | None = None, port: int | None = None) -> Stack:
        return _new(argparse.Namespace(work=tmp_path, store=store, port=port), tied=False)

    before = Stack(tmp_path, "s3://bucket/prefix", 4711, files_port=4713)
    (tmp_path / "prefect").mkdir()
    before.record()
    assert asked() == before
    assert asked("/elsewhere", 5000) == replace(before, store="/elsewhere", port=5000)
    before.stop()
    assert (asked().store, asked().files_port) == (str(tmp_path / "store"), 0)


@pytest.mark.parametrize(
    ("store", "names"),
    [
        ("/data/store", ("server", "files", "worker")),
        ("file:///data/store", ("server", "files", "worker")),
        ("s3://bucket/prefix", ("server", "worker")),
    ],
)
def test_files_are_served_of_a_folder_alone(tmp_path: Path, store: str, names: tuple[str, ...]) -> None:
    """Links to a bucket are signed."""
    assert Stack(tmp_path, store, 4711).names == names


# ---- a stack that stays up ----


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """What `make stack` leaves: processes that are not tied to whoever started them."""
    work = tmp_path_factory.mktemp("stack")
    done = command(work, "up", "--port", str(free_port()))
    try:
        assert done.stdout.startswith("started: server, files, worker\n"), done.stdout + done.stderr
        stack = Stack.recorded(work)
        assert stack is not None
        remember(work)
        yield stack
    finally:
        command(work, "down")
        assert processes_of(work) == []


def command(work: Path, name: str, *more: str) -> "subprocess.CompletedProcess[str]":
    """`python -m flows.stack NAME` in a work folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VC2_")}
    arguments = [sys.executable, "-m", "flows.stack", name, "--work", str(work), *more]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def pids(stack: Stack) -> dict[str, int]:
    found = Stack.recorded(stack.work)
    assert found is not None
    return {name: owned.pid for name, owned in found.owned.items()}


def test_started_twice_it_says_what_runs_and_changes_nothing(standing: Stack) -> None:
    before, deployed = pids(standing), standing.api.get("/deployments/name/vc2/full-pipeline")
    done = command(standing.work, "up")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("running: server, files, worker\n")
    assert "started" not in done.stdout
    assert standing.url in done.stdout and standing.files_url in done.stdout
    assert pids(standing) == before
    assert standing.api.get("/deployments/name/vc2/full-pipeline")["updated"] == deployed["updated"]
    assert command(standing.work, "status").returncode == 0


def test_all_of_it_listens_on_loopback_alone(standing: Stack) -> None:
    """Whatever port a process of the stack opens, nobody outside of this machine can reach it."""
    listening = {}
    for process in processes_of(standing.work):
        with suppress(psutil.NoSuchProcess):  # a sweep comes and goes
            for one in process.net_connections():
                if one.status == psutil.CONN_LISTEN:
                    listening[one.laddr.port] = one.laddr.ip
    assert set(listening.values()) <= {"127.0.0.1", "::1"}, listening
    assert {standing.port, standing.files_port} <= set(listening)


def test_a_page_of_somebody_else_cannot_talk_to_the_server(standing: Stack) -> None:
    """Neither under its own name nor under one that it made point here."""
    with httpx.Client(base_url=standing.url, trust_env=False, timeout=60) as client:
        for path in ("/", "/api/health", "/api/admin/version"):
            assert client.get(path, headers={"Host": "evil.example"}).status_code == 400
            assert client.get(path, headers={"Host": "localhost:1234"}).status_code == 200
        for origin, allowed in (("http://evil.example", None), (standing.url, standing.url)):
            answer = client.get("/api/health", headers={"Origin": origin})
            assert answer.headers.get("access-control-allow-origin") == allowed
    for path in ("/events/in", "/events/out", "/logs/out"):  # no browser asks leave for these
        place = standing.api.url.replace("http", "ws") + path
        for origin in ("http://evil.example", "http://127.0.0.1.evil.example", "https://[", "null"):
            with pytest.raises(InvalidStatus, match="403"):
                connect(place, origin=Origin(origin), proxy=None)
        for origin in (None, Origin(standing.url), Origin("http://localhost:1234")):  # a worker, the UI, a tunnel to it
            connect(place, origin=origin, proxy=None, subprotocols=[Subprotocol("prefect")]).close()


def test_a_statement_that_is_garbage_holds_nobody_up(tmp_path: Path) -> None:
    """A thread that allocates while another waits for the right to write, which is with the first: it goes on to give
    it back. Left to itself, Python collects in that thread, and both wait until SQLite gives up."""
    program = """
import gc, sqlite3, sys, threading, time
from flows.api import collect_aside
collect_aside()
ours, theirs = (sqlite3.connect(sys.argv[1], timeout=10, isolation_level=None, check_same_thread=False) for _ in "ab")
ours.execute("PRAGMA journal_mode = WAL")
ours.execute("CREATE TABLE things (name)")
gc.collect()
cycle = [theirs.execute("SELECT 1 UNION SELECT 2")]
cycle.append(cycle)
del cycle
ours.execute("BEGIN IMMEDIATE")
said = []
def write():
    try:
        theirs.execute("INSERT INTO things VALUES (1)")
    except sqlite3.OperationalError as error:
        said.append(str(error))
waiting = threading.Thread(target=write)
waiting.start()
time.sleep(3)  # it waits, and garbage is collected every second
kept = [[] for _ in range(100_000)]
ours.execute("COMMIT")
waiting.join()
print(*said)
"""
    arguments = [sys.executable, "-c", program, str(tmp_path / "things.db")]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_an_automation_reaches_its_own_server(standing: Stack) -> None:
    """It calls the server from inside, under a name that nobody else may use."""
    api, name = standing.api, f"test.{uuid4()}"
    queue = api.post("/work_pools/vc2/queues", {"name": "aside"})["id"]
    trigger = {"type": "event", "posture": "Reactive", "expect": [name], "threshold": 1, "within": 0}
    action = {"type": "pause-work-queue", "source": "selected", "work_queue_id": queue}
    made = api.post("/automations/", {"name": name, "trigger": trigger, "actions": [action]})["id"]
    event = {"occurred": datetime.now(UTC).isoformat(), "event": name, "resource": {"prefect.resource.id": name}}

    def paused() -> bool:
        api.post("/events", [event | {"id": str(uuid4())}])
        return api.get("/work_pools/vc2/queues/aside")["is_paused"]

    wait_until(paused, "the queue is not paused", seconds=60)
    api.delete(f"/automations/{made}")
    api.delete("/work_pools/vc2/queues/aside")


def test_an_automation_that_was_deleted_comes_back(standing: Stack) -> None:
    """Though nothing has to be deployed."""

    def known() -> dict[str, str]:
        return {found["name"]: found["id"] for found in standing.api.post("/automations/filter")}

    before, deployed = known(), standing.api.get("/deployments/name/rescue/crashed")["updated"]
    standing.api.delete(f"/automations/{before['vc2: crashed']}")
    standing.start()
    assert known().keys() == before.keys() and known() != before
    assert standing.api.get("/deployments/name/rescue/crashed")["updated"] == deployed


def test_what_was_missed_is_looked_for_by_the_clock(standing: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nothing happens that an automation could wait for. Of sweeps that meet, one runs."""
    with monkeypatch.context() as patch:
        patch.setattr(automations, "SWEEP", 10.0)
        automations.register(standing.api)
    sweep = standing.api.get("/deployments/name/rescue/sweep")["id"]
    swept = {"deployment_id": {"any_": [sweep]}, "state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}
    (first, *_) = wait_until(lambda: standing.api.flow_runs(**swept), "no sweep")
    automations.register(standing.api)
    assert first["state_type"] == "COMPLETED" and first["parameters"] == {"run": ""}, first["state"]


def test_who_has_to_be_worked_on_is_lost_where_nobody_does(standing: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many. A gate waits for its answer, and a run for its time or for a worker; but nothing that was to come
    in a demo is taken up by another."""
    monkeypatch.setattr(server, "PAGE", 2)
    states = ["RUNNING", "PENDING", "CANCELLING", "PAUSED", "SCHEDULED"]
    runs = {state: planted(standing, state) for state in states}
    for tied in (False, True):
        lost = {run["id"] for run in replace(standing, tied=tied)._lost_runs()}
        assert {state for state in states if runs[state] in lost} == {*states[:3], *(["SCHEDULED"] if tied else [])}
    for run in runs.values():
        standing.api.set_state(run, "CANCELLED", "Cancelled", "")


def planted(stack: Stack, kind: str, deployment: str = "shard/webvid") -> str:
    """A run that is in this state from the beginning; one that is scheduled, in an hour."""
    later = {"state_details": {"scheduled_time": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}}
    found = stack.api.get(f"/deployments/name/{deployment}")["id"]
    asked = {"state": {"type": kind} | (later if kind == "SCHEDULED" else {})}
    return stack.api.post(f"/deployments/{found}/create_flow_run", asked)["id"]


def test_a_stage_run_by_hand_shows_what_it_made(standing: Stack) -> None:
    """Progress, statistics, rejects, pages that open, and the asset: all are there, and lead somewhere."""
    running = Running(standing.work, standing.port, None)  # type: ignore[arg-type]
    run = running.submit("shard/webvid", overrides={"world": TINY_WORLD})
    ended = running.ended(run)
    assert ended["state_type"] == "COMPLETED", ended["state"]
    asked = {"artifacts": {"flow_run_id": {"any_": [run]}}}
    shown = {item["key"]: item for item in standing.api.post("/artifacts/filter", asked) if item["key"]}
    assert {"shard-webvid", "shard-webvid-rejects", "shard-webvid-rates"} <= set(shown), set(shown)
    assert shown["shard-webvid-webvid-shards"]["data"] == 100
    assert "shards, " in shown["shard-webvid-webvid-shards"]["description"]
    for name in ("contact-sheet", "lineage"):
        link = shown[f"shard-webvid-{name}"]["data"].partition("](")[2].removesuffix(")")
        assert link.startswith(standing.files_url)
        answer = httpx.get(link, trust_env=False, timeout=60)
        assert answer.status_code == 200 and answer.text.startswith("<!doctype html>")
    assert "contact sheet" in httpx.get(standing.files_url, trust_env=False, timeout=60).text

    (prefix,) = (entry.key.rpartition("/")[0] for entry in LocalStore(standing.work / "store").list("shards/webvid/")
                 if entry.key.endswith("/manifest.json"))  # fmt: skip
    event = wait_until(lambda: events(standing, "prefect.asset.materialization"), "no asset", seconds=60)[0]
    assert event["event"] == "prefect.asset.materialization.succeeded"
    assert event["resource"]["prefect.resource.id"] == f"file://{standing.work}/store/{prefix}"
    assert event["resource"]["prefect.asset.url"].startswith(standing.files_url)
    assert event["payload"]["rows"] == TINY_WORLD["num_videos"]
    beats = events(standing, "prefect.flow-run.heartbeat")
    assert f"prefect.flow-run.{run}" in {beat["resource"]["prefect.resource.id"] for beat in beats}
    assert f"prefect.flow-run.{run}" in {related["prefect.resource.id"] for related in event["related"]}


def events(stack: Stack, prefix: str) -> list[dict[str, Any]]:
    asked = {"filter": {"event": {"prefix": [prefix]}}, "limit": 20}
    return stack.api.post("/events/filter", asked)["events"]


def test_what_was_killed_is_started_and_nothing_else(standing: Stack) -> None:
    """And runs whose process is gone are told so, but not those that wait for an approval, or for their turn."""
    kill(standing, "files", "worker")
    assert command(standing.work, "status").returncode == 1
    lost, waiting, turn = (planted(standing, kind) for kind in ("RUNNING", "PAUSED", "SCHEDULED"))
    before, files_url = pids(standing), standing.files_url
    done = command(standing.work, "up")
    assert done.stdout.startswith("running: server; started: files, worker\n"), done.stdout + done.stderr
    after = pids(standing)
    assert before["server"] == after["server"] and before["files"] != after["files"]
    assert f"files    {files_url}" in done.stdout, "links that were given still lead there"
    states = standing.api.get(f"/flow_run_states/?flow_run_id={lost}")
    assert "The process that ran it is gone." in [state["message"] for state in states]
    assert standing.api.get(f"/flow_runs/{waiting}")["state_type"] == "PAUSED"
    assert standing.api.get(f"/flow_runs/{turn}")["state_type"] == "SCHEDULED"
    for run in (lost, waiting, turn):
        standing.api.set_state(run, "CANCELLED", "Cancelled", "")

    recorded = Stack.recorded(standing.work)
    assert recorded is not None
    standing.owned = recorded.owned
    kill(standing, "server")
    done = command(standing.work, "up")
    assert done.stdout.startswith("running: files, worker; started: server\n"), done.stdout + done.stderr
    standing.owned = Stack.recorded(standing.work).owned  # type: ignore[union-attr]
    assert standing.is_up()


def kill(stack: Stack, *names: str) -> None:
    for name in names:
        process = stack.process(name)
        assert process is not None
        process.kill()
    wait_until(lambda: all(stack.process(name) is None for name in names), f"{names} are there", seconds=20)


def test_ended_twice_it_has_ended(standing: Stack) -> None:
    """The last test of this file, since it ends the stack of all the others."""
    done = command(standing.work, "down")
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
    assert processes_of(standing.work) == []
    done = command(standing.work, "down")
    assert (done.returncode, done.stdout) == (0, f"nothing runs in {standing.work}\n"), done.stderr
