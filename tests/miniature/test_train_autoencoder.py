import json
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors import safe_open

from vc2.miniature.config import autoencoder_config, autoencoder_weights
from vc2.miniature.judges import judge
from vc2.miniature.scene import (
    DIRECTIONS,
    SHAPES,
    VIDEO_BACKGROUNDS,
    VIDEO_COLOURS,
    ThingTruth,
    Truth,
    draw_video_scene,
)
from vc2.miniature.train_autoencoder import SIZES, as_pixels, draw_batch, psnr, train, whiten
from vc2.model.autoencoder import Autoencoder
from vc2.model.config import AutoencoderConfig
from vc2.seeding import generator


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return Autoencoder.from_safetensors(autoencoder_weights())


def test_the_weights_are_small_and_say_how_they_were_made(autoencoder: Autoencoder) -> None:
    assert autoencoder.config == autoencoder_config()
    assert autoencoder_weights().stat().st_size < 2_000_000
    with safe_open(str(autoencoder_weights()), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["command"].startswith("python -m vc2.miniature.train_autoencoder")
    assert AutoencoderConfig.model_validate(json.loads(metadata["config"])) == autoencoder_config()


def test_latents_have_mean_zero_and_variance_one(autoencoder: Autoencoder) -> None:
    """So that the scaling factor, 1 / std, is 1: within a fifth on pictures that were not used for it."""
    moments = autoencoder.moments(as_pixels(draw_batch(generator("unseen"), SIZES[0], 64))[:, :, None])
    latents = autoencoder.sample(moments, torch.randn(64, 4, 1, 6, 10, generator=torch.Generator().manual_seed(0)))
    assert autoencoder.config.scaling_factor == 1.0
    assert torch.allclose(latents.mean(dim=(0, 2, 3, 4)), torch.zeros(4), atol=0.2)
    assert torch.allclose(latents.std(dim=(0, 2, 3, 4)), torch.ones(4), atol=0.2)


def test_pictures_survive_encoding_and_decoding(autoencoder: Autoencoder) -> None:
    """In dB, on pictures that training did not see; rich art keeps the least."""
    scores = psnr(autoencoder, seed=1)
    assert scores["footage"] > 30 and scores["clean"] > 31 and scores["web"] > 26 and scores["art"] > 21, scores


def test_the_judges_see_through_the_autoencoder(autoencoder: Autoencoder) -> None:
    """What a caption claims is still right in decoded clips: a sample that is judged wrong is the network's fault."""
    scores = []
    for index in range(12):
        thing = ThingTruth(SHAPES[index % 3], VIDEO_COLOURS[index // 3], "plain", list(DIRECTIONS)[index % 4])
        truth = Truth(VIDEO_BACKGROUNDS[(index + index // 4) % 4], (thing,))
        scene = draw_video_scene(generator("through the autoencoder", index), truth, 2.3)
        clip = scene.render_clip(80, 48, 0.5 + np.arange(8) / 8)
        pixels = rearrange(as_pixels(clip), "t c h w -> 1 c t h w")
        decoded = autoencoder.decode(autoencoder.moments(pixels).chunk(2, dim=1)[0])
        frames = rearrange((decoded.clamp(-1, 1) + 1) * 127.5, "1 c t h w -> t h w c").numpy().round().astype(np.uint8)
        scores.append(judge(frames, truth, 8.0))
    for name, floor in (("colour", 0.95), ("direction", 0.95), ("shape", 0.8), ("background", 0.8)):
        assert np.mean([score[name] for score in scores]) >= floor, name


def test_whitening_changes_latents_and_not_pictures() -> None:
    torch.manual_seed(0)
    model = Autoencoder(
        AutoencoderConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=2, scaling_factor=1.0)
    )
    pictures = as_pixels(draw_batch(generator("whiten"), SIZES[0], 8))[:, :, None]
    before = model.decode(model.moments(pictures).chunk(2, dim=1)[0])
    whiten(model, pictures)
    moments = model.moments(pictures)
    mean, logvar = moments.chunk(2, dim=1)
    assert torch.allclose(model.decode(mean), before, atol=1e-4)
    assert torch.allclose(mean.mean(dim=(0, 2, 3, 4)), torch.zeros(4), atol=1e-4)
    variance = mean.var(dim=(0, 2, 3, 4)) + logvar.exp().mean(dim=(0, 2, 3, 4))
    assert torch.allclose(variance, torch.ones(4), atol=1e-3)


def test_training_lowers_the_error_and_leaves_one_readable_file(tmp_path: Path) -> None:
    small = AutoencoderConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=2, scaling_factor=1.0)
    out = tmp_path / "weights.safetensors"
    first = psnr(train(small, steps=10, batch_size=2, lr=2e-3, seed=0, out=out, command="test"))
    later = psnr(train(small, steps=60, batch_size=4, lr=4e-3, seed=0, out=out, command="test"))
    assert sum(later.values()) > sum(first.values()) + 0.5  # dB, over four kinds of pictures
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
