"""How long training waits for a train state, and how fast the state is written, beside raw copies of the same bytes.

`python -m benchmarks.states` trains nothing: it takes states of a network of random weights, 100 million by default,
float32 on the CPU, and writes `benchmarks/results/states-<date>.json`. All figures are in GB/s, the best of a few
rounds, in turns with their limit:

    snapshot    the four kinds into host memory, which is all that training waits for   limit: one tensor of that size
    write       from host memory into the store, with digests, until the manifest       limit: plain files beside it,
                                                                                        down to the disk
    by a file   the same by way of local files that are then sent: what it would cost   limit: as before
    read        back into the engine, every digest checked                              limit: the files read once
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vc2.artifacts import environment
from vc2.config import Config
from vc2.launch import Rank, cpu_count
from vc2.storage import Store, open_store
from vc2.train.attempts import Attempt, Run, this_process
from vc2.train.config import Layout, TrainStage
from vc2.train.ema import Ema
from vc2.train.engine import PlainEngine
from vc2.train.fragments import KINDS, write_fragments
from vc2.train.states import StateWriter, restore

__all__ = ["main"]

GB = 1e9


class Figure(Config):
    """A measured rate and what was possible at most, in GB/s."""

    name: str
    value: float
    limit: float

    @property
    def ratio(self) -> float:
        return self.value / self.limit


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(parameters: int, store: Store, folder: Path, rounds: int) -> tuple[list[Figure], dict[str, float]]:
    """All figures, and the seconds of the best rounds."""
    width = int((parameters / 16) ** 0.5)
    module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(16)))
    stage = TrainStage(precision="fp32", device="cpu")
    engine = PlainEngine(module, dict(module.named_parameters()), stage, passes=1)
    ema = Ema(engine.shard("master"), stage.ema_decay)
    layout, rank = Layout(world_size=1, micro_batch=1, threads=1), Rank(0, 1, 0)
    run = Run(store, "bench", f"{time.time_ns():064x}")
    assert run.claim(Attempt(number=1, start=None, layout=layout, holder=this_process(), heartbeat_seconds=60))
    writer = StateWriter(run, 1, layout, rank, folder, keep=1)
    size = 4 * engine.shard("master").numel() * len(KINDS)
    raw_from = torch.cat([engine.shard(kind) if kind != "ema" else ema.shard for kind in KINDS])
    raw_to = raw_from.clone()
    best: dict[str, float] = {}

    def note(name: str, seconds: float) -> None:
        best[name] = min(seconds, best.get(name, seconds))

    def save(step: int) -> None:
        writer.save(engine, ema, {"step": step, "samples": 0}, (run.metrics_key(1, 0), b""))

    def raw_write() -> None:
        for number, part in enumerate(raw_from.chunk(len(KINDS))):
            with open(folder / "raw-new", "wb") as file:  # beside the old one, as a store does it
                file.write(part.numpy().data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(folder / "raw-new", folder / f"raw-{number}")

    def raw_read() -> None:
        view = raw_to.numpy().data.cast("B")
        for number in range(len(KINDS)):
            with open(folder / f"raw-{number}", "rb", buffering=0) as file:
                share = size // len(KINDS)
                while count := file.readinto(view[number * share : (number + 1) * share]):
                    if count == share:
                        break

    def by_a_file() -> None:
        for kind in KINDS:
            path = folder / f"passing-{kind}"
            write_fragments(path, engine.fragments(ema.shard if kind == "ema" else engine.shard(kind)))
            store.upload(path, f"bench/{kind}")
            path.unlink()

    def read() -> None:
        restore(run, run.manifest(next(run.states())), engine, ema, rank, folder)

    save(0)  # takes the memory
    writer.wait()
    for number in range(1, rounds + 1):
        note("raw copy", _seconds(lambda: raw_to.copy_(raw_from)))
        note("snapshot", _seconds(lambda number=number: save(number)))
        writer.wait()
        note("raw write", _seconds(raw_write))
        started = time.perf_counter()
        save(100 + number)
        copied = time.perf_counter()
        writer.wait()
        note("write", time.perf_counter() - copied)
        note("stall", copied - started)
        note("by a file", _seconds(by_a_file))
        note("raw read", _seconds(raw_read))
        note("read", _seconds(read))
    limits = {"snapshot": "raw copy", "write": "raw write", "by a file": "raw write", "read": "raw read"}
    figures = [
        Figure(name=name, value=size / best[name] / GB, limit=size / best[limit] / GB) for name, limit in limits.items()
    ]
    return figures, best | {"bytes": float(size)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure train states on this machine.")
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--store", default="", help="where states go (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="vc2-bench-") as folder:
        store = open_store(options.store or f"{folder}/store")
        figures, seconds = measure(options.parameters, store, Path(folder), options.rounds)
    now = datetime.now(UTC)
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.states --parameters {options.parameters}",
        "store": "s3" if options.store.startswith("s3://") else "local folder",
        "date": now.isoformat(timespec="seconds"),
        "machine": {"cores": cpu_count(), "processor": platform.machine(), "load_at_start": round(load, 2)},
        "figures": [figure.model_dump() | {"ratio": round(figure.ratio, 3)} for figure in figures],
        "seconds": seconds,
        "environment": environment(),
    }
    print(f"a state of {seconds['bytes'] / GB:.2f} GB; training waits {seconds['snapshot']:.3f} s for it")
    print(f"{'':16} {'measured':>12} {'limit':>12}  ratio")
    for figure in figures:
        print(f"{figure.name:16} {figure.value:12.2f} {figure.limit:12.2f}  {figure.ratio:5.2f}  GB/s")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"states-{now:%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
