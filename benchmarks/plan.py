"""How long `vc2 plan` takes on a store with 10,000 artifacts, as a process from its start to its end.

`python -m benchmarks.plan` fills a store through `commit` with artifacts of all kinds, whose settings differ a little
from those of the recipes, and then plans the miniature and the paper's recipe, for which small tables stand in as raw
data. On a folder; with `--s3` on an S3 server on loopback too. It writes `benchmarks/results/plan-<date>.json`; the
limit is 3 s.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vc2.artifacts import Artifact, Manifest, commit, environment
from vc2.config import digest
from vc2.launch import cpu_count
from vc2.pipeline.driver import DAG, Node
from vc2.pipeline.recipes import PipelineConfig, resolve
from vc2.ports import free_port
from vc2.storage import Store, open_store

__all__ = ["fill", "main", "raw_data"]

LIMIT = 3.0  # seconds
PLACES = {"shard_set": "shards/{source}", "checkpoint": "runs/{stage}", "report": "reports"}


def raw_data(root: Path) -> None:
    """Small tables where the paper's recipe looks for raw data."""
    (root / "webvid/videos").mkdir(parents=True)
    (root / "webvid/results_10M_train.csv").write_text("videoid,name,page_dir,contentUrl\n1,a boat,p,http://x/1.mp4\n")
    (root / "laion-coco").mkdir()
    pq.write_table(pa.table({"URL": ["http://x/1.jpg"], "TEXT": ["a cat"]}), root / "laion-coco/0.parquet")
    (root / "jdb/data/train/imgs").mkdir(parents=True)
    (root / "jdb/data/train/train_anno_realease_repath.jsonl.tgz").write_bytes(b"not read here")
    (root / "jdb/data/train/imgs/000.tgz").write_bytes(b"not read here")
    (root / "evalcrafter").mkdir()
    (root / "evalcrafter/prompts.jsonl").write_text('{"id": "0000", "prompt": "a boat at sea"}\n')


def fill(store: Store, configs: Mapping[str, PipelineConfig], count: int) -> None:
    """Commit so many artifacts: stage after stage of each recipe under many seeds, made from others of its seed."""
    seeds = range(1, 1 + -(-count // (len(DAG) * len(configs))))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: [_commit_all(store, config, seed) for config in configs.values()], seeds))


def _commit_all(store: Store, config: PipelineConfig, seed: int) -> None:
    made: dict[str, Artifact] = {}
    for node in DAG:
        asked = getattr(config, node.field).evolve(seed=seed)
        inputs = {role: made[name] for role, name in node.inputs.items()}
        made[node.name] = commit(store, *_artifact(node, asked, inputs, seed))


def _artifact(node: Node, asked: Any, inputs: Mapping[str, Artifact], seed: int) -> tuple[str, Manifest]:
    name = digest([node.name, asked.identity(), {role: artifact.fingerprint for role, artifact in inputs.items()}])
    first, _, second = node.name.partition("/")
    kinds = {"shard": "shard_set", "train": "checkpoint", "evaluate": "report"}
    kind: Any = kinds[first]
    place = PLACES[kind].format(stage=second, source=asked.source.name if first == "shard" else "")
    facts: dict[str, Any] = {}
    if first == "shard":
        facts = {
            "source": second,
            "seconds": {"fetch": 60.0, "build": 30.0},
        }
    elif first == "train":
        facts = {"device": "cpu", "layout": {"world_size": 2, "micro_batch": 4, "threads": 1}}
    return f"{place}/{name}{f'/checkpoints/{asked.num_steps:08d}' if first == 'train' else ''}", Manifest(
        kind=kind,
        stage={"shard": "shard", "train": second, "evaluate": node.name}[first],
        stage_version=node.version,
        fingerprint=name,
        config=asked.model_dump(mode="json"),
        inputs=dict(inputs),
        files=(),
        counts={"rows": 1000, "samples": 900} if first == "shard" else {"steps": 100, "videos": 16},
        facts=facts,
        environment={"python": platform.python_version()},
        created_at=(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seed)).isoformat(),
        seconds=100.0,
    )


@contextmanager
def s3_on_loopback() -> Iterator[str]:
    """A bucket of an S3 server of its own, with boto3's environment variables set."""
    port = free_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(
                    urllib.request.Request(f"http://127.0.0.1:{port}/bench", method="PUT"), timeout=5
                )
                break
            except OSError:
                time.sleep(0.2)
        yield "s3://bench/store"
    finally:
        server.terminate()
        server.wait()


def timed(recipe: str, store: str, work: Path, rounds: int) -> dict[str, Any]:
    """Seconds of `vc2 plan` by the clock on the wall and of the processor, the best of some rounds."""
    command = [sys.executable, "-m", "vc2.cli", "plan", recipe, "--store", store, "--work", str(work), "--json"]
    best, cpu, told = float("inf"), 0.0, ""
    for _ in range(rounds):
        started, before = time.perf_counter(), os.times()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        told = done.stdout
        if (taken := time.perf_counter() - started) < best:
            after = os.times()
            best = taken
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
    why = [stage["why"] for stage in json.loads(told)["stages"]]
    return {"recipe": recipe, "seconds": round(best, 2), "cpu_seconds": round(cpu, 2), "limit": LIMIT, "why": why}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.plan", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--artifacts", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--s3", action="store_true", help="on an S3 server on loopback too, which takes minutes to fill"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    os.environ.pop("VC2_STORE", None)
    figures = []
    with tempfile.TemporaryDirectory(prefix="vc2-bench-") as folder:
        work = Path(folder) / "work"
        raw_data(Path(folder) / "raw")
        settings = {"evaluation": {"unmeasured": "allow"}}
        configs = {recipe: resolve(recipe, settings, work=work) for recipe in ("miniature", "paper")}

        def measure(where: str, uri: str) -> None:
            started = time.perf_counter()
            fill(open_store(uri), configs, options.artifacts)
            print(f"{where}: {options.artifacts} artifacts in {time.perf_counter() - started:.0f} s", flush=True)
            for recipe in configs:
                figure = {"store": where, **timed(recipe, uri, work, options.rounds)}
                figures.append(figure)
                print(f"{where:6} {recipe:10} {figure['seconds']:6.2f} s, at most {LIMIT}", flush=True)

        measure("local", f"{folder}/store")
        if options.s3:
            with s3_on_loopback() as uri:
                measure("s3", uri)
    report = {
        "command": "python -m benchmarks.plan",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpus": cpu_count(), "machine": platform.machine(), "system": platform.platform()},
        "environment": environment(),
        "artifacts": options.artifacts,
        "rounds": options.rounds,
        "figures": figures,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"plan-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
