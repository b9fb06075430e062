"""Entry of a training rank: `python -m vc2.train.rank REQUEST.json` under torchrun, Slurm, or alone.

Sets everything up, tells the story (`vc2.train.loop`), and on the first rank makes the last state a checkpoint.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vc2.artifacts import load_manifest
from vc2.data.config import LoaderConfig
from vc2.data.loader import Loader
from vc2.errors import ConfigError
from vc2.launch import cpu_count, report, run_rank, this_rank
from vc2.model.lora import add_lora
from vc2.model.partition import trainable_names
from vc2.model.schedule import NoiseSchedule
from vc2.model.unet import UNet3D
from vc2.seeding import derive_seed
from vc2.storage import Store, open_store
from vc2.train.attempts import Run, StateRef
from vc2.train.config import TrainStage
from vc2.train.ema import Ema
from vc2.train.encode import Batches, Encoders
from vc2.train.engine import create_engine, join_ranks, leave_ranks
from vc2.train.export import commit_checkpoint
from vc2.train.loop import StopSignal, Trainer
from vc2.train.metrics import Metrics, read_metrics
from vc2.train.objective import best_linear_loss
from vc2.train.parts import (
    build_autoencoder,
    build_text_encoder,
    build_unet,
    check_unchanged,
    digest_of_tensors,
    parameter_counts,
)
from vc2.train.request import MODEL_CONFIG, RankRequest
from vc2.train.states import StateWriter, restore

__all__ = ["main"]


def main(request_path: str) -> None:
    """Train as the request says; the first rank commits the checkpoint."""
    stop = StopSignal()
    request = RankRequest.model_validate_json(Path(request_path).read_text())
    store = open_store(request.store)
    loader = _loader(request, store)
    trainer = _set_up(request, store, loader, stop)
    frozen_digest = digest_of_tensors(_frozen(trainer))
    try:
        trainer.train()
    finally:
        trainer.batches.close()
        loader.close()
    check_unchanged(frozen_digest, digest_of_tensors(_frozen(trainer)), "frozen parameters")
    if trainer.rank.is_first:
        _commit(request, trainer, loader, frozen_digest)
    leave_ranks()


def _set_up(request: RankRequest, store: Store, loader: Loader, stop: StopSignal) -> Trainer:
    """Everything of this rank, ready to take the next step."""
    config, layout, rank, work = request.stage, request.layout, this_rank(), Path(request.work)
    run = Run(store, config.name, request.fingerprint)
    torch.set_num_threads(layout.threads)
    torch.use_deterministic_algorithms(config.deterministic)
    device = _device(config, rank.local_rank)
    join_ranks(device)

    unet = build_unet(request, store, work)
    learning = _learning(unet, config)
    if rank.is_first:
        counts = parameter_counts(unet, frozenset(learning))
        groups = {name: counts[name] for name in ("spatial", "temporal", "image", "lora") if name in counts}
        report(f"train/{config.name} learns", counts["trainable"], counts["total"], **groups)
    engine = create_engine(unet.to(device).train(), learning, config, micro_batch=layout.micro_batch)
    ema = Ema(engine.shard("master"), config.ema_decay)
    step, metrics = 0, Metrics(start_step=0)
    if request.start is not None:
        state = run.manifest(request.start)
        restore(run, state, engine, ema, rank, work)
        step, metrics = state.step, Metrics.resumed(state.step, state.window)

    autoencoder = build_autoencoder(config, request.autoencoder, store, work)
    encoders = Encoders(autoencoder, build_text_encoder(request, store, work), device, config.cache_mib * 2**20)
    return Trainer(
        config=config,
        run=run,
        attempt=request.attempt,
        layout=layout,
        rank=rank,
        device=device,
        engine=engine,
        ema=ema,
        schedule=NoiseSchedule(config.model.schedule),
        batches=Batches(
            loader,
            encoders,
            rank.rank,
            rank.world_size,
            threads=loader.config.threads,
            memory_bytes=loader.config.prefetch_mib * 2**20,
        ),
        writer=StateWriter(run, request.attempt, layout, rank, work, config.keep_states),
        metrics=metrics,
        stop=stop,
        step=step,
    )


def _learning(unet: UNet3D, config: TrainStage) -> list[str]:
    """Names of the parameters that learn; low-rank updates are put in place first."""
    strategy = config.strategy
    if strategy.lora is None:
        return trainable_names(unet, strategy.trainable)
    torch.manual_seed(derive_seed(config.seed, "low-rank updates"))
    return add_lora(unet, strategy.lora, strategy.trainable)


def _frozen(trainer: Trainer) -> dict[str, Tensor]:
    named = trainer.engine.module.named_parameters()
    return {name: parameter for name, parameter in named if not parameter.requires_grad}


def _commit(request: RankRequest, trainer: Trainer, loader: Loader, frozen_digest: str) -> None:
    """Make the last state a checkpoint."""
    run, unet = trainer.run, trainer.engine.module
    assert isinstance(unet, UNet3D)
    trained = frozenset(name for name, parameter in unet.named_parameters() if parameter.requires_grad)
    lines = read_metrics(run.store, run.stage, run.fingerprint)
    commit_checkpoint(
        request,
        run,
        run.manifest(StateRef(attempt=request.attempt, step=trainer.step)),
        unet,
        trained,
        Path(request.work),
        counts={f"{name}_parameters": count for name, count in parameter_counts(unet, trained).items()},
        facts=_facts(trainer, lines) | {"frozen_digest": frozen_digest},
        licenses=_licenses(request, run.store),
        fps=loader.image_fps,
        seconds=round(sum(line["seconds"] for line in lines), 1),
    )


def _device(config: TrainStage, local_rank: int) -> torch.device:
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch finds no GPU; take device=auto or cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _loader(request: RankRequest, store: Store) -> Loader:
    config = request.stage
    share = config.image_share if request.videos and request.images else 0.0  # of one kind alone, it takes all
    loader = config.loader
    settings = LoaderConfig(
        **dict(
            loader.evolve(
                threads=min(loader.threads, cpu_count()), cache_dir=loader.cache_dir or f"{request.work}/data"
            )
        ),
        batch_size=config.batch_size,
        image_share=share,
        seed=config.seed,
    )
    rates = None if request.videos else _rates_told_before(request, store)
    return Loader(store, request.videos, request.images, settings, image_fps=rates)


def _rates_told_before(request: RankRequest, store: Store) -> dict[int, int] | None:
    """Frame rates that the network was told when the checkpoint that training starts from was made."""
    if request.start_from is None:
        return None
    file = load_manifest(store, request.start_from.prefix).file(MODEL_CONFIG)
    return {int(rate): weight for rate, weight in json.loads(store.read(file.key)).get("fps", {}).items()} or None


def _facts(trainer: Trainer, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What is worth knowing of a finished run and not part of its content."""
    last = lines[-max(1, len(lines) // 10) :]  # the last tenth of the curve
    window = trainer.metrics.window  # for runs too short to have one
    power = _mean([line["latent_power"] for line in last] or [figures.latent_power for figures in window])
    return {
        "final_loss": _mean([line["loss"] for line in last] or [figures.loss for figures in window]),
        "trivial_loss": 1.0,  # of predicting zero
        "linear_loss": best_linear_loss(trainer.schedule, power),  # of the best multiple of the input
        "latent_power": power,
        "layout": trainer.layout.model_dump(),
        "device": trainer.device.type,
        "engine": type(trainer.engine).__name__,
        "attempt": trainer.attempt,
    }


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def _licenses(request: RankRequest, store: Store) -> dict[str, str]:
    found: dict[str, str] = {}
    for origin in (*request.videos, *request.images, request.start_from):
        if origin is not None:
            found |= load_manifest(store, origin.prefix).licenses
    return found


if __name__ == "__main__":
    run_rank(main)
