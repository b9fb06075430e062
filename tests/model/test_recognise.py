"""What a file is, is said by name: an error tells what was given, not only what it lacks."""

from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from vc2.errors import WeightsError
from vc2.model.config import UNetConfig
from vc2.model.files import Stored, Tensors, open_weights, write_tensors, write_torch
from vc2.model.recognise import recognise
from vc2.model.unet import UNet3D
from vc2.model.weights import (
    config_from_released,
    config_of_image_network,
    load_released_unet,
    load_sd_unet,
    released_state_dict,
    sd_names,
)

PREFIX = "model.diffusion_model."


def of_shapes(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    return Tensors({name: Stored(shape, torch.float32, lambda: torch.empty(0)) for name, shape in shapes.items()})


def table(rows: list[dict[str, str]], column: str) -> Tensors:
    return of_shapes({row[column]: tuple(int(n) for n in row["shape"].split("x") if n) for row in rows})


@pytest.mark.parametrize(
    ("name", "column", "family", "words"),
    [
        ("videocrafter2_t2v512_state_dict.tsv", "name", "video", "VideoCrafter2 text-to-video"),
        ("videocrafter1_i2v512_state_dict.tsv", "name", "video", "image-to-video"),
        ("sd21_name_map.tsv", "sd21_ldm", "image", "Stable Diffusion 2.x, LDM names"),
        ("sd21_name_map.tsv", "sd21_diffusers", "image", "Stable Diffusion 2.x, diffusers names"),
        ("vae_name_map.tsv", "sd_ldm", "other", "an autoencoder alone"),
        ("vae_name_map.tsv", "diffusers", "other", "an autoencoder alone"),
        ("text_encoder_state_dict.tsv", "name", "other", "a text tower"),
        ("i2v/resampler_state_dict.tsv", "name", "other", "an image tower alone"),
    ],
)
def test_published_names_and_shapes_are_recognised(name_table, name, column, family, words):
    found = recognise(table(name_table(name), column))
    assert found.family == family
    assert words in found.words


@pytest.mark.parametrize("column", ["sd21_ldm", "sd21_diffusers"])
def test_the_shape_of_stable_diffusion_is_read_off_its_tensors(name_table, column):
    assert config_of_image_network(table(name_table("sd21_name_map.tsv"), column)) == UNetConfig()


def changed(rows: list[dict[str, str]], **changes: tuple[int, ...]) -> Tensors:
    tensors = table(rows, "name")
    stored = {f"{PREFIX}{name.replace('__', '.')}": shape for name, shape in changes.items()}
    return tensors | of_shapes(stored)


def other_networks(name_table) -> dict[str, Tensors]:
    video, image = name_table("videocrafter2_t2v512_state_dict.tsv"), name_table("sd21_name_map.tsv")
    ldm, diffusers = table(image, "sd21_ldm"), table(image, "sd21_diffusers")

    def narrower(tensors: Tensors) -> Tensors:
        keys = [name for name in tensors if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
        return tensors | of_shapes({name: (tensors.shapes[name][0], 768) for name in keys})

    return {
        "DynamiCrafter": changed(video, input_blocks__0__0__weight=(320, 8, 3, 3)),
        "Stable Diffusion 1.x": narrower(ldm),
        "Stable Diffusion 1.x ": narrower(diffusers),
        "Stable Diffusion XL": ldm | of_shapes({f"{PREFIX}label_emb.0.0.weight": (1280, 2816)}),
        "9 input channels": ldm | of_shapes({f"{PREFIX}input_blocks.0.0.weight": (320, 9, 3, 3)}),
        "a LoRA": of_shapes({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": (4, 320)}),
        "a LoRA ": of_shapes({"lora_unet_down_blocks_0.lora_down.weight": (4, 320)}),
        "a moving average alone": of_shapes({"model_ema.diffusion_modeltime_embed0weight": (1280, 320)}),
        "the state of an optimizer": of_shapes({"0.exp_avg": (2,), "0.exp_avg_sq": (2,)}),
        "AnimateDiff": of_shapes({"down_blocks.0.motion_modules.0.proj_in.weight": (320, 320)}),
        "no network that vc2 knows": of_shapes({"layer.weight": (2,)}),
    }


def test_networks_that_cannot_be_loaded_are_named_in_the_error(name_table):
    for words, tensors in other_networks(name_table).items():
        assert recognise(tensors).family == "other", words
        with pytest.raises(WeightsError, match=rf"likely cause: this is .*{words.strip()}"):
            load_released_unet({}, tensors)


def test_an_image_network_where_a_video_network_belongs_and_the_reverse(name_table):
    video = table(name_table("videocrafter2_t2v512_state_dict.tsv"), "name")
    image = table(name_table("sd21_name_map.tsv"), "sd21_ldm")
    with pytest.raises(WeightsError, match=r"this is an image network .*; to start from it, name it as sd_path"):
        load_released_unet({}, image)
    with torch.device("meta"):
        unet = UNet3D(UNetConfig())
    with pytest.raises(WeightsError, match=r"this is a VideoCrafter2 .*, expected the image network of Stable Diff"):
        load_sd_unet(unet, video)
    with torch.device("meta"):
        smaller = UNet3D(UNetConfig(model_channels=64))
    with pytest.raises(WeightsError, match="check that the configuration describes these weights"):
        load_sd_unet(smaller, image)


def test_videocrafter1_is_told_from_2_by_its_relative_positions(make_unet):
    unet = make_unet(temporal_conv=False, use_relative_position=True, fps_cond=False)
    state = released_state_dict(unet)
    assert "VideoCrafter1" in recognise(Tensors.of(state)).words
    with pytest.raises(WeightsError, match=r"this is a VideoCrafter1 .*; check the hyper-parameters"):
        load_released_unet({"temporal_conv": True, "norm_groups": 4, "model_channels": 16}, state)
    assert config_from_released({"norm_groups": 4}, state) == unet.config.evolve(attention_resolutions=(2, 1))


def test_our_own_names_are_recognised(make_unet):
    assert recognise(Tensors.of(make_unet().state_dict())).family == "ours"


# ---- velocity ----


@pytest.fixture
def image_weights(make_unet) -> dict[str, Tensor]:
    unet = make_unet()
    names = sd_names(unet, diffusers=False)
    return {PREFIX + names[name]: tensor for name, tensor in unet.state_dict().items() if name in names}


def velocity_by_file_name(folder: Path, state: dict[str, Tensor]) -> Path:
    write_tensors(folder / "v2-1_768-ema-pruned.safetensors", state)
    return folder / "v2-1_768-ema-pruned.safetensors"


def velocity_by_yaml(folder: Path, state: dict[str, Tensor]) -> Path:
    write_torch(folder / "model.ckpt", state)
    (folder / "model.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    return folder / "model.ckpt"


def velocity_by_metadata(folder: Path, state: dict[str, Tensor]) -> Path:
    write_tensors(folder / "model.safetensors", state, {"modelspec.architecture": "stable-diffusion-v2-768-v"})
    return folder / "model.safetensors"


def velocity_by_scheduler(folder: Path, state: dict[str, Tensor]) -> Path:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    (folder / "model_index.json").write_text("{}")
    write_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", state)
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (velocity_by_file_name, "published name of the 768"),
        (velocity_by_yaml, "says parameterization v"),
        (velocity_by_metadata, r"metadata says modelspec\.architecture"),
        (velocity_by_scheduler, "says prediction_type v_prediction"),
    ],
)
def test_a_velocity_predictor_is_refused_when_anything_says_that_it_is_one(
    tmp_path, make_unet, image_weights, make, words
):
    """Stable Diffusion 2.1-768 has the names and shapes of 2.1-base."""
    place = make(tmp_path, image_weights)
    with pytest.raises(WeightsError, match=rf"predicts velocity \(v\).*{words}.*give Stable Diffusion 2\.1-base"):
        load_sd_unet(make_unet(), open_weights(place))


def test_a_noise_predictor_is_not(tmp_path, make_unet, image_weights):
    write_tensors(tmp_path / "v2-1_512.safetensors", image_weights, {"modelspec.architecture": "stable-diffusion-v2"})
    (tmp_path / "v2-1_512.yaml").write_text("model:\n  params:\n    parameterization: eps\n")
    assert load_sd_unet(make_unet(), open_weights(tmp_path / "v2-1_512.safetensors")) == len(image_weights)


def test_a_network_of_diffusers_saved_by_it_is_recognised(tmp_path):
    network = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
    )
    network.save_pretrained(tmp_path)
    assert recognise(open_weights(tmp_path)).family == "image"
