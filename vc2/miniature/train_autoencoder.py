"""Train the small KL autoencoder of the miniature world: `python -m vc2.miniature.train_autoencoder --out FILE`.

Pictures are drawn as they are needed: clean stills as web and art images show them, and frames of degraded stock
footage with noise, compression and watermark, scaled to the sizes at which vc2's miniature recipe works. The loss is

    4 (y - x)^2 + |y - x| + |grad y - grad x| / 2 + kl_weight KL(q(z|x) || N(0, 1)) + guide |z_rgb - 2 pooled x|

as means over pixels and over latent elements. The last term ties three latent channels to the mean colour of their 8
x 8 pixels; its weight falls from 1 to 0 over the first half. Without it a small network first finds brightness alone
and takes thousands of steps to find colour. A small KL weight keeps the latents smooth, which a diffusion model needs
more than the last decibel; the encoder starts almost without noise (log-variance -6), since from the usual 0 the
latents are slow to become of use. Few norm groups, so that absolute brightness passes through them. Afterwards every
latent channel is shifted and scaled to mean 0 and variance 1 inside the two 1 x 1 convolutions around the latent, so
the scaling factor is 1.

Shapes: B pictures, H x W pixels, C latent channels, h x w latent pixels.
"""

import argparse
import io
import os
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from vc2.miniature import scene as world
from vc2.miniature.config import autoencoder_config
from vc2.miniature.degrade import footage
from vc2.miniature.scene import ThingTruth, Truth, draw_picture_scene, draw_video_scene
from vc2.model.autoencoder import Autoencoder
from vc2.model.config import AutoencoderConfig
from vc2.seeding import generator

__all__ = ["draw_batch", "psnr", "train", "whiten"]

SIZES = ((80, 48), (64, 64))  # width x height of video frames and of art images in the miniature recipe
KL_WEIGHT = 1e-3
SAVE_EVERY = 100  # steps
SOURCE_SIZES = ((160, 96), (192, 112), (168, 128), (144, 96), (176, 112))


def train(
    config: AutoencoderConfig, *, steps: int, batch_size: int, lr: float, seed: int, out: Path, command: str
) -> Autoencoder:
    """Train from scratch; every SAVE_EVERY steps and at the end the weights so far, whitened, are at `out`."""
    torch.manual_seed(seed)
    model = Autoencoder(config)
    net = model.net.requires_grad_(True).train()
    with torch.no_grad():
        net.quant_conv.weight[config.latent_channels :] *= 0.1
        net.quant_conv.bias[config.latent_channels :] = -6.0
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-3)
    warmup = min(100, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=warmup / (steps + 1))
    for step in range(steps):
        pictures = as_pixels(draw_batch(generator(seed, "autoencoder", step), SIZES[step % 3 == 2], batch_size))
        posterior = net.encode(pictures).latent_dist
        decoded = net.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        pooled = functional.avg_pool2d(pictures, config.downsampling)
        guide = max(0.0, 1 - 2 * step / steps) * (posterior.mean[:, :3] - 2 * pooled).abs().mean()
        loss = picture_loss(decoded, pictures) + KL_WEIGHT * kl + guide
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save(model, out, command, step + 1)
            scores = psnr(Autoencoder.from_safetensors(out), seed)
            words = ", ".join(f"{kind} {value:.2f} dB" for kind, value in scores.items())
            print(f"step {step + 1}/{steps}: loss {loss.item():.4f}, kl {kl.item():.2f}, {words}", flush=True)
    return Autoencoder.from_safetensors(out)


def draw_batch(rng: np.random.Generator, size: tuple[int, int], count: int) -> np.ndarray:
    """Pictures of the world at `size` (width, height), (B, H, W, 3) uint8: half footage, half stills."""
    kinds = rng.permutation(["footage", "art" if size[0] == size[1] else "web", "footage", "web"] * (count // 4 + 1))[
        :count
    ]
    return np.stack([_draw(rng, str(kind), size) for kind in kinds])


def psnr(model: Autoencoder, seed: int = 0, count: int = 8) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB of decoded latent means against unseen pictures, by kind of picture."""
    scores = {}
    for kind, size in (("footage", SIZES[0]), ("clean", SIZES[0]), ("web", SIZES[0]), ("art", SIZES[1])):
        rng = generator(seed, "held out", kind)
        pictures = as_pixels(np.stack([_draw(rng, kind, size) for _ in range(count)]))
        means = model.moments(pictures[:, :, None]).chunk(2, dim=1)[0] * model.config.scaling_factor
        error = (model.decode(means)[:, :, 0].clamp(-1, 1) - pictures) / 2
        scores[kind] = float(-10 * error.square().mean(dim=(1, 2, 3)).log10().mean())
    return scores


@torch.no_grad()
def whiten(model: Autoencoder, pictures: Tensor) -> None:
    """Shift and scale the latents: every channel gets mean 0 and variance 1 over `pictures` (B, 3, 1, H, W).

    What a picture decodes to stays the same.
    """
    mean, logvar = model.moments(pictures).chunk(2, dim=1)
    middle = mean.mean(dim=(0, 2, 3, 4))
    scale = (mean.var(dim=(0, 2, 3, 4)) + logvar.exp().mean(dim=(0, 2, 3, 4))).sqrt()
    before, after = model.net.quant_conv, model.net.post_quant_conv
    channels = len(middle)
    # The decoder must see z' = z * scale + middle where it saw z; it is linear, so its first weights take that in.
    after.bias += torch.einsum("oc,c->o", after.weight[:, :, 0, 0], middle)
    after.weight *= scale[None, :, None, None]
    before.weight[:channels] /= scale[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - middle) / scale
    before.bias[channels:] -= 2 * scale.log()


def save(model: Autoencoder, out: Path, command: str, steps_done: int) -> None:
    """Write a whitened float16 copy to `out`, in one step, with the config and the command that made it."""
    copy = Autoencoder(model.config)
    copy.net.load_state_dict(model.net.state_dict())
    whiten(copy, as_pixels(draw_batch(generator(0, "whiten"), SIZES[0], 64))[:, :, None])
    state = {name: tensor.to(torch.float16).contiguous() for name, tensor in copy.net.state_dict().items()}
    metadata = {
        "config": model.config.model_dump_json(),
        "command": command,
        "steps": str(steps_done),
        "licence": "Apache-2.0",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    save_file(state, partial, metadata=metadata)
    partial.chmod(0o644)
    partial.replace(out)


def as_pixels(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return rearrange(torch.from_numpy(pictures), "b h w c -> b c h w").float() / 127.5 - 1


def picture_loss(decoded: Tensor, pictures: Tensor) -> Tensor:
    """Squared and absolute error, and absolute error of the differences between neighbouring pixels."""
    error = decoded - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return 4 * error.square().mean() + error.abs().mean() + edges / 2


def _draw(rng: np.random.Generator, kind: str, size: tuple[int, int]) -> np.ndarray:
    """One picture (H, W, 3) of a kind: stock `footage`, the same scene `clean`, a `web` still, a rich `art` still."""

    def pick(options):
        return list(options)[int(rng.integers(len(options)))]

    video = kind in ("footage", "clean")
    if video:
        truth = Truth(
            pick(world.VIDEO_BACKGROUNDS),
            (ThingTruth(pick(world.SHAPES), pick(world.VIDEO_COLOURS), "plain", pick(world.DIRECTIONS)),),
        )
        scene = draw_video_scene(rng, truth, 2.3)
    else:
        colours = rng.permutation(list(world.COLOURS))[: 1 + int(rng.integers(2))]
        things = tuple(ThingTruth(pick(world.SHAPES), str(colour), pick(world.TEXTURES)) for colour in colours)
        scene = draw_picture_scene(rng, Truth(pick(world.BACKGROUNDS), things), rich=kind == "art")
    width, height = (pick(SOURCE_SIZES) if video else (2 * size[0], 2 * size[1])) if kind != "clean" else (160, 96)
    picture = scene.render(width, height, float(rng.uniform(0, 2.2)) if video else 0.0)
    if kind == "footage" and rng.random() < 0.9:
        (picture,) = footage([picture], rng, float(rng.uniform(3, 7)))
        picture = _compress(picture, int(rng.integers(30, 70)))
    return np.asarray(ImageOps.fit(Image.fromarray(picture), size, Image.Resampling.BICUBIC))


def _compress(picture: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small autoencoder of the miniature world.")
    parser.add_argument("--out", type=Path, default=Path("vc2/miniature/weights/autoencoder.safetensors"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = vars(options)
    command = "python -m vc2.miniature.train_autoencoder " + " ".join(
        f"--{name.replace('_', '-')} {settings[name]}" for name in ("steps", "batch_size", "lr", "seed", "threads")
    )
    train(
        autoencoder_config(),
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        seed=options.seed,
        out=options.out,
        command=command,
    )


if __name__ == "__main__":
    main()
