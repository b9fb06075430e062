"""The whole pipeline on two hosts: networks of their own, Ray with its job server across both, a store on one of them.

One host is cut off in mid-training and comes back; what is made is what one machine makes.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.digests import as_options, made
from tests.networks import HEAD, OTHER, OWN, Networks, inside, processes_in, ray_node, two_networks
from vc2.storage import open_store

TRAINING = {"batch_size": 4, "micro_batch": 2, "threads": 1, "world_size": 2, "heartbeat_seconds": 1, "log_every": 1}
TINY = {
    "world": {"num_videos": 16, "num_web_images": 24, "num_jdb_images": 16, "num_prompts": 2},
    "webvid": {"samples_per_shard": 8},
    "laion_coco": {"samples_per_shard": 8},
    "jdb": {"samples_per_shard": 8},
    "full": TRAINING | {"num_steps": 40, "state_every_steps": 4},
    "spatial": TRAINING | {"num_steps": 2},
    "evaluation": {"sampler": {"num_steps": 2}, "group_size": 1, "world_size": 2, "metrics": ["Flow_Score"]},
}
ON_RAY = {name: value | {"launcher": "ray"} for name, value in TINY.items() if name != "world"} | {
    "world": TINY["world"]
}
S3 = f"http://{HEAD}:5000"
JOBS = f"http://{HEAD}:8265"
SECRET = "planted-secret-of-the-nodes-51c0"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "planted-key-of-the-nodes-51c0", "AWS_SECRET_ACCESS_KEY": SECRET}
REGION = {"AWS_ENDPOINT_URL": S3, "AWS_DEFAULT_REGION": "us-east-1"}
SOON_LOST = {  # a host that says nothing is given up after some seconds
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "8",
}
CUT_FOR = 20.0  # seconds: longer than that


@pytest.fixture
def networks() -> Iterator[Networks]:
    with two_networks() as found:
        yield found


@contextlib.contextmanager
def kept_up(network: str, *arguments: str, **variables: str) -> Iterator[None]:
    """A Ray node that is started again whenever it has ended, as a supervisor of the host does."""
    over = threading.Event()

    def keep() -> None:
        while not over.is_set():
            with ray_node(network, *arguments, **variables) as node:
                while node.poll() is None and not over.wait(0.5):
                    pass

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def s3_server(network: str, log: Path) -> Iterator[None]:
    with open(log, "wb") as said:
        command = inside(network, sys.executable, "-m", "tests.s3_server", HEAD, S3.rsplit(":", 1)[1])
        server = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        server.terminate()
        server.wait()


def ranks_in(network: str) -> list[psutil.Process]:
    return [process for process in processes_in(network) if "vc2.train.rank" in (process.info["cmdline"] or ())]


def asked(network: str, code: str) -> str:
    """What a piece of Python prints there."""
    command = inside(network, sys.executable, "-c", code)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=OWN | CREDENTIALS | REGION)
    return done.stdout if done.returncode == 0 else ""


def wait_for(claim: Callable[[], object], what: str, seconds: float = 600.0) -> None:
    until = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < until, f"no sign of {what} after {seconds:.0f} s"
        time.sleep(1)


@pytest.mark.soak
@pytest.mark.timeout(2400)
@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_a_host_that_is_cut_off_and_comes_back_changes_nothing(networks: Networks, tmp_path: Path) -> None:
    """Shards, training and sampling as Ray Jobs, a rank on each host; the bytes are those of a run on one machine."""
    run = [sys.executable, "-m", "vc2.cli", "run", "miniature"]
    alone = ["--store", str(tmp_path / "store"), "--work", str(tmp_path / "alone"), *as_options(TINY)]
    subprocess.run([*run, *alone], check=True, timeout=1200, env=OWN)
    expected = made(open_store(str(tmp_path / "store")), tmp_path / "alone", TINY)

    hosts = CREDENTIALS | REGION | SOON_LOST | {
        "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    head = ["--head", f"--node-ip-address={HEAD}", "--port=6399", f"--dashboard-host={HEAD}", "--dashboard-port=8265"]
    other = [f"--address={HEAD}:6399", f"--node-ip-address={OTHER}"]
    with (
        s3_server(networks.head, tmp_path / "s3.log"),
        ray_node(networks.head, *head, VC2_WORK=str(tmp_path / "head"), **hosts),
        kept_up(networks.other, *other, VC2_WORK=str(tmp_path / "other"), **hosts),
    ):
        bucket = "import boto3; print(boto3.client('s3').create_bucket(Bucket='hosts')['Location'])"
        nodes = f"import urllib.request as r; print(r.urlopen('{JOBS}/nodes?view=summary').read().decode())"
        wait_for(lambda: asked(networks.head, bucket), "an S3 server")
        wait_for(lambda: asked(networks.head, nodes).count('"raylet":') >= 2, "two Ray nodes")
        here = ["--store", "s3://hosts/store", "--work", str(tmp_path / "head"), *as_options(ON_RAY)]
        environment = OWN | hosts | {"RAY_API_SERVER_ADDRESS": JOBS}
        with open(tmp_path / "run.log", "w+") as said:
            starter = subprocess.Popen(
                inside(networks.head, *run, *here), env=environment, stdout=said, stderr=subprocess.STDOUT
            )
            try:
                cut_off_in_training(networks, starter, tmp_path / "run.log")
                assert starter.wait() == 0, (tmp_path / "run.log").read_text()[-3000:]
            finally:
                starter.kill()
        jobs = asked(networks.head, f"import urllib.request as r; print(r.urlopen('{JOBS}/api/jobs/').read().decode())")
        attempts = asked(
            networks.head,
            "from vc2.storage import open_store; print(*[e.key for e in open_store('s3://hosts/store').list('runs/full')])",
        )
        look = [sys.executable, "-m", "tests.digests", "s3://hosts/store", str(tmp_path / "head"), json.dumps(ON_RAY)]
        done = subprocess.run(inside(networks.head, *look), env=OWN | hosts, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
    assert "/attempts/0002.json" in attempts  # it was noticed
    assert "vc2-shard-webvid" in jobs and "vc2-train-full" in jobs and "planted" not in jobs
    assert found == expected
    assert not processes_in(networks.head) and not processes_in(networks.other)


def cut_off_in_training(networks: Networks, starter: "subprocess.Popen[bytes]", log: Path) -> None:
    """When both hosts have a rank and some steps are done."""
    is_learning = False
    while not (is_learning and ranks_in(networks.head) and ranks_in(networks.other)):
        assert starter.poll() is None, log.read_text()[-3000:]
        is_learning = any(line.startswith("train/full: ") and "loss" in line for line in log.read_text().splitlines())
        time.sleep(0.2)
    networks.cut()
    time.sleep(CUT_FOR)
    networks.mend()
