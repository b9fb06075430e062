"""Laws of a training run, here on one rank with plain torch; `test_run.py` has those of several ranks."""

import math
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vc2.errors import Preempted
from vc2.seeding import derive_seed
from vc2.train.attempts import Attempt, Run, Superseded
from vc2.train.config import Strategy, TrainStage
from vc2.train.loop import Trainer
from vc2.train.metrics import read_metrics
from vc2.train.objective import Batch

StartAttempt = Callable[..., Trainer]


class Killed(Exception):
    pass


def killed_at(trainer: Trainer, step: int) -> Trainer:
    """A run that ends at a step: the process is gone before it has taken that step."""
    batch_of = trainer.batches.at

    last = step

    def dying(step: int) -> Batch:
        if step == last:
            raise Killed
        return batch_of(step)

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


def test_accumulation_makes_one_big_batch(run: Run, stage: TrainStage, start_attempt: StartAttempt) -> None:
    """Four passes of one clip, two of two and one of four learn the same, within rounding."""
    model = stage.model.evolve(unet=stage.model.unet.evolve(temporal_conv_dropout=0.0))
    learnt = []
    for micro_batch in (1, 2, 4):
        other = Run(run.store, run.stage, f"{micro_batch}" * 64)
        trainer = start_attempt(stage.evolve(model=model, num_steps=4), run=other, micro_batch=micro_batch)
        trainer.train()
        learnt.append(trainer.engine.shard("master").clone())
    for one in learnt[1:]:
        torch.testing.assert_close(one, learnt[0], atol=2e-5, rtol=1e-4)


def test_losses_by_medium_and_by_timestep_add_up(
    run: Run, stage: TrainStage, start_attempt: StartAttempt, random_samples: Any
) -> None:
    """Every line tells the same losses cut in different ways."""
    start_attempt(stage.evolve(num_steps=6, log_every=6)).train()
    (line,) = read_metrics(run.store, run.stage, run.fingerprint)
    assert line["loss"] == pytest.approx((4 * line["loss_video"] + 2 * line["loss_image"]) / 6)
    counts = [0] * 4
    for step in range(6):
        batch = random_samples(4).refs(step, 0, 1)
        for ref in batch:
            randoms = torch.Generator().manual_seed(derive_seed(stage.seed, "draws", ref.kind, ref.position))
            torch.rand((), generator=randoms)
            counts[int(torch.randint(1000, (), generator=randoms)) * 4 // 1000] += 1
    quartiles = [line[f"loss_q{number + 1}"] for number in range(4)]
    whole = sum(count * loss for count, loss in zip(counts, quartiles, strict=True) if count)
    assert whole / 24 == pytest.approx(line["loss"])


def test_norms_of_the_gradient_by_group_add_up(run: Run, stage: TrainStage, start_attempt: StartAttempt) -> None:
    """What spatial and temporal modules are told is all that is told."""
    start_attempt(stage.evolve(num_steps=4)).train()
    lines = read_metrics(run.store, run.stage, run.fingerprint)
    parts = [(line["grad_norm_spatial"], line["grad_norm_temporal"]) for line in lines]
    assert [math.hypot(*part) for part in parts] == pytest.approx([line["grad_norm"] for line in lines], rel=1e-5)
    assert parts[0][1] == 0 and min(parts[-1]) > 0  # the last layers of temporal modules begin at zero
