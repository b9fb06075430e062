"""Optical flow: the network's own numbers, of any size, in any batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.optical_flow import raft_large

from vc2.errors import WeightsError
from vc2.eval.networks.flow import DisFlow, Raft, pairs_at_once
from vc2.seeding import generator

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = raft_large(weights=None)
    with torch.no_grad():
        network.update_block.flow_head.conv2.weight.mul_(0.03)  # motion of some pixels
    place = tmp_path_factory.mktemp("raft") / "raft.pth"
    torch.save(network.state_dict(), place)
    return place


@pytest.fixture(scope="module")
def raft(path: Path) -> Raft:
    return Raft.load(path, CPU, updates=3)


def video(frames: int, height: int = 128, width: int = 136) -> np.ndarray:
    coarse = generator(1, "video").uniform(0, 255, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(coarse, 2 * number, 1)[:height, :width] for number in range(frames)])


def test_flow_is_what_the_network_says_of_each_pair(raft: Raft) -> None:
    """Features made once for each frame change nothing, there or back."""
    frames = video(3)
    there, back = raft.along(frames, both_ways=True, batch=1)
    assert back is not None and there.shape == back.shape == (2, 2, 128, 136)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        for number in range(2):
            one, other = pixels[number : number + 1], pixels[number + 1 : number + 2]
            for ours, pair in ((there, (one, other)), (back, (other, one))):
                theirs = raft.network(*pair, num_flow_updates=3)[-1][0].numpy()
                assert np.abs(ours[number] - theirs).max() < 1e-4 and np.abs(theirs).mean() > 0.01


def test_batches_change_nothing(raft: Raft) -> None:
    frames = video(4)
    alone, _ = raft.along(frames, batch=1)
    together, _ = raft.along(frames, batch=8)
    assert np.abs(alone - together).max() < 1e-3


@pytest.mark.parametrize("size", [(20, 31), (130, 140), (8, 200)])
def test_frames_of_any_size_have_flow_of_their_size(raft: Raft, size: tuple[int, int]) -> None:
    there, back = raft.along(video(2, *size))
    assert there.shape == (1, 2, *size) and back is None and np.isfinite(there).all()


def test_large_frames_come_a_few_at_a_time() -> None:
    """All places are correlated with all: memory grows with the square of the area."""
    assert pairs_at_once(320, 512) > pairs_at_once(640, 1024) >= pairs_at_once(1080, 1920) == 1


def test_other_networks_are_refused(path: Path, tmp_path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state.pop("mask_predictor.conv.bias")
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"mask_predictor\.conv\.bias"):
        Raft.load(tmp_path / "other.pth", CPU)


@pytest.mark.parametrize("step", [1, 3])
def test_without_weights_a_translation_has_its_flow(step: int) -> None:
    frames = np.stack([np.roll(video(1)[0], step * number, 1) for number in range(3)])
    smooth = (frames + np.roll(frames, 1, 2) + np.roll(frames, -1, 2) + np.roll(frames, 1, 1)) / 4
    there, back = DisFlow().along(smooth, both_ways=True)
    assert back is not None
    inner = (slice(None), slice(None), slice(16, -16), slice(16, -16))
    assert np.median(there[inner][:, 0]) == pytest.approx(step, abs=0.3)
    assert np.median(back[inner][:, 0]) == pytest.approx(-step, abs=0.3)
