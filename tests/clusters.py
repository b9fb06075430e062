"""A real Ray cluster on loopback, with its job server: its head can be killed and started again."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from vc2.ports import free_port

__all__ = ["RayHead", "ray_head", "ray_node"]

STARTS = 3


@contextlib.contextmanager
def ray_node(*arguments: str, folder: str, log: Path, cpus: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """A Ray node, ended with all its processes."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    settings |= {
        "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "VC2_WORK": f"{folder}/work",
        "RAY_worker_niceness": "0",  # beside other tests, workers of low priority would hardly get on
        "RAY_AUTH_MODE": "disabled",  # by itself it depends on whether this user has a token
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    command = [str(Path(sys.executable).with_name("ray")), "start", *arguments, f"--num-cpus={cpus}", "--block"]
    # Jobs are started by the agent of a node; by itself every agent of this machine would want the same port.
    command += [f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=80000000"]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env=settings, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.Error):
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in family:
                with contextlib.suppress(psutil.Error):
                    one.kill()
            psutil.wait_procs(family, timeout=20)
        process.wait()


class RayHead:
    """The head of a cluster, at fixed ports."""

    def __init__(self, folder: str, logs: Path, cpus: int) -> None:
        self.folder, self._logs, self._cpus = folder, logs, cpus
        port, server = free_port(), free_port()
        self.address, self.jobs = f"127.0.0.1:{port}", f"http://127.0.0.1:{server}"
        self._arguments = [
            "--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={server}", f"--ray-client-server-port={free_port()}",
        ]  # fmt: skip
        self._node = contextlib.ExitStack()

    def start(self) -> None:
        """Start it, and wait until it takes jobs. On a busy machine Ray gives up where it would only have to wait."""
        log = self._logs / "head.log"
        for _ in range(STARTS):
            node = ray_node("--head", *self._arguments, folder=self.folder, log=log, cpus=self._cpus)
            process, until = self._node.enter_context(node), time.monotonic() + 120
            while process.poll() is None and time.monotonic() < until:
                try:
                    urllib.request.urlopen(f"{self.jobs}/api/version", timeout=5).close()
                    return
                except OSError:
                    time.sleep(0.2)
            self.kill()
        raise TimeoutError(f"no head of Ray in {STARTS} starts: {log.read_text()}")

    def kill(self) -> None:
        """kill -9 of all its processes, jobs and workers among them."""
        self._node.close()


@contextlib.contextmanager
def ray_head(logs: Path, cpus: int = 1) -> Iterator[RayHead]:
    """A head with a job server, ended with the block."""
    folder = tempfile.mkdtemp(prefix="vc2j", dir="/tmp")  # Ray's socket paths must be short
    head = RayHead(folder, logs, cpus)
    try:
        head.start()
        yield head
    finally:
        head.kill()
        shutil.rmtree(folder, ignore_errors=True)
