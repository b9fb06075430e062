"""From a train state to a checkpoint: whole weights, raw and averaged, with everything that sampling needs.

Any committed state can become a checkpoint: trained parameters are put together from the fragments of all ranks, frozen
ones come from where training started. Low-rank updates are merged into the weights they update; the averaged ones also
stand in a file of their own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vc2.artifacts import Artifact, FileEntry, Manifest, checkpoint_prefix, commit, load_manifest, put_file, put_object
from vc2.model.files import write_weights
from vc2.model.lora import merged_state_dict, save_lora
from vc2.model.unet import UNet3D
from vc2.model.weights import save_unet
from vc2.train.attempts import Run, StateManifest
from vc2.train.config import STAGE_VERSION, TrainStage
from vc2.train.fragments import assemble
from vc2.train.request import (
    AUTOENCODER,
    EMA_WEIGHTS,
    IMAGE_WEIGHTS,
    LORA,
    MODEL_CONFIG,
    RAW_WEIGHTS,
    TEXT_WEIGHTS,
    RankRequest,
)
from vc2.train.states import state_files

__all__ = ["commit_checkpoint", "weights_of_state"]


def weights_of_state(
    run: Run, state: StateManifest, kind: str, shapes: Mapping[str, torch.Size], work: Path
) -> dict[str, Tensor]:
    """Whole trained parameters of a state: `kind` is "master" (raw) or "ema"."""
    with state_files(run, state, kind, work) as paths:
        return assemble(paths, shapes)


def commit_checkpoint(
    request: RankRequest,
    run: Run,
    state: StateManifest,
    unet: UNet3D,
    trainable: frozenset[str],
    work: Path,
    *,
    counts: Mapping[str, int],
    facts: Mapping[str, Any],
    licenses: Mapping[str, str],
    seconds: float,
    fps: Mapping[int, int],
) -> Artifact:
    """Write weights, model and manifest of a state.

    Args:
        unet: The network with its frozen parameters; its trained ones are overwritten.
        fps: Frame rates that the network was told, with their weights.

    Raises:
        Superseded: If a newer attempt has taken over.
    """
    prefix = checkpoint_prefix(run.stage, run.fingerprint, state.step)
    shapes = {name: parameter.shape for name, parameter in unet.named_parameters() if name in trainable}
    files = []
    for kind, name in (("master", RAW_WEIGHTS), ("ema", EMA_WEIGHTS)):
        _fill(unet, weights_of_state(run, state, kind, shapes, work))
        path = work / f"export-{run.fingerprint[:12]}-{name}"
        if request.stage.strategy.lora is None:
            save_unet(unet, path)
        else:  # readers of checkpoints need not know of it
            write_weights(path, merged_state_dict(unet), unet.config)
        files.append(put_object(run.store, path, name))
        path.unlink()
    if request.stage.strategy.lora is not None:
        path = work / f"export-{run.fingerprint[:12]}-{LORA}"
        save_lora(unet, path, request.stage.strategy.lora)
        files.append(put_object(run.store, path, LORA))
        path.unlink()
    files.append(request.autoencoder.evolve(name=AUTOENCODER))
    if request.start_from is not None:  # what an imported model brought along goes on with it
        before = load_manifest(run.store, request.start_from.prefix).files
        files += [file for file in before if file.name in (TEXT_WEIGHTS, IMAGE_WEIGHTS)]
    files.append(_put_model(run, prefix, request.stage, fps))
    manifest = Manifest(
        kind="checkpoint",
        stage=run.stage,
        stage_version=STAGE_VERSION,
        fingerprint=run.fingerprint,
        repeat=request.repeat,
        config=request.stage.model_dump(mode="json"),
        inputs=request.inputs,
        files=tuple(files),
        counts={"steps": state.step, "samples": state.samples, **counts},
        facts=dict(facts),
        licenses=dict(licenses),
        seconds=seconds,
    )
    run.ensure_newest(request.attempt)
    return commit(run.store, prefix, manifest)


@torch.no_grad()
def _fill(unet: UNet3D, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in unet.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])


def _put_model(run: Run, prefix: str, config: TrainStage, fps: Mapping[int, int]) -> FileEntry:
    model = config.model.identity() | {"fps": {str(rate): weight for rate, weight in sorted(fps.items())}}
    text = json.dumps(model, indent=1, sort_keys=True)
    return put_file(run.store, prefix, MODEL_CONFIG, text.encode())
