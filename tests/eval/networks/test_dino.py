import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTModel

from tests.eval.small_weights import vit
from vc2.errors import WeightsError
from vc2.eval.networks.dino import Dino
from vc2.eval.vbench import subject_consistency

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reference() -> ViTModel:
    """A tiny vision transformer of transformers, on squares of 64 pixels."""
    return vit()


@pytest.fixture(scope="module")
def hub_folder(reference: ViTModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino-vitb16")
    reference.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def released_file(hub_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights under the names of the release, which keeps queries, keys and values in one tensor."""
    path = tmp_path_factory.mktemp("released") / "dino_vitbase16_pretrain.pth"
    torch.save(released(load_file(hub_folder / "model.safetensors")), path)
    return path


def released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        out[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
        out[f"norm.{kind}"] = state[f"layernorm.{kind}"]
        for i in range(2):
            theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
            out[f"{ours}.norm1.{kind}"] = state[f"{theirs}.layernorm_before.{kind}"]
            out[f"{ours}.norm2.{kind}"] = state[f"{theirs}.layernorm_after.{kind}"]
            out[f"{ours}.attn.proj.{kind}"] = state[f"{theirs}.attention.output.dense.{kind}"]
            out[f"{ours}.mlp.fc1.{kind}"] = state[f"{theirs}.intermediate.dense.{kind}"]
            out[f"{ours}.mlp.fc2.{kind}"] = state[f"{theirs}.output.dense.{kind}"]
            parts = [state[f"{theirs}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            out[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
    return out


def frames(num_frames: int = 3, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def test_features_are_those_of_transformers(reference: ViTModel, hub_folder: Path) -> None:
    """On squares the feature is the first token of transformers' network with the same weights and pixels."""
    dino, video = Dino.load(hub_folder, CPU), frames()
    pixels = (torch.from_numpy(video).permute(0, 3, 1, 2) / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / (
        torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    )
    with torch.no_grad():
        expected = reference(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(torch.from_numpy(dino.features(video)), expected, atol=1e-4, rtol=1e-4)


def test_both_public_forms_are_one_network(hub_folder: Path, released_file: Path) -> None:
    """The released file and the hub's folder give the same features, of frames of any shape."""
    video = frames(2, 40, 90)
    np.testing.assert_array_equal(
        Dino.load(released_file, CPU).features(video), Dino.load(hub_folder, CPU).features(video)
    )


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 90), (33, 7), (1, 1)])
def test_still_video_is_consistent(released_file: Path, height: int, width: int) -> None:
    """Frames of any shape have one finite feature each, and equal frames equal ones."""
    still = np.repeat(frames(1, height, width), 3, axis=0)
    features = Dino.load(released_file, CPU).features(still, batch=2)
    assert features.shape == (3, 128)
    assert np.isfinite(features).all()
    assert subject_consistency(features) == pytest.approx(1, abs=1e-6)


def test_a_frame_does_not_depend_on_those_beside_it(released_file: Path) -> None:
    """Features are the same however many frames are looked at together."""
    dino, video = Dino.load(released_file, CPU), frames(5, 48, 70)
    np.testing.assert_allclose(dino.features(video, batch=2), dino.features(video, batch=5), atol=1e-5)


def test_positions_are_stretched_to_the_grid(released_file: Path) -> None:
    """Positions that are all alike stay so on any grid, and those of the square are the learned ones."""
    dino = Dino.load(released_file, CPU)
    assert torch.equal(dino.positions_on(4, 4), dino.positions)
    dino.positions[:, 1:] = 0.5
    stretched = dino.positions_on(4, 7)
    assert stretched.shape == (1, 29, 128)
    torch.testing.assert_close(stretched[:, 1:], torch.full((1, 28, 128), 0.5))


def test_frames_keep_their_shape(released_file: Path) -> None:
    """The short side becomes 64 here, and nothing is cut off."""
    pixels = Dino.load(released_file, CPU).pixels(torch.zeros(1, 3, 320, 512))
    assert pixels.shape == (1, 3, 64, 102)


def test_layer_on_top_is_left_aside(hub_folder: Path, tmp_path: Path) -> None:
    """Transformers' pooling layer is no part of DINO; a file that has one is read all the same."""
    state = load_file(hub_folder / "model.safetensors") | {"pooler.dense.weight": torch.zeros(1)}
    save_file(state, tmp_path / "model.safetensors")
    assert Dino.load(tmp_path, CPU).features(frames(1)).shape == (1, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.attn.qkv.bias"), r"1 missing: blocks\.1\.attn\.qkv\.bias"),
        (lambda state: state.update({"head.weight": torch.zeros(1)}), r"1 unexpected: head\.weight"),
        (lambda state: state.update({"norm.bias": torch.zeros(3)}), r"norm\.bias is \(3,\), not \(128,\)"),
        (lambda state: state.pop("pos_embed"), "no tensors patch_embed.proj.weight"),
    ],
)
def test_misfits_are_told_in_public_names(released_file: Path, tmp_path: Path, change, message: str) -> None:
    """What a file lacks, has too much or in another shape is named as in the file."""
    state = torch.load(released_file, weights_only=True)
    change(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=message):
        Dino.load(tmp_path / "other.pth", CPU)


def test_no_code_is_run_out_of_a_file(tmp_path: Path) -> None:
    """A pickle that would call a function is refused."""

    class Trap:
        def __reduce__(self) -> tuple:
            return print, ("sprung",)

    path = tmp_path / "dino_vitbase16_pretrain.pth"
    path.write_bytes(pickle.dumps({"cls_token": Trap()}))
    with pytest.raises(WeightsError):
        Dino.load(path, CPU)


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), "needs one frame"),
        (np.zeros((2, 8, 8), np.uint8), r"expected uint8 \(T, H, W, 3\)"),
        (np.zeros((2, 8, 8, 3), np.float32), "expected uint8"),
    ],
)
def test_what_are_no_frames_says_why(released_file: Path, video: np.ndarray, reason: str) -> None:
    """No frame, or arrays of another kind, give an error with the reason."""
    with pytest.raises(ValueError, match=reason):
        Dino.load(released_file, CPU).features(video)
