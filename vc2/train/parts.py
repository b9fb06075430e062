"""The parts of a run on one rank: the network at its initial weights, and the frozen encoders."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from vc2.artifacts import FileEntry, Manifest, load_manifest
from vc2.config import Config
from vc2.errors import ConfigError, WeightsError
from vc2.model.autoencoder import Autoencoder
from vc2.model.bundle import text_tower
from vc2.model.config import ModelConfig, UNetConfig
from vc2.model.files import Tensors, open_weights, read_weights
from vc2.model.lora import add_lora
from vc2.model.partition import group_of, trainable_names
from vc2.model.stills import split_taps
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D
from vc2.model.weights import fill_unet, load_sd_unet, looks_like_noise_prediction
from vc2.pretrained import resolve
from vc2.seeding import derive_seed
from vc2.storage import Store, file_digest
from vc2.train.config import TrainStage
from vc2.train.request import EMA_WEIGHTS, RAW_WEIGHTS, TEXT_WEIGHTS, RankRequest

__all__ = [
    "autoencoder_of_file",
    "autoencoder_of_start",
    "build_autoencoder",
    "build_text_encoder",
    "build_unet",
    "check_unchanged",
    "digest_of_tensors",
    "parameter_counts",
    "put_learning",
]

log = logging.getLogger(__name__)


def build_unet(request: RankRequest, store: Store, work: Path) -> UNet3D:
    """The network with the weights that training starts from: a checkpoint's, Stable Diffusion's, or seeded ones.

    Raises:
        ConfigError: If the checkpoint's network has another shape than the one asked for.
        WeightsError: If the weights do not fit.
    """
    config = request.stage
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    if request.start_from is not None:
        name = EMA_WEIGHTS if config.start_weights == "ema" else RAW_WEIGHTS
        manifest = load_manifest(store, request.start_from.prefix)
        path = _fetched(store, manifest.file(name), work)
        weights, shape = read_weights(path, UNetConfig)
        if shape is None:
            raise ConfigError(f"{request.start_from.uri}/{name} does not say which shape its network has")
        started = _model_of(manifest, shape)
        for part in ("unet", "schedule", "autoencoder", "text"):
            found, asked = getattr(started, part), getattr(config.model, part)
            if found.identity() != asked.identity():
                raise ConfigError(
                    f"{request.start_from.uri} holds another model than model.{part} asks for: "
                    f"{_difference(found, asked)}"
                )
        return fill_unet(config.model.unet, weights, what=f"{request.start_from.uri}/{name}")
    unet = UNet3D(config.model.unet)
    if config.sd_init:
        weights = _sd_weights(config, work)
        load_sd_unet(unet, weights)
        if not looks_like_noise_prediction(unet):
            log.warning(
                "%s: its answer to pure noise is not that noise, so it may predict velocity (v) or have learnt "
                "nothing; VideoCrafter's networks predict noise, as Stable Diffusion 2.1-base does",
                weights.what,
            )
    return unet


def put_learning(unet: UNet3D, request: RankRequest) -> list[str]:
    """Names of the parameters that learn, in a network at its initial weights; those that training adds are put in
    place: low-rank updates, or taps split off where images alone are learnt from."""
    config, strategy = request.stage, request.stage.strategy
    stills = request.of_stills
    if strategy.lora is None:
        if stills and strategy.trainable != "spatial":
            split_taps(unet)
        return trainable_names(unet, strategy.trainable, stills=stills)
    torch.manual_seed(derive_seed(config.seed, "low-rank updates"))
    return add_lora(unet, strategy.lora, strategy.trainable, stills=stills)


def _model_of(manifest: Manifest, unet: UNetConfig) -> ModelConfig:
    """What a checkpoint's manifest says of the model, with the shape that stands in its network's own file."""
    try:
        return ModelConfig.model_validate(manifest.config["model"]).evolve(unet=unet)
    except (KeyError, ValidationError) as error:
        raise ConfigError(
            f"checkpoint {manifest.fingerprint[:12]} does not say which model it holds ({error})"
        ) from None


def _difference(found: Config, asked: Config) -> str:
    ours = asked.identity()
    return ", ".join(
        f"{name}={value} (asked: {ours[name]})" for name, value in found.identity().items() if value != ours[name]
    )


def _sd_weights(config: TrainStage, work: Path) -> Tensors:
    """Stable Diffusion's image network, unread: an LDM file or a folder of diffusers."""
    path = resolve(config.sd_init, path=Path(config.sd_path) if config.sd_path else None, cache=work / "pretrained")
    weights = open_weights(path)
    if config.sd_sha256 and (found := file_digest(weights.path or path).sha256) != config.sd_sha256:
        raise WeightsError(
            f"{weights.what}: sha256 {found[:12]}, sd_sha256 says {config.sd_sha256[:12]}; give the file that was "
            "asked for"
        )
    return weights


def autoencoder_of_start(config: TrainStage, work: Path) -> Path:
    """The autoencoder that lies beside the image network which training starts from, in a file of ours.

    Raises:
        PretrainedMissing: If the weights are named and not found.
        WeightsError: If there is no autoencoder in them, or it does not fit.
    """
    path = resolve(config.sd_init, path=Path(config.sd_path) if config.sd_path else None, cache=work / "pretrained")
    if not path.is_dir() and not any(name.startswith("first_stage_model.") for name in open_weights(path)):
        raise WeightsError(
            f"{path}: no autoencoder in it (first_stage_model.*); set model.autoencoder_path to a file of one"
        )
    return autoencoder_of_file(config, path, work)


def autoencoder_of_file(config: TrainStage, path: Path, work: Path) -> Path:
    """The autoencoder in a file or folder of any form (LDM, diffusers, a whole checkpoint), in a file of ours.

    Raises:
        WeightsError: If it is none, or of another shape than `model.autoencoder`.
    """
    target = work / "autoencoder.safetensors"
    Autoencoder.from_released(config.model.autoencoder, open_weights(path, "vae")).save(target)
    return target


def build_autoencoder(config: TrainStage, file: FileEntry, store: Store, work: Path) -> Autoencoder:
    """The frozen autoencoder."""
    return Autoencoder.from_safetensors(_fetched(store, file, work), config.model.autoencoder)


def build_text_encoder(request: RankRequest, store: Store, work: Path) -> TextEncoder:
    """The frozen text tower: seeded, or trained weights, from the place that is named or the checkpoint started from.

    Raises:
        PretrainedMissing: If the weights are named and not found.
        WeightsError: If they do not fit.
    """
    model = request.stage.model
    if model.text.seed is not None:
        return TextEncoder(model.text)
    if not model.text_path and request.start_from is not None:
        files = {file.name: file for file in load_manifest(store, request.start_from.prefix).files}
        if TEXT_WEIGHTS in files:  # an imported model brings its own
            return TextEncoder.from_released(model.text, open_weights(_fetched(store, files[TEXT_WEIGHTS], work)))
    path = resolve(
        model.text_weights, path=Path(model.text_path) if model.text_path else None, cache=work / "pretrained"
    )
    return TextEncoder.from_released(model.text, text_tower(path))


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
