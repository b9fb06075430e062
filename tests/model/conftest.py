import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vc2.model.config import UNetConfig
from vc2.model.unet import UNet3D

REFERENCE = Path(__file__).parents[1] / "reference"


@dataclass(frozen=True)
class Golden:
    """One recorded run: what it was made with, its weights under released names, and its named arrays."""

    meta: dict
    state: dict[str, Tensor]
    arrays: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]


def load_golden(path: str, *, inside: str = "") -> Golden:
    with np.load(REFERENCE / path) as file:
        meta = json.loads(str(file["meta"]))
        arrays = {name.removeprefix(inside): torch.from_numpy(file[name]) for name in file.files if name != "meta"}
        arrays = {name: arrays[name] for name in arrays if not inside or inside + name in file.files}
    state = {name.removeprefix("sd."): tensor.float() for name, tensor in arrays.items() if name.startswith("sd.")}
    return Golden(meta, state, {name: tensor for name, tensor in arrays.items() if not name.startswith("sd.")})


@pytest.fixture
def golden() -> Callable[..., Golden]:
    """Recorded runs by their path under tests/reference."""
    return load_golden


@pytest.fixture
def name_table() -> Callable[[str], list[dict[str, str]]]:
    """Tables of names by their path under tests/reference."""

    def load(path: str) -> list[dict[str, str]]:
        with open(REFERENCE / path, newline="") as file:
            return list(csv.DictReader(file, delimiter="\t"))

    return load


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test draws the same numbers, in whatever order tests run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def tiny_config(**changes: object) -> UNetConfig:
    small = {
        "model_channels": 16,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (1, 2),
        "num_head_channels": 8,
        "context_dim": 12,
        "norm_groups": 4,
        "temporal_length": 4,
    }
    return UNetConfig(**(small | changes))


@pytest.fixture
def make_unet() -> Callable[..., UNet3D]:
    """A small network in evaluation mode, all of whose parameters are drawn, those that begin at zero too."""

    def make(**changes: object) -> UNet3D:
        unet = UNet3D(tiny_config(**changes)).eval()
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return unet

    return make
