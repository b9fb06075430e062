"""The story of a training run: batch, draws, loss, step, average, line of metrics, state.

All ranks agree once per step, in one small reduction, on the step's figures, on whether somebody was asked to stop, and
on whether a state is due; so they always do the same things in the same order.

A step whose gradient is no number is *skipped*: nothing is learnt from its batch, the step counts all the same, and
after too many in a row the run ends. So a step is a batch that was looked at, an *update* one that was learnt from.
"""

import logging
import math
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from vc2.errors import FailureKind, Preempted, StoreError, Vc2Error
from vc2.launch import Rank, report
from vc2.model.partition import group_of
from vc2.model.schedule import NoiseSchedule
from vc2.seeding import derive_seed
from vc2.train.attempts import Run
from vc2.train.clock import Clock
from vc2.train.config import Layout, TrainStage
from vc2.train.curves import Curves
from vc2.train.ema import Ema
from vc2.train.encode import Batches
from vc2.train.engine import Engine, gather_objects, sum_over_ranks
from vc2.train.metrics import QUARTILES, Metrics, StepFigures
from vc2.train.objective import Batch, draw, micro_batches, predict_noise_losses
from vc2.train.spikes import Spikes
from vc2.train.states import StateWriter
from vc2.train.stragglers import Stragglers
from vc2.train.validate import Validator
from vc2.train.watchdog import Watchdog

__all__ = ["NonFiniteLoss", "StopSignal", "Trainer"]

log = logging.getLogger(__name__)

GRACE_FOR_STORE = 5.0  # seconds after which the last state of a run that must stop is kept on the local disk as well


class NonFiniteLoss(Vc2Error):
    """Losses or gradients that are no numbers, too many in a row. The weights were not changed by them."""

    kind: FailureKind = "data"


class StopSignal:
    """Whether SIGTERM has come: the process should leave a state behind and go."""

    def __init__(self) -> None:
        self.is_set = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._set)

    def _set(self, *_: object) -> None:
        self.is_set = True


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all ranks know of a step before they take it."""

    figures: StepFigures
    must_stop: bool
    state_due: bool


@dataclass
class Trainer:
    """One rank's side of one attempt, ready to run from `step`."""

    config: TrainStage
    run: Run
    attempt: int
    layout: Layout
    rank: Rank
    device: torch.device
    engine: Engine
    ema: Ema
    schedule: NoiseSchedule
    batches: Batches
    writer: StateWriter
    metrics: Metrics
    stop: StopSignal
    step: int = 0  # batches looked at
    updates: int = 0  # batches learnt from
    skipped_in_row: int = 0
    clock: Clock = field(default_factory=Clock)
    spikes: Spikes | None = None
    validator: Validator | None = None
    watchdog: Watchdog | None = None
    curves: Curves | None = None  # of the first rank
    flops: Callable[[Batch], float] | None = None  # that a rank's part of a batch takes; of the first rank
    peak_flops: float = math.inf  # of its device, a second
    replaced: Callable[[], int] = lambda: 0  # damaged samples that were replaced on this rank
    _steps_in_lap: int = 0
    _flops_done: float = 0.0
    _forward_seconds: float = 0.0
    _grad_norms: dict[str, float] = field(default_factory=dict)  # by group, of the step before a line
    _stragglers: Stragglers | None = None

    def train(self) -> None:
        """Until `num_steps` steps are taken and their state is committed.

        Raises:
            NonFiniteLoss: If more than `max_skipped` steps in a row had no finite loss and gradient.
            Preempted: If any rank got SIGTERM; the state is committed first.
            Superseded: If a newer attempt took over.
            StoreError: If the store took no state for `outage_seconds`, or samples cannot be read.
        """
        config = self.config
        self._stragglers = Stragglers(gather_objects(socket.gethostname()))
        self.clock.start()
        while self.step < config.num_steps:
            self._beat()
            if self.spikes:
                self.spikes.keep(self.step, self.engine, self.ema, self.updates)
            agreed = self._take_step()
            if self.step % config.log_every == 0:
                self._log()
            if config.validation.every and self.step % config.validation.every == 0:
                self._validate()
            if agreed.state_due or agreed.must_stop:
                self._save()
            if agreed.must_stop:
                self._rest()
                self.writer.wait(keep_after=GRACE_FOR_STORE)
                sum_over_ranks([0.0])  # nobody leaves before the state is committed
                raise Preempted(
                    f"train/{config.name}: asked to stop; state of step {self.step} is kept, run again to go on"
                )
        self._rest()
        if self.writer.saved_step != self.step:
            self._save()
        self.writer.wait()

    def _take_step(self) -> Agreed:
        with self.clock.part("data_wait"):
            batch = self._next_batch()
        agreed = self._agree(batch, *self._pass_all(batch))
        figures = agreed.figures
        self._grad_norms = self.engine.grad_norms(group_of) if self._logs_next() and not figures.skipped else {}
        self.writer.settle()
        is_finite = self.engine.step(self.config.lr_at(self.step))
        if is_finite and not figures.skipped:
            self.skipped_in_row = 0
            self.ema.update(self.engine.shard("master"))
            self.updates += 1
            figures = figures._replace(grad_norm=self.engine.grad_norm)
            self._judge(batch, figures)
        else:
            self._grad_norms = {}
            figures = self._skip(batch, figures)
        self.step += 1
        self._steps_in_lap += 1
        self.metrics.add(figures)
        return agreed

    def _next_batch(self) -> Batch:
        try:
            return self.batches.at(self.step)
        except StoreError:
            self.writer.keep_newest()  # the store is away for too long: what it has not got is kept here
            raise

    def _pass_all(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Forward and backward over this rank's batch; losses and timesteps of its samples, mean square of latents."""
        config = self.config
        scaling = config.model.autoencoder.scaling_factor
        parts = micro_batches(batch, self.layout.micro_batch)
        all_losses, timesteps, powers = [], [], []
        for index, part in enumerate(parts):
            draws = draw(
                config.seed,
                part,
                num_timesteps=config.model.schedule.num_timesteps,
                caption_dropout=config.caption_dropout,
            )
            torch.manual_seed(derive_seed(config.seed, "dropout", self.step, self.rank.rank, index))
            began = self._timed()
            losses, power = predict_noise_losses(self.engine, self.schedule, scaling, part, draws, self.device)
            self._forward_seconds += self._timed() - began
            loss = losses.mean()
            self.engine.backward(loss * (1 + 0 * loss.detach()))  # 1, or no number where the loss is infinite
            all_losses.append(losses.detach())
            timesteps.append(draws.timesteps)
            powers.append(power)
        if self.flops:
            self._flops_done += self.flops(batch)
        return torch.cat(all_losses).cpu().double(), torch.cat(timesteps), float(torch.stack(powers).mean())

    def _timed(self) -> float:
        """The time, once the device has done its work; on a GPU only in steps that are logged, to keep it busy."""
        if not self._logs_next():
            return 0.0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _logs_next(self) -> bool:
        return (self.step + 1) % self.config.log_every == 0

    def _agree(self, batch: Batch, losses: torch.Tensor, timesteps: torch.Tensor, power: float) -> Agreed:
        """Figures of the step over all ranks; whether to stop; whether a state is due."""
        failed = self.writer.has_failed
        due = self.rank.is_first and self._state_is_due()
        number = self.config.model.schedule.num_timesteps
        quartiles = torch.clamp(timesteps * QUARTILES // number, max=QUARTILES - 1)
        sums = torch.zeros(QUARTILES, dtype=torch.float64).index_add_(0, quartiles, losses)
        counts = torch.bincount(quartiles, minlength=QUARTILES)
        said = [float(losses.mean()), power, float(self.stop.is_set), float(due), float(failed)]
        loss, power, stops, dues, troubles, *rest = sum_over_ranks([*said, *sums.tolist(), *counts.tolist()])
        if troubles:
            self._end_for_states()
        is_image = float(batch.kind == "image")
        if not math.isfinite(loss):
            figures = StepFigures(0.0, is_image, 0.0, 0.0, skipped=1.0)
        else:
            ranks = self.layout.world_size
            figures = StepFigures(
                loss / ranks, is_image, power / ranks, 0.0, 0.0, tuple(rest[:QUARTILES]), tuple(rest[QUARTILES:])
            )
        return Agreed(figures, stops > 0, dues > 0)

    def _end_for_states(self) -> NoReturn:
        """States cannot be written any more, by this rank or another: all keep what they have and end."""
        self.writer.check()
        self.writer.keep_newest()
        time.sleep(5)  # the rank that knows more speaks first
        raise StoreError(f"train/{self.config.name}: another rank cannot write its state")

    def _state_is_due(self) -> bool:
        config, step = self.config, self.step + 1
        if config.keep_every_steps and step % config.keep_every_steps == 0:
            return True
        if config.state_every_steps is not None:
            return step % config.state_every_steps == 0
        return self.clock.since_save() >= config.state_every_seconds and not self.writer.is_busy

    def _skip(self, batch: Batch, figures: StepFigures) -> StepFigures:
        """Nothing was learnt from this batch: say so, and give up if that goes on."""
        config = self.config
        self.skipped_in_row += 1
        what = "loss" if figures.skipped else "gradient"
        keys = [key for keys in gather_objects(batch.keys) for key in keys]
        if self.rank.is_first:
            log.warning(
                "train/%s: step %d skipped, its %s is no number; samples %s", config.name, self.step, what, keys[:64]
            )
        if self.skipped_in_row > config.max_skipped:
            raise NonFiniteLoss(
                f"train/{config.name}: the {what} of step {self.step} is not finite, in {self.skipped_in_row} steps "
                f"in a row; samples: {', '.join(keys[:16])}; look at them, or lower optimizer.lr"
            )
        return StepFigures(0.0, figures.is_image, 0.0, 0.0, skipped=1.0)

    def _judge(self, batch: Batch, figures: StepFigures) -> None:
        """Take the last updates back if this step's loss is a spike."""
        if self.spikes is None:
            return
        if self.step and self.config.phase_at(self.step) != self.config.phase_at(self.step - 1):
            self.spikes.forget()
        if not self.spikes.is_spike(figures):
            return
        updates = self.spikes.rewind(self.step, self.engine, self.ema)
        if self.rank.is_first:
            log.warning(
                "train/%s: step %d has a loss of %.4g, a spike: the last %d updates are taken back; its samples %s",
                self.config.name, self.step, figures.loss, self.updates - updates, batch.keys[:64],
            )  # fmt: skip
        self.updates = updates

    def _log(self) -> None:
        config = self.config
        lap = self.clock.lap()
        flops = self._flops_done / lap["seconds"] if self.flops else None
        own = {
            "forward": self._forward_seconds,
            "data": lap["data_wait"] * lap["seconds"],
            "memory": _memory_gib(self.device),
            "replaced": self.replaced(),
        }
        every = gather_objects(own)
        assert self._stragglers
        slow = self._stragglers.look("forward pass", [one["forward"] for one in every])
        line = self.metrics.line(
            self.step,
            **{f"grad_norm_{group}": norm for group, norm in self._grad_norms.items()},
            lr=config.lr_at(self.step - 1),
            samples_per_s=config.batch_size * self._steps_in_lap / lap["seconds"],
            **lap,
            tflops=flops and flops / 1e12,  # of one rank
            mfu=flops and flops / self.peak_flops,
            memory_gib=max(one["memory"] for one in every),
            replaced=sum(one["replaced"] for one in every),
        )
        self._forward_seconds, self._flops_done, self._steps_in_lap = 0.0, 0.0, 0
        if self.rank.is_first:
            for sentence in slow:
                log.warning("train/%s: %s", config.name, sentence)
            self._tell(line)

    def _tell(self, line: dict[str, float | None]) -> None:
        if self.curves:
            self.curves.add(line)
        names = ("loss", "grad_norm", "lr", "samples_per_s", "mfu", "data_wait", "goodput", "skipped")
        shown = {name: value for name in names if (value := line[name]) is not None}
        report(f"train/{self.config.name}", self.step, self.config.num_steps, **shown)

    def _validate(self) -> None:
        if self.validator is None:
            return
        with self.clock.part("validation"):
            line = self.validator.validate(self.step, self.ema.shard, beat=lambda: self._beat("validation"))
        self.metrics.validations.append(line)
        if self.rank.is_first:
            if self.curves:
                self.curves.add(line)
            shown = {name: value for name, value in line.items() if name in ("val_loss_raw", "val_loss_ema", "samples")}
            report(f"train/{self.config.name} validation", self.step, self.config.num_steps, **shown)

    def _save(self) -> None:
        facts = {
            "step": self.step,
            "updates": self.updates,
            "samples": self.step * self.config.batch_size,
            "window": [figures.flat() for figures in self.metrics.window],
            "loop": (self.spikes.facts() if self.spikes else {}) | {"skipped_in_row": float(self.skipped_in_row)},
        }
        lines = (self.run.metrics_key(self.attempt, self.metrics.start_step), self.metrics.text())
        with self.clock.part("state_stall"):
            self.writer.save(self.engine, self.ema, facts, lines)
        self.clock.saved()

    def _rest(self) -> None:
        if self.watchdog:
            self.watchdog.rest()

    def _beat(self, doing: str = "") -> None:
        if self.watchdog:
            self.watchdog.beat(doing or f"step {self.step}")


def _memory_gib(device: torch.device) -> float:
    """The most memory that was in use: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
