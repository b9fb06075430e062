"""A cluster of two nodes, each in a network of its own, makes the bytes that one machine makes."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from vc2.artifacts import load_manifest, shard_set_prefix
from vc2.data.config import FolderSource, ShardStage, shard_fingerprint, source_digest
from vc2.data.prepare import prepare
from vc2.storage import LocalStore

CODE = """
import sys, time
from pathlib import Path
import ray
until = time.monotonic() + 90
while not ray.is_initialized() or len(ray.nodes()) < 2:
    assert time.monotonic() < until, "no two nodes"
    try:
        ray.init(log_to_driver=False, ignore_reinit_error=True)
    except ConnectionError:
        pass
    time.sleep(0.2)
from vc2.data.config import ShardStage
from vc2.data.prepare import prepare
from vc2.storage import open_store
config = ShardStage.model_validate_json(sys.argv[1])
prepare(config, open_store(sys.argv[2]), Path(sys.argv[3]), fingerprint=sys.argv[4])
"""
OWN = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # not of the tests' session
HEAD, OTHER = "10.213.77.1", "10.213.77.2"


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.fixture
def networks() -> Iterator[tuple[str, str]]:
    """Two network namespaces, joined by a cable."""
    names = f"vc2a{secrets.token_hex(3)}", f"vc2b{secrets.token_hex(3)}"
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                run("ip", "netns", "add", name)
                stack.callback(run, "ip", "netns", "delete", name)
            cable = secrets.token_hex(3)
            run(
                "ip",
                "link",
                "add",
                f"a{cable}",
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                f"b{cable}",
                "netns",
                names[1],
            )
            for name, end, address in zip(names, "ab", (HEAD, OTHER), strict=True):
                run("ip", "-n", name, "address", "add", f"{address}/24", "dev", f"{end}{cable}")
                run("ip", "-n", name, "link", "set", f"{end}{cable}", "up")
                run("ip", "-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", b"") or str(error).encode()
            pytest.skip(f"network namespaces are not permitted here: {reason.decode(errors='replace').strip()}")
        yield names


@contextlib.contextmanager
def node(network: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Ray node in a network, ended with all its processes."""
    folder = tempfile.mkdtemp(prefix="vc2n", dir="/tmp")
    ray = str(Path(sys.executable).with_name("ray"))
    place = ["--temp-dir", folder] if "--head" in arguments else []
    process = subprocess.Popen(
        ["ip", "netns", "exec", network, ray, "start", *arguments, *place, "--num-cpus=1", "--block"],
        env=OWN | {"RAY_USAGE_STATS_ENABLED": "0"},
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


def workers_in(network: str) -> int:
    """Ray workers at work in a network."""
    wanted = os.stat(f"/var/run/netns/{network}").st_ino
    found = 0
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error, OSError):
            words = " ".join(process.info["cmdline"] or ())
            is_at_work = words.startswith("ray::") and "IDLE" not in words
            found += is_at_work and os.stat(f"/proc/{process.pid}/ns/net").st_ino == wanted
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_two_nodes_make_the_same_bytes(networks: tuple[str, str], ray_address: str, media: Any, tmp_path: Path) -> None:
    """Both nodes work, and the set equals that of one machine file by file."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(24):
        (folder / f"v{number:02d}.mp4").write_bytes(media.mp4(30 + number % 5, 25, first=number))
        (folder / f"v{number:02d}.txt").write_text(f"grey number {number}")
    stage = ShardStage.model_validate(
        {
            "source": FolderSource(name="mine", media="video", folder=str(folder)),
            "form": {"num_frames": 8, "width": 64, "height": 48},
            "fetch": {"part_rows": 3},
            "samples_per_shard": 2,
            "workers": 2,
        }
    )
    name = shard_fingerprint("shard/mine", stage, source_digest(stage.source))
    stores = [LocalStore(tmp_path / place) for place in ("one", "two")]
    assert prepare(stage, stores[0], tmp_path / "work", fingerprint=name) is not None
    settings = [f"--node-ip-address={HEAD}", "--port=6399", "--include-dashboard=false"]
    with (
        node(networks[0], "--head", *settings),
        node(networks[1], f"--address={HEAD}:6399", f"--node-ip-address={OTHER}"),
    ):
        arguments = [stage.model_dump_json(), stores[1].uri, str(tmp_path / "work"), name]
        driver = subprocess.Popen(
            ["ip", "netns", "exec", networks[0], sys.executable, "-c", CODE, *arguments],
            env=OWN | {"RAY_ADDRESS": f"{HEAD}:6399"},
            stderr=subprocess.DEVNULL,
        )
        seen = {network: 0 for network in networks}
        while driver.poll() is None:
            seen = {network: max(count, workers_in(network)) for network, count in seen.items()}
            time.sleep(0.05)
        assert driver.returncode == 0
    assert min(seen.values()) >= 1
    one, two = (load_manifest(store, shard_set_prefix("mine", name)) for store in stores)
    assert [(entry.name, entry.sha256) for entry in one.files] == [(entry.name, entry.sha256) for entry in two.files]
