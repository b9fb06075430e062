"""What all tests share: a store in a temporary folder, an S3 server on loopback."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler.loadscope import LoadScopeScheduling

from vc2.ports import free_port
from vc2.storage import LocalStore

if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a shell. Processes that tests start would inherit it, and never hear a Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VC2_OFFLINE", "1")  # no test asks a model hub

# The time of an example is that of the machine; in CI examples are the same ones each time, by Hypothesis' own profile.
settings.register_profile("vc2", settings(), deadline=None)
settings.load_profile("vc2")

# Each of these starts a server, a worker and whole stages, or a Ray cluster: one at a time is enough for two cores.
HEAVY = ("tests/flows/test_flow_runs.py", "tests/flows/test_gates.py", "tests/flows/test_prefect_server.py",
         "tests/flows/test_retry_matrix.py", "tests/flows/test_soak.py", "tests/infra/test_deploy.py",
         "tests/test_secrets.py", "tests/test_ray_session.py", "tests/pipeline/test_remote.py",
         "tests/pipeline/test_hosts.py", "tests/data/test_kills.py", "tests/data/test_two_nodes.py",
         "tests/train/test_launchers.py")  # fmt: skip


def scope(nodeid: str) -> str:
    """Tests of a file stay together on one worker, and so do those of all heavy files."""
    file = nodeid.partition("::")[0]
    return "heavy" if file in HEAVY else file


class InScopes(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    config.option.loadscopereorder = False
    return InScopes(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there are several workers, the longest scope comes first."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: scope(item.nodeid) != "heavy")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A real S3 protocol server (moto, its own process) on loopback, with boto3's own environment variables set."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.s3_server", "127.0.0.1", str(port)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        _wait_for(endpoint)
        yield endpoint
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def s3_uri(s3_endpoint: str, request: pytest.FixtureRequest) -> str:
    """An empty bucket of its own for each test, with a prefix."""
    import boto3

    bucket = "b" + format(abs(hash(request.node.nodeid)), "x")
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/some/prefix"


def _wait_for(endpoint: str) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(endpoint, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"no S3 server at {endpoint}")
