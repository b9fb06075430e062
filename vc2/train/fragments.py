"""Train state as named fragments: re-sharding is reading what overlaps.

A *fragment* is a half-open range of one flattened parameter. A rank holds some fragments of the master weights, of
both moments and of the EMA; all four *kinds* are cut alike. On disk a rank and kind is one safetensors file whose
tensor names say what they are, `down.0.conv.weight[0:4096]`, so any number of ranks can read what any other wrote.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vc2.errors import ShardCorrupted

__all__ = ["KINDS", "Fragment", "assemble", "read_fragments", "write_fragments"]

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


class Fragment(NamedTuple):
    """Elements `start` to `stop` of the flattened parameter `name`."""

    name: str
    start: int
    stop: int

    @property
    def key(self) -> str:
        return f"{self.name}[{self.start}:{self.stop}]"

    @classmethod
    def from_key(cls, key: str) -> "Fragment":
        name, _, span = key.rpartition("[")
        start, _, stop = span.rstrip("]").partition(":")
        return cls(name, int(start), int(stop))


def write_fragments(path: Path, fragments: Mapping[Fragment, Tensor]) -> None:
    """Write fragments, (stop - start,) each, to a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({fragment.key: tensor.contiguous() for fragment, tensor in fragments.items()}, str(path))


def read_fragments(paths: Iterable[Path], wanted: Mapping[Fragment, Tensor]) -> None:
    """Fill the tensors of `wanted`, (stop - start,) each, from files that were written in any partition.

    Raises:
        ShardCorrupted: If the files leave a part of a wanted fragment unfilled, or are no safetensors files.
    """
    missing = {fragment: fragment.stop - fragment.start for fragment in wanted}
    by_name: dict[str, list[Fragment]] = {}
    for fragment in wanted:
        by_name.setdefault(fragment.name, []).append(fragment)
    for path in paths:
        try:
            with safe_open(str(path), framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    found = Fragment.from_key(key)
                    for fragment in by_name.get(found.name, ()):
                        start, stop = max(found.start, fragment.start), min(found.stop, fragment.stop)
                        if start < stop:
                            piece = file.get_tensor(key)[start - found.start : stop - found.start]
                            wanted[fragment][start - fragment.start : stop - fragment.start].copy_(piece)
                            missing[fragment] -= stop - start
        except (OSError, SafetensorError) as error:
            raise ShardCorrupted(f"{path}: not a readable safetensors file ({error})") from None
    unfilled = [fragment.key for fragment, rest in missing.items() if rest]
    if unfilled:
        raise ShardCorrupted(f"a train state lacks {len(unfilled)} of {len(wanted)} fragments, first {unfilled[0]}")


def assemble(paths: Iterable[Path], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Whole float32 parameters of the given shapes from the fragments of all ranks."""
    flat = {name: torch.empty(shape.numel(), dtype=torch.float32) for name, shape in shapes.items()}
    read_fragments(paths, {Fragment(name, 0, tensor.numel()): tensor for name, tensor in flat.items()})
    return {name: tensor.view(shapes[name]) for name, tensor in flat.items()}
