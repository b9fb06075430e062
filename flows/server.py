"""A Prefect server and worker of our own: on loopback, with everything they write inside the work folder.

    server     Prefect's server with its UI
    files      pages and videos of the store beside it (`flows.files`), where the store is a folder
    worker     starts flow runs

    <work>/prefect/             PREFECT_HOME: the server's database
    <work>/prefect/stack.json   which processes are ours (pid and start time), their ports and store
    <work>/prefect/lock         held while somebody starts or stops them, and for the whole of a demo
    <work>/logs/prefect-*.log   what they said

This module speaks to the server by its REST interface, so that starting the stack does not cost an import of Prefect.
"""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import psutil

from flows.automations import register
from flows.tied import PARENT
from vc2.errors import Vc2Error
from vc2.ports import free_port, is_free

__all__ = ["HOST", "POOL", "QUEUES", "ROOT", "Api", "Stack", "StackError", "environment", "held_lock"]

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parent.parent
POOL = "vc2"
QUEUES = ("driver", "stages")
AT_WORK = ("RUNNING", "PENDING", "CANCELLING")  # states of a run that some process has to work on
PAGE = 200  # runs that the server tells of at a time, at most
START_LIMIT = 180.0  # seconds; a cold start on a busy machine takes 45
BUSY_LIMIT = 120.0  # seconds that a server may be too busy to answer
READ_LIMIT = 30.0  # seconds for one answer to what only reads, which is then asked again


Body = Mapping[str, Any] | Sequence[Any]  # of a request, as JSON


class StackError(Vc2Error):
    """The server or the worker cannot be started, reached or stopped."""


class Api:
    """The few calls of Prefect's REST interface that the stack needs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str) -> Any:
        """The answer, or None where there is no such thing."""
        return self._call("GET", path, None, absent=404)

    def post(self, path: str, body: Body | None = None) -> Any:
        return self._call("POST", path, body or {})

    def put(self, path: str, body: Mapping[str, Any]) -> None:
        self._call("PUT", path, body)

    def delete(self, path: str) -> None:
        self._call("DELETE", path, None)

    def create(self, path: str, body: Mapping[str, Any]) -> None:
        """Create something unless it is there."""
        self._call("POST", path, body, absent=409)

    def is_healthy(self, limit: float = READ_LIMIT) -> bool:
        """Whether the server answers within so many seconds."""
        try:
            return self._request("GET", "/health", None, limit).status_code == 200
        except httpx.HTTPError:
            return False

    def flow_runs(self, **filters: Any) -> list[dict[str, Any]]:
        """All runs that pass the filters, by id: an order that stays while runs go on."""
        found: list[dict[str, Any]] = []
        while len(found) % PAGE == 0:
            asked = {"flow_runs": filters, "sort": "ID_DESC", "limit": PAGE, "offset": len(found)}
            if not (page := self.post("/flow_runs/filter", asked)):
                break
            found += page
        return found

    def set_state(self, run: str, state: str, name: str, message: str) -> None:
        self.post(
            f"/flow_runs/{run}/set_state", {"state": {"type": state, "name": name, "message": message}, "force": True}
        )

    def cancel(self, run: str) -> None:
        state = {"type": "CANCELLING", "name": "Cancelling"}
        self.post(f"/flow_runs/{run}/set_state", {"state": state, "force": False})

    def _request(self, method: str, path: str, body: Body | None, timeout: float) -> httpx.Response:
        # A connection each: nothing to close, and on loopback no cost. Neither proxies nor certificates concern us.
        with httpx.Client(base_url=self.url, timeout=timeout, trust_env=False, verify=False) as client:
            return client.request(method, path, json=body)

    def _call(self, method: str, path: str, body: Body | None, absent: int = 0) -> Any:
        until = time.monotonic() + BUSY_LIMIT
        only_reads = method == "GET" or path.endswith("/filter")
        while True:
            try:
                answer = self._request(method, path, body, READ_LIMIT if only_reads else BUSY_LIMIT)
            except httpx.HTTPError as error:
                if only_reads and isinstance(error, httpx.TimeoutException) and time.monotonic() < until:
                    continue
                raise StackError(f"the Prefect server at {self.url} does not answer ({type(error).__name__})") from None
            if answer.status_code != 503 or time.monotonic() > until:  # its database is locked for a moment
                break
            time.sleep(0.5)
        if answer.status_code == absent:
            return None
        if answer.is_error:
            raise StackError(f"the Prefect server refused {method} {path}: {answer.status_code} {answer.text[:300]}")
        return answer.json() if answer.content else None


def environment(work: Path, store: str, port: int, *, tied: bool, files_url: str = "") -> dict[str, str]:
    """Environment of everything that talks to our server: nothing of the caller's own Prefect settings gets in.

    Args:
        files_url: Where files of the store are served; empty: nowhere.
    """
    settings = {
        "PREFECT_HOME": str(work / "prefect"),
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port},http://localhost:{port}",  # by default: anybody's
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # In memory, a restart of the server would end the runs that hold a concurrency slot.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "vc2",  # what our own modules and ranks say stands in the run's log
        "PREFECT_LOGGING_COLORS": "false",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_CLI_COLORS": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # each time the server writes, and others who write to SQLite wait
        "PREFECT_WORKER_CANCELLATION_POLL_SECONDS": "5",
        "DO_NOT_TRACK": "1",
        "VC2_WORK": str(work),
        "VC2_STORE": store,
        "VC2_STACK": str(work / "prefect"),
        "VC2_FILES_URL": files_url,
        "VC2_TIED": "1" if tied else "0",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), HOST, "localhost"])),
        "PYTHONUNBUFFERED": "1",
    }
    return {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | settings


@contextmanager
def held_lock(work: Path) -> Iterator[None]:
    """One starter, stopper or demo at a time in a work folder; the kernel gives the lock back if the holder is killed.

    Raises:
        StackError: If somebody else holds it.
    """
    folder = work / "prefect"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise StackError(f"work folder {work}: {error.strerror}; choose another with --work") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise StackError(
                f"work folder {work} is in use by {file.read().strip() or 'another process'}; "
                "wait for it, or choose another with --work"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} ({' '.join(sys.argv[1:3])})")
        file.flush()
        yield


@dataclass(frozen=True, slots=True)
class Owned:
    """A process that we started; pids are used again, start times are not."""

    pid: int
    started: float

    def process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            alive = abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if alive else None


@dataclass
class Stack:
    """The processes of a work folder."""

    work: Path
    store: str
    port: int
    tied: bool = False  #: whether all of it ends with this process
    owned: dict[str, Owned] = field(default_factory=dict)
    files_port: int = 0  #: of the file server; 0: not chosen yet

    @classmethod
    def recorded(cls, work: Path) -> "Stack | None":
        """The stack that was started in this work folder, or None; its processes may have ended since."""
        try:
            record = json.loads((work / "prefect" / "stack.json").read_text())
            owned = {name: Owned(**facts) for name, facts in record["owned"].items()}
            return cls(work, record["store"], record["port"], record["tied"], owned, record["files_port"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def api(self) -> Api:
        return Api(f"http://{HOST}:{self.port}/api")

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def files_url(self) -> str:
        """Where files of the store are served; empty for a store that is no folder: its links are signed ones."""
        return f"http://{HOST}:{self.files_port}" if self.files_port else ""

    @property
    def names(self) -> tuple[str, ...]:
        """The processes, in the order in which they start."""
        return ("server", "worker") if _is_remote(self.store) else ("server", "files", "worker")

    @property
    def environment(self) -> dict[str, str]:
        settings = environment(self.work, self.store, self.port, tied=self.tied, files_url=self.files_url)
        return settings | ({PARENT: str(os.getpid())} if self.tied else {})

    def process(self, name: str) -> psutil.Process | None:
        """A process of ours, or None if it does not run."""
        return self.owned[name].process() if name in self.owned else None

    def ended(self) -> str | None:
        """The name of a process of ours that has ended, or None if all are there."""
        return next((name for name in self.names if self.process(name) is None), None)

    def is_up(self) -> bool:
        return self.ended() is None and self.api.is_healthy()

    def start(self) -> list[str]:
        """Start what is not running: server, pool, queues, file server, deployments, automations, worker.

        Returns:
            Names of the processes that were started.

        Raises:
            StackError: If a port is taken, or a process ends early; with the end of its log.
        """
        missing = [name for name in self.names if self.process(name) is None]
        if "server" in missing:
            self._start_server()
        self._wait_for_server()
        self._prepare()
        if "files" in missing:
            self._start_files()
        # Before a worker is there that asks all the time: of two that write, SQLite makes one wait, and for long.
        self._deploy()
        if "worker" in missing:
            self._settle(self._lost_runs())
            pool = ("--pool", POOL, "--type", "process", "--name", "local", "--install-policy", "never")
            self._launch("worker", "prefect", "worker", "start", *pool)
        self._wait_for_files()
        return missing

    def stop(self, grace: float = 10.0) -> None:
        """End worker, server and whatever else they left; asked first, then killed."""
        for name in reversed(self.names):
            if process := self.process(name):
                _end([process], grace)
        _end(self._left_behind(), grace)
        (self.work / "prefect" / "stack.json").unlink(missing_ok=True)
        self.owned.clear()

    def log(self, name: str) -> Path:
        return self.work / "logs" / f"prefect-{name}.log"

    def tail(self, name: str, lines: int = 12) -> str:
        """The end of what a process said, or why there may be nothing."""
        try:
            said = self.log(name).read_text(errors="replace").splitlines()[-lines:]
        except OSError as error:
            return f"(its log cannot be read: {error.strerror})"
        return "\n".join(said) or f"(its log is empty: is there room on the disk of {self.work}?)"

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Prefect's own command line against our server."""
        command = [sys.executable, "-m", "flows.tied", "prefect", *arguments]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)

    def _launch(self, name: str, module: str, *arguments: str) -> None:
        self.log(name).parent.mkdir(parents=True, exist_ok=True)
        with open(self.log(name), "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.tied", module, *arguments],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.owned[name] = Owned(process.pid, psutil.Process(process.pid).create_time())
        self.record()

    def record(self) -> None:
        """Note which processes are ours, for whoever comes after us."""
        record = {"port": self.port, "files_port": self.files_port, "store": self.store, "tied": self.tied}
        owned = {name: {"pid": o.pid, "started": o.started} for name, o in self.owned.items()}
        place = self.work / "prefect" / "stack.json"
        place.with_suffix(".new").write_text(json.dumps(record | {"owned": owned}, indent=1))
        place.with_suffix(".new").replace(place)

    def _start_server(self) -> None:
        if not is_free(self.port):
            raise StackError(
                f"port {self.port} is in use by another program; choose another one with --port or VC2_PORT"
            )
        server = ("uvicorn", "--factory", "flows.api:create_app", "--host", HOST)
        self._launch("server", *server, "--port", str(self.port), "--log-level", "warning")

    def _start_files(self) -> None:
        """Start the file server, on the port that links name already, or on the one beside the server's."""
        if not self.files_port:
            beside = self.port + 1
            self.files_port = beside if beside < 65536 and is_free(beside) else free_port()
        elif not is_free(self.files_port):
            raise StackError(
                f"port {self.files_port}, which served the files, is in use by another program; start all anew: "
                "python -m flows.stack down, then up"
            )
        folder = self.store.removeprefix("file://")
        self._launch("files", "flows.files", "--store", folder, "--port", str(self.files_port))

    def _wait_for_server(self) -> None:
        api, until = self.api, time.monotonic() + START_LIMIT
        while not api.is_healthy(2):
            if self.process("server") is None:
                raise StackError(
                    f"the Prefect server ended at once (log: {self.log('server')}):\n{self.tail('server')}"
                )
            if time.monotonic() > until:
                raise StackError(f"the Prefect server is not up after {START_LIMIT:.0f} s (log: {self.log('server')})")
            time.sleep(0.1)

    def _wait_for_files(self) -> None:
        until = time.monotonic() + START_LIMIT
        while "files" in self.names and is_free(self.files_port):
            if self.process("files") is None or time.monotonic() > until:
                raise StackError(f"the file server is not up (log: {self.log('files')}):\n{self.tail('files')}")
            time.sleep(0.1)

    def _prepare(self) -> None:
        self.api.create("/work_pools/", {"name": POOL, "type": "process", "base_job_template": {}})
        for queue in QUEUES:
            self.api.create(f"/work_pools/{POOL}/queues", {"name": queue})

    def _lost_runs(self) -> list[dict[str, Any]]:
        """Runs that should be worked on and are not, those of stages before those that drive them.

        A run that is suspended at a gate has no process and is not lost. Nor is one that waits for its time, be it a
        stage whose driver is alive: a worker takes it. But a stack that ends with its demo takes up nothing old.
        """
        working = set(_environments("PREFECT__FLOW_RUN_ID"))
        states = [*AT_WORK, "SCHEDULED"] if self.tied else [*AT_WORK]
        found = self.api.flow_runs(state={"type": {"any_": states}})
        lost = [run for run in found if run["id"] not in working]
        return sorted(lost, key=lambda run: run["parent_task_run_id"] is None)

    def _settle(self, lost: list[dict[str, Any]]) -> None:
        """Say that nobody works on these runs any more, which also frees their concurrency slots.

        What a stack that stays was doing has crashed, and is put back to work as any crashed run is. What a demo was
        doing has ended with it.
        """
        for run in lost:
            if self.tied:
                self.api.set_state(run["id"], "CANCELLED", "Cancelled", "Left over from an earlier stack.")
            else:
                self.api.set_state(run["id"], "CRASHED", "Crashed", "The process that ran it is gone.")

    def _deploy(self) -> None:
        """Deploy prefect.yaml, unless the server already has exactly that; and the automations, which cost little."""
        stamp, wanted = self.work / "prefect" / "deployed", _deployment_digest()
        is_known = all(self.api.get(f"/deployments/name/{name}") for name in ("vc2/full-pipeline", "rescue/sweep"))
        if not is_known or not stamp.is_file() or stamp.read_text() != wanted:
            done = self.prefect("--no-prompt", "deploy", "--all")
            if done.returncode:
                raise StackError(f"prefect deploy --all failed:\n{(done.stdout + done.stderr)[-2000:]}")
            stamp.write_text(wanted)
        register(self.api)

    def _left_behind(self) -> list[psutil.Process]:
        marked = _environments("VC2_STACK", str(self.work / "prefect"))
        family = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
        return [process for process in marked.values() if process.pid not in family]


def _is_remote(store: str) -> bool:
    return "://" in store and not store.startswith("file://")


def _environments(name: str, value: str | None = None) -> Any:
    """Processes by their value of an environment variable; with `value`, those that have this one, by pid."""
    found: dict[Any, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            has = process.environ().get(name)
        except (psutil.Error, OSError):
            continue
        if has is not None and value in (None, has):
            found[has if value is None else process.pid] = process
    return found


def _end(processes: list[psutil.Process], grace: float) -> None:
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(processes, timeout=grace)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=5)


def _deployment_digest() -> str:
    """Digest of what `prefect deploy` reads: the file, the flows, and the configurations their forms are made of."""
    sha256 = hashlib.sha256(f"{ROOT} {metadata.version('prefect')} {sys.executable}".encode())
    sources = [*ROOT.glob("flows/*.py"), *ROOT.glob("vc2/**/config.py"), *ROOT.glob("vc2/pipeline/*.py")]
    for path in [ROOT / "prefect.yaml", *sorted(sources)]:
        sha256.update(path.read_bytes())
    return sha256.hexdigest()
