"""Images of the prompts: painted by a small SDXL of random weights, kept in a folder, read again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vc2.errors import ConfigError, PretrainedMissing, WeightsError
from vc2.eval.networks.references import (
    ReferencePainter,
    image_seeds,
    load_references,
    make_references,
    prompt_digest,
)
from vc2.seeding import generator

CPU = torch.device("cpu")
PROMPTS = {"0000": "a red car", "0001": "a dog on a hill", "0002": "a house by the sea"}


class Sketcher:
    """Paints without a network: pictures that depend on prompt and seed, and counts its work."""

    def __init__(self, **settings: Any) -> None:
        self.settings: Mapping[str, Any] = {"weights": "sketch", "size": 8, "steps": 1, **settings}
        self.painted: list[str] = []

    def paint(self, prompt: str, seeds: Sequence[int]) -> np.ndarray:
        self.painted.append(prompt)
        return np.stack([generator(seed, prompt).integers(0, 256, (8, 8, 3), dtype=np.uint8) for seed in seeds])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the folder ----


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Five images a prompt come back as they were painted, in order, with how they were made."""
    made = make_references(Sketcher(), PROMPTS, tmp_path / "refs", seed=3)
    assert load_references(tmp_path / "refs") == made
    assert made.origin == "vc2" and len(made.digest) == 64
    assert made.settings == {"seed": 3, "images": 5, "weights": "sketch", "size": 8, "steps": 1}
    for name, words in PROMPTS.items():
        images = made.images(name, words)
        assert (np.stack(images) == Sketcher().paint(words, image_seeds(3, name))).all()
    assert sorted(path.name for path in (tmp_path / "refs" / "0001").iterdir()) == [f"{n}.png" for n in range(5)]


def test_every_image_has_a_seed_of_its_own() -> None:
    """Seeds depend on seed, prompt and number, and on nothing else."""
    seeds = {seed for prompt in PROMPTS for start in (0, 1) for seed in image_seeds(start, prompt)}
    assert len(seeds) == 2 * 5 * len(PROMPTS)
    assert image_seeds(0, "0000") == image_seeds(0, "0000") and image_seeds(0, "0000", 2) == image_seeds(0, "0000")[:2]


def test_equal_requests_make_equal_folders(tmp_path: Path) -> None:
    """Two folders made from one request are equal byte by byte, whatever the order of prompts; another seed differs."""
    one = make_references(Sketcher(), PROMPTS, tmp_path / "one")
    other = make_references(Sketcher(), dict(reversed(PROMPTS.items())), tmp_path / "other")
    assert contents(tmp_path / "one") == contents(tmp_path / "other") and one.digest == other.digest
    assert make_references(Sketcher(), PROMPTS, tmp_path / "third", seed=1).digest != one.digest


def test_finished_prompts_are_not_painted_again(tmp_path: Path) -> None:
    """A folder grows by what is new; what is there is left alone; the last word is the same as in one go."""
    first, second, third = Sketcher(), Sketcher(), Sketcher()
    make_references(first, {"0001": PROMPTS["0001"]}, tmp_path / "refs")
    made = (tmp_path / "refs" / "0001" / "0.png").stat().st_mtime_ns
    make_references(second, PROMPTS, tmp_path / "refs")
    assert first.painted == [PROMPTS["0001"]] and second.painted == [PROMPTS["0000"], PROMPTS["0002"]]
    make_references(third, PROMPTS, tmp_path / "refs")
    assert third.painted == [] and (tmp_path / "refs" / "0001" / "0.png").stat().st_mtime_ns == made
    make_references(Sketcher(), PROMPTS, tmp_path / "in one go")
    assert contents(tmp_path / "refs") == contents(tmp_path / "in one go")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda image: image.unlink(),
        lambda image: image.write_bytes(image.read_bytes()[:40]),
        lambda image: image.write_bytes(b""),
        lambda image: Image.new("RGB", (8, 8)).save(image),
    ],
)
def test_a_spoilt_image_is_told_and_painted_again(tmp_path: Path, spoil: Any) -> None:
    """An image that is missing, cut off, empty or another one is an error by its name, and is mended by painting."""
    folder = tmp_path / "refs"
    before = make_references(Sketcher(), PROMPTS, folder)
    spoil(folder / "0001" / "3.png")
    with pytest.raises((PretrainedMissing, WeightsError), match=r"0001.3\.png"):
        load_references(folder).images("0001")
    painter = Sketcher()
    assert make_references(painter, PROMPTS, folder) == before
    assert painter.painted == [PROMPTS["0001"]]
    before.images("0001")


def test_changed_words_are_painted_again(tmp_path: Path) -> None:
    """Images belong to words: other words under the same id are not scored against them."""
    folder = tmp_path / "refs"
    old = make_references(Sketcher(), PROMPTS, folder)
    with pytest.raises(WeightsError, match="0002 were painted of other words"):
        old.images("0002", "a ship by the sea")
    old.images("0002", f" {PROMPTS['0002']}\n")
    painter = Sketcher()
    new = make_references(painter, PROMPTS | {"0002": "a ship by the sea"}, folder)
    assert painter.painted == ["a ship by the sea"] and new.digest != old.digest
    assert new.prompts["0002"] == prompt_digest("a ship by the sea")


def test_images_made_in_another_way_are_not_mixed(tmp_path: Path) -> None:
    """Another seed, other weights or steps belong into another folder; the error says what differs."""
    folder = tmp_path / "refs"
    make_references(Sketcher(), PROMPTS, folder)
    before = contents(folder)
    for painter, seed, told in (
        (Sketcher(), 7, "seed=0, now 7"),
        (Sketcher(weights="other"), 0, "weights='sketch', now 'other'"),
        (Sketcher(steps=2), 0, "steps=1, now 2"),
    ):
        with pytest.raises(ConfigError, match=told):
            make_references(painter, PROMPTS, folder, seed=seed)
    assert contents(folder) == before


def test_unfinished_folders_are_told(tmp_path: Path) -> None:
    """A folder in which painting was broken off is not taken for a whole one, and is gone on with."""

    class Tiring(Sketcher):
        def paint(self, prompt: str, seeds: Sequence[int]) -> np.ndarray:
            if len(self.painted) == 2:
                raise KeyboardInterrupt
            return super().paint(prompt, seeds)

    folder = tmp_path / "refs"
    with pytest.raises(KeyboardInterrupt):
        make_references(Tiring(), PROMPTS, folder)
    with pytest.raises(PretrainedMissing, match="2 of 3 prompts"):
        load_references(folder)
    fewer = make_references(Sketcher(), {"0000": PROMPTS["0000"]}, folder)  # what is not asked for now is not missed
    assert list(fewer.files) == ["0000", "0001"]
    painter = Sketcher()
    assert make_references(painter, PROMPTS, folder).origin == "vc2"
    assert painter.painted == [PROMPTS["0002"]]


def test_painting_survives_a_kill(tmp_path: Path) -> None:
    """Killed in the middle of a prompt, painting goes on with that prompt and ends as if nothing had happened."""
    folder = tmp_path / "refs"
    program = f"""
import os, signal
from pathlib import Path
import numpy as np
from vc2.eval.networks import references
from vc2.seeding import generator

class Sketcher:
    settings = {{"weights": "sketch", "size": 8, "steps": 1}}
    def paint(self, prompt, seeds):
        return np.stack([generator(seed, prompt).integers(0, 256, (8, 8, 3), dtype=np.uint8) for seed in seeds])

class Fatal:  # an image that ends the process when it is saved
    @property
    def __array_interface__(self):
        os.kill(os.getpid(), signal.SIGKILL)

class Doomed(Sketcher):
    def paint(self, prompt, seeds):
        images = super().paint(prompt, seeds)
        return images if prompt != {PROMPTS["0001"]!r} else [*images[:3], Fatal()]

references.make_references(Doomed(), {PROMPTS!r}, Path({str(folder)!r}))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (folder / "0000" / "4.png").exists() and not (folder / "0001").exists()
    left = [path for path in folder.iterdir() if path.name.startswith(".0001.")]
    assert len(list(left[0].iterdir())) == 3
    os.utime(left[0], (1, 1))  # long ago
    painter = Sketcher()
    made = make_references(painter, PROMPTS, folder)
    assert painter.painted == [PROMPTS["0001"], PROMPTS["0002"]]
    make_references(Sketcher(), PROMPTS, tmp_path / "unbroken")
    assert contents(folder) == contents(tmp_path / "unbroken")
    assert made.digest == load_references(tmp_path / "unbroken").digest


def test_progress_is_told(tmp_path: Path) -> None:
    """Whoever waits hears how many prompts are done, from none to all."""
    told: list[tuple[int, int]] = []
    make_references(Sketcher(), PROMPTS, tmp_path / "refs", progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", ["../0000", "a/b", ".hidden", ""])
def test_ids_cannot_lead_elsewhere(tmp_path: Path, name: str) -> None:
    """An id that is no plain name writes nothing anywhere."""
    with pytest.raises(ConfigError, match="cannot name a folder"):
        make_references(Sketcher(), {name: "a cat"}, tmp_path / "refs")
    assert not (tmp_path / "refs").exists()


# ---- folders of others ----


@pytest.mark.parametrize("form", ["{name}/{number}.png", "{name}_{number}.png", "{name}_{number}.JPG"])
def test_images_of_others_are_taken_as_they_are(tmp_path: Path, form: str) -> None:
    """In folders or, as the benchmark keeps them, side by side; of unknown origin, with a digest of what they hold."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 12, 10, 3), dtype=np.uint8)
    for place, name in enumerate(("0000", "0017")):
        for number in range(5):
            path = tmp_path / form.format(name=name, number=number)
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels[place, number]).save(path)
    found = load_references(tmp_path)
    assert found.origin == "unknown" and found.settings == {} and set(found.files) == {"0000", "0017"}
    images = found.images("0017", "whatever it shows")
    assert len(images) == 5 and images[0].shape == (12, 10, 3)
    if form.endswith("png"):
        assert (np.stack(images) == pixels[1]).all()
    with pytest.raises(PretrainedMissing, match="no images of prompt 0001"):
        found.images("0001")
    with pytest.raises(ConfigError, match="someone else's"):
        make_references(Sketcher(), PROMPTS, tmp_path)


def test_a_copy_without_its_record_has_the_same_digest(tmp_path: Path) -> None:
    """The digest is of the images: where they come from is another matter."""
    made = make_references(Sketcher(), PROMPTS, tmp_path / "refs")
    shutil.copytree(tmp_path / "refs", tmp_path / "copy")
    (tmp_path / "copy" / "references.json").unlink()
    copied = load_references(tmp_path / "copy")
    assert (copied.origin, copied.digest) == ("unknown", made.digest)


def test_four_images_are_not_enough(tmp_path: Path) -> None:
    """A prompt of which an image is missing is told, by number."""
    make_references(Sketcher(), PROMPTS, tmp_path / "refs")
    (tmp_path / "refs" / "references.json").unlink()
    (tmp_path / "refs" / "0002" / "1.png").unlink()
    with pytest.raises(PretrainedMissing, match="image 1 of prompt 0002"):
        load_references(tmp_path / "refs")


def test_what_is_no_image_is_not_opened(tmp_path: Path) -> None:
    """Files are opened as PNG or JPEG only, whatever they are called."""
    (tmp_path / "0000").mkdir()
    for number in range(5):
        Image.new("RGB", (8, 8)).save(tmp_path / "0000" / f"{number}.png", "GIF" if number == 2 else "PNG")
    with pytest.raises(WeightsError, match=r"2\.png: is neither PNG nor JPEG"):
        load_references(tmp_path).images("0000")
    Image.new("L", (5000, 5000)).save(tmp_path / "0000" / "2.png")
    with pytest.raises(WeightsError, match="5000 x 5000 pixels"):
        load_references(tmp_path).images("0000")


def test_nothing_is_not_taken_for_images(tmp_path: Path) -> None:
    """A missing folder, an empty one and a broken record are told apart."""
    with pytest.raises(PretrainedMissing, match="no such folder"):
        load_references(tmp_path / "nowhere")
    with pytest.raises(PretrainedMissing, match="no images"):
        load_references(tmp_path)
    for text in ("", "[]", '{"format": 1}', '{"format": 9, "prompts": {}}'):
        (tmp_path / "references.json").write_text(text)
        with pytest.raises(WeightsError, match=r"references\.json"):
            load_references(tmp_path)


# ---- SDXL ----


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL of random weights in diffusers' form, with tokenizers that spell."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from vc2.eval.networks.folders import quiet

    path = tmp_path_factory.mktemp("sdxl")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], pad_token="!", model_max_length=77
    )
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + 16,
        cross_attention_dim=32,
        norm_num_groups=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    with torch.no_grad():
        for part in (unet, vae.decoder, pipeline.text_encoder, pipeline.text_encoder_2):
            for parameter in part.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    with quiet():
        pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def painter(sdxl: Path) -> ReferencePainter:
    return ReferencePainter.load(sdxl, CPU, size=32, steps=2)


def test_seeds_decide_what_is_painted(painter: ReferencePainter) -> None:
    """The same prompt and seed give the same picture, another seed or prompt another one."""
    seeds = image_seeds(0, "0000")
    images = painter.paint("a red car", seeds)
    assert images.shape == (5, 32, 32, 3) and images.dtype == np.uint8
    assert (painter.paint("a red car", seeds) == images).all()
    assert len({image.tobytes() for image in images}) == 5
    assert (painter.paint("a dog on a hill", seeds) != images).any()


def test_pictures_do_not_depend_on_the_batch(sdxl: Path, painter: ReferencePainter) -> None:
    """Painted one by one or together, a picture differs by a rounding at most."""
    alone = ReferencePainter.load(sdxl, CPU, size=32, steps=2, batch=1)
    one, other = (each.paint("a red car", image_seeds(0, "0000")).astype(int) for each in (alone, painter))
    assert np.abs(one - other).max() <= 1


def test_painted_references_say_what_made_them(painter: ReferencePainter, tmp_path: Path) -> None:
    """A folder of SDXL's names its weights, size, steps and precision, and holds what the painter paints."""
    made = make_references(painter, {"0000": "a red car"}, tmp_path / "refs")
    assert made.settings == {
        **{"seed": 0, "images": 5, "weights": painter.digest, "size": 32, "steps": 2},
        **{"guidance": 5.0, "precision": "float32"},
    }
    assert (np.stack(made.images("0000")) == painter.paint("a red car", image_seeds(0, "0000"))).all()


def test_the_digest_is_of_the_weights(sdxl: Path, painter: ReferencePainter, tmp_path: Path) -> None:
    """Equal weights have an equal digest wherever they lie; one that is known is taken."""
    copy = shutil.copytree(sdxl, tmp_path / "copy")
    assert ReferencePainter.load(copy, CPU).digest == painter.digest
    assert ReferencePainter.load(copy, CPU, digest="known").digest == "known"


def test_weights_in_half_precision_alone_are_taken(sdxl: Path, tmp_path: Path) -> None:
    """Where there are only files called fp16, these are opened."""
    half = shutil.copytree(sdxl, tmp_path / "half")
    for file in half.glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert ReferencePainter.load(half, CPU, size=32, steps=1).paint("a cat", [1]).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder_2/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "tokenizer_2/tokenizer.json",
    ],
)
def test_a_missing_file_is_named(sdxl: Path, tmp_path: Path, name: str) -> None:
    """A folder that lacks a file is refused by the name of that file."""
    lacking = shutil.copytree(sdxl, tmp_path / "lacking")
    (lacking / name).unlink()
    with pytest.raises(PretrainedMissing, match=name.replace(".", r"\.")):
        ReferencePainter.load(lacking, CPU)


def test_weights_of_another_network_are_refused(sdxl: Path, tmp_path: Path) -> None:
    """A part that does not fit its configuration is an error, not random numbers."""
    wrong = shutil.copytree(sdxl, tmp_path / "wrong")
    config = json.loads((wrong / "unet" / "config.json").read_text())
    config["layers_per_block"] = 2
    (wrong / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="UNet2DConditionModel"):
        ReferencePainter.load(wrong, CPU)


def test_a_single_file_is_refused(sdxl: Path) -> None:
    """The weights alone lack tokenizers: the error says what a folder needs."""
    with pytest.raises(PretrainedMissing, match=r"it is a file.*model_index\.json"):
        ReferencePainter.load(sdxl / "model_index.json", CPU)


@pytest.mark.gpu
def test_a_gpu_paints_in_half_precision(sdxl: Path) -> None:
    """The same seeds paint nearly the same pictures on a GPU."""
    gpu = ReferencePainter.load(sdxl, torch.device("cuda"), size=32, steps=2)
    cpu = ReferencePainter.load(sdxl, CPU, size=32, steps=2)
    assert gpu.settings["precision"] == "float16"
    one, other = (each.paint("a red car", [1, 2]).astype(int) for each in (gpu, cpu))
    assert np.abs(one - other).mean() < 4
