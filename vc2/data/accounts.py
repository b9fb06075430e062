"""What became of every row of a source: the index of a set, its table of rejects, its counts.

Every row has exactly one fate, asserted for every set:

    rows = rows with at least one sample + rows rejected, by reason + rows with the bytes of an earlier row

A row all of whose clips fail is rejected with the reason of its first clip; clips lost of a row that keeps others are
counted apart (`clips_rejected`), as are media that no row names (`media_unmatched`). Near duplicates are samples; the
index says of which.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vc2.data.config import ShardStage
from vc2.data.generations import hashes_of
from vc2.data.near import near_duplicates
from vc2.data.rejects import RejectReason
from vc2.data.shards import SLOTS
from vc2.errors import Unaccounted, YieldTooLow

__all__ = ["REJECTS", "IndexWriter", "counts_of", "reject_lines", "require_yield"]

REJECTS = pa.schema(
    [
        ("what", pa.string()),  # row, clip (of a row that keeps others), media (that no row names), duplicate
        ("row", pa.int64()),
        ("clip", pa.int32()),
        ("key", pa.string()),
        ("locator", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("duplicate_of", pa.string()),
    ]
)
ROWS_PER_GROUP = 65536


@dataclass
class IndexWriter:
    """Gathers slots, shard after shard, and writes those that hold a sample as the index of the set.

    Slots wait in a file; of each only its hashes stay in memory.
    """

    config: ShardStage
    spool: Path
    samples: int = 0
    bytes: int = 0
    near: int = 0  #: samples marked as near duplicates
    fps: Counter[int] = field(default_factory=Counter)
    failed: list[dict[str, Any]] = field(default_factory=list)  #: slots that stayed empty

    def __post_init__(self) -> None:
        self._file = pa.OSFile(str(self.spool), "wb")
        self._writer = pa.ipc.new_file(self._file, SLOTS)
        self._phashes: list[np.ndarray] = []
        self._sources: list[np.ndarray] = []
        self._keys: list[pa.Array] = []

    def add(self, slots: pa.Table) -> None:
        """Slots of one or several shards, in order; columns of `SLOTS`."""
        empty = pc.is_valid(slots["reason"])  # type: ignore[attr-defined]
        columns = ["row", "clip", "source_key", "locator", "reason", "detail"]
        self.failed += slots.select(columns).filter(empty).to_pylist()
        for batch in slots.filter(pc.invert(empty)).to_batches():  # type: ignore[attr-defined]
            self._add(pa.Table.from_batches([batch]))

    def _add(self, slots: pa.Table) -> None:
        if not slots.num_rows:
            return
        self.samples += slots.num_rows
        self.bytes += pc.sum(slots["length"]).as_py()  # type: ignore[attr-defined]
        self.fps.update(slots["fps"].to_pylist())
        self._sources.append(hashes_of(slots["source_key"].to_pylist()))
        self._phashes.append(slots["phash"].chunk(0).flatten().to_numpy().reshape(slots.num_rows, -1))
        self._keys.append(slots["key"].chunk(0))
        self._writer.write_table(slots)

    @property
    def rows(self) -> int:
        """Rows of the source that have samples."""
        return len(np.unique(np.concatenate(self._sources))) if self._sources else 0

    def write(self, path: Path) -> None:
        """The index, near duplicates marked."""
        self._writer.close()
        self._file.close()
        bits, marked = self.config.filters.near_duplicate_bits, np.full(self.samples, -1, np.int64)
        if bits is not None and self.samples:
            marked = near_duplicates(np.concatenate(self._phashes), bits, np.concatenate(self._sources))
        self.near = int((marked >= 0).sum())
        keys = pa.chunked_array(self._keys, pa.string())
        place = 0
        with pa.memory_map(str(self.spool)) as file, pq.ParquetWriter(path, SLOTS, compression="zstd") as writer:
            for batch in _regular(pa.ipc.open_file(file)):
                some = marked[place : place + batch.num_rows]
                place += batch.num_rows
                names = keys.take(pa.array(np.where(some >= 0, some, 0))) if len(some) else keys
                names = pc.if_else(pa.array(some >= 0), names, None)  # type: ignore[attr-defined]
                batch = batch.set_column(batch.schema.get_field_index("duplicate_of"), "duplicate_of", names)
                writer.write_table(batch, row_group_size=ROWS_PER_GROUP)


def _regular(file: pa.RecordBatchFileReader) -> Iterator[pa.Table]:
    """The batches of a file, joined to tables of `ROWS_PER_GROUP` rows: the index does not tell how it was gathered."""
    waiting = SLOTS.empty_table()
    for number in range(file.num_record_batches):
        waiting = pa.concat_tables([waiting, pa.Table.from_batches([file.get_batch(number)])])
        while waiting.num_rows >= ROWS_PER_GROUP:
            yield waiting.slice(0, ROWS_PER_GROUP).combine_chunks()
            waiting = waiting.slice(ROWS_PER_GROUP)
    if waiting.num_rows:
        yield waiting.combine_chunks()


def reject_lines(unplanned: pa.Table, index: IndexWriter, kept: frozenset[int], unmatched: pa.Table) -> pa.Table:
    """What a generation leaves out.

    Args:
        unplanned: Rows without a place in the plan (`plan.UNPLANNED`).
        index: Its slots.
        kept: Rows of the generation that have a sample.
        unmatched: Media that no row names (columns of `ledger.SCHEMA`).
    """
    lines: list[dict[str, Any]] = []
    for line in unplanned.to_pylist():
        lines.append(line | {"what": "duplicate" if line["reason"] == RejectReason.DUPLICATE else "row"})
    told: set[int] = set()
    for slot in sorted(index.failed, key=lambda slot: (slot["row"], slot["clip"])):
        line = slot | {"key": slot["source_key"], "what": "clip"}
        if slot["row"] not in kept:
            if slot["row"] in told:
                continue
            line |= {"what": "row", "clip": None}
            told.add(slot["row"])
        lines.append(line)
    lines += [line | {"what": "media"} for line in unmatched.to_pylist()]
    empty = {name: None for name in REJECTS.names}
    return pa.Table.from_pylist([{name: (empty | line)[name] for name in REJECTS.names} for line in lines], REJECTS)


def counts_of(rows: int, index: IndexWriter, rejects: pa.Table) -> dict[str, int]:
    """The accounts of a set.

    Raises:
        Unaccounted: If a row has no fate, or two.
    """
    what = Counter(rejects["what"].to_pylist())
    counts = {
        "rows": rows,
        "rows_with_samples": index.rows,
        "rows_rejected": what["row"],
        "rows_duplicate": what["duplicate"],
        "samples": index.samples,
        "near_duplicates": index.near,
        "clips_rejected": what["clip"],
        "media_unmatched": what["media"],
        "media_bytes": index.bytes,
    }
    if rows != counts["rows_with_samples"] + counts["rows_rejected"] + counts["rows_duplicate"]:
        raise Unaccounted(f"rows do not add up, nothing was committed: {counts}; please report this")
    return counts


def require_yield(config: ShardStage, good: int, rows: int, rejects: pa.Table, where: str) -> None:
    """Refuse a source of which too little is left.

    Args:
        config: The stage.
        good: Rows with samples.
        rows: Rows but for exact duplicates.
        rejects: Rejected rows: columns row, key, locator, reason, detail.
        where: Which rows are meant, for the message.

    Raises:
        YieldTooLow: If there is no sample, or the share is below the source's `min_yield`.
    """
    source = config.source
    if good > 0 and good >= source.min_yield * rows:
        return
    reasons = Counter(rejects["reason"].to_pylist())
    top = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(3))
    shown = ""
    if reasons:
        worst = reasons.most_common(1)[0][0]
        example = rejects.filter(pc.equal(rejects["reason"], worst)).slice(0, 1).to_pylist()[0]  # type: ignore[attr-defined]
        said = ": ".join(part for part in (example["reason"], example["detail"]) if part)
        shown = f"; for example row {example['row']} ({example['locator'] or example['key'] or 'no key'}) {said}"
    share = 100 * good / rows if rows else 0
    raise YieldTooLow(
        f"source {source.name}: only {good} of {rows} rows ({share:.0f} %) in {where} can become samples, "
        f"{100 * source.min_yield:.0f} % expected: {top}{shown}. "
        "Check the paths and addresses of the source, its filters, or lower its min_yield"
    )
