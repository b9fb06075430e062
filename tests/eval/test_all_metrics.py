"""All 24 metrics for real, from files of videos to a scorecard.

Networks are small ones of random weights in the files and folders that users have, opened by the same loaders; text is
read and faces are compared (in fixed) by the models that packages bring; the person is on true photographs.
"""

import hashlib
import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file

from tests.eval.networks import test_action, test_amt, test_dino, test_dover, test_faces, test_musiq
from tests.eval.small_weights import (
    LABELS,
    clip_of_images,
    save_blip2,
    save_grounding_dino,
    save_sam2,
    small_files,
    videomae,
    vit,
)
from tests.eval.test_measure import Setting, by_name, here, nobody, texture
from vc2.data.video_files import encode_mp4
from vc2.eval.config import EvaluateStage, Prompt
from vc2.eval.folder import import_folder
from vc2.eval.look import Networks
from vc2.eval.measure import Line, applies, measure
from vc2.eval.metrics import EVALCRAFTER, METRICS, MODES, modes_of
from vc2.eval.scorecard import aspect_scores, sampled_videos, score
from vc2.eval.vbench import partial_vbench_scores
from vc2.storage import LocalStore

skimage_data: Any = pytest.importorskip("skimage.data")
for package in ("dlib", "rapidocr", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is not installed")

PERSON = "Eileen Collins"
PROMPTS = (
    Prompt(
        id="person",
        text="two red dogs beside an astronaut",
        attributes={
            "count": {"n": 2, "object": "dog"},
            "color": {"color": "red", "object": "dog"},
            "text": "STOP",
            "celebrity": PERSON,
            "action": LABELS[7],
            "amplitude": "slow",
            "scoring_text": "two dogs at a traffic light",
        },
    ),
    Prompt(id="moving", text="waves move to the right", attributes={"amplitude": "large", "action": "surfing"}),
    Prompt(id="one", text="a hill", attributes={"celebrity": PERSON, "scoring_text": "a dog on a hill"}),
    Prompt(id="plain", text="clouds over the sea"),
)
VIDEOS = tuple(prompt.id for prompt in PROMPTS)
PACKAGES = {"rapidocr": "rapidocr", "dlib-faces": "face_recognition_models"}


# ---- what is given ----


def save_networks(folder: Path) -> dict[str, str]:
    """Files of all networks by their names, for `EvaluateStage.files`."""
    dover = test_dover.public_state(test_dover.randomised(test_dover.Dover(test_dover.SMALL)))
    dover["aesthetic_head.fc_last.bias"] -= 0.24  # to where its scores are neither 0 nor 1
    dover["technical_head.fc_last.bias"] -= 1.37
    vit().save_pretrained(folder / "vit")
    clip_of_images().save_pretrained(folder / "clip-of-images")
    torch.manual_seed(1)
    saved = {
        "dover": dover,
        "videomae-k400": {"meta": {}, "state_dict": test_action.mmaction_state(videomae())},
        "dino-vit-b-16": test_dino.released(load_file(folder / "vit" / "model.safetensors")),
        "laion-aesthetic": torch.nn.Linear(24, 1).state_dict(),
        "musiq-spaq": test_musiq.published_state(),
        "amt-s": {"state_dict": test_amt.anything(), "epoch": 300},
    }
    for name, state in saved.items():
        (folder / name).mkdir()
        torch.save(state, folder / name / "weights.pth")
    (folder / "videomae-k400" / "label_map_k400.txt").write_text("\n".join(LABELS))
    (folder / "clip-of-images" / "config.json").unlink()
    for name in (test_faces.FACE_CASCADE, test_faces.EYE_CASCADE):
        shutil.copy(test_faces.RANDOM_CASCADE, folder / name)
    return small_files(folder) | {
        **{name: str(folder / name / "weights.pth") for name in saved},
        "blip2-opt-2.7b": str(save_blip2(folder)),
        "grounding-dino-tiny": str(save_grounding_dino(folder) / "config.json"),  # as a mirror has it
        "sam2": str(save_sam2(folder)),
        "clip-vit-l-14": str(folder / "clip-of-images" / "model.safetensors"),
        "vgg-face": str(test_faces.save(folder / "vgg_face_weights.h5", test_faces.tensors())),
        "opencv-haar-face": str(folder / test_faces.FACE_CASCADE),
    }


def person(num_frames: int) -> np.ndarray:
    """The astronaut above a sign that says STOP, (T, 128, 96, 3)."""
    frames = []
    for number in range(num_frames):
        face = skimage_data.astronaut()[20:220, 130 - 4 * number : 330 - 4 * number]
        frame = Image.new("RGB", (96, 128), (230, 230, 225))
        frame.paste(Image.fromarray(face).resize((96, 96)))
        ImageDraw.Draw(frame).text((8, 98), "STOP", fill=(20, 20, 40), font=ImageFont.load_default(24))
        frames.append(np.array(frame))
    return np.stack(frames)


def moving(num_frames: int, step: int = 2) -> np.ndarray:
    """A texture that moves to the right, (T, 48, 64, 3)."""
    return np.stack([np.roll(texture(), step * number, axis=1)[:, :64] for number in range(num_frames)])


def save_videos(folder: Path, **videos: np.ndarray) -> Path:
    folder.mkdir()
    for name, frames in videos.items():
        (folder / f"{name}.mp4").write_bytes(encode_mp4(frames, 8, crf=0))
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> EvaluateStage:
    """An evaluation that lacks nothing."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "photos" / PERSON).mkdir(parents=True)
    photo = Image.fromarray(skimage_data.astronaut()[:256, 100:356])
    photo.resize((128, 128)).save(folder / "photos" / PERSON / "a.png")
    draws = np.random.default_rng(0)
    for name in VIDEOS:
        (folder / "references" / name).mkdir(parents=True)
        for number in range(5):
            image = Image.fromarray(draws.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            image.save(folder / "references" / name / f"{number}.png")
    (folder / "networks").mkdir()
    return EvaluateStage(
        prompts=PROMPTS,
        metrics=tuple(METRICS),  # type: ignore[arg-type]
        batch=3,
        files=save_networks(folder / "networks"),
        references=str(folder / "references"),
        photos=str(folder / "photos"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = {"person": person(2), "moving": moving(4), "one": moving(1), "plain": moving(3, 1)}
    return save_videos(tmp_path_factory.mktemp("made") / "videos", **frames)


def setting(videos: Path, place: Path, prompts: tuple[Prompt, ...] = PROMPTS) -> Setting:
    store = LocalStore(place / "store")
    return Setting(store=store, work=place / "work", samples=import_folder(videos, prompts, store))


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return setting(folder, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def summary(given: EvaluateStage, whole: Setting) -> dict[str, Any]:
    """What the scorecard says of the benchmark, all metrics measured in one go."""
    card = score(given, whole.store, whole.work, fingerprint="all", samples=whole.samples, launch=here)
    return json.loads(whole.store.read(f"{card.prefix}/summary.json"))["benchmark"]


@pytest.fixture(scope="module")
def lines(given: EvaluateStage, whole: Setting, summary: dict[str, Any]) -> list[Line]:
    return whole.lines(given, nobody)


# ---- laws ----


def test_every_metric_is_measured_in_both_modes(
    given: EvaluateStage, summary: dict[str, Any], lines: list[Line]
) -> None:
    """Each video that a metric applies to has a finite value or a reason, and each metric has a value over all."""
    assert not given.missing()
    expected = {
        (prompt.id, name, mode)
        for prompt in PROMPTS
        for name, metric in METRICS.items()
        for mode in modes_of(metric, MODES)
        if applies(metric, prompt, mode)
    }
    assert {(line.id, line.metric, line.mode) for line in lines} == expected and len(lines) == len(expected)
    assert all(bool(line.reason) if line.value is None else np.isfinite(line.value) for line in lines)
    assert not any(line.passing for line in lines)  # nothing failed
    assert {line.id for line in lines if line.value is None} == {"one", "person"}
    for mode in MODES:
        metrics = summary["modes"][mode]["metrics"]
        assert list(metrics) == sorted(METRICS) and all(np.isfinite(said["value"]) for said in metrics.values())
        for name, said in metrics.items():
            read_as = "compat" if METRICS[name].one_mode else mode
            found = by_name(lines, name, read_as).values()
            assert said["n"] == sum(line.value is not None for line in found)
            assert said["n"] + sum(said["without_value"].values()) == len(found)


def test_what_applies_depends_on_the_words_that_are_scored(lines: list[Line]) -> None:
    """In compat objects are looked for in the scorers' text, in fixed in the prompt."""
    assert set(by_name(lines, "Detection_Score")) == {"person", "one"}
    assert set(by_name(lines, "Detection_Score", "fixed")) == {"person"}
    weights = {mode: by_name(lines, "Detection_Score", mode)["person"].weight for mode in MODES}
    assert weights == {"compat": 2, "fixed": 1}  # dog, traffic light; dog


def test_lines_say_how_many_frames_they_are_made_of(lines: list[Line]) -> None:
    """Captions are of five, some of them the same; in compat objects are looked for in every fifth, and DOVER sees the
    first of two; all else is of all frames."""
    assert by_name(lines, "BLIP_BLEU")["moving"].frames == 5
    for name in ("Count_Score", "VQA_A"):
        assert [by_name(lines, name, mode)["person"].frames for mode in MODES] == [1, 2]
    lengths = {"person": 2, "moving": 4, "one": 1, "plain": 3}
    for name in ("IS", "CLIP_Score", "Flow_Score", "imaging_quality"):
        assert {video: line.frames for video, line in by_name(lines, name).items()} == lengths


def test_the_person_and_the_sign_are_recognised(lines: list[Line]) -> None:
    """With true weights: the astronaut is near her photograph, the texture is as far as can be; the sign is read."""
    faces = by_name(lines, "Celebrity_ID_Score", "fixed")
    assert faces["person"].value is not None and 0 < faces["person"].value < 0.6 and faces["one"].value == 1
    for mode in MODES:
        assert by_name(lines, "OCR_Score", mode)["person"].value == 0


def test_aspects_are_those_of_the_raw_values_and_fixed_has_none(summary: dict[str, Any]) -> None:
    """With all 17 there, compat has four aspects and the total by the published formula; VBench's quality is given."""
    for mode in MODES:
        said = summary["modes"][mode]
        raw = {name: metric["value"] for name, metric in said["metrics"].items()}
        assert tuple(name for name in METRICS if name in EVALCRAFTER) == EVALCRAFTER
        if mode == "compat":
            assert said["aspects"] == aspect_scores(raw) and not said["withheld"]
        else:
            assert not said["aspects"] and set(said["withheld"]) == set(aspect_scores(raw))
        assert said["vbench"]["quality"] == partial_vbench_scores(raw)[0]["quality"]


def test_neither_order_nor_ranks_change_a_bit(
    given: EvaluateStage, folder: Path, lines: list[Line], tmp_path: Path
) -> None:
    """In fixed: prompts in reverse, shared by three ranks, each of which loads its own networks."""
    few = tuple(prompt for prompt in reversed(PROMPTS) if prompt.id != "moving")
    found = setting(folder, tmp_path, few).lines(given.evolve(prompts=few, mode="fixed", world_size=3))
    asked = {(name, mode) for name, metric in METRICS.items() for mode in modes_of(metric, ["fixed"])}
    assert found == [line for line in lines if line.id != "moving" and (line.metric, line.mode) in asked]


def test_metrics_one_by_one_say_the_same_as_together(given: EvaluateStage, whole: Setting, lines: list[Line]) -> None:
    """In compat, each with networks and a decoded video of its own: what metrics and modes share changes none."""
    few = PROMPTS[:1]
    for line in [line for line in lines if line.id == few[0].id and line.mode == "compat"]:
        videos = sampled_videos(whole.store, whole.samples, few)
        alone = measure(line.metric, videos, few, "compat", Networks(given, torch.device("cpu")))[line.id]
        assert (alone.value, alone.reason, alone.frames, alone.weight) == (
            line.value, line.reason, line.frames, line.weight,
        )  # fmt: skip


def test_the_batch_changes_rounding_alone(
    given: EvaluateStage, folder: Path, lines: list[Line], tmp_path: Path
) -> None:
    """Of those metrics that show their networks as many frames at once as they are told."""
    few, names = PROMPTS[3:], tuple(name for name in METRICS if not name.startswith("VQA"))
    found = setting(folder, tmp_path, few).lines(given.evolve(prompts=few, metrics=names, mode="compat", batch=1))
    expected = [line for line in lines if line.id == "plain" and line.metric in names and line.mode == "compat"]
    assert [line.value for line in found] == pytest.approx([line.value for line in expected], rel=1e-4, abs=1e-6)
    assert [line.evolve(value=None) for line in found] == [line.evolve(value=None) for line in expected]


def test_swapped_frames_are_less_consistent(given: EvaluateStage, lines: list[Line], tmp_path: Path) -> None:
    """Of a moving texture: neighbours look alike, even to networks that were never trained."""
    names, few = ("CLIP_Temp", "subject_consistency", "background_consistency", "temporal_flickering"), PROMPTS[1:2]
    swapped = setting(save_videos(tmp_path / "videos", moving=moving(4)[[0, 2, 1, 3]]), tmp_path, few)
    found = swapped.lines(given.evolve(prompts=few, metrics=names))
    for name in names:
        for mode in modes_of(METRICS[name], MODES):
            before, after = (by_name(some, name, mode)["moving"].value for some in (lines, found))
            assert before is not None and after is not None and after < before


def test_lines_name_the_bytes_of_their_weights(
    given: EvaluateStage, lines: list[Line], summary: dict[str, Any]
) -> None:
    """sha256 of each file or folder, the version of each package, digests of references and photographs."""
    sha256 = {
        name: hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for name, file in given.files.items()
        if name not in ("clip-vit-b-32", "videomae-k400")  # of two files each
        and Path(file).suffix in (".pth", ".safetensors", ".h5")
    }
    versions = {name: f"{package} {metadata.version(package)}" for name, package in PACKAGES.items()}
    for line in lines:
        metric = METRICS[line.metric]
        assert set(line.weights) == {*metric.weights_in(line.mode), *metric.needs}
        for name, said in line.weights.items():
            assert said == (sha256 | versions).get(name, said) and (name in versions or len(said) == 64)
        assert summary["modes"][line.mode]["metrics"][line.metric]["weights"] == line.weights


def test_other_weights_make_their_metrics_anew_and_no_others(
    given: EvaluateStage, whole: Setting, lines: list[Line], tmp_path: Path
) -> None:
    """With a tensor changed in each tower of CLIP, exactly the metrics that ask it are measured again, and differ."""
    shutil.copytree(Path(given.files["clip-vit-b-32"]).parent, tmp_path / "clip")
    shutil.copytree(whole.store.root, tmp_path / "store")
    state = load_file(tmp_path / "clip" / "model.safetensors")
    for name in ("visual_projection.weight", "text_projection.weight"):
        state[name] += state[name].flip(0) / 2
    save_file(state, tmp_path / "clip" / "model.safetensors")
    asked: set[tuple[str, str]] = set()

    def watched(module: str, job: str, **more: Any) -> None:
        tasks = json.loads(Path(job).read_text())["tasks"]
        asked.update((task["id"], which) for task in tasks for which in task["wanted"])
        here(module, job, **more)

    files = given.files | {"clip-vit-b-32": str(tmp_path / "clip" / "model.safetensors")}
    other = Setting(store=LocalStore(tmp_path / "store"), work=tmp_path / "work", samples=whole.samples)
    found = other.lines(given.evolve(files=files), watched)
    with_clip = [line for line in lines if "clip-vit-b-32" in line.weights]
    assert asked == {(line.id, f"{line.metric}/{line.mode}") for line in with_clip}
    for before, after in zip(lines, found, strict=True):
        if before not in with_clip:
            assert after == before
        else:
            assert after.weights != before.weights and (before.value is None or after.value != before.value)
