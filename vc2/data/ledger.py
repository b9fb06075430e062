"""The ledger: for every row of a source what was fetched and found, or the reason why not.

It grows in *parts* under `ledgers/<source>/<digest>/`. A part is a Parquet file, written once and last: parts that
are there are never fetched again. Bytes that came over the network or out of an archive lie in one blob beside it,
named by its content, and the rows hold offset and length; files of a local tree are not copied.

    part-00012.parquet            rows of the tables, in order                 (rows hold blob, offset, length)
    part-003-00012.parquet        members of archive 3, in order               (JourneyDB: joined with the tables when
    collected) part-00012-<sha256>.bin       the bytes of a part verdicts/<sha256>.json        a file that missed its
    deadline while a shard was built: rejected from then on

Network and deadlines are not reproducible; the ledger is where their outcome is fixed, once. Everything after it is a
pure function.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vc2.data.config import JourneyDBSource, ShardStage
from vc2.data.rejects import RejectReason
from vc2.data.sources import Record, read_records
from vc2.storage import Store, file_digest

__all__ = [
    "SCHEMA",
    "collect",
    "is_last",
    "parquet_bytes",
    "part_names",
    "read_part",
    "read_verdicts",
    "row_of",
    "write_part",
    "write_verdict",
]

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
        ("blob", pa.string()),  # name in the ledger's folder; null: a local file
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
    store: Store, prefix: str, name: str, rows: list[dict[str, Any]], blob: Path | None, *, last: bool = True
) -> None:
    """Commit a part. Of two writers the first wins; the blobs of both are whole.

    Args:
        store: Where.
        prefix: Folder of the ledger.
        name: For example `part-00012`.
        rows: See `SCHEMA`; rows with an `offset` get the key of the blob.
        blob: The bytes of the part, if there are any.
        last: Whether no part of the same archive follows.
    """
    key = None
    if blob is not None and blob.stat().st_size:
        key = f"{name}-{file_digest(blob).sha256[:16]}.bin"
        store.upload(blob, f"{prefix}/{key}")
    rows = [row | {"blob": key if row["offset"] is not None else None} for row in rows]
    table = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata({"last": "yes" if last else "no"})
    store.write_if_absent(f"{prefix}/{name}.parquet", parquet_bytes(table))


def part_names(store: Store, prefix: str) -> list[str]:
    """Names of the parts that are there, in order."""
    keys = (entry.key for entry in store.list(f"{prefix}/part-"))
    return sorted(key.rpartition("/")[2].removesuffix(".parquet") for key in keys if key.endswith(".parquet"))


def read_part(store: Store, prefix: str, name: str) -> pa.Table:
    return pq.read_table(io.BytesIO(store.read(f"{prefix}/{name}.parquet")), use_threads=False)


def is_last(store: Store, prefix: str, name: str) -> bool:
    """Whether a part ends its archive."""
    metadata = pq.read_schema(io.BytesIO(store.read(f"{prefix}/{name}.parquet"))).metadata or {}
    return metadata.get(b"last") == b"yes"


def collect(
    store: Store, prefix: str, config: ShardStage, names: Sequence[str] | None = None
) -> tuple[pa.Table, pa.Table]:
    """The ledger as one table, a line per row of the source in total order; and the media that no row names.

    Args:
        store: Where.
        prefix: Folder of the ledger.
        config: Needed for its source, whose tables a JourneyDB ledger is joined with.
        names: Only these parts; default: all.
    """
    parts = [read_part(store, prefix, name) for name in (part_names(store, prefix) if names is None else names)]
    table = pa.concat_tables(parts).replace_schema_metadata(None) if parts else SCHEMA.empty_table()
    if not isinstance(config.source, JourneyDBSource):
        return table, SCHEMA.empty_table()
    return _joined(config.source, table)


def _joined(source: JourneyDBSource, media: pa.Table) -> tuple[pa.Table, pa.Table]:
    lines = media.to_pylist()
    place: dict[str, int] = {}
    for number, line in enumerate(lines):
        if line["key"]:
            place.setdefault(line["key"], number)
    used, rows = set(), []
    for record in read_records(source):
        number = place.get(record.key) if record.key else None
        if number is not None:
            used.add(number)
        if record.reason is not None:
            rows.append(row_of(record))
        elif number is None:
            rows.append(row_of(record) | {"reason": str(RejectReason.UNMATCHED_ROW), "detail": "in no archive"})
        else:
            said = row_of(record)
            own = {name: said[name] for name in ("row", "key", "caption", "captions", "extra")}
            rows.append(lines[number] | own)
    alone = [
        line | {"reason": str(RejectReason.UNMATCHED_MEDIA), "detail": line["detail"] or "no row names it"}
        for number, line in enumerate(lines)
        if number not in used
    ]
    return pa.Table.from_pylist(rows, SCHEMA), pa.Table.from_pylist(alone, SCHEMA)


def write_verdict(store: Store, prefix: str, sha256: str, reason: RejectReason, detail: str) -> None:
    """Fix that a file is rejected, before the shard that lacks it is committed."""
    store.write_if_absent(f"{prefix}/verdicts/{sha256}.json", _json({"reason": str(reason), "detail": detail}).encode())


def read_verdicts(store: Store, prefix: str) -> dict[str, tuple[RejectReason, str]]:
    """Verdicts by sha256 of the file."""
    found = {}
    for entry in store.list(f"{prefix}/verdicts/"):
        said = json.loads(store.read(entry.key))
        found[entry.key.rpartition("/")[2].removesuffix(".json")] = (RejectReason(said["reason"]), said["detail"])
    return found


def parquet_bytes(table: pa.Table, *, rows_per_group: int | None = None) -> bytes:
    """A table as Parquet; equal tables give equal bytes under one version of pyarrow."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=rows_per_group)
    return buffer.getvalue()


def _json(value: Mapping[str, Any] | Iterable[Any]) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
