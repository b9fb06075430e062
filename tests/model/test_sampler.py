from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from vc2.errors import ConfigError
from vc2.model.config import SamplerConfig, ScheduleConfig
from vc2.model.sampler import (
    ClipNoise,
    Step,
    StepResult,
    StopSampling,
    clip_seeds,
    ddim_plan,
    ddim_step,
    ddim_timesteps,
    dpm_plan,
    dpm_step,
    dpm_timesteps,
    sample,
)
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


def test_step_counts_on_which_the_released_program_fails_end_at_the_last_timestep():
    """Nothing else differs: there it would ask at timestep 1000, which does not exist."""
    mended = []
    for steps in range(1, 1001):
        timesteps = ddim_timesteps(1000, steps)
        released = [start + 1 for start in range(0, 1000, 1000 // steps)]
        assert timesteps == sorted(set(timesteps)) and timesteps[0] == 1 and timesteps[-1] < 1000
        if timesteps != released:
            assert released.pop() == 1000 and sorted({*released, 999}) == timesteps
            mended.append(steps)
    assert mended == [3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)]


@pytest.mark.parametrize("steps", [-1, 0, 1001])
@pytest.mark.parametrize("timesteps_of", [ddim_timesteps, dpm_timesteps])
def test_no_steps_and_more_than_there_are_timesteps_are_refused(timesteps_of, steps):
    with pytest.raises(ConfigError, match=f"num_steps={steps}: the schedule has 1000 timesteps"):
        timesteps_of(1000, steps)


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


def test_guidance_may_change_from_step_to_step():
    """Every step is one of its own guidance; at 1 the network is asked once."""
    asked = []

    def unet(latents: Tensor, timesteps: Tensor, text: Tensor, fps: int | None = None) -> Tensor:
        asked.append(int(timesteps[0]))
        return latents * text.mean()

    schedule, noise = NoiseSchedule(ScheduleConfig()), torch.randn(1, 4, 1, 2, 2)
    text, uncond = torch.ones(1, 1, 1), torch.full((1, 1, 1), 0.5)
    scales = iter([3.0, 1.0])
    config = SamplerConfig(num_steps=2, eta=0.0)
    found = sample(unet, schedule, noise, text, uncond, config, guidance_scale=lambda: next(scales))
    assert asked == [501, 501, 1]
    first, second = ddim_plan(schedule, 2, 0.0)
    latents, _ = ddim_step(noise, noise * (0.5 + 3.0 * 0.5), first, None)
    assert torch.allclose(found, ddim_step(latents, latents, second, None)[0])
    without = config.evolve(guidance_scale=1.0)
    with pytest.raises(ConfigError, match="needs the tokens of the empty prompt"):
        sample(unet, schedule, noise, text, None, without, guidance_scale=lambda: 5.0)


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


# ---- DPM-Solver++ ----

MEAN, SPREAD = 0.7, 0.4  # of data whose noise has a known best prediction


def best_prediction(latents: Tensor, alpha: float, scale: float) -> Tensor:
    """The noise expected in noisy latents where clean ones are drawn from N(MEAN, SPREAD^2)."""
    signal = alpha**0.5 * scale
    return (1 - alpha) ** 0.5 * (latents - signal * MEAN) / (1 - alpha + (signal * SPREAD) ** 2)


def led_to(latents: Tensor, first: Step, last: Step) -> Tensor:
    """Where the path of the probability flow leads from the beginning of one step to the end of another."""
    here, there = first.alpha**0.5 * first.scale, last.alpha_prev**0.5 * last.scale_prev
    variance, variance_there = 1 - first.alpha + (here * SPREAD) ** 2, 1 - last.alpha_prev + (there * SPREAD) ** 2
    return there * MEAN + (latents - here * MEAN) * (variance_there / variance) ** 0.5


@pytest.mark.parametrize("floor", [1.0, 0.7])
@pytest.mark.parametrize("order", [1, 2])
def test_the_error_of_dpm_solver_falls_with_its_order(order, floor):
    """Data of known best prediction, steps even in lambda; the signal scaling is a part of alpha, which leaves the
    order what it is."""
    latents = torch.randn(64, dtype=torch.float64)

    def error(num_steps: int) -> float:
        part = np.linspace(0, 1, num_steps + 1)
        scales = floor + (1 - floor) * part
        odds = (np.exp(-2.6 + 6 * part) / scales) ** 2  # of signal against noise, without the scaling
        levels = [*zip(odds / (1 + odds), scales, strict=True)]
        x, before, first = latents, None, None
        for (alpha, scale), (alpha_prev, scale_prev) in pairwise(levels):
            step = Step(0, alpha, alpha_prev, 0.0, scale, scale_prev)
            first = first or step
            x, clean = dpm_step(x, best_prediction(x, alpha, scale), step, before)
            before = (step, clean) if order == 2 else None
        return float((x - led_to(latents, first, step)).abs().max())

    errors = [error(num_steps) for num_steps in (20, 40, 80, 160)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert orders[-1] == pytest.approx(order, abs=0.15), orders


@pytest.mark.parametrize("scaling", [False, True])
def test_dpm_solver_comes_closer_than_ddim_in_as_many_steps(scaling):
    """Of the released schedule, with its own timesteps."""
    schedule = NoiseSchedule(ScheduleConfig(signal_scaling=scaling))
    noise = torch.randn(1, 1, 1, 8, 8, dtype=torch.float64)

    def network(latents: Tensor, timesteps: Tensor, text: Tensor, fps: int | None = None) -> Tensor:
        t = int(timesteps[0])
        return best_prediction(latents, float(schedule.alphas_cumprod[t]), float(schedule.signal_scale[t]))

    def error(solver: str) -> float:
        config = SamplerConfig(solver=solver, num_steps=250, guidance_scale=1, eta=0)
        plan = dpm_plan(schedule, 250) if solver == "dpm++" else ddim_plan(schedule, 250, 0)
        latents = sample(network, schedule, noise, torch.zeros(1, 1, 1), None, config)
        return float((latents - led_to(noise, plan[0], plan[-1])).abs().max())

    assert error("dpm++") < error("ddim") / 2


@pytest.mark.parametrize("scaling", [False, True])
def test_a_first_order_step_is_that_of_ddim_without_noise(scaling):
    schedule = NoiseSchedule(ScheduleConfig(signal_scaling=scaling))
    latents, predicted = torch.randn(2, 2, 4, 1, 3, 3, dtype=torch.float64)
    for step in (*ddim_plan(schedule, 10, eta=0.0), *dpm_plan(schedule, 7)):
        for ours, ddim in zip(
            dpm_step(latents, predicted, step), ddim_step(latents, predicted, step, None), strict=True
        ):
            torch.testing.assert_close(ours, ddim, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs, with numpy 2
@pytest.mark.parametrize("num_steps", [1, 2, 8, 20])
def test_dpm_solver_equals_that_of_diffusers(num_steps):
    """Without signal scaling, which theirs does not know: same timesteps, same latents after every step."""
    schedule = NoiseSchedule(ScheduleConfig(signal_scaling=False))
    theirs = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        final_sigmas_type="sigma_min",
        euler_at_final=True,
    )
    theirs.set_timesteps(num_steps)
    noise, text = torch.randn(1, 4, 2, 3, 3), torch.full((1, 1, 1, 1, 1), 0.2)
    ours: list[StepResult] = []
    config = SamplerConfig(solver="dpm++", num_steps=num_steps, guidance_scale=1)
    sample(analytic, schedule, noise, text, None, config, on_step=ours.append)
    assert [result.timestep for result in ours] == theirs.timesteps.tolist()
    latents = noise
    for result, timestep in zip(ours, theirs.timesteps, strict=True):
        latents = theirs.step(analytic(latents, timestep[None], text), timestep, latents).prev_sample
        assert relative_error(result.latents, latents) < 2e-5


def test_the_ratio_of_signal_to_noise_falls_with_every_timestep():
    """What DPM-Solver++ counts its steps in; the signal scaling does not fold it back."""
    schedule = NoiseSchedule(ScheduleConfig())
    ratios = np.array([step.log_ratio for step in ddim_plan(schedule, 1000, 0.0)[::-1]])  # timesteps 1 to 999
    assert len(ratios) == 999 and (np.diff(ratios) < 0).all()
    step = Step(timestep=1, alpha=0.5, alpha_prev=0.8, sigma=0.0, scale=0.7, scale_prev=1.0)
    assert step.log_ratio == pytest.approx(np.log(0.7)) and step.log_ratio_prev == pytest.approx(np.log(2.0))


@pytest.mark.parametrize("num_steps", [1, 3, 25, 999])
def test_dpm_solver_asks_just_as_often_as_it_is_told_and_begins_at_the_noisiest_timestep(num_steps):
    timesteps = dpm_timesteps(1000, num_steps)
    assert len(timesteps) == num_steps and timesteps[-1] == 999 and timesteps[0] > 0


# ---- guidance ----


def test_a_rescale_of_nothing_is_bit_identical_and_a_whole_one_brings_back_the_spread(golden):
    """Lin et al. 2023, Eq. 15 and 16: per clip, the guided prediction spreads as the conditional one does."""
    recorded = golden("ddim/eta0_guided.npz")
    schedule = NoiseSchedule(ScheduleConfig(signal_scaling=recorded.meta["use_scale"]))
    noise, text, uncond = recorded["x_T"].double(), torch.randn(2, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1)

    def network(latents: Tensor, timesteps: Tensor, text: Tensor, fps: int) -> Tensor:
        return torch.tanh(latents) * (1 + text)

    def first_prediction(rescale: float) -> Tensor:
        config = SamplerConfig(num_steps=1, eta=0, guidance_scale=7.0, guidance_rescale=rescale)
        (step,) = ddim_plan(schedule, 1, 0)
        told: list[StepResult] = []
        sample(network, schedule, noise, text, uncond, config, on_step=told.append)
        return (noise - step.alpha**0.5 * step.scale * told[0].clean) / (1 - step.alpha) ** 0.5

    plain, whole, half = (first_prediction(rescale) for rescale in (0.0, 1.0, 0.5))
    conditional = network(noise, torch.ones(1), text, 8)
    for clip in range(2):
        assert float(whole[clip].std()) == pytest.approx(float(conditional[clip].std()), rel=1e-6)
    torch.testing.assert_close(half, (plain + whole) / 2)
    torch.testing.assert_close(plain, 7 * conditional - 6 * torch.tanh(noise))
    config = SamplerConfig(num_steps=1, eta=0, guidance_rescale=0.5)
    assert sample(lambda latents, *_, **__: 0 * latents, schedule, noise, text, uncond, config).isfinite().all()


@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
def test_one_call_of_twice_the_clips_equals_two_calls(make_unet, solver):
    """Each clip with its own frame rate, text and image tokens."""
    unet, schedule = make_unet(use_image_attention=True), NoiseSchedule(ScheduleConfig())
    text, empty, image, blank = (torch.randn(n, length, 12) for n, length in ((2, 5), (1, 5), (2, 3), (1, 3)))
    noise, calls = ClipNoise([1, 2], (4, 2, 4, 4)), []

    def counting(latents: Tensor, *args, **kwargs) -> Tensor:
        calls.append(latents.shape[0])
        return unet(latents, *args, **kwargs)

    def clips(batched: bool, fps: Tensor) -> Tensor:
        config = SamplerConfig(solver=solver, num_steps=2, guidance_scale=3.0, batched_guidance=batched)
        return sample(counting, schedule, noise.start(), text, empty, config, fps, noise, image=image,
                      uncond_image=blank)  # fmt: skip

    fps = torch.tensor([8, 24])
    two, one = clips(False, fps), clips(True, fps)
    assert calls == [2, 2, 2, 2, 4, 4]
    assert relative_error(one, two) < 1e-5
    assert relative_error(clips(True, fps.flip(0)), two) > 1e-3


def test_batched_guidance_does_without_where_the_two_calls_differ_in_shape(make_unet):
    """A negative prompt of another length, or image tokens in one call alone, still work."""
    unet, schedule, noise = make_unet(), NoiseSchedule(ScheduleConfig()), torch.randn(1, 4, 1, 4, 4)
    config = SamplerConfig(num_steps=2, guidance_scale=3.0, eta=0)
    text, empty = torch.randn(1, 5, 12), torch.randn(1, 4, 12)
    two, one = (
        sample(unet, schedule, noise, text, empty, config.evolve(batched_guidance=batched)) for batched in (False, True)
    )
    assert torch.equal(one, two)


# ---- who looks on ----


@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
def test_who_looks_on_sees_every_step_and_may_replace_latents(solver):
    schedule, noise, text = NoiseSchedule(ScheduleConfig()), torch.randn(1, 4, 1, 2, 2), torch.zeros(1, 1, 1, 1, 1)
    config = SamplerConfig(solver=solver, num_steps=4, guidance_scale=1, eta=0)
    seen: list[StepResult] = []
    latents = sample(analytic, schedule, noise, text, None, config, on_step=seen.append)
    plan = ddim_plan(schedule, 4, 0) if solver == "ddim" else dpm_plan(schedule, 4)
    assert [(r.number, r.total, r.timestep) for r in seen] == [(n, 4, step.timestep) for n, step in enumerate(plan)]
    assert torch.equal(seen[-1].latents, latents)

    fixed = torch.full_like(noise, 3.0)
    last = sample(analytic, schedule, noise, text, None, config,
                  on_step=lambda result: fixed if result.number == 3 else None)  # fmt: skip
    assert torch.equal(last, fixed)
    early = sample(analytic, schedule, noise, text, None, config,
                   on_step=lambda result: fixed if result.number == 0 else None)  # fmt: skip
    assert not torch.equal(early, latents)


def test_who_looks_on_may_stop_it():
    """The latents so far are returned, or those that are handed over."""
    schedule, noise, text = NoiseSchedule(ScheduleConfig()), torch.randn(1, 4, 1, 2, 2), torch.zeros(1, 1, 1, 1, 1)
    config, seen = SamplerConfig(num_steps=4, guidance_scale=1, eta=0), []

    def stop_at_second(result: StepResult) -> None:
        seen.append(result)
        if result.number == 1:
            raise StopSampling

    assert torch.equal(sample(analytic, schedule, noise, text, None, config, on_step=stop_at_second), seen[1].latents)
    assert len(seen) == 2

    def stop_with(result: StepResult) -> None:
        raise StopSampling(torch.zeros_like(result.latents))

    assert not sample(analytic, schedule, noise, text, None, config, on_step=stop_with).any()


def test_a_clip_of_a_call_with_one_seed_can_be_made_alone():
    """Clip i of a call with seed s begins with the noise of a call with seed s + i."""
    shape = (4, 2, 3, 3)
    together = ClipNoise(clip_seeds(7, 3), shape)
    for clip in range(3):
        alone = ClipNoise(clip_seeds(7 + clip, 1), shape)
        assert torch.equal(alone.start()[0], together.start()[clip]) and torch.equal(alone(2)[0], together(2)[clip])


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
