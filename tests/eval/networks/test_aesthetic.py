from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from tests.eval.small_weights import clip_of_images
from vc2.errors import WeightsError
from vc2.eval.networks.aesthetic import Aesthetic, ClipImages
from vc2.eval.vbench import aesthetic_quality, background_consistency

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip_model() -> CLIPModel:
    return clip_of_images()


@pytest.fixture(scope="module")
def clip_path(clip_model: CLIPModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, without a configuration beside it, with the positions that old files hold."""
    folder = tmp_path_factory.mktemp("clip")
    clip_model.save_pretrained(folder)
    (folder / "config.json").unlink()
    path = folder / "model.safetensors"
    positions = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file(load_file(path) | positions, path)
    return path


@pytest.fixture(scope="module")
def head_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head") / "sa_0_4_vit_l_14_linear.pth"
    torch.manual_seed(1)
    torch.save(torch.nn.Linear(24, 1).state_dict(), path)
    return path


def frames(num_frames: int = 3, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def test_features_are_those_of_transformers(clip_model: CLIPModel, clip_path: Path) -> None:
    """On squares of CLIP's size, features are transformers' image vectors brought to length 1."""
    video = frames()
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((torch.from_numpy(video) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        hidden = clip_model.vision_model(pixel_values=pixels).pooler_output
        expected = torch.nn.functional.normalize(clip_model.visual_projection(hidden), dim=-1)
    features = ClipImages.load(clip_path, CPU).features(video)
    torch.testing.assert_close(torch.from_numpy(features), expected, atol=1e-5, rtol=1e-4)


def test_score_is_linear_in_the_feature(clip_path: Path, head_path: Path) -> None:
    """The head's weights, times the feature of length 1, plus its bias."""
    aesthetic, head = Aesthetic.load(head_path, CPU, clip=clip_path), torch.load(head_path, weights_only=True)
    features = ClipImages.load(clip_path, CPU).features(frames())
    expected = features @ head["weight"].numpy()[0] + head["bias"].numpy()
    np.testing.assert_allclose(aesthetic.scores(frames()), expected, atol=1e-5)
    np.testing.assert_allclose(aesthetic.scores_of(features), expected, atol=1e-5)
    assert aesthetic_quality(expected) == pytest.approx(expected.mean() / 10)


def test_the_middle_square_is_looked_at(clip_path: Path) -> None:
    """What lies left and right of the middle square of a wide frame is not seen; what lies in it is."""
    clip, video = ClipImages.load(clip_path, CPU), frames(1, 32, 96)
    beside, inside = video.copy(), video.copy()
    beside[:, :, :24] = beside[:, :, 72:] = 0
    inside[:, :, 40:50] = 0
    np.testing.assert_array_equal(clip.features(beside), clip.features(video))
    assert not np.allclose(clip.features(inside), clip.features(video), atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 7), (1, 1), (200, 90)])
def test_still_video_is_consistent(clip_path: Path, height: int, width: int) -> None:
    """Frames of any shape have a feature of length 1, equal frames equal ones."""
    features = ClipImages.load(clip_path, CPU).features(np.repeat(frames(1, height, width), 3, axis=0), batch=2)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    assert background_consistency(features) == pytest.approx(1, abs=1e-5)


def test_misfits_are_named(clip_path: Path, head_path: Path, tmp_path: Path) -> None:
    """What a file lacks, or a head of another CLIP, is an error that says so."""
    state = load_file(clip_path)
    save_file({name: value for name, value in state.items() if "pre_layrnorm.bias" not in name}, tmp_path / "a")
    with pytest.raises(WeightsError, match=r"1 missing: vision_model\.pre_layrnorm\.bias"):
        ClipImages.load(tmp_path / "a", CPU)
    save_file(state | {"vision_model.extra": torch.zeros(1)}, tmp_path / "b")
    with pytest.raises(WeightsError, match=r"1 unexpected: vision_model\.extra"):
        ClipImages.load(tmp_path / "b", CPU)
    save_file({"visual.conv1.weight": torch.zeros(1)}, tmp_path / "c")
    with pytest.raises(WeightsError, match="expected CLIP as transformers stores it"):
        ClipImages.load(tmp_path / "c", CPU)
    torch.save(torch.nn.Linear(512, 1).state_dict(), tmp_path / "d")
    with pytest.raises(WeightsError, match=r"weight is \(1, 512\), not \(1, 24\)"):
        Aesthetic.load(tmp_path / "d", CPU, clip=clip_path)
