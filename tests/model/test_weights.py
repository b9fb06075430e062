import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from vc2.errors import ConfigError, WeightsError
from vc2.model.config import UNetConfig
from vc2.model.partition import is_temporal
from vc2.model.unet import UNet3D
from vc2.model.weights import (
    config_from_released,
    load_released_unet,
    load_sd_unet,
    load_unet,
    released_hyper_parameters,
    released_state_dict,
    save_unet,
    sd_names,
)

OPTIONS = [
    {},
    {"use_linear": False},
    {"transformer_depth": 2, "num_res_blocks": 2},
    {"channel_mult": (1, 2, 2), "attention_resolutions": (2,)},
    {"temporal_conv": False, "use_relative_position": True, "fps_cond": False},
    {"temporal_attention": False},
    {"addition_attention": False, "use_causal_attention": True},
    {"use_image_attention": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_released_names_there_and_back_are_the_same_network(make_unet, options):
    unet = make_unet(**options)
    state = released_state_dict(unet)
    assert len(state) == len(unet.state_dict())
    again = load_released_unet(released_hyper_parameters(unet.config), state)
    assert again.config == unet.config.evolve(temporal_conv_dropout=again.config.temporal_conv_dropout)
    assert not again.training
    assert_same(again.state_dict(), unet.state_dict())


def test_a_whole_checkpoint_loads_whatever_its_prefixes(golden):
    """Autoencoder, text tower and schedule buffers, the 1400-long one too, are passed over."""
    recorded = golden("unet/t2v_fps.npz")
    others = {
        "first_stage_model.encoder.conv_in.weight": torch.zeros(1),
        "cond_stage_model.model.ln_final.weight": torch.zeros(1),
        "betas": torch.zeros(1000),
        "scale_arr": torch.zeros(1400),
    }
    plain = load_released_unet(recorded.meta["config"], recorded.state).state_dict()
    for prefix in ("model.diffusion_model.", "_forward_module.model.diffusion_model."):
        outer = prefix.removesuffix("model.diffusion_model.")
        whole = {prefix + name: tensor for name, tensor in recorded.state.items()}
        whole |= {outer + name: tensor for name, tensor in others.items()}
        assert_same(load_released_unet(recorded.meta["config"], whole).state_dict(), plain)


def test_options_left_out_are_read_off_the_tensors(make_unet):
    """A VideoCrafter1 file need not say that it lacks what came later."""
    unet = make_unet(temporal_conv=False, fps_cond=False, use_relative_position=True, use_linear=False)
    said = released_hyper_parameters(unet.config)
    for name in (
        "temporal_conv",
        "fps_cond",
        "use_relative_position",
        "use_linear",
        "addition_attention",
        "use_image_attention",
    ):
        del said[name]
    assert load_released_unet(said, released_state_dict(unet)).config.use_linear is False


def test_a_depth_of_the_temporal_transformers_is_taken_where_it_is_that_of_the_spatial_ones(make_unet):
    unet = make_unet(transformer_depth=2)
    said = released_hyper_parameters(unet.config) | {"temporal_transformer_depth": 2}
    assert load_released_unet(said, released_state_dict(unet)).config.transformer_depth == 2
    del said["transformer_depth"]
    assert load_released_unet(said, released_state_dict(unet)).config.transformer_depth == 2


def test_half_precision_files_load_into_float32(golden):
    recorded = golden("unet/image_t1.npz")
    halves = {name: tensor.half() for name, tensor in recorded.state.items()}
    assert {p.dtype for p in load_released_unet(recorded.meta["config"], halves).parameters()} == {torch.float32}


def test_a_partial_load_is_an_error_that_names_all_that_is_wrong(golden):
    recorded = golden("unet/t2v_fps.npz")
    state = dict(recorded.state)
    del state["out.2.bias"]
    state["time_embed.0.bias"] = torch.zeros(7)
    state["middle_block.4.weight"] = torch.zeros(1)
    with pytest.raises(WeightsError) as caught:
        load_released_unet(recorded.meta["config"], state)
    text = str(caught.value)
    assert "708 of 710 tensors fit" in text
    assert "1 missing: out.2.bias" in text
    assert "1 unexpected: middle_block.4.weight" in text
    assert "time_embed.0.bias is (7,), not (256,)" in text


def test_a_stranger_in_a_whole_checkpoint_is_an_error(golden):
    recorded = golden("unet/image_t1.npz")
    whole = {"model.diffusion_model." + name: tensor for name, tensor in recorded.state.items()} | {
        "foo.bar": torch.zeros(1)
    }
    with pytest.raises(WeightsError, match=r"1 unexpected: foo\.bar"):
        load_released_unet(recorded.meta["config"], whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal_selfatt_only": False}, "only temporal_selfatt_only=True"),
        ({"no_such_option": 1}, "not a hyper-parameter"),
        ({"model_channels": 50}, "not divisible into norm_groups"),
        ({"temporal_transformer_depth": 3}, "one depth for both kinds of transformers"),
    ],
)
def test_hyper_parameters_of_another_network_are_refused(golden, change, message):
    recorded = golden("unet/t2v_fps.npz")
    with pytest.raises(ConfigError, match=message):
        load_released_unet(recorded.meta["config"] | change, recorded.state)


@torch.no_grad()
def test_starting_from_an_image_network_gives_its_result_frame_by_frame(golden):
    recorded = golden("sd_init/diffusers_2d.npz")
    unet = UNet3D(config_from_released(recorded.meta["config"])).eval()
    assert load_sd_unet(unet, recorded.state) == len(recorded.state)
    predicted = unet(recorded["in.x"], recorded["in.timesteps"], recorded["in.context"])
    torch.testing.assert_close(predicted, recorded["out.y"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("use_linear", "depth"), [(False, 1), (True, 2)])
@torch.no_grad()
def test_any_image_network_of_diffusers_is_ours_frame_by_frame(use_linear, depth):
    """Three levels, the deepest without attention; projections as convolutions, and deeper transformers."""
    image_network = UNet2DConditionModel(
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=(2, 4, 4),  # the number of heads, in spite of its name
        transformer_layers_per_block=depth,
        use_linear_projection=use_linear,
        norm_num_groups=4,
    ).eval()
    config = UNetConfig(
        model_channels=16,
        channel_mult=(1, 2, 2),
        attention_resolutions=(1, 2),
        num_head_channels=8,
        transformer_depth=depth,
        context_dim=12,
        use_linear=use_linear,
        norm_groups=4,
    )
    unet = UNet3D(config).eval()
    load_sd_unet(unet, image_network.state_dict())
    latents, timesteps, text = torch.randn(2, 4, 3, 8, 4), torch.tensor([7, 800]), torch.randn(2, 5, 12)
    predicted = unet(latents, timesteps, text)
    for frame in range(3):
        alone = image_network(latents[:, :, frame], timesteps, encoder_hidden_states=text).sample
        torch.testing.assert_close(predicted[:, :, frame], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("column", "diffusers", "prefix"), [("sd21_ldm", False, "model.diffusion_model."), ("sd21_diffusers", True, "")]
)
def test_all_686_names_of_stable_diffusion_are_known(name_table, column, diffusers, prefix):
    with torch.device("meta"):
        unet = UNet3D(UNetConfig())
    shapes = {name: "x".join(map(str, parameter.shape)) for name, parameter in unet.named_parameters()}
    names = sd_names(unet, diffusers=diffusers)
    ours = {prefix + theirs: shapes[name] for name, theirs in names.items()}
    assert ours == {row[column]: row["shape"] for row in name_table("sd21_name_map.tsv")}
    assert len(names) == 686


@pytest.mark.parametrize("options", [{}, {"channel_mult": (1, 2, 2), "attention_resolutions": (1, 2)}], ids=str)
def test_both_forms_of_stable_diffusion_load_alike(make_unet, options):
    """By LDM names, which shift against the released ones, and by diffusers'."""
    source = make_unet(**options)
    spatial = {name: tensor for name, tensor in source.state_dict().items() if not is_temporal(name)}
    for diffusers, prefix in ((True, ""), (False, "model.diffusion_model.")):
        names = sd_names(source, diffusers=diffusers)
        unet = UNet3D(source.config)
        load_sd_unet(unet, {prefix + names[name]: tensor for name, tensor in spatial.items()})
        assert_same({name: tensor for name, tensor in unet.state_dict().items() if name in names}, spatial)


def test_a_network_saved_and_loaded_is_the_same(make_unet, tmp_path):
    unet = make_unet(use_linear=False)
    save_unet(unet, tmp_path / "folder" / "unet.safetensors")
    save_unet(unet, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "folder" / "unet.safetensors").read_bytes()
    again = load_unet(tmp_path / "again.safetensors")
    assert again.config == unet.config
    assert_same(again.state_dict(), unet.state_dict())


def test_a_file_that_is_no_network_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.safetensors").write_text("not tensors")
    for name in ("text.safetensors", "missing.safetensors"):
        with pytest.raises(WeightsError, match=name):
            load_unet(tmp_path / name)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
