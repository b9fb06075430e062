"""The frozen parts of a model as diffusers folders hold them: tokenizer, text tower, autoencoder.

Both folders that we write (`vc2/model/stock.py`, `vc2/model/diffusers_pipeline.py`) have them in common:

    tokenizer       CLIPTokenizer, OpenCLIP's vocabulary
    text_encoder    CLIPTextModel, the layers that are run and the final norm: the same numbers as OpenCLIP's tower
    vae             AutoencoderKL, which ours is already

Weights are shared with the model they come from, unless another type is asked for. What is read from a folder is its
configuration, and its tensors unread, so that they keep their types.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vc2.errors import ConfigError
from vc2.model.autoencoder import Autoencoder
from vc2.model.bundle import text_tower
from vc2.model.config import AutoencoderConfig, TextConfig
from vc2.model.files import Tensors, open_weights
from vc2.model.text import TextEncoder, vocabulary
from vc2.model.weights import autoencoder_name_today, text_to_clip

__all__ = [
    "clip_text_model",
    "clip_tokenizer",
    "diffusers_autoencoder",
    "empty_folder",
    "holding",
    "read_autoencoder",
    "read_json",
    "read_text_encoder",
    "save_clip_text_model",
]

M = TypeVar("M", bound=nn.Module)

_SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # OpenCLIP's, transformers'
_PADDING = "!"  # token 0, which OpenCLIP pads with


def clip_tokenizer(context_length: int) -> CLIPTokenizer:
    """A tokenizer with OpenCLIP's vocabulary and padding, equal to it on captions that went through `clean_caption`."""
    numbers, merges = vocabulary()
    return CLIPTokenizer(
        vocab={_SPECIAL.get(token, token): number for token, number in numbers.items()},
        merges=cast(Any, merges),  # pairs, as it wants them, whatever it states
        pad_token=_PADDING,
        model_max_length=context_length,
        split_special_tokens=True,  # else every exclamation mark in a caption would be read as padding
    )


def clip_text_model(encoder: TextEncoder, dtype: torch.dtype | None = None) -> CLIPTextModel:
    """The text tower as transformers' class.

    Raises:
        ConfigError: If the tower's vocabulary is not the tokenizer's.
    """
    shape, (numbers, _) = encoder.config, vocabulary()
    if shape.vocab_size != len(numbers):
        raise ConfigError(
            f"the text tower has vocab_size={shape.vocab_size}, the CLIP tokenizer {len(numbers)}: only a tower with "
            "the tokenizer's vocabulary can be exported"
        )
    config = CLIPTextConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        projection_dim=shape.width,
        num_hidden_layers=shape.layers_used,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.context_length,
        hidden_act="gelu",
        pad_token_id=numbers[_PADDING],
        bos_token_id=len(numbers) - 2,
        eos_token_id=len(numbers) - 1,
    )
    model = CLIPTextModel(config)  # not on the meta device: it has a buffer that no state dict carries
    return holding(model, text_to_clip(encoder.tower.state_dict()), dtype)


def save_clip_text_model(model: CLIPTextModel, folder: Path) -> None:
    """Write the text tower, its tensors under the names that every version of transformers reads.

    What transformers 5 itself writes lacks the prefix `text_model.`, and version 4 would leave such a tower random.
    """
    model.config.architectures = ["CLIPTextModel"]
    model.config.save_pretrained(folder)
    state = {f"text_model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def read_text_encoder(folder: str | Path) -> tuple[TextConfig, Tensors]:
    """The text tower of a diffusers folder: its shape, and its tensors under OpenCLIP's names.

    Raises:
        ConfigError: If there is none, or it is a tower of another kind, as Stable Diffusion 1's is.
        WeightsError: If there are no tensors.
    """
    theirs = CLIPTextConfig.from_dict(read_json(Path(folder) / "text_encoder" / "config.json"))
    if theirs.hidden_act != "gelu" or theirs.intermediate_size != 4 * theirs.hidden_size:
        raise ConfigError(
            f"{folder}: text_encoder has hidden_act={theirs.hidden_act!r}, intermediate_size={theirs.intermediate_size}"
            f"; expected 'gelu' and {4 * theirs.hidden_size}, as in OpenCLIP's towers (Stable Diffusion 2)"
        )
    config = TextConfig(
        width=theirs.hidden_size,
        heads=theirs.num_attention_heads,
        layers=theirs.num_hidden_layers,
        layers_used=theirs.num_hidden_layers,
        context_length=theirs.max_position_embeddings,
        vocab_size=theirs.vocab_size,
    )
    return config, text_tower(folder)


def diffusers_autoencoder(autoencoder: Autoencoder, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """A new `AutoencoderKL` with the autoencoder's weights."""
    with torch.device("meta"):
        model: Any = AutoencoderKL.from_config(autoencoder.net.config)
    return holding(model, autoencoder.net.state_dict(), dtype)


def read_autoencoder(folder: str | Path) -> tuple[AutoencoderConfig, Tensors]:
    """The autoencoder of a diffusers folder: its shape, and its tensors under the names of today, unread.

    Raises:
        ConfigError: If there is none, or it is of another kind than Stable Diffusion's.
        WeightsError: If there are no tensors.
    """
    stored = read_json(Path(folder) / "vae" / "config.json")
    with torch.device("meta"):
        network: Any = AutoencoderKL.from_config(stored)
    theirs = network.config  # with the values that the file leaves out
    config = AutoencoderConfig(
        in_channels=theirs.in_channels,
        out_channels=theirs.out_channels,
        latent_channels=theirs.latent_channels,
        block_out_channels=tuple(theirs.block_out_channels),
        layers_per_block=theirs.layers_per_block,
        norm_groups=theirs.norm_num_groups,
        scaling_factor=theirs.scaling_factor,
    )
    with torch.device("meta"):
        ours = Autoencoder(config).net.config
    for name in ("act_fn", "down_block_types", "up_block_types", "shift_factor", "latents_mean", "latents_std"):
        found, expected = theirs.get(name), ours.get(name)
        if (tuple(found) if isinstance(found, list) else found) != expected:
            raise ConfigError(
                f"{folder}: vae has {name}={found!r}; expected {expected!r}, as in Stable Diffusion's autoencoder"
            )
    return config, open_weights(folder, part="vae").renamed(autoencoder_name_today)


def holding(model: M, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> M:
    """`model`, made to hold the given tensors themselves (copies only where `dtype` asks for another type), to be run.

    Raises:
        RuntimeError: If a tensor is missing, unexpected or of another shape.
    """
    tensors = {name: tensor.detach().to(dtype) if dtype else tensor.detach() for name, tensor in state.items()}
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


def empty_folder(folder: str | Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        ConfigError: If there is something in it: files of two exports in one folder would be loaded together.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: there is something there already; name a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a diffusers folder.

    Raises:
        ConfigError: If there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a folder that diffusers wrote") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds no JSON object; expected a folder that diffusers wrote")
    return found
