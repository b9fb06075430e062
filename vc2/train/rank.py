"""Entry of a training rank: `python -m vc2.train.rank REQUEST` (path or URI) under torchrun, Ray, or alone.

Sets everything up, tells the story (`vc2.train.loop`), and on the first rank makes the last state a checkpoint.
"""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vc2.data.loader import Loader, SampleRef
from vc2.launch import end_rank, report, run_rank, this_rank
from vc2.model.schedule import NoiseSchedule
from vc2.storage import Store, join_uri, open_store
from vc2.train.attempts import Run, StateRef
from vc2.train.clock import Clock
from vc2.train.config import TrainStage
from vc2.train.curves import Curves
from vc2.train.ema import Ema
from vc2.train.encode import Batches, Encoders
from vc2.train.engine import create_engine, device_of, join_ranks, leave_ranks
from vc2.train.export import export_state, open_loader
from vc2.train.loop import StopSignal, Trainer
from vc2.train.metrics import Metrics
from vc2.train.objective import Batch
from vc2.train.parts import (
    build_autoencoder,
    build_text_encoder,
    build_unet,
    check_unchanged,
    digest_of_tensors,
    parameter_counts,
    put_learning,
)
from vc2.train.request import RankRequest
from vc2.train.spikes import Spikes
from vc2.train.states import StateWriter, restore
from vc2.train.validate import Validator
from vc2.train.watchdog import Watchdog

__all__ = ["main"]


def main(request_uri: str) -> None:
    """Train as the request says; the first rank commits the checkpoint."""
    stop = StopSignal()
    request = RankRequest.load(request_uri)
    store = open_store(request.store)
    loader = open_loader(request, store)
    trainer = _set_up(request, store, loader, stop)
    frozen_digest = digest_of_tensors(_frozen(trainer))
    try:
        with _watchdog(request, trainer) as trainer.watchdog:
            trainer.train()
    finally:
        trainer.batches.close()
        loader.close()
        if trainer.curves:
            trainer.curves.close()
    check_unchanged(frozen_digest, digest_of_tensors(_frozen(trainer)), "frozen parameters")
    if trainer.rank.is_first:
        state = trainer.run.manifest(StateRef(attempt=request.attempt, step=trainer.step))
        facts = {"device": trainer.device.type, "engine": type(trainer.engine).__name__}
        if trainer.device.type == "cuda":
            facts["gpu"] = torch.cuda.get_device_name(trainer.device)
        export_state(request, trainer.run, state, Path(request.work), facts=facts, frozen_digest=frozen_digest)
    leave_ranks()


def _set_up(request: RankRequest, store: Store, loader: Loader, stop: StopSignal) -> Trainer:
    """Everything of this rank, ready to take the next step."""
    clock = Clock()
    config, layout, rank, work = request.stage, request.layout, this_rank(), Path(request.work)
    run = Run(store, config.name, request.fingerprint)
    torch.set_num_threads(layout.threads)
    torch.use_deterministic_algorithms(config.deterministic)
    device = device_of(config, rank.local_rank)
    join_ranks(device, config.hang_seconds)

    unet = build_unet(request, store, work)
    learning = put_learning(unet, request)
    if rank.is_first:
        counts = parameter_counts(unet, frozenset(learning))
        groups = {name: counts[name] for name in ("spatial", "temporal", "image", "lora") if name in counts}
        report(f"train/{config.name} learns", counts["trainable"], counts["total"], **groups)
    if config.compile:
        unet.compile()
    engine = create_engine(unet.to(device).train(), learning, config, micro_batch=layout.micro_batch)
    ema = Ema(engine.shard("master"), config.ema_decay)
    peak = _peak_flops(config, device)
    step, updates, metrics, remembered = 0, 0, Metrics(start_step=0), {}
    if request.start is not None:
        state = run.manifest(request.start)
        restore(run, state, engine, ema, rank, work)
        step, updates, metrics = state.step, state.updates, Metrics.resumed(state.step, state.window)
        remembered = state.loop

    autoencoder = build_autoencoder(config, request.autoencoder, store, work)
    encoders = Encoders(autoencoder, build_text_encoder(request, store, work), device, config.cache_mib * 2**20)
    schedule = NoiseSchedule(config.model.schedule)
    batches = Batches(
        loader,
        encoders,
        rank.rank,
        rank.world_size,
        threads=loader.config.threads,
        memory_bytes=loader.config.prefetch_mib * 2**20,
        phase_of=config.phase_at,
        patience=min(config.outage_seconds, config.hang_seconds / 2),  # the others wait, and must not call it a hang
    )
    return Trainer(
        config=config,
        run=run,
        attempt=request.attempt,
        layout=layout,
        rank=rank,
        device=device,
        engine=engine,
        ema=ema,
        schedule=schedule,
        batches=batches,
        writer=StateWriter(
            run,
            request.attempt,
            layout,
            rank,
            work,
            config.keep_states,
            keep_every=config.keep_every_steps,
            outage_seconds=config.outage_seconds,
            overlap=True,
            patience=config.hang_seconds / 2,  # the others wait, and must not call it a hang
        ),
        metrics=metrics,
        stop=stop,
        step=step,
        updates=updates,
        skipped_in_row=int(remembered.get("skipped_in_row", 0)),
        clock=clock,
        spikes=Spikes(config.spikes, remembered) if config.spikes else None,
        validator=Validator(
            config=config,
            run=run,
            rank=rank,
            device=device,
            engine=engine,
            schedule=schedule,
            encoders=encoders,
            batches=batches,
            refs=_looked_at(loader, config.validation.clips),
            clip_size=_clip_size(loader, config),
            fps=loader.image_fps,
        )
        if config.validation.every
        else None,
        curves=_curves(request, work, step) if rank.is_first else None,
        flops=_flops_of(request) if rank.is_first and peak else None,
        peak_flops=peak or math.inf,
        replaced=lambda: loader.replaced,
    )


def _flops_of(request: RankRequest) -> Callable[[Batch], float]:
    """Counts what a batch takes, forward and backward, by the network alone and without recomputation (MFU's terms)."""
    from vc2.train.estimate import useful_flops
    from vc2.train.fit import Clip

    config = request.stage

    @cache
    def of_sample(frames: int, height: int, width: int) -> int:
        return useful_flops(config, Clip(frames, height, width), stills=request.of_stills)[0]

    def of_batch(batch: Batch) -> float:
        frames, *size = batch.moments.shape[2:]
        height, width = (config.model.autoencoder.downsampling * side for side in size)
        return float(len(batch) * of_sample(frames, height, width))

    return of_batch


def _peak_flops(config: TrainStage, device: torch.device) -> float | None:
    """What the device could do in a second at best; None: not known, so no MFU is told."""
    if config.peak_tflops or device.type != "cuda":
        return config.peak_tflops and config.peak_tflops * 1e12
    from vc2.train.estimate import HARDWARE

    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    share = 1.0 if config.precision == "bf16" else 0.5  # of the peak in bf16: what TF32 can do
    return next((share * gpu.tflops * 1e12 for kind, gpu in HARDWARE.items() if kind.split("-")[0] in name), None)


def _looked_at(loader: Loader, count: int) -> list[SampleRef]:
    """Samples of validations: those kept out of training, else some of those trained on; of each kind as many."""
    shares = {"video": 1 - loader.share, "image": loader.share}
    kinds: list[Literal["video", "image"]] = [
        kind for kind, split in loader.splits.items() if len(split) and shares[kind]
    ]
    found: list[SampleRef] = []
    each = max(1, count // len(kinds))
    for kind in kinds:
        held = loader.held_out(kind)
        step = 0
        while not loader.config.holdout and len(held) < each:
            held += loader.refs(step) if loader.kind(step) == kind else []
            step += 1
        found += held[:each]
    return found


def _clip_size(loader: Loader, config: TrainStage) -> tuple[int, int, int]:
    """Frames, height and width of the videos made for the eyes: those of the last phase, else of the shards."""
    split = loader.splits["video"] if len(loader.splits["video"]) else loader.splits["image"]
    (frames,), (width,), (height,) = split.sets[0].rows.forms()
    if split.kind == "image":
        frames = config.model.unet.temporal_length
    phase = config.last_phase
    return phase.num_frames or frames, phase.height or height, phase.width or width


def _curves(request: RankRequest, work: Path, step: int) -> Curves:
    config = request.stage
    return Curves(
        work / "tensorboard" if config.tensorboard else None,
        config.wandb_project,
        name=f"{config.name}-{request.fingerprint[:12]}",
        config=config.model_dump(mode="json"),
        step=step,
    )


def _watchdog(request: RankRequest, trainer: Trainer) -> Watchdog:
    run, rank = trainer.run, trainer.rank.rank

    def keep(stacks: bytes) -> str:
        key = f"{run.prefix}/attempts/{request.attempt:04d}.stacks-{rank}.txt"
        run.store.write(key, stacks)
        return join_uri(run.store.uri, key)

    return Watchdog(
        f"train/{run.stage}", request.stage.hang_seconds, keep=keep, end=end_rank, folder=Path(request.work) / "logs"
    )


def _frozen(trainer: Trainer) -> dict[str, Tensor]:
    named = trainer.engine.module.named_parameters()
    return {name: parameter for name, parameter in named if not parameter.requires_grad}


if __name__ == "__main__":
    run_rank(main)
