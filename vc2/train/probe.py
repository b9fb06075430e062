"""How many samples a GPU takes at once: by the memory model, then by one real step in a process of its own.

The parent asks, a single rank answers and is gone, so a step that runs out of memory hurts nobody. It makes the
network of random values, holds as much memory besides as the rank of a run would (moments, masters, EMA, encoders),
goes forward and backward once with the micro-batch that the model believes in, and tries smaller ones until one fits.
The answer is recorded in the layout of the run's first attempt, so later attempts do not ask again.

On CPUs nobody asks, and all samples of a rank go at once, unless `memory_gib` is set: then the same way is gone, with
the bytes of all tensors in place of what a GPU's allocator says.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vc2.artifacts import Manifest, ShardSet, load_manifest
from vc2.config import Config
from vc2.data.config import SampleForm
from vc2.errors import ConfigError
from vc2.launch import run_rank, run_ranks
from vc2.storage import Store
from vc2.train.config import TrainStage
from vc2.train.fit import Clip, Kind, RankMemory, clips_by_phase, divisors, is_of_stills, usable_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["ProbeRequest", "ProbeResult", "fitting_micro_batch", "main"]


class ProbeRequest(Config):
    """What the rank is asked."""

    stage: TrainStage
    forms: dict[Kind, SampleForm]
    world_size: int
    result: str  # file that the answer is written to


class ProbeResult(Config):
    """What it answers."""

    micro_batch: int
    predicted_bytes: int  # by the memory model, with that micro-batch
    measured_bytes: int  # by the dry step
    usable_bytes: int
    refused: tuple[int, ...]  # micro-batches that the model believed in and the step did not


def fitting_micro_batch(
    config: TrainStage, store: Store, shards: Sequence[ShardSet], work: Path, world_size: int
) -> int:
    """A micro-batch that fits, for the samples of some shard sets: the largest believed to, or half of it, and so on.

    Raises:
        ConfigError: If a set does not say how large its samples are.
        LaunchFailed: If the dry step failed, or not even one sample fits.
    """
    folder = work / "train"
    folder.mkdir(parents=True, exist_ok=True)
    asked, answer = folder / f"probe-{config.name}.json", folder / f"probe-{config.name}-result.json"
    answer.unlink(missing_ok=True)
    forms = _forms(store, shards)
    request = ProbeRequest(stage=config, forms=forms, world_size=world_size, result=str(answer))
    asked.write_text(request.model_dump_json(indent=1))
    run_ranks("vc2.train.probe", str(asked), world_size=1, work=work, name=f"probe-{config.name}")
    return ProbeResult.model_validate_json(answer.read_text()).micro_batch


def _forms(store: Store, shards: Sequence[ShardSet]) -> dict[Kind, SampleForm]:
    """The largest form of each kind."""
    found: dict[Kind, SampleForm] = {}
    for one in shards:
        manifest = load_manifest(store, one.prefix)
        form = SampleForm.model_validate(_form_of(manifest))
        kind: Kind = "video" if manifest.facts.get("media") == "video" else "image"
        if kind not in found or _size(form) > _size(found[kind]):
            found[kind] = form
    return found


def _form_of(manifest: Manifest) -> Any:
    """How large the samples of a set are: of latents, the pixels that they were made from."""
    form = manifest.config.get("form") or manifest.facts.get("form")
    if form is None:
        raise ConfigError(
            f"shard set {manifest.fingerprint[:12]} does not say how large its samples are; set micro_batch"
        )
    return form


def _size(form: SampleForm) -> int:
    return form.num_frames * form.width * form.height


def main(path: str) -> None:
    """Answer the request in a file."""
    from vc2.train.memory import memory_of_rank

    request = ProbeRequest.model_validate_json(Path(path).read_text())
    config, share = request.stage, request.stage.batch_size // request.world_size
    stills = is_of_stills(config, set(request.forms))
    clips = {clip for _, sizes in clips_by_phase(config, request.forms) for clip in sizes.values()}
    device, usable = _device(config)
    memory = memory_of_rank(config, clips, request.world_size, stills=stills)
    sizes = [size for size in divisors(share) if memory.total(size) <= usable]
    if not sizes:
        raise ConfigError(_too_large(memory, usable))
    step, refused = _DryStep(config, clips, memory, device, stills=stills), []
    while sizes:
        size = sizes[0]
        measured = step.bytes_with(size)
        if measured is not None and measured <= usable:
            result = ProbeResult(
                micro_batch=size,
                predicted_bytes=memory.total(size),
                measured_bytes=measured,
                usable_bytes=usable,
                refused=tuple(refused),
            )
            Path(request.result).write_text(json.dumps(result.model_dump(mode="json"), indent=1))
            return
        refused.append(size)
        sizes = [smaller for smaller in sizes if smaller <= size // 2]
    raise ConfigError(f"the memory model believed in micro-batches of {refused}, and no dry step fitted; {WAYS}")


WAYS = "recompute more (model.unet.gradient_checkpointing), take smaller samples, more GPUs or larger ones"


def _too_large(memory: RankMemory, usable: int) -> str:
    return f"one sample at a time needs {memory.total(1) / 2**30:.1f} GiB, {usable / 2**30:.1f} are usable; {WAYS}"


def _device(config: TrainStage) -> "tuple[torch.device, int]":
    """Where training will compute, and the bytes it may use there."""
    import torch

    if config.device == "cpu" or not torch.cuda.is_available():
        assert config.memory_gib is not None, "nobody asks for CPUs without a limit"
        return torch.device("cpu"), usable_bytes(config.memory_gib, context_gib=0)
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    if config.memory_gib is not None and config.memory_gib < total:
        torch.cuda.set_per_process_memory_fraction(config.memory_gib / total, device)
        total = config.memory_gib
    return device, usable_bytes(total)


class _DryStep:
    """A network of random values, with as much memory held besides as a rank of the run holds."""

    def __init__(
        self, config: TrainStage, clips: set[Clip], memory: RankMemory, device: "torch.device", *, stills: bool
    ) -> None:
        import torch

        from vc2.train.memory import random_network, with_gradients

        self._config, self._device, self._memory = config, device, memory
        self._clips = sorted(clips, key=lambda clip: -clip.frames * clip.height * clip.width)
        self._unet = random_network(config.model.unet, config.strategy, stills=stills).to(device).train()
        with_gradients(self._unet)
        held = sum(
            tensor.nbytes
            for parameter in self._unet.parameters()
            for tensor in (parameter, parameter.grad)
            if tensor is not None
        )
        besides = max(0, sum(memory.fixed.values()) - held) if device.type == "cuda" else 0
        self._besides = torch.empty(besides, dtype=torch.uint8, device=device)

    def bytes_with(self, micro_batch: int) -> int | None:
        """What a step with so many of the largest samples takes, all in all; None: more than there is."""
        import torch

        from vc2.train.memory import Meter, forward_pass, sample_inputs, storages_of

        inputs = sample_inputs(self._config.model, self._clips[0], micro_batch, self._device)
        if self._device.type == "cpu":
            with Meter(storages_of(self._unet, inputs)) as meter:
                forward_pass(self._unet, inputs, self._config.precision).backward()
            return sum(self._memory.fixed.values()) + meter.peak
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            forward_pass(self._unet, inputs, self._config.precision).backward()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)


if __name__ == "__main__":
    run_rank(main)
