"""DOVER's two branches, on small random weights in the public format."""

import itertools
import re
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.video.swin_transformer import SwinTransformer3d

from vc2.errors import WeightsError
from vc2.eval.dover_scores import Branch
from vc2.eval.formulas import Mode, NoValue
from vc2.eval.networks.convnext3d import ConvNeXt3D
from vc2.eval.networks.dover import Dover, DoverSizes, clips, public_name
from vc2.eval.networks.swin3d import WINDOW, Block, Swin3D, WindowAttention, offset_index

CPU = torch.device("cpu")
SMALL = DoverSizes(
    aesthetic_widths=(4, 4, 8, 8),
    aesthetic_depths=(1, 2, 1, 1),
    technical_width=4,
    technical_depths=(1, 1, 2, 1),
    technical_heads=(1, 1, 2, 2),
    hidden=4,
)
BRANCHES: list[Branch] = ["aesthetic", "technical"]
MODES: list[Mode] = ["compat", "fixed"]
N = TypeVar("N", bound=nn.Module)


def randomised(network: N, seed: int = 0) -> N:
    """Random weights that matter everywhere: as made, biases by offset and layer scales are next to nothing."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "cell" in name or parameter.dim() == 1:
                parameter.normal_(0.5, 0.5)
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return network.eval().requires_grad_(False)


def public_state(network: Dover) -> dict[str, Tensor]:
    """The state dict as the DOVER release writes it, with the indices of offsets."""
    state = {public_name(name): tensor for name, tensor in network.state_dict().items()}
    tables = [name for name in state if name.endswith("relative_position_bias_table")]
    index = offset_index(WINDOW, WINDOW)
    return state | {name.replace("bias_table", "index"): index for name in tables}


def noise(num_frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def pixels(branch: Branch, frames: np.ndarray, mode: Mode = "compat", seed: int = 0) -> np.ndarray:
    """What a branch is shown, as values 0..255, (clips, 32, 224, 224, 3)."""
    shown = torch.cat(list(clips(branch, frames, seed, mode))).permute(0, 2, 3, 4, 1)
    return (shown * torch.tensor([58.395, 57.12, 57.375]) + torch.tensor([123.675, 116.28, 103.53])).numpy()


@pytest.fixture(scope="module")
def small() -> Dover:
    return randomised(Dover(SMALL))


# ---- the public file ----


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes in `DOVER.pth`, as its release defines them."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    widths = (96, 192, 384, 768)
    for branch in ("aesthetic", "technical"):
        add(f"{branch}_head.fc_hid", 64, 768, 1, 1, 1)
        add(f"{branch}_head.fc_last", 1, 64, 1, 1, 1)
        add(f"{branch}_backbone.norm", 768)
    for stage, (width, depth) in enumerate(zip(widths, (3, 3, 9, 3), strict=True)):
        if stage:
            add(f"aesthetic_backbone.downsample_layers.{stage}.0", width // 2)
            add(f"aesthetic_backbone.downsample_layers.{stage}.1", width, width // 2, 1, 2, 2)
        else:
            add("aesthetic_backbone.downsample_layers.0.0", width, 3, 2, 4, 4)
            add("aesthetic_backbone.downsample_layers.0.1", width)
        for block in range(depth):
            name = f"aesthetic_backbone.stages.{stage}.{block}"
            shapes[f"{name}.gamma"] = (width,)
            add(f"{name}.dwconv", width, 1, 3 if block % 3 == 1 else 1, 7, 7)
            add(f"{name}.norm", width)
            add(f"{name}.pwconv1", 4 * width, width)
            add(f"{name}.pwconv2", width, 4 * width)
    add("technical_backbone.patch_embed.proj", 96, 3, 2, 4, 4)
    add("technical_backbone.patch_embed.norm", 96)
    for stage, (width, depth, heads) in enumerate(zip(widths, (2, 2, 6, 2), (3, 6, 12, 24), strict=True)):
        for block in range(depth):
            name = f"technical_backbone.layers.{stage}.blocks.{block}"
            add(f"{name}.norm1", width)
            shapes[f"{name}.attn.relative_position_bias_table"] = (15 * 13 * 13, heads)
            if stage < 3:
                shapes[f"{name}.attn.fragment_position_bias_table"] = (15 * 13 * 13, heads)
            shapes[f"{name}.attn.relative_position_index"] = (8 * 7 * 7, 8 * 7 * 7)
            add(f"{name}.attn.qkv", 3 * width, width)
            add(f"{name}.attn.proj", width, width)
            add(f"{name}.norm2", width)
            add(f"{name}.mlp.fc1", 4 * width, width)
            add(f"{name}.mlp.fc2", width, 4 * width)
        if stage < 3:
            add(f"technical_backbone.layers.{stage}.downsample.norm", 4 * width)
            shapes[f"technical_backbone.layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
    return shapes


def test_the_full_network_has_the_published_tensors() -> None:
    """Under the names of the map the full network is `DOVER.pth`: same names, same shapes, 56.2 million parameters."""
    with torch.device("meta"):
        network = Dover()
    expected = published_shapes()
    indices = {name for name in expected if name.endswith("relative_position_index")}
    found = {public_name(name): tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert found == {name: shape for name, shape in expected.items() if name not in indices}
    assert (len(expected), len(indices)) == (381, 12)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    assert counts == {
        "aesthetic": 28_041_120,
        "technical": 28_078_620,
        "aesthetic_head": 49_281,
        "technical_head": 49_281,
    }


@pytest.mark.parametrize("wrap", [False, True])
def test_a_saved_network_is_loaded_again(small: Dover, tmp_path: Path, wrap: bool) -> None:
    """Written in the public format, flat or under `state_dict`, all tensors come back, of the sizes in the file."""
    path = tmp_path / "DOVER.pth"
    torch.save({"state_dict": public_state(small)} if wrap else public_state(small), path)
    loaded = Dover.load(path, CPU)
    assert loaded.sizes == SMALL and not loaded.training
    for name, tensor in small.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_indices_of_offsets_may_be_left_out(small: Dover, tmp_path: Path) -> None:
    """They are no weights: a file without them holds the same network."""
    torch.save({public_name(name): tensor for name, tensor in small.state_dict().items()}, tmp_path / "DOVER.pth")
    assert Dover.load(tmp_path / "DOVER.pth", CPU).sizes == SMALL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"technical_head.fc_last.bias": None}, r"missing: technical_head\.fc_last\.bias"),
        ({"technical_backbone.layers.1.blocks.0.norm2.bias": None}, r"missing: .*layers\.1\.blocks\.0\.norm2\.bias"),
        ({"aesthetic_backbone.stages.0.0.grn.gamma": torch.ones(4)}, r"unexpected: .*stages\.0\.0\.grn\.gamma"),
        ({"aesthetic_backbone.stages.1.7.norm.bias": torch.ones(4)}, r"unexpected: .*stages\.1\.7\.norm\.bias"),
        ({"aesthetic_head.fc_hid.weight": torch.ones(4, 9, 1, 1, 1)}, r"another shape: aesthetic_head\.fc_hid\.weight"),
        ({"technical_backbone.layers.0.blocks.0.attn.relative_position_index": torch.zeros(8, 8)}, "windows of"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    small: Dover, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    """What is missing, unknown, or of another shape is named, in the file's own words."""
    state = {name: tensor for name, tensor in (public_state(small) | change).items() if tensor is not None}
    torch.save(state, tmp_path / "DOVER.pth")
    with pytest.raises(WeightsError, match=message):
        Dover.load(tmp_path / "DOVER.pth", CPU)


def test_another_network_is_refused(tmp_path: Path) -> None:
    """A file with none of the names says so at once."""
    torch.save({"backbone.norm.weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"0 of 369 tensors fit.*\n(.*\n)*.*DOVER\.pth"):
        Dover.load(tmp_path / "other.pth", CPU)


# ---- the branches ----


def test_a_still_clip_is_a_picture_to_convnext() -> None:
    """Away from its ends, a still clip gives what 2D ConvNeXt with kernels summed over time gives for the picture."""
    widths, depths = (4, 6, 8, 8), (2, 2, 2, 2)
    ours = randomised(ConvNeXt3D(widths, depths))
    blocks = [CNBlockConfig(*block) for block in zip(widths, (*widths[1:], None), depths, strict=True)]
    theirs = ConvNeXt(blocks, num_classes=1).eval()
    with torch.no_grad():
        for their, our in zip(theirs.parameters(), ours.parameters(), strict=False):  # theirs ends with a classifier
            their.copy_((our.sum(2) if our.dim() == 5 else our).reshape(their.shape))
    picture = torch.randn(1, 3, 64, 64)
    features = ours(picture[:, :, None].expand(-1, -1, 20, -1, -1))
    expected = theirs.classifier[0](theirs.features(picture))
    assert features.shape == (1, 8, 10, 2, 2)
    middle = features[:, :, 4:6]  # four blocks look one token to each side
    torch.testing.assert_close(middle, expected[:, :, None].expand_as(middle), atol=1e-4, rtol=1e-4)
    assert (features[:, :, 0] - expected).abs().max() > 1e-2  # beyond the ends are zeros


def test_without_a_difference_between_biases_it_is_video_swin() -> None:
    """Where both tables of biases are the same the gate does nothing: features are those of torchvision's network."""
    depths, heads, window = (2, 2, 2, 2), (1, 2, 2, 2), (2, 4, 4)
    ours = randomised(Swin3D(8, depths, heads, window, cells=(2, 2)))
    theirs = SwinTransformer3d([2, 4, 4], 8, list(depths), list(heads), list(window), num_classes=1).eval()
    words = {
        "norm1": "attention_norm",
        "norm2": "mlp_norm",
        "attn.relative_position_bias_table": "attention.across_cells",
        "attn.qkv": "attention.qkv",
        "attn.proj": "attention.output",
        "mlp.0": "expand",
        "mlp.3": "contract",
        "patch_embed.proj": "patches.convolution",
        "patch_embed.norm": "patches.norm",
    }
    with torch.no_grad():
        for name, table in ours.named_parameters():
            if name.endswith("within_cell"):
                table.copy_(ours.get_parameter(name.replace("within_cell", "across_cells")))
        for name, parameter in theirs.named_parameters():
            if name.startswith("head"):
                continue
            for their, our in words.items():
                name = name.replace(their, our)
            name = re.sub(r"features\.(\d*[02468])\.(\d)", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}", name)
            name = re.sub(r"features\.(\d*[13579])", lambda m: f"stages.{int(m[1]) // 2}.merge", name)
            parameter.copy_(ours.get_parameter(name))
        clip = torch.randn(2, 3, 8, 128, 128)
        expected = theirs.norm(theirs.features(theirs.pos_drop(theirs.patch_embed(clip)))).permute(0, 4, 1, 2, 3)
    assert expected.shape == (2, 64, 4, 4, 4)
    torch.testing.assert_close(ours(clip), expected, atol=1e-4, rtol=1e-4)


def naive_attention(block: Block, x: Tensor, cells: tuple[int, int], shift: tuple[int, int, int]) -> Tensor:
    """Attention of (T, H, W, C) tokens pair by pair; tokens between the same lines of a shifted grid are a window."""
    attention, size = block.attention, x.shape[:3]
    query, key, value = attention.qkv(x).chunk(3, -1)
    width = x.shape[-1] // attention.heads
    out = torch.zeros_like(x)
    places = list(itertools.product(*(range(length) for length in size)))

    def window(place: tuple[int, ...]) -> list[int]:
        return [(p - step) // length for p, step, length in zip(place, shift, block.window, strict=True)]

    def cell(place: tuple[int, ...]) -> list[int]:
        return [place[axis + 1] * cells[axis] // size[axis + 1] for axis in (0, 1)]

    assert attention.within_cell is not None
    for head, at in itertools.product(range(attention.heads), places):
        part = slice(head * width, (head + 1) * width)
        logits, values = [], []
        for to in (place for place in places if window(place) == window(at)):
            offset = [a - b + length - 1 for a, b, length in zip(at, to, block.window, strict=True)]
            row = (offset[0] * (2 * block.window[1] - 1) + offset[1]) * (2 * block.window[2] - 1) + offset[2]
            gate = sum(abs(a - b) for a, b in zip(cell(at), cell(to), strict=True))
            bias = (1 - gate) * attention.within_cell[row, head] + gate * attention.across_cells[row, head]
            logits.append(query[at][part] @ key[to][part] / width**0.5 + bias)
            values.append(value[to][part])
        out[at][part] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return attention.output(out)


@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((2, 4, 6), (2, 4, 6), (0, 0, 0)),  # one window over everything is not shifted
        ((2, 4, 6), (1, 2, 3), (0, 1, 1)),
        ((4, 3, 6), (2, 3, 2), (1, 0, 1)),
    ],
)
def test_attention_is_what_a_loop_over_pairs_says(
    size: tuple[int, int, int], window: tuple[int, int, int], shift: tuple[int, int, int]
) -> None:
    """Windows, shifts, offsets and the gate by distance in cells, each token with each of its window."""
    cells = (2, 3)
    block = randomised(Block(6, 2, window, cells, is_shifted=True))
    x = torch.randn(*size, 6)
    torch.testing.assert_close(block.attend(x[None])[0], naive_attention(block, x, cells, shift), atol=1e-5, rtol=1e-5)


def test_within_a_cell_one_bias_acts_and_between_neighbours_the_other() -> None:
    """The gate: tokens of one cell see only `within_cell`, tokens of cells side by side only `across_cells`."""
    attention = randomised(WindowAttention(4, 1, (1, 2, 2), is_gated=True))
    x, off_centre = torch.randn(1, 1, 4, 4), torch.arange(9) != 4  # the row in the middle is a token and itself
    one_cell = torch.zeros(1, 4, 2)
    row_of_cells = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])

    def changes(table: nn.Parameter | None, cells: Tensor) -> bool:
        assert table is not None
        window = (1, 2, 2) if cells.shape[1] == 4 else (1, 1, 2)
        tokens, kept = x[:, :, : cells.shape[1]], table.clone()
        before = attention(tokens, window, cells)
        table[off_centre] += torch.randn(8, 1)
        after = attention(tokens, window, cells)
        table.copy_(kept)
        return not torch.equal(before, after)

    assert changes(attention.within_cell, one_cell) and not changes(attention.across_cells, one_cell)
    assert changes(attention.across_cells, row_of_cells) and not changes(attention.within_cell, row_of_cells)


def test_shifted_windows_join_neighbours_and_not_opposite_edges() -> None:
    """In a shifted block a token is seen by its own window alone, and across an edge by nobody."""
    size, window = (1, 4, 8), (1, 4, 4)  # columns 2..5 are a window, 6..7 and 0..1 share one but are apart
    block = randomised(Block(4, 1, window, None, is_shifted=True))
    x = torch.randn(1, *size, 4)
    before = block.attend(x)
    for column, seen_by in ((3, {2, 3, 4, 5}), (7, {6, 7}), (0, {0, 1})):
        changed = x.clone()
        changed[0, 0, 2, column] += 1
        moved = (block.attend(changed) - before).abs().amax((0, 1, 2, 4)) > 1e-6
        assert set(moved.nonzero().ravel().tolist()) == seen_by


def test_tokens_that_do_not_fill_windows_are_an_error() -> None:
    """Clips whose tokens cannot be cut into windows are refused."""
    with pytest.raises(ValueError, match="cannot be cut into windows of"):
        Swin3D(4, (1, 1), (1, 1), (2, 4, 4))(torch.zeros(1, 3, 4, 40, 40))


# ---- what they are shown ----


def test_fragments_are_patches_of_the_frame_in_order() -> None:
    """Each 32 x 32 part of the view is a piece of the frame from its own cell, the same for the frames of a clip."""
    y, x = np.mgrid[:320, :512]
    frame = np.stack([y % 256, x % 256, (y // 256) * 2 + x // 256], -1).astype(np.uint8)
    shown = pixels("technical", np.stack([frame] * 16)).round().astype(int)
    assert (shown == shown[:, :1]).all()
    corners = []
    for clip, row, column in itertools.product(range(3), range(7), range(7)):
        patch = shown[clip, 0, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
        top, left = patch[0, 0, 0] + 256 * (patch[0, 0, 2] // 2), patch[0, 0, 1] + 256 * (patch[0, 0, 2] % 2)
        assert (patch == frame[top : top + 32, left : left + 32]).all()
        assert 320 // 7 * row <= top <= 320 // 7 * (row + 1) - 32 and 512 // 7 * column <= left
        assert left <= 512 // 7 * (column + 1) - 32
        corners.append((clip, top - 320 // 7 * row, left - 512 // 7 * column))
    assert len(set(corners)) > 100  # drawn for every cell and clip


@pytest.mark.parametrize("mode", MODES)
def test_frames_of_224_pixels_are_shown_whole_to_both(mode: Mode) -> None:
    """Where nothing is to be resized or left out, both branches see the frame itself."""
    frames = noise(1, 224, 224)
    for branch in BRANCHES:
        assert np.abs(pixels(branch, frames, mode) - frames[0]).max() < 1e-4


def test_small_frames_are_enlarged() -> None:
    """`fixed` shows all of an enlarged frame; `compat` a corner of it, the grid being that of the small frame."""
    ramp = np.broadcast_to(np.linspace(0, 255, 112).astype(np.uint8)[None, :, None], (112, 112, 3))[None]
    assert pixels("technical", ramp, "fixed")[0, 0, 0, :, 0] == pytest.approx(np.linspace(0, 255, 224), abs=2)
    assert pixels("technical", ramp, "compat").max() < 150


def test_blank_frames_stay_blank_and_in_compat_lose_their_fractions() -> None:
    """An even colour goes through resizing unchanged, in `compat` up to one level lower."""
    blank = np.full((2, 90, 131, 3), 77, np.uint8)
    for branch in BRANCHES:
        assert np.abs(pixels(branch, blank, "fixed") - 77).max() < 1e-4
        assert np.abs(pixels(branch, blank, "compat") - 76.5).max() < 0.5 + 1e-4


def test_tiny_frames_have_no_published_score() -> None:
    """Under 32 pixels in a side the published program fails; `fixed` enlarges."""
    with pytest.raises(NoValue, match="frames are 200x31"):
        pixels("technical", noise(1, 31, 200))
    assert pixels("technical", noise(1, 31, 200), "fixed").shape == (3, 32, 224, 224, 3)


def test_compat_shows_the_aesthetic_branch_one_frame_of_16() -> None:
    """The flaw that `compat` keeps and `fixed` mends: 31 of 32 aesthetic frames may be anything."""
    frames, others = noise(16, 64, 64), noise(16, 64, 64, seed=1)
    others[0] = frames[0]
    assert (pixels("aesthetic", frames) == pixels("aesthetic", others)).all()
    assert (pixels("aesthetic", frames, "fixed") != pixels("aesthetic", others, "fixed")).any()


# ---- scores ----


def test_scores_are_repeatable_means_over_clips_however_these_are_batched(small: Dover) -> None:
    """Again, two clips at a time, and by hand: the same scores of a 7-frame, odd-sized video."""
    frames = noise(7, 251, 333)
    scores = small.raw_scores(frames, seed=3, mode="fixed")
    assert small.raw_scores(frames, seed=3, mode="fixed") == scores
    assert small.raw_scores(frames, seed=3, mode="fixed", batch_clips=2) == pytest.approx(scores, abs=1e-6)
    all_clips = torch.cat(list(clips("technical", frames, 3, "fixed")))
    assert float(small.technical_head(small.technical(all_clips)).mean()) == pytest.approx(scores.technical, abs=1e-6)


def test_another_seed_looks_at_other_fragments() -> None:
    """A seed decides where fragments are cut; whole frames of a short video do not depend on it."""
    frames = noise(2, 240, 300)
    assert (pixels("technical", frames, seed=3) != pixels("technical", frames, seed=4)).any()
    assert (pixels("aesthetic", frames, seed=3) == pixels("aesthetic", frames, seed=4)).all()


@pytest.mark.parametrize("mode", MODES)
def test_one_frame_is_a_still_video(mode: Mode) -> None:
    """A video of one small odd-sized frame looks like that frame seven times."""
    frame = noise(1, 99, 131)
    for branch in BRANCHES:
        assert (pixels(branch, frame, mode) == pixels(branch, np.repeat(frame, 7, 0), mode)).all()


def test_one_blank_frame_has_finite_scores(small: Dover) -> None:
    """Norms of an even colour divide by no zero."""
    assert np.isfinite(small.raw_scores(np.zeros((1, 64, 65, 3), np.uint8), seed=0, mode="compat")).all()


@pytest.mark.parametrize(
    "frames", [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), "u1")]
)
def test_what_is_no_video_is_an_error(small: Dover, frames: np.ndarray) -> None:
    """Frames are (T, H, W, 3) bytes, at least one."""
    with pytest.raises(ValueError, match="expected uint8"):
        small.raw_scores(frames, seed=0, mode="fixed")
