"""Which parameters know what things look like, and which know how they move.

*spatial* are those of the image network the model starts from, *temporal* all that VideoCrafter adds: temporal
convolutions and transformers, and the frame rate's embedding. The image-to-video network has a third group, *image*:
keys and values for image tokens, new but inside the spatial transformers. Every parameter is in exactly one group; in
the released text-to-video network 865,910,724 values are spatial and 547,373,696 temporal.

Of the temporal ones some cannot act on a clip of one frame (`vc2.model.stills`): images teach them nothing.
"""

from typing import Literal, get_args

from torch import nn

from vc2.errors import ConfigError
from vc2.model.stills import idle_on_stills

__all__ = ["Group", "Trainable", "group_of", "is_temporal", "trainable_names"]

Group = Literal["spatial", "temporal", "image"]
Trainable = Literal["all", "spatial", "temporal"]

_TEMPORAL = {"fps_embedding", "first_temporal_attention", "temporal_attention", "temporal_conv"}
_IMAGE = {"image_key", "image_value"}


def group_of(name: str) -> Group:
    """The group of a parameter of `UNet3D`, by its name in `named_parameters()`."""
    parts = set(name.split("."))
    if parts & _TEMPORAL:
        return "temporal"
    return "image" if parts & _IMAGE else "spatial"


def is_temporal(name: str) -> bool:
    """Whether the parameter of `UNet3D` with this name belongs to motion rather than to appearance."""
    return group_of(name) == "temporal"


def trainable_names(unet: nn.Module, trainable: Trainable, *, stills: bool = False) -> list[str]:
    """Names of the parameters to train, in the order of `named_parameters()`.

    Args:
        unet: A `UNet3D`.
        trainable: "all" (image keys and values too), or one group alone.
        stills: Training sees images alone: leave out what cannot act on them. Convolutions over frames learn by their
            middle taps only if these were split off before (`vc2.model.stills.split_taps`).

    Raises:
        ConfigError: If `trainable` is none of these, or the network has no such parameters.
    """
    if trainable not in get_args(Trainable):
        raise ConfigError(f"trainable={trainable!r}: expected one of {', '.join(get_args(Trainable))}")
    idle = idle_on_stills(unet) if stills else frozenset[str]()
    names = [name for name, _ in unet.named_parameters() if trainable in ("all", group_of(name)) and name not in idle]
    if not names:
        raise ConfigError(f"trainable={trainable!r}: this network has no {trainable} parameters; choose another group")
    return names
