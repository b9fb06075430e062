"""Two hosts on one machine: network namespaces joined by a cable, and what runs in them."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

__all__ = ["HEAD", "OTHER", "OWN", "Networks", "inside", "processes_in", "ray_node", "two_networks"]

HEAD, OTHER = "10.213.77.1", "10.213.77.2"
OWN = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # not of the tests' session


@dataclass(frozen=True)
class Networks:
    """The names of two networks, and of their ends of the cable."""

    head: str
    other: str
    ends: tuple[str, str]

    def cut(self) -> None:
        """Pull the cable out."""
        run("ip", "-n", self.other, "link", "set", self.ends[1], "down")

    def mend(self) -> None:
        run("ip", "-n", self.other, "link", "set", self.ends[1], "up")


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def inside(network: str, *command: str) -> list[str]:
    """A command that runs in a network."""
    return ["ip", "netns", "exec", network, *command]


@contextlib.contextmanager
def two_networks() -> Iterator[Networks]:
    """Two namespaces with the addresses HEAD and OTHER; the test is skipped where they are not permitted."""
    cable = secrets.token_hex(3)
    networks = Networks(f"vc2a{cable}", f"vc2b{cable}", (f"a{cable}", f"b{cable}"))
    names = networks.head, networks.other
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                run("ip", "netns", "add", name)
                stack.callback(run, "ip", "netns", "delete", name)
            ends = ["ip", "link", "add", networks.ends[0], "netns", names[0], "type", "veth"]
            run(*ends, "peer", networks.ends[1], "netns", names[1])
            for name, end, address in zip(names, networks.ends, (HEAD, OTHER), strict=True):
                run("ip", "-n", name, "address", "add", f"{address}/24", "dev", end)
                run("ip", "-n", name, "link", "set", end, "up")
                run("ip", "-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", b"") or str(error).encode()
            pytest.skip(f"network namespaces are not permitted here: {reason.decode(errors='replace').strip()}")
        yield networks


@contextlib.contextmanager
def ray_node(network: str, *arguments: str, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A Ray node of one core in a network, ended with all its processes."""
    folder = tempfile.mkdtemp(prefix="vc2n", dir="/tmp")  # Ray's socket paths must be short
    ray = str(Path(sys.executable).with_name("ray"))
    place = ["--temp-dir", folder] if "--head" in arguments else []
    process = subprocess.Popen(
        inside(network, ray, "start", *arguments, *place, "--num-cpus=1", "--block"),
        env=OWN | {"RAY_USAGE_STATS_ENABLED": "0"} | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            with contextlib.suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(family, timeout=20)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def processes_in(network: str) -> list[psutil.Process]:
    """Everything that runs in a network."""
    wanted, found = os.stat(f"/var/run/netns/{network}").st_ino, []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error, OSError):
            if os.stat(f"/proc/{process.pid}/ns/net").st_ino == wanted:
                found.append(process)
    return found
