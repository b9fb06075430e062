"""DDIM sampling: from pure noise to clean latents, in the released network's own variant.

One step from level a to level a' < 1, with the network's guided prediction e (Song et al. 2021, Eq. 12 and 16;
Ho and Salimans 2022):

    e   = e_u + g (e_c - e_u)
    x_0 = (x - sqrt(1 - a) e) / (sqrt(a) s)
    x'  = sqrt(a') s' x_0 + sqrt(1 - a' - sigma^2) e + sigma noise
    sigma = eta sqrt((1 - a') / (1 - a) (1 - a / a'))

s is the signal scaling of the schedule, 1 without it. For S steps over 1000 timesteps the network is asked at
c k + 1, c = floor(1000 / S), k = 0, 1, ...: more than S times where S does not divide 1000. The last step ends at the
level of timestep 0, not at 1, and adds noise too.
Shapes: B clips, C latent channels, T frames, H x W latent pixels, L text tokens of width D.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vc2.errors import ConfigError
from vc2.model.config import SamplerConfig
from vc2.model.schedule import NoiseSchedule
from vc2.seeding import generator

__all__ = ["ClipNoise", "Step", "ddim_plan", "ddim_step", "ddim_timesteps", "sample"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the sampler: where it is, where it goes."""

    timestep: int  # what the network is told
    alpha: float  # a, cumulative signal level here
    alpha_prev: float  # a', the level this step ends at
    sigma: float  # standard deviation of the fresh noise
    scale: float  # s, signal scaling here
    scale_prev: float  # s'


def ddim_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """Timesteps at which the network is asked, rising. `num_steps=1` asks at timestep 1 only.

    Raises:
        ConfigError: If the last one would lie outside the schedule, as it does for some step counts.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps={num_steps}: need at least 1")
    stride = num_timesteps // num_steps
    timesteps = [step + 1 for step in range(0, num_timesteps, stride)] if stride else [num_timesteps]
    if timesteps[-1] < num_timesteps:
        return timesteps
    usable = [steps for steps in range(1, num_timesteps // 2 + 1) if (num_timesteps - 1) % (num_timesteps // steps)]
    nearest = min(usable, key=lambda steps: abs(steps - num_steps), default=1)
    raise ConfigError(
        f"num_steps={num_steps}: the schedule ends at timestep {num_timesteps - 1}, these steps would begin at "
        f"{timesteps[-1]}; the nearest usable number is {nearest}"
    )


def ddim_plan(schedule: NoiseSchedule, num_steps: int, eta: float) -> list[Step]:
    """All steps in the order in which they are taken, the noisiest first.

    Raises:
        ConfigError: If the schedule has no such number of steps (see `ddim_timesteps`).
    """
    timesteps = ddim_timesteps(schedule.config.num_timesteps, num_steps)
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
) -> Tensor:
    """Sample clean latents.

    Args:
        unet: A `UNet3D` in evaluation mode, or what is called like one.
        schedule: The schedule the network was trained with.
        noise: Standard normal noise to start from, (B, C, T, H, W), for example `ClipNoise.start`.
        text: Tokens of the prompts, (B, L, D).
        uncond: Tokens of the empty prompt, (1, L, D) or (B, L, D); may be None at guidance 1.
        config: Steps, guidance, eta.
        fps: Frame rate told to the network; None: `config.fps`.
        noise_at_step: Fresh noise by step number, counted from 0, for example a `ClipNoise`; may be None at eta 0.
        progress: Called after every step with the steps done and the steps there are.
        image: Image tokens, (B, M, D), for an image-to-video network.
        uncond_image: Image tokens of the unconditional call, (1, M, D) or (B, M, D).

    Returns:
        Scaled latents, shape of `noise`, for `Autoencoder.decode`.

    Raises:
        ConfigError: If the schedule has no such number of steps, or something that the options need is missing.
    """
    if config.guidance_scale != 1 and uncond is None:
        raise ConfigError(
            f"guidance_scale={config.guidance_scale} needs the tokens of the empty prompt (uncond); got none"
        )
    if config.eta > 0 and noise_at_step is None:
        raise ConfigError(
            f"eta={config.eta} adds fresh noise at every step (noise_at_step); give a source of it, or eta=0"
        )
    fps = config.fps if fps is None else fps
    steps = ddim_plan(schedule, config.num_steps, config.eta)
    clips = noise.shape[0]
    conditional = _call_with(text, image, clips)
    unconditional = None if uncond is None else _call_with(uncond, uncond_image, clips)

    latents = noise
    for number, step in enumerate(steps):
        timesteps = torch.full((clips,), step.timestep, device=noise.device)
        predicted = unet(latents, timesteps, fps=fps, **conditional)
        if config.guidance_scale != 1 and unconditional is not None:
            without = unet(latents, timesteps, fps=fps, **unconditional)
            predicted = without + config.guidance_scale * (predicted - without)
        fresh = noise_at_step(number).to(latents) if noise_at_step is not None and step.sigma > 0 else None
        latents, _ = ddim_step(latents, predicted, step, fresh)
        if progress is not None:
            progress(number + 1, len(steps))
    return latents


def _call_with(text: Tensor, image: Tensor | None, clips: int) -> dict[str, Tensor]:
    given = {"text": text} if image is None else {"text": text, "image": image}
    return {
        name: tokens.expand(clips, *tokens.shape[1:]) if tokens.shape[0] == 1 else tokens
        for name, tokens in given.items()
    }
