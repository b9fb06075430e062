"""Captions of frames, by a small BLIP-2 of random weights saved and opened in the form that users have."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from tests.eval.small_weights import WORDS, save_blip2
from vc2.errors import PretrainedMissing, WeightsError
from vc2.eval.networks.captions import Captioner, caption_frames
from vc2.eval.networks.folders import filled, opened

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip2(tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def captioner(folder: Path) -> Captioner:
    return Captioner.load(folder, CPU)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Five unlike frames of an odd size, (5, 37, 51, 3)."""
    frames = np.random.default_rng(0).integers(0, 256, (5, 37, 51, 3), dtype=np.uint8)
    frames[1] //= 4
    frames[2], frames[3, ..., 0] = 255, 0
    return frames


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (16, [0, 3, 7, 11, 15]),
        (120, [0, 29, 59, 89, 119]),
        (7, [0, 1, 3, 4, 6]),
        (2, [0, 0, 0, 0, 1]),
        (1, [0, 0, 0, 0, 0]),
    ],
)
def test_five_frames_are_captioned(num_frames: int, expected: list[int]) -> None:
    """They are evenly spread from first to last and rounded down, as torch.linspace(0, N - 1, 5).long() gives them."""
    assert caption_frames(num_frames) == expected
    assert caption_frames(num_frames) == torch.linspace(0, num_frames - 1, 5).long().tolist()


def test_every_frame_has_a_caption_of_its_own(captioner: Captioner, frames: np.ndarray) -> None:
    """Captions are words of the language model, told apart by the picture; neither the picture's tokens nor the start
    are in them."""
    captions = captioner.captions(frames, bgr=False)
    assert len(captions) == 5
    assert len(set(captions)) > 1
    assert all(caption == caption.strip() and set(caption.split()) <= set(WORDS) for caption in captions)
    assert all(len(caption.split()) <= 20 for caption in captions)


def test_captions_do_not_depend_on_the_batch(captioner: Captioner, frames: np.ndarray) -> None:
    """The same frames have the same captions, asked twice or in other portions."""
    captions = captioner.captions(frames, bgr=False)
    assert captioner.captions(frames, bgr=False, batch=2) == captions
    assert captioner.captions(frames[3:], bgr=False, batch=1) == captions[3:]


def test_colours_are_swapped_as_the_benchmark_does(captioner: Captioner, frames: np.ndarray) -> None:
    """`bgr` describes the picture with red and blue swapped, and that makes a difference."""
    swapped = captioner.captions(frames, bgr=True)
    assert swapped == captioner.captions(frames[..., ::-1], bgr=False)
    assert swapped != captioner.captions(frames, bgr=False)


def test_captions_are_those_of_the_published_recipe(folder: Path, captioner: Captioner, frames: np.ndarray) -> None:
    """OpenCV's small picture as numbers 0 to 255, the library's own preparation, greedy words: one frame at a time."""
    processor, model = opened(Blip2Processor, folder), filled(Blip2ForConditionalGeneration, folder, CPU)
    expected = []
    for frame in frames:
        small = cv2.resize(np.ascontiguousarray(frame[..., ::-1]), (28, 28))
        inputs = processor(images=torch.from_numpy(small).permute(2, 0, 1).float(), return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=20)
        expected.append(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())
    assert captioner.captions(frames, bgr=True) == expected


def test_no_frames_have_no_captions(captioner: Captioner) -> None:
    """An empty list is described by an empty list."""
    assert captioner.captions(np.zeros((0, 8, 8, 3), np.uint8), bgr=False) == []


def test_half_precision_runs(folder: Path, frames: np.ndarray) -> None:
    """The network as it is on a GPU, half precision but for the part that needs more, captions every frame."""
    model = filled(Blip2ForConditionalGeneration, folder, CPU, torch.float16)
    assert model.language_model.dtype == torch.float16 and model.qformer.dtype == torch.float32
    assert all(Captioner(model, opened(Blip2Processor, folder)).captions(frames, bgr=False))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    """A folder that lacks a file is refused by the name of that file."""
    lacking = shutil.copytree(folder, tmp_path / "lacking")
    (lacking / name).unlink()
    with pytest.raises(PretrainedMissing, match=name.replace(".", r"\.")):
        Captioner.load(lacking, CPU)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """The error says where a folder was expected and what belongs into it."""
    with pytest.raises(PretrainedMissing, match=r"nowhere.*BLIP-2.*config\.json"):
        Captioner.load(tmp_path / "nowhere", CPU)


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    """Of weights in several files every one has to be there."""
    lacking = shutil.copytree(folder, tmp_path / "lacking")
    (lacking / "model.safetensors").rename(lacking / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (lacking / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PretrainedMissing, match="model-00002-of-00002"):
        Captioner.load(lacking, CPU)


def test_weights_of_another_network_are_refused(folder: Path, tmp_path: Path) -> None:
    """Nothing is filled with random numbers in silence."""
    wrong = shutil.copytree(folder, tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (wrong / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"vision_model.*another network"):
        Captioner.load(wrong, CPU)


def test_a_folder_of_an_old_form_is_refused(folder: Path, tmp_path: Path) -> None:
    """A configuration that does not say which token stands for the picture is told to be too old."""
    old = shutil.copytree(folder, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    del config["image_token_index"]
    (old / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="image_token_index"):
        Captioner.load(old, CPU)


@pytest.mark.gpu
def test_the_same_captions_on_a_gpu(folder: Path, frames: np.ndarray) -> None:
    """On a GPU, in half precision, every frame gets a caption, and the same one twice."""
    captioner = Captioner.load(folder, torch.device("cuda"))
    assert captioner.captions(frames, bgr=False) == captioner.captions(frames, bgr=False)
