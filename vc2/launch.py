"""Starting ranks, and the Ray session: where processes come from and how they end.

A *rank* reads only RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and one argument, the path or URI of its
config; so torchrun, Ray, Slurm or the DeepSpeed launcher can start it. Locally it is torchrun in its own process group,
and everything dies with whoever started it: the launcher and each rank ask the kernel to be killed when their parent
ends.

Ranks talk to their starter through their log: a line `@progress {...}` is a progress report, `@error {...}` the first
line of what went wrong.
"""

import ctypes
import json
import logging
import os
import runpy
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vc2.errors import LaunchFailed, Preempted, Vc2Error
from vc2.progress import Progress, silent

if TYPE_CHECKING:
    import psutil

__all__ = [
    "Job",
    "Rank",
    "cpu_count",
    "die_with_parent",
    "ray_session",
    "report",
    "run_rank",
    "run_ranks",
    "sharing_ray",
    "start",
    "this_rank",
]

PARENT = "VC2_PARENT"  # environment variable by which a starter tells a process its pid
RANK = "rank"  # first argument of this module where it is to run a rank
WARDEN = "warden"  # ... or to end what a Ray session left behind
RAY_SESSION = "VC2_RAY_SESSION"  # environment variable that marks the processes of a private Ray session
PREEMPTED = 75  # exit code of a process that was asked to stop and left a state behind (EX_TEMPFAIL)
GRACE = 20.0  # seconds between asking ranks to stop and killing them


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- the side of the rank ----


@dataclass(frozen=True, slots=True)
class Rank:
    """Place of this process among the ranks of its job."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def this_rank() -> Rank:
    """The rank of this process, from its environment; a process that nobody launched is the only rank."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, world_size, local_rank = (
        int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, 0), strict=True)
    )
    return Rank(rank, world_size, local_rank)


def report(work: str, done: int, total: int | None = None, **figures: float | str) -> None:
    """A `Progress` that tells the process which started this rank."""
    print("@progress " + json.dumps({"work": work, "done": done, "total": total, "figures": figures}), flush=True)


def run_rank(main: Callable[[str], None]) -> None:
    """Entry of a rank: `main(config uri)`, tied to the life of its parent, with errors told in one line."""
    die_with_parent()
    try:
        main(sys.argv[1])
    except Preempted as stop:
        print("@error " + json.dumps({"rank": this_rank().rank, "message": str(stop), "preempted": True}), flush=True)
        os._exit(PREEMPTED)
    except Exception as error:
        known = isinstance(error, Vc2Error)
        if not known:
            traceback.print_exc()
        message = str(error) if known else f"{type(error).__name__}: {error}"
        print("@error " + json.dumps({"rank": this_rank().rank, "message": message}), flush=True)
        sys.stdout.flush()
        os._exit(1)  # a rank that failed must not wait for the others in an exit handler


def die_with_parent() -> None:
    """Have this process killed as soon as its parent ends, however it ends.

    A parent that gave its pid in VC2_PARENT is missed even if it ended before this call.
    """
    parent = int(os.environ.pop(PARENT, os.getppid()))
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- the side of the starter ----


@dataclass
class Job:
    """Ranks that were started: poll it until it has an exit code."""

    process: subprocess.Popen[bytes]
    log: Path
    _read: int = 0
    errors: list[dict[str, object]] = field(default_factory=list)

    def poll(self, progress: Progress = silent) -> int | None:
        """Exit code, or None while it runs; passes on what the ranks reported since the last call."""
        code = self.process.poll()
        self._relay(progress)
        return code

    def cancel(self, grace: float = GRACE) -> None:
        """Ask all ranks to stop, and kill what is left after `grace` seconds."""
        if self.process.poll() is None:
            _signal_group(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(grace)
            except subprocess.TimeoutExpired:
                pass
        _signal_group(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self, lines: int = 15) -> str:
        """The last lines of the log."""
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line for line in text if not line.startswith("@"))[-4000:].strip().rsplit("\n", lines)[-1]

    def _relay(self, progress: Progress) -> None:
        with open(self.log, "rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            tag, _, text = line.partition(" ")
            if tag not in ("@progress", "@error"):
                continue
            try:
                said = json.loads(text)
            except ValueError:  # two ranks wrote at the same moment
                continue
            if tag == "@error":
                self.errors.append(said)
            else:
                progress(said["work"], said["done"], said["total"], **said["figures"])


def start(
    module: str,
    config_uri: str,
    *,
    world_size: int,
    work: Path,
    name: str,
    environment: Mapping[str, str] | None = None,
) -> Job:
    """Start `world_size` local ranks of `python -m module config_uri` under torchrun."""
    logs = work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{name}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
    torchrun = ("--standalone", f"--nproc-per-node={world_size}", "--max-restarts=0")
    torchrun += ("-m", "vc2.launch", RANK, module, config_uri)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vc2.launch", *torchrun],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **_rank_environment(world_size, work), **(environment or {}), PARENT: str(os.getpid())},
        )
    return Job(process, log)


def run_ranks(
    module: str, config_uri: str, *, world_size: int, work: Path, name: str, progress: Progress = silent
) -> None:
    """Start local ranks and wait for them.

    Raises:
        LaunchFailed: With the first error that a rank told, or the end of the log.
        Preempted: If the ranks were asked to stop and left a state to resume from.
    """
    job = start(module, config_uri, world_size=world_size, work=work, name=name)
    try:
        while (code := job.poll(progress)) is None:
            time.sleep(0.2)
    except BaseException:
        job.cancel()
        raise
    if code == 0:
        return
    _signal_group(job.process.pid, signal.SIGKILL)  # ranks that torchrun could not end
    if job.errors and job.errors[0].get("preempted"):
        raise Preempted(str(job.errors[0]["message"]))
    if job.errors:
        first = job.errors[0]
        raise LaunchFailed(f"{name}: rank {first['rank']}: {first['message']} (log: {job.log})")
    raise LaunchFailed(f"{name}: ranks ended with exit code {code}: {job.tail()} (log: {job.log})")


def _rank_environment(world_size: int, work: Path) -> dict[str, str]:
    settings = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cpu_count() // world_size))),
        "TORCH_EXTENSIONS_DIR": str(work / "cache" / "torch_extensions"),
        "TRITON_CACHE_DIR": str(work / "cache" / "triton"),
        "PYTHONUNBUFFERED": "1",
    }
    if sys.platform == "linux":
        settings["GLOO_SOCKET_IFNAME"] = "lo"
    return settings


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass


# ---- Ray ----

RAY_STARTS = 3  # attempts: on a very busy machine its first 30 seconds may not be enough
RAY_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}


@contextmanager
def ray_session(num_cpus: int | None = None) -> Iterator[str]:
    """Ray, connected: the cluster of RAY_ADDRESS where one is given, else a private one on loopback.

    Yields the address by which other processes of this machine reach it (they also need RAY_AUTH_MODE and
    RAY_AUTH_TOKEN_PATH from this process's environment). A private session ends with the block; its files lie in a
    temporary folder (Ray's socket paths must be short), removed at the end, or by the next session after a kill.
    """
    if "ray" in sys.modules and (address := _connected()):
        yield address
        return
    folder = None if os.environ.get("RAY_ADDRESS") else _ray_folder()
    address = os.environ.get("RAY_ADDRESS", "")
    settings = dict(RAY_SETTINGS)
    if folder:
        token = folder / "token"
        token.write_text(_ray_token())
        token.chmod(0o600)
        # A private session is there to work: its workers get the priority of their starter, not a low one.
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_worker_niceness": "0"}
        # And its head is not coming back: whoever loses it ends soon, rather than asking for a minute.
        settings["RAY_gcs_rpc_server_reconnect_timeout_s"] = "5"
    if folder or address.startswith("127.0.0.1:"):
        # Read when Ray is first imported. Ray's name for it is misleading: it means "this machine alone, on loopback".
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    handler, warden = signal.getsignal(signal.SIGTERM), None
    with _environment(settings):
        import ray

        try:
            if folder is None:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                with _environment({RAY_SESSION: str(folder)}):
                    warden = _start_warden(folder)
                    _start_ray(folder, num_cpus or cpu_count())
            if handler is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray takes it over and would abort this process
            yield ray.get_runtime_context().gcs_address
        finally:
            ray.shutdown()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            if warden is not None:
                warden.wait()  # it ends what is left, and itself, as soon as the folder is gone


@cache
def _ray_token() -> str:
    """Who knows it may use the sessions of this process. One for all: Ray reads it once and keeps it."""
    return secrets.token_hex(32)


def _connected() -> str | None:
    """Address of the Ray that this process is connected to already."""
    import ray

    return ray.get_runtime_context().gcs_address if ray.is_initialized() else None


def _start_ray(folder: Path, num_cpus: int) -> None:
    import ray

    for attempt in range(RAY_STARTS):
        try:
            ray.init(
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
                num_cpus=num_cpus,
                object_store_memory=256 * 2**20,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:  # Ray raises plain exceptions here, mostly for having waited 30 s in vain
            ray.shutdown()
            if attempt == RAY_STARTS - 1:
                raise LaunchFailed(
                    f"Ray did not start on this machine ({str(error).splitlines()[0]}); is it very busy, or "
                    f"{folder.parent} full? Its logs: {folder}"
                ) from error


def _start_warden(folder: Path) -> subprocess.Popen[bytes]:
    """A process that outlives this one just long enough to end its Ray: some of Ray's agents would stay for ever."""
    settings = {name: value for name, value in os.environ.items() if name != RAY_SESSION}
    return subprocess.Popen(
        [sys.executable, "-m", "vc2.launch", WARDEN, str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**settings, PARENT: str(os.getpid())},
    )


def _keep_watch(folder: Path) -> None:
    """Wait until the owner of a Ray session ends or the session is over; then see that nothing of it is left."""
    import psutil

    owner = psutil.Process(int(os.environ[PARENT]))
    family: set[psutil.Process] = set()
    while os.getppid() == owner.pid and folder.exists():
        try:
            for child in owner.children():
                if child not in family and child.environ().get(RAY_SESSION) == str(folder):
                    family.add(child)
        except psutil.Error:
            pass
        family |= {process for known in list(family) for process in _children(known)}
        time.sleep(0.5)
    for process in family:
        if process.is_running():
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _children(process: "psutil.Process") -> "list[psutil.Process]":
    import psutil

    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


@contextmanager
def sharing_ray(address: str) -> Iterator[None]:
    """Processes started inside the block connect to the Ray at `address`."""
    with _environment({"RAY_ADDRESS": address}):
        yield


def _ray_folder() -> Path:
    root = Path(tempfile.gettempdir())
    for old in root.glob("vc2-ray-*-*"):
        owner = int(old.name.split("-")[2])
        if not Path(f"/proc/{owner}").exists():
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"vc2-ray-{os.getpid()}-", dir=root))


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _main() -> None:
    """Torchrun or a rank under it, tied to the life of its parent before anything slow is imported; or a warden."""
    if sys.argv[1] == WARDEN:
        _keep_watch(Path(sys.argv[2]))
        return
    die_with_parent()
    if sys.argv[1] == RANK:
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    os.environ[PARENT] = str(os.getpid())
    from torch.distributed.run import main

    main(sys.argv[1:])


if __name__ == "__main__":
    _main()
