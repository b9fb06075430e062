"""A rehearsal: the ranks of a training stage are started as in earnest, meet, add up, and keep a state, on a network of
one layer. It takes seconds, and says what would otherwise be found out when hours of work are done.

    started    each rank has found its request in the store, and its device
    met        they are in one process group, by the backend of training
    summed     a sum over all ranks of known values is right; how fast it was
    updated    one update of the weights; on GPUs by the engine of training
    kept       a train state of all ranks is in the store, by the code that writes those of training
    restored   every rank has read it back, and every bit is what it was

Whoever waits for the ranks gives them a limit for each of these, since ranks that cannot hear each other wait for ever.
Everything lies under `rehearsals/<name>/` in the store, laid out like a run, and is deleted at the end; what a
rehearsal that was killed has left goes with a later one.
"""

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vc2.config import Config
from vc2.errors import LaunchFailed, StoreError
from vc2.launch import Job, start, watch
from vc2.progress import Progress, counted, silent, size_text
from vc2.storage import Store, join_uri
from vc2.train.attempts import Attempt, Run, this_process
from vc2.train.config import Layout, TrainStage
from vc2.train.kept import clear_passing
from vc2.train.request import Request

__all__ = ["ATTEMPT", "NotStarted", "Rehearsal", "RehearsalRequest", "Step", "Trial", "rehearse"]

log = logging.getLogger(__name__)

Step = Literal["started", "met", "summed", "updated", "kept", "restored"]
WAITS: Mapping[str, str] = {  # what is not over when a rank does not reach a step
    "started": "did not start",
    "met": "did not meet",
    "summed": "met, and their sum did not end",
    "updated": "met, and their first update did not end",
    "kept": "met, and their train state was not in the store",
    "restored": "met, and did not read their train state back",
}
PATIENCE = 60.0  # seconds between two steps, once all ranks have started
STARTING = 300.0  # seconds until then: the machine may be busy
STARTING_ON_RAY = 900.0  # likewise, where machines may have to be added first
GRACE = 2.0  # seconds that ranks have to leave; they have nothing to keep
OLD = 3600.0  # seconds after which what is left of a rehearsal is nobody's
ATTEMPT = 1


class NotStarted(LaunchFailed):
    """No rank has started in time: of a cluster, that it had no room for them."""


class RehearsalRequest(Request):
    """What the ranks are asked."""

    stage: TrainStage
    name: str
    layout: Layout
    patience: float


@dataclass(frozen=True)
class Trial(Run):
    """Where a rehearsal lies, laid out like a run, out of the way of all runs."""

    @property
    def prefix(self) -> str:
        return f"rehearsals/{self.fingerprint}"


class Rehearsal(Config):
    """What was found. Seconds are from the start of the ranks to each step, by the first rank."""

    world_size: int
    hosts: tuple[str, ...]  # by rank
    device: str
    seconds: dict[str, float]
    sum_bytes: int  # of the sum over all ranks
    sum_seconds: float
    state_bytes: int
    write_seconds: float
    read_seconds: float

    def described(self) -> str:
        """In a line, for people."""
        places = counted(len(set(self.hosts)), "machine")
        rates = {name: self.state_bytes / max(seconds, 1e-6) for name, seconds in
                 (("written", self.write_seconds), ("read", self.read_seconds))}  # fmt: skip
        return (
            f"{counted(self.world_size, 'rank')} on {self.device} of {places} met in {self.seconds['met']:.1f} s; "
            f"summed {size_text(self.sum_bytes)} at {size_text(self.sum_bytes / max(self.sum_seconds, 1e-6))}/s; "
            f"a state of {size_text(self.state_bytes)} was written at {size_text(rates['written'])}/s and read back, "
            f"bit for bit, at {size_text(rates['read'])}/s"
        )


def rehearse(
    config: TrainStage,
    store: Store,
    work: Path,
    *,
    world_size: int,
    patience: float = PATIENCE,
    starting: float | None = None,
    progress: Progress = silent,
) -> Rehearsal:
    """Start the ranks of a stage by its launcher, `local` or `ray`, and see them through a step and a state.

    A rank that somebody killed says nothing of the place, so long as it is one: then they are started once more.

    Args:
        config: The stage.
        store: Where its states would be kept.
        work: Folder of this machine for logs and passing files.
        world_size: How many ranks.
        patience: Seconds that the ranks may take from one step to the next, once all have started.
        starting: Seconds until then; None: what is usual with the launcher.
        progress: Told which step was reached.

    Raises:
        NotStarted: If no rank started in time.
        LaunchFailed: If a rank failed, or they did not reach the next step in time; one sentence says which.
        StoreError: If the store does not take what the ranks are asked.
        ConfigError: If no cluster is named.
    """
    _sweep(store)
    usual = STARTING_ON_RAY if config.launcher == "ray" else STARTING
    heard = _Heard(world_size, patience, usual if starting is None else starting, progress)
    try:
        _try(config, store, work.resolve(), heard)
    except LaunchFailed as error:
        if error.kind != "killed":
            raise
        log.warning("%s; they are started once more", error)
        heard = _Heard(world_size, patience, heard.starting, progress)
        _try(config, store, work.resolve(), heard)
    return heard.result()


def _try(config: TrainStage, store: Store, work: Path, heard: "_Heard") -> None:
    world_size = heard.world_size
    trial = Trial(store, config.name, secrets.token_hex(16))
    # Every rank its own micro-batch of one sample, whatever batch and layout the stage has.
    asked = config.evolve(batch_size=world_size, micro_batch=1, world_size=world_size)
    layout = Layout(world_size=world_size, micro_batch=1, threads=1)
    request = RehearsalRequest(
        stage=asked, store=store.uri, work=str(work), name=trial.fingerprint, layout=layout, patience=heard.patience
    )
    try:
        trial.claim(
            Attempt(
                number=ATTEMPT,
                start=None,
                layout=layout,
                holder=this_process(),
                heartbeat_seconds=heard.patience,
                request=request.model_dump(mode="json"),
            )
        )
        uri = join_uri(store.uri, f"{trial.prefix}/attempts/{ATTEMPT:04d}.json")
        watch(_Limited(_started(request, uri, work), heard), heard)
    finally:
        _clear(trial, work)


def _started(request: RehearsalRequest, uri: str, work: Path) -> Job:
    module, world_size = "vc2.train.rehearsal_rank", request.layout.world_size
    if request.stage.launcher == "ray":
        from vc2.ray_jobs import start_job

        job_id = f"vc2-rehearsal-{request.name[:12]}"
        return start_job(module, uri, world_size=world_size, job_id=job_id, device=request.stage.device)
    environment = {"VC2_WORK": str(work)}
    return start(module, uri, world_size=world_size, work=work, name="rehearsal", environment=environment, grace=GRACE)


@dataclass
class _Heard:
    """Told what the ranks say: which of them have started, which step they have reached, until when the next is due."""

    world_size: int
    patience: float
    starting: float
    progress: Progress
    hosts: dict[int, str] = field(default_factory=dict)
    reached: list[str] = field(default_factory=list)
    figures: dict[str, float | str] = field(default_factory=dict)
    due: float = 0.0

    def __post_init__(self) -> None:
        self.wait(self.starting)

    def wait(self, seconds: float) -> None:
        self.due, self._given = time.monotonic() + seconds, seconds

    def __call__(self, work: str, done: int, total: int | None = None, **figures: float | str) -> None:
        step = str(figures.pop("step"))
        if step == "started":
            self.hosts[int(figures["rank"])] = str(figures["host"])
            if len(self.hosts) < self.world_size:
                return
        else:
            self.figures |= {f"{step} {name}": value for name, value in figures.items()}
        self.reached.append(step)
        self.wait(self.starting if step == "restored" else self.patience)  # nobody is in a hurry to end
        self.progress("rehearsal", len(self.reached), len(WAITS), step=step)

    def late(self) -> str:
        """Which ranks did not reach which step."""
        step = next((step for step in WAITS if step not in self.reached), "restored")
        if step == "started" and self.hosts:
            missing = sorted(set(range(self.world_size)) - set(self.hosts))
            return (
                f"{len(self.hosts)} of {counted(self.world_size, 'rank')} started in {self._given:.0f} s; rank "
                f"{_listed(missing)} did not"
            )
        places = f" ({_listed(sorted(set(self.hosts.values())))})" if self.hosts else ""
        return f"the {counted(self.world_size, 'rank')}{places} {WAITS[step]} in {self._given:.0f} s"

    def result(self) -> Rehearsal:
        """What they found, once they have ended well."""
        if "restored" not in self.reached:
            raise LaunchFailed("the ranks ended without an error and without a word; look at their log")
        figures = {name: value for name, value in self.figures.items() if not isinstance(value, str)}
        return Rehearsal(
            world_size=self.world_size,
            hosts=tuple(self.hosts[rank] for rank in range(self.world_size)),
            device=str(self.figures["met device"]),
            seconds={step: round(figures[f"{step} after"], 3) for step in self.reached if step != "started"},
            sum_bytes=int(figures["summed bytes"]),
            sum_seconds=figures["summed seconds"],
            state_bytes=int(figures["kept bytes"]),
            write_seconds=figures["kept seconds"],
            read_seconds=figures["restored seconds"],
        )


def _listed(things: Sequence[object], most: int = 6) -> str:
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return ", ".join(str(thing) for thing in things[:most]) + more


class _Limited(Job):
    """A job that has a limit for each step, and does not outlive whoever asked for it."""

    def __init__(self, job: Job, heard: _Heard) -> None:
        super().__init__(job.name, job.grace)
        self._job, self._heard = job, heard
        self.errors = job.errors

    @property
    def log(self) -> str:
        return self._job.log

    def poll(self, progress: Progress = silent) -> int | None:
        code = self._job.poll(progress)
        if code is None and time.monotonic() > self._heard.due:
            failure = LaunchFailed if self._heard.hosts else NotStarted
            raise failure(f"{self._heard.late()} (log: {self.log})", "communication")
        return code

    def cancel(self) -> None:
        self._job.cancel()

    def tail(self, lines: int = 15) -> str:
        return self._job.tail(lines)


def _clear(trial: Trial, work: Path) -> None:
    clear_passing(trial, work)
    with suppress(StoreError):  # what is left goes with a later one
        for entry in trial.store.list(f"{trial.prefix}/"):
            trial.store.delete(entry.key)


def _sweep(store: Store) -> None:
    """Delete what rehearsals that were killed have left."""
    old = store.now() - OLD
    for entry in store.list("rehearsals/"):
        if entry.modified < old:
            store.delete(entry.key)
