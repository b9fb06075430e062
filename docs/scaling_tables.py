"""Prints the tables of docs/scaling.md, in Markdown: `python docs/scaling_tables.py`.

Everything is computed from counted operations and bytes (`vc2.train.memory`), the peaks and links of data sheets and
the assumptions in `vc2.train.estimate`. Nothing is measured.
"""

from collections.abc import Iterable

from vc2.model.config import ModelConfig, Recompute
from vc2.pipeline.recipes import paper
from vc2.train.config import Strategy, TrainStage
from vc2.train.estimate import ENCODING_RATE, HARDWARE, MFU, estimate, useful_flops
from vc2.train.fit import Clip, stage_forms, usable_bytes
from vc2.train.memory import count_encoding, count_parameters, count_pass, memory_of_rank

VIDEO, SQUARE = Clip(16, 320, 512), Clip(1, 512, 512)
PUBLISHED = {256: {8: 1100, 32: 4080, 128: 11600}, 512: {8: 290, 32: 1195, 128: 4590}}  # images/s: mosaicml, SD2, A100
HOST_GB = 20  # GB/s from GPU to host memory: an assumption, of PCIe 4.0 x16
CLIPS = 4  # of a GPU and step, as in the paper: 128 over 32
SNAPSHOT_BYTES = 16  # a learning parameter: master, two moments, EMA


def table(head: str, rows: Iterable[tuple[object, ...]]) -> None:
    names = head.split("|")
    print("\n| " + " | ".join(name.strip() for name in names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")


def stage_of(level: Recompute, strategy: Strategy) -> TrainStage:
    model = ModelConfig()
    return TrainStage(model=model.evolve(unet=model.unet.evolve(gradient_checkpointing=level)), strategy=strategy)


def assumed_mfu() -> None:
    """What share of an A100's peak mosaicml's published rates come to, by operations counted on the same network."""
    shape = ModelConfig()
    image_only = {"temporal_conv": False, "temporal_attention": False, "addition_attention": False, "fps_cond": False}
    model = shape.evolve(unet=shape.unet.evolve(**image_only))
    rows = []
    for side, rates in PUBLISHED.items():
        count = count_pass(model, Strategy(), Clip(1, side, side), precision="bf16", stills=False)
        flops = count.forward_flops + count.backward_flops
        peak = HARDWARE["a100-80"].tflops
        rows += [(f"{side}²", gpus, rate, flops / 1e12, f"{rate / gpus * flops / 1e12 / peak:.0%}")
                 for gpus, rate in rates.items()]  # fmt: skip
    table("images | GPUs | images/s, published | TFLOP an image, counted | MFU", rows)


def samples() -> None:
    """Operations and memory of one sample."""
    rows = []
    for name, clip, strategy in (
        ("video 512x320x16, all learn", VIDEO, Strategy()),
        ("image 512x512, spatial learn", SQUARE, Strategy(trainable="spatial")),
    ):
        encoding = count_encoding(ModelConfig(), clip)
        for level in ("none", "selective", "full"):
            stage, stills = stage_of(level, strategy), clip is SQUARE
            useful, again = useful_flops(stage, clip, stills=stills)
            count = count_pass(stage.model, strategy, clip, precision="bf16", stills=stills)
            memory = memory_of_rank(stage, [clip], 32, stills=stills)
            usable = usable_bytes(HARDWARE["a100-80"].memory_gib)
            fitting = max((size for size in range(1, 257) if memory.total(size) <= usable), default=0)
            rows.append(
                (name, level, count.forward_flops / 1e12, useful / 1e12, again / 1e12, encoding.forward_flops / 1e12,
                 count.sample_bytes / 2**30, count.cast_bytes / 2**30, fitting)
            )  # fmt: skip
    table(
        "sample | checkpointing | TFLOP forward | with backward | done again | encoding | GiB a sample | "
        "GiB of casts | fit 80 GB (32 ranks)",
        rows,
    )


def steps() -> None:
    """A step of stage 1. With ZeRO-1 each of W ranks sends (W - 1) / W of 4 bytes a parameter, twice."""
    stage = stage_of("selective", Strategy())
    useful, _ = useful_flops(stage, VIDEO, stills=False)
    learning = sum(some for some, _ in count_parameters(stage.model.unet, Strategy(), stills=False).values())
    rows = []
    for name in ("a100-80", "h100-80"):
        gpu = HARDWARE[name]
        for gpus in (8, 32, 256):
            seconds = CLIPS * useful / (gpu.tflops * 1e12 * MFU)
            exchanged = 2 * 4 * learning * (gpus - 1) / gpus / 1e9
            link = gpu.link_gb if gpus <= 8 else gpu.network_gb
            waiting = exchanged / link
            snapshot = SNAPSHOT_BYTES * learning / gpus / 1e9
            rows.append(
                (name, gpus, CLIPS * gpus, seconds, exchanged, link, waiting, f"{seconds / (seconds + waiting):.0%}",
                 CLIPS * gpus / (seconds + waiting), snapshot, snapshot / HOST_GB, snapshot * gpus / 600)
            )  # fmt: skip
    table(
        "hardware | GPUs | batch | s computing | GB exchanged | GB/s | s exchanging | efficiency | clips/s | "
        "GB of snapshot a GPU | s of copying | GB/s to the store (every 600 s)",
        rows,
    )


def budget() -> None:
    """The paper's two stages, priced."""
    config = paper()
    stages = (
        (config.full, stage_forms(video=config.webvid.form, image=config.laion_coco.form)),
        (config.spatial, stage_forms(image=config.jdb.form)),
    )
    rows = []
    for stage, forms in stages:
        for name in ("a100-80", "h100-80", "h200-141", "b200-180"):
            fly, ahead = (estimate(stage, forms, hardware=name, encoded=encoded) for encoded in (False, True))
            rows.append(
                (f"{stage.name}, {stage.world_size} GPUs", name, f"{fly.flops:.3g}", fly.hours / 24,
                 f"{fly.gpu_hours:,.0f}", f"{fly.usd:,.0f}", ahead.hours / 24, f"{ahead.gpu_hours:,.0f}",
                 f"{ahead.usd:,.0f}", f"{ahead.usd / ahead.samples * 1e6:,.0f}")
            )  # fmt: skip
    table(
        "stage | hardware | operations | days | GPU-hours | USD | days, encoded before | GPU-hours | USD | "
        "USD a million samples",
        rows,
    )


def main() -> None:
    print(f"MFU {MFU:.0%} assumed; encoding at {ENCODING_RATE:.0%} of the bf16 rate.")
    print("\n## The assumption\n\n" + str(assumed_mfu.__doc__))
    assumed_mfu()
    print("\n## A sample")
    samples()
    print("\n## A step")
    steps()
    print("\n## The budget")
    budget()


if __name__ == "__main__":
    main()
