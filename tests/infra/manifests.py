"""What the tests of infra/ share: documents of YAML files, and pods wherever they stand in them."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
UID = 10001  # of the image's user
BOARD = json.loads((INFRA / "monitoring/grafana/vc2.json").read_text())
RULES = [
    rule for group in yaml.safe_load((INFRA / "monitoring/rules.yml").read_text())["groups"] for rule in group["rules"]
]
FIGURE = re.compile(r"\b((?:vc2|ray|prefect)_[a-z_]+)\b")


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return [found for found in yaml.safe_load_all(path.read_text()) if found]


def kubernetes() -> list[dict[str, Any]]:
    """All objects that `kubectl apply -k infra/kubernetes` would make, as they stand in the files."""
    files = yaml.safe_load((INFRA / "kubernetes/kustomization.yaml").read_text())["resources"]
    return [found for name in files for found in documents(INFRA / "kubernetes" / name)]


def ray_cluster() -> dict[str, Any]:
    (found,) = documents(INFRA / "kuberay/raycluster.yaml")
    return found


def pods(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Pod templates of an object of any kind."""
    if "containers" in found.get("spec", {}):
        yield found
    for value in found.values():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from pods(inner)


def program(name: str) -> str | None:
    """A program of this environment, or of the machine."""
    return shutil.which(name, path=f"{ROOT / '.venv/bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}")


def run(*command: str, **settings: Any) -> str:
    """What a checker says; it must say yes."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def asked(kind: str) -> set[str]:
    """Names of figures of one kind (`vc2_`, `ray_`, `prefect_`) that the board and the alerts ask for."""
    queries = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    queries += [rule["expr"] for rule in RULES]
    return {name for query in queries for name in FIGURE.findall(query) if name.startswith(kind)}
