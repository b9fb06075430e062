"""LoRA: learn a low-rank update of a layer and leave its weight alone.

    y = W x + (alpha / rank) B A x,    A: rank rows, drawn;  B: rank columns, zero at first        Hu et al. 2021, Eq. 3

In a convolution A has the kernel of W and B has size 1, the (3, 1, 1) convolutions over frames and the 1-D projections
included. The layers are those of peft, put in place inside a `UNet3D`; parameter names stay in their group
(`vc2.model.partition`), so spatial, temporal and all can be tuned this way as directly.

Tuning on images alone leaves out the layers that say nothing there (`vc2.model.stills`), and convolutions over frames:
their A has taps for neighbours too, drawn at random, so what B learns at the middle tap would reach the others unseen.

A LoRA file is safetensors: `<our name of the layer>.lora_A.weight` and `.lora_B.weight`, its `LoraConfig` beside them.
Those that our diffusers pipeline saves (`unet.` before the names, the settings of peft beside them) are read too.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vc2.errors import ConfigError, WeightsError
from vc2.model.config import LoraConfig, LoraTarget
from vc2.model.files import check_shapes, open_weights, write_weights
from vc2.model.partition import Trainable, group_of
from vc2.model.stills import frame_convs, silent_on_stills

__all__ = [
    "add_lora",
    "load_lora",
    "lora_names",
    "lora_state_dict",
    "lora_targets",
    "merge_lora",
    "merged_state_dict",
    "read_lora",
    "save_lora",
]

_ADAPTER = "default"
_PEFT_SETTINGS = "lora_adapter_metadata"  # where diffusers keeps them in a file

# The last words of a layer's name, by the kind of layer.
_KINDS: dict[str, LoraTarget] = {
    "query": "attention",
    "key": "attention",
    "value": "attention",
    "image_key": "attention",
    "image_value": "attention",
    "proj_in": "projection",
    "proj_out": "projection",
    "embedding": "embedding",
    "hidden": "embedding",
    "value_and_gate": "feed_forward",
}


def lora_targets(unet: nn.Module, config: LoraConfig, trainable: Trainable, *, stills: bool = False) -> list[str]:
    """Names of the layers of a `UNet3D` that get an update: of the kinds asked for, in the group asked for.

    With `stills` only those that act on a clip of one frame, and change nothing else of longer ones.

    Raises:
        ConfigError: If there are none.
    """
    left_out = silent_on_stills(unet) | {name for name, _ in frame_convs(unet)} if stills else frozenset[str]()
    names = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and ".lora_" not in name
        and _kind(name, module) in config.targets
        and trainable in ("all", group_of(name))
        and name not in left_out
    ]
    if not names:
        raise ConfigError(
            f"lora.targets={config.targets} with trainable={trainable!r}: this network has no such layers"
            + (" that images could teach" if stills else "")
        )
    return names


def _kind(name: str, module: nn.Module) -> LoraTarget:
    *_, parent, last = ("", *name.split("."))
    if last == "out":
        return "feed_forward" if parent == "feed_forward" else "embedding" if "embedding" in parent else "attention"
    return _KINDS.get(last, "convolution")


def add_lora(unet: nn.Module, config: LoraConfig, trainable: Trainable, *, stills: bool = False) -> list[str]:
    """Put updates into a `UNet3D`, in place. They add zero at first; A is drawn from torch's global generator.

    `stills`: training sees images alone (see `lora_targets`).

    Returns:
        Names of the new parameters, in the order of `named_parameters()`: those to train.

    Raises:
        ConfigError: If no layer fits, or the network has updates already.
    """
    if any(True for _ in _layers(unet)):
        raise ConfigError("this network has LoRA layers already: merge them (merge_lora) before adding others")
    _inject(unet, config, lora_targets(unet, config, trainable, stills=stills))
    return lora_names(unet)


def _inject(unet: nn.Module, config: LoraConfig, layers: list[str]) -> None:
    import peft

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - used as a number, whatever its kind
        lora_dropout=config.dropout,
        target_modules=layers,
    )
    peft.inject_adapter_in_model(settings, unet, _ADAPTER)


def lora_names(unet: nn.Module) -> list[str]:
    """Names of the parameters of all updates in a network."""
    return [name for name, _ in unet.named_parameters() if ".lora_" in name]


def _layers(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in unet.named_modules() if isinstance(module, LoraLayer))


@torch.no_grad()
def merged_state_dict(unet: nn.Module) -> dict[str, Tensor]:
    """The tensors of the network without LoRA that computes the same, under its plain names; the network stays."""
    state = {name: t for name, t in unet.state_dict().items() if ".lora_" not in name}
    for name, layer in _layers(unet):
        weight = f"{name}.base_layer.weight"
        state[weight] = state[weight] + layer.get_delta_weight(_ADAPTER).to(state[weight])
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}


def merge_lora(unet: nn.Module) -> None:
    """Add all updates to the weights they update and take the LoRA layers out, in place."""
    for name, layer in list(_layers(unet)):
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(unet.get_submodule(parent), last, layer.get_base_layer())


def lora_state_dict(unet: nn.Module) -> dict[str, Tensor]:
    """The updates alone, under the names of a LoRA file."""
    return {name.replace(f".{_ADAPTER}.", "."): t for name, t in unet.state_dict().items() if ".lora_" in name}


def save_lora(unet: nn.Module, path: str | Path, config: LoraConfig) -> None:
    """Write the updates of a network to one safetensors file."""
    write_weights(path, lora_state_dict(unet), config)


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], LoraConfig]:
    """The updates in a LoRA file under our names, and their settings (of which `targets` may be unknown).

    Raises:
        WeightsError: If the file is no LoRA file of ours or of our pipeline.
    """
    tensors = open_weights(path)
    state = {name.removeprefix("unet."): tensors[name] for name in tensors}
    if not state or not all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in state):
        raise WeightsError(f"{path}: not a LoRA file; expected tensors called ....lora_A.weight and ....lora_B.weight")
    try:
        if "config" in tensors.metadata:
            return state, LoraConfig.model_validate_json(tensors.metadata["config"])
        theirs = json.loads(tensors.metadata.get(_PEFT_SETTINGS, "{}"))
        ranks = {tensor.shape[0] for name, tensor in state.items() if ".lora_A." in name}
        rank = theirs.get("unet.r", min(ranks))
        alpha, dropout = theirs.get("unet.lora_alpha", rank), theirs.get("unet.lora_dropout", 0.0)
        return state, LoraConfig(rank=rank, alpha=alpha, dropout=dropout)
    except ValueError as error:
        raise WeightsError(f"{path}: its LoRA settings cannot be read ({str(error).splitlines()[0]})") from None


@torch.no_grad()
def load_lora(unet: nn.Module, path: str | Path) -> LoraConfig:
    """Put the updates of a file into a network without LoRA, in place. Frozen: thaw what should learn on.

    Raises:
        WeightsError: If the file is no LoRA file, or not for this network; the network stays as it was.
    """
    state, config = read_lora(path)
    layers = {name.rpartition(".lora_")[0] for name in state}
    modules = dict(unet.named_modules())
    unknown = sorted(layers - modules.keys())
    if unknown:
        raise WeightsError(
            f"{path}: made for another network: {len(unknown)} of its {len(layers)} layers are not in this one "
            f"({', '.join(unknown[:3])}, ...)"
        )
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        _inject(unet, config, sorted(layers))
    own = {name.replace(f".{_ADAPTER}.", "."): t for name, t in unet.state_dict().items() if ".lora_" in name}
    try:
        check_shapes(
            {name: tuple(t.shape) for name, t in own.items()},
            {name: tuple(t.shape) for name, t in state.items()},
            what=str(path),
        )
    except WeightsError:
        for name in layers:
            parent, _, last = name.rpartition(".")
            setattr(unet.get_submodule(parent), last, modules[name])
        raise
    for name, tensor in own.items():
        tensor.copy_(state[name])
    for name in lora_names(unet):
        unet.get_parameter(name).requires_grad_(False)
    return config
