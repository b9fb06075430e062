"""The stand-in for Stable Diffusion: what its trainer writes is what stage `full` loads."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from vc2.miniature.config import image_base_weights, large_unet_config, unet_config
from vc2.miniature.train_image_base import draw_picture, main
from vc2.model.partition import trainable_names
from vc2.model.unet import UNet3D
from vc2.model.weights import load_sd_unet
from vc2.seeding import generator


@pytest.mark.parametrize("options", [[], ["--network", "large"], ["--web-only"]])
def test_what_is_written_fills_every_spatial_parameter(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "base.safetensors"
    words = ["train", "--steps", "1", "--pictures", "4", "--batch-size", "2", "--out", str(out), *options]
    monkeypatch.setattr("sys.argv", words)
    main()
    unet = UNet3D(large_unet_config() if "large" in options else unet_config())
    assert load_sd_unet(unet, load_file(out)) == len(trainable_names(unet, "spatial"))
    with safe_open(out, "pt") as file:
        assert ("--web-only" in file.metadata()["command"]) is ("--web-only" in options)


def test_the_committed_one_fits_the_miniature() -> None:
    unet = UNet3D(unet_config())
    assert load_sd_unet(unet, load_file(image_base_weights())) == len(trainable_names(unet, "spatial"))


def test_the_web_has_no_strong_patterns() -> None:
    """Square pictures look like the image set's, unless the web's alone are asked for: then they vary less."""
    spread = {
        web_only: np.mean(
            [draw_picture(generator("web", n), (64, 64), web_only=web_only)[0][:4].std() for n in range(24)]
        )
        for web_only in (False, True)
    }
    assert spread[True] < 0.8 * spread[False]
