from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vc2.errors import WeightsError
from vc2.eval.networks.musiq import Musiq, StandardisedConv
from vc2.eval.vbench import imaging_quality

CPU = torch.device("cpu")
WIDTH, MLP, DEPTH, CHANNELS = 64, 96, 2, 32


def published_state() -> dict[str, Tensor]:
    """Random weights under the names and shapes of pyiqa's files, but small."""
    generator = torch.Generator().manual_seed(0)
    out: dict[str, tuple[int, ...]] = {
        "conv_root.weight": (CHANNELS, 3, 7, 7),
        "gn_root.weight": (CHANNELS,),
        "gn_root.bias": (CHANNELS,),
        "embedding.weight": (WIDTH, 4 * CHANNELS * 8 * 8),
        "embedding.bias": (WIDTH,),
        "transformer_encoder.posembed_input.position_emb": (1, 100, WIDTH),
        "transformer_encoder.scaleembed_input.scale_emb": (3, WIDTH),
        "transformer_encoder.cls": (1, 1, WIDTH),
        "transformer_encoder.encoder_norm.weight": (WIDTH,),
        "transformer_encoder.encoder_norm.bias": (WIDTH,),
        "head.weight": (1, WIDTH),
        "head.bias": (1,),
    }
    convs = {
        "1": (CHANNELS, CHANNELS, 1, 1),
        "2": (CHANNELS, CHANNELS, 3, 3),
        "3": (4 * CHANNELS, CHANNELS, 1, 1),
        "_proj": (4 * CHANNELS, CHANNELS, 1, 1),
    }
    for number, shape in convs.items():
        out[f"block1.conv{number}.weight"] = shape
        out[f"block1.gn{number}.weight"] = out[f"block1.gn{number}.bias"] = shape[:1]
    for i in range(DEPTH):
        block = f"transformer_encoder.transformer.encoderblock_{i}"
        for name, shape in {
            **{f"attention.{part}": (WIDTH, WIDTH) for part in ("query", "key", "value", "out")},
            "mlp.fc1": (MLP, WIDTH),
            "mlp.fc2": (WIDTH, MLP),
        }.items():
            out[f"{block}.{name}.weight"], out[f"{block}.{name}.bias"] = shape, shape[:1]
        for norm in ("norm1", "norm2"):
            out[f"{block}.{norm}.weight"] = out[f"{block}.{norm}.bias"] = (WIDTH,)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in out.items()}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("musiq") / "musiq_spaq_ckpt.pth"
    torch.save(published_state(), path)
    return path


@pytest.fixture(scope="module")
def musiq(path: Path) -> Musiq:
    return Musiq.load(path, CPU)


def frames(num_frames: int = 2, height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def test_default_sizes_are_those_of_the_paper() -> None:
    """The network has 27 million weights: 14 blocks of width 384 on a small ResNet."""
    with torch.device("meta"):
        assert round(sum(p.numel() for p in Musiq().parameters()) / 1e6) == 27


@pytest.mark.parametrize(("height", "width"), [(60, 90), (33, 7), (1, 1), (130, 700)])
def test_pictures_of_any_shape_have_a_score(musiq: Musiq, height: int, width: int) -> None:
    """Every frame has one finite score, equal frames equal ones."""
    scores = musiq.scores(np.repeat(frames(1, height, width), 3, axis=0), batch=2)
    assert scores.shape == (3,)
    assert np.isfinite(scores).all()
    assert imaging_quality(scores) == pytest.approx(scores[0] / 100, rel=1e-4)


def test_a_frame_does_not_depend_on_those_beside_it(musiq: Musiq) -> None:
    """Scores are the same however many frames are looked at together, and differ between frames."""
    video = frames(4)
    together = musiq.scores(video, batch=4)
    np.testing.assert_allclose(musiq.scores(video, batch=1), together, atol=1e-4)
    assert len(set(together.round(3))) == 4


def test_blank_frames_have_a_score(musiq: Musiq) -> None:
    """Black frames are measured as any others."""
    assert np.isfinite(musiq.scores(np.zeros((1, 40, 40, 3), np.uint8))).all()


@pytest.mark.parametrize(
    ("size", "expected"), [((320, 512), (320, 512)), ((576, 1024), (288, 512)), ((1000, 700), (512, 358))]
)
def test_large_frames_are_scaled_to_512(musiq: Musiq, size: tuple[int, int], expected: tuple[int, int]) -> None:
    """The long side is 512 at most, sizes cut to whole pixels; smaller frames stay as they are."""
    pixels = musiq.pixels(torch.full((1, 3, *size), 255.0))
    assert tuple(pixels.shape[-2:]) == expected
    torch.testing.assert_close(pixels, torch.ones_like(pixels))


@pytest.mark.parametrize(("size", "num_tokens"), [((64, 96), 6), ((65, 96), 9), ((1, 1), 1)])
def test_edges_are_filled_up_to_whole_patches(musiq: Musiq, size: tuple[int, int], num_tokens: int) -> None:
    """A picture has a token per begun patch of 32 x 32."""
    assert musiq.tokens(torch.zeros(1, 3, *size), 2).shape == (1, num_tokens, WIDTH)


def test_places_are_hashed_to_a_grid_of_ten(path: Path) -> None:
    """On ten times twenty patches every row has its own place and every two columns share one."""
    musiq = Musiq.load(path, CPU)
    musiq.places[:] = torch.arange(100.0)[None, :, None]
    musiq.scales[:] = 0
    with_places = musiq.tokens(torch.zeros(1, 3, 320, 640), 0)
    musiq.places[:] = 0
    places = (with_places - musiq.tokens(torch.zeros(1, 3, 320, 640), 0))[0, :, 0].view(10, 20)
    expected = 10 * torch.arange(10.0)[:, None] + torch.arange(10.0).repeat_interleave(2)
    torch.testing.assert_close(places, expected, atol=1e-3, rtol=0)


def test_kernels_are_standardised() -> None:
    """Neither the scale nor the mean of a kernel changes what a convolution gives."""
    torch.manual_seed(0)
    conv, x = StandardisedConv(3, 4, 3), torch.randn(1, 3, 9, 9)
    before = conv(x)
    conv.weight.data = 5 * conv.weight.data + 0.7
    torch.testing.assert_close(conv(x), before, atol=1e-3, rtol=1e-3)


def test_odd_padding_comes_after(path: Path) -> None:
    """A kernel of 3 with stride 2 on 4 pixels begins at the first pixel: the one zero is after the last."""
    conv = StandardisedConv(1, 1, 3, stride=2)
    x = torch.zeros(1, 1, 4, 4)
    x[..., 0, 0] = 1
    kernel = (conv.weight - conv.weight.mean()) / (conv.weight.std() + 1e-5)
    torch.testing.assert_close(conv(x)[0, 0, 0, 0], kernel[0, 0, 0, 0])


def test_module_prefix_is_taken_off(path: Path, musiq: Musiq, tmp_path: Path) -> None:
    """A file saved from a network on several devices is read as well."""
    torch.save({f"module.{name}": value for name, value in published_state().items()}, tmp_path / "m.pth")
    np.testing.assert_array_equal(Musiq.load(tmp_path / "m.pth", CPU).scores(frames()), musiq.scores(frames()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("block1.gn_proj.bias"), r"1 missing: block1\.gn_proj\.bias"),
        (lambda state: state.update({"extra": torch.zeros(1)}), "1 unexpected: extra"),
        (
            lambda state: state.update({"head.weight": torch.zeros(10, 64)}),
            r"head\.weight is \(10, 64\), not \(1, 64\)",
        ),
        (lambda state: state.pop("conv_root.weight"), "expected MUSIQ as pyiqa stores it"),
    ],
)
def test_misfits_are_told_in_public_names(tmp_path: Path, change, message: str) -> None:
    """What a file lacks, has too much or in another shape (ten outputs, as AVA's) is named as in the file."""
    state = published_state()
    change(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=message):
        Musiq.load(tmp_path / "other.pth", CPU)
