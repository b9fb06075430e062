import pytest
import torch
from torch import Tensor

from vc2.errors import ConfigError
from vc2.model.config import SamplerConfig, ScheduleConfig
from vc2.model.sampler import ClipNoise, ddim_plan, ddim_step, ddim_timesteps, sample
from vc2.model.schedule import NoiseSchedule

RUNS = ["eta0_guided", "eta1_guided_scaled", "eta1_unguided"]


def analytic(latents: Tensor, timesteps: Tensor, text: Tensor, fps: int | None = None) -> Tensor:
    return 0.1 * torch.tanh(latents) + (timesteps / 1000).view(-1, 1, 1, 1, 1) + text


@pytest.mark.parametrize("run", RUNS)
def test_sampling_equals_the_recorded_run(golden, run):
    """Guidance, eta, signal scaling and the odd first and last timesteps, all at once."""
    recorded = golden(f"ddim/{run}.npz")
    config = SamplerConfig(num_steps=10, eta=recorded.meta["eta"], guidance_scale=recorded.meta["guidance_scale"])
    schedule = NoiseSchedule(ScheduleConfig(signal_scaling=recorded.meta["use_scale"]))
    latents = sample(
        analytic,
        schedule,
        recorded["x_T"],
        recorded["cond"],
        recorded["uncond"],
        config,
        8,
        lambda step: recorded["noise"][step],
    )
    assert relative_error(latents, recorded["x_0"]) < 1e-5


@pytest.mark.parametrize("run", RUNS)
def test_every_step_alone_equals_the_recorded_step(golden, run):
    recorded = golden(f"ddim/{run}.npz")
    schedule = NoiseSchedule(ScheduleConfig(signal_scaling=recorded.meta["use_scale"]))
    plan = ddim_plan(schedule, 10, recorded.meta["eta"])
    assert [step.timestep for step in plan] == recorded["timesteps"].tolist()
    for name, ours in (("alphas", "alpha"), ("alphas_prev", "alpha_prev"), ("sigmas", "sigma")):
        torch.testing.assert_close(
            torch.tensor([getattr(step, ours) for step in plan]).double(), recorded[name], rtol=0, atol=1e-6
        )
    latents, guidance = recorded["x_T"], recorded.meta["guidance_scale"]
    for number, step in enumerate(plan):
        timesteps = torch.full((2,), step.timestep)
        with_text, without = (analytic(latents, timesteps, recorded[key]) for key in ("cond", "uncond"))
        noise = recorded["noise"][number] if step.sigma else None
        after, clean = ddim_step(latents, without + guidance * (with_text - without), step, noise)
        assert relative_error(after, recorded["x_steps"][number]) < 1e-5
        assert relative_error(clean, recorded["pred_x0_steps"][number]) < 1e-5
        latents = recorded["x_steps"][number]


@pytest.mark.parametrize(
    ("steps", "first", "last", "count"), [(50, 1, 981, 50), (7, 1, 995, 8), (1, 1, 1, 1), (500, 1, 999, 500)]
)
def test_timesteps_are_the_released_ones(steps, first, last, count):
    """Each is one above a multiple of floor(1000 / S); where S does not divide 1000 there are more than S."""
    timesteps = ddim_timesteps(1000, steps)
    assert (timesteps[0], timesteps[-1], len(timesteps)) == (first, last, count)


def test_step_counts_that_would_begin_beyond_the_schedule_are_refused():
    """Just those on which the released sampler crashes, and each refusal names a number that works."""
    refused = []
    for steps in range(1, 1001):
        try:
            ddim_timesteps(1000, steps)
        except ConfigError as error:
            refused.append(steps)
            assert ddim_timesteps(1000, int(str(error).rsplit(" ", 1)[1]))
    assert refused == [3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)]


def test_without_guidance_the_network_is_called_once_per_step_and_uncond_is_not_needed():
    calls = []

    def counting(latents: Tensor, timesteps: Tensor, text: Tensor, fps: int) -> Tensor:
        calls.append((int(timesteps[0]), fps))
        return latents

    done = []
    config = SamplerConfig(num_steps=4, guidance_scale=1, eta=0, fps=9)
    sample(counting, NoiseSchedule(ScheduleConfig()), torch.randn(2, 4, 1, 2, 2), torch.zeros(1, 3, 5), None, config,
           progress=lambda now, total: done.append((now, total)))  # fmt: skip
    assert calls == [(751, 9), (501, 9), (251, 9), (1, 9)]
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_what_is_missing_is_said(golden):
    schedule, noise, text = NoiseSchedule(ScheduleConfig()), torch.zeros(1, 4, 1, 2, 2), torch.zeros(1, 1, 1, 1, 1)
    with pytest.raises(ConfigError, match="empty prompt"):
        sample(analytic, schedule, noise, text, None, SamplerConfig())
    with pytest.raises(ConfigError, match="noise_at_step"):
        sample(analytic, schedule, noise, text, text, SamplerConfig())


def test_a_clip_samples_alike_alone_and_in_any_batch(make_unet):
    """Noise belongs to the clip's seed, not to its place."""
    unet, schedule = make_unet(), NoiseSchedule(ScheduleConfig())
    config = SamplerConfig(num_steps=2, guidance_scale=3.0, eta=1.0, fps=8)
    text, empty = torch.randn(3, 5, 12), torch.randn(1, 5, 12)

    def clips(chosen: list[int]) -> Tensor:
        noise = ClipNoise([100 + clip for clip in chosen], (4, 2, 4, 4))
        return sample(unet, schedule, noise.start(), text[chosen], empty, config, noise_at_step=noise)

    together = clips([0, 1, 2])
    assert relative_error(clips([1]), together[1:2]) < 1e-4
    assert relative_error(clips([2, 0]), together[[2, 0]]) < 1e-4


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
