"""What the driver costs where nothing is left to do: a whole DAG that is reused, through Prefect and without; and how
long a busy server lets others wait.

    python -m benchmarks.orchestration      about five minutes on two cores, most of it the first run of a tiny world

A stack of its own (server, worker, deployments) is started in a temporary folder and runs the DAG of a tiny world once.
Then the same run is submitted again, and again: from the submission to the end of the run, as somebody at the UI would
count it. `vc2 run` on the same store is the peer: all that it does not do is Prefect's share. The limit is 15 seconds
beyond the start of the server.

Then, for a while, two callers make automations, send the events that fire them and delete them again, and one polls as
workers do. All of them write to one SQLite file. The limit of an answer is what our own client waits for.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from flows.follow import FINAL
from flows.server import POOL, QUEUES, READ_LIMIT, ROOT, Api, Stack, held_lock
from vc2.artifacts import environment
from vc2.launch import cpu_count
from vc2.ports import free_port

__all__ = ["main"]

LIMIT = 15.0  # seconds
TINY: dict[str, Any] = {
    "world": {"num_videos": 16, "num_web_images": 24, "num_jdb_images": 16, "num_prompts": 2},
    "full": {"num_steps": 4, "batch_size": 4},
    "spatial": {"num_steps": 2, "batch_size": 4},
    "evaluation": {"sampler": {"num_steps": 2}, "metrics": ["CLIP_Temp"]},
}


def main() -> int:
    """Measure, print, write `benchmarks/results/orchestration-<date>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=float, default=120.0, metavar="SECONDS", help="how long the server is kept busy")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.rounds < 1 or options.busy <= 0:
        parser.error(
            f"--rounds {options.rounds}, --busy {options.busy:g}: expected one round and some seconds, or more"
        )
    with tempfile.TemporaryDirectory(prefix="vc2-bench-") as folder:
        measured = _measured(Path(folder), options.rounds, options.busy)
    measured |= {
        "limit_s": LIMIT,
        "busy_limit_s": READ_LIMIT,
        "cores": cpu_count(),
        "load": os.getloadavg()[0],
        "environment": environment(),
    }
    print(json.dumps({name: measured[name] for name in measured if name != "environment"}, indent=1))
    options.out.mkdir(parents=True, exist_ok=True)
    place = options.out / f"orchestration-{datetime.now(UTC):%Y-%m-%d}.json"
    place.write_text(json.dumps(measured, indent=1) + "\n")
    return int(measured["reused_median_s"] > LIMIT or measured["busy"]["longest_s"] > READ_LIMIT)


def _measured(work: Path, rounds: int, busy: float) -> dict[str, Any]:
    stack = Stack(work, str(work / "store"), free_port(), tied=True)
    with held_lock(work):
        began = time.monotonic()
        try:
            stack.start()
            started = time.monotonic() - began
            first = _run(stack)
            reused = [_run(stack) for _ in range(rounds)]
            command = [_run_without(work) for _ in range(rounds)]
            answers = _kept_busy(stack.api, busy)
        finally:
            stack.stop()
    return {
        "stack_start_s": round(started, 2),
        "first_run_s": round(first, 2),
        "reused_s": [round(seconds, 2) for seconds in reused],
        "reused_median_s": round(statistics.median(reused), 2),
        "vc2_run_reused_s": [round(seconds, 2) for seconds in command],
        "busy": answers,
    }


def _run(stack: Stack) -> float:
    """Seconds from the submission of a run to its end."""
    api, began = stack.api, time.monotonic()
    deployment = api.get("/deployments/name/vc2/full-pipeline")["id"]
    parameters = {"parameters": {"recipe": "miniature", "overrides": TINY}}
    run = api.post(f"/deployments/{deployment}/create_flow_run", parameters)["id"]
    while (state := api.get(f"/flow_runs/{run}")["state"])["type"] not in FINAL:
        time.sleep(0.1)
    if state["type"] != "COMPLETED":
        sys.exit(f"the run ended {state['type'].lower()}: {state['message']} (logs: {stack.work / 'logs'})")
    return time.monotonic() - began


def _run_without(work: Path) -> float:
    """Seconds of the same by `vc2 run`."""
    settings = [f"--set={name}.{key}={json.dumps(value)}" for name, part in TINY.items() for key, value in part.items()]
    began = time.monotonic()
    environment = os.environ | {"VC2_WORK": str(work), "VC2_STORE": str(work / "store")}
    command = [sys.executable, "-m", "vc2.cli", "run", "miniature", *settings]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return time.monotonic() - began


def _kept_busy(api: Api, seconds: float) -> dict[str, float]:
    """How many answers a busy server gives, and how long they take."""
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(3) as callers:
        kept = [callers.submit(_automate, api, until), callers.submit(_automate, api, until)]
        kept.append(callers.submit(_poll, api, until))
        took = [second for caller in kept for second in caller.result()]
    return {
        "answers": len(took),
        "median_s": round(statistics.median(took), 3),
        "longest_s": round(max(took), 2),
    }


def _automate(api: Api, until: float) -> list[float]:
    took: list[float] = []
    while time.monotonic() < until:
        name = f"bench.{uuid4()}"
        queue = _timed(took, api.post, f"/work_pools/{POOL}/queues", {"name": name})
        action = {"type": "pause-work-queue", "source": "selected", "work_queue_id": queue["id"]}
        trigger = {"type": "event", "posture": "Reactive", "expect": [name], "threshold": 1, "within": 0}
        made = _timed(took, api.post, "/automations/", {"name": name, "trigger": trigger, "actions": [action]})
        for _ in range(5):
            resource = {"prefect.resource.id": name}
            event = {"id": str(uuid4()), "occurred": datetime.now(UTC).isoformat(), "event": name, "resource": resource}
            _timed(took, api.post, "/events", [event])
        _timed(took, api.delete, f"/automations/{made['id']}")
        _timed(took, api.delete, f"/work_pools/{POOL}/queues/{name}")
    return took


def _poll(api: Api, until: float) -> list[float]:
    took: list[float] = []
    while time.monotonic() < until:
        _timed(took, api.post, f"/work_pools/{POOL}/get_scheduled_flow_runs", {"work_queue_names": list(QUEUES)})
        time.sleep(0.15)
    return took


def _timed(took: list[float], ask: Callable[..., Any], *asked: Any) -> Any:
    began = time.monotonic()
    answer = ask(*asked)
    took.append(time.monotonic() - began)
    return answer


if __name__ == "__main__":
    sys.exit(main())
