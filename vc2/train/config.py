"""What a training stage is asked to do. The paper's figures are the defaults where the paper states them.

What can change the weights is identity and goes into the fingerprint; how the work is laid out (ranks, micro-batches,
intervals, paths, and how many steps) is a knob. Two layouts give the same training within rounding; the same layout
gives the same bits.
"""

from typing import Literal

from pydantic import Field, model_validator

from vc2.config import Config, knob
from vc2.data.config import LoaderSettings
from vc2.model.config import LoraConfig, ModelConfig

__all__ = ["STAGE_VERSION", "Layout", "OptimizerConfig", "Strategy", "TrainStage"]

STAGE_VERSION = 2  # raised by hand whenever the same request gives other weights


class Strategy(Config):
    """Which parts of the network learn, and how (VideoCrafter2, Sec. 3 and Table 3)."""

    trainable: Literal["all", "spatial", "temporal"] = "all"
    lora: LoraConfig | None = None  # learn low-rank updates of those parts; None: the parts themselves, directly


class OptimizerConfig(Config):
    """AdamW with a linear warm-up to a constant rate."""

    lr: float = Field(5e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(0, ge=0)
    clip_norm: float = Field(1.0, ge=0)  # global norm of the gradient; 0: no clipping

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))


class TrainStage(Config):
    """A training stage: `full` (videos and images) or `spatial` (images tune what things look like)."""

    name: Literal["full", "spatial"] = "full"
    model: ModelConfig = ModelConfig()
    strategy: Strategy = Strategy()
    sd_init: str = ""  # name in vc2.pretrained of Stable Diffusion weights for the spatial part; empty: none
    sd_sha256: str = ""  # of that file; empty: any file of that name will do
    start_weights: Literal["ema", "raw"] = "ema"  # which weights of the checkpoint that the stage starts from
    batch_size: int = Field(128, gt=0)  # clips per step over all ranks
    image_share: float = Field(0.0, ge=0, le=1)  # share of steps whose batch is images
    loader: LoaderSettings = LoaderSettings()
    caption_dropout: float = Field(0.1, ge=0, lt=1)  # share of captions replaced by the empty text, for guidance
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "bf16"  # of the arithmetic; weights, moments and EMA are always float32
    seed: int = Field(0, ge=0)

    num_steps: int = knob(270_000, gt=0)  # more steps continue the run
    world_size: int | None = knob(None, gt=0)  # ranks; None: those of the first attempt, else one per GPU, else one
    micro_batch: int | None = knob(None, gt=0)  # clips per rank and pass; None: those of the first attempt, else all
    threads: int | None = knob(None, gt=0)  # CPU threads per rank; None: those of the first attempt, else a fair share
    zero_stage: Literal[0, 1, 2] = knob(1)  # 0: no partition, one rank only
    deterministic: bool = knob(False)  # bit-equal runs on GPUs, at some cost; on CPU runs are bit-equal anyway
    device: Literal["auto", "cpu", "cuda"] = knob("auto")
    sd_path: str = knob("")  # a file to take instead of looking `sd_init` up
    cache_mib: int = knob(512, ge=0)  # memory per rank for encoded samples that come again
    log_every: int = knob(10, gt=0)  # steps per line of metrics
    state_every_seconds: float = knob(600.0, gt=0)  # seconds between train states
    state_every_steps: int | None = knob(None, gt=0)  # steps between train states, instead of seconds
    keep_states: int = knob(2, gt=0)
    heartbeat_seconds: float = knob(10.0, gt=0)  # a writer silent for three of these may be replaced

    @model_validator(mode="after")
    def _fits(self) -> "TrainStage":
        if self.model.unet.in_channels != self.model.autoencoder.latent_channels:
            raise ValueError(
                f"unet.in_channels={self.model.unet.in_channels} but the autoencoder has "
                f"latent_channels={self.model.autoencoder.latent_channels}: they must be equal"
            )
        if self.model.unet.context_dim != self.model.text.width:
            raise ValueError(
                f"unet.context_dim={self.model.unet.context_dim} but text.width={self.model.text.width}: "
                "they must be equal"
            )
        if self.zero_stage == 0 and (self.world_size or 1) > 1:
            raise ValueError(f"zero_stage=0 runs on one rank, not on world_size={self.world_size}; take zero_stage=1")
        ranks = self.world_size or 1
        if self.batch_size % (ranks * (self.micro_batch or 1)):
            raise ValueError(
                f"batch_size={self.batch_size} is no multiple of world_size x micro_batch = "
                f"{ranks} x {self.micro_batch or 1}"
            )
        return self


class Layout(Config):
    """How a run is spread over processes. Recorded by the first attempt and reused: equal layout, equal bits."""

    world_size: int = Field(gt=0)
    micro_batch: int = Field(gt=0)
    threads: int = Field(gt=0)
