"""How fast the miniature's shard stage and training are on this machine, beside limits measured in the same run.

`python -m benchmarks.run` prints the figures and writes `benchmarks/results/<date>.json`.

    shard   clips/s of the whole build step on Ray, small clips   limit: a worker's own seconds, Ray aside
    train   clips/s of two ranks under ZeRO-1                     limit: plain torch steps of the same network, a thread
                                                                  a core

Data at its real size and beside its peers is in `benchmarks.data`, the loader in `benchmarks.loader`.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vc2.artifacts import ShardSet, environment, fingerprint, load_manifest
from vc2.config import Config
from vc2.launch import cpu_count
from vc2.pipeline.recipes import PipelineConfig, resolve, world_folder
from vc2.ray_session import ray_session
from vc2.storage import Store, open_store

__all__ = ["main"]


class Figure(Config):
    """A measured speed and what was possible at most, both in `unit`."""

    name: str
    unit: str
    value: float
    limit: float

    @property
    def ratio(self) -> float:
        return self.value / self.limit


def bench_train(config: PipelineConfig, store: Store, work: Path, videos: ShardSet) -> Figure:
    """Clips a second of stage `full` on videos, over the middle of a short run, and of plain torch steps."""
    from vc2.train.metrics import read_metrics
    from vc2.train.run import train

    stage = config.full.evolve(num_steps=60, image_share=0.0, log_every=5, state_every_seconds=3600)
    name = fingerprint("bench", 1, stage, {"at": datetime.now(UTC).isoformat()})
    train(stage, store, work, fingerprint=name, shards={"videos": videos})
    lines = read_metrics(store, stage.name, name)[3:]  # the first steps fill the caches
    value = statistics.median(line["samples_per_s"] for line in lines)
    share = stage.batch_size // (stage.world_size or 1)
    with ProcessPoolExecutor(cpu_count()) as pool:
        rates = list(pool.map(_step_limit, [(stage.model_dump_json(), share)] * cpu_count()))
    return Figure(name="train full", unit="clips/s", value=value, limit=sum(rates))


def _step_limit(job: tuple[str, int]) -> float:
    """Forward, backward and AdamW on random tensors: clips a second of one process with one thread."""
    import torch

    from vc2.model.unet import UNet3D
    from vc2.train.config import TrainStage

    text, clips = job
    stage = TrainStage.model_validate_json(text)
    torch.set_num_threads(1)
    unet = UNet3D(stage.model.unet).train()
    optimizer = torch.optim.AdamW(unet.parameters())
    latents = torch.randn(clips, 4, 8, 6, 10)
    tokens = torch.randn(clips, stage.model.text.context_length, stage.model.text.width)
    timesteps, fps = torch.randint(1000, (clips,)), torch.full((clips,), 8)

    def step() -> int:
        optimizer.zero_grad()
        (unet(latents, timesteps, tokens, fps=fps) - latents).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        return clips

    step()
    return _rate(lambda: sum(step() for _ in range(8)))


def _rate(work: Callable[[], int], repeats: int = 3) -> float:
    """Things a second: the median of a few runs."""
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        count = work()
        rates.append(count / (time.perf_counter() - started))
    return statistics.median(rates)


def bench_shards(config: PipelineConfig, store: Store, work: Path) -> tuple[Figure, ShardSet]:
    """Clips a second of the build step on Ray that is up and warm, and of one worker a core that does nothing else."""
    from vc2.data.build import build_shard
    from vc2.data.prepare import prepare

    stage = config.webvid
    prepare(stage, store, work, fingerprint=fingerprint("bench", 1, stage, {"warm": "up"}))
    again = stage.evolve(form=stage.form.evolve(jpeg_quality=94))  # another set from the same ledger: the build alone
    made = prepare(again, store, work, fingerprint=fingerprint("bench", 1, again, {}))
    assert made is not None
    manifest = load_manifest(store, made.prefix)
    item = {
        "config": again.model_dump_json(),
        "store": store.uri,
        "work": str(work),
        "prefix": made.prefix,
        "ledger": manifest.facts["generations"][0]["ledger"],
        "generation": 0,
        "plan_sha256": manifest.file("plan.parquet").sha256,
    }

    def alone() -> int:
        return sum(build_shard(item | {"shard": shard, "group": shard})["samples"] for shard in range(4))

    value = made.counts["samples"] / manifest.facts["seconds"]["build"]
    return Figure(name="shard", unit="clips/s", value=value, limit=_rate(alone) * cpu_count()), made


def run(work: Path) -> list[Figure]:
    """All figures; everything made lies in `work`."""
    from vc2.miniature.world import make_world

    config = resolve("miniature", work=work)
    assert config.world is not None
    make_world(config.world, world_folder(config.world, work))
    store = open_store(str(work / "store"))
    with ray_session():
        clips, videos = bench_shards(config, store, work)
    return [clips, bench_train(config, store, work, videos)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the pipeline on this machine.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="vc2-bench-") as folder:
        figures = run(Path(folder))
    now = datetime.now(UTC)
    result: dict[str, Any] = {
        "command": "make bench",
        "date": now.isoformat(timespec="seconds"),
        "machine": {"cores": cpu_count(), "processor": platform.machine(), "load_at_start": round(load, 2)},
        "figures": [figure.model_dump() | {"ratio": round(figure.ratio, 3)} for figure in figures],
        "environment": environment(),
    }
    print(f"{'':16} {'measured':>12} {'limit':>12}  ratio")
    for figure in figures:
        print(f"{figure.name:16} {figure.value:12.1f} {figure.limit:12.1f}  {figure.ratio:5.2f}  {figure.unit}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{now:%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
