"""Starting ranks: where processes come from, how they end, and what is heard of them.

A *rank* reads only RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and one argument, the path or URI of its
config; so anything that sets these can start it. Two launchers are ours, behind one interface (`start`, then `poll`,
`cancel`, `tail` of the `Job`):

    local   torchrun in its own process group. Everything dies with whoever started it: the launcher and each rank ask
            the kernel to be killed when their parent ends
    ray     a Ray Job on a cluster (`vc2.ray_jobs`). It outlives whoever started it, who may come back and attach

Ranks talk to their starter through their log: a line `@progress {...}` is a progress report, `@error {...}` says what
ended a rank (`vc2.failures`). All other lines are passed on to the logger `vc2.ranks`, as many as somebody may want to
read; the log itself has them all. A rank whose partner is gone waits a moment before it ends, so that whoever has the
cause to tell is heard: a launcher ends all ranks with the first.
"""

import ctypes
import json
import logging
import math
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NoReturn

from vc2.children import exit_code, wait_for
from vc2.errors import LaunchFailed, Preempted, Vc2Error
from vc2.failures import RankError, advice, deciding, hung, killed_by, rank_error
from vc2.progress import Progress, silent

__all__ = [
    "PREEMPTED",
    "Job",
    "LocalJob",
    "Rank",
    "Unheard",
    "cpu_count",
    "die_with_parent",
    "end_rank",
    "leave",
    "rank_environment",
    "report",
    "reporting_to",
    "run_rank",
    "run_ranks",
    "say",
    "start",
    "this_rank",
    "watch",
]

log = logging.getLogger(__name__)
ranks_log = logging.getLogger("vc2.ranks")

PARENT = "VC2_PARENT"  # environment variable by which a starter tells a process its pid
RANK = "rank"  # first argument of this module where it is to run a rank
PREEMPTED = 75  # exit code of a process that was asked to stop and left a state behind (EX_TEMPFAIL)
GRACE = 20.0  # seconds between asking ranks to stop and killing them, where they have nothing to keep
MOST_LINES, WINDOW = 20, 10.0  # lines of the ranks that are passed on in so many seconds
LONGEST_LINE = 1000  # characters of it
LISTEN = 3.0  # seconds that a rank whose partner is gone waits for others to tell why


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


def say(tag: Literal["progress", "error"], said: Mapping[str, object]) -> None:
    """Tell the starter: one line, in one write, so that lines of several ranks do not mix."""
    sys.stdout.write(f"@{tag} {json.dumps(said)}\n")
    sys.stdout.flush()


_listeners: list[Progress] = []  # of a process that is both starter and rank


def report(work: str, done: int, total: int | None = None, **figures: float | str) -> None:
    """A `Progress` that tells the process which started this rank."""
    if _listeners:
        _listeners[-1](work, done, total, **figures)
    else:
        say("progress", {"work": work, "done": done, "total": total, "figures": figures})


@contextmanager
def reporting_to(progress: Progress) -> Iterator[None]:
    """Inside the block `report` tells `progress`: for a process that nobody of ours started."""
    before = list(_listeners)
    _listeners[:] = [] if progress is report else [progress]
    try:
        yield
    finally:
        _listeners[:] = before


def run_rank(main: Callable[[str], None]) -> None:
    """Entry of a rank: `main(config uri)`, tied to the life of its parent, with errors told in one line."""
    die_with_parent()
    try:
        main(sys.argv[1])
    except Exception as error:
        end_rank(error)


def end_rank(error: Exception) -> NoReturn:
    """Tell the starter what ends this rank, and end it: it must not wait for the others in an exit handler."""
    if not isinstance(error, Vc2Error):
        traceback.print_exception(error)
    told = rank_error(error, this_rank().rank)
    say("error", told.as_dict())
    if told.kind == "communication":
        time.sleep(LISTEN)
    sys.stdout.flush()
    os._exit(PREEMPTED if told.kind == "preemption" else 1)


def leave(code: int) -> int:
    """The exit code of this process. One that is among ranks ends here, at once.

    A thread of its last collective may still let go of a tensor, and needs the interpreter for that. Where it is torn
    down by then, the process aborts.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


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


class Unheard(LaunchFailed):
    """Nothing is known of ranks that may well go on: they can be come back to."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "communication")


class _Aloud:
    """Passes lines on to a logger, so many in a while, and says how many it left out."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._since, self._shown, self._left_out = -math.inf, 0, 0

    def add(self, line: str, log: str) -> None:
        self.settle(log)
        if self._shown == MOST_LINES:
            self._left_out += 1
            return
        self._shown += 1
        ranks_log.info("%s: %s", self.name, line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ...")

    def settle(self, log: str, *, is_over: bool = False) -> None:
        """Say how many lines were left out, when the while is over or nothing more will come."""
        is_over = is_over or time.monotonic() - self._since > WINDOW
        if is_over and self._left_out:
            ranks_log.info("%s: %d lines left out; all of them: %s", self.name, self._left_out, log)
        if is_over:
            self._since, self._shown, self._left_out = time.monotonic(), 0, 0


class Job(ABC):
    """Ranks that were started: poll it until it has an exit code.

    Args:
        name: For messages.
        grace: Seconds that the ranks have to leave when they are asked to.
    """

    outlives_starter = False  # whether it goes on when its starter fails, so that another may come back to it

    def __init__(self, name: str, grace: float = GRACE) -> None:
        self.name, self.grace = name, grace
        self.errors: list[RankError] = []

    @cached_property
    def _aloud(self) -> _Aloud:
        return _Aloud(self.name)

    @property
    @abstractmethod
    def log(self) -> str:
        """Where all that was said can be read."""

    @abstractmethod
    def poll(self, progress: Progress = silent) -> int | None:
        """Exit code, or None while it runs; passes on what the ranks reported since the last call."""

    @abstractmethod
    def cancel(self) -> None:
        """Ask all ranks to stop, and kill what is left after the grace time, or at once if that is interrupted. Of a
        job that has ended: tidy up."""

    @abstractmethod
    def tail(self, lines: int = 15) -> str:
        """The last lines of the log."""

    def _hear(self, lines: Iterable[str], progress: Progress, *, is_last: bool = False) -> None:
        for line in lines:
            tag, _, text = line.partition(" ")
            if tag not in ("@progress", "@error"):
                self._aloud.add(line, self.log)
                continue
            try:
                said = json.loads(text)
            except ValueError:  # cut off, or written by two at once
                continue
            if tag == "@error":
                self.errors.append(RankError.of(said))
            else:
                progress(said["work"], said["done"], said["total"], **said["figures"])
        self._aloud.settle(self.log, is_over=is_last)


class LocalJob(Job):
    """Ranks under a torchrun of this machine."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path, grace: float = GRACE) -> None:
        super().__init__(name, grace)
        self.process, self._log, self._read = process, log, 0

    @property
    def log(self) -> str:
        return str(self._log)

    def poll(self, progress: Progress = silent) -> int | None:
        code = exit_code(self.process)
        with open(self._log, "rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data if code is not None else data[: data.rfind(b"\n") + 1]  # who is cut off ends in no new line
        self._read += len(whole)
        self._hear(whole.decode(errors="replace").splitlines(), progress, is_last=code is not None)
        if code is not None:
            self._tidy_up()
        return code

    def cancel(self) -> None:
        try:
            if exit_code(self.process) is None:
                words = "%s: asked to stop; the ranks have %.0f s to leave; asked again, they end now"
                log.warning(words, self.name, self.grace)
                _signal_group(self.process.pid, signal.SIGTERM)
                wait_for(self.process, self.grace)
        finally:
            _signal_group(self.process.pid, signal.SIGKILL)  # ranks that torchrun could not end die with it
            wait_for(self.process)
            self._tidy_up()

    def _tidy_up(self) -> None:
        shutil.rmtree(_torchrun_folder(self._log), ignore_errors=True)

    def tail(self, lines: int = 15) -> str:
        return last_lines(self._log.read_text(errors="replace"), lines)


def _torchrun_folder(log: Path) -> Path:
    """What torchrun keeps for itself while its ranks run."""
    return log.with_suffix(".torchrun")


def last_lines(text: str, lines: int) -> str:
    """The end of a log, without what was reported in it."""
    return "\n".join([line for line in text.splitlines() if not line.startswith("@")][-lines:]).strip()[-4000:]


def start(
    module: str,
    config_uri: str,
    *,
    world_size: int,
    work: Path,
    name: str,
    environment: Mapping[str, str] | None = None,
    grace: float = GRACE,
) -> Job:
    """Start local ranks under torchrun. `vc2.ray_jobs` has its twin.

    Args:
        module: The ranks run `python -m module config_uri`.
        config_uri: Their one argument.
        world_size: How many.
        work: Folder of this machine for logs and caches.
        name: For messages and logs.
        environment: Variables of the ranks besides.
        grace: Seconds that they have to leave when they are asked to.
    """
    logs = work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"{name}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
    for old in logs.glob("*.torchrun"):  # of starters that were killed
        if not Path(f"/proc/{old.stem.rpartition('-')[2]}").exists():
            shutil.rmtree(old, ignore_errors=True)
    torchrun = ("--standalone", f"--nproc-per-node={world_size}", "--max-restarts=0")
    torchrun += (f"--log-dir={_torchrun_folder(path)}",)  # else a folder in /tmp that nobody removes
    torchrun += ("-m", "vc2.launch", RANK, module, config_uri)
    settings = rank_environment(world_size, work)
    settings["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(math.ceil(grace))  # torchrun's own patience, otherwise 30 s
    if sys.platform == "linux":
        settings["GLOO_SOCKET_IFNAME"] = "lo"
    with open(path, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vc2.launch", *torchrun],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **settings, **(environment or {}), PARENT: str(os.getpid())},
        )
    return LocalJob(name, process, path, grace)


def run_ranks(
    module: str, config_uri: str, *, world_size: int, work: Path, name: str, progress: Progress = silent
) -> None:
    """Start local ranks and wait for them; errors are those of `watch`."""
    environment = {"VC2_WORK": str(work.absolute())}
    watch(start(module, config_uri, world_size=world_size, work=work, name=name, environment=environment), progress)


def watch(job: Job, progress: Progress = silent, interval: float = 0.2) -> None:
    """Wait for a job; whoever is stopped while waiting stops it.

    Raises:
        LaunchFailed: With the error that the others follow from, and its kind; or the end of the log.
        Preempted: If the ranks were asked to stop and left a state to resume from.
    """
    try:
        while (code := job.poll(progress)) is None:
            time.sleep(interval)
    except Exception:
        if not job.outlives_starter:
            job.cancel()
        raise
    except BaseException as stop:  # Ctrl-C, SIGTERM, a flow that is cancelled
        job.cancel()
        job.poll(progress)
        cause = deciding(job.errors)
        if isinstance(stop, KeyboardInterrupt) and cause is not None and cause.kind == "preemption":
            raise Preempted(cause.message) from None
        raise
    if code == 0:
        return
    job.cancel()
    cause = deciding(job.errors)
    if cause is None:
        kind = "killed" if code < 0 else "code"
        raise LaunchFailed(f"{job.name}: ranks ended with exit code {code}: {job.tail()} (log: {job.log})", kind)
    if cause.kind == "preemption":
        raise Preempted(cause.message)
    where = f" on {cause.host}" if cause.host not in ("", socket.gethostname()) else ""
    more = f"; {advice(cause.kind)}" if advice(cause.kind) else ""
    raise LaunchFailed(f"{job.name}: rank {cause.rank}{where}: {cause.message}{more} (log: {job.log})", cause.kind)


def rank_environment(ranks: int, work: Path) -> dict[str, str]:
    """Settings of one of several ranks of this machine, whoever starts it."""
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cpu_count() // ranks))),
        "TORCH_EXTENSIONS_DIR": str(work / "cache" / "torch_extensions"),
        "TRITON_CACHE_DIR": str(work / "cache" / "triton"),
        "PYTHONUNBUFFERED": "1",
    }


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass


def _main() -> None:
    """Torchrun or a rank under it, tied to the life of its parent before anything slow is imported."""
    die_with_parent()
    if sys.argv[1] == RANK:
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    os.environ[PARENT] = str(os.getpid())
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(sys.argv[1:])
    except ChildFailedError as failed:
        for rank, failure in failed.failures.items():
            # It could not tell so itself. SIGTERM is how torchrun ends the others.
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                say("error", killed_by(rank, -failure.exitcode, failure.timestamp).as_dict())
            elif (said := hung(rank, failure.pid, os.environ.get("VC2_WORK"), failure.timestamp)) is not None:
                say("error", said.as_dict())
        print(failed, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    _main()
