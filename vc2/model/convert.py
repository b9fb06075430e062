"""The same model in every form that the world keeps it in, and from each to the others.

    vc2               a folder of our own names (`vc2/model/bundle.py`)
    released          one file as VideoCrafter was released: network, autoencoder, text tower, tables of the schedule
    sd-ldm            the spatial part as Stable Diffusion's original file; read, a video network is grown from it
    sd-diffusers      the same as a folder of diffusers
    diffusers         a video pipeline of diffusers as it is shipped, at one frame rate (`vc2/model/stock.py`)
    diffusers-full    our own pipeline as a folder of diffusers (`vc2/model/diffusers_pipeline.py`)

A source is recognised by what lies in it; no hyper-parameters need be told for the released networks. Values and types
of tensors stay as they are, bit for bit, in what a form holds: the whole model in `vc2`, `released` and
`diffusers-full`, the spatial part in the two of Stable Diffusion, in `diffusers` the network at the one frame rate. All
are read tensor by tensor; for the last two the whole model is put together in memory, to be written.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from vc2.errors import ConfigError, WeightsError
from vc2.model.bundle import Parts, VideoModel, Weights, image_to_released, is_bundle, text_tower
from vc2.model.config import (
    AutoencoderConfig,
    ImageConfig,
    ImageTowerConfig,
    ModelConfig,
    ResamplerConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
)
from vc2.model.files import Stored, Tensors, open_weights, published, read_weights, write_tensors, write_torch
from vc2.model.partition import group_of
from vc2.model.recognise import recognise
from vc2.model.schedule import NoiseSchedule
from vc2.model.unet import UNet3D
from vc2.model.weights import (
    SCHEDULE_BUFFERS,
    UNET_PREFIX,
    autoencoder_from_released,
    autoencoder_to_released,
    config_from_released,
    config_of_image_network,
    fill_unet,
    looks_like_noise_prediction,
    part_of_checkpoint,
    spatial_from_sd,
    spatial_to_sd,
    unet_from_released,
    unet_to_released,
)

__all__ = [
    "FORMS",
    "Form",
    "Found",
    "answers_with_noise",
    "check_unneeded",
    "grown",
    "load_model",
    "parameter_counts",
    "read_hyper_parameters",
    "read_model",
    "recognise_tensors",
    "schedule_buffers",
    "write_model",
]

Form = Literal["vc2", "released", "sd-ldm", "sd-diffusers", "diffusers", "diffusers-full"]
FORMS: tuple[str, ...] = get_args(Form)


@dataclass(frozen=True)
class Found:
    """What a source holds."""

    form: Form
    words: str  # in a sentence: "this is ..."
    parts: Parts  # of an image network: its spatial tensors alone
    is_image_network: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_model(place: str | Path, *, weights: Weights = "ema", hyper_parameters: Path | None = None) -> VideoModel:
    """The model in a folder or file of any form, in float32 on the CPU.

    Args:
        place: See the forms above.
        weights: Which of the denoising network's weights, where the source has both.
        hyper_parameters: A VideoCrafter YAML file, for networks whose shape the tensors do not tell.

    Raises:
        WeightsError: If it holds no video model, or not all of one.
    """
    found = read_model(place, weights=weights, hyper_parameters=hyper_parameters)
    if found.is_image_network:
        raise WeightsError(f"{place}: this is {found.words}; it makes no videos, train one from it")
    return found.parts.load()


def read_model(place: str | Path, *, weights: Weights = "ema", hyper_parameters: Path | None = None) -> Found:
    """What a folder or file holds; no tensor is read yet, but for text towers under transformers' names.

    Raises:
        WeightsError: If it is none of the forms, or its tensors do not fit together.
        ConfigError: If the hyper-parameters describe another network.
    """
    path = Path(place)
    if path.is_dir():
        if is_bundle(path):
            check_unneeded(hyper_parameters, f"{path}: a model in vc2's own form")
            return Found("vc2", "a model in vc2's own form", Parts.read(path, weights=weights))
        if kind := _pipeline_class(path):
            check_unneeded(hyper_parameters, f"{path}: a {kind} of diffusers")
            return _read_pipeline(path, kind)
    return recognise_tensors(open_weights(path), weights=weights, hyper_parameters=hyper_parameters)


def check_unneeded(hyper_parameters: Path | None, what: str) -> None:
    """Raise `ConfigError` if hyper-parameters are given to a source that has no use for them."""
    if hyper_parameters is not None:
        raise ConfigError(
            f"{what}, which is described without {hyper_parameters}; --hyper-parameters belongs to released "
            "checkpoints that carry no note of vc2's: leave it out"
        )


def _pipeline_class(folder: Path) -> str:
    for name in ("model_index.json", "config.json"):
        if (folder / name).is_file():
            try:
                kind = json.loads((folder / name).read_text()).get("_class_name", "")
                return str(kind[-1] if isinstance(kind, list) else kind)  # a list names a module too
            except (ValueError, AttributeError, IndexError) as error:
                raise WeightsError(f"{folder / name}: not what diffusers writes ({error}); fetch it again") from None
    return ""


def _read_pipeline(folder: Path, kind: str) -> Found:
    if kind == "TextToVideoSDPipeline":
        from vc2.model.stock import read_stock

        return Found("diffusers", "a video pipeline of diffusers", read_stock(folder))
    if kind == "VideoCrafter2Pipeline":
        from vc2.model.diffusers_pipeline import read_full

        return Found("diffusers-full", "a VideoCrafter2Pipeline", _with_rest(read_full(folder), folder))
    if kind in ("StableDiffusionPipeline", "UNet2DConditionModel", "StableDiffusionImg2ImgPipeline"):
        return _read_sd_folder(folder)
    raise WeightsError(f"{folder}: a {kind} of diffusers; expected TextToVideoSDPipeline or StableDiffusionPipeline")


def recognise_tensors(tensors: Tensors, *, weights: Weights = "ema", hyper_parameters: Path | None = None) -> Found:
    """What the tensors of one file are (as `read_model`, of the forms that are a file)."""
    tensors = tensors.renamed(lambda name: name.removeprefix("_forward_module."))
    if weights == "ema":
        tensors = _averaged(tensors)
    found = recognise(tensors)
    if found.family == "video":
        return Found("released", found.words, _released_parts(tensors, hyper_parameters))
    check_unneeded(hyper_parameters, f"{tensors.what}: {found.sentence}")
    if found.family == "image":
        noted = _noted(tensors)
        config = noted[0] if noted else ModelConfig(unet=config_of_image_network(tensors))
        return Found("sd-ldm", found.words, _with_frozen_parts(tensors, config, spatial_from_sd), is_image_network=True)
    if found.family == "ours" and tensors.path is not None:
        unet, config = read_weights(tensors.path, UNetConfig)
        if config is not None:
            return Found("vc2", found.words, Parts(ModelConfig(unet=config), unet))
    raise WeightsError(f"{tensors.what}: {found.sentence}; expected one of the forms {', '.join(FORMS)}")


_EMA = "model_ema."
_EMA_COUNTERS = {"decay", "num_updates"}


def _averaged(tensors: Tensors) -> Tensors:
    """The moving average in place of the raw weights, where a file of LDM has both; its names have lost their dots.

    Raises:
        WeightsError: If only some of the network is averaged: a mixture of both is no network.
    """
    flat = {name.removeprefix(_EMA): name for name in tensors if name.startswith(_EMA)}
    flat = {short: name for short, name in flat.items() if short not in _EMA_COUNTERS}
    raw = {name.removeprefix("model.").replace(".", ""): name for name in tensors if name.startswith(UNET_PREFIX)}
    if not flat or not raw:
        return tensors
    if flat.keys() != raw.keys():
        strange = sorted(flat.keys() ^ raw.keys())[0]
        raise WeightsError(
            f"{tensors.what}: its moving average has {len(flat.keys() & raw.keys())} of the network's {len(raw)} "
            f"tensors and {len(flat.keys() - raw.keys())} others ({strange} is in one of the two alone); take the raw "
            "weights: --weights raw"
        )
    return tensors | Tensors({name: tensors.stored[flat[short]] for short, name in raw.items()})


def _released_parts(tensors: Tensors, hyper_parameters: Path | None) -> Parts:
    noted = _noted(tensors)
    if noted is None:
        told = read_hyper_parameters(hyper_parameters) if hyper_parameters else {}
        network = part_of_checkpoint(tensors, UNET_PREFIX)
        unet = config_from_released(told.get("unet", {}), network)
        config = ModelConfig(unet=unet, schedule=_schedule_of(tensors, unet, told.get("schedule")))
        fps = {}
    else:
        check_unneeded(hyper_parameters, f"{tensors.what}: a file with a note of vc2's")
        config, fps = noted
    return replace(_with_frozen_parts(tensors, config, unet_from_released), fps=fps)


def _with_frozen_parts(
    tensors: Tensors, config: ModelConfig, translate: Callable[[UNetConfig, Tensors], Tensors]
) -> Parts:
    """The parts of one checkpoint; where the configuration is not noted in it, that of the frozen parts by shape."""
    first, text = (_below(tensors, prefix) for prefix in ("first_stage_model.", "cond_stage_model.model."))
    image = tensors.renamed(lambda name: name if name.startswith(("embedder.", "image_proj_model.")) else None)
    noted = _noted(tensors) is not None
    autoencoder = None
    if first:
        levels = len({name.split(".")[2] for name in first if name.startswith("encoder.down.")})
        autoencoder = autoencoder_from_released(first, levels)
        config = config if noted else config.evolve(autoencoder=_autoencoder_of(autoencoder.shapes, config.autoencoder))
    if text and not noted:
        config = config.evolve(text=_text_of(text.shapes))
    if image and not noted:
        config = config.evolve(image=_image_of(image.shapes))
    buffers = tensors.renamed(lambda name: name if name in SCHEDULE_BUFFERS or name == "lvlb_weights" else None)
    unet = translate(config.unet, tensors)
    return Parts(config, unet, autoencoder, text or None, image or None, buffers)


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return tensors.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)


def _read_sd_folder(folder: Path) -> Found:
    unet = open_weights(folder)
    rest = open_weights(folder / _REST) if (folder / _REST).is_file() else Tensors({})
    noted = _noted(rest)
    config = noted[0] if noted else ModelConfig(unet=config_of_image_network(unet, _told_by_diffusers(folder)))
    autoencoder = text = None
    if (folder / "vae").is_dir():
        autoencoder = autoencoder_from_released(open_weights(folder, "vae"), 0)  # old names become today's
        config = config if noted else config.evolve(autoencoder=_autoencoder_of(autoencoder.shapes, config.autoencoder))
    if (folder / "text_encoder").is_dir():
        text = text_tower(folder)
        layers = _text_of(text.shapes).layers  # those that are not run were left out
        config = config if noted else config.evolve(text=_text_of(text.shapes).evolve(layers_used=layers))
    unused = _below(rest, "cond_stage_model.model.")
    if text is not None or unused:
        text = (text or Tensors({})) | unused
    buffers = rest.renamed(lambda name: name if name in SCHEDULE_BUFFERS or name == "lvlb_weights" else None)
    spatial, words = spatial_from_sd(config.unet, unet), recognise(unet).words
    return Found("sd-diffusers", words, Parts(config, spatial, autoencoder, text, None, buffers), is_image_network=True)


def _with_rest(parts: Parts, folder: Path) -> Parts:
    """The parts of a folder of our pipeline with what diffusers has no place for, where `write_model` left it there."""
    if not (folder / _REST).is_file():
        return parts
    rest, config = open_weights(folder / _REST), parts.config
    if noted := _noted(rest):
        config = noted[0].evolve(
            unet=config.unet, schedule=config.schedule, autoencoder=config.autoencoder, image=config.image
        )
    unused = _below(rest, "cond_stage_model.model.")
    image = rest.renamed(lambda name: name if name.startswith(("embedder.", "image_proj_model.")) else None)
    return replace(
        parts,
        config=config,
        text=None if config.text.seed is not None or parts.text is None else parts.text | unused,
        image=None if parts.image is None else parts.image | image,
        buffers=rest.renamed(lambda name: name if name in SCHEDULE_BUFFERS or name == "lvlb_weights" else None),
    )


def _told_by_diffusers(folder: Path) -> dict[str, Any]:
    """What the configuration of an image network of diffusers says that its shapes do not."""
    path = next((path for path in (folder / "unet" / "config.json", folder / "config.json") if path.is_file()), None)
    if path is None:
        return {}
    try:
        told: dict[str, Any] = json.loads(path.read_text())
        widths, heads = told["block_out_channels"], told.get("num_attention_heads") or told["attention_head_dim"]
    except (ValueError, KeyError) as error:
        raise WeightsError(f"{path}: not the configuration of a network ({error!r}); fetch it again") from None
    heads = heads if isinstance(heads, list) else [heads] * len(widths)
    sizes = {width // count for width, count in zip(widths, heads, strict=True)}  # equal in this family
    return {"num_head_channels": min(sizes), "norm_groups": told.get("norm_num_groups", 32)}


def grown(parts: Parts) -> Parts:
    """A video network from an image network: its tensors, and temporal ones that add nothing yet.

    Temporal modules get initial values, drawn from seed 0; all that they end in is zero, so that the video network is
    the image network frame by frame.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = UNet3D(parts.config.unet).state_dict()
    new = {name: Stored.of(tensor) for name, tensor in drawn.items() if group_of(name) != "spatial"}
    unet = Tensors({name: parts.unet.stored.get(name) or new[name] for name in drawn}, what=parts.unet.what)
    return replace(parts, unet=unet)


def answers_with_noise(parts: Parts) -> bool:
    """Whether the spatial part of a network, run as the image network that it is, seems to predict noise.

    The temporal modules stay unmade: one added to an image network changes nothing yet.
    """
    image_network = parts.config.unet.evolve(
        temporal_conv=False, temporal_attention=False, addition_attention=False, fps_cond=False,
        use_image_attention=False,
    )  # fmt: skip
    spatial = parts.unet.renamed(lambda name: name if group_of(name) == "spatial" else None)
    return looks_like_noise_prediction(fill_unet(image_network, spatial, what=parts.unet.what))


# ---------------------------------------------------------------------------------------------------------------------
# What shapes and buffers tell of the parts around the network

_NOTE = "vc2"  # name of the note that we leave in files of others' forms: configuration and frame rates


def _note(parts: Parts) -> dict[str, str]:
    return {_NOTE: json.dumps(parts.described(), sort_keys=True)}


def _noted(tensors: Tensors) -> tuple[ModelConfig, dict[int, int]] | None:
    """Configuration and frame rates as our note in a file says; None without a note.

    Raises:
        WeightsError: If there is a note and it cannot be read: what it says shows nowhere else.
    """
    if _NOTE not in tensors.metadata:
        return None
    try:
        described = json.loads(tensors.metadata[_NOTE])
        fps = {int(rate): int(weight) for rate, weight in described.pop("fps", {}).items()}
        return ModelConfig.model_validate(described), fps
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (ValueError, AttributeError, TypeError) as error:
        reason = str(error)
    raise WeightsError(
        f"{tensors.what}: the note {_NOTE!r} in it does not fit this version of vc2 ({reason}); convert it with the "
        "version that wrote it, or write the file anew without the note"
    )


def read_hyper_parameters(path: Path) -> dict[str, dict[str, Any]]:
    """What a VideoCrafter YAML file says: `unet` under its own names, `schedule` under ours.

    Raises:
        ConfigError: If it is no such file, or it is of a model that predicts something else than noise.
    """
    import yaml

    try:
        read: Any = yaml.safe_load(path.read_text())
        params = read["model"]["params"]
        unet = dict(params["unet_config"]["params"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: not a VideoCrafter configuration ({type(error).__name__}: {error}); expected YAML with "
            "model.params.unet_config.params"
        ) from None
    if (predicted := params.get("parameterization", "eps")) != "eps":
        raise ConfigError(f"{path}: parameterization {predicted}; only networks that predict noise (eps) can be used")
    if params.get("rescale_betas_zero_snr"):
        raise ConfigError(f"{path}: rescale_betas_zero_snr: DynamiCrafter's schedule, which this project does not have")
    names = {"linear_start": "beta_start", "linear_end": "beta_end", "timesteps": "num_timesteps"}
    schedule = {ours: params[theirs] for theirs, ours in names.items() if theirs in params}
    if "use_scale" in params:
        schedule["signal_scaling"] = bool(params["use_scale"])
    if schedule.get("signal_scaling"):
        if (start := params.get("scale_a", 1)) != 1:
            raise ConfigError(f"{path}: scale_a {start}; the signal scaling of this project falls from 1, to scale_b")
        schedule |= {"signal_floor": params.get("scale_b", 0.3), "signal_knee": params.get("mid_step", 400)}
    return {"unet": unet, "schedule": schedule}


# How far a table may be from what it was made from, relative, by the type it is stored in.
_ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
_ROUNDING_ELSE = 1e-4


def _schedule_of(tensors: Tensors, unet: UNetConfig, told: Mapping[str, Any] | None) -> ScheduleConfig:
    """The noise schedule: as the checkpoint's tables say, and hyper-parameters (None: not given) that agree with them.

    Without tables the hyper-parameters alone say it; without either it is that with which networks of this shape were
    released.

    Raises:
        ConfigError: If hyper-parameters and tables contradict each other.
        WeightsError: If the tables are those of another kind of schedule.
    """
    tables = Tensors.of({name: tensors[name] for name in ("betas", "scale_arr") if name in tensors}, tensors.what)
    if "betas" in tables and float(tables["betas"][-1]) > 0.9:
        raise WeightsError(
            f"{tensors.what}: its schedule ends in pure noise (zero terminal SNR), as DynamiCrafter's does, whose "
            "networks predict velocity; give a VideoCrafter checkpoint"
        )
    found = _schedule_in(tables) if tables else _released_schedule(unet)
    if not tables and told is not None:
        found = found.evolve(signal_scaling=False)  # VideoCrafter's own default where a YAML file says nothing
    try:
        config = ScheduleConfig.model_validate(found.model_dump() | dict(told or {}))
    except ValidationError as error:
        raise ConfigError(f"{tensors.what}: no schedule of this kind: {error.errors()[0]['msg']}") from None
    if _misfit(tables, config):
        if wrong := _misfit(tables, found):
            raise WeightsError(f"{tensors.what}: {wrong}; vc2 has no such schedule")
        said = ", ".join(f"{name}={value}" for name, value in (told or {}).items() if getattr(found, name) != value)
        raise ConfigError(f"{tensors.what}: the hyper-parameters say {said}, the tables in the file otherwise: "
                          "leave these out, or give the YAML file of this checkpoint")  # fmt: skip
    return config


def _released_schedule(unet: UNetConfig) -> ScheduleConfig:
    # Signal scaling came with the frame-rate input; the 1024 model of VideoCrafter1 goes down to 0.3.
    floor = 0.3 if unet.fps_cond and unet.use_relative_position else 0.7
    return ScheduleConfig(signal_scaling=unet.fps_cond, signal_floor=floor)


def _schedule_in(tables: Tensors) -> ScheduleConfig:
    """What the tables say: exactly one of the released schedules where they fit it within their rounding."""
    usual = ScheduleConfig()
    scaled = (usual, usual.evolve(signal_floor=0.3)) if "scale_arr" in tables else ()
    for known in (*scaled, usual.evolve(signal_scaling=False)):
        if not _misfit(tables, known):
            return known
    read: dict[str, Any] = {"signal_scaling": False}
    if "betas" in tables:
        betas = tables["betas"].double()
        # The betas may be the usual ones where the signal scaling is not.
        if _misfit(Tensors.of({"betas": tables["betas"]}), usual.evolve(signal_scaling=False)):
            start, end = (round(float(beta), 8) for beta in (betas[0], betas[-1]))
            read |= {"num_timesteps": len(betas), "beta_start": start, "beta_end": end}
    if "scale_arr" in tables:
        table = tables["scale_arr"].double()
        floor, steps = round(float(table[-1]), 6), read.get("num_timesteps", usual.num_timesteps)
        knee = min(int((table > table[-1]).sum()) + 1, steps)
        if floor < 1:
            read |= {"signal_scaling": True, "signal_floor": floor, "signal_knee": max(knee, 2)}
    try:
        return usual.evolve(**read)
    except ValidationError as error:
        raise WeightsError(f"{tables.what}: no schedule of this kind: {error.errors()[0]['msg']}") from None


def _misfit(tables: Tensors, config: ScheduleConfig) -> str:
    """How the tables of a checkpoint are not those of a schedule; empty if they are, within their rounding."""
    schedule = NoiseSchedule(config)
    for name, expected, words in (
        ("betas", schedule.betas, "the roots of its betas do not rise linearly"),
        ("scale_arr", schedule.signal_scale, "its signal scaling does not fall linearly from 1 to a floor"),
    ):
        if name not in tables:
            continue
        stored = tables[name]
        # The released table of the scaling goes on beyond the last timestep; that is never read.
        found = stored[: len(expected)] if name == "scale_arr" else stored
        rounding = _ROUNDING.get(stored.dtype, _ROUNDING_ELSE)
        if found.shape != expected.shape or not torch.allclose(found.double(), expected, rtol=rounding, atol=0):
            return words
    return ""


def _autoencoder_of(shapes: Mapping[str, tuple[int, ...]], default: AutoencoderConfig) -> AutoencoderConfig:
    """The autoencoder's shape, under diffusers' names; groups of the norms do not show and are taken as usual."""
    widths = []
    while width := shapes.get(f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight"):
        widths.append(width[0])
    layers = len({name.split(".")[4] for name in shapes if name.startswith("encoder.down_blocks.0.resnets.")})
    if not widths or "encoder.conv_in.weight" not in shapes or "decoder.conv_in.weight" not in shapes:
        return default
    groups = default.norm_groups if not any(width % default.norm_groups for width in widths) else math.gcd(*widths)
    return default.evolve(
        in_channels=shapes["encoder.conv_in.weight"][1],
        latent_channels=shapes["decoder.conv_in.weight"][1],
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        norm_groups=groups,
    )


def _text_of(shapes: Mapping[str, tuple[int, ...]]) -> TextConfig:
    """The text tower's shape, under OpenCLIP's names: heads are 64 wide, the last layer is not run."""
    layers = {name.split(".")[2] for name in shapes if name.startswith("transformer.resblocks.")}
    if not layers or "token_embedding.weight" not in shapes or "positional_embedding" not in shapes:
        return TextConfig()
    vocab_size, width = shapes["token_embedding.weight"]
    return TextConfig(
        width=width,
        heads=max(1, width // 64),
        layers=len(layers),
        layers_used=max(1, len(layers) - 1),
        context_length=shapes["positional_embedding"][0],
        vocab_size=vocab_size,
    )


def _image_of(shapes: Mapping[str, tuple[int, ...]]) -> ImageConfig:
    """The image encoder's shape: heads are 80 wide in the tower, as ViT-H/14's are, and 64 in the resampler."""
    tower, resampler = "embedder.model.visual.", "image_proj_model."
    try:
        width, _, patch, _ = shapes[f"{tower}conv1.weight"]
        places = shapes[f"{tower}positional_embedding"][0] - 1
        shape = ImageTowerConfig(
            width=width,
            heads=max(1, width // 80),
            layers=len({name.split(".")[5] for name in shapes if name.startswith(f"{tower}transformer.")}),
            image_size=patch * math.isqrt(places),
            patch_size=patch,
            output_dim=shapes[f"{tower}proj"][1],
        )
        if coarse := shapes.get(f"{resampler}proj.weight"):
            (output_dim,) = shapes[f"{resampler}norm.weight"]
            few = ResamplerConfig(num_queries=coarse[0] // output_dim, output_dim=output_dim)
            return ImageConfig(tower=shape, resampler=few, finegrained=False)
        queries, dim = shapes[f"{resampler}latents"][1:]
        depth = len({name.split(".")[2] for name in shapes if name.startswith(f"{resampler}layers.")})
        return ImageConfig(
            tower=shape,
            resampler=ResamplerConfig(
                dim=dim,
                depth=depth,
                heads=max(1, shapes[f"{resampler}layers.0.0.to_q.weight"][0] // 64),
                num_queries=queries,
                embedding_dim=shapes[f"{resampler}proj_in.weight"][1],
                output_dim=shapes[f"{resampler}proj_out.weight"][0],
                ff_mult=shapes[f"{resampler}layers.0.1.1.weight"][0] // dim,
            ),
        )
    except (KeyError, ValueError):
        return ImageConfig()


def schedule_buffers(config: ScheduleConfig) -> dict[str, Tensor]:
    """The tables of a noise schedule that a released checkpoint carries, float32.

    Posterior tables are those of Ho et al. 2020, Eq. 7. The table of the signal scaling is longer than the schedule by
    its ramp, as in the released file, where what lies beyond the last timestep is never read.
    """
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_timesteps, dtype=np.float64) ** 2
    alphas = 1.0 - betas
    cumprod = np.cumprod(alphas)
    before = np.append(1.0, cumprod[:-1])
    variance = betas * (1.0 - before) / (1.0 - cumprod)
    tables = {
        "betas": betas,
        "alphas_cumprod": cumprod,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - cumprod),
        "log_one_minus_alphas_cumprod": np.log(1.0 - cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / cumprod - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1.0 - cumprod),
        "posterior_mean_coef2": (1.0 - before) * np.sqrt(alphas) / (1.0 - cumprod),
    }
    if config.signal_scaling:
        ramp = np.linspace(1.0, config.signal_floor, config.signal_knee)
        tables["scale_arr"] = np.concatenate([ramp, np.full(config.num_timesteps, config.signal_floor)])
    return {name: torch.from_numpy(table).float() for name, table in tables.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_model(found: Found, destination: str | Path, form: Form, *, fps: int | None = None) -> None:
    """Write a model in another form, under a temporary name until it is whole.

    Args:
        found: What was read.
        destination: A folder, or for `released` and `sd-ldm` a file: `.safetensors`, or a torch file by any other
            ending (which is put together in memory, once).
        form: The form wanted.
        fps: The one frame rate of form `diffusers`.

    Raises:
        ConfigError: If the form cannot hold the model, or `fps` is missing or has no use.
        WeightsError: If a part that the form needs is missing, or the place cannot be written.
    """
    path = Path(destination)
    if form == "diffusers" and fps is None:
        raise ConfigError("the form `diffusers` holds one frame rate: say which by --fps N")
    if form != "diffusers" and fps is not None:
        raise ConfigError("--fps N belongs to the form `diffusers`, which holds one frame rate, and to no other")
    if form in ("sd-ldm", "sd-diffusers"):
        spatial = found.parts.unet.renamed(lambda name: name if group_of(name) == "spatial" else None)
        parts = replace(found.parts, unet=spatial)
        if form == "sd-ldm":
            _write_file(path, _ldm_tensors(parts), _note(parts))
        else:
            published(path, lambda folder: _write_sd_folder(parts, folder))
        return
    parts = grown(found.parts) if found.is_image_network else found.parts
    if form == "vc2":
        parts.write(path)
    elif form == "released":
        _write_file(path, _released_tensors(parts), _note(parts))
    elif form == "diffusers":
        from vc2.model.stock import export_stock

        assert fps is not None
        model, rate = _loaded_as_stored(parts), fps
        published(path, lambda folder: export_stock(model, folder, fps=rate))
    else:
        model = _loaded_as_stored(parts)
        published(path, lambda folder: _write_full(parts, model, folder))


def _loaded_as_stored(parts: Parts) -> VideoModel:
    """The model, each of its tensors in the type that it is stored in: to be written, not to be run."""
    model = parts.load()
    for network, stored, theirs in (
        (model.unet, parts.unet, lambda name: name),
        (model.autoencoder.net, parts.autoencoder, lambda name: name),
        (model.text.tower, parts.text, lambda name: name),
        (model.image, parts.image, lambda name: next(iter(image_to_released({name: _NO_TENSOR})))),
    ):
        if network is None or stored is None:
            continue
        for name, parameter in network.named_parameters():
            parameter.data = parameter.data.to(stored.stored[theirs(name)].dtype)
    return model


_NO_TENSOR = torch.empty(0)


def _write_full(parts: Parts, model: VideoModel, folder: Path) -> None:
    """A folder for our pipeline; what it has no place for lies beside it."""
    from vc2.model.diffusers_pipeline import export_full

    export_full(model, folder)
    rest = parts.buffers
    if parts.text is not None:
        used = model.text.tower.state_dict()
        unused = parts.text.renamed(lambda name: None if name in used else name)
        rest |= unused.renamed(lambda name: f"cond_stage_model.model.{name}")
    if parts.image is not None and model.image is not None:
        known = image_to_released(model.image.state_dict())
        rest |= parts.image.renamed(lambda name: None if name in known else name)
    write_tensors(folder / _REST, rest, _note(parts))


def _write_file(path: Path, tensors: Tensors, note: Mapping[str, str]) -> None:
    if path.suffix == ".safetensors":
        write_tensors(path, tensors, note)
    else:
        write_torch(path, tensors, note)


def _released_tensors(parts: Parts) -> Tensors:
    tensors = unet_to_released(parts.config.unet, parts.unet) | _frozen_tensors(parts)
    return tensors | (parts.image or Tensors({})) | _buffers(parts, scaled=True)


def _ldm_tensors(parts: Parts) -> Tensors:
    tensors = spatial_to_sd(parts.config.unet, parts.unet, diffusers=False)
    return tensors | _frozen_tensors(parts) | _buffers(parts, scaled=False)


def _frozen_tensors(parts: Parts) -> Tensors:
    """Autoencoder and text tower under released names, which are those of LDM."""
    tensors = Tensors({})
    if parts.autoencoder is not None:
        theirs = autoencoder_to_released(parts.autoencoder, len(parts.config.autoencoder.block_out_channels))
        tensors |= theirs.renamed(lambda name: f"first_stage_model.{name}")
    if parts.text is not None:
        tensors |= parts.text.renamed(lambda name: f"cond_stage_model.model.{name}")
    return tensors


def _buffers(parts: Parts, *, scaled: bool) -> Tensors:
    """The schedule's tables as they were found, else as they follow from the configuration."""
    buffers = Tensors.of(schedule_buffers(parts.config.schedule)) | parts.buffers
    return buffers.renamed(lambda name: name if scaled or name != "scale_arr" else None)


_REST = "ldm_rest.safetensors"  # what a folder of diffusers has no place for: unused layers of the text tower, tables


def _write_sd_folder(parts: Parts, folder: Path) -> None:
    """A folder that diffusers loads as `StableDiffusionPipeline`; without a text tower it holds the networks alone."""
    folder.mkdir()
    config = parts.config
    unet = spatial_to_sd(config.unet, parts.unet, diffusers=True)
    _write_json(folder / "unet" / "config.json", _sd_unet_config(config.unet))
    write_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", unet, {"format": "pt"})
    _write_json(folder / "scheduler" / "scheduler_config.json", _sd_scheduler_config(config.schedule))
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    if parts.autoencoder is not None:
        _write_json(folder / "vae" / "config.json", _vae_config(config.autoencoder))
        name = folder / "vae" / "diffusion_pytorch_model.safetensors"
        write_tensors(name, parts.autoencoder, {"format": "pt"})
        index["vae"] = ["diffusers", "AutoencoderKL"]
    rest = _buffers(parts, scaled=True)
    if parts.text is not None:
        kept, unused = _text_written(parts, folder)
        rest |= unused.renamed(lambda name: f"cond_stage_model.model.{name}")
        if kept:
            index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    write_tensors(folder / _REST, rest, _note(parts))
    _write_json(folder / "model_index.json", index)


def _text_written(parts: Parts, folder: Path) -> tuple[bool, Tensors]:
    """Write text tower and tokenizer; gives back whether they are there, and the tensors that have no place in them."""
    from vc2.model.diffusers_parts import clip_text_model, clip_tokenizer, save_clip_text_model
    from vc2.model.text import TextEncoder

    assert parts.text is not None
    encoder = TextEncoder.from_released(parts.config.text, parts.text)
    used = encoder.tower.state_dict().keys()
    types = {parts.text.stored[name].dtype for name in used}
    try:
        model = clip_text_model(encoder, types.pop() if len(types) == 1 else None)
    except ConfigError:  # a vocabulary of its own, of which no tokenizer of transformers knows
        return False, parts.text
    save_clip_text_model(model, folder / "text_encoder")
    clip_tokenizer(parts.config.text.context_length).save_pretrained(folder / "tokenizer")
    return True, parts.text.renamed(lambda name: None if name in used else name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _sd_unet_config(config: UNetConfig) -> dict[str, Any]:
    widths = [mult * config.model_channels for mult in config.channel_mult]
    attends = [2**level in config.attention_resolutions for level in range(len(widths))]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": widths,
        "layers_per_block": config.num_res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)],
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": [max(1, width // config.num_head_channels) for width in widths],  # the number of heads
        "transformer_layers_per_block": config.transformer_depth,
        "use_linear_projection": config.use_linear,
        "norm_num_groups": config.norm_groups,
        "sample_size": 64,
    }


def _sd_scheduler_config(config: ScheduleConfig) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.num_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }


def _vae_config(config: AutoencoderConfig) -> dict[str, Any]:
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "latent_channels": config.latent_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scaling_factor,
        "act_fn": "silu",
    }


def parameter_counts(unet: Tensors) -> dict[str, int]:
    """Values of a network, under our names, by group: `total`, `spatial`, `temporal`, `image`."""
    counts = dict.fromkeys(("total", "spatial", "temporal", "image"), 0)
    for name, shape in unet.shapes.items():
        for key in ("total", group_of(name)):
            counts[key] += math.prod(shape)
    return {key: count for key, count in counts.items() if count}
