import pytest
import torch
from torch import nn

from vc2.model import attention
from vc2.model.attention import Attention, FeedForward
from vc2.model.blocks import Conditions, Layer
from vc2.model.config import UNetConfig
from vc2.model.files import fill
from vc2.model.spatial import ResidualBlock, SpatialTransformer
from vc2.model.temporal import FrameConv, TemporalConv, TemporalTransformer
from vc2.model.weights import leaf_names


def recorded_block(golden, name: str, block: nn.Module):
    """The block filled with the recorded weights, and the recorded run."""
    run = golden("blocks/blocks.npz", inside=f"{name}/")
    ours = {leaf_names(own)[0]: own for own in block.state_dict()}
    fill(block, {ours[theirs]: tensor for theirs, tensor in run.state.items()}, what=name)
    return block.eval(), run


# Inputs of very small amplitude: the epsilon of a norm decides the result.
def test_a_faint_residual_block_equals_the_recorded(golden):
    block, run = recorded_block(golden, "res_block_faint", ResidualBlock(64, 96, 32))
    torch.testing.assert_close(block(run["in.x"], run["in.emb"]), run["out.y"], rtol=0, atol=2e-5)


def test_a_faint_spatial_transformer_equals_the_recorded(golden):
    block, run = recorded_block(golden, "spatial_transformer_faint", SpatialTransformer(64, 4, 16, 12))
    torch.testing.assert_close(block(run["in.x"], run["in.context"]), run["out.y"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["temporal_transformer_faint", "temporal_conv_faint"])
def test_faint_temporal_modules_equal_the_recorded(golden, name):
    made = TemporalConv(64) if name == "temporal_conv_faint" else TemporalTransformer(64, 4, 16)
    block, run = recorded_block(golden, name, made)
    clips, _, frames, _, _ = run["in.x"].shape
    out = block(run["in.x"].transpose(1, 2).flatten(0, 1), frames).unflatten(0, (clips, frames)).transpose(1, 2)
    torch.testing.assert_close(out, run["out.y"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_convolution_over_frames_is_the_plain_3d_one(frames):
    conv, clip = FrameConv(4, 4, (3, 1, 1), padding=(1, 0, 0)), torch.randn(2, 4, frames, 3, 2)
    plain = nn.functional.conv3d(clip, conv.weight, conv.bias, padding=(1, 0, 0))
    torch.testing.assert_close(conv(clip), plain)


def test_the_gate_is_the_exact_gelu_of_the_second_half():
    feed_forward, x = FeedForward(6), torch.randn(2, 3, 6)
    value, gate = feed_forward.value_and_gate(x).chunk(2, dim=-1)
    exact = value * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    torch.testing.assert_close(feed_forward(x), feed_forward.out(exact))


def test_more_sequences_than_a_kernel_takes_are_cut_in_parts(monkeypatch):
    attend, x = Attention(8, 2, 4), torch.randn(7, 5, 8)
    whole = attend(x)
    monkeypatch.setattr(attention, "_MOST", 3)
    torch.testing.assert_close(attend(x), whole)
    assert attend(x[None].transpose(1, 2)).shape == (1, 5, 7, 8)


@pytest.mark.parametrize("reach", [None, 2])
def test_places_do_not_see_each_other(reach):
    """Attention along the second axis at many places is attention over many sequences."""
    attend, x = Attention(8, 2, 4, relative_reach=reach), torch.randn(2, 5, 3, 8)
    apart = torch.stack([attend(x[:, :, place]) for place in range(3)], dim=2)
    torch.testing.assert_close(attend(x), apart)


@pytest.mark.parametrize("reach", [None, 2])
def test_causal_attention_never_looks_ahead(reach):
    attend, x = Attention(8, 2, 4, causal=True, relative_reach=reach), torch.randn(2, 5, 8)
    changed = x.clone()
    changed[:, 3:] += 1
    before, after = attend(x), attend(changed)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3:], before[:, 3:])


def test_relative_positions_at_zero_are_no_positions():
    positioned, plain, x = Attention(8, 2, 4, relative_reach=2), Attention(8, 2, 4), torch.randn(2, 6, 8)
    plain.load_state_dict({name: t for name, t in positioned.state_dict().items() if "positions" not in name})
    assert not torch.allclose(positioned(x), plain(x), atol=1e-4)
    for table in (positioned.key_positions.table, positioned.value_positions.table):
        nn.init.zeros_(table)
    torch.testing.assert_close(positioned(x), plain(x))


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_projections_as_convolutions_are_the_same_map_as_linear_ones(kind):
    """use_linear changes the shape of weights, nothing else."""

    def build(use_linear: bool) -> nn.Module:
        if kind == "spatial":
            return SpatialTransformer(8, 2, 4, 6, groups=4, use_linear=use_linear)
        return TemporalTransformer(8, 2, 4, groups=4, use_linear=use_linear)

    linear, convolution = build(True), build(False)
    nn.init.normal_(linear.proj_out.weight)
    convolution.load_state_dict(
        {name: t.view_as(convolution.state_dict()[name]) for name, t in linear.state_dict().items()}
    )
    x, extra = torch.randn(4, 8, 2, 3), torch.randn(2, 5, 6) if kind == "spatial" else 2
    assert torch.equal(linear(x, extra), convolution(x, extra))
    assert convolution.proj_in.weight.dim() == (4 if kind == "spatial" else 3)


def test_feature_maps_stay_channels_last_through_a_layer():
    """So that pixels and frames become tokens without copying."""
    config = UNetConfig(model_channels=16, num_head_channels=8, context_dim=12, norm_groups=4)
    layer = Layer(config, 16, 32, attends=True).eval()
    x = torch.randn(6, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    out = layer(x, Conditions(emb=torch.randn(2, 64), text=torch.randn(2, 5, 12), image=None, num_frames=3))
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("level", "frames"), [("none", 3), ("selective", 3), ("full", 1)])
def test_a_layer_is_one_graph_for_a_compiler(level, frames):
    """No break, whatever is kept for the backward pass; and the same numbers."""
    config = UNetConfig(
        model_channels=16, num_head_channels=8, context_dim=12, norm_groups=4, gradient_checkpointing=level,
        use_image_attention=True, use_relative_position=True, temporal_conv_dropout=0.0,
    )  # fmt: skip
    layer = Layer(config, 16, 32, attends=True)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    given = Conditions(torch.randn(2, 64), torch.randn(2, 5, 12), torch.randn(2, 3, 12), frames)
    x, runs = torch.randn(2 * frames, 16, 4, 4), []
    torch._dynamo.reset()
    for network in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        out = network(x, given)
        out.square().mean().backward()
        runs.append([out.detach(), *(parameter.grad.clone() for parameter in layer.parameters())])
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-6)
