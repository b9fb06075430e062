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

__all__ = [
    "STAGE_VERSION",
    "Launcher",
    "Layout",
    "OptimizerConfig",
    "Phase",
    "SpikeGuard",
    "Strategy",
    "TrainStage",
    "Validation",
]

STAGE_VERSION = 3  # raised by hand whenever the same request gives other weights


class Strategy(Config):
    """Which parts of the network learn, and how (VideoCrafter2, Sec. 3 and Table 3)."""

    trainable: Literal["all", "spatial", "temporal"] = "all"  # which modules are trained; the rest is frozen
    lora: LoraConfig | None = None  # learn low-rank updates of those parts; None: the parts themselves, directly


class OptimizerConfig(Config):
    """AdamW with a linear warm-up to a constant rate."""

    lr: float = Field(5e-5, gt=0)  # learning rate after the warm-up
    betas: tuple[float, float] = (0.9, 0.999)  # of the moving means of gradients and of their squares
    eps: float = Field(1e-8, gt=0)  # added to the root of the second
    weight_decay: float = Field(0.01, ge=0)  # per step, in units of the learning rate
    warmup_steps: int = Field(0, ge=0)  # over which the rate rises from 0
    clip_norm: float = Field(1.0, ge=0)  # global norm of the gradient; 0: no clipping

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))


class Phase(Config):
    """A part of a run: what its clips look like, and how fast they are learnt from. Empty: as in the shards, as before.

    Clips are fitted to a smaller size (covering it, the middle cut out) or to fewer frames (the middle ones), so a run
    can begin cheaply. Their fps label stays true. Shards of latents (`vc2.train.precompute`) cannot be fitted.
    """

    steps: int | None = Field(None, gt=0, description="steps it lasts; empty (the last one only): to the end")
    num_frames: int | None = Field(None, ge=2, description="frames of a clip; images have one whatever this says")
    width: int | None = Field(None, gt=0, description="pixels; with height")
    height: int | None = Field(None, gt=0, description="pixels; with width")
    lr: float | None = Field(None, gt=0, description="learning rate in place of optimizer.lr")

    @model_validator(mode="after")
    def _whole(self) -> "Phase":
        if (self.width is None) != (self.height is None):
            raise ValueError(f"width={self.width} and height={self.height}: give both or neither")
        return self


class SpikeGuard(Config):
    """When a loss is so far above what is usual that the last updates are taken back."""

    sigmas: float = Field(8.0, gt=1, description="standard deviations above the moving mean that are a spike")
    memory: int = Field(200, ge=10, description="steps that the moving mean remembers, and those without a judgement")
    snapshot_every: int = Field(50, gt=0, description="steps between the points that can be gone back to")
    max_rewinds: int = Field(5, ge=0, description="within `memory` steps; one more ends the run")


class Validation(Config):
    """What is looked at while training goes on. It changes nothing of the training."""

    every: int | None = Field(None, gt=0, description="steps between validations; empty: none")
    clips: int = Field(32, gt=0, description="samples whose loss is measured, with noise that never changes")
    prompts: tuple[str, ...] = Field((), description="captions that videos are made for, by EMA and raw weights")
    sampler_steps: int = Field(25, gt=0)  # network calls per video
    guidance_scale: float = Field(12.0, ge=0)  # of these videos


Launcher = Literal["local", "ray", "env"]


class TrainStage(Config):
    """A training stage: `full` (videos and images) or `spatial` (images tune what things look like)."""

    name: Literal["full", "spatial"] = "full"  # which of the two
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
    spikes: SpikeGuard | None = None  # None: losses are not judged
    phases: tuple[Phase, ...] = ()  # one after the other; none: clips as they are, to the end
    ema_decay: float = Field(0.9999, ge=0, lt=1)  # of the moving mean of the weights that is sampled from
    precision: Literal["fp32", "bf16"] = "bf16"  # of the arithmetic; weights, moments and EMA are always float32
    seed: int = Field(0, ge=0)  # of noise, timesteps, order and dropped captions

    num_steps: int = knob(270_000, gt=0)  # more steps continue the run
    launcher: Launcher = knob("local", description="who starts the ranks: torchrun here, Ray, or somebody else (env)")
    world_size: int | None = knob(None, gt=0)  # ranks; None: those of the first attempt, else one per GPU, else one
    micro_batch: int | None = knob(None, gt=0)  # clips per rank and pass; None: as at first, else what memory allows
    memory_gib: float | None = knob(None, gt=0)  # of a GPU, to plan for; None: what it has
    threads: int | None = knob(None, gt=0)  # CPU threads per rank; None: those of the first attempt, else a fair share
    zero_stage: Literal[0, 1, 2] = knob(1)  # 0: no partition, one rank only
    deterministic: bool = knob(False)  # bit-equal runs on GPUs, at some cost; on CPU runs are bit-equal anyway
    compile: bool = knob(False)  # the network through torch.compile: other rounding, like another device
    device: Literal["auto", "cpu", "cuda"] = knob("auto")  # auto: a GPU where there is one
    sd_path: str = knob("")  # a file to take instead of looking `sd_init` up
    cache_mib: int = knob(512, ge=0)  # memory per rank for encoded samples that come again

    log_every: int = knob(10, gt=0)  # steps per line of metrics
    validation: Validation = knob(Validation())
    tensorboard: bool = knob(True)  # curves in the work folder, beside the lines in the store
    wandb_project: str = knob("")  # curves at Weights & Biases too (extra `wandb`); empty: none
    peak_tflops: float | None = knob(None, gt=0)  # of a GPU in this precision, for MFU; None: looked up by its name

    state_every_seconds: float = knob(600.0, gt=0)  # seconds between train states
    state_every_steps: int | None = knob(None, gt=0)  # steps between train states, instead of seconds
    keep_states: int = knob(2, gt=0)  # the newest ones
    keep_every_steps: int | None = knob(None, gt=0)  # states at multiples of it are made, and kept for good
    outage_seconds: float = knob(3600.0, ge=0)  # training goes on for so long while the store takes nothing
    heartbeat_seconds: float = knob(10.0, gt=0)  # a writer silent for three of these may be replaced
    hang_seconds: float = knob(1800.0, gt=0)  # a step that takes longer is a hang: stacks are kept, the run ends
    max_skipped: int = knob(10, ge=0)  # steps in a row without a finite loss and gradient before the run stops
    retries: int = knob(2, ge=0)  # new attempts after failures that may pass (store, communication, killed)

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
        multiple = self.model.autoencoder.downsampling * self.model.unet.downsampling
        for number, phase in enumerate(self.phases):
            if (phase.width or 0) % multiple or (phase.height or 0) % multiple:
                raise ValueError(
                    f"phases[{number}] asks for {phase.width} x {phase.height} pixels: expected multiples of {multiple}"
                )
        if endless := [number for number, phase in enumerate(self.phases[:-1]) if phase.steps is None]:
            raise ValueError(f"phases[{endless[0]}] has no steps; only the last phase may go on to the end")
        return self

    @property
    def last_phase(self) -> Phase:
        """The phase that a run ends with."""
        return self.phases[-1] if self.phases else Phase()

    def phase_at(self, step: int) -> Phase:
        """The phase of a step, counted from 0; after the last one it goes on."""
        for phase in self.phases:
            if phase.steps is None or step < phase.steps:
                return phase
            step -= phase.steps
        return self.last_phase

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: that of its phase, warmed up from the start of the run."""
        settings, lr = self.optimizer, self.phase_at(step).lr
        return settings.lr_at(step) * (lr / settings.lr if lr else 1.0)


class Layout(Config):
    """How a run is spread over processes. Recorded by the first attempt and reused: equal layout, equal bits."""

    world_size: int = Field(gt=0)
    micro_batch: int = Field(gt=0)
    threads: int = Field(gt=0)
