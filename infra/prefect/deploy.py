"""Bring a Prefect server to what this version of vc2 says: work pool, queues, deployments, automations. Safe to repeat.

    python infra/prefect/deploy.py kubernetes|process

From the root of the repository, or inside the image. `make stack` does the same for its own server on loopback; this
one may be anywhere: PREFECT_API_URL, with the password PREFECT_API_AUTH_STRING (user:password), and its certificate is
checked. With `kubernetes` VC2_IMAGE is the image of flow runs.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from flows.automations import register
from flows.server import POOL, QUEUES, Api
from vc2.errors import ConfigError, Vc2Error

PATIENCE = 180.0  # seconds that the server has to come up; the first time it makes its database


class Server(Api):
    """A server that is not ours."""

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float) -> httpx.Response:
        user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
        auth = httpx.BasicAuth(user, password) if user else None
        with httpx.Client(base_url=self.url, timeout=timeout, auth=auth) as client:
            return client.request(method, path, json=body)

    def wait(self) -> None:
        until = time.monotonic() + PATIENCE
        while not self.is_healthy():
            if time.monotonic() > until:
                raise ConfigError(f"no Prefect server answers at {self.url} (PREFECT_API_URL) for {PATIENCE:.0f} s")
            time.sleep(1)

    def set_pool(self, kind: str, template: Mapping[str, Any]) -> None:
        """Make the pool, or change its template: runs that wait in it stay."""
        found = self.get(f"/work_pools/{POOL}")
        if found is None:
            self.create("/work_pools/", {"name": POOL, "type": kind, "base_job_template": template})
        elif found["type"] != kind:
            raise ConfigError(f"work pool {POOL} is of type {found['type']}, not {kind}; delete it there, then repeat")
        else:
            self._call("PATCH", f"/work_pools/{POOL}", {"base_job_template": template})
        for queue in QUEUES:
            self.create(f"/work_pools/{POOL}/queues", {"name": queue})


def main(arguments: list[str]) -> None:
    """Do it.

    Raises:
        ConfigError: If something that it needs is not said.
        Vc2Error: If the server refuses.
    """
    if arguments not in (["kubernetes"], ["process"]):
        raise ConfigError("which kind of work pool? usage: deploy.py kubernetes|process")
    if not Path("prefect.yaml").is_file():
        raise ConfigError(f"no prefect.yaml in {Path.cwd()}; start this from the root of the repository")
    server = Server(_named("PREFECT_API_URL", "http://127.0.0.1:4200/api"))
    template = _template(_named("VC2_IMAGE", "registry.example.com/vc2:0.1.0")) if arguments == ["kubernetes"] else {}
    server.wait()
    server.set_pool(arguments[0], template)
    deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    if subprocess.run(deploy, check=False, env=os.environ | {"PREFECT_SERVER_EPHEMERAL_ENABLED": "false"}).returncode:
        raise Vc2Error("prefect deploy --all failed: see above")
    register(server)


def _template(image: str) -> dict[str, Any]:
    template = json.loads((Path(__file__).parent / "kubernetes.json").read_text())
    template["variables"]["properties"]["image"]["default"] = image
    return template


def _named(name: str, example: str) -> str:
    if not os.environ.get(name):
        raise ConfigError(f"{name} is not set; for example {example}")
    return os.environ[name]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Vc2Error as error:
        sys.exit(f"deploy: {error}")
