"""Several gloo ranks by forking: the modules are imported once. Run as a script by `test_ranks.py`, not by pytest.

Each scenario trains the small stage in a run of its own in the store given; the test compares what is left there.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import conftest
import deepspeed  # noqa: F401 - before forking
import torch

from vc2.launch import this_rank
from vc2.model.autoencoder import Autoencoder
from vc2.model.partition import trainable_names
from vc2.model.schedule import NoiseSchedule
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D
from vc2.ports import free_port
from vc2.seeding import derive_seed
from vc2.storage import LocalStore
from vc2.train.attempts import Attempt, Run, newest_state, this_process
from vc2.train.config import Layout, TrainStage
from vc2.train.ema import Ema
from vc2.train.encode import Batches, Encoders
from vc2.train.engine import create_engine, join_ranks, leave_ranks
from vc2.train.loop import StopSignal, Trainer
from vc2.train.metrics import Metrics
from vc2.train.states import StateWriter, restore


def forked(world_size: int, work: Callable[[], None]) -> None:
    """Do `work` on so many ranks; SystemExit if one fails."""
    port = free_port()
    pids = []
    for rank in range(world_size):
        if pid := os.fork():
            pids.append(pid)
            continue
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
        try:
            torch.set_num_threads(1)
            join_ranks(torch.device("cpu"), 60.0)
            work()
            leave_ranks()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed = [pid for pid in pids if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]
    if failed:
        raise SystemExit(f"{len(failed)} of {world_size} ranks failed")


def trainer_of(config: TrainStage, run: Run, number: int, folder: Path, poisoned: str = "") -> Trainer:
    """This rank's side of an attempt that was claimed."""
    rank, attempt = this_rank(), run.attempt(number)
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    unet = UNet3D(config.model.unet).train()
    names = trainable_names(unet, config.strategy.trainable)
    engine = create_engine(unet, names, config, micro_batch=attempt.layout.micro_batch)
    ema = Ema(engine.shard("master"), config.ema_decay)
    state = run.manifest(attempt.start) if attempt.start else None
    if state:
        restore(run, state, engine, ema, rank, folder)
    autoencoder = Autoencoder.from_safetensors(folder / "autoencoder.safetensors")
    encoders = Encoders(autoencoder, TextEncoder(conftest.TEXT), torch.device("cpu"), memory_bytes=2**24)
    moments = encoders.moments
    if poisoned:
        encoders.moments = lambda key, frames=None: moments(key, frames) * (float("nan") if key == poisoned else 1)
    return Trainer(
        config=config,
        run=run,
        attempt=number,
        layout=attempt.layout,
        rank=rank,
        device=torch.device("cpu"),
        engine=engine,
        ema=ema,
        schedule=NoiseSchedule(config.model.schedule),
        batches=Batches(conftest.RandomSamples(config.batch_size), encoders, rank.rank, rank.world_size),
        writer=StateWriter(run, number, attempt.layout, rank, folder, config.keep_states),
        metrics=Metrics.resumed(state.step, state.window) if state else Metrics(0),
        stop=StopSignal(),
        step=state.step if state else 0,
        updates=state.updates if state else 0,
    )


def train(config: TrainStage, run: Run, world_size: int, folder: Path, **more: Any) -> None:
    """One attempt on so many ranks, from the newest state."""
    state, _ = newest_state(run, at_most=config.num_steps)
    number = run.newest() + 1
    layout = Layout(world_size=world_size, micro_batch=config.batch_size // world_size, threads=1)
    start = state.ref if state else None
    claimed = Attempt(number=number, start=start, layout=layout, holder=this_process(), heartbeat_seconds=60)
    assert run.claim(claimed)

    def work() -> None:
        trainer = trainer_of(config, run, number, folder, **more)
        trainer.train()
        check_showing(trainer)

    forked(world_size, work)


def check_showing(trainer: Trainer) -> None:
    """Other weights are shown on every rank for a while, and the own ones come back bit for bit."""
    weights = dict(trainer.engine.module.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in weights.items()}
    with trainer.engine.showing(torch.zeros_like(trainer.engine.shard("master"))):
        assert not any(parameter.any() for parameter in weights.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in weights.items())


def main(stage_json: str, root: str, folder: str) -> None:
    stage, work = TrainStage.model_validate_json(stage_json), Path(folder)
    store = LocalStore(Path(root))

    def run(name: str) -> Run:
        return Run(store, stage.name, name)

    train(stage.evolve(zero_stage=0), run("zero-0"), 1, work)
    train(stage.evolve(zero_stage=1), run("zero-1"), 2, work)
    train(stage.evolve(zero_stage=2), run("zero-2"), 2, work)
    for steps, world_size in ((2, 1), (4, 2), (6, 4), (8, 1)):
        train(stage.evolve(num_steps=steps), run("resharded"), world_size, work)
    train(stage.evolve(zero_stage=0), run("poisoned-0"), 1, work, poisoned="image-3")
    train(stage.evolve(zero_stage=1), run("poisoned-1"), 2, work, poisoned="image-3")


if __name__ == "__main__":
    main(*sys.argv[1:])
