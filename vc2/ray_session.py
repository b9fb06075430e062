"""Ray, held by a process of its own: whoever spreads work over it needs no Ray inside, and outlives it.

Ray ends a process that is connected to it when its head is lost: it aborts, without a word. So nobody of ours connects.
A *holder* does, a child that is told by lines on its standard input what to spread, and tells by lines on its standard
output what came of it. When Ray is lost the holder ends, and its starter says so.

    starter   `ray_session()`, `HeldSession.spread`          any process: a command, a flow, a Ray Job
    holder    `python -m vc2.ray_session hold`               connected to Ray; ends when its starter does
    Ray       the cluster of RAY_ADDRESS, or a private one on loopback, started by the holder
    warden    `python -m vc2.ray_session warden FOLDER`      of a private one: outlives the holder just long enough to
                                                             end what Ray started, some of which would stay for ever
"""

import importlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, NoReturn, Self

from vc2 import errors
from vc2.children import exit_code, wait_for
from vc2.errors import LaunchFailed, Vc2Error, first_line
from vc2.launch import PARENT, cpu_count

if TYPE_CHECKING:
    import psutil

__all__ = ["HeldSession", "keeping_ray", "ray_session"]

RAY_SESSION = "VC2_RAY_SESSION"  # environment variable that marks the processes of a private Ray session
RAY_STARTS = 3  # attempts: on a very busy machine its first 30 seconds may not be enough
LOOPBACK = "127.0.0.1"
PATIENCE = 30.0  # seconds for a holder and its warden to end
OURS = 0.5  # seconds between two looks at the processes of a private session


class HeldSession:
    """A Ray session in a process of its own: of the cluster that RAY_ADDRESS names, else a private one on loopback.

    It ends with this process, however that ends, and a private one with all that Ray started. One thread at a time may
    use it.

    Args:
        num_cpus: Of a private session; None: as many as this process may use.
    """

    def __init__(self, num_cpus: int | None = None) -> None:
        self._num_cpus = num_cpus or cpu_count()
        self._holder: subprocess.Popen[bytes] | None = None
        self._words: IO[bytes] | None = None
        self._asked = 0
        self._folder = ""  # of a private session
        self.environment: Mapping[str, str] = {}  #: by which other processes of this machine connect to it

    @property
    def address(self) -> str:
        return self.environment["RAY_ADDRESS"]

    @property
    def is_private(self) -> bool:
        return bool(self._folder)

    def start(self) -> Mapping[str, str]:
        """Start it; returns `environment`.

        Raises:
            LaunchFailed: If Ray does not start, or does not answer at RAY_ADDRESS.
        """
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - what Ray prints: long, and of no use to whoever reads a log
        self._holder = subprocess.Popen(
            [sys.executable, "-m", "vc2.ray_session", "hold", str(self._num_cpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            start_new_session=True,  # a Ctrl-C is for the starter
        )
        said = self._heard()
        self.environment, self._folder = said["ready"], said["folder"]
        return self.environment

    def is_alive(self) -> bool:
        """Whether it can be used: its holder is there, and the head of Ray answers."""
        if self._holder is None or exit_code(self._holder) is not None or not self.environment:
            return False
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
        except OSError:
            return False
        return True

    def spread(self, function: str, items: list[Any], workers: int | None = None) -> Iterator[Any]:
        """Call a function for each item somewhere on the cluster, an item at a time; results as they come.

        Args:
            function: `module:name`; takes an item and returns a result, both plain JSON values.
            items: One for each call.
            workers: Calls at a time; None: as many as there are cores.

        Raises:
            Vc2Error: What a call raised.
            LaunchFailed: If Ray is lost; of kind communication.
            RuntimeError: If a call failed otherwise, with its traceback.
        """
        if not items:
            return
        self._asked += 1
        asked = self._asked
        self._say({"asked": asked, "function": function, "items": items, "workers": workers})
        is_over = False
        try:
            while True:
                said = self._heard()
                if said.get("asked") != asked:
                    continue  # of a question whose answers nobody waits for any more
                is_over = "is_over" in said or "error" in said
                if "is_over" in said:
                    return
                yield said["result"]
        finally:
            if not is_over:
                with suppress(LaunchFailed):
                    self._say({"dropped": asked})

    def stop(self) -> None:
        """End it; a private session with all its processes."""
        if self._holder is None:
            return
        holder, self._holder = self._holder, None
        assert holder.stdin is not None and holder.stdout is not None
        with suppress(OSError):
            holder.stdin.close()  # what it ends by, like the end of this process
        if wait_for(holder, PATIENCE) is None:
            holder.kill()
            wait_for(holder)
        holder.stdout.close()
        if self._words is not None:
            self._words.close()
        until = time.monotonic() + PATIENCE
        while self._folder and Path(self._folder).exists() and time.monotonic() < until:
            time.sleep(0.05)  # for the warden
        self.environment = {}

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _say(self, said: Mapping[str, Any]) -> None:
        assert self._holder is not None and self._holder.stdin is not None
        try:
            self._holder.stdin.write(json.dumps(said).encode() + b"\n")
            self._holder.stdin.flush()
        except OSError:
            self._lost()

    def _heard(self) -> dict[str, Any]:
        """The next line of the holder. What it says of a failure is raised."""
        assert self._holder is not None and self._holder.stdout is not None
        line = self._holder.stdout.readline()
        if not line.endswith(b"\n"):
            self._lost()
        said = json.loads(line)
        if "lost" in said:
            self._lost(said["lost"])
        if "error" in said and said.get("asked", self._asked) == self._asked:
            if said["error"] == "":
                raise RuntimeError(said["message"])
            if said["error"] == LaunchFailed.__name__:
                raise LaunchFailed(said["message"], said["kind"])
            raise getattr(errors, said["error"], Vc2Error)(said["message"])
        return said

    def _lost(self, why: str = "") -> NoReturn:
        assert self._holder is not None
        if (code := wait_for(self._holder, 5)) is not None:
            why = why or (f"ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}")
        raise LaunchFailed(
            f"Ray is lost: {why or 'its process does not answer'}; what is finished stays, the same command does the "
            "rest",
            "communication",
        )


Tell = Callable[[Mapping[str, Any]], None]

_SHARED = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
_current: list[HeldSession] = []  # of this process: the innermost is last
_keepers: list[ExitStack] = []


@contextmanager
def ray_session(num_cpus: int | None = None) -> Iterator[HeldSession]:
    """The Ray session of this process: the one that is held already, else a new one that ends with the block.

    Processes that are started inside the block connect to the same Ray.
    """
    if _current and _current[-1].is_alive():
        yield _current[-1]
    elif _keepers:
        yield _keepers[-1].enter_context(_new_session(num_cpus))
    else:
        with _new_session(num_cpus) as held:
            yield held


@contextmanager
def keeping_ray() -> Iterator[ExitStack]:
    """A session that is first needed inside the block is kept to its end, for whoever needs one next; closing what is
    yielded ends it earlier."""
    with ExitStack() as kept:
        _keepers.append(kept)
        try:
            yield kept
        finally:
            _keepers.remove(kept)


@contextmanager
def _new_session(num_cpus: int | None) -> Iterator[HeldSession]:
    before = {name: os.environ.get(name) for name in _SHARED}
    if any(held.is_private and held.address == before["RAY_ADDRESS"] for held in _current):
        _environment(dict.fromkeys(_SHARED))  # it is lost: whoever looked for it would wait in vain
    with HeldSession(num_cpus) as held:
        _current.append(held)
        _environment({name: held.environment.get(name) for name in _SHARED})
        try:
            yield held
        finally:
            _current.remove(held)
            _environment(before)


def _environment(settings: Mapping[str, str | None]) -> None:
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# ---- the holder ----


def hold(num_cpus: int) -> NoReturn:
    """Connect to Ray, and spread what the starter asks for, until it closes its end or is gone."""
    said = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # alone: whatever else is printed here is none of its lines
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lock = threading.Lock()

    def tell(line: Mapping[str, Any]) -> None:
        with lock, suppress(BrokenPipeError):
            said.write(json.dumps(line) + "\n")
            said.flush()

    questions: SimpleQueue[dict[str, Any]] = SimpleQueue()
    dropped: set[int] = set()
    threading.Thread(target=_listen, args=(questions, dropped), daemon=True).start()
    try:
        address, folder = _connect(num_cpus)
    except Exception as error:
        why = error if isinstance(error, LaunchFailed) else LaunchFailed(f"Ray: {first_line(error)}", "communication")
        tell({"error": LaunchFailed.__name__, "message": str(why), "kind": why.kind})
        os._exit(1)
    threading.Thread(target=_watch_ray, args=(address, folder, tell), daemon=True).start()
    shared = {name: os.environ[name] for name in _SHARED if name in os.environ} | {"RAY_ADDRESS": address}
    tell({"ready": shared, "folder": str(folder or "")})
    while True:
        question = questions.get()
        _answer(question, dropped, lambda line, asked=question["asked"]: tell({"asked": asked, **line}))


def _listen(questions: "SimpleQueue[dict[str, Any]]", dropped: set[int]) -> None:
    for line in sys.stdin:
        question = json.loads(line)
        if "dropped" in question:
            dropped.add(question["dropped"])
        else:
            questions.put(question)
    os._exit(0)  # at once, whatever is under way: a warden tidies up, or the cluster does


def _answer(question: Mapping[str, Any], dropped: set[int], tell: Tell) -> None:
    import ray.data
    from ray.data import DataContext, TaskPoolStrategy
    from ray.exceptions import RayTaskError

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    described = [{"function": question["function"], "item": json.dumps(item)} for item in question["items"]]
    try:
        rows = ray.data.from_items(described, override_num_blocks=len(described))
        for row in rows.map(_call, num_cpus=1, compute=TaskPoolStrategy(size=question["workers"])).iter_rows():
            if question["asked"] in dropped:
                return
            tell(json.loads(row["said"]))
    except RayTaskError as error:
        tell({"error": "", "message": str(error)})
    except Exception as error:
        is_memory = type(error).__name__ == "OutOfMemoryError"
        kind, message = "memory" if is_memory else "communication", f"Ray: {first_line(error)}"
        tell({"error": LaunchFailed.__name__, "message": message, "kind": kind})
    else:
        tell({"is_over": True})


def _call(row: dict[str, str]) -> dict[str, str]:
    """On a worker. Errors that are meant for the user travel as text: Ray would bury them in its own."""
    module, _, name = row["function"].partition(":")
    try:
        said = {"result": getattr(importlib.import_module(module), name)(json.loads(row["item"]))}
    except Vc2Error as error:
        said = {"error": type(error).__name__, "message": str(error), "kind": error.kind}
    return {"said": json.dumps(said)}


def _connect(num_cpus: int) -> tuple[str, Path | None]:
    """Ray, connected: address of its head, and the folder of a private session. Its files lie in a temporary folder
    (Ray's socket paths must be short), removed at the end, or by the next session after a kill."""
    named = os.environ.get("RAY_ADDRESS", "")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    folder = None if named else _ray_folder()
    if folder or named.startswith(f"{LOOPBACK}:"):
        # Read when Ray is first imported. Ray's name for it is misleading: it means "this machine alone, on loopback".
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # And its head is not coming back: whoever loses it ends soon, rather than asking for a minute.
        os.environ |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
    if folder is None:
        _knock(named)
        import ray

        ray.init(named, log_to_driver=False, logging_level=logging.ERROR)
    else:
        token = folder / "token"
        token.write_text(secrets.token_hex(32))  # who knows it may use the session
        token.chmod(0o600)
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), RAY_SESSION: str(folder)}
        # A private session is there to work: its workers get the priority of their starter, not a low one.
        os.environ |= {"RAY_worker_niceness": "0"}
        _start_warden(folder)
        _start_ray(folder, num_cpus)
    import ray

    return ray.get_runtime_context().gcs_address, folder


def _knock(named: str) -> None:
    """See that something answers there: where nothing does, Ray ends the process that asks it, without an exception.

    Raises:
        LaunchFailed: If nothing does.
    """
    host, _, port = named.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # `auto` and the like: Ray looks for it
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise LaunchFailed(
            f"Ray: nothing answers at {named} ({error.strerror or error}), the RAY_ADDRESS; start a head there, "
            "or unset it to use this machine",
            "communication",
        ) from None


def _start_ray(folder: Path, num_cpus: int) -> None:
    import ray

    for attempt in range(RAY_STARTS):
        try:
            ray.init(
                _node_ip_address=LOOPBACK,
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
                    f"Ray did not start on this machine ({first_line(error)}); is it very busy, or {folder.parent} "
                    f"full? Its logs: {folder}",
                    "communication",
                ) from error


def _watch_ray(address: str, folder: Path | None, tell: Tell) -> None:
    """End this process when Ray is lost, and say so: by itself it would abort after a while, or wait for ever."""
    own = [(child, name) for child, name in _named_children() if name in ("raylet", "gcs_server")] if folder else []
    host, _, port = address.rpartition(":")
    is_local, missed = host == LOOPBACK, 0
    while is_local:
        time.sleep(OURS)
        for process, name in own:
            if _has_ended(process):
                tell({"lost": f"its {'head' if 'gcs' in name else 'node'} has ended"})
                os._exit(1)
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
            missed = 0
        except OSError:
            missed += 1
        if missed == 3:
            tell({"lost": f"nothing answers at {address}"})
            os._exit(1)


def _named_children() -> "Iterator[tuple[psutil.Process, str]]":
    import psutil

    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it is gone
            yield child, child.name()


def _has_ended(process: "psutil.Process") -> bool:
    import psutil

    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # between the two questions
        return True


def _ray_folder() -> Path:
    root = Path(tempfile.gettempdir())
    for old in root.glob("vc2-ray-*-*"):
        owner = old.name.split("-")[2]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():  # others may choose such names too
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"vc2-ray-{os.getpid()}-", dir=root))


# ---- the warden of a private session ----


def _start_warden(folder: Path) -> None:
    settings = {name: value for name, value in os.environ.items() if name != RAY_SESSION}
    subprocess.Popen(
        [sys.executable, "-m", "vc2.ray_session", "warden", str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**settings, PARENT: str(os.getpid())},
    )


def _keep_watch(folder: Path) -> None:
    """Wait until the owner of a Ray session ends; then see that nothing of it is left.

    What Ray starts carries the mark of its session. But a worker that renames itself may write over it: so who was born
    of whom is noted while the owner lives.
    """
    import psutil

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # told to all of a stack at once; its work begins when they end
    owner, family = int(os.environ[PARENT]), set[psutil.Process]()
    while os.getppid() == owner:
        with suppress(psutil.Error):
            family |= _marked(folder, psutil.Process(owner).children())
        family |= _descendants(family)
        time.sleep(OURS)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:  # again, for what is born while its parents are killed
        family |= _marked(folder, psutil.process_iter())
        family |= _descendants(family)
        alive = [process for process in family if not _has_ended(process)]
        if not alive:
            break
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=OURS)
    shutil.rmtree(folder, ignore_errors=True)


def _marked(folder: Path, processes: "Iterable[psutil.Process]") -> "set[psutil.Process]":
    """Those that were started with the mark of the session of that folder."""
    import psutil

    found = set[psutil.Process]()
    for process in processes:
        with suppress(psutil.Error):  # it is gone, or somebody else's
            if process.environ().get(RAY_SESSION) == str(folder):
                found.add(process)
    return found


def _descendants(family: "set[psutil.Process]") -> "set[psutil.Process]":
    """Children of those who live, and theirs, found in one look at all processes."""
    import psutil

    born = defaultdict[int, list[psutil.Process]](list)
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it is gone
            born[process.ppid()].append(process)
    found, parents = set[psutil.Process](), [process.pid for process in family if not _has_ended(process)]
    while parents:
        children = set(born[parents.pop()]) - found
        found |= children
        parents += [child.pid for child in children]
    return found


if __name__ == "__main__":
    from vc2 import ray_session as itself  # by its name, so that workers find what they are sent

    if sys.argv[1] == "hold":
        itself.hold(int(sys.argv[2]))
    itself._keep_watch(Path(sys.argv[2]))
