"""How much memory it takes to load a released checkpoint, beside the network that comes out of it.

`python -m benchmarks.load_weights [--folder DIR] [--small]` makes a checkpoint of the released size, network,
autoencoder and text tower together, as safetensors and as a torch file, and loads its network in a fresh process:

    memory    highest resident memory of that process less what it was before loading, by `ru_maxrss`
    ratio     that by the size of the network's tensors in float32; the limit is 1.2
    limit     reading the file once, without doing anything with it

Needs room for one file of 7.4 GB at a time, and as much memory to make the torch file.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from vc2.model.autoencoder import Autoencoder
from vc2.model.config import AutoencoderConfig, TextConfig, UNetConfig
from vc2.model.files import Stored, Tensors, open_weights, write_tensors, write_torch
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D
from vc2.model.weights import autoencoder_to_released, load_released_unet, unet_to_released

__all__ = ["main"]

SMALL = UNetConfig(model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2, 1))


def released_checkpoint(config: UNetConfig) -> Tensors:
    """A checkpoint of that network under released names, whose numbers, all ones, are made when they are asked for."""
    with torch.device("meta"):
        unet, autoencoder = UNet3D(config).state_dict(), Autoencoder(AutoencoderConfig()).net.state_dict()
        tower = TextEncoder(TextConfig(layers_used=24)).tower.state_dict()
    parts = unet_to_released(config, Tensors.of(unet))
    parts |= autoencoder_to_released(autoencoder, 4).renamed(lambda name: f"first_stage_model.{name}")
    parts |= Tensors.of(tower).renamed(lambda name: f"cond_stage_model.model.{name}")
    return Tensors({name: _ones(stored.shape) for name, stored in parts.stored.items()})


def _ones(shape: tuple[int, ...]) -> Stored:
    return Stored(shape, torch.float32, lambda: torch.ones(shape))


def load(path: str) -> dict[str, float]:
    """Load the network of a checkpoint in this process and say what it took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    unet = load_released_unet({}, open_weights(path))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    size = sum(tensor.numel() * tensor.element_size() for tensor in unet.state_dict().values())
    return {"memory_gb": peak * 1024 / 1e9, "network_gb": size / 1e9, "ratio": peak * 1024 / size, "seconds": seconds}


def _read_once(path: Path) -> float:
    started, buffer = time.perf_counter(), bytearray(8 * 2**20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def _run(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.load_weights", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Measure both kinds of file, one after the other."""
    parser = argparse.ArgumentParser(description="Memory and time of loading a released checkpoint.")
    parser.add_argument("--folder", type=Path, default=None, help="where the files are made (default: a temporary one)")
    parser.add_argument("--small", action="store_true", help="a small network, to see that it works")
    parser.add_argument("--make", metavar="FILE", type=Path, help="only make this file")
    parser.add_argument("--load", metavar="FILE", help="only load this file, and say what it took")
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.load)))
        return
    if options.make:
        write = write_tensors if options.make.suffix == ".safetensors" else write_torch
        write(options.make, released_checkpoint(SMALL if options.small else UNetConfig()))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name in ("model.safetensors", "model.ckpt"):
            path = Path(folder) / name
            # Each in a process of its own: a child begins with the highest memory of its parent.
            _run("--make", str(path), *(["--small"] if options.small else []))
            told = json.loads(_run("--load", str(path)))
            print(
                f"{name:18} {path.stat().st_size / 1e9:5.2f} GB; network {told['network_gb']:.2f} GB, "
                f"memory {told['memory_gb']:.2f} GB, ratio {told['ratio']:.3f}; "
                f"{told['seconds']:.1f} s (reading the file alone: {_read_once(path):.1f} s)",
                flush=True,
            )
            path.unlink()


if __name__ == "__main__":
    main()
