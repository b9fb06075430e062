"""The training curve: one JSON line per logged step, kept with the run and continuous over kills.

Losses of all steps since the last line make a *window*; a line gives their mean. The window is part of the train state,
so a resumed run writes the lines that an unbroken one would have written.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vc2.storage import Store
from vc2.train.attempts import Run

__all__ = ["Metrics", "StepFigures", "read_metrics"]


class StepFigures(NamedTuple):
    """What one step tells, the same on every rank."""

    loss: float  # mean over the global batch
    is_image: float  # 1 for a batch of images, 0 for one of videos
    latent_power: float  # mean square of the clean latents
    grad_norm: float


@dataclass
class Metrics:
    """Lines of one attempt."""

    start_step: int
    window: list[StepFigures] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def resumed(cls, step: int, window: Iterable[Iterable[float]]) -> "Metrics":
        """Metrics that go on after a state."""
        return cls(step, [StepFigures(*figures) for figures in window])

    def add(self, figures: StepFigures) -> None:
        self.window.append(figures)

    def line(self, step: int, **more: float) -> dict[str, Any]:
        """Close the window: the line of `step`, with figures of the moment added."""
        line = {
            "step": step,
            "loss": _mean(figures.loss for figures in self.window),
            "loss_video": _mean(figures.loss for figures in self.window if not figures.is_image),
            "loss_image": _mean(figures.loss for figures in self.window if figures.is_image),
            "latent_power": _mean(figures.latent_power for figures in self.window),
            "grad_norm": _mean(figures.grad_norm for figures in self.window),
            **more,
        }
        self.lines.append(line)
        self.window = []
        return line

    def text(self) -> bytes:
        """All lines of this attempt so far, as they are stored."""
        return "".join(json.dumps(line) + "\n" for line in self.lines).encode()


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def read_metrics(store: Store, stage: str, fingerprint: str) -> list[dict[str, Any]]:
    """All lines of a run by step, along the chain of its attempts: what a replaced writer wrote later is left out.

    Returns:
        Lines with `step`, `loss`, `loss_video`, `loss_image` (None where the window had no such batch), `latent_power`,
        `grad_norm`, `lr`, `samples_per_s`, `seconds`, `data_wait`, `state_stall` (shares of the seconds), `attempt`.
    """
    run = Run(store, stage, fingerprint)
    by_step: dict[int, dict[str, Any]] = {}
    for attempt, limit in reversed(list(run.chain())):
        for entry in store.list(f"{run.prefix}/metrics/{attempt:04d}-"):
            for text in store.read(entry.key).decode().splitlines():
                line = json.loads(text)
                if limit is None or line["step"] <= limit:
                    by_step[line["step"]] = line | {"attempt": attempt}
    return [by_step[step] for step in sorted(by_step)]
