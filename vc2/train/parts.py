"""The parts of a run on one rank: the network at its initial weights, and the frozen encoders."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vc2.artifacts import FileEntry, load_manifest
from vc2.errors import ConfigError, WeightsError
from vc2.model.autoencoder import Autoencoder
from vc2.model.config import UNetConfig
from vc2.model.partition import group_of
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D
from vc2.model.weights import load_sd_unet, load_unet
from vc2.pretrained import resolve
from vc2.seeding import derive_seed
from vc2.storage import Store, file_digest
from vc2.train.config import TrainStage
from vc2.train.request import EMA_WEIGHTS, RAW_WEIGHTS, RankRequest

__all__ = [
    "build_autoencoder",
    "build_text_encoder",
    "build_unet",
    "check_unchanged",
    "digest_of_tensors",
    "parameter_counts",
]


def build_unet(request: RankRequest, store: Store, work: Path) -> UNet3D:
    """The network with the weights that training starts from: a checkpoint's, Stable Diffusion's, or seeded ones.

    Raises:
        ConfigError: If the checkpoint's network has another shape than the one asked for.
    """
    config = request.stage
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    unet = UNet3D(config.model.unet)
    if request.start_from is not None:
        name = EMA_WEIGHTS if config.start_weights == "ema" else RAW_WEIGHTS
        manifest = load_manifest(store, request.start_from.prefix)
        started = load_unet(_fetched(store, manifest.file(name), work))
        if started.config.identity() != config.model.unet.identity():
            raise ConfigError(
                f"{request.start_from.uri} holds another network than model.unet asks for: "
                f"{_difference(started.config, config.model.unet)}"
            )
        unet.load_state_dict(started.state_dict())
    elif config.sd_init:
        load_sd_unet(unet, load_file(_sd_file(config, work)))
    return unet


def _difference(found: UNetConfig, asked: UNetConfig) -> str:
    ours = asked.identity()
    return ", ".join(
        f"{name}={value} (asked: {ours[name]})" for name, value in found.identity().items() if value != ours[name]
    )


def _sd_file(config: TrainStage, work: Path) -> Path:
    path = resolve(config.sd_init, path=Path(config.sd_path) if config.sd_path else None, cache=work / "pretrained")
    if config.sd_sha256 and (found := file_digest(path).sha256) != config.sd_sha256:
        raise WeightsError(
            f"{path}: sha256 {found[:12]}, sd_sha256 says {config.sd_sha256[:12]}; give the file that was asked for"
        )
    return path


def build_autoencoder(config: TrainStage, file: FileEntry, store: Store, work: Path) -> Autoencoder:
    """The frozen autoencoder."""
    return Autoencoder.from_safetensors(_fetched(store, file, work), config.model.autoencoder)


def build_text_encoder(config: TrainStage, work: Path) -> TextEncoder:
    """The frozen text tower: seeded, or released weights."""
    model = config.model
    if model.text.seed is not None:
        return TextEncoder(model.text)
    path = resolve(
        model.text_weights, path=Path(model.text_path) if model.text_path else None, cache=work / "pretrained"
    )
    return TextEncoder.from_released(model.text, load_file(path))


def _fetched(store: Store, file: FileEntry, work: Path) -> Path:
    path = work / "objects" / file.sha256
    if not path.exists():
        store.download(file.key, path, sha256=file.sha256)
    return path


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names and bytes of tensors: equal if and only if every bit is."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        sha256.update(name.encode() + b"\0")
        sha256.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def parameter_counts(unet: UNet3D, trainable: frozenset[str]) -> dict[str, int]:
    """Parameters by fate and by group: `total`, `trainable`, `frozen`; `spatial`, `temporal`, `image`, `lora`."""
    counts = {"total": 0, "trainable": 0, "frozen": 0}
    for name, parameter in unet.named_parameters():
        fate = "trainable" if name in trainable else "frozen"
        for key in ("total", fate, "lora" if ".lora_" in name else group_of(name)):
            counts[key] = counts.get(key, 0) + parameter.numel()
    return counts


def check_unchanged(before: str, after: str, what: str) -> None:
    """Raise `WeightsError` unless two digests of frozen tensors are equal."""
    if before != after:
        raise WeightsError(
            f"{what} changed during training (sha256 {before[:12]} -> {after[:12]}): a defect; nothing was committed"
        )
