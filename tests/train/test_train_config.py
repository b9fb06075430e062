"""Laws of a training request."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from vc2.train.config import OptimizerConfig, TrainStage


def test_how_the_work_is_done_is_not_what_is_asked_for() -> None:
    """Steps, layout, intervals and paths change no fingerprint; the learning rate does."""
    stage = TrainStage()
    knobs = {
        "num_steps": 5,
        "world_size": 2,
        "micro_batch": 4,
        "log_every": 1,
        "state_every_seconds": 1.0,
        "zero_stage": 2,
    }
    assert stage.evolve(**knobs).identity() == stage.identity()
    assert stage.evolve(optimizer=OptimizerConfig(lr=1.0)).identity() != stage.identity()


def test_parts_that_do_not_fit_are_refused_at_birth() -> None:
    """Widths of text and network must agree; the batch must divide among ranks and passes."""
    stage = TrainStage()
    with pytest.raises(ValidationError, match="context_dim"):
        stage.evolve(model=stage.model.evolve(text=stage.model.text.evolve(width=512)))
    with pytest.raises(ValidationError, match="batch_size"):
        stage.evolve(batch_size=10, world_size=4)
    with pytest.raises(ValidationError, match="zero_stage"):
        stage.evolve(zero_stage=0, world_size=2)


def test_the_rate_rises_to_a_constant() -> None:
    """Linear over the warm-up, never zero."""
    optimizer = OptimizerConfig(lr=1.0, warmup_steps=4)
    assert [optimizer.lr_at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert OptimizerConfig(lr=1.0).lr_at(0) == 1.0


def test_the_side_that_starts_ranks_needs_no_torch() -> None:
    """Planning, waiting for, starting and reading a run import none of the heavy libraries."""
    heavy = "{'torch', 'deepspeed', 'ray', 'prefect', 'diffusers', 'open_clip'}"
    check = f"import sys, vc2.train.run, vc2.train.metrics; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
