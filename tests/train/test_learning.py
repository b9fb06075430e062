"""That the trainer trains: what can be learnt by heart is, and phases change what is looked at, not what is true."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from vc2.errors import ConfigError
from vc2.model.config import UNetConfig
from vc2.train.attempts import Run
from vc2.train.config import OptimizerConfig, Phase, TrainStage
from vc2.train.encode import fitted
from vc2.train.loop import Trainer
from vc2.train.metrics import read_metrics

StartAttempt = Callable[..., Trainer]

SMALL = UNetConfig(
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(1,),
    num_head_channels=16,
    context_dim=16,
    norm_groups=4,
    temporal_conv_dropout=0.0,
)


@pytest.mark.timeout(300)
def test_eight_clips_are_learnt_by_heart(
    run: Run, stage: TrainStage, start_attempt: StartAttempt, random_samples: Any
) -> None:
    """The loss goes to nearly nothing: objective, schedule, captions and optimizer fit together."""

    class EightClips(random_samples):  # type: ignore[misc, valid-type]
        def refs(self, step: int, rank: int, world_size: int) -> list[Any]:
            return super().refs(3 * step, rank, world_size)  # no images

    stage = stage.evolve(
        model=stage.model.evolve(unet=SMALL),
        batch_size=8,
        caption_dropout=0.0,
        optimizer=OptimizerConfig(lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=50),
        phases=(Phase(steps=350), Phase(steps=100, lr=1e-3), Phase(lr=3e-4)),
        num_steps=550,
        log_every=50,
        state_every_steps=None,
    )
    start_attempt(stage, EightClips(8, count=8), micro_batch=8).train()
    lines = read_metrics(run.store, run.stage, run.fingerprint)
    assert lines[0]["loss"] > 0.5 and lines[-1]["loss"] < 0.1
    assert [line["lr"] for line in lines[6:]] == [3e-3, 1e-3, 1e-3, 3e-4, 3e-4]


def test_a_phase_takes_the_middle_of_a_clip() -> None:
    """Frames and pixels are cut evenly from both ends; a clip that is of the size asked for keeps every bit."""
    frames = np.zeros((8, 16, 32, 3), np.uint8)
    frames[:] = np.arange(8)[:, None, None, None] * 30
    assert np.shares_memory(fitted(frames, Phase()), frames)
    assert fitted(frames, Phase(num_frames=4))[:, 0, 0, 0].tolist() == [60, 90, 120, 150]
    frames[:, :, 8:24] = 200
    square = fitted(frames, Phase(width=8, height=8))
    assert square.shape == (8, 8, 8, 3) and (square[:, :, 1:-1] == 200).all()


def test_an_image_stays_one_frame_in_every_phase() -> None:
    assert fitted(np.zeros((1, 16, 16, 3), np.uint8), Phase(num_frames=4, width=8, height=8)).shape == (1, 8, 8, 3)


@pytest.mark.parametrize("phase", [Phase(num_frames=9), Phase(width=64, height=16)])
def test_a_phase_larger_than_the_shards_is_refused(phase: Phase) -> None:
    """Nothing is made up: frames are not repeated, pixels are not blown up."""
    with pytest.raises(ConfigError, match="the shards have 8 of 32 x 16"):
        fitted(np.zeros((8, 16, 32, 3), np.uint8), phase)


def test_phases_are_part_of_the_promise(run: Run, stage: TrainStage, start_attempt: StartAttempt) -> None:
    """Resumed in the second phase equals unbroken, though what was encoded in the first is of another size."""
    stage = stage.evolve(phases=(Phase(steps=4, num_frames=2, width=16, height=16), Phase(lr=5e-4)), batch_size=4)
    whole = start_attempt(stage, run=Run(run.store, run.stage, "e" * 64))
    whole.train()
    start_attempt(stage.evolve(num_steps=5)).train()
    resumed = start_attempt(stage)
    resumed.train()
    assert torch.equal(resumed.engine.shard("master"), whole.engine.shard("master"))
    assert stage.lr_at(3) == 1e-3 and stage.lr_at(4) == 5e-4


def test_only_the_last_phase_may_have_no_end() -> None:
    with pytest.raises(ValueError, match=r"phases\[0\] has no steps"):
        TrainStage(phases=(Phase(), Phase(steps=3)))
    with pytest.raises(ValueError, match="give both or neither"):
        Phase(width=64)
