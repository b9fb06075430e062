"""The stand-in for Stable Diffusion: what its trainer writes is what stage `full` loads."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from vc2.miniature.config import image_base_weights, large_unet_config, unet_config, web_base_weights
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


@pytest.mark.parametrize("weights", [image_base_weights(), web_base_weights()])
def test_the_committed_ones_fit_the_miniature(weights: Path) -> None:
    unet = UNet3D(unet_config())
    assert load_sd_unet(unet, load_file(weights)) == len(trainable_names(unet, "spatial"))
    with safe_open(weights, "pt") as file:
        assert ("--web-only" in file.metadata()["command"]) is (weights == web_base_weights())


def test_the_large_network_never_takes_the_place_of_the_small_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = image_base_weights().read_bytes()
    monkeypatch.setattr("sys.argv", ["train", "--network", "large", "--steps", "1"])
    with pytest.raises(SystemExit):
        main()
    assert "--network large needs --out" in capsys.readouterr().err and image_base_weights().read_bytes() == before


def test_the_web_has_no_strong_patterns() -> None:
    """Square pictures look like the image set's, unless the web's alone are asked for: then they vary less."""
    spread = {
        web_only: np.mean(
            [draw_picture(generator("web", n), (64, 64), web_only=web_only)[0][:4].std() for n in range(24)]
        )
        for web_only in (False, True)
    }
    assert spread[True] < 0.8 * spread[False]
