"""The plan: which clip goes into which slot of which shard. A pure function of ledger, config and, for a later
generation, of the parent set.

    usable rows -> clips (a stride and a start each) -> order by a hash of (seed, key, clip) -> slices of N slots

A clip is exactly `num_frames` frames, every `stride`-th of the source from `start` on. The stride is drawn evenly
from [min_stride, max_stride] and, where the video is too short for it, reduced to the largest that fits (or the last
frame is held, or the row rejected: `SampleForm.short_clip`). The start is drawn evenly from all that fit
(VideoCrafter's loader, made exact: (num_frames - 1) * stride + 1 source frames are needed, not num_frames * stride).
The fps label is floor(rate / stride), what the network really sees.

Where the source's rate varies, stride and start count on an even grid at its mean rate, and each grid point takes the
frame shown then.

The ledger may be larger than memory. `Planner` is fed part by part; clips wait in a file, and of each only a hash and
the digest of its source stay in memory. Rejected rows are kept: they are what the accounts are made of.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vc2.data.config import SampleForm, ShardStage
from vc2.data.filters import row_unfit
from vc2.data.places import is_url
from vc2.data.rejects import RejectReason
from vc2.seeding import derive_seed
from vc2.storage import Store, open_store

__all__ = [
    "PLAN",
    "UNPLANNED",
    "Known",
    "Planner",
    "Verdict",
    "draw_clips",
    "judge",
    "read_slots",
    "stored_parquet",
    "url_of",
]

PLAN = pa.schema(
    [
        ("shard", pa.int32()),
        ("slot", pa.int32()),
        ("row", pa.int64()),
        ("key", pa.string()),  # of the row
        ("clip", pa.int32()),
        ("locator", pa.string()),
        ("blob", pa.string()),  # name in the ledger's folder or URI of a tar; null: a file of its own
        ("ledger", pa.string()),  # folder of the ledger that the row stands in
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
SAID = ("row", "key", "locator", "ledger", "blob", "offset", "size", "sha256", "caption", "captions", "extra")
FOUND = ("frames", "rate", "rotation", "aspect")

UNPLANNED = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("locator", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("duplicate_of", pa.string()),
    ]
)
SLOTS_AT_ONCE = 100_000  # slots of the plan that are held in memory while it is written
DIGEST = 16  # bytes of a sha256 that tell files apart


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a row: the clips drawn from it, or the reason why there are none."""

    clips: list[dict[str, Any]]
    reason: RejectReason | None = None
    detail: str = ""


def judge(line: Mapping[str, Any], config: ShardStage) -> Verdict:
    """Whether a row of the ledger becomes clips, duplicates aside."""
    if (unfit := row_unfit(line, config.filters)) is not None:
        return Verdict([], *unfit)
    if clips := draw_clips(line, config.form, config.seed):
        return Verdict(clips)
    return Verdict([], RejectReason.TOO_SHORT, f"{line['frames']} frames, {_least(config.form)} needed")


def _least(form: SampleForm) -> int:
    """Source frames that the shortest clip needs."""
    stride = form.max_stride if form.short_clip == "reject" else form.min_stride
    return 1 if form.short_clip == "hold" else (form.num_frames - 1) * stride + 1


def draw_clips(line: Mapping[str, Any], form: SampleForm, seed: int) -> list[dict[str, Any]]:
    """Clips of one source: start, stride, frame numbers, label; none if it is too short.

    Args:
        line: `key`, `frames`, `rate` and `times` of a ledger row.
        form: What a sample is.
        seed: Of the draws; each clip's are its own.
    """
    rate = Fraction(line["rate"])
    grid = _grid(line["times"], rate) if line["times"] else np.arange(line["frames"])
    feasible = (len(grid) - 1) // (form.num_frames - 1) if form.num_frames > 1 else form.max_stride
    if len(grid) == 0 or (feasible < form.min_stride and form.short_clip != "hold"):
        return []
    clips = []
    for number in range(form.clips_per_video):
        draw = derive_seed(seed, "clip", line["key"], number)
        stride = form.min_stride + derive_seed(draw, "stride") % (form.max_stride - form.min_stride + 1)
        if stride > feasible and form.short_clip == "reject":
            return []
        if stride > feasible and form.short_clip == "stride":
            stride = feasible
        span = (form.num_frames - 1) * stride + 1
        start = derive_seed(draw, "start") % max(1, len(grid) - span + 1)
        indices = np.minimum(np.arange(start, start + span, stride), len(grid) - 1)
        clips.append(
            {
                "clip": number,
                "start": start,
                "stride": stride,
                "fps": max(1, rate // stride) if rate else 0,
                "indices": grid[indices].tolist(),
                "seed": draw,
            }
        )
    return clips


def _grid(times: Sequence[float], rate: Fraction) -> np.ndarray:
    """Number of the frame that is shown at each point of an even grid at `rate`."""
    points = np.arange(int((times[-1] - times[0]) * float(rate) + 1e-6) + 1) / float(rate)
    return np.searchsorted(np.asarray(times) - times[0], points + 1e-6, side="right") - 1


class Known:
    """Files that samples of the parent set were made of: their bytes are not taken a second time."""

    def __init__(self, sha256: Sequence[str] = (), keys: Sequence[str] = ()) -> None:
        self.digests = _digests(sha256)
        self.keys = keys


class Planner:
    """Makes a plan of a ledger that is handed in part by part, in total order.

    Args:
        config: The stage.
        spool: A file for clips to wait in.
        known: What the parent set holds.
        first_shard: Number of the first shard.
        removed: Keys, URLs, paths and digests on the removal lists of earlier generations.
    """

    def __init__(
        self,
        config: ShardStage,
        spool: Path,
        *,
        known: Known | None = None,
        first_shard: int = 0,
        removed: frozenset[str] = frozenset(),
    ) -> None:
        self.config, self.first_shard = config, first_shard
        self.rows = 0
        self._known = known or Known()
        self._spool = spool
        self._file = pa.OSFile(str(spool), "wb")
        self._writer = pa.ipc.new_file(self._file, PLAN)
        self._sources: list[np.ndarray] = [self._known.digests]  # digest of the file of each usable row
        self._usable = 0
        self._source_of: list[np.ndarray] = []  # number of the usable row of each clip
        self._order: list[np.ndarray] = []  # hash of each clip
        self._removed = removed
        self._unplanned: list[pa.Table] = []

    def add(self, part: pa.Table) -> None:
        """Judge rows of a ledger (`ledger.read_parts`)."""
        clips: list[dict[str, Any]] = []
        sha256, source_of = [], []
        rejects: list[dict[str, Any]] = []
        for line in part.to_pylist():
            verdict = judge(line, self.config)
            if self._removed and self._is_removed(line):
                verdict = Verdict([], RejectReason.REMOVED, "on the removal list")
            if verdict.reason is not None:
                rejects.append(_rejected(line, verdict.reason, verdict.detail))
                continue
            said = {name: line[name] for name in (*SAID, *FOUND)}
            clips += [said | clip for clip in verdict.clips]
            source_of += [self._usable] * len(verdict.clips)
            sha256.append(line["sha256"])
            self._usable += 1
        self.rows += part.num_rows
        self._sources.append(_digests(sha256))
        self._source_of.append(np.asarray(source_of, np.int64))
        seed = self.config.seed
        hashes = (derive_seed(seed, "order", clip["key"], clip["clip"]) for clip in clips)
        self._order.append(np.fromiter(hashes, np.uint64, len(clips)))
        self._writer.write_batch(pa.RecordBatch.from_pylist(clips, PLAN))
        self._unplanned.append(pa.Table.from_pylist(rejects, UNPLANNED))

    def _is_removed(self, line: Mapping[str, Any]) -> bool:
        names = (line["key"], line["locator"], line["sha256"], url_of(line))
        return not self._removed.isdisjoint(name for name in names if name)

    def write(self, path: Path) -> pa.Table:
        """Write the plan, a row group a shard; returns the rows that are not in it (`UNPLANNED`, in order)."""
        self._writer.close()
        self._file.close()
        with pa.memory_map(str(self._spool)) as file:
            batches = pa.ipc.open_file(file)
            first = _firsts(np.concatenate(self._sources))[len(self._known.digests) :]
            source_of = np.concatenate([np.zeros(0, np.int64), *self._source_of])
            own = len(self._known.digests) + np.arange(self._usable)
            is_copy = first != own
            ends = np.cumsum([0, *(len(part) for part in self._order)])
            read = _Rows(batches, ends)
            self._reject_copies(read, np.flatnonzero(is_copy), first, source_of)
            kept = np.flatnonzero(~is_copy[source_of])
            hashes = np.concatenate([np.zeros(0, np.uint64), *self._order])[kept]
            self._write_slots(path, read, kept[np.argsort(hashes, kind="stable")])
        unplanned = pa.concat_tables([UNPLANNED.empty_table(), *self._unplanned])
        return unplanned.sort_by("row")

    def _reject_copies(self, read: "_Rows", copies: np.ndarray, first: np.ndarray, source_of: np.ndarray) -> None:
        """Rows with the bytes of an earlier one."""
        known = len(self._known.digests)
        rejects: list[dict[str, Any]] = []
        for number in copies.tolist():
            (line,) = read.take(np.searchsorted(source_of, [number])).to_pylist()
            earlier = int(first[number])
            if earlier < known:
                name = self._known.keys[earlier]
            else:
                name = read.take(np.searchsorted(source_of, [earlier - known]))["key"][0].as_py()
            rejects.append(_rejected(line, RejectReason.DUPLICATE, "") | {"duplicate_of": name})
        self._unplanned.append(pa.Table.from_pylist(rejects, UNPLANNED))

    def _write_slots(self, path: Path, read: "_Rows", order: np.ndarray) -> None:
        size = self.config.samples_per_shard
        window = size * max(1, SLOTS_AT_ONCE // size)
        with pq.ParquetWriter(path, PLAN, compression="zstd") as writer:
            for start in range(0, len(order), window):
                rows = read.take(order[start : start + window])
                numbers = np.arange(start, start + rows.num_rows)
                shards = pa.array(self.first_shard + numbers // size, pa.int32())
                rows = rows.set_column(0, "shard", shards).set_column(1, "slot", pa.array(numbers % size, pa.int32()))
                writer.write_table(rows, row_group_size=size)


def _rejected(line: Mapping[str, Any], reason: RejectReason, detail: str) -> dict[str, Any]:
    place = {name: line[name] for name in ("row", "key", "locator")}
    return place | {"reason": str(reason), "detail": detail, "duplicate_of": None}


def url_of(line: Mapping[str, Any]) -> str | None:
    """The URL by which the source names a medium, if it does (`locator` and `extra` of a row)."""
    if is_url(line["locator"] or ""):
        return line["locator"]
    url = json.loads(line["extra"] or "{}").get("url")
    return url if isinstance(url, str) and url else None


class _Rows:
    """Rows of a spool by their numbers, in any order, without reading it as a whole."""

    def __init__(self, batches: pa.RecordBatchFileReader, ends: np.ndarray) -> None:
        self._batches, self._ends = batches, ends

    def take(self, numbers: np.ndarray | Sequence[int]) -> pa.Table:
        numbers = np.asarray(numbers, np.int64)
        order = np.argsort(numbers, kind="stable")
        batch_of = np.searchsorted(self._ends, numbers[order], side="right") - 1
        parts = []
        for batch in np.unique(batch_of).tolist():
            within = numbers[order[batch_of == batch]] - self._ends[batch]
            parts.append(self._batches.get_batch(batch).take(pa.array(within)))
        back = np.empty(len(numbers), np.int64)
        back[order] = np.arange(len(numbers))
        return pa.Table.from_batches(parts, PLAN).combine_chunks().take(pa.array(back))


def _digests(sha256: Sequence[str]) -> np.ndarray:
    """Leading bytes of sha256 in hex, as rows of two numbers."""
    data = b"".join(bytes.fromhex(text[: 2 * DIGEST]) for text in sha256)
    return np.frombuffer(data, np.uint64).reshape(-1, 2)


def _firsts(digests: np.ndarray) -> np.ndarray:
    """For each digest the number of the first that equals it."""
    order = np.lexsort((np.arange(len(digests)), digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    starts = np.ones(len(digests), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(digests), np.int64)
    first[order] = order[np.flatnonzero(starts)][np.cumsum(starts) - 1] if len(digests) else order
    return first


def read_slots(store: Store, key: str, sha256: str, number: int) -> list[dict[str, Any]]:
    """The slots of one shard, by reading only its rows of the plan: row group `number` of the generation."""
    return _plan_file(store.uri, key, sha256).read_row_group(number, use_threads=False).to_pylist()


@lru_cache(maxsize=4)
def _plan_file(uri: str, key: str, sha256: str) -> pq.ParquetFile:
    return stored_parquet(open_store(uri), key)


def stored_parquet(store: Store, key: str) -> pq.ParquetFile:
    """A Parquet file of a store, of which only what is asked for is read.

    Raises:
        KeyError: If there is none.
    """
    return pq.ParquetFile(_Ranged(store, key))


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
