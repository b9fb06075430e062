"""Models from elsewhere and to elsewhere: `vc2 convert`, and checkpoints that were not trained here.

An imported model is a checkpoint in a store, so that training, sampling and scoring go on from it. What is committed
looks like what training commits, under the stage name `imported`: raw and averaged weights (the same file under both
names), autoencoder, `model.json`, and the text tower if the model brought one. It is named by its content: importing
the same model again finds it.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from vc2.artifacts import (
    Artifact,
    Checkpoint,
    FileEntry,
    Manifest,
    checkpoint_prefix,
    commit,
    find,
    load_manifest,
    put_object,
)
from vc2.config import digest
from vc2.errors import ConfigError
from vc2.model.bundle import MODEL_FILE, Parts, Weights
from vc2.model.convert import (
    Form,
    answers_with_noise,
    check_unneeded,
    grown,
    parameter_counts,
    read_model,
    write_model,
)
from vc2.model.convert import Found as FoundModel
from vc2.pipeline.driver import IMPORTED
from vc2.storage import Store, open_store
from vc2.train.request import AUTOENCODER, EMA_WEIGHTS, RAW_WEIGHTS

__all__ = ["Converted", "convert", "import_model", "is_checkpoint_uri"]

STAGE_VERSION = 1
_MANIFEST = "manifest.json"  # of an artifact, the file by which it exists


def import_model(found: FoundModel, store: Store, work: Path, *, source: str) -> Checkpoint:
    """Commit a model as a checkpoint; if the store has it already, that one is given back.

    Args:
        found: The model; an image network is grown to a video network first.
        store: Where it goes.
        work: Folder of this machine for passing files, as large as the model.
        source: Where it came from, for the manifest.

    Raises:
        ConfigError: If the model has no autoencoder, without which neither training nor sampling can begin.
        WeightsError: If its tensors cannot be read.
    """
    parts = grown(found.parts) if found.is_image_network else found.parts
    if parts.autoencoder is None:
        raise ConfigError(
            f"{source}: no autoencoder in it, which a checkpoint needs; give a whole checkpoint, or a folder with "
            f"{AUTOENCODER}"
        )
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{work}: cannot be written ({error.strerror}); choose another --work") from None
    with tempfile.TemporaryDirectory(dir=work) as passing:
        folder = Path(passing) / "model"
        parts.write(folder)
        return _committed(folder, parts, found, store, source)


def _committed(folder: Path, parts: Parts, found: FoundModel, store: Store, source: str) -> Checkpoint:
    files: list[FileEntry] = []
    for path in sorted(folder.iterdir()):
        entry = put_object(store, path, path.name)
        files += [entry, entry.evolve(name=EMA_WEIGHTS)] if path.name == RAW_WEIGHTS else [entry]
    names = {entry.name: entry.sha256 for entry in files}
    fingerprint = digest({"stage": IMPORTED, "version": STAGE_VERSION, "files": names})
    prefix = checkpoint_prefix(IMPORTED, fingerprint, 0)
    if done := find(store, prefix, Checkpoint):
        return done
    counts = {f"{group}_parameters": count for group, count in parameter_counts(parts.unet).items()}
    committed: Artifact = commit(
        store,
        prefix,
        Manifest(
            kind="checkpoint",
            stage=IMPORTED,
            stage_version=STAGE_VERSION,
            fingerprint=fingerprint,
            config={"model": parts.config.model_dump(mode="json")},
            inputs={},
            files=tuple(files),
            counts={"steps": 0, "samples": 0, "trainable_parameters": 0, **counts},
            facts={"source": source, "form": found.form, "recognised_as": found.words},
            licenses={"weights": f"those of {source}"},
        ),
    )
    assert isinstance(committed, Checkpoint)
    return committed


@dataclass(frozen=True, slots=True)
class Converted:
    """What `convert` found and wrote."""

    source: str
    form: str  # of the source
    recognised_as: str
    parameters: dict[str, int]  # total, spatial, temporal, image
    parts: tuple[str, ...]  # besides the network
    destination: str
    to: str
    caution: str = ""  # what may be wrong with it


def is_checkpoint_uri(place: str) -> bool:
    """Whether a place is meant as an artifact in a store, and not as a file or folder with a model."""
    return "://" in place or Path(place).name == _MANIFEST or (Path(place) / _MANIFEST).is_file()


def convert(
    source: str,
    destination: str,
    to: str,
    work: Path,
    *,
    fps: int | None = None,
    dtype: str | None = None,
    weights: Weights = "ema",
    hyper_parameters: Path | None = None,
    force: bool = False,
) -> Converted:
    """Bring a model from one form to another.

    Args:
        source: A file or folder of any form of `vc2.model.convert`, or the URI of a checkpoint in a store.
        destination: A file or folder; for form `checkpoint` a store.
        to: A form, or `checkpoint`.
        work: Folder of this machine for passing files.
        fps: The one frame rate of form `diffusers`.
        dtype: Type of the networks' numbers; None: as they are.
        weights: Which of the denoising network's weights, where the source has both.
        hyper_parameters: VideoCrafter's YAML file, for what shapes do not tell.
        force: Replace what is there.

    Raises:
        ConfigError: If source and destination are one, something is in the way, or the form cannot hold the model.
        WeightsError: If the source is no model, or not all of one.
    """
    if to == "checkpoint" and fps is not None:
        raise ConfigError("--fps belongs to the form `diffusers`, not to a checkpoint")
    if to != "checkpoint":
        _check_free(source, Path(destination), to, force)
    found = _found(source, work, weights, hyper_parameters)
    grows = found.is_image_network and to not in ("sd-ldm", "sd-diffusers")
    if dtype is not None:
        found = replace(found, parts=found.parts.cast(getattr(torch, dtype)))
    if to == "checkpoint":
        written = import_model(found, open_store(destination), work, source=source).uri
    else:
        write_model(found, destination, cast(Form, to), fps=fps)
        written = destination
    return Converted(
        source=source,
        form=found.form,
        recognised_as=found.words,
        parameters=parameter_counts(found.parts.unet),
        parts=tuple(name for name in ("autoencoder", "text", "image") if getattr(found.parts, name) is not None),
        destination=written,
        to=to,
        caution="" if not grows or answers_with_noise(found.parts) else _NO_NOISE.format(source=source),
    )


_NO_NOISE = (
    "{source}: its answer to pure noise is not that noise, so it may predict velocity (v), as Stable Diffusion 2.1 at "
    "768 does, or have learnt nothing; what was grown from it predicts noise only if it does, as 2.1-base"
)


def _found(source: str, work: Path, weights: Weights, hyper_parameters: Path | None) -> FoundModel:
    if is_checkpoint_uri(source):
        check_unneeded(hyper_parameters, f"{source}: a checkpoint")
        root, runs, rest = source.removesuffix("/").removesuffix(f"/{_MANIFEST}").rpartition("/runs/")
        if not runs:
            raise ConfigError(f"{source}: not the URI of a checkpoint; expected <store>/runs/<stage>/.../checkpoints/N")
        store = open_store(root)
        manifest = load_manifest(store, f"runs/{rest}")
        if manifest.kind != "checkpoint":
            raise ConfigError(f"{source} is a {manifest.kind}; expected a checkpoint")
        parts = Parts.of_checkpoint(store, manifest, work / "convert", weights=weights)
        return FoundModel("vc2", f"a checkpoint of stage {manifest.stage}", parts)
    return read_model(source, weights=weights, hyper_parameters=hyper_parameters)


def _check_free(source: str, destination: Path, to: str, force: bool) -> None:
    """Raise `ConfigError` unless a model may be written there."""
    if "://" in str(destination) or str(destination).startswith("s3:"):
        raise ConfigError(f"form {to} is written to a local place; only --to checkpoint goes to a store")
    place, origin = destination.resolve(), Path(source).resolve()
    if place == origin or origin in place.parents or place in origin.parents:
        raise ConfigError(f"{source} and {destination} are one place, or one lies in the other; choose another")
    is_file = to in ("released", "sd-ldm")
    if is_file and (destination.is_dir() or not destination.suffix):
        raise ConfigError(f"{destination}: form {to} is one file; give a name that ends in .safetensors or .ckpt")
    if not is_file and destination.is_file():
        raise ConfigError(f"{destination} is a file; form {to} is a folder, give another name")
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not force:
        raise ConfigError(f"{destination} is there already; choose another name, or replace it with --force")
    if destination.is_dir() and not any((destination / name).is_file() for name in (MODEL_FILE, "model_index.json")):
        raise ConfigError(
            f"{destination} holds something else than a model, which is not replaced; choose another name"
        )
    if destination.is_dir() and (strange := _not_of_a_model(destination)):
        raise ConfigError(
            f"{destination} holds {', '.join(strange[:3])} beside a model, which would be lost; choose another name"
        )


_OF_A_MODEL = {  # what our forms and those of diffusers keep in a folder, besides files of weights
    MODEL_FILE, "model_index.json", "README.md", "pipeline.py", "vc2.json", "unet", "vae", "text_encoder", "tokenizer",
    "scheduler", "image_encoder", "feature_extractor", "safety_checker",
}  # fmt: skip


def _not_of_a_model(folder: Path) -> list[str]:
    found = (entry for entry in folder.iterdir() if entry.suffix != ".safetensors" or entry.is_dir())
    return sorted(entry.name for entry in found if entry.name not in _OF_A_MODEL and not entry.name.startswith("."))
