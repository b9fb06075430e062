import hashlib
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vc2.data.config import FolderSource, SampleForm, ShardStage
from vc2.data.ledger import SCHEMA
from vc2.data.plan import PLAN, Known, Planner, draw_clips, read_slots
from vc2.data.rejects import RejectReason
from vc2.storage import LocalStore


def ledger_line(row: int, **changes: Any) -> dict[str, Any]:
    line = {name: None for name in SCHEMA.names} | {
        "row": row,
        "key": f"key{row}",
        "locator": f"{row}.mp4",
        "caption": "a dog runs",
        "captions": "{}",
        "extra": "{}",
        "detail": "",
        "sha256": hashlib.sha256(b"%d" % row).hexdigest(),
        "size": 10,
        "width": 96,
        "height": 64,
        "frames": 60,
        "rate": "30",
        "rotation": 0,
        "aspect": "1",
    }
    return line | changes


FORM = SampleForm(num_frames=8, width=32, height=32)
LEDGER = SCHEMA.append(pa.field("ledger", pa.string()))


def planned(
    lines: list[dict[str, Any]],
    seed: int,
    samples_per_shard: int,
    folder: Path,
    *,
    part: int = 7,
    known: Known | None = None,
    **settings: Any,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The plan of ledger rows handed in by `part`, and the rows that are not in it."""
    source = FolderSource(name="mine", media="video", folder=".")
    config = ShardStage.model_validate(
        {"source": source, "form": FORM, "seed": seed, "samples_per_shard": samples_per_shard} | settings
    )
    planner = Planner(config, folder / "spool", known=known)
    for start in range(0, len(lines), part):
        planner.add(pa.Table.from_pylist(lines[start : start + part], LEDGER))
    assert planner.rows == len(lines)
    unplanned = planner.write(folder / "plan.parquet")
    plan = pq.read_table(folder / "plan.parquet")
    assert plan.schema == PLAN
    return plan.to_pylist(), unplanned.to_pylist()


@settings(max_examples=200)
@given(
    frames=st.integers(1, 200),
    rate=st.sampled_from([Fraction(10), Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60)]),
    num_frames=st.integers(1, 16),
    strides=st.tuples(st.integers(1, 4), st.integers(0, 6)),
    seed=st.integers(0, 2**32),
)
def test_a_clip_is_exactly_its_frames(
    frames: int, rate: Fraction, num_frames: int, strides: tuple[int, int], seed: int
) -> None:
    """num_frames numbers, evenly spaced, within the video; the label is the true rate rounded down; a video is too
    short exactly when not even the smallest stride fits."""
    form = SampleForm(
        num_frames=num_frames, width=32, height=32, min_stride=strides[0], max_stride=sum(strides), clips_per_video=2
    )
    clips = draw_clips(ledger_line(0, frames=frames, rate=str(rate)), form, seed)
    if frames < (num_frames - 1) * form.min_stride + 1:
        assert clips == []
        return
    assert len(clips) == 2
    for clip in clips:
        indices, stride = clip["indices"], clip["stride"]
        assert len(indices) == num_frames and indices[0] >= 0 and indices[-1] < frames
        assert indices == list(range(clip["start"], clip["start"] + num_frames * stride, stride))
        assert form.min_stride <= stride <= form.max_stride
        assert clip["fps"] == max(1, int(rate / stride))


def test_every_stride_and_start_that_fits_is_drawn() -> None:
    """Draws are spread over all that is possible; a short video gets the largest stride that fits."""
    form = SampleForm(num_frames=3, width=32, height=32, min_stride=1, max_stride=4)
    drawn = [draw_clips(ledger_line(0, key=str(n), frames=7), form, 1)[0] for n in range(400)]
    assert {clip["stride"] for clip in drawn} == {1, 2, 3}
    assert {clip["start"] for clip in drawn if clip["stride"] == 1} == {0, 1, 2, 3, 4}
    assert {clip["start"] for clip in drawn if clip["stride"] == 3} == {0}


def test_an_uneven_video_is_sampled_by_time() -> None:
    """On a grid at the mean rate each point takes the frame that is shown then."""
    times = [0.0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9]
    rate = Fraction(20, 3)  # 6 gaps in 0.9 s: a point every 0.15 s
    form = SampleForm(num_frames=7, width=32, height=32, max_stride=1)
    (clip,) = draw_clips(ledger_line(0, frames=7, rate=str(rate), times=times), form, 0)
    assert clip["indices"] == [0, 1, 3, 3, 3, 4, 6]
    assert clip["fps"] == 6


@settings(max_examples=40)
@given(
    frames=st.integers(1, 60),
    num_frames=st.integers(2, 16),
    stride=st.integers(1, 4),
    policy=st.sampled_from(["stride", "hold", "reject"]),
)
def test_a_short_video_is_treated_as_the_form_says(frames: int, num_frames: int, stride: int, policy: Any) -> None:
    """Held: always a clip, its last frame repeated. Rejected: only where the stride drawn fits. Else: whatever fits."""
    form = SampleForm(num_frames=num_frames, width=32, height=32, min_stride=1, max_stride=stride, short_clip=policy)
    clips = draw_clips(ledger_line(0, frames=frames), form, 5)
    (longest,) = draw_clips(ledger_line(0, frames=10_000), form, 5)
    fits = (num_frames - 1) * longest["stride"] < frames
    if policy == "stride":
        assert bool(clips) == (frames >= num_frames)
        return
    assert bool(clips) == (fits or policy == "hold")
    for clip in clips:
        even = range(clip["start"], clip["start"] + num_frames * clip["stride"], clip["stride"])
        assert clip["stride"] == longest["stride"]
        assert clip["indices"] == [min(number, frames - 1) for number in even]


def test_plan_is_a_pure_function_and_its_order_is_stable(tmp_path: Path) -> None:
    """Same ledger, same plan, in whatever parts it comes; without some rows the others keep order and draws; another
    seed moves all."""
    lines = [ledger_line(row) for row in range(40)]
    plan, unplanned = planned(lines, 7, 16, tmp_path)
    assert (plan, unplanned) == planned(lines, 7, 16, tmp_path, part=40) and unplanned == []
    assert [line["shard"] for line in plan] == [n // 16 for n in range(40)]
    assert [line["slot"] for line in plan] == [n % 16 for n in range(40)]
    part, _ = planned(lines[::2], 7, 16, tmp_path)
    left = [(line["key"], line["indices"]) for line in plan if line["row"] % 2 == 0]
    assert left == [(line["key"], line["indices"]) for line in part]
    other, _ = planned(lines, 8, 16, tmp_path)
    assert [line["key"] for line in other] != [line["key"] for line in plan]


def test_every_row_has_one_verdict_and_the_first_of_equal_files_stays(tmp_path: Path) -> None:
    """Unfit rows are out with their reason; duplicates are judged last, so an unfit row hides no good one."""
    lines = [
        ledger_line(0, sha256="aa" * 32, caption="x"),
        ledger_line(1, sha256="aa" * 32),
        ledger_line(2, sha256="aa" * 32),
        ledger_line(3, frames=7),
        ledger_line(4, width=20),
        ledger_line(5, reason="http_404", detail="HTTP 404", sha256=None, frames=None),
        ledger_line(6),
        ledger_line(7, sha256="bb" * 32),
    ]
    plan, unplanned = planned(lines, 0, 4, tmp_path, part=3, known=Known(["cc" * 32, "bb" * 32], ["old", "older"]))
    assert [(line["row"], line["reason"]) for line in unplanned] == [
        (0, RejectReason.CAPTION_TOO_SHORT),
        (2, RejectReason.DUPLICATE),
        (3, RejectReason.TOO_SHORT),
        (4, RejectReason.TOO_SMALL),
        (5, RejectReason.HTTP_404),
        (7, RejectReason.DUPLICATE),
    ]
    assert [line["duplicate_of"] for line in unplanned] == [None, "key1", None, None, None, "older"]
    assert sorted(line["row"] for line in plan) == [1, 6]


@pytest.mark.parametrize(
    ("limit", "line", "reason"),
    [
        ({"max_aspect": 2.0}, {"width": 400, "height": 100}, "aspect"),
        ({"max_aspect": 2.0}, {"aspect": "3/2"}, "aspect"),
        ({"min_duration": 3}, {"duration": 2.0}, "too_short"),
        ({"max_duration": 1}, {"duration": 2.0}, "too_long"),
        ({"max_caption": 5}, {}, "caption_too_long"),
        ({"max_pwatermark": 0.5}, {"extra": '{"pwatermark": 0.8}'}, "watermark"),
        ({"max_punsafe": 0.5}, {"extra": '{"punsafe": 0.8}'}, "unsafe"),
        ({"min_similarity": 0.3}, {"extra": '{"similarity": 0.2}'}, "unlike_caption"),
        ({"min_aesthetic": 5}, {"extra": '{"aesthetic": NaN}'}, "unaesthetic"),
        ({"languages": ["de"]}, {"caption": "a brown dog runs through the garden of a house"}, "language"),
    ],
)
def test_each_limit_has_its_reason(limit: dict[str, Any], line: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """A row beyond a limit is out for that reason; one within it, or one without the score, stays."""
    lines = [ledger_line(0), ledger_line(1, **line)]
    if reason in ("caption_too_long", "language"):
        lines[0]["caption"] = "hund" if reason == "caption_too_long" else "der Hund rennt durch den Garten vor dem Haus"
    plan, unplanned = planned(lines, 0, 4, tmp_path, filters=limit)
    assert [(one["row"], one["reason"]) for one in unplanned] == [(1, reason)]
    assert [one["row"] for one in plan] == [0]
    assert planned(lines, 0, 4, tmp_path)[1] == []


def test_a_worker_reads_only_its_shard_of_the_plan(tmp_path: Path) -> None:
    """One row group is one shard, found by ranged reads."""
    plan, _ = planned([ledger_line(row) for row in range(10)], 0, 4, tmp_path)
    store = LocalStore(tmp_path)
    read = [line for shard in range(3) for line in read_slots(store, "plan.parquet", "digest", shard)]
    assert read == plan and [line["shard"] for line in plan] == [0] * 4 + [1] * 4 + [2] * 2


def test_labels_of_images_are_left_to_the_loader() -> None:
    """An image is one frame without a rate."""
    form = SampleForm(num_frames=1, width=32, height=32)
    (clip,) = draw_clips(ledger_line(0, frames=1, rate="0"), form, 0)
    assert (clip["indices"], clip["fps"]) == ([0], 0)


def test_reasons_are_plain_words() -> None:
    """Reasons appear in tables and messages: lower case, no spaces."""
    assert all(re.fullmatch(r"[a-z0-9_]+", reason) for reason in RejectReason)
    with pytest.raises(ValueError):
        RejectReason("no such reason")
