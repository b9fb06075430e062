"""Shapes of the networks and constants of the diffusion; defaults are the released 512 x 320 text-to-video model."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from vc2.config import Config, knob

__all__ = [
    "AutoencoderConfig",
    "ImageConfig",
    "ImageTowerConfig",
    "LoraConfig",
    "LoraTarget",
    "ModelConfig",
    "Recompute",
    "ResamplerConfig",
    "SamplerConfig",
    "ScheduleConfig",
    "TextConfig",
    "UNetConfig",
]

Recompute = Literal["none", "selective", "full"]
LoraTarget = Literal["attention", "feed_forward", "projection", "convolution", "embedding"]


class UNetConfig(Config):
    """Shape of the denoising network."""

    in_channels: int = Field(4, gt=0)  # latent channels of the autoencoder
    out_channels: int = Field(4, gt=0)  # channels of the prediction: as many as the latents have
    model_channels: int = Field(320, gt=0)  # width of the first level
    channel_mult: tuple[int, ...] = Field((1, 2, 4, 4), min_length=1)  # width of each level, in model_channels
    num_res_blocks: int = Field(2, gt=0)  # residual blocks per level on the way down; one more on the way up
    attention_resolutions: tuple[int, ...] = (4, 2, 1)  # downsampling factors at which a level has transformers
    num_head_channels: int = Field(64, gt=0)  # heads = level width / num_head_channels
    transformer_depth: int = Field(1, gt=0)  # blocks per transformer, spatial and temporal
    context_dim: int = Field(1024, gt=0)  # width of text (and image) tokens
    use_linear: bool = True  # transformers project with linear layers; False: 1x1 convolutions, as in SD 1.x
    temporal_conv: bool = True  # a temporal convolution after every residual block
    temporal_attention: bool = True  # a temporal transformer after every spatial one
    addition_attention: bool = True  # one more temporal transformer right after the first convolution
    use_relative_position: bool = False  # learnt relative positions in temporal attention (VideoCrafter1)
    use_causal_attention: bool = False  # a frame attends to earlier frames only
    temporal_length: int = Field(16, gt=0)  # reach of the relative positions; the frame count itself is free
    fps_cond: bool = True  # the frame rate is an input
    use_image_attention: bool = False  # image tokens have keys and values of their own (image-to-video)
    norm_groups: int = Field(32, gt=0)  # groups of every group normalisation
    dropout: float = Field(0.0, ge=0, lt=1)  # in residual blocks
    temporal_conv_dropout: float = Field(0.1, ge=0, lt=1)  # 0.1 in every released model, whatever `dropout` is
    gradient_checkpointing: Recompute = knob("none")  # activations made again in the backward pass: see recompute.py

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _yes_is_full(cls, value: Any) -> Any:
        return {True: "full", False: "none"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _widths_fit(self) -> "UNetConfig":
        if min(self.channel_mult) < 1:
            raise ValueError(f"channel_mult={self.channel_mult}: every level needs at least 1")
        if self.model_channels % self.norm_groups:
            raise ValueError(
                f"model_channels={self.model_channels} is not divisible into norm_groups={self.norm_groups}"
            )
        for level, mult in enumerate(self.channel_mult):
            width = mult * self.model_channels
            attends = 2**level in self.attention_resolutions or level == len(self.channel_mult) - 1  # the middle does
            if attends and width < self.num_head_channels:
                raise ValueError(
                    f"level width {width} is narrower than one head, num_head_channels={self.num_head_channels}"
                )
        return self

    @property
    def downsampling(self) -> int:
        """Latent height and width must be multiples of this."""
        return 2 ** (len(self.channel_mult) - 1)


class ScheduleConfig(Config):
    """Forward diffusion: the noise levels, and the signal scaling of the 512 model."""

    num_timesteps: int = Field(1000, gt=1)  # diffusion steps from clean to noise
    beta_start: float = Field(0.00085, gt=0, lt=1)  # the roots of the betas rise linearly
    beta_end: float = Field(0.012, gt=0, lt=1)  # of the last step
    signal_scaling: bool = True  # damp the clean signal at high timesteps, in noising and in sampling
    signal_floor: float = Field(0.7, gt=0, le=1)  # the damping from timestep `signal_knee` on
    signal_knee: int = Field(400, gt=1)  # timesteps over which the damping falls from 1 to the floor


class AutoencoderConfig(Config):
    """Shape of the KL autoencoder; defaults are Stable Diffusion's."""

    in_channels: int = Field(3, gt=0)  # of the pictures that are encoded
    out_channels: int = Field(3, gt=0)  # of the pictures that are decoded
    latent_channels: int = Field(4, gt=0)  # of the latents
    block_out_channels: tuple[int, ...] = Field((128, 256, 512, 512), min_length=1)  # width of each level
    layers_per_block: int = Field(2, gt=0)  # residual blocks per level
    norm_groups: int = Field(32, gt=0)  # groups of every group normalisation
    scaling_factor: float = Field(0.18215, gt=0)  # brings latents to about unit variance

    @property
    def downsampling(self) -> int:
        """Pixels per latent pixel, along height and along width."""
        return 2 ** (len(self.block_out_channels) - 1)


class TextConfig(Config):
    """Shape of the text tower; defaults are OpenCLIP ViT-H/14."""

    width: int = Field(1024, gt=0)  # of the tokens
    heads: int = Field(16, gt=0)  # of every attention
    layers: int = Field(24, gt=0)  # layers the weights have
    layers_used: int = Field(23, gt=0)  # layers run before the final norm
    context_length: int = Field(77, gt=2)  # tokens of a caption, its start and end included
    vocab_size: int = Field(49408, gt=0)  # tokens that there are
    seed: int | None = Field(None, ge=0)  # a number: a seeded random tower instead of trained weights

    @model_validator(mode="after")
    def _layers_fit(self) -> "TextConfig":
        if self.layers_used > self.layers:
            raise ValueError(f"layers_used={self.layers_used} is more than layers={self.layers}")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not divisible into heads={self.heads}")
        return self


class SamplerConfig(Config):
    """How videos are sampled; defaults are those of the released text-to-video script."""

    solver: Literal["ddim", "dpm++"] = "ddim"  # dpm++: DPM-Solver++(2M), of second order, without noise
    num_steps: int = Field(50, gt=0)  # network calls per sample (twice as many with guidance)
    guidance_scale: float = Field(12.0, ge=0, le=1e4)  # 1: no guidance, one network call per step
    guidance_rescale: float = Field(0.0, ge=0, le=1)  # share of the guided prediction brought back to its usual spread
    eta: float = Field(1.0, ge=0, le=1)  # of ddim; 0: deterministic, 1: as much fresh noise as ancestral sampling
    fps: int = Field(28, ge=0)  # the frame rate told to the network
    batched_guidance: bool = knob(False)  # one network call of twice the clips: more memory, equal within rounding


class ResamplerConfig(Config):
    """Shape of the image-token resampler of the image-to-video model."""

    dim: int = Field(1024, gt=0)  # working width
    depth: int = Field(4, gt=0)  # blocks of attention
    heads: int = Field(12, gt=0)  # of every attention
    dim_head: int = Field(64, gt=0)  # width of a head
    num_queries: int = Field(16, gt=0)  # image tokens it gives
    embedding_dim: int = Field(1280, gt=0)  # width of the image tower's tokens
    output_dim: int = Field(1024, gt=0)  # context_dim of the network
    ff_mult: int = Field(4, gt=0)  # width of the hidden layers, in `dim`


class LoraConfig(Config):
    """Low-rank updates of some layers in place of their weights. VideoCrafter2 states neither rank nor layers."""

    rank: int = Field(16, gt=0)  # of an update
    alpha: float = Field(16.0, gt=0)  # an update is scaled by alpha / rank
    targets: tuple[LoraTarget, ...] = Field(("attention",), min_length=1)  # kinds of layers that get one
    dropout: float = Field(0.0, ge=0, lt=1)  # before an update


class ImageTowerConfig(Config):
    """Shape of the image tower; defaults are OpenCLIP ViT-H/14."""

    width: int = Field(1280, gt=0)  # of the tokens
    heads: int = Field(16, gt=0)  # of every attention
    layers: int = Field(32, gt=0)  # that the weights have
    image_size: int = Field(224, gt=0)  # pixels, height and width
    patch_size: int = Field(14, gt=0)  # pixels, height and width
    output_dim: int = Field(1024, gt=0)  # of the projection that the weights carry and that is not used


class ImageConfig(Config):
    """What turns an image into tokens for the image-to-video network."""

    tower: ImageTowerConfig = ImageTowerConfig()
    resampler: ResamplerConfig = ResamplerConfig()
    finegrained: bool = True  # False: `num_queries` tokens from the tower's one projected vector, without a resampler


class ModelConfig(Config):
    """Every part that sampling needs: the network that is trained and the frozen ones around it."""

    unet: UNetConfig = UNetConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    text: TextConfig = TextConfig()
    image: ImageConfig | None = None  # of an image-to-video model
    autoencoder_sha256: str = ""  # of the autoencoder's safetensors file; empty: any file will do
    autoencoder_path: str = knob("")  # where that file is
    text_weights: str = "openclip-vit-h-14"  # name in vc2.pretrained; not used where `text.seed` is a number
    text_path: str = knob("")  # a file to take instead of looking the name up
