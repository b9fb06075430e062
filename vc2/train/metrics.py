"""The training curve: one JSON line per logged step, kept with the run and continuous over kills.

What each step since the last line told makes a *window*; a line gives means over it. The window is part of the train
state, so a resumed run writes the lines that an unbroken one would have written. A line has two kinds of figures: those
of the training itself (losses, norms), which are the same whenever a step is taken, and those of the moment (speed,
waiting, memory), which are not.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vc2.storage import Store
from vc2.train.attempts import Run

__all__ = ["QUARTILES", "Metrics", "StepFigures", "read_all_lines", "read_metrics", "read_validations"]

QUARTILES = 4  # parts of the timesteps whose losses are told apart: the first is almost clean, the last almost noise


class StepFigures(NamedTuple):
    """What one step tells, the same on every rank."""

    loss: float  # mean over the global batch; 0 in a skipped step
    is_image: float  # 1 for a batch of images, 0 for one of videos
    latent_power: float  # mean square of the clean latents
    grad_norm: float  # before clipping; 0 in a skipped step
    skipped: float = 0.0  # 1 if loss or gradient was no number and nothing was learnt
    loss_sums: tuple[float, ...] = (0.0,) * QUARTILES  # sums of sample losses by quartile of their timestep
    counts: tuple[float, ...] = (0.0,) * QUARTILES  # samples by quartile of their timestep

    def flat(self) -> tuple[float, ...]:
        """As a row of numbers, for the train state."""
        return (*self[:5], *self.loss_sums, *self.counts)

    @classmethod
    def of_flat(cls, row: Sequence[float]) -> "StepFigures":
        return cls(*row[:5], tuple(row[5 : 5 + QUARTILES]), tuple(row[5 + QUARTILES :]))


@dataclass
class Metrics:
    """Lines of one attempt."""

    start_step: int
    window: list[StepFigures] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def resumed(cls, step: int, window: Iterable[Sequence[float]]) -> "Metrics":
        """Metrics that go on after a state."""
        return cls(step, [StepFigures.of_flat(row) for row in window])

    def add(self, figures: StepFigures) -> None:
        self.window.append(figures)

    def line(self, step: int, **more: Any) -> dict[str, Any]:
        """Close the window: the line of `step`, with figures of the moment added."""
        taken = [figures for figures in self.window if not figures.skipped]
        line = {
            "step": step,
            "loss": _mean(figures.loss for figures in taken),
            "loss_video": _mean(figures.loss for figures in taken if not figures.is_image),
            "loss_image": _mean(figures.loss for figures in taken if figures.is_image),
            **{f"loss_q{number + 1}": _mean_of_quartile(taken, number) for number in range(QUARTILES)},
            "latent_power": _mean(figures.latent_power for figures in taken),
            "grad_norm": _mean(figures.grad_norm for figures in taken),
            "skipped": len(self.window) - len(taken),
            **more,
        }
        self.lines.append(line)
        self.window = []
        return line

    def text(self) -> bytes:
        """All lines of this attempt so far, as they are stored."""
        return "".join(json.dumps(line) + "\n" for line in (*self.lines, *self.validations)).encode()


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _mean_of_quartile(window: Sequence[StepFigures], number: int) -> float | None:
    count = sum(figures.counts[number] for figures in window)
    return math.fsum(figures.loss_sums[number] for figures in window) / count if count else None


def read_metrics(store: Store, stage: str, fingerprint: str) -> list[dict[str, Any]]:
    """All lines of a run by step, along the chain of its attempts: what a replaced writer wrote later is left out.

    Returns:
        Lines with `step`, `loss`, `loss_video`, `loss_image`, `loss_q1` to `loss_q4` (None where the window had no such
        sample), `latent_power`, `grad_norm`, `skipped` steps, `lr`, `attempt`; and of the moment `samples_per_s`,
        `seconds`, shares of them (`data_wait`, `state_stall`, `validation`), `goodput`, `mfu`, `memory_gib`, `replaced`
        samples.
    """
    return _read(store, stage, fingerprint, lambda line: "loss" in line)


def read_all_lines(run: Run) -> list[dict[str, Any]]:
    """Every line that any attempt at a run wrote, steps that were lost and done again included: what it took in all."""
    lines = []
    for entry in run.store.list(f"{run.prefix}/metrics/"):
        lines += [json.loads(text) for text in run.store.read(entry.key).decode().splitlines()]
    return [line for line in lines if "loss" in line]


def read_validations(store: Store, stage: str, fingerprint: str) -> list[dict[str, Any]]:
    """All validations of a run by step: `step`, `val_loss_raw`, `val_loss_ema`, by medium too, and `samples`, a URI."""
    return _read(store, stage, fingerprint, lambda line: "val_loss_ema" in line)


def _read(store: Store, stage: str, fingerprint: str, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    run = Run(store, stage, fingerprint)
    by_step: dict[int, dict[str, Any]] = {}
    for attempt, limit in reversed(list(run.chain())):
        for entry in store.list(f"{run.prefix}/metrics/{attempt:04d}-"):
            for text in store.read(entry.key).decode().splitlines():
                line = json.loads(text)
                if wanted(line) and (limit is None or line["step"] <= limit):
                    by_step[line["step"]] = line | {"attempt": attempt}
    return [by_step[step] for step in sorted(by_step)]
