import pytest
import torch

from vc2.errors import ConfigError
from vc2.model.config import ScheduleConfig
from vc2.model.schedule import NoiseSchedule, sinusoidal_features


@pytest.mark.parametrize("table", ["betas", "alphas_cumprod", "signal_scale"])
def test_tables_are_those_of_the_released_model_to_the_last_bit(golden, table):
    recorded = golden_tables(golden)
    assert torch.equal(getattr(NoiseSchedule(ScheduleConfig()), table), recorded[table])


def test_the_released_signal_scale_is_ours_with_a_tail_nobody_reads(golden):
    released = golden_tables(golden)["signal_scale_released"]
    torch.testing.assert_close(NoiseSchedule(ScheduleConfig()).signal_scale.float(), released[:1000])


@pytest.mark.parametrize(("scaling", "key"), [(False, "x_t_plain"), (True, "x_t_scaled")])
def test_noising_equals_the_recorded(golden, scaling, key):
    recorded = golden("ddim/q_sample.npz")
    schedule = NoiseSchedule(ScheduleConfig(signal_scaling=scaling))
    noisy = schedule.add_noise(recorded["x0"], recorded["noise"], recorded["t"])
    torch.testing.assert_close(noisy, recorded[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [320, 33])
def test_sinusoids_equal_the_recorded_at_even_and_odd_widths(golden, width):
    """But for the last bit of a frequency, which processors round differently, and which a timestep multiplies."""
    recorded = golden("ddim/timestep_embedding.npz")
    half, steps = width // 2, recorded["t"].double()[:, None]
    angles = steps * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    last_bit = torch.nn.functional.pad(torch.cat([angles, angles], 1) * 2**-23, (0, width % 2))
    assert ((sinusoidal_features(recorded["t"], width) - recorded[f"dim{width}"]).abs() <= 1e-6 + last_bit).all()


def test_noising_keeps_half_precision_and_its_accuracy():
    schedule, latents, noise = NoiseSchedule(ScheduleConfig()), torch.randn(1, 4, 2, 3, 3), torch.randn(1, 4, 2, 3, 3)
    noisy = schedule.add_noise(latents.bfloat16(), noise.bfloat16(), torch.tensor([500]))
    assert noisy.dtype == torch.bfloat16
    torch.testing.assert_close(
        noisy.float(), schedule.add_noise(latents, noise, torch.tensor([500])), rtol=0.02, atol=0.02
    )


def test_wrong_shapes_and_knees_are_refused():
    schedule = NoiseSchedule(ScheduleConfig())
    with pytest.raises(ValueError, match="shapes must match"):
        schedule.add_noise(torch.zeros(1, 4, 2, 3, 3), torch.zeros(1, 4, 1, 3, 3), torch.tensor([5]))
    with pytest.raises(ValueError, match="one per clip"):
        schedule.add_noise(torch.zeros(2, 4, 2, 3, 3), torch.zeros(2, 4, 2, 3, 3), torch.tensor([5]))
    with pytest.raises(ConfigError, match="signal_knee=400"):
        NoiseSchedule(ScheduleConfig(num_timesteps=100))


def golden_tables(golden):
    return golden("ddim/schedule_tables.npz").arrays
