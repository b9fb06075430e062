"""What the training loop costs beside the arithmetic, and how fast the network trains where there is a GPU.

    python -m benchmarks.train                     # CPU: a narrow network, 2 clips of 4 frames, 128 x 128 pixels
    python -m benchmarks.train --device cuda       # GPU: the released network, 512 x 320 x 16, at most eight minutes

`loop`: a step of `Trainer` (draws, passes, agreement, AdamW, EMA, figures) beside bare forward + backward of the same
network on the same samples, the two taking turns; the optimizer and the average are told apart, since bare passes learn
nothing. `grid` (GPU): for micro-batches of 1 to 8, levels of activation checkpointing, torch.compile and deterministic
kernels: steps/s, MFU against the best matrix product measured in the same run, and the most memory. Each variant has a
process of its own; those that no longer fit, in memory or in time, are said to be left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vc2.artifacts import environment
from vc2.launch import Rank
from vc2.model.autoencoder import Autoencoder
from vc2.model.config import AutoencoderConfig, ModelConfig, Recompute, TextConfig, UNetConfig
from vc2.model.partition import trainable_names
from vc2.model.schedule import NoiseSchedule
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D
from vc2.storage import LocalStore
from vc2.train.attempts import Attempt, Run, this_process
from vc2.train.config import Layout, TrainStage
from vc2.train.ema import Ema
from vc2.train.encode import Batches, Encoders
from vc2.train.engine import create_engine
from vc2.train.loop import StopSignal, Trainer
from vc2.train.memory import Clip, count_pass
from vc2.train.metrics import Metrics
from vc2.train.states import StateWriter

__all__ = ["main"]

BUDGET = 480.0  # seconds for a grid


@dataclass(frozen=True)
class _Sample:
    kind: str
    position: int
    key: str
    caption: str = "a thing that moves"
    fps: int = 8

    @property
    def identity(self) -> str:
        return self.key


class _Samples:
    """The same clips again and again: encoded once, remembered afterwards."""

    def __init__(self, batch: int, frames: int, height: int, width: int) -> None:
        self._batch, self._shape = batch, (frames, height, width, 3)

    def refs(self, step: int, rank: int, world_size: int) -> list[_Sample]:
        return [_Sample("video", step * self._batch + place, f"clip-{place}") for place in range(self._batch)]

    def read(self, ref: _Sample) -> tuple[_Sample, np.ndarray]:
        return ref, np.random.default_rng(0).integers(0, 256, self._shape, np.uint8)


def trainer(
    folder: Path, device: torch.device, *, width: int, micro_batch: int, size: tuple[int, int, int],
    recompute: Recompute = "none", precision: str = "fp32",
) -> Trainer:  # fmt: skip
    """A run of one rank whose states are never due."""
    small = AutoencoderConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=4)
    text = TextConfig(width=1024, heads=16, layers=2, layers_used=2, context_length=77, seed=0)
    unet = UNetConfig(model_channels=width, gradient_checkpointing=recompute)
    config = TrainStage(
        model=ModelConfig(unet=unet, autoencoder=small, text=text), batch_size=micro_batch, precision=precision,
        num_steps=10**6, log_every=10, state_every_seconds=1e9, device=device.type, tensorboard=False,
    )  # fmt: skip
    torch.manual_seed(0)
    network = UNet3D(unet).to(device).train()
    engine = create_engine(network, trainable_names(network, "all"), config, micro_batch=micro_batch)
    encoders = Encoders(Autoencoder(small), TextEncoder(text), device, 2**30)
    run = Run(LocalStore(folder / "store"), "full", "b" * 64)
    layout, rank = Layout(world_size=1, micro_batch=micro_batch, threads=1), Rank(0, 1, 0)
    run.claim(Attempt(number=1, start=None, layout=layout, holder=this_process(), heartbeat_seconds=60))
    return Trainer(
        config=config, run=run, attempt=1, layout=layout, rank=rank, device=device, engine=engine,
        ema=Ema(engine.shard("master"), 0.9999), schedule=NoiseSchedule(config.model.schedule),
        batches=Batches(_Samples(micro_batch, *size), encoders, 0, 1),
        writer=StateWriter(run, 1, layout, rank, folder, 2), metrics=Metrics(0), stop=StopSignal(),
    )  # fmt: skip


def loop_overhead(device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of a step, of bare passes, of the optimizer with the average; the least of some turns each."""
    size, batch, width = ((16, 320, 512), 2, 320) if device.type == "cuda" else ((4, 128, 128), 2, 64)
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(Path(folder), device, width=width, micro_batch=batch, size=size)
        made.train = lambda: None  # type: ignore[method-assign] - its parts are called one by one
        from vc2.train.stragglers import Stragglers

        made._stragglers = Stragglers(["here"])
        latents = made.batches.at(0).moments[:, :4].to(device)
        inputs = (latents, torch.full((batch,), 500, device=device), made.batches.at(0).text.to(device))
        rates = made.batches.at(0).fps.to(device)

        def step() -> None:
            made._beat()
            made._take_step()
            if made.step % made.config.log_every == 0:
                made._log()

        def bare() -> None:
            made.engine.backward(made.engine.forward(*inputs, rates).float().square().mean())

        def learn() -> None:
            made.engine.step(1e-5)
            made.ema.update(made.engine.shard("master"))

        seconds = {"step": [], "bare": [], "learn": []}
        for _ in range(repeats + 1):
            for name, work in (("bare", bare), ("learn", learn), ("step", step)):
                seconds[name].append(timed(work, device))
    least = {name: min(values[1:]) for name, values in seconds.items()}
    rest = least["step"] - least["bare"] - least["learn"]
    return least | {"loop share": rest / least["bare"], "learn share": least["learn"] / least["bare"]}


def timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ceiling(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    return 2 * side**3 / min(timed(lambda: left @ left, device) for _ in range(10))


def variant(job: dict[str, Any]) -> dict[str, float]:
    """One line of the grid, in a process of its own."""
    device = torch.device(job["device"])
    torch.use_deterministic_algorithms(job["deterministic"])
    size, width = ((16, 320, 512), 320) if device.type == "cuda" else ((4, 64, 64), 64)
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(
            Path(folder), device, width=width, micro_batch=job["micro_batch"], size=size, recompute=job["recompute"],
            precision="bf16",
        )  # fmt: skip
        if job["compiled"]:
            made.engine.module.compile()
        for _ in range(3):
            made._take_step()
        seconds = min(timed(made._take_step, device) for _ in range(5))
        model = made.config.model.evolve(unet=made.config.model.unet.evolve(gradient_checkpointing="none"))
        count = count_pass(model, made.config.strategy, Clip(*size), precision="fp32", stills=False)
        flops = job["micro_batch"] * (count.forward_flops + count.backward_flops)
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return {"seconds": seconds, "clips_per_s": job["micro_batch"] / seconds, "tflops": flops / seconds / 1e12,
            "mfu": flops / seconds / ceiling(device), "memory_gib": memory}  # fmt: skip


def grid(device: str) -> list[dict[str, Any]]:
    """All variants that fit into the time."""
    plain = {"device": device, "recompute": "none", "compiled": False, "deterministic": False}
    jobs = [plain | {"micro_batch": size} for size in (1, 2, 4, 8)]
    jobs += [plain | {"micro_batch": 4, "recompute": level} for level in ("selective", "full")]
    jobs += [plain | {"micro_batch": 8, "recompute": "full"}]
    jobs += [plain | {"micro_batch": 2, "deterministic": True}, plain | {"micro_batch": 2, "compiled": True}]
    until, lines = time.monotonic() + BUDGET, []
    for job in jobs:
        left = until - time.monotonic()
        if left < 30:
            lines.append(job | {"left_out": "no time"})
            continue
        command = [sys.executable, "-m", "benchmarks.train", "--variant", json.dumps(job)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            lines.append(job | {"left_out": "no time"})
            continue
        if done.returncode:
            why = "no memory" if "OutOfMemoryError" in done.stderr else done.stderr.strip().rsplit("\n", 1)[-1]
            lines.append(job | {"left_out": why})
        else:
            lines.append(job | json.loads(done.stdout.strip().rsplit("\n", 1)[-1]))
        print(json.dumps(lines[-1]), flush=True)
    return lines


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--repeats", type=int, default=4)
    options.add_argument("--grid", action="store_true", help="the grid on a CPU too, with a tiny network")
    options.add_argument("--variant", help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.variant:
        print(json.dumps(variant(json.loads(asked.variant))))
        return
    device = torch.device(asked.device)
    found = loop_overhead(device, asked.repeats)
    print(f"bare forward + backward {found['bare']:.3f} s; optimizer and average {found['learn']:.3f} s "
          f"({found['learn share']:.1%} of it); the rest of the loop {found['loop share']:.2%}")  # fmt: skip
    lines = grid(asked.device) if asked.grid or asked.device == "cuda" else []
    results = Path("benchmarks/results")
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"train-{asked.device}-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps({"loop": found, "grid": lines, "environment": environment()}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
