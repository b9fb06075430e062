"""Monitoring: no board and no alert asks for a figure that nobody gives."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import yaml
from manifests import BOARD, INFRA, ROOT, RULES, asked

from flows.figures import Figures
from vc2.storage import LocalStore
from vc2.train.attempts import Attempt, Run, this_process
from vc2.train.config import Layout


def test_our_own_figures_are_given(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    run = Run(store, "full", "a" * 64)
    run.claim(
        Attempt(
            number=1,
            start=None,
            layout=Layout(world_size=1, micro_batch=1, threads=1),
            holder=this_process(),
            heartbeat_seconds=1,
            request={"stage": {"num_steps": 10}},
        )
    )
    line = {
        "step": 1,
        "loss": 0.1,
        "grad_norm": 1.0,
        "samples_per_s": 2.0,
        "goodput": 0.9,
        "mfu": 0.3,
        "data_wait": 0.1,
    }
    store.write(run.metrics_key(1, 0), json.dumps(line | {"memory_gib": 1.0}).encode())
    given = set(re.findall(r"^# TYPE (\S+) ", Figures(tmp_path).text(), flags=re.MULTILINE))
    assert asked("vc2_") and asked("vc2_") <= given, asked("vc2_") - given


def test_rays_figures_are_given() -> None:
    """By its sources: a running cluster of the version here is not needed."""
    found = find_spec("ray")
    assert found and found.origin
    folder = Path(found.origin).parent / "dashboard/modules"
    text = "\n".join(path.read_text() for path in [*folder.glob("reporter/*.py"), *folder.glob("metrics/**/*.py")])
    missing = {name for name in asked("ray_") if name not in text and f'"{name.removeprefix("ray_")}"' not in text}
    assert asked("ray_") and not missing


def test_every_alert_says_what_to_do() -> None:
    """Each leads to a heading of the operators' page."""
    page = (ROOT / "docs/operations.md").read_text()
    headings = {
        re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.+)$", page, re.M)
    }
    for rule in RULES:
        place, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert place == "docs/operations.md" and anchor in headings, rule["alert"]
        assert rule["annotations"]["summary"] and rule["labels"]["severity"] in ("page", "ticket")


def test_the_board_is_whole() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids)) and all(panel["targets"] for panel in BOARD["panels"])
    jobs = yaml.safe_load((INFRA / "monitoring/prometheus.yml").read_text())["scrape_configs"]
    assert {job["job_name"] for job in jobs} == {"prefect", "prefect-worker", "vc2", "ray"}
    named = {job for rule in RULES for job in re.findall(r'job="([^"]+)"', rule["expr"])}
    assert named <= {job["job_name"] for job in jobs}
