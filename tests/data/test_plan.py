import re
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vc2.data.config import SampleForm
from vc2.data.ledger import SCHEMA, parquet_bytes
from vc2.data.plan import draw_clips, make_plan, read_slots
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
        "sha256": f"{row:064x}",
        "size": 10,
        "width": 96,
        "height": 64,
        "frames": 60,
        "rate": "30",
        "rotation": 0,
        "aspect": "1",
    }
    return line | changes


def ledger_of(lines: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(lines, SCHEMA)


FORM = SampleForm(num_frames=8, width=32, height=32)


@settings(max_examples=200, deadline=None)
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


def test_plan_is_a_pure_function_and_its_order_is_stable() -> None:
    """Same ledger, same plan; without some rows the others keep order and draws; another seed moves all."""
    lines = [ledger_line(row) for row in range(40)]
    plan, verdicts = make_plan(ledger_of(lines), FORM, 7, 16)
    assert plan.equals(make_plan(ledger_of(lines), FORM, 7, 16)[0])
    assert verdicts["reason"].null_count == 40
    assert plan["shard"].to_pylist() == [n // 16 for n in range(40)]
    assert plan["slot"].to_pylist() == [n % 16 for n in range(40)]
    part, _ = make_plan(ledger_of(lines[::2]), FORM, 7, 16)
    left = [(line["key"], line["indices"]) for line in plan.to_pylist() if line["row"] % 2 == 0]
    assert left == [(line["key"], line["indices"]) for line in part.to_pylist()]
    other, _ = make_plan(ledger_of(lines), FORM, 8, 16)
    assert other["key"].to_pylist() != plan["key"].to_pylist()


def test_every_row_has_one_verdict_and_the_first_of_equal_files_stays() -> None:
    """Unfit rows are out with their reason; duplicates are judged last, so an unfit row hides no good one."""
    lines = [
        ledger_line(0, sha256="same", caption="x"),
        ledger_line(1, sha256="same"),
        ledger_line(2, sha256="same"),
        ledger_line(3, frames=7),
        ledger_line(4, width=20),
        ledger_line(5, reason="http_404", detail="HTTP 404", sha256=None, frames=None),
        ledger_line(6),
    ]
    plan, verdicts = make_plan(ledger_of(lines), FORM, 0, 4)
    assert verdicts["reason"].to_pylist() == [
        RejectReason.CAPTION_TOO_SHORT,
        None,
        RejectReason.DUPLICATE,
        RejectReason.TOO_SHORT,
        RejectReason.TOO_SMALL,
        RejectReason.HTTP_404,
        None,
    ]
    assert verdicts["duplicate_of"].to_pylist()[2] == "key1"
    assert sorted(plan["row"].to_pylist()) == [1, 6]


def test_a_worker_reads_only_its_shard_of_the_plan(tmp_path) -> None:
    """One row group is one shard, found by ranged reads."""
    plan, _ = make_plan(ledger_of([ledger_line(row) for row in range(10)]), FORM, 0, 4)
    store = LocalStore(tmp_path)
    store.write("plan.parquet", parquet_bytes(plan, rows_per_group=4))
    read = [line for shard in range(3) for line in read_slots(store, "plan.parquet", "digest", shard)]
    assert read == plan.to_pylist()


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
