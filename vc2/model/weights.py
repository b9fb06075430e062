"""Foreign names of our parameters: the one place that knows them.

Three schemes name the same tensors: the *released* VideoCrafter checkpoints, *LDM* (Stable Diffusion's original files)
and *diffusers*. A table of places (`_places`) says where a module of ours sits in each; a table of leaves (`_LEAVES`)
says what a layer inside such a module is called. In the released names every temporal transformer is one more child of
its block, which shifts what follows it against LDM: loading Stable Diffusion by equal names would misplace tensors.

A load is whole or an error: every tensor of the network found, none left over, all of the expected shape.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from vc2.errors import ConfigError, WeightsError
from vc2.model.config import UNetConfig
from vc2.model.files import check_shapes, fill, read_weights, write_weights
from vc2.model.partition import group_of
from vc2.model.unet import UNet3D

__all__ = [
    "autoencoder_from_released",
    "config_from_released",
    "leaf_names",
    "load_released_unet",
    "load_sd_unet",
    "load_unet",
    "part_of_checkpoint",
    "released_hyper_parameters",
    "released_names",
    "released_state_dict",
    "resampler_from_released",
    "save_unet",
    "sd_names",
]

UNET_PREFIX = "model.diffusion_model."

# ---------------------------------------------------------------------------------------------------------------------
# Names


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module of ours sits in foreign checkpoints; None: the image network has no such module."""

    released: str
    ldm: str | None = None
    diffusers: str | None = None


# Inside a module: ours, released (and LDM), diffusers. One word changes at a time, the longest first.
_LEAVES = (
    ("norm_in", "in_layers.0", "norm1"),  # residual block
    ("conv_in", "in_layers.2", "conv1"),
    ("embedding", "emb_layers.1", "time_emb_proj"),
    ("norm_out", "out_layers.0", "norm2"),
    ("conv_out", "out_layers.3", "conv2"),
    ("skip", "skip_connection", "conv_shortcut"),
    ("norms.0", "conv1.0", None),  # temporal convolution
    ("convs.0", "conv1.2", None),
    ("norms.1", "conv2.0", None),
    ("convs.1", "conv2.3", None),
    ("norms.2", "conv3.0", None),
    ("convs.2", "conv3.3", None),
    ("norms.3", "conv4.0", None),
    ("convs.3", "conv4.3", None),
    ("norm", "norm", "norm"),  # both transformers
    ("proj_in", "proj_in", "proj_in"),
    ("proj_out", "proj_out", "proj_out"),
)
# Inside a transformer block.
_BLOCK_LEAVES = (
    ("self_norm", "norm1"),
    ("self_attention", "attn1"),
    ("text_norm", "norm2"),
    ("text_attention", "attn2"),
    ("first_norm", "norm1"),
    ("first_attention", "attn1"),
    ("second_norm", "norm2"),
    ("second_attention", "attn2"),
    ("feed_forward_norm", "norm3"),
    ("feed_forward.value_and_gate", "ff.net.0.proj"),
    ("feed_forward.out", "ff.net.2"),
)
# Inside an attention.
_ATTENTION_LEAVES = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
    "image_key": "to_k_ip",
    "image_value": "to_v_ip",
    "key_positions.table": "relative_position_k.embeddings_table",
    "value_positions.table": "relative_position_v.embeddings_table",
}


def _places(config: UNetConfig) -> Iterator[tuple[str, _Place]]:
    """Every module of `UNet3D` that has a place of its own, with that place."""
    yield "time_embedding.hidden", _Place("time_embed.0", "time_embed.0", "time_embedding.linear_1")
    yield "time_embedding.out", _Place("time_embed.2", "time_embed.2", "time_embedding.linear_2")
    yield "fps_embedding.hidden", _Place("fps_embedding.0")
    yield "fps_embedding.out", _Place("fps_embedding.2")
    yield "conv_in", _Place("input_blocks.0.0", "input_blocks.0.0", "conv_in")
    yield "first_temporal_attention", _Place("init_attn.0")

    attends = [2**level in config.attention_resolutions for level in range(len(config.channel_mult))]
    block = 1
    for level in range(len(attends)):
        for layer in range(config.num_res_blocks):
            yield from _layer_places(
                f"down.{level}.layers.{layer}", f"input_blocks.{block}", f"down_blocks.{level}", layer
            )
            block += 1
        if level < len(attends) - 1:
            op, sampler = f"input_blocks.{block}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            yield f"down.{level}.downsample.conv", _Place(op, op, sampler)
            block += 1

    yield from _layer_places("middle.layers.0", "middle_block", "mid_block", 0)
    last = f"middle_block.{2 + config.temporal_attention}"
    yield "middle.layers.1.residual", _Place(last, "middle_block.2", "mid_block.resnets.1")
    yield "middle.layers.1.temporal_conv", _Place(f"{last}.temopral_conv")

    block = 0
    for level, has_attention in enumerate(reversed(attends)):
        for layer in range(config.num_res_blocks + 1):
            yield from _layer_places(
                f"up.{level}.layers.{layer}", f"output_blocks.{block}", f"up_blocks.{level}", layer
            )
            block += 1
        if level < len(attends) - 1:
            # The up-sampler is the last child of the level's last block, after whatever transformers that has.
            ldm = f"output_blocks.{block - 1}.{1 + has_attention}.conv"
            released = f"output_blocks.{block - 1}.{1 + has_attention * (1 + config.temporal_attention)}.conv"
            yield f"up.{level}.upsample.conv", _Place(released, ldm, f"up_blocks.{level}.upsamplers.0.conv")

    yield "norm_out", _Place("out.0", "out.0", "conv_norm_out")
    yield "conv_out", _Place("out.2", "out.2", "conv_out")


def _layer_places(ours: str, released: str, diffusers: str, layer: int) -> Iterator[tuple[str, _Place]]:
    yield f"{ours}.residual", _Place(f"{released}.0", f"{released}.0", f"{diffusers}.resnets.{layer}")
    yield f"{ours}.temporal_conv", _Place(f"{released}.0.temopral_conv")
    yield f"{ours}.spatial_attention", _Place(f"{released}.1", f"{released}.1", f"{diffusers}.attentions.{layer}")
    yield f"{ours}.temporal_attention", _Place(f"{released}.2")


def leaf_names(name: str) -> tuple[str, str]:
    """The released and the diffusers name of what follows a place, `norm_in.weight` or `blocks.0.self_norm.bias`."""
    in_block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if in_block:
        number, rest = in_block.groups()
        for ours, theirs in _BLOCK_LEAVES:
            if rest.startswith(ours + "."):
                inside = rest.removeprefix(ours + ".")
                for word, foreign in _ATTENTION_LEAVES.items() if "attention" in ours else ():
                    if inside == word or inside.startswith(word + "."):
                        inside = foreign + inside.removeprefix(word)
                        break
                name = f"transformer_blocks.{number}.{theirs}.{inside}"
                return name, name
    for ours, released, diffusers in _LEAVES:
        if name.startswith(ours + "."):
            rest = name.removeprefix(ours)
            return released + rest, (diffusers or "") + rest
    return name, name  # weight and bias of a plain layer


def _foreign(config: UNetConfig, names: Iterator[str]) -> Iterator[tuple[str, _Place]]:
    """Every given parameter name of ours with its three foreign names."""
    places = dict(_places(config))
    for name in names:
        parts = name.split(".")
        prefix = next(start for end in range(len(parts), 0, -1) if (start := ".".join(parts[:end])) in places)
        place, (released, diffusers) = places[prefix], leaf_names(name.removeprefix(prefix + "."))
        new = group_of(name) != "spatial"
        yield (
            name,
            _Place(
                f"{place.released}.{released}",
                None if new or place.ldm is None else f"{place.ldm}.{released}",
                None if new or place.diffusers is None else f"{place.diffusers}.{diffusers}",
            ),
        )


def released_names(unet: UNet3D) -> dict[str, str]:
    """Our parameter names -> those of the released checkpoint, without the prefix `model.diffusion_model.`."""
    return {ours: place.released for ours, place in _foreign(unet.config, iter(unet.state_dict()))}


def sd_names(unet: UNet3D, *, diffusers: bool) -> dict[str, str]:
    """Our spatial parameter names -> those of Stable Diffusion, as diffusers or as LDM (without prefix) writes them."""
    pairs = (
        (ours, place.diffusers if diffusers else place.ldm)
        for ours, place in _foreign(unet.config, iter(unet.state_dict()))
    )
    return {ours: theirs for ours, theirs in pairs if theirs is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Hyper-parameters

# Released names of what a configuration can say, with ours.
_HYPER_PARAMETERS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "model_channels": "model_channels",
    "channel_mult": "channel_mult",
    "num_res_blocks": "num_res_blocks",
    "attention_resolutions": "attention_resolutions",
    "num_head_channels": "num_head_channels",
    "transformer_depth": "transformer_depth",
    "context_dim": "context_dim",
    "use_linear": "use_linear",
    "temporal_conv": "temporal_conv",
    "temporal_attention": "temporal_attention",
    "addition_attention": "addition_attention",
    "use_relative_position": "use_relative_position",
    "use_causal_attention": "use_causal_attention",
    "temporal_length": "temporal_length",
    "fps_cond": "fps_cond",
    "use_image_attention": "use_image_attention",
    "dropout": "dropout",
    "use_checkpoint": "gradient_checkpointing",
    "norm_groups": "norm_groups",  # not in released files, where it is 32
}
# Options of the original code of which `UNet3D` has this one form.
_FIXED = {
    "temporal_selfatt_only": True,
    "tempspatial_aware": False,
    "conv_resample": True,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "dims": 2,
    "num_heads": -1,
}
_WITHOUT_MEANING = {"image_size", "use_fp16", "legacy", "default_fps", "finegrained"}


def config_from_released(hyper_parameters: Mapping[str, Any], names: Mapping[str, Tensor] | None = None) -> UNetConfig:
    """The configuration that released hyper-parameters describe (names as in VideoCrafter's YAML files).

    Args:
        hyper_parameters: What the file says; options it leaves out are read off the tensors, then take our default.
        names: The tensors, under released names without prefix.

    Raises:
        ConfigError: If an option is unknown, has a form that `UNet3D` does not, or the values do not fit together.
    """
    for name, value in hyper_parameters.items():
        if name in _FIXED and value != _FIXED[name]:
            raise ConfigError(f"{name}={value!r}: this network has only {name}={_FIXED[name]!r}")
        if name not in _FIXED and name not in _HYPER_PARAMETERS and name not in _WITHOUT_MEANING:
            raise ConfigError(f"{name}={value!r}: not a hyper-parameter of the released network; remove or rename it")
    given = {ours: hyper_parameters[name] for name, ours in _HYPER_PARAMETERS.items() if name in hyper_parameters}
    plain = {
        name: value if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
        for name, value in given.items()
    }
    implied = _implied(names) if names else {}
    try:
        return UNetConfig.model_validate(implied | {name: value for name, value in plain.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "hyper-parameters"
        raise ConfigError(f"{where}: {first['msg']} (found {first['input']!r})") from None


def _implied(names: Mapping[str, Tensor]) -> dict[str, bool]:
    """Options that show in the names and shapes of the tensors alone."""
    projections = [tensor for name, tensor in names.items() if re.search(r"blocks\.\d+\.1\.proj_in\.weight$", name)]
    return {
        "temporal_conv": any(".temopral_conv." in name for name in names),
        "addition_attention": any(name.startswith("init_attn.") for name in names),
        "fps_cond": any(name.startswith("fps_embedding.") for name in names),
        "use_relative_position": any(".relative_position_k." in name for name in names),
        "use_image_attention": any(".to_k_ip." in name for name in names),
    } | ({"use_linear": projections[0].dim() == 2} if projections else {})


def released_hyper_parameters(config: UNetConfig) -> dict[str, Any]:
    """The hyper-parameters of a configuration under their released names, as plain values."""
    plain = config.model_dump(mode="json")
    return {name: plain[ours] for name, ours in _HYPER_PARAMETERS.items() if ours in plain} | {
        "temporal_selfatt_only": True
    }


# ---------------------------------------------------------------------------------------------------------------------
# Loading and saving

# What else lies in a released or Stable Diffusion checkpoint, beside the network.
_OTHER_PARTS = (
    "first_stage_model.",
    "cond_stage_model.",
    "embedder.",
    "image_proj_model.",
    "model_ema.",
    "loss.",
    "lvlb_weights",
)
_SCHEDULE_BUFFERS = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
    "scale_arr",  # 1400 long in the released file, of which 1000 are ever read
}


def part_of_checkpoint(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one network out of a checkpoint that may hold several.

    Args:
        state_dict: Names with or without `prefix`, and with or without DeepSpeed's `_forward_module.` before it.
        prefix: Of the network, for example `model.diffusion_model.`.

    Returns:
        Its tensors without prefix. Other networks and schedule buffers are left out; what is none of these stays in
        under its full name, for the shape check to refuse.
    """
    flat = {name.removeprefix("_forward_module."): tensor for name, tensor in state_dict.items()}
    others = tuple(other for other in (*_OTHER_PARTS, UNET_PREFIX) if not prefix.startswith(other))
    if any(name.startswith(prefix) for name in flat):
        flat = {name: tensor for name, tensor in flat.items() if name.startswith(prefix) or not name.startswith(others)}
    else:
        flat = {name: tensor for name, tensor in flat.items() if not name.startswith(others)}
    return {name.removeprefix(prefix): tensor for name, tensor in flat.items() if name not in _SCHEDULE_BUFFERS}


def load_released_unet(hyper_parameters: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> UNet3D:
    """The network of a released VideoCrafter checkpoint, in float32, on the CPU, in evaluation mode.

    Args:
        hyper_parameters: Under the names of VideoCrafter's YAML files (`model_channels`, `channel_mult`, ...).
        state_dict: Under released names, with or without the prefixes `model.diffusion_model.` and `_forward_module.`;
            autoencoder, text tower and schedule buffers in it are passed over.

    Raises:
        ConfigError: If the hyper-parameters describe no network of this family.
        WeightsError: If any tensor is missing, unexpected, or of another shape.
    """
    tensors = part_of_checkpoint(state_dict, UNET_PREFIX)
    unet = _unfilled(config_from_released(hyper_parameters, tensors))
    _fill_renamed(unet, released_names(unet), tensors, what="released checkpoint")
    return unet.eval()


def released_state_dict(unet: UNet3D, *, prefix: str = "") -> dict[str, Tensor]:
    """The network's tensors under released names; `prefix="model.diffusion_model."` as in the released file."""
    names = released_names(unet)
    return {prefix + names[name]: tensor for name, tensor in unet.state_dict().items()}


def load_sd_unet(unet: UNet3D, state_dict: Mapping[str, Tensor]) -> int:
    """Fill the spatial parameters from Stable Diffusion's image network, leaving the others as they are.

    In a newly made network all temporal modules add zero, so that afterwards it is the image network frame by frame.

    Args:
        unet: The network to fill, in place.
        state_dict: Under LDM names (with or without `model.diffusion_model.`, other parts passed over) or diffusers'.

    Returns:
        How many tensors were loaded: 686 at full size, all of the spatial ones.

    Raises:
        WeightsError: If any spatial tensor is missing, unexpected, or of another shape.
    """
    is_diffusers = any(name.startswith("down_blocks.") for name in state_dict)
    tensors = dict(state_dict) if is_diffusers else part_of_checkpoint(state_dict, UNET_PREFIX)
    names = sd_names(unet, diffusers=is_diffusers)
    _fill_renamed(unet, names, tensors, what="Stable Diffusion checkpoint")
    return len(names)


def save_unet(unet: UNet3D, path: str | Path) -> None:
    """Write the network, under our names and with its configuration, to one safetensors file."""
    write_weights(path, unet.state_dict(), unet.config)


def load_unet(path: str | Path) -> UNet3D:
    """The network that `save_unet` wrote, on the CPU, in evaluation mode.

    Raises:
        WeightsError: If the file is not one of ours or its tensors do not fit its configuration.
    """
    state, config = read_weights(path, UNetConfig)
    if config is None:
        raise WeightsError(f"{path}: no network configuration in it; `load_released_unet` reads files of others")
    unet = _unfilled(config)
    fill(unet, state, what=str(path))
    return unet.eval()


def _unfilled(config: UNetConfig) -> UNet3D:
    """A network in float32 whose values are still to come: skips the drawing of initial ones."""
    with torch.device("meta"):
        unet = UNet3D(config)
    return unet.to_empty(device="cpu")


def _fill_renamed(unet: UNet3D, names: Mapping[str, str], tensors: Mapping[str, Tensor], *, what: str) -> None:
    own = unet.state_dict()
    expected = {foreign: tuple(own[ours].shape) for ours, foreign in names.items()}
    check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, what=what)
    with torch.no_grad():
        for ours, foreign in names.items():
            own[ours].copy_(tensors[foreign])


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder and resampler

_AUTOENCODER_WORDS = (
    (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)


def autoencoder_from_released(state_dict: Mapping[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """Autoencoder tensors of a released or LDM checkpoint under diffusers' names and shapes.

    Args:
        state_dict: With or without the prefix `first_stage_model.`.
        num_levels: Resolutions of the autoencoder, 4 in Stable Diffusion: its decoder counts them the other way round.
    """
    renamed = {}
    for name, tensor in part_of_checkpoint(state_dict, "first_stage_model.").items():
        for pattern, replacement in _AUTOENCODER_WORDS:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"(?<=^decoder\.up_blocks\.)\d+", lambda level: str(num_levels - 1 - int(level.group())), name)
        if ".attentions." in name and tensor.dim() == 4:  # 1x1 convolutions on one side, linear layers on the other
            tensor = tensor[:, :, 0, 0]
        renamed[name] = tensor
    return renamed


_RESAMPLER_WORDS = (
    (r"^latents$", "queries"),
    (r"^layers\.(\d+)\.0\.norm1\.", r"layers.\1.token_norm."),
    (r"^layers\.(\d+)\.0\.norm2\.", r"layers.\1.query_norm."),
    (r"^layers\.(\d+)\.0\.to_q\.", r"layers.\1.query."),
    (r"^layers\.(\d+)\.0\.to_kv\.", r"layers.\1.key_and_value."),
    (r"^layers\.(\d+)\.0\.to_out\.", r"layers.\1.out."),
    (r"^layers\.(\d+)\.1\.0\.", r"layers.\1.feed_forward.0."),
    (r"^layers\.(\d+)\.1\.1\.", r"layers.\1.feed_forward.1."),
    (r"^layers\.(\d+)\.1\.3\.", r"layers.\1.feed_forward.3."),
)


def resampler_from_released(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Resampler tensors of a released checkpoint, with or without `image_proj_model.`, under our names."""
    renamed = {}
    for name, tensor in part_of_checkpoint(state_dict, "image_proj_model.").items():
        for pattern, replacement in _RESAMPLER_WORDS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed
