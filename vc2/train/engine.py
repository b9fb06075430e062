"""Forward, backward, step: how gradients of many ranks become one update. The only module that knows DeepSpeed.

Weights are float32 and every rank computes with all of them. With ZeRO-1 each rank owns a *shard*: an equal part of
the trainable parameters laid end to end, whose moments it alone keeps and whose update it alone computes; ZeRO-2 also
splits the gradients. Without DeepSpeed (other platforms), or with `zero_stage=0`, one rank owns everything.

bf16 means arithmetic under torch's autocast on float32 weights, so frozen weights keep every bit.
Source: Rajbhandari et al. 2020 (ZeRO).
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from vc2.errors import ConfigError
from vc2.launch import this_rank
from vc2.train.config import TrainStage
from vc2.train.fit import BUCKET
from vc2.train.fragments import Fragment

__all__ = [
    "DeepSpeedEngine",
    "Engine",
    "PlainEngine",
    "create_engine",
    "device_of",
    "gather_objects",
    "join_ranks",
    "leave_ranks",
    "sum_over_ranks",
]

RANK_TIMEOUT = timedelta(minutes=5)  # after a hang, until a collective fails by itself


def device_of(config: TrainStage, local_rank: int) -> torch.device:
    """What a rank computes on.

    Raises:
        ConfigError: If a GPU is asked for and there is none.
    """
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch finds no GPU; take device=auto or cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def join_ranks(device: torch.device, patience: float) -> None:
    """Meet the other ranks: gloo between CPUs, NCCL between GPUs. A process that nobody launched stays alone.

    Args:
        device: That this rank computes on.
        patience: Seconds that a step may take. Who watches for hangs speaks first, the collectives a little later.
    """
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=patience) + RANK_TIMEOUT)


def leave_ranks() -> None:
    """Part from the other ranks."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise sums over all ranks, in double precision, equal on every rank."""
    if not torch.distributed.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return total.tolist()


def gather_objects(value: Any) -> list[Any]:
    """What every rank has to say, by rank; for rare and small things."""
    if not torch.distributed.is_initialized():
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


class Engine(ABC):
    """The five verbs of training: `forward`, `backward`, `step`, `fragments`, `load_fragments`."""

    module: nn.Module
    _offsets: dict[Fragment, int]  # where each fragment of this rank starts in its shard

    def __init__(self, precision: str) -> None:
        self._precision = precision
        self.grad_norm = 0.0  # global norm of the last step's gradient, before clipping

    @abstractmethod
    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, fps: Tensor) -> Tensor:
        """Predicted noise; shapes as in `UNet3D.forward`."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's mean loss; all micro-batches of a step count alike."""

    @abstractmethod
    def step(self, lr: float) -> bool:
        """After the last micro-batch: average, clip, update. A gradient not finite: False, and nothing changed."""

    @abstractmethod
    def shard(self, kind: str) -> Tensor:
        """This rank's part of "master", "exp_avg" or "exp_avg_sq", flat float32; shared, not copied."""

    @abstractmethod
    def _gradient(self) -> Tensor:
        """This rank's part of the averaged gradient between the last `backward` and `step`, laid out like a shard."""

    @abstractmethod
    def _count(self, num_updates: int) -> None:
        """Go on as after `num_updates` updates."""

    @abstractmethod
    def _publish(self) -> None:
        """Make the masters the weights of every rank."""

    def fragments(self, shard: Tensor) -> dict[Fragment, Tensor]:
        """A shard, or anything laid out like one, by what its elements belong to; views."""
        return {fragment: shard[at : at + fragment.stop - fragment.start] for fragment, at in self._offsets.items()}

    def grad_norms(self, group_of: Callable[[str], str]) -> dict[str, float]:
        """Norms of the gradient by group of parameters, before clipping; between the last `backward` and `step`.

        All ranks must ask at the same step.
        """
        pieces: dict[str, list[Tensor]] = {}
        for fragment, piece in self.fragments(self._gradient()).items():
            pieces.setdefault(group_of(fragment.name), []).append(torch.linalg.vector_norm(piece.detach()))
        own = {group: float(torch.stack(norms).double().square().sum()) for group, norms in pieces.items()}
        shares = gather_objects(own)
        groups = sorted({group for share in shares for group in share})
        return {group: math.sqrt(sum(share.get(group, 0.0) for share in shares)) for group in groups}

    @contextmanager
    def showing(self, shard: Tensor) -> Iterator[None]:
        """All ranks compute with other weights for a while: those of `shard`, laid out like the master.

        An error inside the block ends this rank, so nothing is put back: that would be a collective that the others,
        who know of no error, do not take part in.
        """
        master = self.shard("master")
        kept = master.clone()
        master.copy_(shard)
        self._publish()
        yield
        master.copy_(kept)
        self._publish()

    def load_fragments(self, kinds: Mapping[str, Mapping[Fragment, Tensor]], num_updates: int) -> None:
        """Take masters and moments of this rank's fragments, as they were after `num_updates` updates."""
        for kind, values in kinds.items():
            for fragment, view in self.fragments(self.shard(kind)).items():
                view.copy_(values[fragment])
        self._count(num_updates)
        self._publish()

    def load_shards(self, shards: Mapping[str, Tensor], num_updates: int) -> None:
        """Take masters and moments laid out as they are here, as they were after `num_updates` updates."""
        for kind, values in shards.items():
            self.shard(kind).copy_(values)
        self._count(num_updates)
        self._publish()

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The arithmetic of training, for passes outside of it."""
        return torch.autocast(device.type, torch.bfloat16) if self._precision == "bf16" else nullcontext()


class PlainEngine(Engine):
    """One rank, plain torch: all trainable parameters are views of one flat tensor, their gradients of another."""

    def __init__(
        self, module: nn.Module, trainable: Mapping[str, nn.Parameter], config: TrainStage, passes: int
    ) -> None:
        super().__init__(config.precision)
        self.module = module
        self._passes = passes
        self._clip = config.optimizer.clip_norm
        self._device = next(iter(trainable.values())).device
        self._master = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in trainable.values()]))
        self._master.grad = torch.zeros_like(self._master)
        self._offsets, at = {}, 0
        for name, parameter in trainable.items():
            size = parameter.numel()
            parameter.data = self._master.data[at : at + size].view(parameter.shape)
            parameter.grad = self._master.grad[at : at + size].view(parameter.shape)
            self._offsets[Fragment(name, 0, size)] = at
            at += size
        self._optimizer = _adamw([self._master], config)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, fps: Tensor) -> Tensor:
        with self.autocast(self._device):
            return self.module(latents, timesteps, text, fps=fps)

    def backward(self, loss: Tensor) -> None:
        (loss / self._passes).backward()

    def step(self, lr: float) -> bool:
        gradient = self._master.grad
        assert gradient is not None
        norm = torch.linalg.vector_norm(gradient)
        self.grad_norm = float(norm)
        finite = bool(torch.isfinite(norm))
        if finite:
            if self._clip:
                gradient.mul_(1 / ((norm + 1e-6) / self._clip).clamp(min=1.0))
            self._optimizer.param_groups[0]["lr"] = lr
            self._optimizer.step()
        gradient.zero_()
        return finite

    def shard(self, kind: str) -> Tensor:
        return self._master.data if kind == "master" else _moments(self._optimizer, self._master)[kind]

    def _gradient(self) -> Tensor:
        assert self._master.grad is not None
        return self._master.grad

    def _count(self, num_updates: int) -> None:
        _moments(self._optimizer, self._master)["step"].fill_(num_updates)

    def _publish(self) -> None:
        pass  # parameters are views of the master


class DeepSpeedEngine(Engine):
    """ZeRO-1 or ZeRO-2 by DeepSpeed around torch's AdamW, on any number of ranks."""

    def __init__(
        self, module: nn.Module, trainable: Mapping[str, nn.Parameter], config: TrainStage, passes: int
    ) -> None:
        super().__init__(config.precision)
        self._device = next(iter(trainable.values())).device
        deepspeed = import_deepspeed(self._device)
        rank = this_rank()
        size = sum(parameter.numel() for parameter in trainable.values())
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=list(trainable.values()),
            optimizer=_adamw(list(trainable.values()), config),
            config={
                "train_batch_size": config.batch_size,
                "train_micro_batch_size_per_gpu": config.batch_size // (rank.world_size * passes),
                "gradient_accumulation_steps": passes,
                "gradient_clipping": config.optimizer.clip_norm,
                "steps_per_print": None,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {
                    "stage": config.zero_stage,
                    "reduce_bucket_size": min(size, BUCKET),
                    "allgather_bucket_size": min(size, BUCKET),
                    "overlap_comm": False,
                    "contiguous_gradients": config.zero_stage > 1,
                },
            },
        )
        self.module = module
        self._engine = engine
        self._zero = engine.optimizer
        (self._flat_master,) = self._zero.single_partition_of_fp32_groups
        self._offsets = {}
        for name, parameter in trainable.items():
            if (link := vars(parameter)["_hp_mapping"]) is not None:
                start = link.lp_fragment_address.start
                fragment = Fragment(name, start, start + link.lp_fragment_address.numel)
                self._offsets[fragment] = link.hp_fragment_address.start

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, fps: Tensor) -> Tensor:
        with self.autocast(self._device):
            return self._engine(latents, timesteps, text, fps=fps)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch

    def step(self, lr: float) -> bool:
        self._zero.optimizer.param_groups[0]["lr"] = lr
        self._engine.step()
        self.grad_norm = float(self._engine.get_global_grad_norm())
        return not self._zero.overflow

    def shard(self, kind: str) -> Tensor:
        return self._flat_master.data if kind == "master" else _moments(self._zero.optimizer, self._flat_master)[kind]

    def _gradient(self) -> Tensor:
        pieces = self._zero.averaged_gradients[0]
        gradient = torch.zeros_like(self._flat_master)
        flat = torch.cat([piece.detach().flatten() for piece in pieces])
        gradient[: len(flat)] = flat[: len(gradient)]  # the last shard is filled up to the size of the others
        return gradient

    def _count(self, num_updates: int) -> None:
        _moments(self._zero.optimizer, self._flat_master)["step"].fill_(num_updates)

    def _publish(self) -> None:
        self._zero.update_lp_params()


def create_engine(module: nn.Module, trainable: Sequence[str], config: TrainStage, *, micro_batch: int) -> Engine:
    """The engine for this process. Parameters not named `trainable` are frozen: no gradient, no optimizer state.

    Args:
        module: The network, float32, on its device, in training mode.
        trainable: Names of the parameters that learn.
        config: The stage.
        micro_batch: Clips per rank and pass.

    Raises:
        ConfigError: If several ranks are asked for where DeepSpeed cannot run.
    """
    wanted = frozenset(trainable)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in wanted)
    parameters = {name: parameter for name, parameter in module.named_parameters() if name in wanted}
    rank = this_rank()
    passes = config.batch_size // (rank.world_size * micro_batch)
    if config.zero_stage and torch.distributed.is_initialized() and has_deepspeed():
        return DeepSpeedEngine(module, parameters, config, passes)
    if rank.world_size > 1:
        raise ConfigError(
            f"{rank.world_size} ranks need DeepSpeed, which has no build for this platform "
            "(or zero_stage=0 was asked for): set world_size=1"
        )
    return PlainEngine(module, parameters, config, passes)


def has_deepspeed() -> bool:
    from importlib.util import find_spec

    return find_spec("deepspeed") is not None


def import_deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils.logging import logger

    logger.setLevel("ERROR")
    # On CPU the process group would compile a shared-memory all-reduce (up to 90 s, and a compiler is needed); an empty
    # table of usable operators makes it fall back to gloo. Nothing else of ours asks that table.
    setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 - a name that types do not know
    return deepspeed


def _adamw(parameters: list[nn.Parameter], config: TrainStage) -> torch.optim.AdamW:
    settings = config.optimizer
    return torch.optim.AdamW(
        parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )


def _moments(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a flat parameter, made if no step has made it yet."""
    state = optimizer.state[flat]
    if not state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(flat)
        state["exp_avg_sq"] = torch.zeros_like(flat)
    return state
