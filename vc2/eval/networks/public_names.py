"""Filling our networks from public checkpoints: a table of names, and errors in the names that the checkpoint has.

Every network here lists where each of its own tensors is found: under which public name, and, where the public
network keeps several tensors in one (queries, keys and values), in which equal part of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from vc2.model.files import Tensors, check_shapes

__all__ = ["Found", "fill", "fill_from"]


@dataclass(frozen=True, slots=True)
class Found:
    """Where a tensor is found: the part-th of `parts` equal parts, along the first axis, of a public tensor."""

    name: str
    part: int = 0
    parts: int = 1


def fill_from(module: nn.Module, tensors: Tensors, places: Mapping[str, Found], *, cause: str = "") -> None:
    """Copy a public checkpoint into all tensors of a network: every one of them, and nothing left over.

    Args:
        module: The network to fill; keeps its dtype and device.
        tensors: Under their public names.
        places: For every own name, where its tensor is found.
        cause: The likely cause of a misfit, for the error.

    Raises:
        WeightsError: If a public name is missing or unexpected or its shape differs; nothing is changed.
    """
    own = module.state_dict()
    assert own.keys() == places.keys(), own.keys() ^ places.keys()
    expected: dict[str, tuple[int, ...]] = {}
    for name, place in places.items():
        length, *rest = own[name].shape or (1,)
        expected[place.name] = (length * place.parts, *rest) if own[name].dim() else ()
    check_shapes(expected, tensors.shapes, what=tensors.what, cause=cause)
    with torch.no_grad():
        for name, place in places.items():
            stored = tensors[place.name]
            own[name].copy_(stored.chunk(place.parts)[place.part] if place.parts > 1 else stored)


def fill(
    module: nn.Module, tensors: Tensors, *, spared: Callable[[str], bool] = lambda name: False, cause: str = ""
) -> None:
    """Copy a public checkpoint into a network whose names are the public ones.

    Args:
        module: The network to fill; keeps its dtype and device.
        tensors: Under the network's own names.
        spared: Names that may be absent from the checkpoint or the network: buffers that follow from the shape.
        cause: The likely cause of a misfit, for the error.

    Raises:
        WeightsError: If a name is missing or unexpected or a shape differs; nothing is changed.
    """
    own = {name: tensor for name, tensor in module.state_dict().items() if not spared(name)}
    tensors = tensors.renamed(lambda name: None if spared(name) else name)
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    check_shapes(expected, tensors.shapes, what=tensors.what, cause=cause)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
