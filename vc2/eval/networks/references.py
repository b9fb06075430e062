"""Images of the prompts by SDXL (Podell et al. 2024), against which SD_Score compares videos: made once, kept as data.

Five images a prompt, 512 x 512, 20 steps, guidance 5. The benchmark does not seed them, so two of its
users compare with different images: a flaw. Here every image has a seed of its own, from (seed, prompt id, number): it
comes out the same whatever was painted before, and noise is drawn on the CPU, the same for every device. Half precision
on a GPU, as published. The images are part of the benchmark: without their digest an SD_Score means nothing.

    <folder>/references.json        how they were made, sha256 of prompts and images, one digest of all
    <folder>/0000/0.png .. 4.png    appears whole or not at all

A folder without `references.json` is taken as it is, `NNNN/0.png` or the benchmark's `NNNN_0.png`, and its origin is
unknown. Its digest is made by the same rule, so that two folders with equal images have equal digests.
Shapes: images (H, W, 3) uint8, red green blue.
"""

import hashlib
import io
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
import torch
from PIL import Image

from vc2.config import canonical_json
from vc2.errors import ConfigError, PretrainedMissing, WeightsError
from vc2.model.files import published
from vc2.seeding import derive_seed
from vc2.storage import file_digest

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

__all__ = [
    "FILES",
    "IMAGES",
    "Painter",
    "ReferencePainter",
    "References",
    "image_seeds",
    "load_references",
    "make_references",
    "prompt_digest",
]

IMAGES, SIZE, STEPS = 5, 512, 20  # per prompt; pixels; denoising steps
GUIDANCE = 5.0  # the pipeline's own
RECORD = "references.json"
FORMAT = 1
MOST_PIXELS = 2**24
LEFT_OVER = 3600.0  # seconds after which what a writer left behind is removed


def _weight_files(name: str) -> tuple[str, ...]:
    return f"{name}.safetensors", f"{name}.fp16.safetensors"


FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    ("tokenizer/vocab.json", "tokenizer/tokenizer.json"),
    ("tokenizer_2/vocab.json", "tokenizer_2/tokenizer.json"),
    "text_encoder/config.json",
    _weight_files("text_encoder/model"),
    "text_encoder_2/config.json",
    _weight_files("text_encoder_2/model"),
    "unet/config.json",
    _weight_files("unet/diffusion_pytorch_model"),
    "vae/config.json",
    _weight_files("vae/diffusion_pytorch_model"),
)


# ---------------------------------------------------------------------------------------------------------------------
# Painting


class Painter(Protocol):
    """Paints prompts from seeds."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides how an image comes out, besides prompt and seed; plain values."""
        ...

    def paint(self, prompt: str, seeds: Sequence[int]) -> np.ndarray:
        """One image a seed, (N, H, W, 3) uint8."""
        ...


class ReferencePainter:
    """SDXL base 1.0.

    Args:
        pipeline: Of diffusers, on its device.
        weights: sha256 of its weights.
        size: Side of the images, pixels.
        steps: Denoising steps.
        batch: Images on the device at once.
    """

    def __init__(
        self,
        pipeline: "StableDiffusionXLPipeline",
        weights: str,
        *,
        size: int = SIZE,
        steps: int = STEPS,
        batch: int = IMAGES,
    ) -> None:
        self._pipeline, self._size, self._steps, self._batch = pipeline, size, steps, batch
        self.digest = weights  #: sha256 of the weights
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def load(
        cls,
        path: Path,
        device: torch.device,
        *,
        digest: str = "",
        size: int = SIZE,
        steps: int = STEPS,
        batch: int = IMAGES,
    ) -> Self:
        """Open a folder of diffusers (`stabilityai/stable-diffusion-xl-base-1.0`); of its weights, those in half
        precision (`*.fp16.safetensors`) where there are no others.

        Args:
            path: The folder. The single file of the same weights is not taken: it lacks tokenizers and configurations.
            device: Where it paints.
            digest: sha256 of the weights, where it is known; else they are read once more.
            size, steps, batch: See the class.

        Raises:
            PretrainedMissing: If the folder or a file in it is missing.
            WeightsError: If it holds something else.
        """
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        from vc2.eval.networks.folders import check_folder, filled, opened

        check_folder(path, "SDXL in diffusers' form (stabilityai/stable-diffusion-xl-base-1.0)", *FILES)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        parts: dict[str, torch.nn.Module] = {}
        files: list[Path] = []
        kinds: Mapping[str, type[torch.nn.Module]] = {
            "text_encoder": CLIPTextModel,
            "text_encoder_2": CLIPTextModelWithProjection,
            "unet": UNet2DConditionModel,
            "vae": AutoencoderKL,
        }
        for name, kind in kinds.items():
            stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
            full, half = (path / file for file in _weight_files(f"{name}/{stem}"))
            variant = None if full.is_file() else "fp16"
            parts[name] = filled(kind, path, device, dtype, subfolder=name, variant=variant)
            files.append(full if full.is_file() else half)
        # Watermarks, which it adds where a certain package is installed, would be seen by CLIP.
        pipeline = opened(StableDiffusionXLPipeline, path, add_watermarker=False, **parts)
        digest = digest or hashlib.sha256("".join(file_digest(file).sha256 for file in files).encode()).hexdigest()
        return cls(pipeline, digest, size=size, steps=steps, batch=batch)

    @property
    def settings(self) -> Mapping[str, Any]:
        precision = str(self._pipeline.unet.dtype).removeprefix("torch.")
        return {
            "weights": self.digest,
            "size": self._size,
            "steps": self._steps,
            "guidance": GUIDANCE,
            "precision": precision,
        }

    @torch.inference_mode()
    def paint(self, prompt: str, seeds: Sequence[int]) -> np.ndarray:
        """One image a seed, (N, 512, 512, 3) uint8."""
        images: list[np.ndarray] = []
        for start in range(0, len(seeds), self._batch):
            images += self._painted(prompt, seeds[start : start + self._batch])
        return np.stack(images)

    def _painted(self, prompt: str, seeds: Sequence[int]) -> list[np.ndarray]:
        with warnings.catch_warnings():
            # Of numpy, for diffusers' way to make arrays of tensors.
            warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
            told: Any = self._pipeline(
                [prompt] * len(seeds),
                height=self._size,
                width=self._size,
                num_inference_steps=self._steps,
                guidance_scale=GUIDANCE,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="np",
            )
        if not np.isfinite(told.images).all():
            raise WeightsError("SDXL painted no numbers but NaN: set force_upcast in its vae/config.json")
        return [(image * 255).round().astype(np.uint8) for image in told.images]


def image_seeds(seed: int, prompt_id: str, count: int = IMAGES) -> list[int]:
    """The seeds of a prompt's images."""
    return [derive_seed(seed, "reference image", prompt_id, number) for number in range(count)]


def prompt_digest(prompt: str) -> str:
    """sha256 of a prompt without the space around it."""
    return hashlib.sha256(prompt.strip().encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def make_references(
    painter: Painter,
    prompts: Mapping[str, str],
    folder: Path,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> "References":
    """Paint images of prompts into a folder, prompt by prompt, going on where it was left off.

    May be killed at any moment and called again. A prompt is painted anew if its words have changed, or one of its
    images is missing or damaged; all others are left as they are, as are prompts that are not asked for.

    Args:
        painter: Paints them; asked for what is not there only.
        prompts: Words by id; an id becomes the name of a folder.
        folder: Where they go; made if need be.
        seed: Another one gives other images.
        progress: Called with how many prompts are done, and of how many.

    Raises:
        ConfigError: If the folder holds images that were made in another way, or an id cannot name a folder.
    """
    if wrong := [name for name in prompts if Path(name).name != name or name.startswith(".") or not name]:
        raise ConfigError(f"prompt id {wrong[0]!r} cannot name a folder; expected one like 0001")
    settings = {"seed": seed, "images": IMAGES, **painter.settings}
    record = _read_record(folder) if (folder / RECORD).exists() else _new_record(folder, settings)
    if record["settings"] != settings:
        pairs = {key: (record["settings"].get(key), settings.get(key)) for key in settings | record["settings"]}
        told = "; ".join(f"{key}={before!r}, now {now!r}" for key, (before, now) in pairs.items() if before != now)
        raise ConfigError(f"{folder}: holds images made with {told}; give another folder, or delete this one")
    _sweep(folder)
    entries: dict[str, dict[str, Any]] = record["prompts"]
    for name in [name for name, entry in entries.items() if name not in prompts and not entry["images"]]:
        entries[name]["images"] = _digests_on_disk(folder / name)
        if not entries[name]["images"]:  # was broken off, and is not asked for any more
            del entries[name]
    for name, words in prompts.items():
        digest = prompt_digest(words)
        if entries.get(name, {}).get("sha256", digest) != digest:
            shutil.rmtree(folder / name, ignore_errors=True)
            del entries[name]
        entries.setdefault(name, {"sha256": digest, "seeds": image_seeds(seed, name), "images": []})
    _write_record(folder, record | {"complete": False, "digest": ""})
    for done, (name, words) in enumerate(prompts.items()):
        if progress:
            progress(done, len(prompts))
        entry = entries[name]
        found = _digests_on_disk(folder / name)
        if not found or entry["images"] not in ([], found):
            images = painter.paint(words, entry["seeds"])
            published(folder / name, lambda temporary, images=images: _write_images(temporary, images))
            found = _digests_on_disk(folder / name)
        entry["images"] = found
    complete = all(entry["images"] for entry in entries.values())
    digest = _digest({name: entry["images"] for name, entry in entries.items()}) if complete else ""
    _write_record(folder, record | {"complete": complete, "digest": digest})
    if progress:
        progress(len(prompts), len(prompts))
    return load_references(folder)


def _new_record(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ConfigError(f"{folder}: holds files but no {RECORD}, so its images are someone else's; give a new folder")
    return {"format": FORMAT, "complete": False, "settings": dict(settings), "prompts": {}, "digest": ""}


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    published(folder / RECORD, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _write_images(folder: Path, images: np.ndarray) -> None:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png", "PNG")


def _digests_on_disk(folder: Path) -> list[str]:
    """sha256 of a prompt's images; empty if one is missing or cannot be opened."""
    found = []
    for number in range(IMAGES):
        try:
            data = (folder / f"{number}.png").read_bytes()
            _opened(data, folder / f"{number}.png")
        except (OSError, WeightsError):
            return []
        found.append(hashlib.sha256(data).hexdigest())
    return found


def _sweep(folder: Path) -> None:
    """Remove what writers that were killed have left behind."""
    for path in folder.glob(".*.*-*") if folder.is_dir() else ():
        try:
            if time.time() - path.stat().st_mtime < LEFT_OVER:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        except OSError:  # another one was quicker
            continue


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True, slots=True)
class References:
    """Images of prompts in a folder. An image is read, and compared with its sha256, when it is asked for."""

    folder: Path
    origin: Literal["vc2", "unknown"]  #: unknown: there is no record of how they were made
    digest: str  #: sha256 over ids and sha256 of all images
    settings: Mapping[str, Any]  #: how they were made; empty if that is unknown
    files: Mapping[str, tuple[tuple[str, str], ...]] = field(repr=False)  #: by prompt: paths below the folder, sha256
    prompts: Mapping[str, str] = field(repr=False)  #: `prompt_digest` by id; empty if that is unknown

    def images(self, prompt_id: str, prompt: str | None = None) -> list[np.ndarray]:
        """The five images of a prompt, each (H, W, 3) uint8.

        Args:
            prompt_id: Of the prompt.
            prompt: Its words, if they should be those that were painted.

        Raises:
            PretrainedMissing: If there are no images of it, or one has gone.
            WeightsError: If an image has changed, cannot be opened, or shows other words.
        """
        if prompt_id not in self.files:
            raise PretrainedMissing(
                f"{self.folder}: no images of prompt {prompt_id}; paint them, or give another folder"
            )
        if prompt is not None and self.prompts.get(prompt_id, prompt_digest(prompt)) != prompt_digest(prompt):
            raise WeightsError(f"{self.folder}: images of {prompt_id} were painted of other words; paint them again")
        return [_read_image(self.folder / name, sha256) for name, sha256 in self.files[prompt_id]]


def load_references(folder: Path) -> References:
    """Images of prompts that were painted before, here or elsewhere.

    Raises:
        PretrainedMissing: If there are none, not all of a prompt's, or painting was not finished.
        WeightsError: If what describes them cannot be read.
    """
    if not folder.is_dir():
        raise PretrainedMissing(f"{folder}: no such folder; expected images of the prompts, NNNN/0.png to 4.png")
    if not (folder / RECORD).exists():
        return _of_unknown_origin(folder)
    record = _read_record(folder)
    entries: Mapping[str, Mapping[str, Any]] = record["prompts"]
    files = {
        name: tuple((f"{name}/{number}.png", sha256) for number, sha256 in enumerate(entry["images"]))
        for name, entry in entries.items()
    }
    if not record["complete"] or not files:
        done = sum((folder / name).is_dir() for name in files)
        raise PretrainedMissing(f"{folder}: {done} of {len(files)} prompts are painted; go on painting")
    if lost := [path for of_one in files.values() for path, _ in of_one if not (folder / path).is_file()]:
        raise PretrainedMissing(f"{folder}: {len(lost)} images are missing: {', '.join(lost[:4])}; paint them again")
    prompts = {name: str(entry["sha256"]) for name, entry in entries.items()}
    return References(folder, "vc2", str(record["digest"]), record["settings"], files, prompts)


def _of_unknown_origin(folder: Path) -> References:
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*/*")) + sorted(folder.glob("*_*")):
        match = re.fullmatch(r"([^/]+)[/_](\d+)\.(?:png|jpe?g)", path.relative_to(folder).as_posix(), re.IGNORECASE)
        if match and path.is_file():
            found.setdefault(match[1], {})[int(match[2])] = path
    if not found:
        raise PretrainedMissing(f"{folder}: no images; expected NNNN/0.png to 4.png, or NNNN_0.png to NNNN_4.png")
    for name, numbers in found.items():
        if lost := [number for number in range(IMAGES) if number not in numbers]:
            raise PretrainedMissing(f"{folder}: image {lost[0]} of prompt {name} is missing; expected {IMAGES} of each")
    files = {
        name: tuple(
            (found[name][number].relative_to(folder).as_posix(), file_digest(found[name][number]).sha256)
            for number in range(IMAGES)
        )
        for name in sorted(found)
    }
    digest = _digest({name: [sha256 for _, sha256 in of_one] for name, of_one in files.items()})
    return References(folder, "unknown", digest, {}, files, {})


def _digest(images: Mapping[str, Sequence[str]]) -> str:
    return hashlib.sha256(canonical_json({name: list(of_one) for name, of_one in images.items()}).encode()).hexdigest()


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise WeightsError(f"{folder / RECORD}: is of format {record['format']}; this vc2 reads format {FORMAT}")
        for entry in record["prompts"].values():
            if len(entry["images"]) not in (0, IMAGES) or not isinstance(entry["sha256"], str):
                raise ValueError("a prompt's images are not five")
        return {key: record[key] for key in ("format", "complete", "settings", "prompts", "digest")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{folder / RECORD}: cannot be read ({type(error).__name__}: {error}); delete it to take the images as of "
            "unknown origin, or paint them again into another folder"
        ) from None


def _read_image(path: Path, sha256: str) -> np.ndarray:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PretrainedMissing(f"{path}: cannot be read ({error.strerror}); paint it again") from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise WeightsError(f"{path}: sha256 {found[:12]}, expected {sha256[:12]}: it has changed; paint it again")
    return _opened(data, path)


def _opened(data: bytes, path: Path) -> np.ndarray:
    """Pixels of a PNG or JPEG, whatever its name says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: its own limit of pixels, which is larger than ours
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise WeightsError(f"{path}: {image.width} x {image.height} pixels; expected 512 x 512")
                return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as error:
        raise WeightsError(f"{path}: is neither PNG nor JPEG, or damaged ({type(error).__name__})") from None
