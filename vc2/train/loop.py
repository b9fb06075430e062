"""The story of a training run: batch, draws, loss, step, average, line of metrics, state.

All ranks agree once per step, in one small reduction, on the step's figures, on whether somebody was asked to stop, and
on whether a state is due; so they always do the same things in the same order.
"""

import math
import signal
import threading
import time
from dataclasses import dataclass, field

import torch

from vc2.errors import Preempted, Vc2Error
from vc2.launch import Rank, report
from vc2.model.schedule import NoiseSchedule
from vc2.seeding import derive_seed
from vc2.train.attempts import Run
from vc2.train.config import Layout, TrainStage
from vc2.train.ema import Ema
from vc2.train.encode import Batches
from vc2.train.engine import Engine, sum_over_ranks
from vc2.train.metrics import Metrics, StepFigures
from vc2.train.objective import Batch, draw, micro_batches, predict_noise_loss
from vc2.train.states import StateWriter

__all__ = ["NonFiniteLoss", "StopSignal", "Trainer"]


class NonFiniteLoss(Vc2Error):
    """A loss or a gradient that is no number. The weights were not changed by it."""


class StopSignal:
    """Whether SIGTERM has come: the process should leave a state behind and go."""

    def __init__(self) -> None:
        self.is_set = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._set)

    def _set(self, *_: object) -> None:
        self.is_set = True


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
    step: int = 0  # optimizer steps taken
    _clock: "Clock" = field(default_factory=lambda: Clock())

    def train(self) -> None:
        """Until `num_steps` steps are taken and their state is committed.

        Raises:
            NonFiniteLoss: If a loss or gradient is no number.
            Preempted: If any rank got SIGTERM; the state is committed first.
            Superseded: If a newer attempt took over.
        """
        config = self.config
        self._clock.start()
        while self.step < config.num_steps:
            with self._clock.waiting():
                batch = self.batches.at(self.step)
            loss, power = self._pass_all(batch)
            is_finite = self.engine.step(config.optimizer.lr_at(self.step))
            figures, must_stop, state_due = self._agree(batch, loss, power, is_finite)
            self.ema.update(self.engine.shard("master"))
            self.step += 1
            self.metrics.add(figures)
            if self.step % config.log_every == 0:
                self._log(figures)
            if state_due or must_stop:
                self._save()
            if must_stop:
                self.writer.wait()
                sum_over_ranks([0.0])  # nobody leaves before the state is committed
                raise Preempted(
                    f"train/{config.name}: asked to stop; state of step {self.step} is kept, run again to go on"
                )
        if self.writer.saved_step != self.step:
            self._save()
        self.writer.wait()

    def _pass_all(self, batch: Batch) -> tuple[float, float]:
        """Forward and backward over this rank's batch; mean loss and mean square of the latents."""
        config = self.config
        scaling = config.model.autoencoder.scaling_factor
        parts = micro_batches(batch, self.layout.micro_batch)
        losses, powers = [], []
        for index, part in enumerate(parts):
            draws = draw(
                config.seed,
                part,
                num_timesteps=config.model.schedule.num_timesteps,
                caption_dropout=config.caption_dropout,
            )
            torch.manual_seed(derive_seed(config.seed, "dropout", self.step, self.rank.rank, index))
            loss, power = predict_noise_loss(self.engine, self.schedule, scaling, part, draws, self.device)
            self.engine.backward(loss)
            losses.append(loss.detach())
            powers.append(power)
        return float(torch.stack(losses).mean()), float(torch.stack(powers).mean())

    def _agree(self, batch: Batch, loss: float, power: float, is_finite: bool) -> tuple[StepFigures, bool, bool]:
        """Figures of the step over all ranks; whether to stop; whether to save a state."""
        self.writer.check()
        ranks = self.layout.world_size
        due = self.rank.is_first and self._state_is_due()
        total_loss, total_power, stops, dues = sum_over_ranks([loss, power, float(self.stop.is_set), float(due)])
        if not (math.isfinite(total_loss) and is_finite):
            if math.isfinite(total_loss) or not math.isfinite(loss):
                what = "gradient" if math.isfinite(total_loss) else "loss"
                raise NonFiniteLoss(
                    f"train/{self.config.name}: the {what} of step {self.step} is not finite; samples of this rank: "
                    f"{', '.join(batch.keys)}; look at them, or lower optimizer.lr"
                )
            time.sleep(5)  # the rank that has the samples speaks first
            raise NonFiniteLoss(f"train/{self.config.name}: the loss of step {self.step} is not finite on another rank")
        figures = StepFigures(
            total_loss / ranks, float(batch.kind == "image"), total_power / ranks, self.engine.grad_norm
        )
        return figures, stops > 0, dues > 0

    def _state_is_due(self) -> bool:
        if self.config.state_every_steps is not None:
            return (self.step + 1) % self.config.state_every_steps == 0
        since = self._clock.since_save()
        return since >= self.config.state_every_seconds and not self.writer.is_busy

    def _log(self, figures: StepFigures) -> None:
        moment = self._clock.lap(self.config.batch_size * len(self.metrics.window), self.writer.stall)
        line = self.metrics.line(self.step, lr=self.config.optimizer.lr_at(self.step - 1), **moment)
        if self.rank.is_first:
            shown = {name: line[name] for name in ("loss", "lr", "samples_per_s", "data_wait")}
            report(f"train/{self.config.name}", self.step, self.config.num_steps, **shown)

    def _save(self) -> None:
        facts = {"step": self.step, "samples": self.step * self.config.batch_size, "window": self.metrics.window}
        lines = (self.run.metrics_key(self.attempt, self.metrics.start_step), self.metrics.text())
        self.writer.save(self.engine, self.ema, facts, lines)
        self._clock.saved()


class Clock:
    """Where the time goes, between two lines of metrics."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._lap = self._saved = time.perf_counter()
        self._waited = self._stalled = 0.0

    def waiting(self) -> "Clock":
        return self

    def __enter__(self) -> None:
        self._asked = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._asked

    def saved(self) -> None:
        self._saved = time.perf_counter()

    def since_save(self) -> float:
        return time.perf_counter() - self._saved

    def lap(self, samples: int, stalled: float) -> dict[str, float]:
        """Figures since the last lap: `seconds`, `samples_per_s`, shares `data_wait` and `state_stall` of the time."""
        now = time.perf_counter()
        seconds = now - self._lap
        figures = {
            "seconds": seconds,
            "samples_per_s": samples / seconds,
            "data_wait": self._waited / seconds,
            "state_stall": (stalled - self._stalled) / seconds,
        }
        self._lap, self._waited, self._stalled = now, 0.0, stalled
        return figures
