"""The denoising network beside diffusers' `UNet3DConditionModel` of the same shape, in one run.

    python -m benchmarks.unet                                    # CPU: a narrow network, float32
    python -m benchmarks.unet --device cuda --compile            # GPU: the released network, bf16, 512 x 320 x 16

For each network, in a process of its own, the networks taking turns: time and peak memory of a forward pass without
gradients and of forward + backward, and TFLOP/s from counted operations. Beside them what the machine can do: the
ceiling of one large matrix product in the same type, the bandwidth of a copy, and from both the *roofline*, the sum
over all operations of max(operations / ceiling, bytes / bandwidth), counted on ours. A share of the roofline is that
time over the measured one; model FLOPs utilisation (MFU) is counted FLOP/s over the ceiling.

Times are the least of all passes, since whatever else the machine does can only add. Memory is the most beyond what
lay there before the pass (weights, and the gradients of the pass before): on a GPU of the allocator, on a CPU of the
process.
"""

import argparse
import ctypes
import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from vc2.artifacts import environment
from vc2.config import Config

__all__ = ["main"]

VARIANTS = ("ours", "peer", "ours selective", "ours full", "ours compiled", "peer compiled")


class Shape(Config):
    """What is measured: the network's width and the latents."""

    width: int  # model_channels; 320 is the released network
    height: int  # latent pixels
    columns: int
    frames: int
    clips: int
    device: str
    dtype: str

    def latents(self) -> Tensor:
        size = (self.clips, 4, self.frames, self.height, self.columns)
        return torch.randn(size, device=self.device, dtype=getattr(torch, self.dtype))


def build(variant: str, shape: Shape) -> Callable[[], Tensor]:
    """A network in training mode without dropout, and a call that runs it on random inputs."""
    torch.manual_seed(0)
    kind, _, how = variant.partition(" ")
    network = _ours(shape.width, how if how in ("selective", "full") else "none") if kind == "ours" else _peer(shape)
    network = network.to(shape.device, getattr(torch, shape.dtype)).train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    latents, text = shape.latents(), torch.randn(shape.clips, 77, 1024, device=shape.device, dtype=torch.float32)
    text = text.to(latents.dtype)
    steps = torch.full((shape.clips,), 500, device=shape.device)
    run = torch.compile(network) if how == "compiled" else network
    if kind == "ours":
        call = lambda: run(latents, steps, text, fps=8)  # noqa: E731
    else:
        call = lambda: run(latents, steps, encoder_hidden_states=text, return_dict=False)[0]  # noqa: E731
    call.network = network  # type: ignore[attr-defined]
    return call


def _ours(width: int, recompute: Any) -> nn.Module:
    from vc2.model.config import UNetConfig
    from vc2.model.unet import UNet3D

    return UNet3D(UNetConfig(model_channels=width, gradient_checkpointing=recompute))


def _peer(shape: Shape) -> nn.Module:
    from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel

    return UNet3DConditionModel(
        block_out_channels=tuple(shape.width * mult for mult in (1, 2, 4, 4)), cross_attention_dim=1024
    )


def measure(variant: str, shape: Shape, repeats: int) -> dict[str, float]:
    """Seconds and bytes of one variant in this process."""
    call = build(variant, shape)
    parameters = list(call.network.parameters())  # type: ignore[attr-defined]

    def forward() -> None:
        with torch.no_grad():
            call()

    def train() -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        call().float().square().mean().backward()

    found: dict[str, float] = {"parameters": sum(p.numel() for p in parameters)}
    for name, work in (("forward", forward), ("train", train)):
        work()
        work()  # the second of a compiled network is still slow
        found[f"{name} seconds"] = min(_seconds(work, shape.device) for _ in range(repeats))
        found[f"{name} bytes"] = _peak(work, shape.device)
    return found


def _seconds(work: Callable[[], object], device: str) -> float:
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _peak(work: Callable[[], None], device: str) -> float:
    """Most bytes while working, beyond those there before: of the allocator on a GPU, of the process on a CPU."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is given back
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def count(shape: Shape) -> dict[str, float]:
    """Floating point operations of a pass of ours and of the peer, counted, and the roofline of ours."""
    ceiling, bandwidth = _ceiling(shape), _bandwidth(shape)
    found: dict[str, float] = {"ceiling": ceiling, "bandwidth": bandwidth}
    for variant in ("ours", "peer"):
        call = build(variant, shape)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        found[f"{variant} forward flop"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            call().float().square().mean().backward()
        found[f"{variant} train flop"] = counter.get_total_flops()
        if variant == "ours":
            with Roofline(ceiling, bandwidth) as roofline, torch.no_grad():
                call()
            found["forward roofline"] = roofline.seconds
            with Roofline(ceiling, bandwidth) as roofline:
                call().float().square().mean().backward()
            found["train roofline"] = roofline.seconds
        del call
        gc.collect()
    return found


class Roofline(TorchDispatchMode):
    """Sums, over the operations that run inside, the least time that each could take by arithmetic or by memory."""

    def __init__(self, ceiling: float, bandwidth: float) -> None:
        super().__init__()
        self.ceiling, self.bandwidth, self.seconds = ceiling, bandwidth, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
        read = [t for arg in args for t in (arg if isinstance(arg, tuple | list) else [arg]) if isinstance(t, Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in read}
        fresh = [t for t in made if t.untyped_storage().data_ptr() not in storages]
        if fresh or func._schema.is_mutable:  # else a view, which costs nothing
            moved = sum(t.numel() * t.element_size() for t in (*read, *fresh))
            packet = func._overloadpacket
            flop = flop_registry[packet](*args, **(kwargs or {}), out_val=out) if packet in flop_registry else 0
            self.seconds += max(flop / self.ceiling, moved / self.bandwidth)
        return out


def _ceiling(shape: Shape) -> float:
    """FLOP/s of the best of a few large matrix products."""
    best = 0.0
    for side in (1024, 2048, 4096, 8192) if shape.device != "cpu" else (1024, 2048):
        a, b = (torch.randn(side, side, device=shape.device).to(getattr(torch, shape.dtype)) for _ in range(2))
        seconds = min(_seconds(lambda: torch.mm(a, b), shape.device) for _ in range(8))  # noqa: B023
        best = max(best, 2 * side**3 / seconds)
    return best


def _bandwidth(shape: Shape) -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.randn(2**26 if shape.device == "cpu" else 2**29, device=shape.device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / min(_seconds(lambda: target.copy_(source), shape.device) for _ in range(6))


def _child(job: dict[str, Any]) -> dict[str, float]:
    """One measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.unet", "--job", json.dumps(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _do(job: dict[str, Any]) -> dict[str, float]:
    shape = Shape.model_validate(job["shape"])
    if shape.device == "cpu":
        torch.set_num_threads(job["threads"])
    return count(shape) if job["variant"] == "count" else measure(job["variant"], shape, job["repeats"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--width", type=int, help="model_channels; default: 64 on a CPU, 320 elsewhere")
    parser.add_argument("--size", default=None, help="pixels; default: 256x128 on a CPU, 512x320 elsewhere")
    parser.add_argument("--frames", type=int, help="default: 4 on a CPU, 16 elsewhere")
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="times that the networks take turns")
    parser.add_argument("--repeats", type=int, default=3, help="passes per turn; the fastest counts")
    parser.add_argument("--compile", action="store_true", help="measure the compiled networks too")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(_do(json.loads(options.job))))
        return

    is_cpu = options.device == "cpu"
    columns, height = (int(side) // 8 for side in (options.size or ("256x128" if is_cpu else "512x320")).split("x"))
    shape = Shape(
        width=options.width or (64 if is_cpu else 320), height=height, columns=columns,
        frames=options.frames or (4 if is_cpu else 16), clips=options.clips, device=options.device,
        dtype=options.dtype or ("float32" if is_cpu else "bfloat16"),
    )  # fmt: skip
    job: dict[str, Any] = {"shape": shape.model_dump(), "threads": options.threads, "repeats": options.repeats}
    counted = _child(job | {"variant": "count"})
    variants = VARIANTS if options.compile else VARIANTS[:4]
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(options.rounds):
        for variant in variants:
            runs[variant].append(_child(job | {"variant": variant}))
    figures = {
        variant: {
            name: (min if name.endswith("seconds") else statistics.median)(run[name] for run in found)
            for name in found[0]
        }
        for variant, found in runs.items()
    }
    _say(shape, figures, counted)
    now = datetime.now(UTC)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{now:%Y-%m-%d}-unet-{shape.device}.json"
    machine = platform.machine() if is_cpu else torch.cuda.get_device_name()
    result = {
        "command": "python -m benchmarks.unet " + " ".join(sys.argv[1:]),
        "date": now.isoformat(timespec="seconds"),
        "machine": {"processor": machine, "threads": options.threads},
        "shape": shape.model_dump(), "counted": counted, "best": figures, "runs": runs, "environment": environment(),
    }  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


def _say(shape: Shape, figures: dict[str, dict[str, float]], counted: dict[str, float]) -> None:
    print(
        f"width {shape.width} ({figures['ours']['parameters'] / 1e6:.0f} M parameters), {shape.clips} x {shape.frames} "
        f"frames of {shape.columns * 8} x {shape.height * 8}, {shape.dtype} on {shape.device}; ceiling "
        f"{counted['ceiling'] / 1e12:.3g} TFLOP/s, copy {counted['bandwidth'] / 1e9:.3g} GB/s"
    )
    print(
        f"{'':16} {'pass':8} {'seconds':>9} {'of peer':>8} {'GiB':>7} {'of peer':>8} {'TFLOP/s':>8} {'MFU':>6} roofline"
    )
    for variant, found in figures.items():
        kind = variant.split()[0]
        for work in ("forward", "train"):
            seconds, size = found[f"{work} seconds"], found[f"{work} bytes"]
            rate = counted[f"{kind} {work} flop"] / seconds
            share = f"{counted[f'{work} roofline'] / seconds:7.0%}" if kind == "ours" else ""
            print(
                f"{variant:16} {work:8} {seconds:9.4f} {figures['peer'][f'{work} seconds'] / seconds:7.2f}x "
                f"{size / 2**30:7.2f} {size / figures['peer'][f'{work} bytes']:7.2f}x {rate / 1e12:8.3f} "
                f"{rate / counted['ceiling']:6.0%} {share}"
            )


if __name__ == "__main__":
    main()
