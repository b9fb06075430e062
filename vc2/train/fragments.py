"""Train state as named fragments: re-sharding is reading what overlaps.

A *fragment* is a half-open range of one flattened parameter. A rank holds some fragments of the master weights, of
both moments and of the EMA; all four *kinds* are cut alike. On disk a rank and kind is one safetensors file whose
tensor names say what they are, `down.0.conv.weight[0:4096]`, so any number of ranks can read what any other wrote.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vc2.errors import ShardCorrupted
from vc2.storage import FileDigest, write_pieces

__all__ = ["KINDS", "Fragment", "assemble", "fragment_pieces", "read_fragments", "write_fragments"]

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


def fragment_pieces(fragments: Mapping[Fragment, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of float32 fragments, (stop - start,) each, on the CPU: its header, then the
    memory of the tensors itself. Nothing is copied, so whoever reads them sends a state as it lies in memory."""
    header, end = {}, 0
    for fragment, tensor in fragments.items():
        start, end = end, end + 4 * tensor.numel()
        header[fragment.key] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in fragments.values():
        if tensor.dtype != torch.float32:
            raise ValueError(f"a fragment is of {tensor.dtype}; train states are float32")
        yield tensor.detach().contiguous().numpy().data.cast("B")


def write_fragments(path: Path, fragments: Mapping[Fragment, Tensor]) -> FileDigest:
    """Write fragments, (stop - start,) float32 each, to a safetensors file; its digest is taken on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_pieces(path, fragment_pieces(fragments))


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
