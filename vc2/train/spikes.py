"""Losses that jump: the updates that led there are taken back, and the data of those steps is not seen again.

Videos and images have losses of their own, each with a moving mean and variance of the steps that were accepted (the
same on every rank, so all decide alike). A loss further above its mean than `sigmas` standard deviations is a *spike*:
weights, moments and average go back to a snapshot in memory, taken every `snapshot_every` steps, while the step goes on
counting. So the batches from the snapshot to the spike have left no trace, and no step is taken twice.
A new phase, whose losses may lie elsewhere, begins without a memory.
Cure and reason: Chowdhery et al. 2022 (PaLM), Sec. 5.1.

Snapshots are not part of the train state: a run that is resumed makes its first one from the state itself. Resumed
equals unbroken unless a spike comes before the next regular snapshot.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from vc2.errors import Vc2Error
from vc2.train.config import SpikeGuard
from vc2.train.ema import Ema
from vc2.train.engine import Engine
from vc2.train.fragments import KINDS
from vc2.train.metrics import StepFigures

__all__ = ["Spikes", "TooManySpikes"]

MOMENTS = tuple(kind for kind in KINDS if kind != "ema")


class TooManySpikes(Vc2Error):
    """Losses that jump again and again."""


class Spikes:
    """One rank's side: judges losses, keeps the snapshot, goes back to it.

    Args:
        guard: What a spike is.
        known: What `facts` gave when the state was saved.
    """

    def __init__(self, guard: SpikeGuard, known: Mapping[str, float] | None = None) -> None:
        self._guard = guard
        self._known = dict(known or {})
        self._snapshot: tuple[dict[str, Tensor], Tensor, int, int] | None = None

    def facts(self) -> dict[str, float]:
        """What must be remembered with a train state."""
        return dict(self._known)

    def keep(self, step: int, engine: Engine, ema: Ema, updates: int) -> None:
        """Take the snapshot if it is time for one (or there is none)."""
        if self._snapshot is None or step % self._guard.snapshot_every == 0:
            shards = {kind: engine.shard(kind).detach().to("cpu", copy=True) for kind in MOMENTS}
            self._snapshot = shards, ema.shard.detach().to("cpu", copy=True), ema.updates, updates

    def forget(self) -> None:
        """Losses are of another kind from now on: of another phase."""
        self._known = {name: value for name, value in self._known.items() if name.startswith("rew")}

    def is_spike(self, figures: StepFigures) -> bool:
        """Whether a step's loss is one; what is none joins the mean."""
        kind = "image" if figures.is_image else "video"
        count, mean, variance = (self._known.get(f"{kind}_{name}", 0.0) for name in ("count", "mean", "variance"))
        beyond = figures.loss - mean
        if count >= self._guard.memory and beyond > self._guard.sigmas * math.sqrt(variance):
            return True
        weight = 1.0 / min(count + 1, self._guard.memory)
        self._known |= {
            f"{kind}_count": count + 1,
            f"{kind}_mean": mean + weight * beyond,
            f"{kind}_variance": (1 - weight) * (variance + weight * beyond * beyond),
        }
        return False

    def rewind(self, step: int, engine: Engine, ema: Ema) -> int:
        """Go back to the snapshot; returns the updates that were taken until then.

        Raises:
            TooManySpikes: If that happened too often of late.
        """
        assert self._snapshot is not None
        near = step - self._known.get("rewound_at", -math.inf) <= self._guard.memory
        self._known["rewinds"] = self._known.get("rewinds", 0) * near + 1
        self._known["rewound_at"] = step
        if self._known["rewinds"] > self._guard.max_rewinds:
            raise TooManySpikes(
                f"{self._known['rewinds']:.0f} loss spikes within {self._guard.memory} steps, the last at step {step}: "
                "lower optimizer.lr or clip_norm, or look at the data of these steps"
            )
        shards, average, ema.updates, updates = self._snapshot
        engine.load_shards(shards, updates)
        ema.shard.copy_(average)
        return updates
