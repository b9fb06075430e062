"""Laws of train state on disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vc2.errors import ShardCorrupted
from vc2.train.fragments import Fragment, assemble, read_fragments, write_fragments


def cut(whole: dict[str, Tensor], ranks: int) -> list[dict[Fragment, Tensor]]:
    """Parameters laid end to end and cut into equal shards, as ZeRO does."""
    size = -(-sum(tensor.numel() for tensor in whole.values()) // ranks)
    shards: list[dict[Fragment, Tensor]] = [{} for _ in range(ranks)]
    at = 0
    for name, tensor in whole.items():
        for rank in range(ranks):
            start = max(0, rank * size - at)
            stop = min(tensor.numel(), (rank + 1) * size - at)
            if start < stop:
                shards[rank][Fragment(name, start, stop)] = tensor.flatten()[start:stop]
        at += tensor.numel()
    return shards


@pytest.fixture
def whole() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"a.weight": torch.randn(7, 3), "a.bias": torch.randn(3), "odd[name].weight": torch.randn(2, 2, 5)}


@pytest.mark.parametrize(("written_by", "read_by"), [(1, 1), (2, 1), (1, 3), (3, 2), (4, 7)])
def test_any_number_of_ranks_reads_what_any_other_wrote(
    tmp_path: Path, whole: dict[str, Tensor], written_by: int, read_by: int
) -> None:
    """Re-sharding is reading what overlaps."""
    paths = [tmp_path / f"{rank}.safetensors" for rank in range(written_by)]
    for path, shard in zip(paths, cut(whole, written_by), strict=True):
        write_fragments(path, shard)
    for wanted in cut(whole, read_by):
        found = {fragment: torch.full_like(value, torch.nan) for fragment, value in wanted.items()}
        read_fragments(paths, found)
        assert all(torch.equal(found[fragment], wanted[fragment]) for fragment in wanted)


def test_whole_parameters_come_back(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    """Fragments of all ranks, put together, are the parameters."""
    paths = [tmp_path / f"{rank}.safetensors" for rank in range(3)]
    for path, shard in zip(paths, cut(whole, 3), strict=True):
        write_fragments(path, shard)
    found = assemble(paths, {name: tensor.shape for name, tensor in whole.items()})
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_missing_fragment_is_an_error(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    """A state that does not cover a parameter is never filled up in silence."""
    first, _ = cut(whole, 2)
    write_fragments(tmp_path / "0.safetensors", first)
    with pytest.raises(ShardCorrupted, match="lacks"):
        assemble([tmp_path / "0.safetensors"], {name: tensor.shape for name, tensor in whole.items()})
