"""What training starts from: any form of Stable Diffusion's weights, any file with a text tower."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vc2.artifacts import FileEntry
from vc2.errors import PretrainedMissing, WeightsError
from vc2.miniature.config import autoencoder_config, image_base_weights, text_config, unet_config
from vc2.model.autoencoder import Autoencoder
from vc2.model.bundle import Parts, text_tower
from vc2.model.config import ModelConfig, TextConfig
from vc2.model.convert import Found, write_model
from vc2.model.diffusers_parts import clip_text_model, save_clip_text_model
from vc2.model.files import Tensors, open_weights, write_tensors, write_torch
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D
from vc2.model.weights import load_sd_unet, looks_like_noise_prediction, spatial_from_sd
from vc2.storage import LocalStore, file_digest
from vc2.train.config import Layout, TrainStage
from vc2.train.parts import autoencoder_of_start, build_text_encoder, build_unet
from vc2.train.request import RankRequest

TEXT = TextConfig(width=64, heads=1, layers=2, layers_used=2)


def request(**changes: object) -> RankRequest:
    stage = TrainStage(
        model=ModelConfig(unet=unet_config(), autoencoder=autoencoder_config(), text=text_config()), device="cpu"
    )
    return RankRequest(
        stage=stage.evolve(**changes), store="", work="", fingerprint="", attempt=1, start=None,
        layout=Layout(world_size=1, micro_batch=1, threads=1), videos=(), images=(),
        autoencoder=FileEntry(name="", key="", size=0, sha256=""), start_from=None, inputs={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def image_base() -> Found:
    """The miniature's image network, which predicts noise."""
    config = ModelConfig(unet=unet_config(), autoencoder=autoencoder_config(), text=text_config())
    spatial = spatial_from_sd(config.unet, open_weights(image_base_weights()))
    return Found("sd-diffusers", "an image network", Parts(config, spatial), is_image_network=True)


@pytest.mark.parametrize(
    ("name", "form"), [("sd.ckpt", "sd-ldm"), ("sd.safetensors", "sd-ldm"), ("sd", "sd-diffusers")]
)
def test_training_starts_from_stable_diffusion_in_any_form(image_base, store, tmp_path, caplog, name, form):
    write_model(image_base, tmp_path / name, form)
    unet = build_unet(request(sd_init="my-sd", sd_path=str(tmp_path / name)), store, tmp_path)
    expected = UNet3D(unet_config())
    load_sd_unet(expected, open_weights(image_base_weights()))
    for part in ("conv_in", "conv_out", "time_embedding", "fps_embedding.out"):
        assert_same(unet.get_submodule(part), expected.get_submodule(part))
    assert looks_like_noise_prediction(unet)
    assert not caplog.records


def test_a_network_that_answers_noise_with_something_else_is_warned_of(image_base, store, tmp_path, caplog):
    """Its output turned down to what a velocity predictor would say."""
    unet = image_base.parts.unet
    quiet = Tensors.of({name: unet[name] * (0.07 if name.startswith("conv_out") else 1) for name in unet})
    parts = Parts(image_base.parts.config, quiet)
    write_model(Found("vc2", "", parts, is_image_network=True), tmp_path / "sd.safetensors", "sd-ldm")
    with caplog.at_level(logging.WARNING):
        build_unet(request(sd_init="my-sd", sd_path=str(tmp_path / "sd.safetensors")), store, tmp_path)
    assert "it may predict velocity (v)" in caplog.text


def test_the_digest_asked_for_is_that_of_the_network_of_a_folder(image_base, store, tmp_path):
    write_model(image_base, tmp_path / "sd", "sd-diffusers")
    network = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    asked = {"sd_init": "my-sd", "sd_path": str(tmp_path / "sd")}
    build_unet(request(**asked, sd_sha256=file_digest(network).sha256), store, tmp_path)
    with pytest.raises(WeightsError, match="give the file that was asked for"):
        build_unet(request(**asked, sd_sha256="0" * 64), store, tmp_path)


def openclip_bin(folder: Path, encoder: TextEncoder) -> Path:
    """As OpenCLIP publishes it: both towers in one file."""
    state = encoder.tower.state_dict() | {
        "visual.proj": torch.ones(2),
        "text_projection": torch.ones(2),
        "logit_scale": torch.tensor(4.6),
    }
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    return folder / "open_clip_pytorch_model.bin"


def openclip_safetensors(folder: Path, encoder: TextEncoder) -> Path:
    save_file(encoder.tower.state_dict(), folder / "open_clip_model.safetensors")
    return folder / "open_clip_model.safetensors"


def whole_checkpoint(folder: Path, encoder: TextEncoder) -> Path:
    state = {f"cond_stage_model.model.{name}": tensor for name, tensor in encoder.tower.state_dict().items()}
    write_torch(
        folder / "model.ckpt", state | {"model.diffusion_model.out.2.bias": torch.ones(4), "betas": torch.ones(2)}
    )
    return folder / "model.ckpt"


def diffusers_folder(folder: Path, encoder: TextEncoder) -> Path:
    save_clip_text_model(clip_text_model(encoder), folder / "text_encoder")
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.mark.parametrize("make", [openclip_bin, openclip_safetensors, whole_checkpoint, diffusers_folder])
def test_the_text_tower_comes_out_of_any_file(make, store, tmp_path):
    torch.manual_seed(0)
    encoder = TextEncoder(TEXT)
    place = make(tmp_path, encoder)
    unet = unet_config().evolve(context_dim=64)
    model = ModelConfig(unet=unet, autoencoder=autoencoder_config(), text=TEXT, text_path=str(place))
    found = build_text_encoder(request(model=model), store, tmp_path)
    assert_same(found.tower, encoder.tower)
    assert text_tower(place)


def test_a_file_without_a_text_tower_is_said_to_be_one(store, tmp_path):
    write_tensors(tmp_path / "vae.safetensors", {"first_stage_model.quant_conv.bias": torch.ones(8)})
    unet = unet_config().evolve(context_dim=64)
    model = ModelConfig(unet=unet, autoencoder=autoencoder_config(), text=TEXT)
    with pytest.raises(WeightsError, match="there is no text tower in it"):
        build_text_encoder(request(model=model.evolve(text_path=str(tmp_path / "vae.safetensors"))), store, tmp_path)
    with pytest.raises(PretrainedMissing, match="openclip-vit-h-14"):
        build_text_encoder(request(model=model), LocalStore(tmp_path / "store"), tmp_path)


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(("name", "form"), [("sd.safetensors", "sd-ldm"), ("sd", "sd-diffusers")])
def test_the_autoencoder_that_comes_with_stable_diffusion_is_taken(image_base, tmp_path, name, form):
    """Nobody has to name a file of it; where there is none, the error says what to name."""
    torch.manual_seed(0)
    own = Autoencoder(autoencoder_config())
    whole = replace(image_base, parts=replace(image_base.parts, autoencoder=Tensors.of(own.net.state_dict())))
    write_model(whole, tmp_path / name, form)
    stage = request(sd_init="my-sd", sd_path=str(tmp_path / name)).stage
    found = Autoencoder.from_safetensors(autoencoder_of_start(stage, tmp_path), autoencoder_config())
    assert_same(found.net, own.net)
    write_model(image_base, tmp_path / "bare.safetensors", "sd-ldm")
    with pytest.raises(WeightsError, match=r"set model\.autoencoder_path"):
        autoencoder_of_start(stage.evolve(sd_path=str(tmp_path / "bare.safetensors")), tmp_path)
