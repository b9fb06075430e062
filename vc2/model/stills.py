"""What of the temporal modules acts on a clip of one frame, T = 1, and what cannot learn from it.

    softmax(q k' / sqrt(d)) v = v                  over one frame a softmax is 1, whatever q and k are; causal or not
    sum_j w_j x_(t+j) = w_0 x_t                    all neighbours are the padding's zeros, so only the middle tap acts

The gradient of queries, of keys and of outer taps is therefore exactly zero, not just small. An optimizer must not have
them: AdamW moves a parameter without a gradient too, by its weight decay, -lr * decay * w a step, and so would wear
motion away that no image has anything to say about. Relative positions (VideoCrafter1) of keys act as keys do. Those of
values add one constant vector, which the bias of the layer that follows can add as well; they are left out too.

Derivation, numbers and what follows for LoRA: docs/strategies.md.
"""

from collections.abc import Iterator

from torch import nn

from vc2.model.attention import Attention
from vc2.model.temporal import FrameConv, TemporalTransformer

__all__ = ["frame_convs", "idle_on_stills", "silent_on_stills", "split_taps"]


def silent_on_stills(unet: nn.Module) -> frozenset[str]:
    """Names of the modules of a `UNet3D` that say nothing on a clip of one frame: temporal queries, keys, positions."""
    silent: set[str] = set()
    for name, transformer in unet.named_modules():
        if isinstance(transformer, TemporalTransformer):
            for part, attention in transformer.named_modules(prefix=name):
                if isinstance(attention, Attention):
                    silent |= {f"{part}.{of}" for of in ("query", "key", "key_positions", "value_positions")}
    return frozenset(silent)


def frame_convs(unet: nn.Module) -> Iterator[tuple[str, FrameConv]]:
    """The convolutions over frames, by name."""
    return ((name, module) for name, module in unet.named_modules() if isinstance(module, FrameConv))


def idle_on_stills(unet: nn.Module) -> frozenset[str]:
    """Names of the parameters of a `UNet3D` that images cannot teach, or (taps in one piece) not all of."""
    silent = silent_on_stills(unet)
    idle = {name for name, _ in unet.named_parameters() if name.rpartition(".")[0] in silent}
    taps = {f"{name}.{'outer' if conv.is_split else 'weight'}" for name, conv in frame_convs(unet)}
    return frozenset(idle | taps)


def split_taps(unet: nn.Module) -> None:
    """Let the convolutions over frames of a `UNet3D` learn by their middle taps alone, in place.

    Each `weight` becomes two parameters, `middle` and `outer`. What the network computes stays, bit for bit, at any
    number of frames, and so do the names and tensors of its state dict: files of weights never know.
    """
    for _, conv in list(frame_convs(unet)):
        conv.split_taps()
