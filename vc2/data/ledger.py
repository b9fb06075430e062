"""The ledger: for every row of a source what was fetched and found, or the reason why not.

It grows in *parts* under `ledgers/<source>/<digest>/`. A part is a Parquet file, written once and last: parts that
are there are never fetched again. Bytes that came over the network or out of a compressed archive lie in one blob
beside it, named by its content, and the rows hold offset and length; files of their own and members of plain tars are
not copied.

    part-0000012.parquet          rows of the tables, in order (rows hold blob, offset, length)
    part-000003-00012.parquet     members of archive 3, in order (JourneyDB: joined with the tables when read); its last
                                  part is named part-000003-00013.last.parquet
    part-0000012-<digest>.bin     the bytes of a part
    complete.json                 all parts are there

Network and deadlines are not reproducible; the ledger is where their outcome is fixed, once. Everything after it is a
pure function.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vc2.config import digest
from vc2.data.rejects import RejectReason
from vc2.data.sources import Record
from vc2.storage import Store

__all__ = [
    "SCHEMA",
    "Media",
    "drop",
    "is_complete",
    "is_last",
    "parquet_bytes",
    "part_names",
    "read_part",
    "read_parts",
    "row_of",
    "rows_carried",
    "set_complete",
    "write_part",
]

LAST = ".last"
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # place in the total order; in parts of archives the member's
        ("key", pa.string()),
        ("locator", pa.string()),  # URL, path below the source's folder, or archive/member
        ("caption", pa.string()),
        ("captions", pa.string()),  # JSON object
        ("extra", pa.string()),  # JSON object
        ("reason", pa.string()),  # null: usable so far
        ("detail", pa.string()),
        ("sha256", pa.string()),
        ("size", pa.int64()),  # bytes
        ("blob", pa.string()),  # name in the ledger's folder, or URI of a plain tar; null: a file of its own
        ("offset", pa.int64()),
        ("width", pa.int32()),  # pixels as shown
        ("height", pa.int32()),
        ("frames", pa.int32()),
        ("rate", pa.string()),  # frames per second, a fraction
        ("duration", pa.float64()),  # seconds
        ("rotation", pa.int16()),
        ("aspect", pa.string()),  # of a pixel, a fraction
        ("times", pa.list_(pa.float64())),  # of every frame where the rate varies
    ]
)


def row_of(record: Record, **found: Any) -> dict[str, Any]:
    """A ledger row: the record, and what fetching found or why it failed."""
    row = {
        "row": record.row,
        "key": record.key,
        "locator": record.locator,
        "caption": record.caption,
        "captions": _json(record.captions),
        "extra": _json(record.extra),
        "reason": record.reason and str(record.reason),
        "detail": record.detail,
    }
    return {name: None for name in SCHEMA.names} | row | found


def write_part(
    store: Store, prefix: str, name: str, rows: list[dict[str, Any]], blob: Path | None, *, last: bool = False
) -> None:
    """Commit a part. Of two writers the first wins; the blobs of both are whole.

    Args:
        store: Where.
        prefix: Folder of the ledger.
        name: For example `part-0000012`.
        rows: See `SCHEMA`; rows with an `offset` and no `blob` get the key of the blob.
        blob: The bytes of the part, if there are any.
        last: Of an archive: whether no part of it follows. It stands in the name, so that a listing tells it.
    """
    key = None
    if blob is not None and blob.stat().st_size:
        held = [[row["offset"], row["sha256"]] for row in rows if row["offset"] is not None and row["blob"] is None]
        key = f"{name}-{digest(held)[:16]}.bin"
        store.upload(blob, f"{prefix}/{key}")
    rows = [row | {"blob": key} if row["offset"] is not None and row["blob"] is None else row for row in rows]
    table = pa.Table.from_pylist(rows, SCHEMA)
    store.write_if_absent(f"{prefix}/{name}{LAST if last else ''}.parquet", parquet_bytes(table))


def part_names(store: Store, prefix: str) -> list[str]:
    """Names of the parts that are there, in order."""
    keys = (entry.key for entry in store.list(f"{prefix}/part-"))
    return sorted(key.rpartition("/")[2].removesuffix(".parquet") for key in keys if key.endswith(".parquet"))


def read_part(store: Store, prefix: str, name: str) -> pa.Table:
    return pq.read_table(io.BytesIO(store.read(f"{prefix}/{name}.parquet")), use_threads=False)


def is_last(name: str) -> bool:
    """Whether a part, by its name, ends its archive."""
    return name.endswith(LAST)


def drop(store: Store, prefix: str) -> None:
    """Forget a ledger: what it tells came of a mistake that can be mended."""
    for entry in [*store.list(f"{prefix}/")]:
        store.delete(entry.key)


def read_parts(store: Store, prefix: str, names: Iterable[str] | None = None) -> Iterator[pa.Table]:
    """Parts in order, each with a further column `ledger`: the folder they lie in.

    Args:
        store: Where.
        prefix: Folder of the ledger.
        names: Only these parts; default: all.
    """
    for name in part_names(store, prefix) if names is None else names:
        part = read_part(store, prefix, name).replace_schema_metadata(None)
        yield part.append_column("ledger", pa.array([prefix] * part.num_rows, pa.string()))


def is_complete(store: Store, prefix: str) -> bool:
    """Whether nothing is left to fetch."""
    return store.entry(f"{prefix}/complete.json") is not None


def set_complete(store: Store, prefix: str, carried: int) -> None:
    """Note that all parts are there, and how many rows of the source stand in earlier ledgers."""
    store.write_if_absent(f"{prefix}/complete.json", _json({"carried": carried}).encode())


def rows_carried(store: Store, prefix: str) -> int:
    """Rows of the source that a complete ledger does not tell of, since earlier ones do."""
    return json.loads(store.read(f"{prefix}/complete.json"))["carried"]


class Media:
    """What archives hold, to be joined with the rows of tables by key (JourneyDB).

    Args:
        ledgers: Parts of each ledger, the newest ledger first: what it tells of a key replaces what earlier ones told.
            Of several members with one key in a ledger the first counts.
    """

    def __init__(self, *ledgers: Iterable[pa.Table]) -> None:
        tables: list[pa.Table] = []
        newer = pa.array([], pa.string())
        for parts in ledgers:
            own = [part.filter(pc.invert(pc.is_in(part["key"], newer))) for part in parts]  # type: ignore[attr-defined]
            tables += own
            keys = [key for part in own for key in part["key"].chunks]
            newer = pa.concat_arrays([newer, *keys])
        schema = SCHEMA.append(pa.field("ledger", pa.string()))
        self.table = pa.concat_tables(tables) if tables else schema.empty_table()
        self._keys = self.table["key"].combine_chunks() if tables else pa.array([], pa.string())
        self._seen = np.zeros(self.table.num_rows, bool)

    def join(self, records: Sequence[Record]) -> pa.Table:
        """Ledger rows of records: what they say and what was found of their media."""
        places = pc.index_in(pa.array([record.key for record in records], pa.string()), value_set=self._keys)  # type: ignore[attr-defined]
        found = iter(self.table.take(places.drop_null()).to_pylist())
        rows = []
        for record, place in zip(records, places.to_pylist(), strict=True):
            media = next(found) if place is not None else None
            said = row_of(record)
            if record.reason is not None:
                rows.append(said)
            elif media is None:
                rows.append(said | {"reason": str(RejectReason.UNMATCHED_ROW), "detail": "in no archive"})
            else:
                own = {name: said[name] for name in ("row", "key", "caption", "captions", "extra")}
                rows.append(media | own)
        return pa.Table.from_pylist(rows, self.table.schema)

    def claim(self, records: Sequence[Record]) -> None:
        """Note that rows name these media."""
        places = pc.index_in(pa.array([record.key for record in records], pa.string()), value_set=self._keys)  # type: ignore[attr-defined]
        self._seen[places.drop_null().to_numpy()] = True

    def unclaimed(self) -> pa.Table:
        """Media that no row names."""
        alone = self.table.filter(pa.array(~self._seen))
        reason = pa.array([str(RejectReason.UNMATCHED_MEDIA)] * alone.num_rows, pa.string())
        detail = pc.if_else(pc.equal(pc.fill_null(alone["detail"], ""), ""), "no row names it", alone["detail"])  # type: ignore[attr-defined]
        alone = alone.set_column(alone.schema.get_field_index("reason"), "reason", reason)
        return alone.set_column(alone.schema.get_field_index("detail"), "detail", detail)


def parquet_bytes(table: pa.Table, *, rows_per_group: int | None = None) -> bytes:
    """A table as Parquet; equal tables give equal bytes under one version of pyarrow."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=rows_per_group)
    return buffer.getvalue()


def _json(value: Mapping[str, Any] | Iterable[Any]) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
