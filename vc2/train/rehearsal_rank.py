"""Entry of a rank of a rehearsal: `python -m vc2.train.rehearsal_rank REQUEST`. See `vc2.train.rehearsal`."""

import socket
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from vc2.errors import LaunchFailed, WeightsError
from vc2.launch import Rank, end_rank, report, run_rank, this_rank
from vc2.storage import open_store
from vc2.train.attempts import StateRef
from vc2.train.ema import Ema
from vc2.train.engine import (
    Engine,
    PlainEngine,
    create_engine,
    device_of,
    gather_objects,
    has_deepspeed,
    import_deepspeed,
    join_ranks,
    leave_ranks,
)
from vc2.train.fragments import KINDS
from vc2.train.kept import clear_passing
from vc2.train.rehearsal import ATTEMPT, RehearsalRequest, Step, Trial
from vc2.train.states import StateWriter, restore

__all__ = ["main"]

WIDTH = 1024  # of the one layer: a state of it is 16 MiB, of all ranks together on GPUs, of each on CPUs
SUMMED = {"cpu": 2**22, "cuda": 2**26}  # float32 values of the sum over all ranks
STEPS = 6  # of a rehearsal: how often the starter's patience may be needed


def main(place: str) -> None:
    """Go through all steps, and tell the starter which are done."""
    began = time.monotonic()
    request = RehearsalRequest.load(place)
    rank, work = this_rank(), Path(request.work)
    trial = Trial(open_store(request.store), request.stage.name, request.name)
    _end_in(STEPS * request.patience, trial, work)
    try:
        _rehearse(request, trial, rank, work, began)
    finally:  # the disk is this rank's own: nobody else can clear it
        clear_passing(trial, work)
    leave_ranks()


def _rehearse(request: RehearsalRequest, trial: Trial, rank: Rank, work: Path, began: float) -> None:

    def tell(step: Step, **figures: float | str) -> None:
        report(f"rehearsal {step} {rank.rank}", 1, 1, step=step, **figures)

    def done(step: Step, **figures: float | str) -> None:
        gather_objects(None)  # on every rank
        if rank.is_first:
            tell(step, after=time.monotonic() - began, **figures)

    device = device_of(request.stage, rank.local_rank)
    _import_engine(device)
    tell("started", rank=rank.rank, host=socket.gethostname())
    join_ranks(device, request.patience)
    done("met", device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    size, seconds = _sum(rank, device)
    done("summed", bytes=size, seconds=seconds)

    engine = _engine(request, rank, device)
    ema = Ema(engine.shard("master"), request.stage.ema_decay)
    _update(engine, ema, rank, device)
    done("updated")

    started = time.monotonic()
    writer = StateWriter(
        trial, ATTEMPT, request.layout, rank, work, keep=1, outage_seconds=request.patience / 2, patience=1.0
    )
    writer.save(engine, ema, {"step": 1, "samples": 1}, (trial.metrics_key(ATTEMPT, 0), b""))
    writer.wait()
    bytes_kept = sum(gather_objects(sum(values.nbytes for values in _state(engine, ema).values())))
    done("kept", bytes=bytes_kept, seconds=time.monotonic() - started)

    started = time.monotonic()
    _check_restored(trial, engine, ema, rank, work)
    done("restored", seconds=time.monotonic() - started)


def _end_in(seconds: float, trial: Trial, work: Path) -> None:
    """See that this process ends even if nobody waits for it any more, as of a job on a cluster."""

    def end() -> None:
        clear_passing(trial, work)
        end_rank(LaunchFailed(f"the rehearsal was not over in {seconds:.0f} s", "communication"))

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _sum(rank: Rank, device: torch.device) -> tuple[int, float]:
    """Bytes and seconds of a sum over all ranks, the second of two: the first has to find the way.

    Raises:
        LaunchFailed: If it is wrong.
    """
    expected = rank.world_size * (rank.world_size + 1) // 2
    seconds, values = 0.0, torch.empty(SUMMED[device.type], device=device)
    for _ in range(2):
        values.fill_(rank.rank + 1)
        _settled(device)
        started = time.monotonic()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
        _settled(device)
        seconds = time.monotonic() - started
        if not bool((values == expected).all()):
            raise LaunchFailed(
                f"a sum over {rank.world_size} ranks gave {float(values.min()):g} to {float(values.max()):g}, "
                f"expected {expected}: the network or a GPU changes what it passes on"
            )
    return values.nbytes, seconds


def _settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _OneLayer(nn.Module):
    """The smallest network with the interface of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, *, fps: Tensor) -> Tensor:
        return self.layer(latents)


def _import_engine(device: torch.device) -> None:
    """What the first engine would import: it takes seconds, and no step should be late for it."""
    import torch._dynamo  # noqa: F401 - by the first optimizer

    if device.type == "cuda" and has_deepspeed():
        import_deepspeed(device)


def _engine(request: RehearsalRequest, rank: Rank, device: torch.device) -> Engine:
    """The engine of training on GPUs. On CPUs DeepSpeed takes longer to start than all else together; there each rank
    has a layer of its own."""
    torch.manual_seed(0)
    network = _OneLayer().to(device)
    if device.type == "cuda":
        return create_engine(network, ["layer.weight"], request.stage, micro_batch=1)
    layers = {f"{rank.rank}.{name}": parameter for name, parameter in network.named_parameters()}
    return PlainEngine(network, layers, request.stage, passes=1)


def _update(engine: Engine, ema: Ema, rank: Rank, device: torch.device) -> None:
    inputs = torch.full((1, WIDTH), rank.rank + 1.0, device=device)
    engine.backward(engine.forward(inputs, inputs, inputs, inputs).float().square().mean())
    engine.step(1e-3)
    ema.update(engine.shard("master"))


def _state(engine: Engine, ema: Ema) -> dict[str, Tensor]:
    return {kind: ema.shard if kind == "ema" else engine.shard(kind) for kind in KINDS}


def _check_restored(trial: Trial, engine: Engine, ema: Ema, rank: Rank, work: Path) -> None:
    """Forget the state, and read it from the store.

    Raises:
        WeightsError: If a bit of it is another one.
    """
    before = {kind: values.clone() for kind, values in _state(engine, ema).items()}
    for values in _state(engine, ema).values():
        values.zero_()
    restore(trial, trial.manifest(StateRef(attempt=ATTEMPT, step=1)), engine, ema, rank, work)
    wrong = [kind for kind, values in _state(engine, ema).items() if not torch.equal(values, before[kind])]
    if wrong:
        raise WeightsError(f"a train state was written and read back, and {', '.join(wrong)} differ from what was kept")


if __name__ == "__main__":
    run_rank(main)
