"""What the miniature world is made of, and the shape of the small autoencoder that was trained on it."""

from importlib.resources import files
from pathlib import Path

from pydantic import Field

from vc2.config import Config
from vc2.model.config import AutoencoderConfig, TextConfig, UNetConfig

__all__ = [
    "WorldConfig",
    "autoencoder_config",
    "autoencoder_weights",
    "image_base_weights",
    "large_unet_config",
    "text_config",
    "unet_config",
    "web_base_weights",
]


class WorldConfig(Config):
    """A world of raw sources in the real formats, with known truth. Same config, same bytes."""

    seed: int = Field(default=2024, ge=0)  # another number, another world
    num_videos: int = Field(default=240, ge=16)  # rows of the WebVid CSV, planted bad ones included
    num_web_images: int = Field(default=300, ge=24)  # rows of the LAION-COCO Parquet parts, likewise
    num_jdb_images: int = Field(default=400, ge=16)  # pictures in the JourneyDB archives, likewise
    num_prompts: int = Field(default=16, ge=1, le=192)  # evaluation prompts


def autoencoder_config() -> AutoencoderConfig:
    """The small KL autoencoder: 858,583 parameters, downsampling 8, 4 latent channels.

    Its latents have mean 0 and variance 1 in every channel by construction (`train_autoencoder.whiten`), so that 1 /
    std, the scaling factor, is 1.
    """
    return AutoencoderConfig(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        norm_groups=4,
        scaling_factor=1.0,
    )


def autoencoder_weights() -> Path:
    """The committed weights, which `python -m vc2.miniature.train_autoencoder` made."""
    return Path(str(files("vc2.miniature") / "weights" / "autoencoder.safetensors"))


def unet_config() -> UNetConfig:
    """The small denoising network: 1,676,004 parameters, 1,001,828 of them spatial."""
    return UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=16,
        context_dim=64,
        norm_groups=8,
        addition_attention=False,
    )


def large_unet_config() -> UNetConfig:
    """The same for a GPU: 41,522,692 parameters, text at every resolution."""
    return unet_config().evolve(
        model_channels=128, num_res_blocks=2, attention_resolutions=(1, 2), num_head_channels=32, norm_groups=32
    )


def text_config() -> TextConfig:
    """A seeded random tower of OpenCLIP's class: words stay distinguishable, and nothing has to be downloaded."""
    return TextConfig(width=64, heads=4, layers=3, layers_used=2, context_length=32, seed=7)


def image_base_weights() -> Path:
    """The image network that recipe `miniature` grows from: `python -m vc2.miniature.train_image_base` made it."""
    return Path(str(files("vc2.miniature") / "weights" / "image_base.safetensors"))


def web_base_weights() -> Path:
    """That of recipe `study`, which has seen nothing that looks like the image set: `train_image_base --web-only`."""
    return Path(str(files("vc2.miniature") / "weights" / "web_base.safetensors"))
