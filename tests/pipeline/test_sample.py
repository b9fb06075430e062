"""`vc2 sample`: from a checkpoint and prompts to files that say how they were made."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vc2.artifacts import Artifact, FileEntry, Manifest, commit, put_file, put_object
from vc2.cli import main
from vc2.data.video_files import encode_video, read_comment, read_video
from vc2.model.autoencoder import Autoencoder
from vc2.model.bundle import VideoModel
from vc2.model.config import (
    AutoencoderConfig,
    ImageConfig,
    ImageTowerConfig,
    LoraConfig,
    ModelConfig,
    ResamplerConfig,
    SamplerConfig,
    TextConfig,
    UNetConfig,
)
from vc2.model.diffusers_pipeline import VideoCrafter2Pipeline
from vc2.model.image import ImageEncoder
from vc2.model.lora import add_lora, merge_lora, save_lora
from vc2.model.schedule import NoiseSchedule
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D
from vc2.model.weights import save_unet
from vc2.pipeline.sample import LoadedModel, SampleRequest, load_files, sample_videos
from vc2.storage import LocalStore

CONFIG = ModelConfig(
    unet=UNetConfig(
        model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), num_head_channels=8,
        context_dim=16, norm_groups=8, temporal_length=4,
    ),
    autoencoder=AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=1.0),
    text=TextConfig(width=16, heads=2, layers=2, layers_used=1, context_length=16, seed=3),
)  # fmt: skip
FORM = {"num_frames": 3, "width": 24, "height": 16}
QUICK = ["--steps", "2", "--guidance", "2", "--json"]


def make_model(config: ModelConfig = CONFIG) -> VideoModel:
    """Networks that were never trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, autoencoder = UNet3D(config.unet).eval(), Autoencoder(config.autoencoder)
        for parameter in unet.parameters():  # zeros at the start would hide the text
            torch.nn.init.normal_(parameter, std=0.2)
        image = None if config.image is None else ImageEncoder(config.image)
    text, schedule = TextEncoder(config.text), NoiseSchedule(config.schedule)
    return VideoModel(config, unet, schedule, autoencoder, text, image=image)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A checkpoint of stage `spatial`, tuned on images: its videos stand in the one it started from."""
    folder = tmp_path_factory.mktemp("checkpoint")
    store, model = LocalStore(folder / "store"), make_model()
    save_unet(model.unet, folder / "unet.safetensors")
    model.autoencoder.save(folder / "autoencoder.safetensors")
    weights: list[FileEntry] = [
        put_object(store, folder / file, name)
        for name, file in (
            ("unet.safetensors", "unet.safetensors"),
            ("unet_ema.safetensors", "unet.safetensors"),
            ("autoencoder.safetensors", "autoencoder.safetensors"),
        )
    ]

    def committed(kind: str, prefix: str, config: dict, inputs: dict, files: tuple = ()) -> Artifact:
        return commit(store, prefix, Manifest(
            kind=kind, stage=kind, stage_version=1, fingerprint=prefix, config=config, inputs=inputs, files=files,
        ))  # fmt: skip

    videos = committed("shard_set", "shards/videos/v", {"form": FORM}, {})
    images = committed("shard_set", "shards/images/i", {"form": FORM | {"num_frames": 1, "width": 64}}, {})
    config = {"model": CONFIG.model_dump(mode="json")}
    full = committed("checkpoint", "runs/full/f/checkpoints/00000003", config, {"a": videos, "b": images})
    prefix = "runs/spatial/s/checkpoints/00000004"
    told = json.dumps(CONFIG.identity() | {"fps": {"6": 5, "9": 7}}).encode()
    files = (*weights, put_file(store, prefix, "model.json", told))
    return committed("checkpoint", prefix, config, {"images": images, "start_from": full}, files)


def sampled(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    assert main(["sample", *arguments, *QUICK]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["sample", *arguments]) == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_is_not_asked_for_is_what_the_model_was_trained_with(
    checkpoint: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Frames and size of the clips of the stage before, the rate that was told most; the store gains nothing."""
    store = Path(checkpoint.uri.removesuffix("/" + checkpoint.prefix))
    before = sorted(store.rglob("*"))
    path = tmp_path / "new" / "ball.mp4"
    (made,) = sampled(
        capsys, "a red ball", "--checkpoint", checkpoint.uri, "--work", str(tmp_path), "--output", str(path)
    )
    assert (made["frames"], made["width"], made["height"], made["fps"]) == (3, 24, 16, 9)
    assert made["checkpoint"] == "runs/spatial/s/checkpoints/00000004@4" and made["weights"] == "ema"
    frames, rate = read_video(path)
    assert frames.shape == (3, 16, 24, 3) and rate == 10
    assert sorted(store.rglob("*")) == before
    assert [file.name for file in path.parent.iterdir()] == ["ball.mp4"]


def test_several_prompts_fill_a_folder_and_each_can_be_made_again_alone(
    checkpoint: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From what stands in its file; the seed goes up by one from prompt to prompt."""
    common = ["--checkpoint", checkpoint.uri, "--work", str(tmp_path), "--play-fps", "5"]
    made = sampled(capsys, "a red ball", "a blue box", *common, "--output", str(tmp_path / "both"), "--seed", "7")
    assert [(Path(one["video"]).name, one["seed"]) for one in made] == [("0000.mp4", 7), ("0001.mp4", 8)]
    assert main(["show", made[1]["video"], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {name: value for name, value in made[1].items() if name != "video"}
    again = [told["prompt"], *common, "--seed", str(told["seed"]), "--output", str(tmp_path / "again.mp4")]
    sampled(capsys, *again)
    assert (tmp_path / "again.mp4").read_bytes() == Path(made[1]["video"]).read_bytes()


def test_updates_laid_over_the_weights_are_the_tuned_model(
    checkpoint: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A video of the model with a file of updates is one of the model that they were merged into."""
    tuned, config = make_model(), LoraConfig(rank=2)
    for name in add_lora(tuned.unet, config, "all"):
        torch.nn.init.normal_(tuned.unet.get_parameter(name), std=0.2)
    save_lora(tuned.unet, tmp_path / "lora.safetensors", config)
    merge_lora(tuned.unet)
    tuned.save(tmp_path / "tuned")
    lora, plain = ["--lora", str(tmp_path / "lora.safetensors")], ["--checkpoint", checkpoint.uri]
    videos = {}
    for name, where in (
        ("plain", plain), ("laid over", plain + lora), ("merged", ["--checkpoint", str(tmp_path / "tuned")]),
    ):  # fmt: skip
        size = ["--size", "24x16", "--frames", "3", "--fps", "9"]
        (made,) = sampled(capsys, "a", *where, *size, "--output", str(tmp_path / f"{name}.mp4"))
        videos[name] = read_video(Path(made["video"]))[0].astype(int)
    assert abs(videos["laid over"] - videos["merged"]).max() <= 2 < abs(videos["plain"] - videos["merged"]).max()


@pytest.mark.parametrize("container", ["gif", "webp"])
def test_other_forms_hold_their_settings_too(
    container: str, checkpoint: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, common = tmp_path / f"ball.{container}", ["--checkpoint", checkpoint.uri, "--work", str(tmp_path)]
    extra = [
        "--size",
        "16x16",
        "--frames",
        "2",
        "--solver",
        "dpm++",
        "--guidance-rescale",
        "--negative-prompt",
        "noise",
    ]
    (made,) = sampled(capsys, "a red ball", *common, "--output", str(path), *extra)
    told = json.loads(read_comment(path) or "")
    assert told == {name: value for name, value in made.items() if name != "video"}
    expected = {
        "width": 16,
        "frames": 2,
        "solver": "dpm++",
        "eta": 0.0,
        "guidance_rescale": 0.7,
        "negative_prompt": "noise",
    }
    assert told | expected == told
    with Image.open(path) as image:
        assert image.size == (16, 16) and getattr(image, "n_frames", 1) == 2
    assert main(["show", str(path)]) == 0
    assert "a red ball" in capsys.readouterr().out


def test_what_was_not_trained_is_noted(
    checkpoint: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["a", "--checkpoint", checkpoint.uri, "--work", str(tmp_path), "--output", str(tmp_path / "a.mp4")]
    assert main(["sample", *arguments, *QUICK, "--frames", "2", "--fps", "28"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vc2: note: ")]
    assert len(notes) == 2 and "2 frames from a network trained on 3" in notes[0] and "fps 28" in notes[1]


IMAGE = ImageConfig(
    tower=ImageTowerConfig(width=16, heads=2, layers=1, image_size=28, patch_size=14, output_dim=8),
    resampler=ResamplerConfig(dim=16, depth=1, heads=2, dim_head=8, num_queries=3, embedding_dim=16, output_dim=16),
)


@pytest.mark.parametrize("kind", ["RGBA", "L", "P", "turned"])
def test_a_picture_of_any_kind_and_shape_shows_what_our_pipeline_of_diffusers_makes_of_it(
    tmp_path: Path, kind: str
) -> None:
    """Whole, stretched to the size of the video, the right way up."""
    model = make_model(CONFIG.evolve(unet=CONFIG.unet.evolve(use_image_attention=True), image=IMAGE))
    assert model.image is not None
    for parameter in model.image.parameters():
        parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    left, right = np.full((40, 50, 4), 255, np.uint8), np.zeros((40, 50, 4), np.uint8)
    picture, exif = Image.fromarray(np.concatenate([left, right], axis=1)), Image.Exif()
    exif[0x0112] = 6 if kind == "turned" else 1  # turned: a quarter to the right
    picture.convert("RGB" if kind == "turned" else kind).save(tmp_path / "a.png", exif=exif)
    Image.new("RGB", (100, 40), "white").save(tmp_path / "white.png")
    request = SampleRequest(
        prompts=("a",) * 2, images=(str(tmp_path / "a.png"), str(tmp_path / "white.png")), seed=7, fps=8,
        sampler=SamplerConfig(num_steps=2, guidance_scale=2.0),
    )  # fmt: skip
    loaded = LoadedModel(model, "here", "raw", frames=2, width=24, height=16)
    sample_videos(loaded, request, [tmp_path / "0.mp4", tmp_path / "1.mp4"], "mp4")
    pipe = VideoCrafter2Pipeline.from_model(model)
    pipe.set_progress_bar_config(disable=True)
    frames: Any = pipe("a", 16, 24, 2, 2, 2.0, image=Image.open(tmp_path / "a.png"), seed=7, fps=8).frames  # pyright: ignore[reportAttributeAccessIssue]
    as_bytes = (frames[0] * 255).round().astype(np.uint8)
    (tmp_path / "pipe.mp4").write_bytes(encode_video(as_bytes, 10, "mp4"))
    ours, white, theirs = (read_video(tmp_path / f"{name}.mp4")[0].astype(int) for name in ("0", "1", "pipe"))
    assert abs(ours - theirs).max() <= 3 < abs(ours - white).max()


def test_updates_are_laid_over_once_however_often_a_model_is_sampled(tmp_path: Path) -> None:
    model, config = make_model(), LoraConfig(rank=2)
    model.save(tmp_path / "model")
    for name in add_lora(model.unet, config, "all"):
        torch.nn.init.normal_(model.unet.get_parameter(name), std=0.2)
    save_lora(model.unet, tmp_path / "lora.safetensors", config)
    loaded = load_files(tmp_path / "model", lora=str(tmp_path / "lora.safetensors"))
    request = SampleRequest(prompts=("a",), width=16, height=16, sampler=SamplerConfig(num_steps=1))
    files = [tmp_path / "0.mp4", tmp_path / "1.mp4"]
    made = [sample_videos(loaded, request, [file], "mp4")[0] for file in files]
    assert {settings["lora"] for settings in made} == {"lora.safetensors"}
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_image_to_video_model_is_shown_an_image_from_a_folder_as_from_a_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says so if there is none, or none that can be read."""
    unet = CONFIG.unet.evolve(use_image_attention=True)
    make_model(CONFIG.evolve(unet=unet, image=IMAGE)).save(tmp_path / "model")
    common = ["a ball", "--checkpoint", str(tmp_path / "model"), "--output", str(tmp_path / "a.mp4"), "--size", "16x16"]
    videos = []
    for name, level in (("light.png", 240), ("dark.jpg", 10)):
        Image.fromarray(np.full((30, 50, 3), level, np.uint8)).save(tmp_path / name)
        (made,) = sampled(capsys, *common, "--image", str(tmp_path / name))
        assert made["image"] == name and made["fps"] == 8 and made["frames"] == 4
        videos.append(read_video(tmp_path / "a.mp4")[0].astype(int))
    assert abs(videos[0] - videos[1]).max() > 1

    files = []
    store = LocalStore(tmp_path / "store")
    for path in sorted((tmp_path / "model").iterdir()):
        entry = put_object(store, path, path.name)
        files += [entry, entry.evolve(name="unet_ema.safetensors")] if path.name == "unet.safetensors" else [entry]
    config = {"model": CONFIG.evolve(unet=unet, image=IMAGE).model_dump(mode="json")}
    stored = commit(store, "runs/imported/x/checkpoints/00000000", Manifest(
        kind="checkpoint", stage="imported", stage_version=1, fingerprint="x", config=config, inputs={},
        files=tuple(files),
    ))  # fmt: skip
    as_stored = [*common, "--checkpoint", stored.uri, "--work", str(tmp_path), "--image", str(tmp_path / "dark.jpg")]
    sampled(capsys, *as_stored)
    assert np.array_equal(read_video(tmp_path / "a.mp4")[0], videos[1])

    (tmp_path / "broken.png").write_bytes((tmp_path / "light.png").read_bytes()[:60])
    for arguments, words in (
        (["--image", str(tmp_path / "broken.png")], "broken.png: not a readable image"),
        (["--image", str(tmp_path / "gone.png")], "gone.png: no such image file"),
        (["--image", "a", "--image", "b"], "2 images for 1 prompts"),
        ([], "give it an image"),
    ):
        assert words in refusal(capsys, *common, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no prompt"),
        ([" "], "no prompt"),
        (["a", "b", "--output", "x.mp4"], "x.mp4 is one file for 2 prompts: give a folder"),
        (["a", "--output", "x.avi"], "cannot write avi"),
        (["a", "--output", "x.gif", "--format", "webp"], "x.gif is to be written as webp"),
        (["a", "--output", "file/x.mp4"], "file: cannot be written"),
        (["a", "b", "--output", "new", "--size", "18x16"], "for example 16 x 16"),
        (["a", "--steps", "0"], "num_steps"),
        (["a", "--steps", "2000"], "the schedule has 1000 timesteps"),
        (["a", "--eta", "2"], "eta"),
        (["a", "--size", "18x16"], "for example 16 x 16"),
        (["a", "--device", "toaster"], "device=toaster"),
        (["a", "--image", "file"], "text-to-video network"),
        (["a", "--lora", "file"], "file: is empty"),
        (["a", "--checkpoint", "gone"], "gone: no such file or folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str],
    words: str,
    checkpoint: Artifact,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    if "--checkpoint" not in arguments:
        arguments = [*arguments, "--checkpoint", checkpoint.uri]
    said = refusal(capsys, *arguments, "--work", str(tmp_path / "work"))
    assert said.startswith("vc2: ") and words in said
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "work"}


def test_a_size_must_be_given_where_nothing_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model().save(tmp_path / "model")
    arguments = ["a", "--checkpoint", str(tmp_path / "model"), "--output", str(tmp_path / "a.mp4")]
    assert "give --size WxH" in refusal(capsys, *arguments)
    for size in ("16", "axb", "-1x8"):
        with pytest.raises(SystemExit):
            main(["sample", *arguments, f"--size={size}"])


def test_a_video_of_another_origin_has_no_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.gif")
    for name in ("a.mp4", "a.gif"):
        assert main(["show", str(tmp_path / name)]) == 1
        assert "holds no settings" in capsys.readouterr().err
