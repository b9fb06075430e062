"""Sampling: from pure noise to clean latents, by DDIM in the released network's own variant or by DPM-Solver++.

The network is asked with and without the text, and guided (Ho and Salimans 2022; rescaled by phi: Lin et al. 2023,
Eq. 15 and 16):

    e = e_u + g (e_c - e_u)
    e = phi e std(e_c) / std(e) + (1 - phi) e

Either solver then takes a step from level a to level a' > a. With the signal scaling s of the schedule (1 without it)
the clean latents it believes in are

    x_0 = (x - sqrt(1 - a) e) / (sqrt(a) s)

*DDIM* (Song et al. 2021, Eq. 12 and 16):

    x'  = sqrt(a') s' x_0 + sqrt(1 - a' - sigma^2) e + sigma noise
    sigma = eta sqrt((1 - a') / (1 - a) (1 - a / a'))

For S steps over 1000 timesteps the network is asked at c k + 1, c = floor(1000 / S), k = 0, 1, ...: more than S times
where S does not divide 1000. The last step ends at the level of timestep 0, not at 1, and adds noise too. Where c
divides 999 the last of these timesteps is 1000, which is none, and the released program fails; here it becomes 999.

*DPM-Solver++(2M)* (Lu et al. 2022, Algorithm 2) has no noise in its steps. With alpha = sqrt(a) s, sigma = sqrt(1 - a),
lambda = log(alpha / sigma), h = lambda' - lambda, and x_0 and h of the step before marked by a bar:

    D  = x_0 + h / (2 h_bar) (x_0 - x_0_bar)
    x' = sigma' / sigma x + alpha' (1 - exp(-h)) D

D = x_0 in the first step, and in the last: its h is by far the longest, and to extrapolate over it overshoots. Such a
step is DDIM's with eta 0. It asks S times, evenly from the last timestep on, and ends at timestep 0 too.
Shapes: B clips, C latent channels, T frames, H x W latent pixels, L text tokens of width D.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vc2.errors import ConfigError
from vc2.model.config import SamplerConfig
from vc2.model.schedule import NoiseSchedule
from vc2.seeding import generator

__all__ = [
    "ClipNoise",
    "Step",
    "StepResult",
    "StopSampling",
    "clip_seeds",
    "ddim_plan",
    "ddim_step",
    "ddim_timesteps",
    "dpm_plan",
    "dpm_step",
    "dpm_timesteps",
    "sample",
]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the sampler: where it is, where it goes."""

    timestep: int  # what the network is told
    alpha: float  # a, cumulative signal level here
    alpha_prev: float  # a', the level this step ends at
    sigma: float  # standard deviation of the fresh noise
    scale: float  # s, signal scaling here
    scale_prev: float  # s'

    @property
    def log_ratio(self) -> float:
        """lambda: logarithm of signal over noise here."""
        return _log_ratio(self.alpha, self.scale)

    @property
    def log_ratio_prev(self) -> float:
        """lambda': the same at the level this step ends at."""
        return _log_ratio(self.alpha_prev, self.scale_prev)


def _log_ratio(alpha: float, scale: float) -> float:
    return math.log(scale) + 0.5 * (math.log(alpha) - math.log1p(-alpha))


@dataclass(frozen=True, slots=True)
class StepResult:
    """Where sampling is after a step."""

    number: int  # of the step, from 0 in the order taken
    total: int  # steps there are
    timestep: int  # at which the network was asked
    latents: Tensor  # after the step, (B, C, T, H, W)
    clean: Tensor  # the clean latents that the step believed in, same shape


class StopSampling(Exception):
    """Raised by an `on_step` that has seen enough: `sample` returns the latents it has, or those given here."""

    def __init__(self, latents: Tensor | None = None) -> None:
        super().__init__("sampling was stopped by its on_step")
        self.latents = latents


def ddim_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """Timesteps at which DDIM asks the network, rising. `num_steps=1` asks at timestep 1 only.

    Raises:
        ConfigError: If there are fewer timesteps than steps.
    """
    _check_steps(num_timesteps, num_steps)
    released = (start + 1 for start in range(0, num_timesteps, num_timesteps // num_steps))
    # The released program would ask at `num_timesteps` for some step counts, which does not exist.
    return sorted({min(timestep, num_timesteps - 1) for timestep in released})


def dpm_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """Timesteps at which DPM-Solver++ asks the network, rising: evenly spread up to the last, without 0.

    Raises:
        ConfigError: If there are fewer timesteps than steps.
    """
    _check_steps(num_timesteps, num_steps)
    spread = np.linspace(0, num_timesteps - 1, num_steps + 1).round().astype(int)
    return sorted({int(timestep) for timestep in spread} - {0})


def _check_steps(num_timesteps: int, num_steps: int) -> None:
    if not 1 <= num_steps <= num_timesteps:
        raise ConfigError(f"num_steps={num_steps}: the schedule has {num_timesteps} timesteps; take 1 to that many")


def ddim_plan(schedule: NoiseSchedule, num_steps: int, eta: float) -> list[Step]:
    """All steps of DDIM in the order in which they are taken, the noisiest first.

    Raises:
        ConfigError: If the schedule has no such number of steps.
    """
    return _plan(schedule, ddim_timesteps(schedule.config.num_timesteps, num_steps), eta)


def dpm_plan(schedule: NoiseSchedule, num_steps: int) -> list[Step]:
    """All steps of DPM-Solver++ in the order in which they are taken, the noisiest first.

    Raises:
        ConfigError: If the schedule has no such number of steps.
    """
    return _plan(schedule, dpm_timesteps(schedule.config.num_timesteps, num_steps), eta=0.0)


def _plan(schedule: NoiseSchedule, timesteps: list[int], eta: float) -> list[Step]:
    steps = []
    for timestep, target in zip(timesteps, [0, *timesteps], strict=False):
        alpha, alpha_prev = float(schedule.alphas_cumprod[timestep]), float(schedule.alphas_cumprod[target])
        sigma = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)) ** 0.5
        scale, scale_prev = float(schedule.signal_scale[timestep]), float(schedule.signal_scale[target])
        steps.append(Step(timestep, alpha, alpha_prev, sigma, scale, scale_prev))
    return steps[::-1]


def ddim_step(latents: Tensor, predicted: Tensor, step: Step, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Take one step.

    Args:
        latents: Noisy latents at `step.alpha`, (B, C, T, H, W).
        predicted: The (guided) prediction of their noise, same shape.
        step: From `ddim_plan`.
        noise: Fresh standard normal noise, same shape; None where `step.sigma` is 0.

    Returns:
        The latents at `step.alpha_prev`, and the clean latents this step believes in.
    """
    clean = (latents - (1 - step.alpha) ** 0.5 * predicted) / (step.alpha**0.5 * step.scale)
    direction = max(1 - step.alpha_prev - step.sigma**2, 0.0) ** 0.5
    latents = step.alpha_prev**0.5 * step.scale_prev * clean + direction * predicted
    return (latents if noise is None else latents + step.sigma * noise), clean


def dpm_step(
    latents: Tensor, predicted: Tensor, step: Step, before: tuple[Step, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Take one step of DPM-Solver++.

    Args:
        latents: Noisy latents at `step.alpha`, (B, C, T, H, W).
        predicted: The (guided) prediction of their noise, same shape.
        step: From `dpm_plan` (or `ddim_plan`).
        before: The step taken before and the clean latents it believed in; None: a step of first order.

    Returns:
        The latents at `step.alpha_prev`, and the clean latents this step believes in.
    """
    clean = (latents - (1 - step.alpha) ** 0.5 * predicted) / (step.alpha**0.5 * step.scale)
    length = step.log_ratio_prev - step.log_ratio
    towards = clean
    if before is not None:
        earlier, earlier_clean = before
        towards = clean + length / (2 * (earlier.log_ratio_prev - earlier.log_ratio)) * (clean - earlier_clean)
    kept = ((1 - step.alpha_prev) / (1 - step.alpha)) ** 0.5
    return kept * latents - math.expm1(-length) * step.alpha_prev**0.5 * step.scale_prev * towards, clean


def clip_seeds(seed: int, count: int) -> list[int]:
    """Seeds of the clips of a call that is given one seed: clip i of it is the first clip of a call with seed + i."""
    return list(range(seed, seed + count))


class ClipNoise:
    """The noise of every clip of a batch from that clip's own seed: how clips are grouped does not matter.

    Args:
        seeds: One per clip.
        shape: Of one clip's latents, (C, T, H, W).
        device: Where the noise is wanted; it is drawn on the CPU, the same everywhere.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds = tuple(seeds)
        self.shape = tuple(shape)
        self.device = device

    def start(self) -> Tensor:
        """What sampling begins with, (B, C, T, H, W)."""
        return self._draw("start")

    def __call__(self, step: int) -> Tensor:
        """The fresh noise of the given step, counted from 0 in the order taken, (B, C, T, H, W)."""
        return self._draw(step)

    def _draw(self, purpose: int | str) -> Tensor:
        draws = [
            generator(seed, "sampling", purpose).standard_normal(self.shape, dtype=np.float32) for seed in self.seeds
        ]
        return torch.from_numpy(np.stack(draws)).to(self.device)


@torch.no_grad()
def sample(
    unet: Callable[..., Tensor],
    schedule: NoiseSchedule,
    noise: Tensor,
    text: Tensor,
    uncond: Tensor | None,
    config: SamplerConfig,
    fps: int | Tensor | None = None,
    noise_at_step: Callable[[int], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    image: Tensor | None = None,
    uncond_image: Tensor | None = None,
    on_step: Callable[[StepResult], Tensor | None] | None = None,
    guidance_scale: Callable[[], float] | None = None,
) -> Tensor:
    """Sample clean latents.

    Args:
        unet: A `UNet3D` in evaluation mode, or what is called like one.
        schedule: The schedule the network was trained with.
        noise: Standard normal noise to start from, (B, C, T, H, W), for example `ClipNoise.start`.
        text: Tokens of the prompts, (B, L, D).
        uncond: Tokens of the empty or a negative prompt, (1, L, D) or (B, L, D); may be None at guidance 1.
        config: Solver, steps, guidance, eta.
        fps: Frame rate told to the network, one number or one per clip, (B,); None: `config.fps`.
        noise_at_step: Fresh noise by step number, counted from 0, for example a `ClipNoise`; may be None at eta 0 and
            for DPM-Solver++.
        progress: Called after every step with the steps done and the steps there are.
        image: Image tokens, (B, M, D), for an image-to-video network.
        uncond_image: Image tokens of the unconditional call, (1, M, D) or (B, M, D).
        on_step: Called after every step; latents that it returns take the place of the step's. It may raise
            `StopSampling`.
        guidance_scale: Asked before every step, for guidance that changes on the way; None: that of `config`.

    Returns:
        Scaled latents, shape of `noise`, for `Autoencoder.decode`.

    Raises:
        ConfigError: If the schedule has no such number of steps, or something that the options need is missing.
    """
    if config.guidance_scale != 1 and uncond is None:
        raise ConfigError(_NO_UNCOND.format(config.guidance_scale))
    if config.solver == "ddim" and config.eta > 0 and noise_at_step is None:
        raise ConfigError(
            f"eta={config.eta} adds fresh noise at every step (noise_at_step); give a source of it, or eta=0"
        )
    clips = noise.shape[0]
    predict = _Prediction(
        unet,
        config,
        config.fps if fps is None else fps,
        _call_with(text, image, clips),
        None if uncond is None else _call_with(uncond, uncond_image, clips),
    )
    if config.solver == "ddim":
        steps = ddim_plan(schedule, config.num_steps, config.eta)
    else:
        steps = dpm_plan(schedule, config.num_steps)

    latents, before = noise, None
    for number, step in enumerate(steps):
        scale = config.guidance_scale if guidance_scale is None else guidance_scale()
        predicted = predict(latents, step.timestep, scale)
        if config.solver == "ddim":
            fresh = noise_at_step(number).to(latents) if noise_at_step is not None and step.sigma > 0 else None
            latents, clean = ddim_step(latents, predicted, step, fresh)
        else:
            is_last = number == len(steps) - 1
            latents, clean = dpm_step(latents, predicted, step, None if is_last else before)
            before = step, clean
        if on_step is not None:
            try:
                replaced = on_step(StepResult(number, len(steps), step.timestep, latents, clean))
            except StopSampling as stop:
                return latents if stop.latents is None else stop.latents
            latents = latents if replaced is None else replaced
        if progress is not None:
            progress(number + 1, len(steps))
    return latents


_NO_UNCOND = "guidance_scale={} needs the tokens of the empty prompt (uncond); got none"


@dataclass(frozen=True, slots=True)
class _Prediction:
    """The guided prediction of the noise: one network call or two, or one of twice as many clips."""

    unet: Callable[..., Tensor]
    config: SamplerConfig
    fps: int | Tensor
    conditional: dict[str, Tensor]
    unconditional: dict[str, Tensor] | None  # None: there can be no guidance

    def __call__(self, latents: Tensor, timestep: int, guidance_scale: float) -> Tensor:
        timesteps = torch.full((latents.shape[0],), timestep, device=latents.device)
        if guidance_scale == 1:
            return self.unet(latents, timesteps, fps=self.fps, **self.conditional)
        if self.unconditional is None:
            raise ConfigError(_NO_UNCOND.format(guidance_scale))
        if self.config.batched_guidance and _shapes(self.conditional) == _shapes(self.unconditional):
            fps = torch.cat([self.fps, self.fps]) if isinstance(self.fps, Tensor) and self.fps.dim() else self.fps
            tokens = {name: torch.cat([given, self.unconditional[name]]) for name, given in self.conditional.items()}
            both = self.unet(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), fps=fps, **tokens)
            predicted, without = both.chunk(2)
        else:
            predicted = self.unet(latents, timesteps, fps=self.fps, **self.conditional)
            without = self.unet(latents, timesteps, fps=self.fps, **self.unconditional)
        guided = without + guidance_scale * (predicted - without)
        return _rescaled(guided, predicted, self.config.guidance_rescale) if self.config.guidance_rescale else guided


def _rescaled(guided: Tensor, conditional: Tensor, phi: float) -> Tensor:
    per_clip = tuple(range(1, guided.dim()))
    usual, found = conditional.std(per_clip, keepdim=True), guided.std(per_clip, keepdim=True)
    spread = usual / found.clamp_min(torch.finfo(found.dtype).tiny)  # an untrained network predicts nothing but zeros
    return phi * spread * guided + (1 - phi) * guided


def _shapes(tokens: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: given.shape for name, given in tokens.items()}


def _call_with(text: Tensor, image: Tensor | None, clips: int) -> dict[str, Tensor]:
    given = {"text": text} if image is None else {"text": text, "image": image}
    return {
        name: tokens.expand(clips, *tokens.shape[1:]) if tokens.shape[0] == 1 else tokens
        for name, tokens in given.items()
    }
