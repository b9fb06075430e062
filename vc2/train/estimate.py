"""A dry run of a training stage: what it needs and costs on stated hardware, from counted operations and bytes.

    hours = (useful operations + those done again) / (GPUs * peak * MFU) + encoding

*Useful* operations are those of one forward and backward pass. MFU is the share of a GPU's peak that they get
(Chowdhery et al. 2022, App. B); it is assumed, not counted: 28 % is what mosaicml's published rates for Stable
Diffusion 2 come to (docs/scaling.md). What activation checkpointing computes again takes its time besides; of the
selective form, which makes nothing again that is counted, that time is not known here.
Peaks and links are those of data sheets, without sparsity; prices are assumptions to be overridden.

`python docs/scaling_tables.py` prints the tables of docs/scaling.md.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from vc2.config import Config
from vc2.data.config import SampleForm
from vc2.errors import ConfigError
from vc2.model.config import ModelConfig
from vc2.progress import duration_text
from vc2.train.config import TrainStage
from vc2.train.fit import (
    Clip,
    Counts,
    Kind,
    clips_by_phase,
    divisors,
    is_of_stills,
    largest_fitting,
    memory_by_counts,
    usable_bytes,
)

__all__ = [
    "DEFAULT_HARDWARE",
    "HARDWARE",
    "MFU",
    "RATES",
    "Estimate",
    "Hardware",
    "estimate",
    "hardware_of",
    "hours_of",
    "lines_of",
    "useful_flops",
]

MFU = 0.28
DEFAULT_HARDWARE = "a100-80"
ENCODING_RATE = 0.5  # of the peak: the encoders compute in float32, their convolutions in TF32 at half the rate of bf16
RATES: Mapping[str, float] = {"bf16": 1.0, "fp32": 0.5}  # of the peak, by the precision of the arithmetic
PEAK = 1e12


class Hardware(Config):
    """A kind of GPU."""

    tflops: float  # bfloat16 peak, dense
    memory_gib: float  # what drivers report, rounded down
    link_gb: float  # GB/s each way to the GPUs of the same machine
    network_gb: float  # GB/s each way to other machines, for each GPU: an assumption
    usd_per_hour: float  # an assumption


HARDWARE: Mapping[str, Hardware] = {
    "a100-40": Hardware(tflops=312, memory_gib=39, link_gb=300, network_gb=25, usd_per_hour=1.5),
    "a100-80": Hardware(tflops=312, memory_gib=79, link_gb=300, network_gb=25, usd_per_hour=2.0),
    "h100-80": Hardware(tflops=989, memory_gib=79, link_gb=450, network_gb=50, usd_per_hour=3.0),
    "h200-141": Hardware(tflops=989, memory_gib=139, link_gb=450, network_gb=50, usd_per_hour=3.5),
    "b200-180": Hardware(tflops=2250, memory_gib=178, link_gb=900, network_gb=50, usd_per_hour=5.0),
    "l40s-48": Hardware(tflops=362, memory_gib=44, link_gb=32, network_gb=12.5, usd_per_hour=1.0),
    "rtx4090-24": Hardware(tflops=165, memory_gib=23, link_gb=32, network_gb=3, usd_per_hour=0.5),
}


class Group(Config):
    """Parameters of one group."""

    learning: int
    frozen: int


class Estimate(Config):
    """What a stage needs and costs. Bytes are per GPU."""

    stage: Literal["full", "spatial"]
    hardware: str
    world_size: int
    parameters: dict[str, Group]
    memory: dict[str, int]  # by what it is for; activations are those of `micro_batch`
    usable_bytes: int
    gradient_checkpointing: str
    micro_batch: int
    micro_batch_is_stated: bool  # else it is the largest that fits
    passes: int  # a step has so many
    steps: int
    samples: int
    flops: float  # useful ones, of the whole stage
    flops_again: float  # of activation checkpointing
    flops_of_encoding: float
    mfu: float
    hours: float
    hours_of_encoding: float  # among them
    usd_per_hour: float
    warnings: tuple[str, ...]

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.world_size

    @property
    def usd(self) -> float:
        return self.gpu_hours * self.usd_per_hour


def estimate(
    config: TrainStage,
    forms: Mapping[Kind, SampleForm],
    *,
    hardware: str = DEFAULT_HARDWARE,
    mfu: float = MFU,
    price: float | None = None,
    encoded: bool = False,
    done: int = 0,
    counts: Counts | None = None,
) -> Estimate:
    """What a stage would need and cost.

    Args:
        config: The stage; `world_size` empty is one GPU, `micro_batch` empty the largest that fits.
        forms: Of the samples of its sets, by kind.
        hardware: Name in `HARDWARE`.
        mfu: Share of the peak that useful operations get, communication included.
        price: USD for a GPU and hour; None: that of the table.
        encoded: Samples come as latents and text features.
        done: Steps that are done already; steps, samples, operations and hours are those of the rest.
        counts: Who knows what the networks cost; None: they are counted here, which needs torch.

    Raises:
        ConfigError: If the hardware is not known, or the batch cannot be shared among the GPUs.
    """
    counts = counts or _counting()
    gpu, world_size = hardware_of(hardware), config.world_size or 1
    share, rest = divmod(config.batch_size, world_size)
    if rest:
        raise ConfigError(f"batch_size={config.batch_size} is no multiple of world_size={world_size}; change either")
    phases, stills = clips_by_phase(config, forms), is_of_stills(config, set(forms))
    sizes = {clip for _, clips in phases for clip in clips.values()}
    memory = memory_by_counts(config, sizes, world_size, stills=stills, counts=counts)
    usable = usable_bytes(config.memory_gib or gpu.memory_gib)
    fitting = largest_fitting(share, lambda size: memory.total(size) <= usable)
    micro_batch = config.micro_batch or fitting or 1

    flops = again = encoding = 0.0
    for steps, clips in _left(phases, done):
        for kind, clip in clips.items():
            samples = steps * config.batch_size * _share_of(kind, config, clips)
            useful, repeated = useful_flops(config, clip, stills=stills, counts=counts)
            flops += samples * useful
            again += samples * repeated
            encoding += 0.0 if encoded else samples * counts.count_encoding(config.model, clip).forward_flops
    encoding_hours = hours_of(encoding, world_size, gpu, mfu, ENCODING_RATE)
    return Estimate(
        stage=config.name,
        hardware=hardware,
        world_size=world_size,
        parameters={
            group: Group(learning=learning, frozen=frozen)
            for group, (learning, frozen) in counts.count_parameters(
                config.model.unet, config.strategy, stills=stills
            ).items()
        },
        memory={**memory.fixed, "activations": memory.working(micro_batch)},
        usable_bytes=usable,
        gradient_checkpointing=config.model.unet.gradient_checkpointing,
        micro_batch=micro_batch,
        micro_batch_is_stated=config.micro_batch is not None,
        passes=share // micro_batch,
        steps=max(0, config.num_steps - done),
        samples=max(0, config.num_steps - done) * config.batch_size,
        flops=flops,
        flops_again=again,
        flops_of_encoding=encoding,
        mfu=mfu,
        hours=hours_of(flops + again, world_size, gpu, mfu, RATES[config.precision]) + encoding_hours,
        hours_of_encoding=encoding_hours,
        usd_per_hour=gpu.usd_per_hour if price is None else price,
        warnings=tuple(_warnings(config, memory.total(micro_batch), usable, fitting, hardware)),
    )


def _share_of(kind: Kind, config: TrainStage, clips: Mapping[Kind, Clip]) -> float:
    """Share of the steps whose batch is of this kind."""
    if len(clips) == 1:
        return 1.0
    return config.image_share if kind == "image" else 1 - config.image_share


def hardware_of(name: str) -> Hardware:
    """A kind of GPU by its name.

    Raises:
        ConfigError: If it is not known.
    """
    if name not in HARDWARE:
        raise ConfigError(f"hardware {name!r} is not known; take one of {', '.join(HARDWARE)}")
    return HARDWARE[name]


def hours_of(flops: float, world_size: int, gpu: Hardware, mfu: float, rate: float) -> float:
    """Hours that operations take on so many GPUs, at a share of their peak and a rate of the precision."""
    return flops / (world_size * gpu.tflops * PEAK * mfu * 3600 * rate)


def useful_flops(config: TrainStage, clip: Clip, *, stills: bool, counts: Counts | None = None) -> tuple[int, int]:
    """Operations of one sample's forward and backward pass, and those that activation checkpointing does again."""
    counts, precision = counts or _counting(), config.precision
    done = counts.count_pass(config.model, config.strategy, clip, precision=precision, stills=stills)
    if config.model.unet.gradient_checkpointing != "full":  # selective: makes nothing again that is counted
        return done.forward_flops + done.backward_flops, 0
    once = counts.count_pass(_plain(config.model), config.strategy, clip, precision=precision, stills=stills)
    return once.forward_flops + once.backward_flops, done.backward_flops - once.backward_flops


def _plain(model: ModelConfig) -> ModelConfig:
    return model.evolve(unet=model.unet.evolve(gradient_checkpointing="none"))


def _counting() -> Counts:
    from vc2.train.memory import COUNTING

    return COUNTING


def _left(phases: list[tuple[int, dict[Kind, Clip]]], done: int) -> Iterator[tuple[int, dict[Kind, Clip]]]:
    """The phases without the steps that are done."""
    for steps, clips in phases:
        yield max(0, steps - done), clips
        done = max(0, done - steps)


def _warnings(config: TrainStage, total: int, usable: int, fitting: int | None, hardware: str) -> Iterator[str]:
    if total > usable:
        ways = [f"micro_batch={fitting}" if fitting else ""]
        if config.model.unet.gradient_checkpointing != "full":
            ways.append("more of model.unet.gradient_checkpointing (selective, full)")
        ways.append("more GPUs")
        yield (
            f"does not fit {hardware}: {total / 2**30:.1f} GiB of {usable / 2**30:.1f} usable; try "
            + ", or ".join(way for way in ways if way)
        )
    share = config.batch_size // (config.world_size or 1)
    if len(divisors(share)) == 2 and share > 7:
        yield f"a rank's share of {share} samples is a prime number: it can be taken at once or one by one only"
    if config.world_size is None:
        yield "world_size is not stated: figures are of one GPU"


def lines_of(found: Estimate) -> Iterator[str]:
    """An estimate as text."""
    total = sum(group.learning + group.frozen for group in found.parameters.values())
    yield f"train/{found.stage} on {found.world_size} x {found.hardware}: computed, nothing was run"
    yield ""
    yield f"{'parameters':14} {'learning':>15} {'frozen':>15}"
    for name, group in sorted(found.parameters.items()):
        yield f"  {name:12} {group.learning:15,} {group.frozen:15,}"
    learning = sum(group.learning for group in found.parameters.values())
    yield f"  {'all':12} {learning:15,} {total - learning:15,}"
    yield ""
    yield f"{'memory per GPU':14} {'GiB':>8}"
    for name, size in found.memory.items():
        yield f"  {name:12} {size / 2**30:8.2f}"
    yield f"  {'all':12} {sum(found.memory.values()) / 2**30:8.2f} of {found.usable_bytes / 2**30:.1f} usable"
    chosen = "as stated" if found.micro_batch_is_stated else "the largest that fits"
    yield ""
    yield (
        f"micro-batch    {found.micro_batch} ({chosen}), {found.passes} passes a step, "
        f"activation checkpointing: {found.gradient_checkpointing}"
    )
    yield f"steps          {found.steps:,}, {found.samples:,} samples"
    again = f", {found.flops_again:.3g} again for checkpointing" if found.flops_again else ""
    yield f"operations     {found.flops:.3g}{again}, {found.flops_of_encoding:.3g} for encoding"
    yield (
        f"time           {duration_text(3600 * found.hours)} at an assumed MFU of {found.mfu:.0%}, "
        f"{duration_text(3600 * found.hours_of_encoding)} of it encoding"
    )
    yield f"cost           {found.gpu_hours:,.0f} GPU-hours, {found.usd:,.0f} USD at {found.usd_per_hour:g} a GPU-hour"
    for warning in found.warnings:
        yield f"warning: {warning}"
