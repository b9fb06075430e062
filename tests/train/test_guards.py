"""What the loop does when something goes wrong: steps without a number, spikes, hangs, slow ranks."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vc2.train.attempts import Run, newest_state
from vc2.train.config import SpikeGuard, TrainStage
from vc2.train.loop import NonFiniteLoss, Trainer
from vc2.train.metrics import StepFigures, read_metrics
from vc2.train.objective import Batch
from vc2.train.spikes import Spikes, TooManySpikes
from vc2.train.stragglers import LINES, Stragglers

StartAttempt = Callable[..., Trainer]


def poisoned(trainer: Trainer, key: str) -> Trainer:
    """A run in which the latents of one sample are no numbers."""
    moments = trainer.batches._encoders.moments

    def of(identity: str, frames: Any = None) -> torch.Tensor:
        return moments(identity, frames) * (np.nan if identity == key else 1.0)

    trainer.batches._encoders.moments = of  # type: ignore[method-assign]
    return trainer


def test_a_step_without_a_number_is_skipped_and_resumed_equals_unbroken(
    run: Run, stage: TrainStage, start_attempt: StartAttempt, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is learnt from it, its samples are named, and updates go on being counted over a resume."""
    whole = poisoned(start_attempt(stage, run=Run(run.store, run.stage, "e" * 64)), "image-3")
    whole.train()
    assert (whole.step, whole.updates) == (8, 6)
    assert "step 2 skipped" in caplog.text and "image-3" in caplog.text
    assert torch.isfinite(whole.engine.shard("master")).all() and torch.isfinite(whole.ema.shard).all()
    assert whole.ema.updates == 6
    poisoned(start_attempt(stage.evolve(num_steps=5)), "image-3").train()
    state, _ = newest_state(run, at_most=8)
    assert state is not None and (state.step, state.updates) == (5, 4)
    resumed = poisoned(start_attempt(stage), "image-3")
    resumed.train()
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        assert torch.equal(resumed.engine.shard(kind), whole.engine.shard(kind)), kind
    assert torch.equal(resumed.ema.shard, whole.ema.shard)
    lines = read_metrics(run.store, run.stage, run.fingerprint)
    assert [line["skipped"] for line in lines] == [0, 0, 1, 0, 0, 1, 0, 0]
    assert all((line["loss"] is None) == bool(line["skipped"]) for line in lines)


def test_too_many_steps_without_a_number_end_the_run(
    run: Run, stage: TrainStage, start_attempt: StartAttempt, random_samples: Any
) -> None:
    """The run says which step it was and which samples, and its weights are those before."""
    trainer = start_attempt(stage.evolve(max_skipped=1), random_samples(4, count=1))  # all batches hold the sample
    before = trainer.engine.shard("master").clone()
    with pytest.raises(NonFiniteLoss, match=r"step 1 is not finite, in 2 steps in a row; samples: video-0"):
        poisoned(trainer, "video-0").train()
    assert torch.equal(trainer.engine.shard("master"), before)


def test_a_spike_takes_the_updates_since_the_snapshot_back(
    run: Run, stage: TrainStage, start_attempt: StartAttempt, caplog: pytest.LogCaptureFixture
) -> None:
    """The batches from the snapshot to the spike leave no trace; what comes after is learnt from the snapshot."""
    guard = SpikeGuard(sigmas=6, memory=10, snapshot_every=4)
    trainer = start_attempt(stage.evolve(num_steps=16, spikes=guard, state_every_steps=100))
    spikes = trainer.spikes
    assert spikes is not None
    batch_of, at_snapshot = trainer.batches.at, {}

    def watched(step: int) -> Batch:
        if step == 12:
            at_snapshot.update(master=trainer.engine.shard("master").clone(), ema=trainer.ema.shard.clone())
        batch = batch_of(step)
        if step == 14:
            at_snapshot["updates"] = trainer.updates
            usual = {"count": 99, "mean": 0.0, "variance": 1e-6}  # beside which any loss is a spike
            spikes._known |= {f"{batch.kind}_{name}": value for name, value in usual.items()}
        if step == 15:
            assert torch.equal(trainer.engine.shard("master"), at_snapshot["master"])
            assert torch.equal(trainer.ema.shard, at_snapshot["ema"])
        return batch

    trainer.batches.at = watched
    trainer.train()
    assert at_snapshot["updates"] == 14 and trainer.updates == 13 and trainer.step == 16
    assert "a spike: the last 3 updates are taken back" in caplog.text


def test_spikes_are_judged_by_medium_and_end_the_run_if_they_go_on() -> None:
    """A loss that is usual for images is none of videos; steps without enough memory are not judged."""
    spikes = Spikes(SpikeGuard(sigmas=5, memory=10, max_rewinds=1))
    draws = np.random.default_rng(0).normal(0, 0.01, 40)
    for draw in draws:
        assert not spikes.is_spike(StepFigures(0.2 + draw, 0.0, 1.0, 1.0))
        assert not spikes.is_spike(StepFigures(0.8 + draw, 1.0, 1.0, 1.0))
    again = Spikes(SpikeGuard(sigmas=5, memory=10), spikes.facts())
    for judge in (spikes, again):  # what it knows goes along with the state
        assert judge.is_spike(StepFigures(0.5, 0.0, 1.0, 1.0))
        assert not judge.is_spike(StepFigures(0.81, 1.0, 1.0, 1.0))
    again.forget()  # another phase, whose losses lie elsewhere
    assert not any(again.is_spike(StepFigures(0.5 + draw, 0.0, 1.0, 1.0)) for draw in draws)
    spikes._snapshot = ({}, torch.zeros(1), 0, 0)
    engine, ema = _Nothing(), _Nothing()
    spikes.rewind(100, engine, ema)  # type: ignore[arg-type]
    spikes.rewind(200, engine, ema)  # type: ignore[arg-type]
    with pytest.raises(TooManySpikes, match="2 loss spikes within 10 steps, the last at step 205"):
        spikes.rewind(205, engine, ema)  # type: ignore[arg-type]


class _Nothing:
    """Something that can be gone back with, for the counting of rewinds."""

    shard = torch.zeros(1)
    updates = 0

    def load_shards(self, shards: Any, updates: int) -> None:
        pass


HANGING = """
import sys, threading, time
from pathlib import Path
from vc2.train.watchdog import Watchdog

def end(error):
    print(error, flush=True)
    import os
    os._exit(7)

def keep(stacks):
    Path(sys.argv[1], "stacks.txt").write_bytes(stacks)
    return "stacks.txt"

def a_collective_that_never_returns():
    {hang}

with Watchdog("train/full", 3.0, keep=keep, end=end, folder=Path(sys.argv[1])) as watchdog:
    for step in range(3):
        watchdog.beat(f"step {{step}}")
        time.sleep(0.3)
    watchdog.rest()
    time.sleep(3.5)
    watchdog.beat("step 2")
    a_collective_that_never_returns()
"""


def test_a_hang_ends_the_process_and_leaves_the_stacks(tmp_path: Path) -> None:
    """Steps that go on are left alone; what hangs is named with the line that it hangs in."""
    code = HANGING.format(hang="threading.Event().wait()")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
    told = r"train/full: step 2 has taken \d+ s, hang_seconds is 3; the stacks of this rank on "
    assert re.match(told, done.stdout), done.stdout
    assert "a_collective_that_never_returns" in (tmp_path / "stacks.txt").read_text()


def test_a_library_that_keeps_pythons_lock_is_ended_too(tmp_path: Path) -> None:
    """The last resort does not need Python to run: here a regular expression that never comes to an end."""
    hang = "import re, vc2.train.watchdog; re.match('(a+)+b', 'a' * 64)"
    code = HANGING.format(hang=hang).replace("from vc2.train.watchdog import Watchdog",
        "import vc2.train.watchdog\nvc2.train.watchdog.LAST_RESORT = 1.0\n"
        "from vc2.train.watchdog import Watchdog")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (left,) = tmp_path.glob("stacks-*.txt")
    assert "a_collective_that_never_returns" in left.read_text()


def test_a_slow_rank_is_named_once_and_with_its_host() -> None:
    """After some lines in a row, not for a hiccup."""
    stragglers = Stragglers(["alpha", "beta", "gamma"])
    assert not stragglers.look("forward pass", [1.0, 5.0, 1.1])
    assert not stragglers.look("forward pass", [1.0, 1.0, 1.1])
    told = [stragglers.look("forward pass", [1.0, 1.1, 2.0]) for _ in range(LINES + 2)]
    assert [len(sentences) for sentences in told] == [0] * (LINES - 1) + [1, 0, 0]
    assert "rank 2 on gamma is slow" in told[LINES - 1][0]


def test_facts_of_the_guard_are_plain_numbers() -> None:
    """They go into the JSON of a state."""
    spikes = Spikes(SpikeGuard())
    spikes.is_spike(StepFigures(0.5, 0.0, 1.0, 1.0))
    assert json.loads(json.dumps(spikes.facts())) == spikes.facts()
