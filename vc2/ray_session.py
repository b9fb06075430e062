"""The Ray session of a process: the cluster that is named, or a private one on loopback that ends with its owner.

A private session leaves nothing behind, however its owner ends: a *warden*, a process of its own, watches the owner and
ends what Ray started. Who starts ranks or shards on Ray enters `ray_session` first.
"""

import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vc2.errors import LaunchFailed
from vc2.launch import PARENT, cpu_count

if TYPE_CHECKING:
    import psutil

__all__ = ["ray_session", "sharing_ray"]

RAY_SESSION = "VC2_RAY_SESSION"  # environment variable that marks the processes of a private Ray session
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
        [sys.executable, "-m", "vc2.ray_session", str(folder)],
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


if __name__ == "__main__":
    _keep_watch(Path(sys.argv[1]))  # the warden
