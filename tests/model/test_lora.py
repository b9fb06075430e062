import pytest
import torch
from torch import nn

from vc2.errors import ConfigError, WeightsError
from vc2.model.config import LoraConfig
from vc2.model.lora import add_lora, load_lora, lora_names, lora_targets, merge_lora, merged_state_dict, save_lora
from vc2.model.partition import group_of

EVERYTHING = LoraConfig(
    rank=3, alpha=5.0, targets=("attention", "feed_forward", "projection", "convolution", "embedding")
)


def given(frames: int = 3) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 4, frames, 4, 4), torch.tensor([3, 700]), torch.randn(2, 5, 12)


def tuned(make_unet, config=EVERYTHING, trainable="all", **options):
    unet = make_unet(**options)
    for name in add_lora(unet, config, trainable):
        nn.init.normal_(unet.get_parameter(name), std=0.1)
    return unet


@pytest.mark.parametrize("trainable", ["spatial", "temporal", "all"])
@torch.no_grad()
def test_a_new_update_adds_nothing_and_lies_in_its_group(make_unet, trainable):
    unet, inputs = make_unet(), given()
    before = unet(*inputs, fps=8)
    names = add_lora(unet, EVERYTHING, trainable)
    assert torch.equal(unet(*inputs, fps=8), before)
    assert {group_of(name) for name in names} == ({"spatial", "temporal"} if trainable == "all" else {trainable})


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("use_linear", [True, False])
@torch.no_grad()
def test_merged_equals_applied(make_unet, frames, use_linear):
    """Linear layers, convolutions over pixels and over frames, and 1-D projections alike."""
    unet, inputs = tuned(make_unet, use_linear=use_linear), given(frames)
    plain = make_unet(use_linear=use_linear)
    applied = unet(*inputs, fps=8)
    plain.load_state_dict(merged_state_dict(unet))
    torch.testing.assert_close(plain(*inputs, fps=8), applied, rtol=1e-4, atol=1e-4)
    assert torch.equal(unet(*inputs, fps=8), applied)
    merge_lora(unet)
    assert unet.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(unet(*inputs, fps=8), applied, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("trainable", "targets"), [("spatial", ("attention",)), ("temporal", ("convolution",))])
@pytest.mark.parametrize("level", ["none", "selective", "full"])
def test_training_moves_the_updates_alone(make_unet, trainable, targets, level):
    """Every frozen tensor keeps every bit, and every update learns, activations recomputed or not."""
    unet = make_unet(gradient_checkpointing=level).train()
    names = set(add_lora(unet, LoraConfig(rank=2, targets=targets), trainable))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in names)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
    for frames in (3, 1, 3):
        optimizer.zero_grad()
        unet(*given(frames), fps=8).square().mean().backward()
        optimizer.step()
    changed = {name for name, tensor in unet.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == names


def test_the_kinds_are_a_partition_of_all_layers(make_unet):
    unet = make_unet(use_image_attention=True)
    layers = {n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    by_kind = [lora_targets(unet, LoraConfig(targets=(kind,)), "all") for kind in EVERYTHING.targets]
    assert sum(map(len, by_kind)) == len(layers) and set().union(*by_kind) == layers
    attention = lora_targets(unet, LoraConfig(), "all")
    assert {name.rpartition(".")[2] for name in attention} == {
        "query", "key", "value", "out", "image_key", "image_value",
    }  # fmt: skip


@torch.no_grad()
def test_a_file_carries_the_updates(make_unet, tmp_path):
    unet, inputs = tuned(make_unet, trainable="temporal"), given()
    save_lora(unet, tmp_path / "lora.safetensors", EVERYTHING)
    again = make_unet()
    again.load_state_dict(
        {n.replace(".base_layer.", "."): t for n, t in unet.state_dict().items() if ".lora_" not in n}
    )
    assert load_lora(again, tmp_path / "lora.safetensors") == EVERYTHING
    assert torch.equal(again(*inputs, fps=8), unet(*inputs, fps=8))


def test_wrong_use_is_named(make_unet, tmp_path):
    unet = make_unet(temporal_conv=False)
    with pytest.raises(ConfigError, match="no such layers"):
        add_lora(unet, LoraConfig(targets=("convolution",)), "temporal")
    add_lora(unet, LoraConfig(), "spatial")
    with pytest.raises(ConfigError, match="already"):
        add_lora(unet, LoraConfig(), "spatial")
    save_lora(unet, tmp_path / "lora.safetensors", LoraConfig())
    for other, message in (
        (make_unet(channel_mult=(1,)), "another network"),
        (make_unet(context_dim=16), "of another"),
    ):
        kept = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(WeightsError, match=message):
            load_lora(other, tmp_path / "lora.safetensors")
        assert not lora_names(other) and other.state_dict().keys() == kept.keys()
