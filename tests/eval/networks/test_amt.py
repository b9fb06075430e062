from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vc2.errors import WeightsError
from vc2.eval.networks.amt import Amt, Correlation, pairs_at_once
from vc2.eval.vbench import motion_smoothness

CPU = torch.device("cpu")


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of `amt-s.pth`."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, channels: int, out_channels: int, kernel: int = 3) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out_channels, channels, kernel, kernel), (out_channels,)

    def conv_prelu(name: str, channels: int, out_channels: int) -> None:
        conv(f"{name}.0", channels, out_channels)
        shapes[f"{name}.1.weight"] = (out_channels,)

    conv("feat_encoder.conv1", 3, 32, 7)
    conv("feat_encoder.conv2", 96, 84, 1)
    for layer, (channels, out_channels) in enumerate([(32, 32), (32, 64), (64, 96)], start=1):
        for block, entering in ((0, channels), (1, out_channels)):
            name, inner = f"feat_encoder.layer{layer}.{block}", out_channels // 4
            conv(f"{name}.conv1", entering, inner, 1)
            conv(f"{name}.conv2", inner, inner)
            conv(f"{name}.conv3", inner, out_channels, 1)
            if entering != out_channels:
                conv(f"{name}.downsample.0", entering, out_channels, 1)
    for level, (channels, out_channels) in enumerate([(3, 20), (20, 32), (32, 44), (44, 56)], start=1):
        conv_prelu(f"encoder.pyramid{level}.0", channels, out_channels)
        conv_prelu(f"encoder.pyramid{level}.1", out_channels, out_channels)
    for number, entering, inner, out_channels in [
        (4, 113, 112, 48),
        (3, 136, 132, 36),
        (2, 100, 96, 24),
        (1, 64, 60, 24),
    ]:
        name = f"decoder{number}.convblock"
        conv_prelu(f"{name}.0", entering, inner)
        for convolution, channels in ((1, inner), (2, 20), (3, inner), (4, 20)):
            conv_prelu(f"{name}.1.conv{convolution}", channels, channels)
        conv(f"{name}.1.conv5", inner, inner)
        shapes[f"{name}.1.prelu.weight"] = (inner,)
        shapes[f"{name}.2.weight"], shapes[f"{name}.2.bias"] = (inner, out_channels, 4, 4), (out_channels,)
    for number, channels in ((4, 44), (3, 32), (2, 20)):
        name = f"update{number}"
        conv(f"{name}.convc1", 392, 64, 1)
        conv(f"{name}.convf1", 4, 40, 7)
        conv(f"{name}.convf2", 40, 20)
        conv(f"{name}.conv", 84, 68)
        for part, entering, out_channels in (
            ("gru", 72 + channels, 76),
            ("feat_head", 76, channels),
            ("flow_head", 76, 4),
        ):
            conv(f"{name}.{part}.0", entering, 76)
            conv(f"{name}.{part}.2", 76, out_channels)
    conv("comb_block.0", 9, 18)
    shapes["comb_block.1.weight"] = (18,)
    conv("comb_block.2", 18, 3)
    return shapes


def load(tmp_path: Path, state: dict[str, Tensor]) -> Amt:
    path = tmp_path / "amt-s.pth"
    torch.save({"state_dict": state, "epoch": 300}, path)
    return Amt.load(path, CPU)


def nothing() -> dict[str, Tensor]:
    """Weights of zeros: no motion, equal masks, no residual."""
    return {name: torch.zeros(shape) for name, shape in published_shapes().items()}


def anything() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in published_shapes().items()}


def frames(num_frames: int = 3, height: int = 64, width: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def test_default_size_is_that_of_the_paper() -> None:
    """AMT-S has 3.0 million weights."""
    assert round(sum(parameter.numel() for parameter in Amt().parameters()) / 1e6, 1) == 3.0


def test_without_motion_the_middle_is_the_mean(tmp_path: Path) -> None:
    """Weights of zeros see no motion and no difference between images: the middle is the mean of both."""
    before, after = frames(2), frames(4)[2:]
    middle = load(tmp_path, nothing()).interpolate(before, after)
    np.testing.assert_allclose(middle, (before / 255 + after / 255) / 2, atol=1e-5)


@pytest.mark.parametrize(("first", "image"), [(0, "before"), (6, "after")])
def test_images_are_fetched_along_their_flows(tmp_path: Path, first: int, image: str) -> None:
    """A flow of two to the right and one down, to the image that the masks choose, moves that image so."""
    state = nothing()
    bias = state["decoder1.convblock.2.bias"]  # flows to the image before, to the one after, masks, residuals
    bias[first : first + 6 : 2], bias[first + 1 : first + 6 : 2] = 2, 1
    bias[12:15] = 40 if image == "before" else -40
    pair = {"before": frames(1), "after": frames(2)[1:]}
    middle = load(tmp_path, state).interpolate(**pair)
    np.testing.assert_allclose(middle[:, :-1, :-2], pair[image][:, 1:, 2:] / 255, atol=1e-4)


def test_residuals_are_added(tmp_path: Path) -> None:
    """Residuals of a tenth brighten the middle by a tenth, up to white."""
    state = nothing()
    state["decoder1.convblock.2.bias"][15:] = 0.1
    still = frames(1)
    middle = load(tmp_path, state).interpolate(still, still)
    np.testing.assert_allclose(middle, np.minimum(still / 255 + 0.1, 1), atol=1e-5)


def test_correlation_at_no_motion_is_the_product_of_both_places() -> None:
    """Without flow the centre of the window holds, of each way, how alike the two images are at that very place."""
    torch.manual_seed(0)
    before, after = torch.randn(2, 84, 16, 24), torch.randn(2, 84, 16, 24)
    found = Correlation(before, after).along(torch.zeros(2, 4, 16, 24))
    there, back = found.chunk(2, dim=1)
    expected = (before * after).sum(1) / 84**0.5
    torch.testing.assert_close(there[:, 24], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(back[:, 24], expected, atol=1e-4, rtol=1e-4)


def test_correlation_is_found_where_the_flow_leads() -> None:
    """If the image after is the one before, moved by four places, the flow from the middle by two finds each place."""
    torch.manual_seed(0)
    before = torch.randn(1, 84, 16, 24)
    after = torch.roll(before, 4, dims=3)  # to the right
    flows = torch.zeros(1, 4, 16, 24)
    flows[:, 0], flows[:, 2] = -2, 2  # to the image before, to the one after
    there, back = Correlation(before, after).along(flows).chunk(2, dim=1)
    torch.testing.assert_close(there[0, 24, :, :20], before.square().sum(1)[0, :, :20] / 84**0.5, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(back[0, 24, :, 4:], after.square().sum(1)[0, :, 4:] / 84**0.5, atol=1e-4, rtol=1e-4)


def test_window_runs_down_the_columns() -> None:
    """The first of the looked-up channels are three to the left, from three above to three below: x changes last."""
    before, after = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    before[0, 0, 8, 8] = 1
    after[0, 0, 8 + 2, 8 - 3] = 1
    there = Correlation(before, after).along(torch.zeros(1, 4, 16, 16))[0, :49, 8, 8]
    assert there.argmax() == 0 * 7 + 5


@pytest.mark.parametrize(("height", "width"), [(64, 90), (33, 7), (1, 1), (130, 161)])
def test_videos_of_any_size_are_measured(tmp_path: Path, height: int, width: int) -> None:
    """Seven frames of any size, with weights of any kind, have a smoothness between 0 and 1."""
    amt = load(tmp_path, anything())
    assert 0 <= motion_smoothness(frames(7, height, width), amt.interpolate) <= 1


def test_still_video_is_smooth(tmp_path: Path) -> None:
    """Without motion a still video is its own middle: it has 1 if colours are rounded, a level less at most if cut."""
    amt, still = load(tmp_path, nothing()), np.repeat(frames(1, 20, 30), 5, axis=0)
    assert motion_smoothness(still, amt.interpolate, mode="fixed") == 1
    assert motion_smoothness(still, amt.interpolate) >= 1 - 1 / 255


def test_a_pair_does_not_depend_on_those_beside_it(tmp_path: Path) -> None:
    """Middles are the same however many pairs are looked at together."""
    amt, video = load(tmp_path, anything()), frames(4)
    together = amt.interpolate(video[:-1], video[1:], batch=3)
    np.testing.assert_allclose(amt.interpolate(video[:-1], video[1:], batch=1), together, atol=1e-5)


def test_large_frames_come_a_few_at_a_time() -> None:
    """Correlations grow with the square of the area: of frames twice as large a quarter of the pairs is taken."""
    assert [pairs_at_once(4, *size) for size in [(64, 64), (320, 512), (320, 1024), (1080, 1920)]] == [4, 4, 1, 1]


def test_pairs_must_fit(tmp_path: Path) -> None:
    """Frames of two sizes have no middle."""
    with pytest.raises(ValueError, match="shapes must match"):
        load(tmp_path, nothing()).interpolate(frames(2), frames(2, 64, 91))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("update3.gru.2.bias"), r"1 missing: update3\.gru\.2\.bias"),
        (lambda state: state.update({"decoder5.x": torch.zeros(1)}), r"1 unexpected: decoder5\.x"),
        (
            lambda state: state.update({"comb_block.2.bias": torch.zeros(4)}),
            r"comb_block\.2\.bias is \(4,\), not \(3,\)",
        ),
    ],
)
def test_misfits_are_told_in_public_names(tmp_path: Path, change, message: str) -> None:
    """What a file lacks, has too much or in another shape is named as in the file."""
    state = nothing()
    change(state)
    with pytest.raises(WeightsError, match=message):
        load(tmp_path, state)
