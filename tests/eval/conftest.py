"""Two made-up reports: one with everything in it, as a run of the small recipe would fill it in, and one about a
folder of videos that were only scored."""

import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vc2.data.video_files import encode_mp4
from vc2.eval.metrics import EVALCRAFTER, METRICS
from vc2.eval.report import (
    BeforeAfter,
    Judged,
    LineageNode,
    LossCurve,
    ReportData,
    SampleRow,
    ScoreRow,
    ShardSheet,
    SheetItem,
    Timing,
)
from vc2.eval.scorecard import Summary, partial_aspect_scores
from vc2.seeding import generator

JUDGES = (
    Judged("colour", "colour", "the thing has the colour of the prompt"),
    Judged("shape", "shape", "its outline fits the shape of the prompt"),
    Judged("direction", "direction", "it moves the way the prompt says"),
    Judged("watermark", "no watermark", "nothing like the stock footage's watermark is seen"),
    Judged("sharpness", "sharpness", "width of edges, 1 is a crisp edge"),
    Judged("flicker", "flicker", "change of brightness between frames that no motion explains", "down"),
)
COLOURS = {
    "red": (220, 50, 45),
    "green": (45, 175, 70),
    "blue": (50, 90, 230),
    "yellow": (245, 210, 50),
    "purple": (170, 60, 200),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def draw(width: int, height: int, shape: str, colour: str, x: float, y: float, size: float, tint: int) -> np.ndarray:
    """A coloured thing on a shaded background, (height, width, 3) uint8."""
    ys, xs = np.mgrid[0:height, 0:width]
    dx, dy = (xs - x) / size, (ys - y) / size
    inside = {
        "circle": 1 - np.hypot(dx, dy),
        "square": 0.85 - np.maximum(abs(dx), abs(dy)),
        "triangle": 0.5 - np.maximum(dy * 0.8, abs(dx) * 0.9 + dy * 0.45),
    }[shape]
    cover = np.clip(inside * size + 0.5, 0, 1)[..., None]
    back = (tint + 14 * np.sin(xs / 9 + ys / 17))[..., None] * np.array([1.0, 0.97, 0.92])
    return (cover * np.array(COLOURS[colour]) + (1 - cover) * back).round().clip(0, 255).astype(np.uint8)


def soften(frame: np.ndarray, rounds: int) -> np.ndarray:
    frame = frame.astype(float)
    for _ in range(rounds):
        for axis in (0, 1):
            frame = (np.roll(frame, 1, axis) + 2 * frame + np.roll(frame, -1, axis)) / 4
    return frame


def _clip(index: int, *, blur: int = 0) -> tuple[str, bytes, list[np.ndarray]]:
    rng = generator(7, "report", index)
    colour, shape, motion = (str(rng.choice(list(words))) for words in (COLOURS, SHAPES, DIRECTIONS))
    (dx, dy), x, y = DIRECTIONS[motion], rng.uniform(30, 50), rng.uniform(20, 28)
    frames = np.stack([draw(80, 48, shape, colour, x + dx * 3 * t, y + dy * 2 * t, 11, 120) for t in range(-4, 4)])
    if blur:
        noise = generator(8, index).normal(0, 4 * blur, frames.shape)
        frames = np.clip(np.stack([soften(frame, blur) for frame in frames]) + noise, 0, 255).astype(np.uint8)
    return f"a {colour} {shape} moves {motion} over a grey background", encode_mp4(frames, 8), list(frames)


def _jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _still(index: int) -> SheetItem:
    rng = generator(9, "still", index)
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    return SheetItem(f"a {colour} {shape}, crisp vector art", [_jpeg(draw(64, 64, shape, colour, 32, 32, 20, 200))])


def _losses(steps: int, start: float, end: float) -> list[tuple[float, float]]:
    rng = generator(3, "losses", steps)
    return [
        (
            float(step),
            end
            + (start - end) * math.exp(-6 * step / steps)
            + float(rng.normal(0, 0.03)) * (0.4 + 0.6 * math.exp(-step / 200)),
        )
        for step in range(0, steps + 1, 5)
    ]


def _scores(index: int, chance: float) -> dict[str, float]:
    rng = generator(4, "scores", index, str(chance))
    shares = {name: float(rng.random() < chance) for name in ("colour", "shape", "direction", "watermark")}
    return shares | {"sharpness": chance * 0.9, "flicker": (1.02 - chance) / 10}


def fake_report(num_rows: int = 8) -> ReportData:
    """A whole report about a made-up run."""
    rows, pairs, items = [], [], []
    for index in range(num_rows):
        caption, real, frames = _clip(index)
        _, sample, _ = _clip(index, blur=1)
        _, before, _ = _clip(index, blur=3)
        real = None if index == 3 else real
        note = "No caption of the training data says this." if index == 3 else ""
        rows.append(SampleRow(caption, sample, real, _scores(index, 0.8), _scores(index, 0.99) if real else {}, note))
        pairs.append(BeforeAfter(caption, before, sample, _scores(index, 0.55), _scores(index, 0.8)))
        items.append(SheetItem(caption, [_jpeg(frame) for frame in frames], fps=(8, 10, 12, 25)[index % 4]))
    averages = [("stage 1", 0.55), ("stage 1 + 2", 0.8), ("real clips", 0.99)]
    table = [
        ScoreRow(
            name,
            {
                judge.name: Summary(chance if judge.name != "flicker" else (1.02 - chance) / 10, 16, index < 4)
                for index, judge in enumerate(JUDGES)
            },
            name == "real clips",
        )
        for name, chance in averages
    ]
    nodes = [
        LineageNode("shard/webvid", "shard_set", "a1" * 32, "0f" * 32, (), "192 samples"),
        LineageNode("shard/laion-coco", "shard_set", "b2" * 32, "1e" * 32, (), "240 samples"),
        LineageNode("shard/jdb", "shard_set", "c3" * 32, "2d" * 32, (), "360 samples"),
        LineageNode(
            "train/full", "checkpoint", "d4" * 32, "3c" * 32, ("shard/webvid", "shard/laion-coco"), "1200 steps"
        ),
        LineageNode("train/spatial", "checkpoint", "e5" * 32, "4b" * 32, ("train/full", "shard/jdb"), "300 steps"),
        LineageNode("samples", "sample_set", "f6" * 32, "5a" * 32, ("train/spatial",), "16 videos"),
        LineageNode("samples of stage 1", "sample_set", "07" * 32, "69" * 32, ("train/full",), "16 videos"),
        LineageNode("scores", "scorecard", "18" * 32, "78" * 32, ("samples",), "3 sets judged"),
    ]
    stills = [_still(i) for i in range(16)]
    metrics = {name: {"not_measured": f"weights not found: {', '.join(METRICS[name].weights)}"} for name in EVALCRAFTER}
    return ReportData(
        trained_minutes=5.8,
        hardware="2 cores of some processor",
        rows=rows,
        before_after=pairs[:4],
        curves=[
            LossCurve("train/full", _losses(1200, 1.0, 0.21), 1.0, "videos and images, two ranks"),
            LossCurve("train/spatial", _losses(300, 0.34, 0.24), 1.0, "art images, one frame, spatial modules alone"),
        ],
        judges=JUDGES,
        scores=table,
        benchmark={"metrics": metrics, "mode": "compat", "aspects": {}, "withheld": partial_aspect_scores({})[1]},
        shards=[
            ShardSheet("webvid", 240, 203, {"truncated": 9, "too_short": 14, "not_a_video": 6}, 8, 4, 9_400_000, items),
            ShardSheet("laion-coco", 294, 240, {"http_404": 31, "not_an_image": 15}, 8, 3, 1_200_000, stills[:8]),
            ShardSheet("jdb", 400, 360, {"truncated": 12}, 28, 4, 2_100_000, stills[8:]),
        ],
        lineage=nodes,
        config={"full": {"lr": 3e-4, "num_steps": 1200}, "evaluation": {"sampler": {"num_steps": 25}}},
        timings=[
            Timing("world", 9.2), Timing("shard/webvid", 31.5), Timing("shard/laion-coco", 12.0),
            Timing("shard/jdb", 8.8, True),
            Timing("train/full", 285.0), Timing("train/spatial", 61.0), Timing("evaluate", 55.3),
        ],
        environment={"python": "3.11.7", "torch": "2.15.0", "system": "Linux", "machine": "x86_64"},
        figures={"videos and images seen": "38,400", "parameters": "3.1 M", "losses below trivial": "79 %"},
        created_at="2026-01-01T12:00:00+00:00",
        fingerprint="29" * 32,
    )  # fmt: skip


TAGS = (
    {"count": "3 circle", "detection": "dog"},
    {"color": "red circle"},
    {},
    {"text": "STOP", "detection": "dog, stop sign"},
    {"amplitude": "large"},
    {"celebrity": "somebody"},
)
LOOKS_AT = {"Count_Score": "count", "Color_Score": "color", "OCR_Score": "text", "Motion_AC_Score": "amplitude"}
NOT_MEASURED = ("IS", "Celebrity_ID_Score", "Action_Score")
TOO_SHORT = "needs two frames; has 1"


def scored_row(index: int, caption: str, video: bytes | None) -> SampleRow:
    """A video with values in both modes; each ninth is too short for what looks at pairs of frames."""
    rng = generator(11, "values", index)
    tags = TAGS[index % len(TAGS)]
    values: dict[str, dict[str, float]] = {"compat": {}, "fixed": {}}
    reasons: dict[str, dict[str, str]] = {"compat": {}, "fixed": {}}
    for name in EVALCRAFTER:
        if name in NOT_MEASURED or LOOKS_AT.get(name, next(iter(tags), "")) not in ("", *tags):
            continue
        for mode, shift in (("compat", 0.0), ("fixed", 0.1)):
            if index % 9 == 8 and name in ("CLIP_Temp", "Flow_Score", "Warping_Error"):
                reasons[mode][name] = TOO_SHORT
            elif name == "Flow_Score":
                values[mode][name] = float(rng.gamma(2, 1.5))
            elif name == "Motion_AC_Score":
                values[mode][name] = float(rng.integers(2))
            elif name in ("CLIP_Temp", "Face_Consistency"):
                values[mode][name] = float(1 - rng.gamma(2, 0.001))
            elif name == "Warping_Error":
                values[mode][name] = float(rng.gamma(2, 0.004))
            else:
                values[mode][name] = float(np.clip(rng.normal(0.5 + shift, 0.12), 0, 1))
    missing = "" if video is not None else "not scored: truncated"
    return SampleRow(caption, video, id=f"{index:04d}", tags=tags, values=values, reasons=reasons, missing=missing)


def scored_benchmark(rows: list[SampleRow]) -> dict[str, Any]:
    """What a scorecard's summary says of the rows."""
    modes = {}
    for mode in ("compat", "fixed"):
        metrics: dict[str, Any] = {}
        for name in EVALCRAFTER:
            found = [row.values[mode][name] for row in rows if name in row.values[mode]]
            lost = sum(name in row.reasons[mode] for row in rows)
            if not found:
                metrics[name] = {"not_measured": f"weights not found: {', '.join(METRICS[name].weights)}"}
                continue
            metrics[name] = {
                "value": METRICS[name].scale * sum(found) / len(found),
                "n": len(found),
                "without_value": {TOO_SHORT: lost} if lost else {},
                "weights": dict.fromkeys(METRICS[name].weights, "ab" * 32),
                "note": "RapidOCR in place of PaddleOCR" if name == "OCR_Score" else "",
            }
        raw = {name: result["value"] for name, result in metrics.items() if "value" in result}
        aspects, withheld = partial_aspect_scores(raw)
        if mode == "fixed":
            aspects, withheld = (
                {},
                dict.fromkeys((*aspects, *withheld), "the coefficients were fitted to compat values"),
            )
        modes[mode] = {"metrics": metrics, "aspects": aspects, "withheld": withheld}
        modes[mode]["averages"] = {"temporal_consistency": 99.1, "text_video_alignment": 48.2}
    rejected = {row.id: "truncated" for row in rows if row.sample is None}
    return {
        "name": "evalcrafter",
        "prompts": {"total": len(rows), "of_benchmark": 0, "whole_list": False},
        "videos": {"expected": len(rows), "scored": len(rows) - len(rejected), "rejected": rejected},
        "settings": {"seed": 123, "dover": {"order": "as published"}},
        "modes": modes,
        "warnings": ["A still video has the best motion score there is: read it beside the metrics it is made of."],
    }


def fake_scores(num_rows: int = 20) -> ReportData:
    """A whole report about videos that were made elsewhere; the last of them is damaged."""
    clips = [_clip(index) for index in range(min(num_rows, 12))]
    rows = []
    for index in range(num_rows):
        caption, video, _ = clips[index % len(clips)]
        rows.append(scored_row(index, f"{caption}, number {index}", None if index == num_rows - 1 else video))
    return ReportData(
        title="vc2: videos and their scores",
        about="a folder",
        hardware="2 cores of some processor",
        rows=rows,
        size=(80, 48),
        benchmark=scored_benchmark(rows),
        lineage=[
            LineageNode("samples", "sample_set", "f6" * 32, "5a" * 32, (), f"{num_rows} videos"),
            LineageNode("score", "scorecard", "18" * 32, "78" * 32, ("samples",), "both modes"),
        ],
        config={"samples": {"play_fps": 8}},
        environment={"python": "3.11.7"},
        created_at="2026-01-01T12:00:00+00:00",
        fingerprint="29" * 32,
    )


@pytest.fixture(scope="session")
def scored_data() -> ReportData:
    return fake_scores()


@pytest.fixture(scope="session")
def report_data() -> ReportData:
    return fake_report()
