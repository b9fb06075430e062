import pytest
import torch

from vc2.model.attention import Attention
from vc2.model.partition import is_temporal, trainable_names
from vc2.model.unet import UNet3D
from vc2.model.weights import load_released_unet


def tiny_inputs(clips: int = 2, frames: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(clips, 4, frames, 4, 6), torch.arange(clips) * 400 + 3, torch.randn(clips, 5, 12)


@pytest.mark.parametrize("run", ["t2v_plain", "t2v_fps", "image_t1", "t2v_relative_position"])
@torch.no_grad()
def test_the_network_equals_the_recorded_one(golden, run):
    recorded = golden(f"unet/{run}.npz")
    unet = load_released_unet(recorded.meta["config"], recorded.state)
    predicted = unet(
        recorded["in.x"], recorded["in.timesteps"], recorded["in.context"], fps=recorded.arrays.get("in.fps")
    )
    torch.testing.assert_close(predicted, recorded["out.y"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("frames", [1, 2, 5])
@torch.no_grad()
def test_a_prediction_has_the_shape_of_the_latents(make_unet, frames):
    """An image is a clip of one frame; the number of frames is free."""
    latents, timesteps, text = tiny_inputs(frames=frames)
    assert make_unet()(latents, timesteps, text).shape == latents.shape


@torch.no_grad()
def test_a_new_network_sees_every_frame_alone(make_unet):
    """All that is temporal adds zero at first, the frame rate too."""
    trained, unet = make_unet(), UNet3D(make_unet().config).eval()
    unet.load_state_dict(
        {name: tensor for name, tensor in trained.state_dict().items() if not is_temporal(name)}, strict=False
    )
    latents, timesteps, text = tiny_inputs(frames=3)
    together = unet(latents, timesteps, text, fps=8)
    alone = torch.cat([unet(latents[:, :, t : t + 1], timesteps, text, fps=30) for t in range(3)], dim=2)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert together.std() > 0.01


@torch.no_grad()
def test_only_the_convolution_knows_the_order_of_frames(make_unet):
    """Without it, shuffled frames give shuffled predictions."""
    latents, timesteps, text = tiny_inputs(frames=4)
    shuffle = torch.tensor([2, 0, 3, 1])
    for temporal_conv in (False, True):
        unet = make_unet(temporal_conv=temporal_conv)
        plain, shuffled = unet(latents, timesteps, text), unet(latents[:, :, shuffle], timesteps, text)
        assert torch.allclose(plain[:, :, shuffle], shuffled, atol=1e-5) != temporal_conv


@torch.no_grad()
def test_one_text_for_a_clip_is_that_text_for_each_frame(make_unet):
    unet, (latents, timesteps, text) = make_unet(), tiny_inputs(frames=3)
    per_frame = text.repeat_interleave(3, dim=0)
    torch.testing.assert_close(unet(latents, timesteps, per_frame), unet(latents, timesteps, text), rtol=0, atol=1e-5)
    per_frame[1] += 1
    assert not torch.allclose(unet(latents, timesteps, per_frame), unet(latents, timesteps, text), atol=1e-3)


@torch.no_grad()
def test_the_frame_rate_is_a_number_or_one_per_clip_and_16_if_unsaid(make_unet):
    unet, given = make_unet(), tiny_inputs()
    assert torch.equal(unet(*given), unet(*given, fps=16))
    assert torch.equal(unet(*given, fps=8), unet(*given, fps=torch.tensor([8, 8])))
    rates = [unet(*given, fps=fps) for fps in (0, 8, 16)]
    assert not torch.allclose(rates[0], rates[1], atol=1e-3) and not torch.allclose(rates[1], rates[2], atol=1e-3)
    mixed = unet(*given, fps=torch.tensor([0, 8]))
    torch.testing.assert_close(mixed, torch.stack([rates[0][0], rates[1][1]]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_image_tokens_join_the_text_without_sharing_its_softmax(make_unet):
    unet, (latents, timesteps, text) = make_unet(use_image_attention=True), tiny_inputs()
    image = torch.randn(2, 3, 12)
    without, with_image = unet(latents, timesteps, text), unet(latents, timesteps, text, image=image)
    assert not torch.allclose(without, with_image, atol=1e-3)
    repeated = unet(latents, timesteps, text, image=image.repeat(1, 2, 1))  # twice the tokens: the same softmax average
    torch.testing.assert_close(with_image, repeated, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trainable", ["all", "temporal", "spatial"])
@pytest.mark.parametrize("level", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(make_unet, level, trainable):
    """Also with frozen parts, where the re-entrant form loses gradients in silence, and with the same dropout masks."""
    plain = make_unet(dropout=0.2, use_image_attention=True).train()
    recomputing = UNet3D(plain.config.evolve(gradient_checkpointing=level)).train()
    recomputing.load_state_dict(plain.state_dict())
    given, gradients = tiny_inputs(), []
    for unet in (plain, recomputing):
        torch.manual_seed(1)
        wanted = set(trainable_names(unet, trainable))
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(name in wanted)
        unet(*given, fps=8, image=given[2]).square().mean().backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters() if p.grad is not None})
        assert set(gradients[-1]) == wanted
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)


def test_every_parameter_learns_from_a_clip_and_from_an_image(make_unet):
    """No parameter is out of the path, so that no rank waits for a gradient that never comes."""
    for frames in (3, 1):
        unet = make_unet()
        unet(*tiny_inputs(frames=frames), fps=8).square().mean().backward()
        assert all(parameter.grad is not None for parameter in unet.parameters())


@pytest.mark.parametrize("relative", [True, False])
def test_what_is_skipped_for_one_frame_changes_neither_result_nor_gradients(make_unet, monkeypatch, relative):
    """A frame that attends to itself alone needs no query and no key: their gradients are zero, not missing."""
    options = {"use_relative_position": relative, "temporal_conv_dropout": 0.0}
    unet, given, runs = make_unet(**options), tiny_inputs(frames=1), []
    for whole in (False, True):
        if whole:  # attention over one token, computed all the same
            monkeypatch.setattr(Attention, "_value_alone", Attention._attention)
        unet.zero_grad()
        predicted = unet(*given, fps=8)
        predicted.square().mean().backward()
        runs.append((predicted.detach(), {name: p.grad.clone() for name, p in unet.named_parameters()}))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=0, atol=1e-6)
    for name, gradient in runs[0][1].items():
        torch.testing.assert_close(gradient, runs[1][1][name], rtol=1e-4, atol=1e-7, msg=name)
        if ".temporal_attention." in name and ("query" in name or "key" in name):
            assert not gradient.any(), name


def test_training_is_random_only_through_dropout(make_unet):
    given = tiny_inputs()
    with torch.no_grad():
        for dropout, same in ((0.1, False), (0.0, True)):
            unet = make_unet(temporal_conv_dropout=dropout).train()
            assert torch.equal(unet(*given), unet(*given)) == same


@torch.no_grad()
def test_it_computes_in_the_type_of_its_parameters_and_answers_in_that_of_the_latents(make_unet):
    unet, (latents, timesteps, text) = make_unet(), tiny_inputs()
    exact = unet(latents, timesteps, text)
    halved = unet.to(torch.bfloat16)(latents, timesteps, text)
    assert halved.dtype == torch.float32
    assert (halved - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 4, 3, 5, 6)}, "multiples of 2"),
        ({"latents": torch.zeros(2, 4, 4, 6)}, r"expected \(B, 4, T, H, W\)"),
        ({"timesteps": torch.tensor(3)}, "one per clip"),
        ({"text": torch.zeros(2, 5, 11)}, r"\(2 or 6, tokens, 12\)"),
        ({"text": torch.zeros(3, 5, 12)}, r"\(2 or 6, tokens, 12\)"),
        ({"fps": torch.tensor([1, 2, 3])}, "fps is"),
        ({"image": torch.zeros(2, 5, 12)}, "use_image_attention"),
    ],
)
def test_a_wrong_shape_is_named(make_unet, change, message):
    given = dict(zip(("latents", "timesteps", "text"), tiny_inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        make_unet()(**given)
