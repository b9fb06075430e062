"""A model goes from form to form and comes back bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from vc2.errors import ConfigError, WeightsError
from vc2.model.autoencoder import Autoencoder
from vc2.model.bundle import Parts, VideoModel
from vc2.model.config import (
    AutoencoderConfig,
    ImageConfig,
    ImageTowerConfig,
    ModelConfig,
    ResamplerConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
)
from vc2.model.convert import (
    Form,
    Found,
    load_model,
    parameter_counts,
    read_hyper_parameters,
    read_model,
    recognise_tensors,
    schedule_buffers,
    write_model,
)
from vc2.model.files import Stored, Tensors, open_weights
from vc2.model.image import ImageEncoder
from vc2.model.partition import group_of
from vc2.model.schedule import NoiseSchedule
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D
from vc2.model.weights import autoencoder_to_released, looks_like_noise_prediction, released_state_dict

UNET = UNetConfig(
    model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2, 1), context_dim=64,
    num_head_channels=32,
)  # fmt: skip
AUTOENCODER = AutoencoderConfig(block_out_channels=(32, 64), layers_per_block=1)
TEXT = TextConfig(width=64, heads=1, layers=3, layers_used=2)
IMAGE = ImageConfig(
    tower=ImageTowerConfig(width=160, heads=2, layers=2, image_size=28, output_dim=64),
    resampler=ResamplerConfig(dim=64, depth=1, heads=1, num_queries=4, embedding_dim=160, output_dim=64, ff_mult=2),
)


def released(unet_config: UNetConfig = UNET, *, image: bool = False, dtype: torch.dtype = torch.float32) -> dict:
    """A checkpoint as VideoCrafter was released, small: what our networks do not use is in it too."""
    unet = UNet3D(unet_config)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_()
    autoencoder = Autoencoder(AUTOENCODER).net.state_dict()
    tower = TextEncoder(TEXT.evolve(layers_used=3)).tower.state_dict()
    tower |= {"text_projection": torch.randn(64, 64), "logit_scale": torch.tensor(4.6)}
    state = released_state_dict(unet, prefix="model.diffusion_model.")
    state |= {f"first_stage_model.{name}": t for name, t in autoencoder_to_released(autoencoder, 2).items()}
    state |= {f"cond_stage_model.model.{name}": tensor for name, tensor in tower.items()}
    if image:
        state |= dict(Parts.of(video_model(image=True)).image or {})
        state["embedder.model.logit_scale"] = torch.tensor(4.6)
    state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    scaled = ScheduleConfig(signal_scaling=unet_config.fps_cond)
    return state | schedule_buffers(scaled)


def video_model(*, image: bool = False) -> VideoModel:
    config = ModelConfig(
        unet=UNET.evolve(use_image_attention=image),
        autoencoder=AUTOENCODER,
        text=TEXT,
        image=IMAGE if image else None,
    )
    return VideoModel(
        config=config,
        unet=UNet3D(config.unet).eval(),
        schedule=NoiseSchedule(config.schedule),
        autoencoder=Autoencoder(AUTOENCODER),
        text=TextEncoder(TEXT),
        fps={8: 3, 24: 1},
        image=ImageEncoder(IMAGE) if image else None,
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(state: dict[str, Tensor], name: str = "model.safetensors") -> Path:
        path = tmp_path / name
        save_file(state, path) if path.suffix == ".safetensors" else torch.save({"state_dict": state}, path)
        return path

    return write


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_a_released_checkpoint_comes_back_bit_for_bit(write, tmp_path, name, image):
    """Every tensor: unused text layers, tables of the schedule, the 1400-long one."""
    state = released(UNET.evolve(use_image_attention=image), image=image)
    source = write(state, name)
    write_model(read_model(source), tmp_path / "ours", "vc2")
    write_model(read_model(tmp_path / "ours"), tmp_path / f"again-{name}", "released")
    assert state["scale_arr"].shape == (1400,)
    assert_same(open_weights(tmp_path / f"again-{name}"), state)


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_a_released_checkpoint_comes_back_from_our_pipeline_bit_for_bit(write, tmp_path, image):
    """Values, and types, which may differ by network: what diffusers has no place for lies beside it."""
    state = released(UNET.evolve(use_image_attention=image), image=image)
    part_types = {"model.diffusion": torch.bfloat16, "cond_stage": torch.float16, "embedder": torch.float16}
    for name, tensor in state.items():
        state[name] = tensor.to(next((part_types[p] for p in part_types if name.startswith(p)), tensor.dtype))
    found = read_model(write(state))
    write_model(found, tmp_path / "full", "diffusers-full")
    again = read_model(tmp_path / "full")
    assert again.form == "diffusers-full" and again.parts.config == found.parts.config
    write_model(again, tmp_path / "again.safetensors", "released")
    assert_same(open_weights(tmp_path / "again.safetensors"), state)
    autoencoder = load_file(tmp_path / "full" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in autoencoder.values()} == {torch.float32}


def test_a_seeded_text_tower_stays_one_in_a_folder_of_our_pipeline(tmp_path):
    model = video_model()
    model = replace(model, config=model.config.evolve(text=TEXT.evolve(seed=3)), text=TextEncoder(TEXT.evolve(seed=3)))
    write_model(Found("vc2", "", Parts.of(model)), tmp_path / "full", "diffusers-full")
    again = read_model(tmp_path / "full").parts
    assert again.config == model.config and again.fps == model.fps and again.text is None
    assert_same(again.load().text.tower.state_dict(), model.text.tower.state_dict())


def test_stock_diffusers_keeps_the_type_of_every_network(write, tmp_path):
    """What its frame rate adds is rounded once."""
    state = released()
    state = {name: tensor.half() if name.startswith("model.") else tensor for name, tensor in state.items()}
    found = read_model(write(state))
    write_model(found, tmp_path / "stock", "diffusers", fps=8)
    again = read_model(tmp_path / "stock").parts
    for part, dtype in ((again.unet, torch.float16), (again.autoencoder, torch.float32), (again.text, torch.float32)):
        assert part is not None and {stored.dtype for stored in part.stored.values()} == {dtype}
    unet = found.parts.load().unet
    assert unet.fps_embedding is not None
    with torch.no_grad():
        bias = unet.time_embedding.out.bias + unet.fps_embedding(torch.tensor([8]))[0]
    assert torch.equal(again.unet["time_embedding.out.bias"], bias.half())


def test_types_are_kept_unless_another_is_asked_for(write, tmp_path):
    state = released(dtype=torch.float16)
    found = read_model(write(state))
    write_model(found, tmp_path / "ours", "vc2")
    assert {tensor.dtype for tensor in load_file(tmp_path / "ours" / "unet.safetensors").values()} == {torch.float16}
    Parts.read(tmp_path / "ours").cast(torch.bfloat16).write(tmp_path / "other")
    assert {stored.dtype for stored in Parts.read(tmp_path / "other").unet.stored.values()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(tmp_path / "other").unet.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temporal_conv": False, "use_relative_position": True, "fps_cond": False, "temporal_length": 5},
        {"use_image_attention": True},
        {"use_linear": False, "transformer_depth": 2},
        {"channel_mult": (1, 2, 2), "attention_resolutions": (2, 1), "num_res_blocks": 2},
    ],
    ids=str,
)
def test_the_shape_of_a_released_network_is_read_off_its_tensors(write, options):
    """No YAML is needed: heads, levels, relative positions, fps input, signal scaling."""
    config = UNET.evolve(**options)
    found = read_model(write(released(config)))
    assert found.form == "released"
    assert found.parts.config.unet == config
    assert found.parts.config.schedule == ScheduleConfig(signal_scaling=config.fps_cond)
    assert found.parts.config.autoencoder == AUTOENCODER
    assert found.parts.config.text == TEXT


@pytest.mark.parametrize("image", [False, True], ids=["text-to-video", "image-to-video"])
def test_the_released_names_and_shapes_tell_the_whole_configuration(name_table, image):
    """At full size, from the published tables alone: nothing is read but the tables of the schedule."""

    def rows(table: str, column: str = "name") -> dict[str, Stored]:
        shapes = {row[column]: tuple(int(n) for n in row["shape"].split("x") if n) for row in name_table(table)}
        return {name: Stored(shape, torch.float32, lambda: pytest.fail("read")) for name, shape in shapes.items()}

    stored = rows(f"videocrafter{'1_i2v' if image else '2_t2v'}512_state_dict.tsv")
    stored |= rows("vae_name_map.tsv", "released_checkpoint") | rows("text_encoder_state_dict.tsv")
    if image:
        stored |= rows("i2v/image_encoder_state_dict.tsv") | rows("i2v/resampler_state_dict.tsv")
    stored |= {name: Stored.of(table) for name, table in schedule_buffers(ScheduleConfig()).items()}
    found = recognise_tensors(Tensors(stored))
    expected = ModelConfig(unet=UNetConfig(use_image_attention=image), image=ImageConfig() if image else None)
    assert found.parts.config == expected
    counts = parameter_counts(found.parts.unet)
    assert (counts["spatial"], counts["temporal"]) == (865_910_724, 547_373_696)
    assert counts["total"] == (1_438_843_460 if image else 1_413_284_420)


def test_a_model_saved_and_loaded_is_the_same(tmp_path):
    model = video_model(image=True)
    model.save(tmp_path / "model")
    again = VideoModel.load(tmp_path / "model")
    assert again.config == model.config and again.fps == model.fps
    for part in ("unet", "autoencoder", "text", "image"):
        assert_same(getattr(again, part).state_dict(), getattr(model, part).state_dict())


def test_our_own_configuration_and_rates_travel_in_foreign_forms(tmp_path):
    """Group norms and seeded text towers do not show in shapes; a note in the file keeps them."""
    model = video_model()
    model.save(tmp_path / "model")
    for name in ("one.safetensors", "one.ckpt"):
        write_model(read_model(tmp_path / "model"), tmp_path / name, "released")
        again = load_model(tmp_path / name)
        assert again.config == model.config and again.fps == model.fps


def test_image_networks_go_between_their_two_forms_and_back(write, tmp_path):
    """Text layers that diffusers has no place for, and tables of the schedule, come back too."""
    write_model(read_model(write(released(dtype=torch.float16))), tmp_path / "sd.ckpt", "sd-ldm")
    state = dict(open_weights(tmp_path / "sd.ckpt"))
    assert sum(name.startswith("model.diffusion_model.") for name in state) == sum(
        group_of(name) == "spatial" for name in UNet3D(UNET).state_dict()
    )
    found = read_model(tmp_path / "sd.ckpt")
    assert found.form == "sd-ldm" and found.is_image_network
    write_model(found, tmp_path / "sd", "sd-diffusers")
    again = read_model(tmp_path / "sd")
    assert again.form == "sd-diffusers"
    write_model(again, tmp_path / "again.ckpt", "sd-ldm")
    assert_same(open_weights(tmp_path / "again.ckpt"), state)


@torch.no_grad()
def test_the_spatial_part_loads_in_diffusers_and_is_ours_frame_by_frame(write, tmp_path):
    model = video_model()
    model.save(tmp_path / "model")
    write_model(read_model(tmp_path / "model"), tmp_path / "sd", "sd-diffusers")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    write_model(read_model(tmp_path / "sd"), tmp_path / "grown", "vc2")
    grown = VideoModel.load(tmp_path / "grown").unet
    assert isinstance(pipeline.unet, UNet2DConditionModel)
    latents, timesteps, text = torch.randn(1, 4, 2, 8, 8), torch.tensor([500]), torch.randn(1, 5, 64)
    predicted = grown(latents, timesteps, text, fps=8)
    for frame in range(2):
        alone = pipeline.unet(latents[:, :, frame], timesteps, encoder_hidden_states=text).sample
        torch.testing.assert_close(predicted[:, :, frame], alone, rtol=0, atol=2e-5)


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A moving average as LDM writes it, under flattened names: every tensor of the network, one more than it is."""
    names = [name for name in state if name.startswith("model.diffusion_model.")]
    flat = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": state[name] + 1 for name in names}
    return flat | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def test_the_average_is_taken_where_a_file_has_both(write):
    """LDM flattens the names of its moving average."""
    state = released()
    path = write(state | averaged(state))
    name, ours = "model.diffusion_model.time_embed.0.weight", "time_embedding.hidden.weight"
    assert torch.equal(read_model(path, weights="ema").parts.unet[ours], state[name] + 1)
    assert torch.equal(read_model(path, weights="raw").parts.unet[ours], state[name])


@pytest.mark.parametrize("change", ["one is missing", "one alone", "one too many"])
def test_averaged_and_raw_weights_are_never_mixed(write, change):
    state = released()
    average = averaged(state)
    name = "model_ema.diffusion_modeltime_embed0weight"
    if change == "one is missing":
        del average[name]
    elif change == "one alone":
        average = {name: average[name]}
    else:
        average[f"{name}x"] = torch.zeros(1)
    path = write(state | average)
    with pytest.raises(WeightsError, match=r"its moving average has \d+ of the network's \d+ tensors.*--weights raw"):
        read_model(path)
    assert torch.equal(
        read_model(path, weights="raw").parts.unet["time_embedding.hidden.weight"],
        state["model.diffusion_model.time_embed.0.weight"],
    )


YAML = (
    "model:\n  target: lvdm.models.ddpm3d.LatentDiffusion\n  params:\n    linear_start: 0.00085\n"
    "    linear_end: 0.012\n    timesteps: 1000\n    use_scale: true\n    scale_b: 0.7\n    unet_config:\n"
    "      params: {model_channels: 32, channel_mult: [1, 2], use_causal_attention: true, use_checkpoint: true}\n"
)


def test_a_yaml_file_says_what_shapes_do_not(write, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    assert read_hyper_parameters(path)["schedule"]["signal_floor"] == 0.7
    found = read_model(write(released()), hyper_parameters=path)
    assert found.parts.config.unet.use_causal_attention
    path.write_text(path.read_text().replace("    use_scale", "    parameterization: v\n    use_scale"))
    with pytest.raises(ConfigError, match="only networks that predict noise"):
        read_hyper_parameters(path)


@pytest.fixture
def yaml(tmp_path: Path) -> Callable[..., Path]:
    """VideoCrafter's own configuration with words replaced."""

    def yaml(old: str = "", new: str = "") -> Path:
        assert old in YAML
        (tmp_path / "config.yaml").write_text(YAML.replace(old, new) if old else YAML)
        return tmp_path / "config.yaml"

    return yaml


def test_where_a_yaml_file_is_silent_the_tables_of_the_file_speak(write, yaml):
    """Of the signal scaling; without tables, silence means none, as for VideoCrafter."""
    silent = yaml("    use_scale: true\n    scale_b: 0.7\n")
    state = released()
    assert read_model(write(state), hyper_parameters=silent).parts.config.schedule == ScheduleConfig()
    bare = {name: tensor for name, tensor in state.items() if name not in schedule_buffers(ScheduleConfig())}
    found = read_model(write(bare), hyper_parameters=silent).parts.config.schedule
    assert found == ScheduleConfig(signal_scaling=False)
    assert read_model(write(bare)).parts.config.schedule == ScheduleConfig()
    assert read_model(write(bare), hyper_parameters=yaml()).parts.config.schedule == ScheduleConfig()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("use_scale: true", "use_scale: false", "signal_scaling=False"),
        ("scale_b: 0.7", "scale_b: 0.3", r"signal_floor=0\.3"),
        ("scale_b: 0.7", "mid_step: 300", "signal_knee=300"),
        ("linear_end: 0.012", "linear_end: 0.02", r"beta_end=0\.02"),
    ],
)
def test_a_yaml_file_that_contradicts_the_tables_of_the_file_is_refused(write, yaml, old, new, words):
    with pytest.raises(ConfigError, match=rf"the hyper-parameters say .*{words}.*the tables in the file otherwise"):
        read_model(write(released()), hyper_parameters=yaml(old, new))


def test_a_signal_scaling_that_does_not_begin_at_one_is_refused(yaml):
    with pytest.raises(ConfigError, match=r"scale_a 0\.9"):
        read_hyper_parameters(yaml("scale_b: 0.7", "scale_a: 0.9"))
    assert read_hyper_parameters(yaml("scale_b: 0.7", "scale_a: 1.0"))["schedule"]["signal_floor"] == 0.3


def test_hyper_parameters_are_used_or_refused(write, yaml, tmp_path):
    """Where the configuration is known already, they would have no effect."""
    source = write(released())
    path = yaml()
    assert read_model(source, hyper_parameters=path).parts.config.unet.use_causal_attention
    forms: dict[str, Form] = {
        "noted.safetensors": "released",
        "ours": "vc2",
        "sd.ckpt": "sd-ldm",
        "sd": "sd-diffusers",
    }
    for name, form in forms.items():
        write_model(read_model(source), tmp_path / name, form)
        with pytest.raises(ConfigError, match=r"--hyper-parameters belongs to released checkpoints"):
            read_model(tmp_path / name, hyper_parameters=path)


@pytest.mark.parametrize("note", ['{"unet": {"no_such_option": 1}}', "{not json", "[]"])
def test_a_note_of_another_version_is_an_error_and_not_none(tmp_path, note):
    """What it says shows nowhere else: schedule, frame rates, groups of the norms."""
    save_file(released(), tmp_path / "model.safetensors", {"vc2": note})
    with pytest.raises(WeightsError, match=r"the note 'vc2' in it does not fit this version of vc2"):
        read_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "schedule",
    [ScheduleConfig(), ScheduleConfig(signal_floor=0.3), ScheduleConfig(signal_scaling=False)],
    ids=["0.7", "0.3", "none"],
)
def test_a_released_schedule_is_exactly_itself_in_tables_of_any_type(write, dtype, schedule):
    """Pruned files hold all their tensors in half precision."""
    names = set(schedule_buffers(ScheduleConfig()))
    state = {name: tensor for name, tensor in released().items() if name not in names} | schedule_buffers(schedule)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    found = read_model(write(state))
    assert found.parts.config.schedule == schedule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_unusual_schedule_is_read_off_its_tables(write, dtype):
    schedule = ScheduleConfig(beta_end=0.02, signal_floor=0.5, signal_knee=300)
    state = released() | {name: tensor.to(dtype) for name, tensor in schedule_buffers(schedule).items()}
    found = read_model(write(state)).parts.config.schedule
    assert found.beta_end == pytest.approx(0.02, rel=1e-3) and found.beta_start == pytest.approx(0.00085, rel=1e-3)
    assert (found.signal_floor, found.signal_knee, found.signal_scaling) == (0.5, 300, True)


def test_a_signal_scaling_of_another_kind_is_refused(write):
    state = released()
    state["scale_arr"] = state["scale_arr"] ** 2
    with pytest.raises(WeightsError, match="its signal scaling does not fall linearly"):
        read_model(write(state))


def test_the_coarse_image_encoder_is_read_off_its_tensors(write):
    """Tokens from the one vector for the whole picture, without a resampler."""
    coarse = ImageConfig(tower=IMAGE.tower, resampler=ResamplerConfig(num_queries=4, output_dim=64), finegrained=False)
    state = released(UNET.evolve(use_image_attention=True))
    encoder = ImageEncoder(coarse)
    state |= {f"embedder.model.visual.{name}": tensor for name, tensor in encoder.tower.state_dict().items()}
    state |= {f"image_proj_model.{name}": tensor for name, tensor in encoder.resampler.state_dict().items()}
    found = read_model(write({name: tensor.contiguous() for name, tensor in state.items()})).parts
    assert found.config.image == coarse
    again = found.load().image
    assert again is not None
    assert_same(again.state_dict(), encoder.state_dict())


def test_another_schedule_is_refused(write):
    state = released()
    state["betas"] = torch.linspace(1e-4, 0.02, 1000)
    with pytest.raises(WeightsError, match="do not rise linearly"):
        read_model(write(state))
    state["betas"][-1] = 1.0
    with pytest.raises(WeightsError, match=r"zero terminal SNR.*DynamiCrafter"):
        read_model(write(state))


def test_a_network_without_the_rest_says_what_it_lacks(write, tmp_path):
    state = {name: tensor for name, tensor in released().items() if name.startswith("model.")}
    write_model(read_model(write(state)), tmp_path / "ours", "vc2")
    with pytest.raises(WeightsError, match="no autoencoder in it"):
        load_model(tmp_path / "ours")


def test_a_failed_write_leaves_what_was_there(write, tmp_path):
    state = released()
    source = write(state)
    write_model(read_model(source), tmp_path / "ours", "vc2")
    before = (tmp_path / "ours" / "unet.safetensors").read_bytes()
    found = read_model(source)
    source.write_bytes(source.read_bytes()[: 2**16])
    with pytest.raises(WeightsError, match="ended while it was read"):
        write_model(found, tmp_path / "ours", "vc2")
    assert (tmp_path / "ours" / "unet.safetensors").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_parameters_are_counted_by_group(write):
    parts = read_model(write(released(UNET.evolve(use_image_attention=True)))).parts
    counts = parameter_counts(parts.unet)
    assert counts["total"] == counts["spatial"] + counts["temporal"] + counts["image"]
    assert counts["total"] == sum(tensor.numel() for tensor in UNet3D(parts.config.unet).parameters())


@torch.no_grad()
def test_noise_prediction_shows_at_the_last_timestep():
    unet = UNet3D(UNET).eval()
    assert not looks_like_noise_prediction(unet)
    # A network whose skip path hands its input through: centre taps of the first and last convolutions.
    for parameter in unet.parameters():
        parameter.zero_()
    unet.conv_in.weight[:4, :, 1, 1] = torch.eye(4)
    assert not looks_like_noise_prediction(unet)


@pytest.mark.parametrize("signal_scaling", [True, False])
def test_the_tables_written_are_those_recorded(golden, signal_scaling):
    recorded = golden("ddim/schedule_tables.npz")
    tables = schedule_buffers(ScheduleConfig(signal_scaling=signal_scaling))
    assert len(tables) == 12 + signal_scaling
    for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"):
        assert torch.equal(tables[name], recorded[name].float())
    if signal_scaling:
        assert torch.equal(tables["scale_arr"], recorded["signal_scale_released"])


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert wrong == []
    assert [name for name in expected if found[name].dtype != expected[name].dtype] == []
