"""Laws of a training run, here on one rank with plain torch; `test_run.py` has those of several ranks."""

import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from vc2.errors import Preempted
from vc2.train.attempts import Attempt, Run, Superseded
from vc2.train.config import Strategy, TrainStage
from vc2.train.loop import NonFiniteLoss, Trainer
from vc2.train.metrics import read_metrics

StartAttempt = Callable[..., Trainer]


class Killed(Exception):
    pass


def killed_at(trainer: Trainer, step: int) -> Trainer:
    """A run that ends at a step: the process is gone before it has taken that step."""
    batch_of = trainer.batches.at

    def dying(at: int) -> Any:
        if at == step:
            raise Killed
        return batch_of(at)

    trainer.batches.at = dying
    return trainer


def curve(run: Run) -> list[tuple[int, float, float]]:
    return [
        (line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run.store, run.stage, run.fingerprint)
    ]


@pytest.mark.parametrize("log_every", [1, 3])
def test_resumed_equals_unbroken_bit_for_bit(
    run: Run, stage: TrainStage, start_attempt: StartAttempt, log_every: int
) -> None:
    """Killed at two places and started again, a run ends with the same masters, moments, EMA and training curve."""
    stage = stage.evolve(log_every=log_every)
    other = Run(run.store, run.stage, "e" * 64)
    whole = start_attempt(stage, run=other)
    whole.train()
    for step in (4, 7):
        with pytest.raises(Killed):
            killed_at(start_attempt(stage.evolve(num_steps=9)), step).train()
    resumed = start_attempt(stage)
    assert resumed.attempt == 3 and resumed.step == 6
    resumed.train()
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        assert torch.equal(resumed.engine.shard(kind), whole.engine.shard(kind)), kind
    assert torch.equal(resumed.ema.shard, whole.ema.shard)
    assert curve(run) == curve(other)
    assert [step for step, *_ in curve(run)] == [step for step in range(1, 9) if step % log_every == 0]


def test_more_steps_continue_the_run(run: Run, stage: TrainStage, start_attempt: StartAttempt) -> None:
    """The number of steps is no part of the run's name: eight steps are five and three more."""
    start_attempt(stage.evolve(num_steps=5)).train()
    continued = start_attempt(stage)
    assert continued.step == 5
    continued.train()
    whole = start_attempt(stage, run=Run(run.store, run.stage, "e" * 64))
    whole.train()
    assert torch.equal(continued.engine.shard("master"), whole.engine.shard("master"))


def test_frozen_parameters_keep_every_bit(stage: TrainStage, start_attempt: StartAttempt) -> None:
    """Spatial tuning changes spatial parameters alone."""
    trainer = start_attempt(stage.evolve(strategy=Strategy(trainable="spatial"), num_steps=3))
    before = {name: parameter.clone() for name, parameter in trainer.engine.module.named_parameters()}
    trainer.train()
    changed = {
        name for name, parameter in trainer.engine.module.named_parameters() if not torch.equal(parameter, before[name])
    }
    trained = {fragment.name for fragment in trainer.engine.fragments(trainer.ema.shard)}
    assert changed == trained
    assert not any("temporal" in name or "fps" in name for name in changed)


def test_sigterm_leaves_a_state_and_the_run_goes_on_from_it(
    run: Run, stage: TrainStage, start_attempt: StartAttempt, random_samples: Any
) -> None:
    """A run that is asked to stop keeps the step it has just taken."""
    samples = random_samples(4)
    frames = samples.frames

    def asked_to_stop(ref: Any) -> Any:
        if len(samples.reads) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return frames(ref)

    samples.frames = asked_to_stop
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Preempted, match="step 1 is kept"):
            start_attempt(stage, samples).train()
        assert start_attempt(stage).step == 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_loss_that_is_no_number_names_step_and_samples(
    run: Run, stage: TrainStage, start_attempt: StartAttempt, random_samples: Any
) -> None:
    """The run ends before anything is poisoned, and says where it was."""
    trainer = start_attempt(stage)
    moments = trainer.batches._encoders.moments

    def poisoned(key: str, frames: Any = None) -> torch.Tensor:
        return moments(key, frames) * (np.nan if key == "image-3" else 1.0)

    trainer.batches._encoders.moments = poisoned  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLoss, match=r"loss of step 2 is not finite.*image-3"):
        trainer.train()
    assert torch.isfinite(trainer.engine.shard("master")).all() and torch.isfinite(trainer.ema.shard).all()


def test_a_writer_that_was_replaced_stops_and_commits_nothing(
    run: Run, stage: TrainStage, start_attempt: StartAttempt, claim: Callable[..., Attempt]
) -> None:
    """What a zombie writes after a newer attempt was claimed is no state."""
    zombie = start_attempt(stage)
    claim(run, 2)
    with pytest.raises(Superseded, match="attempt 2 has taken over"):
        zombie.train()
    assert run.all_states() == []


def test_a_repeated_sample_is_read_once(stage: TrainStage, start_attempt: StartAttempt, random_samples: Any) -> None:
    """What was encoded is remembered: nine batches of four hold six videos and four images."""
    samples = random_samples(4)
    start_attempt(stage.evolve(num_steps=9), samples).train()
    assert sorted(samples.reads) == sorted(set(samples.reads)) and len(samples.reads) == 10
