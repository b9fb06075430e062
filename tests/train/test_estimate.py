"""Counted operations and bytes: against arithmetic by hand, torch's own counter, and real passes of a small network."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vc2.cli import main
from vc2.data.config import SampleForm
from vc2.errors import ConfigError
from vc2.model.config import LoraConfig, ModelConfig, Recompute
from vc2.train.config import Phase, Strategy, TrainStage
from vc2.train.estimate import HARDWARE, estimate, lines_of, useful_flops
from vc2.train.fit import Clip, Kind, RankMemory, clips_by_phase, divisors, largest_fitting, usable_bytes
from vc2.train.memory import (
    Meter,
    count_encoding,
    count_parameters,
    count_pass,
    forward_pass,
    random_network,
    sample_inputs,
    storages_of,
    with_gradients,
)

CLIP = Clip(4, 16, 16)
VIDEO, IMAGE = SampleForm(num_frames=4, width=16, height=16), SampleForm(num_frames=1, width=16, height=16)
FORMS: dict[Kind, SampleForm] = {"video": VIDEO, "image": IMAGE}


def with_level(model: ModelConfig, level: Recompute) -> ModelConfig:
    return model.evolve(unet=model.unet.evolve(gradient_checkpointing=level, temporal_conv_dropout=0.0))


def test_operations_by_hand() -> None:
    """A product of (m, k) and (k, n) takes 2 m k n; its backward pass makes two such products."""
    layer, x = nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    with Meter([*layer.parameters(), x]) as meter:
        loss = layer(x).sum()
        assert meter.flops == 2 * 3 * 5 * 7
        loss.backward()
    assert meter.flops == 3 * 2 * 3 * 5 * 7
    conv, picture = nn.Conv2d(2, 4, 3, padding=1), torch.randn(1, 2, 6, 5)
    with Meter([*conv.parameters(), picture]) as meter:
        conv(picture)
    assert meter.flops == 2 * 6 * 5 * 4 * (2 * 3 * 3)
    q, k, v = (torch.randn(2, 3, length, 8) for length in (6, 9, 9))
    with Meter([q, k, v]) as meter:
        F.scaled_dot_product_attention(q, k, v)
    assert meter.flops == 2 * (2 * 2 * 3 * 6 * 9 * 8)  # q k' and what it weighs


def test_bytes_from_birth_to_death() -> None:
    x = torch.zeros(1000)
    with Meter([x]) as meter:
        first = x + 1
        view = first[:10]
        assert (meter.now, meter.peak) == (4000, 4000)
        second = first.double()
        assert (meter.now, meter.peak) == (12_000, 12_000)
        del first
        assert meter.now == 12_000  # a view keeps it
        del view
        assert (meter.now, meter.peak) == (8_000, 12_000)
        x.mul_(2)
        del second
    assert (meter.now, meter.peak) == (0, 12_000)


@pytest.mark.parametrize(("level", "frames"), [("none", 1), ("none", 4), ("selective", 4), ("full", 4)])
def test_fake_tensors_tell_what_a_real_pass_takes(stage: TrainStage, level: Recompute, frames: int) -> None:
    """Operations and bytes of a network without values are those of one with values. Many samples never take more."""
    model, clip = with_level(stage.model, level), Clip(frames, 16, 16)
    counted = count_pass(model, Strategy(), clip, precision="fp32", stills=False)
    unet = random_network(model.unet, Strategy(), stills=False).train()
    with_gradients(unet)
    peaks = []
    for samples in (1, 2, 4):
        inputs = sample_inputs(model, clip, samples)
        with Meter(storages_of(unet, inputs)) as meter:
            forward_pass(unet, inputs, "fp32").backward()
        assert meter.flops == samples * (counted.forward_flops + counted.backward_flops)
        peaks.append(meter.peak)
    assert peaks[0] == counted.sample_bytes
    assert all(peak <= samples * counted.sample_bytes for peak, samples in zip(peaks, (1, 2, 4), strict=True))
    assert peaks == sorted(peaks) and len(set(peaks)) == 3
    with FlopCounterMode(display=False) as theirs:
        forward_pass(unet, sample_inputs(model, clip, 1), "fp32").backward()
    assert theirs.get_total_flops() == counted.forward_flops + counted.backward_flops


def test_checkpointing_trades_arithmetic_for_memory(stage: TrainStage) -> None:
    """`full` makes most of the forward pass again, `selective` no product or convolution; both keep less."""
    counts = {}
    for level in ("none", "selective", "full"):
        config = stage.evolve(model=with_level(stage.model, level))
        counts[level] = count_pass(config.model, Strategy(), CLIP, precision="bf16", stills=False)
        assert (
            useful_flops(config, CLIP, stills=False)[0] == counts["none"].forward_flops + counts["none"].backward_flops
        )
    none, selective, full = (counts[level] for level in ("none", "selective", "full"))
    assert none.forward_flops == selective.forward_flops == full.forward_flops
    assert selective.backward_flops == none.backward_flops
    assert 0 < full.backward_flops - none.backward_flops < none.forward_flops
    assert full.sample_bytes < selective.sample_bytes < none.sample_bytes


def test_what_is_frozen_costs_less(stage: TrainStage) -> None:
    strategies = [Strategy(), Strategy(trainable="spatial"), Strategy(trainable="spatial", lora=LoraConfig(rank=2))]
    every, spatial, lora = (
        count_pass(stage.model, strategy, CLIP, precision="bf16", stills=False) for strategy in strategies
    )
    assert spatial.backward_flops < every.backward_flops
    assert lora.cast_bytes < spatial.cast_bytes < every.cast_bytes


def test_parameters_of_the_papers_network() -> None:
    unet = ModelConfig().unet
    assert count_parameters(unet, Strategy(), stills=False) == {
        "spatial": (865_910_724, 0),
        "temporal": (547_373_696, 0),
    }
    tuned = count_parameters(unet, Strategy(trainable="temporal"), stills=True)
    assert tuned == {"spatial": (0, 865_910_724), "temporal": (318_997_120, 228_376_576)}
    lora = count_parameters(unet, Strategy(trainable="spatial", lora=LoraConfig(rank=16)), stills=True)
    assert lora["spatial"] == (0, 865_910_724) and lora["lora"][1] == 0


def test_memory_of_a_rank_by_hand() -> None:
    """Float32 throughout: ZeRO shares moments, masters and EMA; without it, weights are masters."""
    facts = {
        "learning": 800,
        "frozen": 200,
        "encoders": 50,
        "cast_bytes": 100,
        "sample_bytes": 10,
        "encoding_bytes": 120,
    }
    plain = RankMemory.of(**facts, world_size=1, zero_stage=0)
    assert dict(plain.fixed) == {"weights": 4000, "gradients": 3200, "moments": 6400, "ema": 3200, "encoders": 200}
    shared = RankMemory.of(**facts, world_size=4, zero_stage=1)
    assert shared.fixed["masters"] == shared.fixed["ema"] == 800 and shared.fixed["moments"] == 1600
    assert RankMemory.of(**facts, world_size=4, zero_stage=2).fixed["gradients"] == shared.fixed["gradients"] - 3200
    assert plain.total(1) == 17_000 + 120 and plain.total(5) == 17_000 + 150


def test_the_largest_divisor_that_fits() -> None:
    assert divisors(12) == [12, 6, 4, 3, 2, 1]
    assert largest_fitting(12, lambda size: size <= 5) == 4
    assert largest_fitting(12, lambda size: False) is None
    assert usable_bytes(1) == 0 < usable_bytes(2) < 2**30


def test_phases_have_sizes_of_their_own(stage: TrainStage) -> None:
    phased = stage.evolve(
        num_steps=10, phases=(Phase(steps=4, num_frames=2), Phase(steps=2, width=32, height=32), Phase())
    )
    assert clips_by_phase(phased, FORMS) == [
        (4, {"video": Clip(2, 16, 16), "image": Clip(1, 16, 16)}),
        (2, {"video": Clip(4, 32, 32), "image": Clip(1, 32, 32)}),
        (4, {"video": CLIP, "image": Clip(1, 16, 16)}),
    ]
    assert clips_by_phase(phased.evolve(num_steps=3, image_share=0.0), FORMS) == [(3, {"video": Clip(2, 16, 16)})]
    assert clips_by_phase(stage.evolve(image_share=1.0), FORMS) == [(8, {"image": Clip(1, 16, 16)})]


def test_hours_and_cost_follow_from_operations(stage: TrainStage) -> None:
    """By hand, for a stage of videos alone; twice the GPUs, half the hours, the same cost."""
    config = stage.evolve(image_share=0.0, precision="bf16", world_size=1)
    found = estimate(config, {"video": VIDEO}, hardware="h100-80", mfu=0.5, price=4.0)
    useful, again = useful_flops(config, CLIP, stills=False)
    assert (found.samples, found.flops, found.flops_again, again) == (32, 32 * useful, 0, 0)
    assert found.flops_of_encoding == 32 * count_encoding(config.model, CLIP).forward_flops
    seconds = 32 * useful / (989e12 * 0.5) + found.flops_of_encoding / (989e12 * 0.5 * 0.5)
    assert found.hours == pytest.approx(seconds / 3600)
    assert found.usd == pytest.approx(4 * seconds / 3600)
    assert found.micro_batch == 4 and found.passes == 1 and not found.warnings
    shared = estimate(config.evolve(world_size=2), {"video": VIDEO}, hardware="h100-80", mfu=0.5, price=4.0)
    assert shared.hours == pytest.approx(found.hours / 2) and shared.usd == pytest.approx(found.usd)
    assert estimate(config, {"video": VIDEO}, encoded=True).hours_of_encoding == 0


def test_what_does_not_fit_is_said(stage: TrainStage) -> None:
    little = estimate(stage.evolve(memory_gib=1.505, world_size=1), FORMS)
    assert little.micro_batch == 1 and "does not fit" in little.warnings[0]
    assert any("does not fit" in line for line in lines_of(little))
    with pytest.raises(ConfigError, match="no multiple of world_size=3"):
        estimate(stage.evolve(batch_size=4).model_copy(update={"world_size": 3}), FORMS)
    with pytest.raises(ConfigError, match="take one of a100-40"):
        estimate(stage, FORMS, hardware="abacus")
    assert all(gpu.memory_gib > 20 for gpu in HARDWARE.values())


def test_a_dry_run_needs_nothing_but_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "spatial", "--dry-run", "--json", "--mfu", "0.5", "--row", "F-Temp-LoRA"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 300 and found["world_size"] == 2 and found["parameters"]["lora"]["frozen"] == 0
    assert found["parameters"]["temporal"]["learning"] == 0
    assert main(["train", "full", "--mfu", "0.5"]) == 1
    assert "for --dry-run" in capsys.readouterr().err
    assert main(["train", "spatial", "--row", "F-base", "--dry-run"]) == 1
    assert "it has no train/spatial" in capsys.readouterr().err
