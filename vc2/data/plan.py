"""The plan: which clip goes into which slot of which shard. A pure function of ledger, form and seed.

    usable rows -> clips (a stride and a start each) -> order by a hash of (seed, key, clip) -> slices of N slots

A clip is exactly `num_frames` frames, every `stride`-th of the source from `start` on. The stride is drawn evenly
from [min_stride, max_stride] and, where the video is too short for it, reduced to the largest that fits; below
min_stride the row is rejected. The start is drawn evenly from all that fit (VideoCrafter's loader, made exact:
(num_frames - 1) * stride + 1 source frames are needed, not num_frames * stride). The fps label is floor(rate /
stride), what the network really sees.

Where the source's rate varies, stride and start count on an even grid at its mean rate, and each grid point takes the
frame shown then.
"""

import io
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vc2.data.config import SampleForm
from vc2.data.rejects import RejectReason
from vc2.seeding import derive_seed
from vc2.storage import Store, open_store

__all__ = ["PLAN", "VERDICTS", "draw_clips", "make_plan", "read_slots"]

PLAN = pa.schema(
    [
        ("shard", pa.int32()),
        ("slot", pa.int32()),
        ("row", pa.int64()),
        ("key", pa.string()),  # of the row
        ("clip", pa.int32()),
        ("locator", pa.string()),
        ("blob", pa.string()),  # name in the ledger's folder; null: a local file
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("caption", pa.string()),
        ("captions", pa.string()),
        ("extra", pa.string()),
        ("frames", pa.int32()),  # of the source
        ("rate", pa.string()),
        ("rotation", pa.int16()),
        ("aspect", pa.string()),
        ("start", pa.int32()),
        ("stride", pa.int32()),
        ("fps", pa.int32()),  # label; 0 for an image, whose label the loader draws
        ("indices", pa.list_(pa.int32())),  # the source frames
        ("seed", pa.int64()),
    ]
)
KEPT = ("row", "key", "locator", "blob", "offset", "size", "sha256", "caption", "captions", "extra")
FACTS = ("frames", "rate", "rotation", "aspect")

VERDICTS = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("locator", pa.string()),
        ("reason", pa.string()),  # null: planned
        ("detail", pa.string()),
        ("duplicate_of", pa.string()),
    ]
)


def make_plan(ledger: pa.Table, form: SampleForm, seed: int, samples_per_shard: int) -> tuple[pa.Table, pa.Table]:
    """The plan, and for every row of the ledger whether it is planned or why not.

    Args:
        ledger: A line per row of the source, in total order (see `ledger.SCHEMA`).
        form: What a sample is.
        seed: Of the draws and of the order.
        samples_per_shard: Slots of a shard; the last may have fewer.

    Returns:
        Tables of schema `PLAN` (in order of shard and slot) and `VERDICTS` (in order of the ledger).
    """
    clips: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    first_with: dict[str, str] = {}
    for line in ledger.to_pylist():
        reason, detail, duplicate_of = _unfit(line, form)
        drawn: list[dict[str, Any]] = []
        if reason is None and not (drawn := draw_clips(line, form, seed)):
            needed = (form.num_frames - 1) * form.min_stride + 1
            reason, detail = RejectReason.TOO_SHORT, f"{line['frames']} frames, {needed} needed"
        if reason is None and (duplicate_of := first_with.setdefault(line["sha256"], line["key"])) != line["key"]:
            reason = RejectReason.DUPLICATE
        duplicate_of = duplicate_of if reason is RejectReason.DUPLICATE else None
        if reason is None:
            kept = {name: line[name] for name in (*KEPT, *FACTS)}
            clips += [kept | clip for clip in drawn]
        place = {name: line[name] for name in ("row", "key", "locator")}
        verdicts.append(place | {"reason": reason and str(reason), "detail": detail, "duplicate_of": duplicate_of})
    clips.sort(key=lambda clip: (derive_seed(seed, "order", clip["key"], clip["clip"]), clip["key"], clip["clip"]))
    for number, clip in enumerate(clips):
        clip["shard"], clip["slot"] = divmod(number, samples_per_shard)
    return pa.Table.from_pylist(clips, PLAN), pa.Table.from_pylist(verdicts, VERDICTS)


def _unfit(line: Mapping[str, Any], form: SampleForm) -> tuple[RejectReason | None, str, None]:
    if line["reason"] is not None:
        return RejectReason(line["reason"]), line["detail"], None
    if len(line["caption"]) < form.min_caption:
        return RejectReason.CAPTION_TOO_SHORT, f"{len(line['caption'])} characters", None
    if min(line["width"], line["height"]) < form.min_side:
        return RejectReason.TOO_SMALL, f"{line['width']} x {line['height']} pixels", None
    return None, "", None


def draw_clips(line: Mapping[str, Any], form: SampleForm, seed: int) -> list[dict[str, Any]]:
    """Clips of one source: start, stride, frame numbers, label; none if it is too short.

    Args:
        line: `key`, `frames`, `rate` and `times` of a ledger row.
        form: What a sample is.
        seed: Of the draws; each clip's are its own.
    """
    grid = _grid(line["times"], Fraction(line["rate"])) if line["times"] else np.arange(line["frames"])
    feasible = (len(grid) - 1) // (form.num_frames - 1) if form.num_frames > 1 else form.max_stride
    if feasible < form.min_stride or len(grid) == 0:
        return []
    clips = []
    for number in range(form.clips_per_video):
        draw = derive_seed(seed, "clip", line["key"], number)
        stride = form.min_stride + derive_seed(draw, "stride") % (form.max_stride - form.min_stride + 1)
        stride = min(stride, feasible)
        span = (form.num_frames - 1) * stride + 1
        start = derive_seed(draw, "start") % (len(grid) - span + 1)
        rate = Fraction(line["rate"])
        clips.append(
            {
                "clip": number,
                "start": start,
                "stride": stride,
                "fps": max(1, rate // stride) if rate else 0,
                "indices": grid[start : start + span : stride].tolist(),
                "seed": draw,
            }
        )
    return clips


def _grid(times: list[float], rate: Fraction) -> np.ndarray:
    """Number of the frame that is shown at each point of an even grid at `rate`."""
    points = np.arange(int((times[-1] - times[0]) * float(rate) + 1e-6) + 1) / float(rate)
    return np.searchsorted(np.asarray(times) - times[0], points + 1e-6, side="right") - 1


def read_slots(store: Store, key: str, sha256: str, shard: int) -> list[dict[str, Any]]:
    """The slots of one shard, by reading only its rows of the plan (one row group is one shard)."""
    return _plan_file(store.uri, key, sha256).read_row_group(shard, use_threads=False).to_pylist()


@lru_cache(maxsize=4)
def _plan_file(uri: str, key: str, sha256: str) -> pq.ParquetFile:
    return pq.ParquetFile(_Ranged(open_store(uri), key))


class _Ranged(io.RawIOBase):
    """An object of a store as a seekable file."""

    def __init__(self, store: Store, key: str) -> None:
        entry = store.entry(key)
        if entry is None:
            raise KeyError(key)
        self._store, self._key, self._size, self._place = store, key, entry.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._place
        data = self._store.read_range(self._key, self._place, left if size < 0 else min(size, left))
        self._place += len(data)
        return data
