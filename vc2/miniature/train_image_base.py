"""Train the image network that the miniature grows from: `python -m vc2.miniature.train_image_base`.

It plays the part that Stable Diffusion 2.1 plays in the paper: an image model that knows what things look like and has
never seen one move. It is the spatial part of the miniature's `UNet3D`, trained on clean still pictures with captions
that say nothing of motion, by the same objective, and stored under Stable Diffusion's own names, so that stage `full`
begins as the paper's does: `load_sd_unet`, temporal outputs zero. `--web-only` makes the one that recipe
`study` grows from, which has seen nothing that looks like the image set; `--web-only --network large --device cuda
--out FILE` the one that `study_gpu` looks for.

Shapes: B pictures, C latent channels, h x w latent pixels.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vc2.miniature import scene as world
from vc2.miniature.config import (
    autoencoder_weights,
    image_base_weights,
    large_unet_config,
    text_config,
    unet_config,
    web_base_weights,
)
from vc2.miniature.scene import Scene, Thing, ThingTruth, Truth, draw_picture_scene, draw_video_scene
from vc2.miniature.train_autoencoder import SIZES, as_pixels
from vc2.model.autoencoder import Autoencoder
from vc2.model.config import ScheduleConfig, UNetConfig
from vc2.model.partition import trainable_names
from vc2.model.schedule import NoiseSchedule
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D
from vc2.model.weights import sd_names
from vc2.seeding import generator

__all__ = ["draw_picture", "train"]

PREFIX = "model.diffusion_model."  # of the network's names in a Stable Diffusion checkpoint
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.999
SAVE_EVERY = 500  # steps


class Bank:
    """Pictures drawn and encoded once; batches are taken from them."""

    def __init__(
        self,
        count: int,
        size: tuple[int, int],
        autoencoder: Autoencoder,
        text: TextEncoder,
        seed: int,
        *,
        web_only: bool = False,
    ) -> None:
        captions, moments = [], []
        for index in range(count):
            picture, caption = draw_picture(generator(seed, "picture", *size, index), size, web_only=web_only)
            moments.append(autoencoder.moments(as_pixels(picture[None])[:, :, None]))
            captions.append(caption)
        known = sorted(set(captions))
        self.moments = torch.cat(moments)
        self.tokens = torch.cat([text.encode([caption]) for caption in known])
        self.caption = torch.tensor([known.index(caption) for caption in captions])

    def take(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Moments (B, 2C, 1, h, w) and text tokens (B, L, D) of the pictures chosen."""
        return self.moments[chosen], self.tokens[self.caption[chosen]]


def draw_picture(rng: np.random.Generator, size: tuple[int, int], *, web_only: bool = False) -> tuple[np.ndarray, str]:
    """A clean still (H, W, 3) uint8 of `size` (width, height) and its caption: a moment of a video or a composition.

    Square ones look like the image set's, unless `web_only` says that all shall look like the web's.
    """

    def pick(options):
        return list(options)[int(rng.integers(len(options)))]

    if size[0] != size[1] and rng.random() < 0.7:
        thing = ThingTruth(pick(world.SHAPES), pick(world.VIDEO_COLOURS), "plain", pick(world.DIRECTIONS))
        moving = draw_video_scene(rng, Truth(pick(world.VIDEO_BACKGROUNDS), (thing,)), 2.3)
        placed = moving.things[0]
        x, y = placed.centre(float(rng.uniform(0, 2.3)))
        still = Thing(ThingTruth(thing.shape, thing.colour), x, y, placed.size)
        scene = Scene(moving.background, (still,), moving.backdrop, moving.contrast, moving.variant)
    else:
        colours = rng.permutation(list(world.COLOURS))[: 1 + int(rng.integers(2))]
        things = tuple(ThingTruth(pick(world.SHAPES), str(colour), pick(world.TEXTURES)) for colour in colours)
        scene = draw_picture_scene(
            rng, Truth(pick(world.BACKGROUNDS), things), rich=size[0] == size[1] and not web_only
        )
    return scene.render(*size), scene.caption()


def train(
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    pictures: int,
    out: Path,
    command: str,
    network: UNetConfig | None = None,
    device: str = "cpu",
    web_only: bool = False,
) -> UNet3D:
    """Train the spatial part of `network` (None: the small one); every SAVE_EVERY steps and at the end its average over
    steps is at `out`."""
    torch.manual_seed(seed)
    autoencoder = Autoencoder.from_safetensors(autoencoder_weights())
    text, schedule = TextEncoder(text_config()), NoiseSchedule(ScheduleConfig())
    banks = [
        Bank(pictures // (1 + index), size, autoencoder, text, seed, web_only=web_only)
        for index, size in enumerate(SIZES)
    ]
    nothing = text.encode([""])
    unet = UNet3D(network or unet_config()).train().to(device)
    spatial = frozenset(trainable_names(unet, "spatial"))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in spatial)
    learning = {name: parameter for name, parameter in unet.named_parameters() if name in spatial}
    average = {name: parameter.detach().clone() for name, parameter in learning.items()}
    optimizer = torch.optim.AdamW(learning.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.05)
    losses: list[float] = []
    for step in range(steps):
        bank = banks[step % 3 == 2]
        moments, tokens = bank.take(torch.randint(len(bank.moments), (batch_size,)))
        mean = moments.chunk(2, dim=1)[0]
        latents = autoencoder.sample(moments, torch.randn_like(mean))
        timesteps, noise = torch.randint(schedule.config.num_timesteps, (batch_size,)), torch.randn_like(mean)
        tokens = torch.where((torch.rand(batch_size) < CAPTION_DROPOUT)[:, None, None], nothing, tokens)
        noisy = schedule.add_noise(latents, noise, timesteps)
        predicted = unet(noisy.to(device), timesteps.to(device), tokens.to(device))
        loss = (predicted - noise.to(device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning.values(), 1.0)
        optimizer.step()
        rates.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        for name, parameter in learning.items():
            average[name].lerp_(parameter.detach(), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save(unet, average, out, command, step + 1)
            print(f"step {step + 1}/{steps}: loss {np.mean(losses[-SAVE_EVERY:]):.4f}", flush=True)
    return unet


def save(unet: UNet3D, average: dict[str, Tensor], out: Path, command: str, steps_done: int) -> None:
    """Write the averaged weights as float16 under Stable Diffusion's names, whole, with the command that made them."""
    names = sd_names(unet, diffusers=False)
    state = {PREFIX + names[name]: tensor.to("cpu", torch.float16).contiguous() for name, tensor in average.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    save_file(state, partial, metadata={"command": command, "steps": str(steps_done), "licence": "Apache-2.0"})
    partial.chmod(0o644)
    partial.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small image network of the miniature world.")
    parser.add_argument("--out", type=Path, help="default: where the package has it; it has no large one")
    parser.add_argument("--network", choices=["small", "large"], default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--web-only", action="store_true", help="no pictures that look like the image set")
    parser.add_argument("--steps", type=int, help="default: 4000, of the small network of the web alone 3000")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.out is None and options.network == "large":
        parser.error("--network large needs --out: its weights are not part of the package")
    if options.steps is None:
        options.steps = 3000 if options.web_only and options.network == "small" else 4000
    options.out = options.out or (web_base_weights() if options.web_only else image_base_weights())
    torch.set_num_threads(options.threads)
    elsewhere = ("out", "threads", "network", "device")
    settings = {name: value for name, value in vars(options).items() if name not in elsewhere}
    words = " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in vars(options).items()
        if name != "out" and value is not False
    )
    network = large_unet_config() if options.network == "large" else unet_config()
    command = f"python -m vc2.miniature.train_image_base {words}"
    train(**settings, out=options.out, command=command, network=network, device=options.device)


if __name__ == "__main__":
    main()
