"""How much arithmetic and memory a pass takes, counted on networks without values.

The network is built of *fake* tensors, which know shape and type and hold nothing, and goes forward and backward once
with one sample. `Meter` sees every operation: it counts floating-point operations of matrix products, convolutions
and attention, two for a multiplication with its addition, and the bytes of every storage from its birth to its death.
That takes seconds and no GPU. What counts is the arithmetic of a GPU under autocast, where normalisations run in
float32. What follows for a rank: `vc2.train.fit`.
"""

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vc2.model.autoencoder import Autoencoder
from vc2.model.config import ModelConfig, UNetConfig
from vc2.model.lora import add_lora
from vc2.model.partition import group_of, trainable_names
from vc2.model.stills import split_taps
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D
from vc2.train.config import Strategy, TrainStage
from vc2.train.fit import Clip, Count, Counts, RankMemory, memory_by_counts

__all__ = [
    "COUNTING",
    "Count",
    "Meter",
    "count_encoders",
    "count_encoding",
    "count_parameters",
    "count_pass",
    "forward_pass",
    "memory_of_rank",
    "random_network",
    "sample_inputs",
    "storages_of",
    "with_gradients",
]


P = ParamSpec("P")
R = TypeVar("R")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # latents, timesteps, text, fps labels


def _once(function: Callable[P, R]) -> Callable[P, R]:
    """`functools.cache` with its types kept. Configurations are frozen, so they can be looked up."""
    return cast(Callable[P, R], cache(function))


class Meter(TorchDispatchMode):
    """Sees every operation inside the block: floating-point operations so far, bytes alive now and at the worst moment.

    Args:
        known: Tensors that were there before; what shares their storages is not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.flops = 0  # of matrix products, convolutions and attention, as torch's own flop counter has them
        self.now = self.peak = 0
        self.casts_now = self.casts_at_peak = 0  # among them: copies of what was there before in another type
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # torch's own
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        is_cast = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._known
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf.untyped_storage(), is_cast)
        return result

    def _meet(self, storage: torch.UntypedStorage, is_cast: bool) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name in self._known or name in self._alive:
            return

        def forget(_: object) -> None:
            del self._alive[name]
            self.now -= size
            self.casts_now -= size if is_cast else 0

        self._alive[name] = weakref.ref(storage, forget)
        self.now += size
        self.casts_now += size if is_cast else 0
        if self.now > self.peak:
            self.peak, self.casts_at_peak = self.now, self.casts_now


@_once
def count_pass(config: ModelConfig, strategy: Strategy, clip: Clip, *, precision: str, stills: bool) -> Count:
    """What one sample costs, forward and backward.

    Args:
        config: The model, its network with its level of activation checkpointing.
        strategy: Which parameters learn.
        clip: Size of the sample.
        precision: "bf16" or "fp32", of the arithmetic.
        stills: The stage sees images alone.
    """
    with FakeTensorMode():
        unet = _fake_network(config.unet, strategy, stills)
        if precision == "bf16":
            _as_on_gpus(unet)
        with_gradients(unet)
        inputs = sample_inputs(config, clip, 1)
        with Meter(storages_of(unet, inputs)) as meter:
            loss = forward_pass(unet, inputs, precision)
            forward = meter.flops
            loss.backward()
    return Count(forward, meter.flops - forward, meter.peak - meter.casts_at_peak, meter.casts_at_peak)


def _as_on_gpus(unet: UNet3D) -> None:
    """Make normalisations take and give float32, as autocast does on GPUs. (On CPUs they keep the type they meet.)"""
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, given: (given[0].float(),))


def forward_pass(unet: UNet3D, inputs: Inputs, precision: str) -> Tensor:
    """A forward pass as training does it, with a loss of its own."""
    latents, timesteps, text, fps = inputs
    with torch.autocast(latents.device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
        predicted = unet(latents, timesteps, text, fps=fps)
    return predicted.float().square().flatten(1).mean(1).mean()


def with_gradients(unet: UNet3D) -> None:
    """Give all parameters that learn a gradient of zero, as they have after the first pass of a step."""
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def storages_of(unet: UNet3D, inputs: Inputs) -> Iterator[Tensor]:
    """What is there before a pass begins."""
    yield from inputs
    for parameter in unet.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad


@_once
def count_parameters(config: UNetConfig, strategy: Strategy, *, stills: bool) -> Mapping[str, tuple[int, int]]:
    """(learning, frozen) parameters of the network by group: spatial, temporal, image, lora."""
    with torch.device("meta"):
        unet = random_network(config, strategy, stills=stills)
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in unet.named_parameters():
        group = "lora" if ".lora_" in name else group_of(name)
        learning, frozen = counts.get(group, (0, 0))
        size = parameter.numel()
        counts[group] = (learning + size, frozen) if parameter.requires_grad else (learning, frozen + size)
    return counts


def _fake_network(config: UNetConfig, strategy: Strategy, stills: bool) -> UNet3D:
    """The network in fake tensors, thawed as the strategy says. On the meta device first: that draws nothing."""
    with torch.device("meta"):
        unet = random_network(config, strategy, stills=stills)
    return _filled(unet).train()


def random_network(config: UNetConfig, strategy: Strategy, *, stills: bool) -> UNet3D:
    """The network at its initial values, thawed as the strategy says."""
    return _thawed(UNet3D(config), strategy, stills)


def _filled(network: nn.Module) -> Any:
    """A network of the meta device with tensors of the current mode in place of its own, values left open."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=parameter.dtype)
            module.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return network


def _thawed(unet: UNet3D, strategy: Strategy, stills: bool) -> UNet3D:
    if strategy.lora is not None:
        learning = set(add_lora(unet, strategy.lora, strategy.trainable, stills=stills))
    else:
        if stills and strategy.trainable != "spatial":
            split_taps(unet)
        learning = set(trainable_names(unet, strategy.trainable, stills=stills))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in learning)
    return unet


def sample_inputs(config: ModelConfig, clip: Clip, count: int, device: torch.device | None = None) -> Inputs:
    """What the network is given for some samples, all zero but for the labels."""
    factor = config.autoencoder.downsampling
    size = (clip.frames, clip.height // factor, clip.width // factor)
    return (
        torch.zeros(count, config.unet.in_channels, *size, device=device),
        torch.zeros(count, dtype=torch.long, device=device),
        torch.zeros(count, config.text.context_length, config.unet.context_dim, device=device),
        torch.full((count,), 8, device=device),
    )


@_once
def count_encoding(config: ModelConfig, clip: Clip) -> Count:
    """What encoding one sample costs: its frames by the autoencoder, in float32, and its caption by the text tower."""
    with FakeTensorMode():
        with torch.device("meta"):
            parts = Autoencoder(config.autoencoder), TextEncoder(config.text.evolve(seed=None))
        autoencoder, text = map(_filled, parts)
        frames = torch.zeros(1, config.autoencoder.in_channels, clip.frames, clip.height, clip.width)
        tokens = torch.zeros(1, config.text.context_length, dtype=torch.long)
        known = [*autoencoder.parameters(), *text.parameters(), frames, tokens]
        with Meter(known) as meter:
            autoencoder.moments(frames)
            text.encode_tokens(tokens)
    return Count(meter.flops, 0, meter.peak + frames.nbytes)


@_once
def count_encoders(config: ModelConfig) -> int:
    """Parameters of the frozen autoencoder and text tower."""
    with torch.device("meta"):
        parts = (Autoencoder(config.autoencoder), TextEncoder(config.text.evolve(seed=None)))
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def memory_of_rank(config: TrainStage, clips: Collection[Clip], world_size: int, *, stills: bool) -> RankMemory:
    """What a rank needs, by what it is for.

    Args:
        config: The stage.
        clips: Sizes of the samples that it sees; the dearest one counts.
        world_size: Ranks that share masters, moments and EMA.
        stills: The stage sees images alone.
    """
    return memory_by_counts(config, clips, world_size, stills=stills, counts=COUNTING)


class _Counting:
    """Counts on fake tensors, as `vc2.train.fit` asks for them."""

    count_pass = staticmethod(count_pass)
    count_encoding = staticmethod(count_encoding)
    count_parameters = staticmethod(count_parameters)
    count_encoders = staticmethod(count_encoders)


COUNTING: Counts = _Counting()
