"""Laws of the objective: draws belong to samples."""

import pytest
import torch

from vc2.model.config import ScheduleConfig
from vc2.model.schedule import NoiseSchedule
from vc2.train.objective import Batch, best_linear_loss, draw, micro_batches


def batch_of(size: int, first: int = 0, kind: str = "video") -> Batch:
    positions = tuple(range(first, first + size))
    return Batch(
        keys=tuple(f"{kind}-{position}" for position in positions),
        kind=kind,
        positions=positions,
        moments=torch.zeros(size, 8, 3, 2, 2),
        text=torch.zeros(size, 4, 6),
        empty_text=torch.zeros(4, 6),
        fps=torch.full((size,), 8),
    )


def test_draws_do_not_depend_on_how_samples_are_grouped() -> None:
    """Two ranks with micro-batches of two draw what one rank draws for the whole batch."""
    whole = draw(7, batch_of(8), num_timesteps=1000, caption_dropout=0.5)
    ranks = [batch_of(4, first=0), batch_of(4, first=4)]
    parts = [
        draw(7, part, num_timesteps=1000, caption_dropout=0.5) for rank in ranks for part in micro_batches(rank, 2)
    ]
    for name in ("latent_noise", "noise", "timesteps", "dropped"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_every_sample_has_draws_of_its_own() -> None:
    """Position, kind and seed all matter."""
    noise = draw(7, batch_of(2), num_timesteps=1000, caption_dropout=0.0).noise
    others = [
        draw(7, batch_of(1, first=5), num_timesteps=1000, caption_dropout=0.0).noise,
        draw(7, batch_of(1, kind="image"), num_timesteps=1000, caption_dropout=0.0).noise,
        draw(8, batch_of(1), num_timesteps=1000, caption_dropout=0.0).noise,
        noise[1:],
    ]
    assert not any(torch.equal(noise[:1], other) for other in others)


def test_captions_are_dropped_as_often_as_asked() -> None:
    """A share of 0.1 of many samples, and none at 0."""
    dropped = draw(0, batch_of(2000), num_timesteps=1000, caption_dropout=0.1).dropped
    assert 150 < int(dropped.sum()) < 250
    assert not draw(0, batch_of(100), num_timesteps=1000, caption_dropout=0.0).dropped.any()


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_linear_loss_is_what_scaling_the_input_costs(power: float) -> None:
    """The closed form equals a measurement on normal latents."""
    schedule = NoiseSchedule(ScheduleConfig())
    torch.manual_seed(0)
    timesteps = torch.arange(0, 1000, 10)
    latents = torch.randn(100, 4, 4, 8, 8) * power**0.5
    noise = torch.randn_like(latents)
    noisy = schedule.add_noise(latents, noise, timesteps).flatten(1)
    best = (noisy * noise.flatten(1)).sum(1) / noisy.square().sum(1)
    measured = (best[:, None] * noisy - noise.flatten(1)).square().mean()
    assert float(measured) == pytest.approx(best_linear_loss(schedule, power), rel=0.05)
