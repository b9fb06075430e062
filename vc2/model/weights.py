"""Foreign names of our parameters: the one place that knows them.

Four schemes name the same tensors: the *released* VideoCrafter checkpoints, *LDM* (Stable Diffusion's original files),
*diffusers* for the image network, and *stock* for diffusers' video network, which extends it. A table of places
(`_places`) says where a module of ours sits in each; a table of leaves (`_LEAVES`) says what a layer inside such a
module is called. In the released names every temporal transformer is one more child of its block, which shifts what
follows it against LDM: loading Stable Diffusion by equal names would misplace tensors.

A load is whole or an error: every tensor of the network found, none left over, all of the expected shape.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from vc2.errors import ConfigError, WeightsError
from vc2.model.config import UNetConfig
from vc2.model.files import Stored, Tensors, check_shapes, fill, read_weights, write_weights
from vc2.model.partition import group_of
from vc2.model.recognise import declares_v_prediction, recognise
from vc2.model.unet import FIRST_HEADS, UNet3D

__all__ = [
    "SCHEDULE_BUFFERS",
    "UNET_PREFIX",
    "autoencoder_from_released",
    "autoencoder_name_today",
    "autoencoder_to_released",
    "check_unet",
    "config_from_released",
    "config_of_image_network",
    "fill_unet",
    "leaf_names",
    "load_released_unet",
    "load_sd_unet",
    "load_unet",
    "looks_like_noise_prediction",
    "part_of_checkpoint",
    "released_hyper_parameters",
    "released_names",
    "released_state_dict",
    "resampler_from_released",
    "resampler_to_released",
    "save_unet",
    "sd_names",
    "stock_names",
    "text_from_clip",
    "text_to_clip",
    "unet_from_released",
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
    stock: str | None = None  # in diffusers' video network, where the image network has no such module


# Inside a module: ours, released (and LDM), diffusers. One word changes at a time, the longest first.
_LEAVES = (
    ("norm_in", "in_layers.0", "norm1"),  # residual block
    ("conv_in", "in_layers.2", "conv1"),
    ("embedding", "emb_layers.1", "time_emb_proj"),
    ("norm_out", "out_layers.0", "norm2"),
    ("conv_out", "out_layers.3", "conv2"),
    ("skip", "skip_connection", "conv_shortcut"),
    ("norms.0", "conv1.0", "conv1.0"),  # temporal convolution
    ("convs.0", "conv1.2", "conv1.2"),
    ("norms.1", "conv2.0", "conv2.0"),
    ("convs.1", "conv2.3", "conv2.3"),
    ("norms.2", "conv3.0", "conv3.0"),
    ("convs.2", "conv3.3", "conv3.3"),
    ("norms.3", "conv4.0", "conv4.0"),
    ("convs.3", "conv4.3", "conv4.3"),
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
    yield "first_temporal_attention", _Place("init_attn.0", stock="transformer_in")

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
    yield "middle.layers.1.temporal_conv", _Place(f"{last}.temopral_conv", stock="mid_block.temp_convs.1")

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
    yield f"{ours}.temporal_conv", _Place(f"{released}.0.temopral_conv", stock=f"{diffusers}.temp_convs.{layer}")
    yield f"{ours}.spatial_attention", _Place(f"{released}.1", f"{released}.1", f"{diffusers}.attentions.{layer}")
    yield f"{ours}.temporal_attention", _Place(f"{released}.2", stock=f"{diffusers}.temp_attentions.{layer}")


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
            return released + rest, diffusers + rest
    return name, name  # weight and bias of a plain layer


def _foreign(config: UNetConfig, names: Iterator[str]) -> Iterator[tuple[str, _Place]]:
    """Every given parameter name of ours with its three foreign names."""
    places = dict(_places(config))
    for name in names:
        parts = name.split(".")
        prefix = next(start for end in range(len(parts), 0, -1) if (start := ".".join(parts[:end])) in places)
        place, (released, diffusers) = places[prefix], leaf_names(name.removeprefix(prefix + "."))
        new = group_of(name) != "spatial"
        stock = None if group_of(name) == "image" else place.stock or place.diffusers
        yield (
            name,
            _Place(
                f"{place.released}.{released}",
                None if new or place.ldm is None else f"{place.ldm}.{released}",
                None if new or place.diffusers is None else f"{place.diffusers}.{diffusers}",
                None if stock is None else f"{stock}.{diffusers}",
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


def stock_names(unet: UNet3D) -> dict[str, str]:
    """Our parameter names -> those of diffusers' `UNet3DConditionModel`; it has no frame rate and no image tokens."""
    pairs = ((ours, place.stock) for ours, place in _foreign(unet.config, iter(unet.state_dict())))
    return {ours: stock for ours, stock in pairs if stock is not None}


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
    "kernel_size_t": 1,
    "padding_t": 0,
    "use_spatial_transformer": True,
}
_TEMPORAL_DEPTH = "temporal_transformer_depth"  # here that of the spatial transformers
_WITHOUT_MEANING = {"image_size", "use_fp16", "legacy", "default_fps", "finegrained", _TEMPORAL_DEPTH}


def config_from_released(hyper_parameters: Mapping[str, Any], names: Mapping[str, Tensor] | None = None) -> UNetConfig:
    """The configuration that released hyper-parameters describe (names as in VideoCrafter's YAML files).

    Args:
        hyper_parameters: What the file says; options it leaves out are read off the tensors, then take our default.
            With tensors it may be empty: all but causal masks, dropout and groups of the norms shows in their shapes.
        names: The tensors, under released names without prefix.

    Raises:
        ConfigError: If an option is unknown, has a form that `UNet3D` does not, or the values do not fit together.
    """
    for name, value in hyper_parameters.items():
        if name in _FIXED and value != _FIXED[name]:
            raise ConfigError(f"{name}={value!r}: this network has only {name}={_FIXED[name]!r}")
        if name not in _FIXED and name not in _HYPER_PARAMETERS and name not in _WITHOUT_MEANING:
            raise ConfigError(f"{name}={value!r}: not a hyper-parameter of the released network; remove or rename it")
    implied = _implied(Tensors.of(names).shapes) if names else {}
    depth = hyper_parameters.get("transformer_depth") or implied.get("transformer_depth", 1)
    if hyper_parameters.get(_TEMPORAL_DEPTH) not in (None, depth):
        raise ConfigError(
            f"{_TEMPORAL_DEPTH}={hyper_parameters[_TEMPORAL_DEPTH]!r}, transformer_depth={depth!r}: this network has "
            "one depth for both kinds of transformers"
        )
    given = {ours: hyper_parameters[name] for name, ours in _HYPER_PARAMETERS.items() if name in hyper_parameters}
    plain = {
        name: value if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
        for name, value in given.items()
    }
    return _checked(implied | {name: value for name, value in plain.items() if value is not None})


def _checked(options: Mapping[str, Any]) -> UNetConfig:
    try:
        return UNetConfig.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "hyper-parameters"
        raise ConfigError(f"{where}: {first['msg']} (found {first['input']!r})") from None


def config_of_image_network(tensors: Mapping[str, Tensor], told: Mapping[str, Any] | None = None) -> UNetConfig:
    """The video network that grows from an image network: its shape, and everything temporal that VideoCrafter2 adds.

    Args:
        tensors: Under LDM names, with or without prefix, or diffusers'.
        told: Options that do not show in shapes, under our names.

    Raises:
        ConfigError: If the shapes describe no network of this family.
    """
    shapes = Tensors.of(tensors).shapes
    if any(name.startswith("down_blocks.") for name in shapes):
        return _checked(_implied_by_diffusers(shapes) | dict(told or {}))
    shapes = {name.removeprefix(UNET_PREFIX): shape for name, shape in shapes.items()}
    temporal = ("temporal_conv", "temporal_attention", "addition_attention", "fps_cond")
    implied = {name: value for name, value in _implied(shapes).items() if name not in temporal}
    return _checked(implied | dict(told or {}))


Shape = tuple[int, ...]


def _implied(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Options that show in released names and shapes alone; what does not show is left out."""
    temporal = {
        "temporal_conv": any(".temopral_conv." in name for name in shapes),
        "temporal_attention": any(
            re.search(r"(put_blocks\.\d+|middle_block)\.2\.transformer_blocks\.", name) for name in shapes
        ),
        "addition_attention": any(name.startswith("init_attn.") for name in shapes),
        "fps_cond": any(name.startswith("fps_embedding.") for name in shapes),
    }
    # Of an image network none of these shows; it shall not pass for a video network that has none.
    implied: dict[str, Any] = temporal if any(temporal.values()) else {}
    implied |= {
        "use_relative_position": any(".relative_position_k." in name for name in shapes),
        "use_image_attention": any(".to_k_ip." in name for name in shapes),
    }
    spatial = {name: shape for name, shape in shapes.items() if re.search(r"(put_blocks\.\d+|middle_block)\.1\.", name)}
    implied |= _implied_by_transformers(spatial)
    if first := shapes.get("input_blocks.0.0.weight"):
        implied["model_channels"] = first[0]  # not the channels it reads: where they are not 4, it is another network
    if table := _first(shapes, ".relative_position_k.embeddings_table"):
        implied |= {"temporal_length": (table[0] - 1) // 2, "num_head_channels": table[1]}
    elif first := shapes.get("init_attn.0.proj_in.weight"):
        implied["num_head_channels"] = first[0] // FIRST_HEADS

    levels: list[list[int]] = [[]]
    attends = set()
    for block in range(1, len(shapes)):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            levels.append([])
        elif width := shapes.get(f"input_blocks.{block}.0.in_layers.2.weight"):
            levels[-1].append(width[0])
            attends |= {len(levels) - 1} if f"input_blocks.{block}.1.proj_in.weight" in shapes else set()
        else:
            break
    return implied | _implied_by_levels(levels, attends)


def _implied_by_diffusers(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The same of an image network under diffusers' names."""
    levels: list[list[int]] = []
    attends = set()
    while f"down_blocks.{len(levels)}.resnets.0.conv1.weight" in shapes:
        level, prefix = [], f"down_blocks.{len(levels)}"
        while width := shapes.get(f"{prefix}.resnets.{len(level)}.conv1.weight"):
            level.append(width[0])
        attends |= {len(levels)} if f"{prefix}.attentions.0.proj_in.weight" in shapes else set()
        levels.append(level)
    spatial = {name: shape for name, shape in shapes.items() if ".attentions." in name}
    return (
        ({"model_channels": shapes["conv_in.weight"][0]} if "conv_in.weight" in shapes else {})
        | _implied_by_transformers(spatial)
        | _implied_by_levels(levels, attends)
    )


def _implied_by_transformers(spatial: Mapping[str, Shape]) -> dict[str, Any]:
    """Options that show in the spatial transformers; names of what is inside a block are the same in all schemes."""
    implied: dict[str, Any] = {}
    if projection := _first(spatial, ".proj_in.weight"):
        implied["use_linear"] = len(projection) == 2
    if key := _first(spatial, ".attn2.to_k.weight"):
        implied["context_dim"] = key[1]
    depths = [int(found.group(1)) for name in spatial if (found := re.search(r"\.transformer_blocks\.(\d+)\.", name))]
    return implied | ({"transformer_depth": max(depths) + 1} if depths else {})


def _implied_by_levels(levels: list[list[int]], attends: set[int]) -> dict[str, Any]:
    """Options that show in the widths of the residual blocks of every level and in which levels have transformers."""
    if not all(levels):
        return {}
    return {
        "channel_mult": tuple(level[-1] // levels[0][0] for level in levels),
        "num_res_blocks": len(levels[0]),
        "attention_resolutions": tuple(2**level for level in sorted(attends, reverse=True)),
    }


def _first(shapes: Mapping[str, Shape], ending: str) -> Shape | None:
    return next((shape for name, shape in shapes.items() if name.endswith(ending)), None)


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
SCHEDULE_BUFFERS = {
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


def part_of_checkpoint(state_dict: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The tensors of one network out of a checkpoint that may hold several; none of them is read.

    Args:
        state_dict: Names with or without `prefix`, and with or without DeepSpeed's `_forward_module.` before it.
        prefix: Of the network, for example `model.diffusion_model.`.

    Returns:
        Its tensors without prefix. Other networks and schedule buffers are left out; what is none of these stays in
        under its full name, for the shape check to refuse.
    """
    flat = Tensors.of(state_dict).renamed(lambda name: name.removeprefix("_forward_module."))
    others = tuple(other for other in (*_OTHER_PARTS, UNET_PREFIX) if not prefix.startswith(other))

    def name_in_part(name: str) -> str | None:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
        return None if name.startswith(others) or name in SCHEDULE_BUFFERS else name

    return flat.renamed(name_in_part)


def load_released_unet(hyper_parameters: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> UNet3D:
    """The network of a released VideoCrafter checkpoint, in float32, on the CPU, in evaluation mode.

    Args:
        hyper_parameters: Under the names of VideoCrafter's YAML files (`model_channels`, `channel_mult`, ...); what is
            left out is read off the shapes of the tensors.
        state_dict: Under released names, with or without the prefixes `model.diffusion_model.` and `_forward_module.`;
            autoencoder, text tower and schedule buffers in it are passed over. From `open_weights` the tensors are
            read one by one, and little more memory is needed than the network takes.

    Raises:
        ConfigError: If the hyper-parameters describe no network of this family.
        WeightsError: If any tensor is missing, unexpected, or of another shape; says what the tensors seem to be.
    """
    stored = Tensors.of(state_dict, "released checkpoint")
    config = config_from_released(hyper_parameters, part_of_checkpoint(stored, UNET_PREFIX))
    return fill_unet(config, unet_from_released(config, stored), what=stored.what)


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
        WeightsError: If any spatial tensor is missing, unexpected, or of another shape, or if the file that they come
            from is declared to predict velocity (Stable Diffusion 2.1-768, whose names and shapes are the same).
    """
    tensors = _spatial(unet, Tensors.of(state_dict, "Stable Diffusion checkpoint"))
    own = unet.state_dict()
    with torch.no_grad():
        for name in tensors:
            own[name].copy_(tensors[name])
    return len(tensors)


@torch.no_grad()
def looks_like_noise_prediction(unet: UNet3D) -> bool:
    """Whether a trained network seems to predict noise rather than velocity or the clean latents.

    At the last timestep hardly any signal is left: a noise predictor answers pure noise with about itself (slope 1), a
    velocity predictor with sqrt(a_t), about 0.07 of it. A network that has learnt nothing looks like neither.
    """
    generator = torch.Generator().manual_seed(0)
    config, weight = unet.config, unet.conv_in.weight
    side = 4 * config.downsampling
    noise = torch.randn(1, config.in_channels, 1, side, side, generator=generator).to(weight.device)
    text = torch.randn(1, 77, config.context_dim, generator=generator).to(weight.device)
    was_training = unet.training
    answer = unet.eval()(noise, torch.tensor([999], device=weight.device), text)
    unet.train(was_training)
    return (answer * noise).sum().item() > 0.5 * noise.square().sum().item()


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
        raise WeightsError(
            f"{path}: no network configuration in it ({recognise(state).sentence}); `load_released_unet` and "
            "`vc2 convert` read files of others"
        )
    return fill_unet(config, state, what=str(path))


def fill_unet(config: UNetConfig, tensors: Mapping[str, Tensor], *, what: str) -> UNet3D:
    """A network of that shape with these tensors, under our names, in float32, on the CPU, in evaluation mode.

    Initial values are not drawn first, and the tensors are read one by one.

    Raises:
        WeightsError: If any tensor is missing, unexpected, or of another shape.
    """
    unet = _unmade(config).to_empty(device="cpu")
    fill(unet, tensors, what=what, cause=_cause(Tensors.of(tensors), "ours"))
    return unet.eval()


def check_unet(config: UNetConfig, tensors: Tensors) -> None:
    """Compare tensors, under our names, with a configuration; none is read.

    Raises:
        WeightsError: If any tensor is missing, unexpected, or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in _unmade(config).state_dict().items()}
    check_shapes(expected, tensors.shapes, what=tensors.what, cause=_cause(tensors, "ours"))


def unet_from_released(config: UNetConfig, tensors: Tensors) -> Tensors:
    """A network's tensors under our names, out of a checkpoint under released names; none is read.

    Raises:
        WeightsError: If any is missing, unexpected, or of another shape.
    """
    shape = _unmade(config)
    part = part_of_checkpoint(tensors, UNET_PREFIX)
    return _translated(shape, released_names(shape), part, tensors, wanted="video")


def spatial_from_sd(config: UNetConfig, tensors: Tensors) -> Tensors:
    """The spatial part of a network under our names, out of an image network (as `load_sd_unet`); none is read."""
    shape = _unmade(config)
    return _spatial(shape, tensors)


def _spatial(unet: UNet3D, tensors: Tensors) -> Tensors:
    if declared := declares_v_prediction(tensors):
        raise WeightsError(
            f"{tensors.what}: this image network predicts velocity (v), VideoCrafter's predicts noise: {declared}; "
            "give Stable Diffusion 2.1-base (512-base), which predicts noise"
        )
    is_diffusers = any(name.startswith("down_blocks.") for name in tensors)
    part = tensors if is_diffusers else part_of_checkpoint(tensors, UNET_PREFIX)
    return _translated(unet, sd_names(unet, diffusers=is_diffusers), part, tensors, wanted="image")


def unet_to_released(config: UNetConfig, tensors: Tensors) -> Tensors:
    """A network's tensors under released names, with prefix; none is read."""
    names = released_names(_unmade(config))
    return tensors.renamed(lambda name: UNET_PREFIX + names[name])


def spatial_to_sd(config: UNetConfig, tensors: Tensors, *, diffusers: bool) -> Tensors:
    """The spatial part of a network under LDM names, with prefix, or under diffusers'; none is read."""
    names = sd_names(_unmade(config), diffusers=diffusers)
    prefix = "" if diffusers else UNET_PREFIX
    return tensors.renamed(lambda name: prefix + names[name] if name in names else None)


def _translated(
    unet: UNet3D, names: Mapping[str, str], part: Tensors, whole: Tensors, *, wanted: Literal["video", "image"]
) -> Tensors:
    """The network's part of a whole file under our names, given as ours and theirs; what does not fit is an error."""
    own = unet.state_dict()
    expected = {foreign: tuple(own[ours].shape) for ours, foreign in names.items()}
    check_shapes(expected, part.shapes, what=whole.what, cause=_cause(whole, wanted))
    ours = {foreign: name for name, foreign in names.items()}
    return part.renamed(ours.get)


def _unmade(config: UNetConfig) -> UNet3D:
    """A network without values: names and shapes alone."""
    with torch.device("meta"):
        return UNet3D(config)


_WANTED = {
    "video": "a VideoCrafter network under released names",
    "image": "the image network of Stable Diffusion 2.1-base",
    "ours": "a network under vc2's own names",
}


def _cause(tensors: Tensors, wanted: Literal["video", "image", "ours"]) -> str:
    """Why tensors may not fit: what they are, and what was expected; empty where they are of the right family."""
    found = recognise(tensors)
    if found.family == wanted:
        return f"{found.sentence}; check the hyper-parameters" if found.advice else ""
    advice = f"; {found.advice}" if found.advice else ""
    if (found.family, wanted) == ("video", "image"):
        advice = "; to go on from it, `vc2 convert` it --to checkpoint"
    elif (found.family, wanted) == ("image", "video"):
        advice = "; to start from it, name it as sd_path of the first training stage"
    return f"this is {found.words}, expected {_WANTED[wanted]}{advice}"


# ---------------------------------------------------------------------------------------------------------------------
# Text tower

_CLIP_WORDS = (  # OpenCLIP, transformers' CLIPTextModel
    ("transformer.resblocks.", "encoder.layers."),
    ("token_embedding.", "embeddings.token_embedding."),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    ("ln_final.", "final_layer_norm."),
)
_CLIP_PREFIX = "text_model."  # in files; a model of transformers 5 has its tensors without


def text_to_clip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of OpenCLIP's text tower, without prefix, under the names of transformers' `CLIPTextModel`.

    OpenCLIP stacks the rows of query, key and value in one matrix; these are views of it.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        for ours, theirs in _CLIP_WORDS:
            name = name.replace(ours, theirs)
        place, stacked, kind = name.partition(".attn.in_proj_")
        if stacked:
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{place}.self_attn.{letter}_proj.{kind}"] = rows
        else:
            renamed[name] = tensor
    return renamed


def text_from_clip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way round: tensors of a `CLIPTextModel`, with or without `text_model.`, for OpenCLIP's tower."""
    flat = {name.removeprefix(_CLIP_PREFIX): tensor for name, tensor in state_dict.items()}
    renamed, stacks = {}, {}
    for name, tensor in flat.items():
        if name == "embeddings.position_ids":  # 0, 1, 2, ... in files of older transformers
            continue
        for ours, theirs in _CLIP_WORDS:
            name = name.replace(theirs, ours)
        stacked = re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
        if stacked:
            place, letter, kind = stacked.groups()
            stacks.setdefault(f"{place}.attn.in_proj_{kind}", {})[letter] = tensor
        else:
            renamed[name] = tensor
    return renamed | {name: torch.cat([rows[letter] for letter in "qkv"]) for name, rows in stacks.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder and resampler

# Theirs and what it becomes; # is a number. A word without a dot in front (behind) stands at the start (end) of a name.
_AUTOENCODER_WORDS = (
    ("encoder.down.#.block.#.", "encoder.down_blocks.#.resnets.#."),
    ("encoder.down.#.downsample.", "encoder.down_blocks.#.downsamplers.0."),
    ("decoder.up.#.block.#.", "decoder.up_blocks.#.resnets.#."),
    ("decoder.up.#.upsample.", "decoder.up_blocks.#.upsamplers.0."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
    (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
    (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    ("encoder.norm_out.", "encoder.conv_norm_out."),
    ("decoder.norm_out.", "decoder.conv_norm_out."),
)
_RESAMPLER_WORDS = (
    ("latents", "queries"),
    ("layers.#.0.norm1.", "layers.#.token_norm."),
    ("layers.#.0.norm2.", "layers.#.query_norm."),
    ("layers.#.0.to_q.", "layers.#.query."),
    ("layers.#.0.to_kv.", "layers.#.key_and_value."),
    ("layers.#.0.to_out.", "layers.#.out."),
    ("layers.#.1.", "layers.#.feed_forward."),
)


def _reworded(name: str, words: Iterable[tuple[str, str]], *, back: bool = False) -> str:
    """A name with the words of a table translated, from left to right or back."""
    for theirs, ours in words:
        found, wanted = (ours, theirs) if back else (theirs, ours)
        pattern = re.escape(found).replace(r"\#", r"(\d+)")
        pattern = ("" if found.startswith(".") else "^") + pattern + ("" if found.endswith(".") else "$")
        numbers = iter(range(1, 1 + wanted.count("#")))
        name = re.sub(pattern, re.sub("#", lambda _: rf"\g<{next(numbers)}>", wanted), name)  # noqa: B023
    return name


def autoencoder_from_released(state_dict: Mapping[str, Tensor], num_levels: int) -> Tensors:
    """Autoencoder tensors of a released or LDM checkpoint under diffusers' names and shapes; none is read.

    Args:
        state_dict: With or without the prefix `first_stage_model.`; diffusers' names, old or new, stay or become new.
        num_levels: Resolutions of the autoencoder, 4 in Stable Diffusion: its decoder counts them the other way round.
    """
    part, stored = part_of_checkpoint(state_dict, "first_stage_model."), {}
    is_diffusers = any(name.startswith("encoder.down_blocks.") for name in part)
    for name, tensor in part.stored.items():
        name = _reworded(name, _AUTOENCODER_WORDS)
        name = autoencoder_name_today(name) if is_diffusers else _counted_from_the_other_end(name, num_levels)
        if ".attentions." in name and len(tensor.shape) == 4:  # 1x1 convolutions there, linear layers here
            tensor = _reshaped(tensor, tensor.shape[:2])
        stored[name] = tensor
    return Tensors(stored, what="autoencoder")


def autoencoder_to_released(state: Mapping[str, Tensor], num_levels: int) -> Tensors:
    """The reverse of `autoencoder_from_released`, without prefix: diffusers' names become those of LDM."""
    stored = {}
    for name, tensor in Tensors.of(state).stored.items():
        if ".attentions." in name and name.endswith(".weight") and len(tensor.shape) == 2:
            tensor = _reshaped(tensor, (*tensor.shape, 1, 1))
        name = _counted_from_the_other_end(name, num_levels)
        stored[_reworded(name, _AUTOENCODER_WORDS, back=True)] = tensor
    return Tensors(stored, what="autoencoder")


def _counted_from_the_other_end(name: str, num_levels: int) -> str:
    return re.sub(r"(?<=^decoder\.up_blocks\.)\d+", lambda level: str(num_levels - 1 - int(level.group())), name)


def _reshaped(tensor: Stored, shape: Shape) -> Stored:
    return Stored(shape, tensor.dtype, lambda: tensor.read().reshape(shape))


_OLD_AUTOENCODER_WORDS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def autoencoder_name_today(name: str) -> str:
    """What diffusers calls a tensor of the autoencoder now; files of before 2023 name its attention otherwise."""
    return re.sub(
        r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)",
        lambda old: _OLD_AUTOENCODER_WORDS[old.group()],
        name,
    )


def resampler_from_released(state_dict: Mapping[str, Tensor]) -> Tensors:
    """Resampler tensors of a released checkpoint, with or without `image_proj_model.`, under our names; reads none."""
    part = part_of_checkpoint(state_dict, "image_proj_model.")
    return part.renamed(lambda name: _reworded(name, _RESAMPLER_WORDS))


def resampler_to_released(state: Mapping[str, Tensor]) -> Tensors:
    """The reverse of `resampler_from_released`, without prefix."""
    return Tensors.of(state).renamed(lambda name: _reworded(name, _RESAMPLER_WORDS, back=True))
