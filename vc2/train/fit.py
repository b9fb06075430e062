"""Whether a rank's share of a step fits a GPU, and how much of it at once: arithmetic alone, without torch.

    memory of a rank = weights + gradients + its share of masters, moments and EMA       float32, 4 bytes a parameter
                     + frozen encoders
                     + the larger of: casts + micro_batch * (activations of one sample), or encoding one sample
                     + what the GPU's own software takes

*casts* are autocast's bfloat16 copies of weights that learn; it keeps them from a pass's start to its end. Activations
are counted by `vc2.train.memory`. Not modelled: workspaces of convolutions, and what the allocator cannot use; a share
of the GPU is kept free for them.
Source of the shares: Rajbhandari et al. 2020 (ZeRO), Fig. 1, with DeepSpeed's buffers.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from vc2.data.config import SampleForm
from vc2.model.config import ModelConfig, UNetConfig
from vc2.train.config import Phase, Strategy, TrainStage

__all__ = [
    "Clip",
    "Count",
    "Counts",
    "Kind",
    "RankMemory",
    "clips_by_phase",
    "divisors",
    "is_of_stills",
    "largest_fitting",
    "memory_by_counts",
    "stage_forms",
    "usable_bytes",
]

Kind = Literal["video", "image"]

CONTEXT_GIB = 1.5  # what a GPU's own software takes: context, libraries, buffers of collectives
UNUSABLE = 0.06  # share of the rest: workspaces of convolutions, and what the allocator cannot use
BUCKET = 2**27  # gradient elements that DeepSpeed reduces at once, at most


@dataclass(frozen=True, slots=True)
class Clip:
    """The size of a sample: frames (an image: 1) and pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Count:
    """What one sample costs: floating-point operations, and bytes at the worst moment beside weights and gradients."""

    forward_flops: int
    backward_flops: int  # with what is computed again for activation checkpointing
    sample_bytes: int  # for each sample of a micro-batch
    cast_bytes: int = 0  # once, however many samples


class Counts(Protocol):
    """Who knows what networks cost: `vc2.train.memory.COUNTING` counts on fake tensors, which takes torch and half a
    minute, `vc2.train.counted.SHIPPED` has looked some networks up before."""

    def count_pass(self, config: ModelConfig, strategy: Strategy, clip: Clip, *, precision: str, stills: bool) -> Count:
        """What one sample costs, forward and backward."""
        ...

    def count_encoding(self, config: ModelConfig, clip: Clip) -> Count:
        """What encoding one sample costs."""
        ...

    def count_parameters(
        self, config: UNetConfig, strategy: Strategy, *, stills: bool
    ) -> Mapping[str, tuple[int, int]]:
        """(learning, frozen) parameters of the network by group."""
        ...

    def count_encoders(self, config: ModelConfig) -> int:
        """Parameters of the frozen autoencoder and text tower."""
        ...


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes that a rank needs."""

    fixed: Mapping[str, int]  # by what they are for, whatever the micro-batch
    cast_bytes: int  # of a pass, once
    sample_bytes: int  # of a pass, for each sample
    encoding_bytes: int  # of encoding one sample, before the passes

    @classmethod
    def of(
        cls,
        *,
        learning: int,
        frozen: int,
        encoders: int,
        world_size: int,
        zero_stage: int,
        cast_bytes: int,
        sample_bytes: int,
        encoding_bytes: int,
    ) -> "RankMemory":
        """From numbers of parameters and the bytes of a pass.

        ZeRO-1 and 2 keep masters beside the weights and a flat copy of the gradients' share; ZeRO-2 gives gradients
        away bucket by bucket. Without ZeRO the weights are the masters.
        """
        share = -(-learning // world_size)
        fixed = {"weights": 4 * (learning + frozen), "gradients": 4 * learning, "moments": 8 * share, "ema": 4 * share}
        if zero_stage:
            bucket = min(learning, BUCKET)
            fixed["masters"] = 4 * share
            fixed["gradients"] = 4 * (share + bucket) + (4 * learning if zero_stage == 1 else 0)
        return cls(fixed | {"encoders": 4 * encoders}, cast_bytes, sample_bytes, encoding_bytes)

    def total(self, micro_batch: int) -> int:
        """Bytes with so many samples at once."""
        return sum(self.fixed.values()) + self.working(micro_batch)

    def working(self, micro_batch: int) -> int:
        """Those of the total that come and go with every pass."""
        return max(self.cast_bytes + micro_batch * self.sample_bytes, self.encoding_bytes)


def memory_by_counts(
    config: TrainStage, clips: Collection[Clip], world_size: int, *, stills: bool, counts: Counts
) -> RankMemory:
    """What a rank needs, by what it is for.

    Args:
        config: The stage.
        clips: Sizes of the samples that it sees; the dearest one counts.
        world_size: Ranks that share masters, moments and EMA.
        stills: The stage sees images alone.
        counts: Who knows what its networks cost.
    """
    groups = counts.count_parameters(config.model.unet, config.strategy, stills=stills)
    passes = [
        counts.count_pass(config.model, config.strategy, clip, precision=config.precision, stills=stills)
        for clip in clips
    ]
    return RankMemory.of(
        learning=sum(some for some, _ in groups.values()),
        frozen=sum(some for _, some in groups.values()),
        encoders=counts.count_encoders(config.model),
        world_size=world_size,
        zero_stage=config.zero_stage,
        cast_bytes=max(count.cast_bytes for count in passes),
        sample_bytes=max(count.sample_bytes for count in passes),
        encoding_bytes=max(counts.count_encoding(config.model, clip).sample_bytes for clip in clips),
    )


def usable_bytes(memory_gib: float, *, context_gib: float = CONTEXT_GIB) -> int:
    """What of a device's memory a rank may plan with."""
    return int(max(0.0, memory_gib - context_gib) * (1 - UNUSABLE) * 2**30)


def largest_fitting(share: int, fits: Callable[[int], bool]) -> int | None:
    """The largest micro-batch that divides a rank's share of a step and fits; None if not even one sample does."""
    return next((size for size in divisors(share) if fits(size)), None)


def divisors(number: int) -> list[int]:
    """All of them, the largest first."""
    return [divisor for divisor in range(number, 0, -1) if number % divisor == 0]


def stage_forms(*, video: SampleForm | None = None, image: SampleForm | None = None) -> dict[Kind, SampleForm]:
    """The forms of a stage's samples, by kind."""
    kinds: dict[Kind, SampleForm | None] = {"video": video, "image": image}
    return {kind: form for kind, form in kinds.items() if form is not None}


def is_of_stills(config: TrainStage, kinds: set[Kind]) -> bool:
    """Whether a stage with sets of these kinds sees images alone."""
    return "video" not in kinds or config.image_share == 1.0


def clips_by_phase(config: TrainStage, forms: Mapping[Kind, SampleForm]) -> list[tuple[int, dict[Kind, Clip]]]:
    """Steps of each phase, and the sizes of its samples. Kinds that no step asks for are left out."""
    share = config.image_share if len(forms) > 1 else 1.0 if "image" in forms else 0.0
    used: dict[Kind, SampleForm] = {
        kind: form for kind, form in forms.items() if (share > 0 if kind == "image" else share < 1)
    }
    phases, left = config.phases or (Phase(),), config.num_steps
    found = []
    for number, phase in enumerate(phases):
        steps = left if number == len(phases) - 1 or phase.steps is None else min(left, phase.steps)
        clips: dict[Kind, Clip] = {}
        for kind, form in used.items():
            frames = 1 if kind == "image" else phase.num_frames or form.num_frames
            clips[kind] = Clip(frames, phase.height or form.height, phase.width or form.width)
        found.append((steps, clips))
        left -= steps
    return [(steps, clips) for steps, clips in found if steps]
