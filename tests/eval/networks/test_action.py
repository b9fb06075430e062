"""Actions in videos, by a small VideoMAE of random weights in the two forms that users have."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import VideoMAEForVideoClassification

from tests.eval.small_weights import LABELS, videomae
from vc2.errors import PretrainedMissing, WeightsError
from vc2.eval.networks.action import ActionRecogniser, action_frames, crop_places, scaled_size

CPU = torch.device("cpu")
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@pytest.fixture(scope="module")
def model() -> VideoMAEForVideoClassification:
    return videomae()


@pytest.fixture(scope="module")
def folder(model: VideoMAEForVideoClassification, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videomae")
    model.save_pretrained(path)
    return path


def mmaction_state(model: VideoMAEForVideoClassification) -> dict[str, Tensor]:
    """The network under the names that mmaction2's `vit_mae.py` and `timesformer_head.py` give its parts."""
    old, config = model.state_dict(), model.config
    state = {"backbone.pos_embed": model.videomae.embeddings.position_embeddings}
    for kind in ("weight", "bias"):
        state[f"backbone.patch_embed.projection.{kind}"] = old[
            f"videomae.embeddings.patch_embeddings.projection.{kind}"
        ]
        state[f"backbone.fc_norm.{kind}"] = old[f"fc_norm.{kind}"]
        state[f"cls_head.fc_cls.{kind}"] = old[f"classifier.{kind}"]
    for number in range(config.num_hidden_layers):
        block, layer = f"backbone.blocks.{number}", f"videomae.encoder.layer.{number}"
        attention = f"{layer}.attention.attention"
        state[f"{block}.attn.q_bias"] = old[f"{attention}.query.bias"]
        state[f"{block}.attn.v_bias"] = old[f"{attention}.value.bias"]
        state[f"{block}.attn.qkv.weight"] = torch.cat(
            [old[f"{attention}.{part}.weight"] for part in ("query", "key", "value")]
        )
        for kind in ("weight", "bias"):
            state[f"{block}.norm1.{kind}"] = old[f"{layer}.layernorm_before.{kind}"]
            state[f"{block}.norm2.{kind}"] = old[f"{layer}.layernorm_after.{kind}"]
            state[f"{block}.attn.proj.{kind}"] = old[f"{layer}.attention.output.dense.{kind}"]
            state[f"{block}.mlp.layers.0.0.{kind}"] = old[f"{layer}.intermediate.dense.{kind}"]
            state[f"{block}.mlp.layers.1.{kind}"] = old[f"{layer}.output.dense.{kind}"]
    return state


@pytest.fixture
def checkpoint(model: VideoMAEForVideoClassification, tmp_path: Path) -> Path:
    """A file as mmengine writes it, with the names of the classes beside it."""
    path = tmp_path / "vit-base-p16_videomaev2.pth"
    torch.save({"meta": {"epoch": 1, "dataset_meta": {"classes": None}}, "state_dict": mmaction_state(model)}, path)
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    return path


def forward(state: dict[str, Tensor], clip: Tensor) -> Tensor:
    """Logits of a clip (3, 16, S, S), by the equations of mmaction2's ViT with one head, mean pooling and eps 1e-6."""
    conv = state["backbone.patch_embed.projection.weight"]
    tokens = F.conv3d(clip[None], conv, state["backbone.patch_embed.projection.bias"], stride=conv.shape[2:])
    x = tokens.flatten(2).transpose(1, 2) + state["backbone.pos_embed"]
    width = x.shape[-1]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    for number in range(2):
        block = f"backbone.blocks.{number}"
        bias = torch.cat([state[f"{block}.attn.q_bias"], torch.zeros(width), state[f"{block}.attn.v_bias"]])
        q, k, v = F.linear(norm(x, f"{block}.norm1"), state[f"{block}.attn.qkv.weight"], bias).chunk(3, dim=-1)
        attended = (q * width**-0.5 @ k.transpose(1, 2)).softmax(-1) @ v
        x = x + linear(attended, f"{block}.attn.proj")
        inner = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.layers.0.0"))
        x = x + linear(inner, f"{block}.mlp.layers.1")
    return linear(norm(x.mean(1), "backbone.fc_norm"), "cls_head.fc_cls")[0]


def video(num_frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("num_frames", "starts", "first"),
    [
        (16, [0, 0, 0, 0, 0], [0, 4, 8, 12] * 4),
        (7, [0, 0, 0, 0, 0], [0, 4, 1, 5, 2, 6, 3, 0, 4, 1, 5, 2, 6, 3, 0, 4]),
        (2, [0, 0, 0, 0, 0], [0] * 16),
        (1, [0, 0, 0, 0, 0], [0] * 16),
        (61, [0, 0, 0, 0, 0], list(range(0, 61, 4))),
        (63, [0, 0, 1, 2, 2], list(range(0, 61, 4))),
        (120, [0, 15, 30, 44, 59], list(range(0, 61, 4))),
    ],
)
def test_clips_are_those_of_mmaction2(num_frames: int, starts: list[int], first: list[int]) -> None:
    """Five starts evenly spread from the first frame to the last that leaves room, or a loop where there is no room."""
    frames = action_frames(num_frames)
    assert frames.shape == (5, 16) and frames.max() < num_frames
    assert frames[:, 0].tolist() == starts and frames[0].tolist() == first
    if num_frames >= 61:
        assert (np.diff(frames, axis=1) == 4).all()


def test_short_sides_and_squares_are_those_of_mmaction2() -> None:
    """The short side is scaled to 224, sizes rounded; squares are cut at both ends and in the middle."""
    assert scaled_size(1024, 640, 224) == (358, 224)
    assert scaled_size(512, 320, 224) == (358, 224)
    assert scaled_size(333, 777, 224) == (224, 523)
    assert crop_places(358, 224, 224) == [(0, 0), (134, 0), (67, 0)]
    assert crop_places(224, 523, 224) == [(0, 0), (0, 298), (0, 149)]
    assert crop_places(224, 224, 224) == [(0, 0)] * 3


def test_probabilities_are_the_mean_over_fifteen_views(checkpoint: Path) -> None:
    """Views, normalisation, network and average agree with mmaction2's recipe written out."""
    frames, state = video(70), torch.load(checkpoint, weights_only=True)["state_dict"]
    found = []
    for clip in action_frames(70):
        for left, _ in crop_places(48, 32, 32):
            view = torch.from_numpy(frames[clip][:, :, left : left + 32]).float()
            view = (view - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
            found.append(forward(state, view.permute(3, 0, 1, 2)).softmax(-1))
    probabilities = ActionRecogniser.load(checkpoint, CPU).probabilities(frames)
    assert np.abs(probabilities - torch.stack(found).mean(0).numpy()).max() < 1e-5 * probabilities.max()


def test_both_forms_are_one_network(folder: Path, checkpoint: Path) -> None:
    """A file of mmaction2 and a folder of transformers with the same weights see the same actions."""
    theirs, ours = ActionRecogniser.load(checkpoint, CPU), ActionRecogniser.load(folder, CPU)
    assert theirs.labels == ours.labels == tuple(LABELS)
    assert theirs.probabilities(video(16)) == pytest.approx(ours.probabilities(video(16)), rel=1e-3)
    assert ActionRecogniser.load(checkpoint.parent, CPU).labels == ours.labels  # the folder around the file


@pytest.mark.parametrize("shape", [(16, 32, 48), (7, 50, 33), (2, 64, 64), (1, 5, 9), (90, 40, 40)])
def test_any_video_has_probabilities(folder: Path, shape: tuple[int, int, int]) -> None:
    """Short, odd, upright, square and tiny videos have 400 probabilities that sum to one, twice the same."""
    recogniser = ActionRecogniser.load(folder, CPU)
    probabilities = recogniser.probabilities(video(*shape))
    assert probabilities.shape == (400,) and probabilities.min() >= 0
    assert math.isclose(probabilities.sum(), 1, abs_tol=1e-9)
    assert (recogniser.probabilities(video(*shape)) == probabilities).all()


def test_blank_videos_are_taken(folder: Path) -> None:
    """A black video has finite probabilities, whatever its length."""
    recogniser = ActionRecogniser.load(folder, CPU)
    short, long = (recogniser.probabilities(np.zeros((count, 24, 24, 3), np.uint8)) for count in (3, 80))
    assert np.isfinite(short).all() and np.allclose(short, long, atol=1e-9)


def test_probabilities_do_not_depend_on_the_batch(folder: Path) -> None:
    """Views may be asked for one by one or all at once."""
    recogniser = ActionRecogniser.load(folder, CPU)
    expected = recogniser.probabilities(video(90), batch=15)
    for batch in (1, 4):
        assert np.abs(recogniser.probabilities(video(90), batch=batch) - expected).max() < 1e-7


def test_labels_have_to_lie_beside_the_file(checkpoint: Path) -> None:
    """Without the names of the classes a file of mmaction2 is of no use."""
    (checkpoint.parent / "labels.txt").unlink()
    with pytest.raises(PretrainedMissing, match=r"labels\.txt"):
        ActionRecogniser.load(checkpoint, CPU)
    (checkpoint.parent / "label_map_k400.txt").write_text("\n".join(LABELS))
    assert ActionRecogniser.load(checkpoint, CPU).labels == tuple(LABELS)


def test_a_number_of_classes_that_is_not_kinetics_is_refused(checkpoint: Path) -> None:
    """399 names for 400 classes are an error, not a shift of all names."""
    (checkpoint.parent / "labels.txt").write_text("\n".join(LABELS[:-1]))
    with pytest.raises(WeightsError, match="400 classes and 399 names"):
        ActionRecogniser.load(checkpoint, CPU)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("backbone.blocks.1.attn.qkv.weight"), r"blocks?|layer\.1"),
        (lambda state: state.update({"backbone.gamma": torch.zeros(3)}), r"backbone\.gamma"),
        (lambda state: state.update({"cls_head.fc_cls.bias": torch.zeros(7)}), r"classifier\.bias"),
        (lambda state: state["backbone.pos_embed"].add_(1), "sines"),
        (lambda state: state.pop("backbone.patch_embed.projection.weight"), r"not VideoMAE of mmaction2"),
    ],
)
def test_strangers_are_refused(checkpoint: Path, change: object, told: str) -> None:
    """A tensor that is missing, unknown, misshapen or means something else is an error that names it."""
    content = torch.load(checkpoint, weights_only=True)
    assert callable(change)
    change(content["state_dict"])
    torch.save(content, checkpoint)
    with pytest.raises(WeightsError, match=told):
        ActionRecogniser.load(checkpoint, CPU)


def test_a_folder_without_a_head_is_refused(folder: Path, tmp_path: Path) -> None:
    """Of a network before fine-tuning the classifier would be random: it is missing by name."""
    from safetensors.torch import load_file, save_file

    wrong = shutil.copytree(folder, tmp_path / "wrong")
    state = load_file(wrong / "model.safetensors")
    save_file({k: v for k, v in state.items() if "classifier" not in k}, wrong / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"classifier\.(bias|weight)"):
        ActionRecogniser.load(wrong, CPU)


def test_nameless_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    """Classes called LABEL_0, LABEL_1 say nothing of actions."""
    wrong = shutil.copytree(folder, tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    config["id2label"] = {str(number): f"LABEL_{number}" for number in range(400)}
    config["label2id"] = {f"LABEL_{number}": number for number in range(400)}
    (wrong / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="names no classes"):
        ActionRecogniser.load(wrong, CPU)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    """A folder that lacks a file is refused by the name of that file."""
    lacking = shutil.copytree(folder, tmp_path / "lacking")
    (lacking / name).unlink()
    with pytest.raises(PretrainedMissing, match=re.escape(name)):
        ActionRecogniser.load(lacking, CPU)
    with pytest.raises(PretrainedMissing, match="nowhere"):
        ActionRecogniser.load(tmp_path / "nowhere", CPU)


@pytest.mark.gpu
def test_the_same_probabilities_on_a_gpu(folder: Path) -> None:
    """CPU and GPU agree to float32's precision."""
    expected = ActionRecogniser.load(folder, CPU).probabilities(video(16))
    found = ActionRecogniser.load(folder, torch.device("cuda")).probabilities(video(16))
    assert np.abs(found - expected).max() < 1e-3 * expected.max()
