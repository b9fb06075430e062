"""Arithmetic in bfloat16, two ways: torch's autocast on float32 weights, and DeepSpeed's bf16 mode.

    python -m benchmarks.precision

A small network learns eight clips by heart, in float32, under autocast, and by DeepSpeed's bf16 (weights in bfloat16,
masters in float32), with the same draws. Told are the loss at the end, how far predictions are from the float32
weights' own, and what becomes of frozen weights when only the spatial part learns. One process on the CPU: what is
measured is rounding, not speed.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vc2.artifacts import environment
from vc2.model.config import ScheduleConfig, UNetConfig
from vc2.model.partition import is_temporal
from vc2.model.schedule import NoiseSchedule
from vc2.model.unet import UNet3D
from vc2.ports import free_port

__all__ = ["main"]

STEPS, LAST = 400, 50
UNET = UNetConfig(
    model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,), num_head_channels=16,
    context_dim=16, norm_groups=4, temporal_conv_dropout=0.0,
)  # fmt: skip


class Task:
    """Eight clips of noise, four frames of 4 x 4 latent pixels, each with a text of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.latents, self.text = torch.randn(8, 4, 4, 4, 4), torch.randn(8, 8, 16)
        self.fps, self.schedule = torch.full((8,), 8), NoiseSchedule(ScheduleConfig())

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        randoms = torch.Generator().manual_seed(step)
        noise = torch.randn(self.latents.shape, generator=randoms)
        timesteps = torch.randint(1000, (8,), generator=randoms)
        return self.schedule.add_noise(self.latents, noise, timesteps), timesteps, noise


def network(frozen: bool) -> UNet3D:
    torch.manual_seed(1)
    unet = UNet3D(UNET)
    for name, parameter in unet.named_parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # no zeros, which every type holds exactly
        parameter.requires_grad_(not (frozen and is_temporal(name)))
    return unet


def learn(mode: str, *, frozen: bool = False) -> dict[str, Any]:
    """Losses and weights of a run in one of the modes fp32, autocast, deepspeed."""
    task, unet = Task(), network(frozen)
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer, engine = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99)), None
    if mode == "deepspeed":
        engine = _deepspeed(unet, parameters, optimizer)
    dtype, losses = torch.bfloat16 if engine else torch.float32, []
    for step in range(STEPS if not frozen else 20):
        noisy, timesteps, noise = task.draw(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            call = engine or unet
            predicted = call(noisy.to(dtype), timesteps, task.text.to(dtype), fps=task.fps)
        loss = (predicted.float() - noise).square().mean()
        if engine:
            engine.backward(loss)
            engine.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        losses.append(float(loss.detach()))
    after = {name: parameter.detach() for name, parameter in unet.named_parameters()}
    return {"loss": sum(losses[-LAST:]) / len(losses[-LAST:]), "before": before, "after": after}


def _deepspeed(unet: UNet3D, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> Any:
    from vc2.train.engine import import_deepspeed

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    deepspeed = import_deepspeed(torch.device("cpu"))
    engine, *_ = deepspeed.initialize(
        model=unet, model_parameters=parameters, optimizer=optimizer,
        config={"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "gradient_clipping": 1.0,
                "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": 1}},
    )  # fmt: skip
    return engine


def main() -> None:
    torch.set_num_threads(1)
    found = {mode: {"loss": learn(mode)["loss"]} for mode in ("fp32", "autocast", "deepspeed")}
    for mode in ("autocast", "deepspeed"):
        run = learn(mode, frozen=True)
        frozen = [name for name in run["before"] if is_temporal(name)]
        changed = [name for name in frozen if not torch.equal(run["before"][name], run["after"][name].float())]
        error = max(float((run["after"][name].float() - run["before"][name]).abs().max()) for name in frozen)
        found[mode] |= {"frozen": len(frozen), "frozen_changed": len(changed), "largest_change": error}
    for mode, figures in found.items():
        print(mode, json.dumps(figures))
    path = Path("benchmarks/results") / f"precision-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(found | {"environment": environment()}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
