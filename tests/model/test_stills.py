"""What images can teach the temporal modules: asserted by autograd on whole, small networks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vc2.errors import ConfigError
from vc2.model.config import LoraConfig
from vc2.model.lora import add_lora, lora_targets, merged_state_dict
from vc2.model.partition import Trainable, group_of, trainable_names
from vc2.model.stills import frame_convs, idle_on_stills, silent_on_stills, split_taps
from vc2.model.unet import UNet3D

MakeUNet = Callable[..., UNet3D]
NETWORKS = pytest.mark.parametrize(
    "options", [{}, {"use_causal_attention": True}, {"use_relative_position": True}, {"use_linear": False}]
)
EVERYTHING = LoraConfig(rank=2, targets=("attention", "feed_forward", "projection", "convolution", "embedding"))


def given(frames: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, frames, 4, 4), torch.tensor([3, 700]), torch.randn(2, 5, 12)


def gradients(unet: UNet3D, frames: int) -> dict[str, Tensor]:
    unet.zero_grad()
    unet(*given(frames), fps=8).square().mean().backward()
    return {name: parameter.grad for name, parameter in unet.named_parameters() if parameter.grad is not None}


def tune(unet: UNet3D, names: list[str], *, frames: int = 1, steps: int = 3) -> torch.optim.AdamW:
    """Train some parameters, with a weight decay that nothing in its reach survives unchanged."""
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in names)
    learning = [unet.get_parameter(name) for name in names]
    optimizer = torch.optim.AdamW(learning, lr=0.01, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        unet(*given(frames), fps=8).square().mean().backward()
        optimizer.step()
    return optimizer


@NETWORKS
def test_one_frame_leaves_exactly_the_idle_parameters_without_gradient(make_unet: MakeUNet, options: dict) -> None:
    """Zero in every bit: queries, keys, their positions, outer taps. Nothing else; and on a clip everything learns."""
    unet = make_unet(**options)
    split_taps(unet)
    still, moving = gradients(unet, 1), gradients(unet, 3)
    silent = {name for name, gradient in still.items() if not gradient.any()} | (set(moving) - set(still))
    values = {name for name in still if "value_positions" in name}
    assert silent | values == idle_on_stills(unet) and not silent & values
    for name in values:  # the vector for distance 0 alone
        rows = still[name].abs().sum(1) > 0
        assert rows.sum() == 1 and rows[len(rows) // 2]
    assert all(gradient.any() for gradient in moving.values())


@NETWORKS
def test_the_first_attention_is_no_exception(make_unet: MakeUNet, options: dict) -> None:
    silent = silent_on_stills(make_unet(**options))
    assert "first_temporal_attention.blocks.0.first_attention.query" in silent
    assert all(group_of(name) == "temporal" for name in silent)


def test_an_optimizer_would_wear_away_what_no_image_can_teach(make_unet: MakeUNet) -> None:
    """The reason for all this: AdamW's weight decay shrinks what has a gradient of zero."""
    unet = make_unet()
    query = unet.get_parameter("first_temporal_attention.blocks.0.first_attention.query.weight")
    before = query.detach().clone()
    tune(unet, trainable_names(unet, "temporal"), steps=1)
    torch.testing.assert_close(query.detach(), before * (1 - 0.01 * 0.1))


@NETWORKS
def test_tuning_temporal_on_images_changes_only_what_acts_on_them(make_unet: MakeUNet, options: dict) -> None:
    """No spatial bit, no query or key bit, no outer tap bit; and all that is left changes, middle taps too."""
    unet = make_unet(**options)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    split_taps(unet)
    names = trainable_names(unet, "temporal", stills=True)
    optimizer = tune(unet, names)
    assert len(optimizer.state) == len(names)  # what is frozen has no moments
    assert not {name.rpartition(".")[2] for name in names} & {"outer", "table"}
    convs = {name: conv for name, conv in frame_convs(unet)}
    after = unet.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        layer, _, part = name.rpartition(".")
        if layer in convs and part == "weight":
            same = (tensor == before[name])[:, :, :, 0, 0]
            assert same[:, :, [0, 2]].all() and not same[:, :, 1].all()
        else:
            assert torch.equal(tensor, before[name]) == (name not in names), name


def test_tuning_spatial_changes_no_temporal_bit_and_the_reverse(make_unet: MakeUNet) -> None:
    cases: list[tuple[Trainable, int]] = [("spatial", 1), ("temporal", 3)]
    for trainable, frames in cases:
        unet = make_unet()
        before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
        names = trainable_names(unet, trainable, stills=frames == 1)
        tune(unet, names, frames=frames)
        changed = {name for name, parameter in unet.named_parameters() if not torch.equal(parameter, before[name])}
        assert changed == set(names) and {group_of(name) for name in changed} == {trainable}


@pytest.mark.parametrize("frames", [1, 3])
def test_taking_taps_apart_changes_no_bit_of_network_or_file(make_unet: MakeUNet, frames: int) -> None:
    unet, inputs = make_unet(), given(frames)
    plain, answer = dict(unet.state_dict()), unet(*inputs, fps=8)
    count = sum(parameter.numel() for parameter in unet.parameters())
    split_taps(unet)
    split_taps(unet)  # once is enough
    assert torch.equal(unet(*inputs, fps=8), answer)
    assert sum(parameter.numel() for parameter in unet.parameters()) == count
    for state in (unet.state_dict(), merged_state_dict(unet)):
        assert state.keys() == plain.keys() and all(torch.equal(state[name], plain[name]) for name in plain)
    other = make_unet()
    split_taps(other)
    other.load_state_dict(plain)
    assert torch.equal(other(*inputs, fps=8), answer)


def test_low_rank_updates_go_where_images_act(make_unet: MakeUNet) -> None:
    """No query, no key, no convolution over frames; every update that is left learns, and on clips too."""
    unet = make_unet()
    everywhere = set(lora_targets(unet, EVERYTHING, "all"))
    acting = set(lora_targets(unet, EVERYTHING, "all", stills=True))
    assert everywhere - acting == {
        name for name in everywhere if name in silent_on_stills(unet) or name in dict(frame_convs(unet))
    }
    assert lora_targets(unet, EVERYTHING, "spatial", stills=True) == lora_targets(unet, EVERYTHING, "spatial")
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    names = add_lora(unet, EVERYTHING, "temporal", stills=True)
    for name in names:
        nn.init.normal_(unet.get_parameter(name), std=0.1)
    found = gradients(unet, 1)
    assert all(found[name].any() for name in names)
    tune(unet, names)
    changed = {name for name, tensor in merged_state_dict(unet).items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in lora_targets(make_unet(), EVERYTHING, "temporal", stills=True)}


def test_an_update_that_no_image_could_teach_is_refused(make_unet: MakeUNet) -> None:
    unet = make_unet()
    with pytest.raises(ConfigError, match="no such layers that images could teach"):
        add_lora(unet, LoraConfig(targets=("convolution",)), "temporal", stills=True)
