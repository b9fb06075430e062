"""Our networks and noise schedule as components of a diffusers pipeline: what it can save, load, move and offload.

Each is told its shape by the plain values of a configuration of ours, which stand in its `config.json`.
Shapes: B clips, C latent channels, T frames, h x w latent pixels, H x W pixels, M image tokens of width D.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from vc2.model.config import ImageConfig, SamplerConfig, ScheduleConfig, UNetConfig
from vc2.model.diffusers_parts import read_json
from vc2.model.image import ImageEncoder
from vc2.model.sampler import Step, ddim_plan, ddim_step
from vc2.model.schedule import NoiseSchedule
from vc2.model.unet import UNet3D

__all__ = ["INSIDE", "VideoCrafter2ImageEncoder", "VideoCrafter2Scheduler", "VideoCrafter2UNet"]

INSIDE = "net."  # what names of tensors begin with in the two networks here


class VideoCrafter2UNet(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """`UNet3D` as a component of a pipeline: saved, loaded, moved, offloaded, and given adapters by diffusers.

    Args:
        shape: A `UNetConfig` as plain values.
    """

    @register_to_config
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        self.net = UNet3D(UNetConfig.model_validate(shape))

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        *,
        fps: int | Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """As `UNet3D.forward`."""
        return self.net(latents, timesteps, text, fps=fps, image=image)

    def set_adapters(
        self,
        adapter_names: list[str] | str,
        weights: float | dict | list[float] | list[dict] | list[None] | None = None,
    ) -> None:
        """Use these adapters from now on, with these weights (1 where there is none); they add up.

        Raises:
            ValueError: If there is not one weight for each, or one is no number.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = list(weights) if isinstance(weights, list) else [weights] * len(names)
        numbers = [1.0 if weight is None else weight for weight in given]
        if len(numbers) != len(names) or not all(isinstance(weight, int | float) for weight in numbers):
            raise ValueError(f"`weights` is {weights}: expected one number for each of the adapters {names}")
        set_weights_and_activate_adapters(self, names, numbers)


class VideoCrafter2ImageEncoder(ModelMixin, ConfigMixin):
    """`ImageEncoder` as a component of a pipeline.

    Args:
        shape: An `ImageConfig` as plain values.
    """

    @register_to_config
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        self.net = ImageEncoder(ImageConfig.model_validate(shape))

    def forward(self, images: Tensor) -> Tensor:
        """Pixels in [-1, 1], (B, 3, H, W) -> image tokens, (B, M, D)."""
        return self.net.encode(images)


class VideoCrafter2Scheduler(SchedulerMixin, ConfigMixin):
    """The noise schedule as a component of a pipeline; also DDIM with signal scaling for diffusers' own pipelines.

    Args:
        schedule: A `ScheduleConfig` as plain values.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, schedule: dict[str, Any]) -> None:
        self.schedule = NoiseSchedule(ScheduleConfig.model_validate(schedule))
        self.set_timesteps(SamplerConfig().num_steps)

    @classmethod
    def from_stock(cls, folder: str | Path) -> "VideoCrafter2Scheduler":
        """The scheduler that a folder of `export_stock` ought to have, could diffusers do without our code."""
        return cls(schedule=read_json(Path(folder) / "vc2.json")["schedule"])

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps, as `ddim_plan` does."""
        plan = ddim_plan(self.schedule, num_inference_steps, eta=1.0)
        self.num_inference_steps = num_inference_steps
        self.steps: dict[int, Step] = {step.timestep: step for step in plan}
        self.timesteps = torch.tensor(list(self.steps), device=device)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The network is asked about the sample as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step of DDIM, `eta` and `generator` as in diffusers' `DDIMScheduler`; computed in float32."""
        step = self.steps[int(timestep)]
        step = replace(step, sigma=eta * step.sigma)
        noise = None
        if step.sigma:
            shape, device, dtype = model_output.shape, model_output.device, model_output.dtype
            noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            noise = noise.float()
        latents, _ = ddim_step(sample.float(), model_output.float(), step, noise)
        latents = latents.to(sample.dtype)
        return SchedulerOutput(prev_sample=latents) if return_dict else (latents,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As `NoiseSchedule.add_noise`."""
        return self.schedule.add_noise(original_samples, noise, timesteps)

    def __len__(self) -> int:
        return self.schedule.config.num_timesteps
