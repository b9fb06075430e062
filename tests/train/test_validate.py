"""Looking changes nothing: validation, its videos, and the curves that are copied for the eyes."""

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from vc2.errors import ConfigError
from vc2.train.attempts import Run
from vc2.train.config import TrainStage, Validation
from vc2.train.curves import Curves
from vc2.train.encode import Encoders
from vc2.train.loop import Trainer
from vc2.train.metrics import read_metrics, read_validations
from vc2.train.validate import Validator, grid

StartAttempt = Callable[..., Trainer]


def looking(trainer: Trainer, encoders: Encoders) -> Trainer:
    """A trainer that validates on four samples of each medium."""
    samples = trainer.batches._samples
    refs = [*samples.refs(0, 0, 1), *samples.refs(2, 0, 1)]  # type: ignore[attr-defined]
    trainer.validator = Validator(
        config=trainer.config,
        run=trainer.run,
        rank=trainer.rank,
        device=trainer.device,
        engine=trainer.engine,
        schedule=trainer.schedule,
        encoders=encoders,
        batches=trainer.batches,
        refs=refs,
        clip_size=(4, 16, 16),
        fps={8: 1},
    )
    return trainer


@pytest.fixture
def validation() -> Validation:
    return Validation(every=3, prompts=("a thing", "another thing"), sampler_steps=2, guidance_scale=2.0)


def test_validation_changes_nothing(
    run: Run, stage: TrainStage, start_attempt: StartAttempt, encoders: Encoders, validation: Validation
) -> None:
    """With it and without it the run ends with the same bits and the same curve; its own losses come again."""
    stage = stage.evolve(num_steps=6)
    plain = start_attempt(stage, run=Run(run.store, run.stage, "e" * 64))
    plain.train()
    looked = looking(start_attempt(stage.evolve(validation=validation)), encoders)
    looked.train()
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        assert torch.equal(looked.engine.shard(kind), plain.engine.shard(kind)), kind
    assert torch.equal(looked.ema.shard, plain.ema.shard)
    lines = [read_metrics(run.store, run.stage, name * 64) for name in ("f", "e")]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    told = read_validations(run.store, run.stage, run.fingerprint)
    assert [line["step"] for line in told] == [3, 6]
    assert looked.validator
    again = looked.validator.validate(6, looked.ema.shard, beat=lambda: None)
    assert again["val_loss_ema"] == told[1]["val_loss_ema"] and again["val_loss_raw"] == told[1]["val_loss_raw"]
    assert again["val_loss_ema"] != again["val_loss_raw"]
    both = again["val_loss_ema_video"] + again["val_loss_ema_image"]
    assert again["val_loss_ema"] == pytest.approx(both / 2)


def test_validation_leaves_videos_of_raw_and_averaged_weights(
    run: Run, stage: TrainStage, start_attempt: StartAttempt, encoders: Encoders, validation: Validation
) -> None:
    """One animated page in the store, raw on the left and EMA on the right, a row for each caption."""
    looking(start_attempt(stage.evolve(num_steps=3, validation=validation)), encoders).train()
    (line,) = read_validations(run.store, run.stage, run.fingerprint)
    page = Image.open(io.BytesIO(run.store.read(line["samples"].removeprefix(f"{run.store.uri}/"))))
    assert page.size == (2 * 16, 2 * 16) and page.n_frames == 4  # type: ignore[attr-defined]


def test_a_grid_keeps_the_order_of_its_rows() -> None:
    rows = [np.full((2, 16, 32, 3), shade, np.uint8) for shade in (0, 120, 250)]
    page = Image.open(io.BytesIO(grid(rows))).convert("L")
    shades = [page.getpixel((16, 8 + 16 * row)) for row in range(3)]
    assert shades == pytest.approx([0, 120, 250], abs=8)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would draw: its files are records of (length, checksum, bytes, checksum)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_curves_are_what_tensorboard_reads(
    run: Run, stage: TrainStage, start_attempt: StartAttempt, tmp_path: Path
) -> None:
    """Every number of every line, at its step."""
    trainer = start_attempt(stage.evolve(num_steps=3))
    trainer.curves = Curves(tmp_path / "boards", "", name="full-f", config={}, step=0)
    trainer.train()
    trainer.curves.close()
    drawn = scalars(tmp_path / "boards" / "full-f")
    lines = read_metrics(run.store, run.stage, run.fingerprint)
    assert [step for step, _ in drawn["loss/loss"]] == [1, 2, 3]
    assert [value for _, value in drawn["loss/loss"]] == pytest.approx([line["loss"] for line in lines])
    assert {"gradient/grad_norm_spatial", "optimizer/lr", "work/samples_per_s", "work/goodput"} <= drawn.keys()


def test_a_missing_package_is_named_before_training() -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    with pytest.raises(ConfigError, match="wandb is not installed: pip install"):
        Curves(None, "clips", name="full-f", config={}, step=0)
