"""To stock diffusers and back: a folder that `TextToVideoSDPipeline` loads with no code of ours.

Its `UNet3DConditionModel` is our network without the frame rate: 1,411,233,860 parameters at full size, ours less the
embedding of the frame rate. One frame rate is chosen when the folder is written, and what the embedding says of it is
added to the bias at the end of the time embedding, where the two meet anyway:

    time_embedding(t) + fps_embedding(fps)  =  linear_2(silu(linear_1(t))) + constant

What the stock network always has and ours may lack, the first temporal transformer, is written with an output of zeros:
its residual makes it the identity. What ours may have and the stock network lacks is refused.

The signal scaling of the 512 model (`vc2/model/schedule.py`) belongs to the sampler, and no scheduler of diffusers has
it: a folder of such a model samples with less contrast. docs/diffusers.md says how much, and how to set it right. The
folder carries a file of ours, `vc2.json`, which diffusers passes over and `import_stock` reads the schedule from.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from pydantic import ValidationError
from torch import Tensor

from vc2.errors import ConfigError
from vc2.model.bundle import Parts, VideoModel
from vc2.model.config import ModelConfig, ScheduleConfig, UNetConfig
from vc2.model.diffusers_parts import (
    clip_text_model,
    clip_tokenizer,
    diffusers_autoencoder,
    empty_folder,
    holding,
    read_autoencoder,
    read_json,
    read_text_encoder,
    save_clip_text_model,
)
from vc2.model.files import Stored, Tensors, check_shapes, open_weights
from vc2.model.unet import UNet3D
from vc2.model.weights import stock_names

__all__ = ["export_stock", "import_stock", "read_stock", "stock_scheduler", "stock_unet"]

_NOTES = "vc2.json"
_ATTENDING = ("CrossAttnDownBlock3D", "CrossAttnUpBlock3D")
_PLAIN = ("DownBlock3D", "UpBlock3D")
_SAMPLE_SIZE = 40  # latent height and width that the pipeline takes when it is told none

# Options that the stock network has in one form only.
_FIXED = {
    "temporal_conv": True,
    "temporal_attention": True,
    "transformer_depth": 1,
    "use_relative_position": False,
    "use_causal_attention": False,
    "use_image_attention": False,
}


def export_stock(model: VideoModel, folder: str | Path, *, fps: int, dtype: torch.dtype | None = None) -> None:
    """Write a folder for `diffusers.DiffusionPipeline.from_pretrained`, which needs nothing of ours to load it.

    Args:
        model: The model.
        folder: A new or empty folder.
        fps: The frame rate that the network will always be told; not used by a network without fps_cond.
        dtype: Type of all weights; None keeps those they have.

    Raises:
        ConfigError: If stock diffusers has no such network, or the folder is in use.
    """
    parts = {
        "unet": stock_unet(model.unet, fps=fps, dtype=dtype),
        "vae": diffusers_autoencoder(model.autoencoder, dtype),
        "tokenizer": clip_tokenizer(model.config.text.context_length),
        "scheduler": stock_scheduler(model.config.schedule),
    }
    text_encoder = clip_text_model(model.text, dtype)
    folder = empty_folder(folder)
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    save_clip_text_model(text_encoder, folder / "text_encoder")
    _write_json(folder / "model_index.json", _MODEL_INDEX)
    told = fps if model.config.unet.fps_cond else None
    _write_json(folder / _NOTES, {"fps": told, "schedule": model.config.schedule.model_dump(mode="json")})
    (folder / "README.md").write_text(_card(model.config, told), encoding="utf-8")


def import_stock(folder: str | Path) -> VideoModel:
    """The model of a folder for `TextToVideoSDPipeline`, ours or another's (ModelScope's 1.7 B network is one).

    Args:
        folder: As diffusers writes it; weights as safetensors or, read without running code in them, as `.bin`.

    Returns:
        The model in float32 on the CPU; it takes no frame rate.

    Raises:
        ConfigError: If the folder holds another pipeline, or networks of another kind.
        WeightsError: If tensors are missing, unexpected, or of another shape.
    """
    return read_stock(folder).load()


def read_stock(folder: str | Path) -> Parts:
    """The parts in such a folder, their tensors unread.

    Raises:
        ConfigError: If the folder holds another pipeline, or networks of another kind.
        WeightsError: If tensors of the network are missing, unexpected, or of another shape.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != _MODEL_INDEX["_class_name"]:
        raise ConfigError(
            f"{folder}: a folder for {index.get('_class_name')!r}; expected one for {_MODEL_INDEX['_class_name']!r}"
        )
    unet_config, unet = _read_unet(folder)
    (autoencoder_config, autoencoder), (text_config, text) = read_autoencoder(folder), read_text_encoder(folder)
    schedule = _schedule_of(folder)
    config = ModelConfig(unet=unet_config, schedule=schedule, autoencoder=autoencoder_config, text=text_config)
    return Parts(config, unet, autoencoder, text)


def stock_unet(unet: UNet3D, *, fps: int, dtype: torch.dtype | None = None) -> UNet3DConditionModel:
    """The network as diffusers' class, told one frame rate for good; shares weights with `unet` where it can.

    Raises:
        ConfigError: If stock diffusers has no such network.
    """
    with torch.device("meta"):
        stock: Any = UNet3DConditionModel(**_stock_shape(unet.config))
    own = unet.state_dict()
    state = {theirs: _as_linear(theirs, own[ours].detach()) for ours, theirs in stock_names(unet).items()}
    if unet.fps_embedding is not None:
        bias = state["time_embedding.linear_2.bias"]
        with torch.no_grad():  # in float32, rounded once
            told = copy.deepcopy(unet.fps_embedding).float()(torch.tensor([fps], device=bias.device))[0]
        state["time_embedding.linear_2.bias"] = (bias.float() + told).to(bias.dtype)
    if unet.first_temporal_attention is None:
        state |= _identity(stock.transformer_in, own["conv_in.weight"].dtype)
    return holding(stock, state, dtype)


def stock_scheduler(config: ScheduleConfig) -> DDIMScheduler:
    """The scheduler of diffusers that samples as ours does, but for the signal scaling, which it does not know."""
    return DDIMScheduler(
        num_train_timesteps=config.num_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,  # the last step ends at timestep 0
        steps_offset=1,  # the network is asked at 1, 21, 41, ...
    )


def _stock_shape(config: UNetConfig) -> dict[str, Any]:
    for name, only in _FIXED.items():
        if (found := getattr(config, name)) != only:
            raise ConfigError(
                f"{name}={found!r}: diffusers' UNet3DConditionModel has only {name}={only!r}; use the full export "
                "(`export_full`), which carries our own network"
            )
    if config.channel_mult[0] != 1:
        raise ConfigError(
            f"channel_mult={config.channel_mult}: diffusers' UNet3DConditionModel begins at the width of its first "
            "level (channel_mult[0]=1); use the full export (`export_full`), which carries our own network"
        )
    attends = [2**level in config.attention_resolutions for level in range(len(config.channel_mult))]
    down, up = zip(*(_ATTENDING if attending else _PLAIN for attending in attends), strict=True)
    return {
        "sample_size": _SAMPLE_SIZE,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "block_out_channels": tuple(mult * config.model_channels for mult in config.channel_mult),
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": config.num_head_channels,
    }


def _our_shape(stored: Mapping[str, Any], folder: Path) -> UNetConfig:
    """The configuration of a stored `UNet3DConditionModel`; what it leaves out has diffusers' default."""
    with torch.device("meta"):
        network: Any = UNet3DConditionModel.from_config(dict(stored))
    theirs = network.config
    for name, only in {
        "act_fn": "silu",
        "norm_eps": 1e-5,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
    }.items():
        if theirs[name] != only:
            raise ConfigError(f"{folder}: unet has {name}={theirs[name]!r}; our network has only {only!r}")
    widths = theirs.block_out_channels
    if any(width % widths[0] for width in widths):
        raise ConfigError(
            f"{folder}: unet has block_out_channels={tuple(widths)}; in our network levels are multiples of the first"
        )
    return UNetConfig(
        in_channels=theirs.in_channels,
        out_channels=theirs.out_channels,
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=theirs.layers_per_block,
        attention_resolutions=tuple(
            2**level for level, kind in enumerate(theirs.down_block_types) if kind == _ATTENDING[0]
        ),
        num_head_channels=theirs.attention_head_dim,
        context_dim=theirs.cross_attention_dim,
        norm_groups=theirs.norm_num_groups,
        fps_cond=False,
    )


def _read_unet(folder: Path) -> tuple[UNetConfig, Tensors]:
    config = _our_shape(read_json(folder / "unet" / "config.json"), folder)
    with torch.device("meta"):
        unet = UNet3D(config)
    own, names = unet.state_dict(), stock_names(unet)
    tensors = open_weights(folder, part="unet")
    expected = {theirs: tuple(_as_linear(theirs, own[ours]).shape) for ours, theirs in names.items()}
    check_shapes(expected, tensors.shapes, what=f"{folder}: unet")
    stored = {ours: _reshaped(tensors.stored[theirs], own[ours].shape) for ours, theirs in names.items()}
    return config, Tensors(stored, what=tensors.what)


def _reshaped(stored: Stored, shape: torch.Size) -> Stored:
    return Stored(tuple(shape), stored.dtype, lambda: stored.read().reshape(shape))


def _schedule_of(folder: Path) -> ScheduleConfig:
    if (folder / _NOTES).is_file():
        try:
            return ScheduleConfig.model_validate(read_json(folder / _NOTES).get("schedule", {}))
        except ValidationError as error:
            raise ConfigError(f"{folder / _NOTES}: schedule does not fit: {error.errors()[0]['msg']}") from None
    stored = read_json(folder / "scheduler" / "scheduler_config.json")
    only_form = {
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
    }
    for name, only in only_form.items():
        if (found := stored.get(name, only)) != only:
            raise ConfigError(f"{folder}: scheduler has {name}={found!r}; our schedule has only {only!r}")
    return ScheduleConfig(
        num_timesteps=stored.get("num_train_timesteps", 1000),
        beta_start=stored.get("beta_start", 0.0001),
        beta_end=stored.get("beta_end", 0.02),
        signal_scaling=False,
    )


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    """A projection's weight less the axes of length 1 of a convolution; the stock network has linear layers there."""
    return tensor.flatten(1) if name.endswith(("proj_in.weight", "proj_out.weight")) else tensor


def _identity(transformer: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights that make a transformer with a residual add nothing: norms of ones, all else zero."""
    weights = {name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in transformer.state_dict().items()}
    ones = {name: torch.ones_like(tensor) for name, tensor in weights.items() if "norm" in name and "weight" in name}
    return {f"transformer_in.{name}": tensor for name, tensor in (weights | ones).items()}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


_MODEL_INDEX = {
    "_class_name": "TextToVideoSDPipeline",
    "_diffusers_version": diffusers.__version__,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet3DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _card(config: ModelConfig, fps: int | None) -> str:
    told = "The network takes no frame rate." if fps is None else f"It is always told {fps} frames per second."
    return _CARD.format(told=told, scaling=_SCALING if config.schedule.signal_scaling else "")


_SCALING = """
The network was trained with a *signal scaling* that no scheduler of diffusers has, so videos come out with less
contrast. Where vc2 is installed, `VideoCrafter2Scheduler` of `vc2.model.diffusers_components` sets that right:

```python
pipe.scheduler = VideoCrafter2Scheduler.from_stock("path/of/this/folder")
```
"""

_CARD = """---
library_name: diffusers
pipeline_tag: text-to-video
---

# Text to video

A VideoCrafter2 network as a stock diffusers pipeline, written by vc2. {told}

```python
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

pipe = DiffusionPipeline.from_pretrained("path/of/this/folder").to("cuda")
generator = torch.Generator().manual_seed(0)
video = pipe("a cat in the rain", height=320, width=512, num_frames=16, guidance_scale=12, eta=1, generator=generator)
export_to_video(video.frames[0], "cat.mp4", fps=10)
```
{scaling}"""
