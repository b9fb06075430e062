"""infra/prefect/deploy.py against a real server with a password, as on a cluster."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import yaml
from manifests import ROOT, asked

from vc2.ports import free_port

PASSWORD = "planted-password"
LIMIT = 60  # seconds for an answer of a server on a busy machine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, dict[str, str]]]:
    """A server as the manifests start it, but for its database; a client that knows the password; its environment."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    url = f"http://127.0.0.1:{port}/api"
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
        "PREFECT_HOME": str(home),
        "PREFECT_UI_STATIC_DIRECTORY": str(home / "ui"),
        "PREFECT_SERVER_API_AUTH_STRING": f"admin:{PASSWORD}",
        "PREFECT_SERVER_METRICS_ENABLED": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "DO_NOT_TRACK": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    with open(home / "log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=settings, stdout=log, stderr=log
        )
    client = httpx.Client(base_url=url, auth=("admin", PASSWORD), trust_env=False, timeout=LIMIT)
    settings |= {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": f"admin:{PASSWORD}", "VC2_IMAGE": "vc2:here"}
    try:
        yield client, settings
    finally:
        client.close()
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with a few of its deployments: all of them are deployed by the tests of the stack."""
    folder = tmp_path_factory.mktemp("root")
    for name in ("flows", "vc2", "infra"):
        (folder / name).symlink_to(ROOT / name)
    said = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    said["deployments"] = [one for one in said["deployments"] if one["name"] in ("full-pipeline", "crashed", "sweep")]
    (folder / "prefect.yaml").write_text(yaml.safe_dump(said))
    return folder


def deploy(kind: str, settings: dict[str, str], root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "infra/prefect/deploy.py", kind]
    return subprocess.run(command, cwd=root, env=settings, capture_output=True, text=True, check=False)


def test_a_server_is_brought_to_what_the_files_say(server: tuple[httpx.Client, dict[str, str]], root: Path) -> None:
    """Pool, queues, deployments, automations; and the password is never shown."""
    client, settings = server
    done = deploy("kubernetes", settings, root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    pool = client.get("/work_pools/vc2").json()
    assert pool["type"] == "kubernetes"
    assert pool["base_job_template"]["variables"]["properties"]["image"]["default"] == "vc2:here"
    queues = {queue["name"] for queue in client.post("/work_pools/vc2/queues/filter", json={}).json()}
    assert {"driver", "stages"} <= queues
    known = client.post("/deployments/filter", json={}).json()
    assert {found["name"] for found in known} == {"full-pipeline", "crashed", "sweep"}
    assert {found["job_variables"]["working_dir"] for found in known} == {str(root)}
    assert len(client.post("/automations/filter", json={}).json()) >= 2


def test_the_server_has_its_ui_where_its_packages_are_not_its_own(
    server: tuple[httpx.Client, dict[str, str]],
) -> None:
    """In the image they belong to root: the UI is unpacked where the image says, and served from there."""
    client, settings = server
    folder = Path(settings["PREFECT_UI_STATIC_DIRECTORY"])
    assert "PREFECT_UI_STATIC_DIRECTORY=/tmp/" in (ROOT / "infra/Dockerfile").read_text()
    page = httpx.get(
        str(client.base_url).removesuffix("/api/"),
        headers={"Accept": "text/html"},
        follow_redirects=True,
        trust_env=False,
        timeout=LIMIT,
    )
    assert page.status_code == 200
    assert page.text in {path.read_text() for path in folder.glob("*/index.html")}


def test_a_pool_of_another_kind_is_left_alone(server: tuple[httpx.Client, dict[str, str]]) -> None:
    client, settings = server
    if client.get("/work_pools/vc2").status_code == 404:
        pytest.skip("needs the test above")
    done = deploy("process", settings)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "type kubernetes, not process" in done.stderr


def test_nobody_without_the_password_gets_in(server: tuple[httpx.Client, dict[str, str]]) -> None:
    """But probes, which have none."""
    client, _ = server
    with httpx.Client(base_url=client.base_url, trust_env=False, timeout=LIMIT) as stranger:
        assert stranger.post("/flow_runs/filter", json={}).status_code == 401
        assert stranger.get("/metrics").status_code == 401
        assert stranger.get("/health").status_code == stranger.get("/ready").status_code == 200


def test_prefects_figures_are_given(server: tuple[httpx.Client, dict[str, str]]) -> None:
    client, _ = server
    given = set(re.findall(r"^# TYPE (\S+) ", client.get("/metrics").text, flags=re.MULTILINE))
    assert asked("prefect_") and asked("prefect_") <= given, asked("prefect_") - given


@pytest.mark.parametrize(
    ("settings", "kind", "told"),
    [
        ({}, "kubernetes", "PREFECT_API_URL is not set"),
        ({"PREFECT_API_URL": "http://127.0.0.1:9/api"}, "kubernetes", "VC2_IMAGE is not set"),
        ({}, "docker", "usage: deploy.py kubernetes|process"),
    ],
)
def test_what_is_missing_is_told_in_a_line(settings: dict[str, str], kind: str, told: str) -> None:
    bare = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = deploy(kind, bare | settings)
    assert done.returncode == 1 and told in done.stderr and len(done.stderr.splitlines()) == 1
