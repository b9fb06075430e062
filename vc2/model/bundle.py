"""A whole model: every network that makes a video of a text, and what they were told in training.

On disk it is a folder of our own names:

    model.json                    a `ModelConfig`, and the frame rates the network was told, with their weights
    unet.safetensors              `vc2.model.weights.save_unet`; unet_ema.safetensors beside it: the averaged weights
    autoencoder.safetensors       `Autoencoder.save`
    text.safetensors              the text tower under OpenCLIP's names; absent where the tower is seeded
    image.safetensors             image tower and resampler under released names; only of an image-to-video model
    buffers.safetensors           tables of the noise schedule as a released checkpoint carried them; never needed

A checkpoint of the pipeline holds the same files, less the text tower, which it names. `Parts` is such a folder, or
any other form of the same model (`vc2.model.convert`), with no tensor read yet; `VideoModel` is the model at work.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from vc2.artifacts import FileEntry, Manifest
from vc2.errors import StoreError, WeightsError
from vc2.model.autoencoder import Autoencoder
from vc2.model.config import ModelConfig
from vc2.model.files import Tensors, fill, open_weights, published, write_tensors
from vc2.model.image import TOWER_PREFIX, ImageEncoder
from vc2.model.schedule import NoiseSchedule
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D
from vc2.model.weights import check_unet, fill_unet, part_of_checkpoint, resampler_to_released, text_from_clip
from vc2.pretrained import resolve
from vc2.storage import Store

__all__ = [
    "MODEL_FILE",
    "Parts",
    "VideoModel",
    "Weights",
    "image_to_released",
    "is_bundle",
    "read_model_json",
    "text_tower",
]

Weights = Literal["ema", "raw"]
MODEL_FILE = "model.json"
_UNET, _UNET_EMA = "unet.safetensors", "unet_ema.safetensors"
_AUTOENCODER, _TEXT, _IMAGE, _BUFFERS = (f"{name}.safetensors" for name in ("autoencoder", "text", "image", "buffers"))


@dataclass(frozen=True)
class VideoModel:
    """All networks of a text-to-video or image-to-video model, in evaluation mode, on one device."""

    config: ModelConfig
    unet: UNet3D
    schedule: NoiseSchedule
    autoencoder: Autoencoder
    text: TextEncoder
    fps: Mapping[int, int] = field(default_factory=dict)  # frame rates told in training, with their weights
    image: ImageEncoder | None = None  # of an image-to-video model

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "VideoModel":
        """The same model there; its networks move, they are not copied. `dtype` is of the denoising network alone."""
        self.unet.to(device, dtype)
        self.autoencoder.to(device)
        self.text.to(device)
        if self.image is not None:
            self.image.to(device)
        return self

    def save(self, folder: str | Path) -> None:
        """Write the model to a folder of our own names, replacing what was there.

        Raises:
            WeightsError: If the place cannot be written.
        """
        Parts.of(self).write(folder)

    @classmethod
    def load(cls, folder: str | Path, *, weights: Weights = "ema") -> "VideoModel":
        """The model in a folder of our own names, on the CPU; other forms: `vc2.model.convert.load_model`.

        Args:
            folder: Holds `model.json`.
            weights: Which weights of the denoising network, where the folder has both.

        Raises:
            WeightsError: If a file is missing or does not fit.
        """
        return Parts.read(folder, weights=weights).load()


@dataclass(frozen=True)
class Parts:
    """The tensors of a model by network, none of them read, and what shapes them. None: the source lacks that part."""

    config: ModelConfig
    unet: Tensors  # our names
    autoencoder: Tensors | None = None  # diffusers' names
    text: Tensors | None = None  # OpenCLIP's names, layers that are not used included
    image: Tensors | None = None  # released names
    buffers: Tensors = field(default_factory=lambda: Tensors({}))  # released names: tables of the noise schedule
    fps: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: VideoModel) -> "Parts":
        """The parts of a model in memory; a seeded text tower is none, its seed stands in the configuration."""
        return cls(
            config=model.config,
            unet=Tensors.of(model.unet.state_dict(), "denoising network"),
            autoencoder=Tensors.of(model.autoencoder.net.state_dict(), "autoencoder"),
            text=Tensors.of(model.text.tower.state_dict(), "text tower") if model.config.text.seed is None else None,
            image=None if model.image is None else image_to_released(model.image.state_dict()),
            fps=model.fps,
        )

    @classmethod
    def read(cls, folder: str | Path, *, weights: Weights = "ema") -> "Parts":
        """The parts in a folder of our own names.

        Raises:
            WeightsError: If `model.json` or the network's file is missing or cannot be read.
        """
        folder = Path(folder)
        config, fps = read_model_json(folder / MODEL_FILE)

        def part(name: str) -> Tensors | None:
            return open_weights(folder / name) if (folder / name).is_file() else None

        unet = (part(_UNET_EMA) if weights == "ema" else None) or open_weights(folder / _UNET)
        check_unet(config.unet, unet)
        return cls(
            config=config,
            unet=unet,
            autoencoder=part(_AUTOENCODER),
            text=part(_TEXT),
            image=part(_IMAGE),
            buffers=part(_BUFFERS) or Tensors({}),
            fps=fps,
        )

    @classmethod
    def of_checkpoint(cls, store: Store, manifest: Manifest, cache: Path, *, weights: Weights = "ema") -> "Parts":
        """The parts of a checkpoint in a store.

        Args:
            store: Where the checkpoint is.
            manifest: Of the checkpoint: files as in a folder, of which all but the network's and the autoencoder's may
                be absent, and in its config the shapes of the `model`.
            cache: Folder that files are fetched to, by their content.
            weights: Which weights of the denoising network.

        Raises:
            StoreError: If it is none of ours, or a file of it is damaged or gone.
        """
        try:
            config = ModelConfig.model_validate(manifest.config["model"])
        except (KeyError, ValidationError) as error:
            raise StoreError(
                f"checkpoint {manifest.fingerprint[:12]}: its manifest does not say which networks it holds ({error})"
            ) from None
        entries = {entry.name: entry for entry in manifest.files}

        def part(name: str) -> Tensors | None:
            return open_weights(_fetched(store, entries[name], cache)) if name in entries else None

        fps = read_model_json(_fetched(store, entries[MODEL_FILE], cache))[1] if MODEL_FILE in entries else {}
        return cls(
            config=config,
            unet=open_weights(_fetched(store, manifest.file(_UNET_EMA if weights == "ema" else _UNET), cache)),
            autoencoder=part(_AUTOENCODER),
            text=part(_TEXT),
            image=part(_IMAGE),
            buffers=part(_BUFFERS) or Tensors({}),
            fps=fps,
        )

    def write(self, folder: str | Path) -> None:
        """Write a folder of our own names, tensor by tensor; it appears whole or not at all."""
        published(Path(folder), self._write)

    def _write(self, folder: Path) -> None:
        folder.mkdir()
        (folder / MODEL_FILE).write_text(json.dumps(self.described(), indent=1, sort_keys=True))
        write_tensors(folder / _UNET, self.unet, {"config": self.config.unet.model_dump_json()})
        if self.autoencoder is not None:
            shape = self.config.autoencoder.model_dump_json()
            write_tensors(folder / _AUTOENCODER, self.autoencoder, {"config": shape})
        for name, tensors in ((_TEXT, self.text), (_IMAGE, self.image), (_BUFFERS, self.buffers)):
            if tensors:
                write_tensors(folder / name, tensors)

    def described(self) -> dict[str, Any]:
        """What `model.json` says."""
        return self.config.identity() | {"fps": {str(rate): weight for rate, weight in sorted(self.fps.items())}}

    def cast(self, dtype: torch.dtype | None) -> "Parts":
        """The same parts, the networks' numbers in another type once they are read; None keeps all as they are."""

        def other(tensors: Tensors | None) -> Tensors | None:
            return None if tensors is None else tensors.cast(dtype)

        return replace(
            self,
            unet=self.unet.cast(dtype),
            autoencoder=other(self.autoencoder),
            text=other(self.text),
            image=other(self.image),
        )

    def load(self, *, cache: Path | None = None) -> VideoModel:
        """The model, in float32 on the CPU; tensors are read one by one into the networks.

        Args:
            cache: Folder for a text tower that is named and lies in a mirror (`vc2.pretrained.resolve`).

        Raises:
            WeightsError: If a part is missing or does not fit.
            PretrainedMissing: If the text tower is named and not found.
        """
        config = self.config
        if self.autoencoder is None:
            raise WeightsError(
                f"{self.unet.what}: no autoencoder in it; give a whole checkpoint, or put {_AUTOENCODER} beside it"
            )
        autoencoder = Autoencoder(config.autoencoder)
        fill(autoencoder.net, self.autoencoder, what=f"{self.autoencoder.what}: autoencoder")
        image = None
        if config.image is not None:
            if self.image is None:
                raise WeightsError(f"{self.unet.what}: no image encoder in it, which an image-to-video network needs")
            image = ImageEncoder.from_released(config.image, self.image)
        return VideoModel(
            config=config,
            unet=fill_unet(config.unet, self.unet, what=f"{self.unet.what}: denoising network"),
            schedule=NoiseSchedule(config.schedule),
            autoencoder=autoencoder,
            text=self._text(cache),
            fps=self.fps,
            image=image,
        )

    def _text(self, cache: Path | None) -> TextEncoder:
        config = self.config
        if config.text.seed is not None:
            return TextEncoder(config.text)
        if self.text is not None:
            return TextEncoder.from_released(config.text, self.text)
        place = Path(config.text_path) if config.text_path else None
        path = resolve(config.text_weights, path=place, cache=cache)
        return TextEncoder.from_released(config.text, text_tower(path))


def image_to_released(state: Mapping[str, Tensor]) -> Tensors:
    """Tensors of an `ImageEncoder` under released names; none is read."""
    tensors = Tensors.of(state, "image encoder")

    def part(prefix: str) -> Tensors:
        return tensors.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)

    tower = part("tower.").renamed(lambda name: TOWER_PREFIX + name)
    return tower | resampler_to_released(part("resampler.")).renamed(lambda name: f"image_proj_model.{name}")


def _fetched(store: Store, entry: FileEntry, cache: Path) -> Path:
    path = cache / f"{entry.sha256}.safetensors"
    if not path.is_file() or path.stat().st_size != entry.size:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            store.download(entry.key, path, sha256=entry.sha256)
        except KeyError:
            raise StoreError(f"{store.uri}/{entry.key} ({entry.name} of a checkpoint) is gone; make it again") from None
        except OSError as error:
            raise StoreError(f"{cache}: cannot be written ({error.strerror}); choose another --work") from None
    return path


def is_bundle(place: Path) -> bool:
    """Whether a place is a folder of our own names."""
    return (place / MODEL_FILE).is_file()


def read_model_json(path: Path) -> tuple[ModelConfig, dict[int, int]]:
    """The configuration in a `model.json`, and the frame rates with their weights.

    Raises:
        WeightsError: If it is missing or says something else.
    """
    try:
        described = json.loads(path.read_text())
        fps = {int(rate): int(weight) for rate, weight in described.pop("fps", {}).items()}
        return ModelConfig.model_validate(described), fps
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); give a folder that holds one") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WeightsError(f"{path}: {where}: {first['msg']}; it was written by another version") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path}: not a model.json ({error})") from None


def text_tower(place: str | Path) -> Tensors:
    """The text tower in a file or folder under OpenCLIP's names, unread if it has them already.

    Args:
        place: OpenCLIP's own file, a released or LDM checkpoint, or the `text_encoder` of a diffusers folder.
    """
    tensors = part_of_checkpoint(open_weights(place, "text_encoder"), "cond_stage_model.model.")
    if any(name.removeprefix("text_model.").startswith("encoder.layers.") for name in tensors):
        return Tensors.of(text_from_clip(tensors), tensors.what)
    return tensors
