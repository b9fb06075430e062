"""Generations: how a finished set becomes another one without its shards being built again.

A set is a list of generations. Its manifest names the parent, lists the parent's tars by digest, and adds shards that
are planned from some rows of the source alone:

    grow      the source has new rows                              shards of the new rows are added
    retry     rows were rejected for reasons that may have passed  shards of those that now succeed are added
    remove    some samples must go                                 the tars that hold them are copied without them

What a generation takes over is *carried*: counted, never looked at again. Rows are known by their keys. A row that was
there before must still be there, with the caption it had, or the source has not grown but changed.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vc2.artifacts import FileEntry, Manifest, ShardSet, load_manifest, shard_set_prefix
from vc2.config import digest
from vc2.data.config import STAGE_VERSION, Change, ShardStage, archive_marks
from vc2.data.plan import Known
from vc2.data.rejects import RejectReason
from vc2.data.sources import Record, read_records
from vc2.errors import ConfigError, SourceError, StoreError
from vc2.storage import Store

__all__ = [
    "Parent",
    "Selection",
    "check_grown",
    "hashes_of",
    "latest_set",
    "mark_set",
    "read_removals",
    "retry_reasons",
]

OF_THE_TABLE = {  # reasons that a table gives by itself: judged anew in every generation
    str(reason)
    for reason in (
        RejectReason.UNPARSABLE,
        RejectReason.DUPLICATE_KEY,
        RejectReason.NO_CAPTION,
        RejectReason.UNMATCHED_ROW,
    )
}
AT_ONCE = 4096  # rows that are compared at a time


def mark_set(store: Store, source: str, name: str) -> None:
    """Note that a set of a source may exist, so that `latest_set` need not list whole sets."""
    store.write(f"sets/{source}/{name}", b"")


def latest_set(store: Store, config: ShardStage, *, source_digest: str | None = None) -> ShardSet | None:
    """The newest finished set of this source in this form; with `source_digest` only of the source as it is now."""
    found = []
    for entry in store.list(f"sets/{config.source.name}/"):
        prefix = shard_set_prefix(config.source.name, entry.key.rpartition("/")[2])
        if store.entry(f"{prefix}/manifest.json") is None:
            continue
        manifest = load_manifest(store, prefix)
        alike = manifest.stage_version == STAGE_VERSION and manifest.facts.get("asked") == digest(config.identity())
        if alike and source_digest in (None, manifest.facts.get("source_digest")):
            found.append((manifest.created_at, len(manifest.facts["generations"]), manifest.fingerprint, prefix))
    if not found:
        return None
    prefix = max(found)[-1]
    reference = load_manifest(store, prefix).reference(store, prefix)
    assert isinstance(reference, ShardSet)
    return reference


def retry_reasons(parent: "Parent", asked: Sequence[str]) -> tuple[str, ...]:
    """Reasons to try again, checked against what was rejected.

    Args:
        parent: The set whose rejects are meant.
        asked: Names of reasons; `all` stands for every reason that is not the table's own.

    Raises:
        ConfigError: If a reason does not exist, or no row was rejected for any of them.
    """
    there = parent.reasons
    known = {str(reason) for reason in RejectReason}
    for name in asked:
        if name not in known | {"all"}:
            raise ConfigError(f"no reason {name!r}; the rejects of this set are: {_counted(there)}")
    fixed_reasons = OF_THE_TABLE | {str(RejectReason.REMOVED)}
    chosen = set(there) - fixed_reasons if "all" in asked else set(asked)
    if fixed := sorted(chosen & fixed_reasons):
        raise ConfigError(f"{', '.join(fixed)}: trying again cannot change that; the rejects are: {_counted(there)}")
    if not chosen & set(there):
        named = ", ".join(sorted(chosen)) or "reasons that may pass"
        raise ConfigError(f"nothing was rejected for {named}; the rejects are: {_counted(there)}")
    return tuple(sorted(chosen & set(there)))


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in reasons.most_common()) or "none"


class Parent:
    """A finished set, as far as its children need it."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store, self.manifest = store, manifest

    @classmethod
    def of(cls, store: Store, source: str, name: str) -> "Parent":
        return cls(store, load_manifest(store, shard_set_prefix(source, name)))

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """`index` or `rejects`."""
        data = self.store.read(self.manifest.file(f"{name}.parquet").key)
        return pq.read_table(io.BytesIO(data), columns=None if columns is None else [*columns], use_threads=False)

    @cached_property
    def reasons(self) -> Counter[str]:
        """Rejected rows by reason."""
        return Counter(self.row_rejects["reason"].to_pylist())

    @cached_property
    def row_rejects(self) -> pa.Table:
        rejects = self.table("rejects")
        return rejects.filter(pc.equal(rejects["what"], "row"))  # type: ignore[attr-defined]

    @cached_property
    def known(self) -> Known:
        kept = self.table("index", ["sha256", "source_key"])
        return Known(kept["sha256"].to_pylist(), kept["source_key"].to_pylist())

    @property
    def prefix(self) -> str:
        return shard_set_prefix(self.manifest.facts["source"], self.manifest.fingerprint)

    @property
    def tars(self) -> dict[str, FileEntry]:
        """Tars by name, in order."""
        return {entry.name: entry for entry in self.manifest.files if entry.name.endswith(".tar")}

    @property
    def generations(self) -> list[dict[str, Any]]:
        return self.manifest.facts["generations"]

    @cached_property
    def removed(self) -> frozenset[str]:
        """What the removal lists of this set and of those before it name."""
        return read_removals(self.store, self.manifest.facts["removals"])

    @cached_property
    def retry_rows(self) -> dict[str, int]:
        """Number of each rejected row by its key."""
        return dict(zip(self.row_rejects["key"].to_pylist(), self.row_rejects["row"].to_pylist(), strict=True))

    @property
    def next_shard(self) -> int:
        return max(generation["next_shard"] for generation in self.generations)


class Selection:
    """Which rows of a source a generation looks at, and how many it carries.

    Args:
        change: The change; None: every row, none carried.
        parent: The set that is changed.
        limit: Only the first rows of the source.
    """

    def __init__(self, change: Change | None, parent: Parent | None, *, limit: int | None = None) -> None:
        self.change, self.parent, self.limit = change, parent, limit
        self.carried = 0

    def __call__(self, records: Iterable[Record]) -> Iterator[Record]:
        """The rows to look at, in order.

        Raises:
            SourceError: If the source has changed where it should have grown only.
        """
        records = islice(records, self.limit)
        if self.change is None or self.parent is None:
            yield from records
        elif self.change.kind == "retry":
            yield from self._again(records)
        else:
            yield from self._new(records)

    @cached_property
    def retried(self) -> frozenset[str]:
        """Keys of the rows that are tried again."""
        return frozenset(self.retried_places)

    @cached_property
    def retried_places(self) -> dict[str, str]:
        """Where the media of the rows that are tried again were found, by key."""
        assert self.change is not None and self.parent is not None
        rejects = self.parent.row_rejects
        chosen = rejects.filter(pc.is_in(rejects["reason"], pa.array(self.change.reasons, pa.string())))  # type: ignore[attr-defined]
        places = zip(chosen["key"].to_pylist(), chosen["locator"].to_pylist(), strict=True)
        return {key: locator or "" for key, locator in places if key}

    def _again(self, records: Iterable[Record]) -> Iterator[Record]:
        assert self.parent is not None
        self.carried, found = self.parent.manifest.counts["rows"] - len(self.retried), 0
        for record in records:  # those that are new since come with the next growth
            if record.reason is None and record.key in self.retried:
                found += 1
                yield record
        if found != len(self.retried):
            raise SourceError(
                f"{len(self.retried) - found} of the {len(self.retried)} rows to try again are no longer in the source"
            )

    def _new(self, records: Iterable[Record]) -> Iterator[Record]:
        assert self.parent is not None
        kept = self.parent.table("index", ["source_key", "caption"])
        keys, captions = hashes_of(kept["source_key"].to_pylist()), hashes_of(kept["caption"].to_pylist())
        keys, first = np.unique(keys, return_index=True)
        captions = captions[first]
        others = np.unique(hashes_of(self._left_out()))
        changed, expected = 0, len(keys) + len(others)
        records = iter(records)
        while some := list(islice(records, AT_ONCE)):
            hashes, said = hashes_of([record.key for record in some]), hashes_of([record.caption for record in some])
            place = np.searchsorted(keys, hashes).clip(max=max(0, len(keys) - 1))
            is_kept = keys[place] == hashes if len(keys) else np.zeros(len(some), bool)
            is_known = is_kept | np.isin(hashes, others)
            for number, record in enumerate(some):
                if (record.reason is not None and str(record.reason) in OF_THE_TABLE) or not is_known[number]:
                    yield record
                    continue
                self.carried += 1
                changed += bool(is_kept[number] and captions[place[number]] != said[number])
        if changed or self.carried != expected:
            raise SourceError(
                f"source has not only grown since {self.parent.manifest.fingerprint[:12]}: of its {expected} rows "
                f"{expected - self.carried} are gone and {changed} have another caption"
            )

    def _left_out(self) -> list[str]:
        """Keys of rows that gave no sample and need not be looked at again."""
        assert self.parent is not None
        rejects = self.parent.table("rejects", ["what", "key", "reason"])
        return [
            line["key"]
            for line in rejects.to_pylist()
            if line["what"] in ("row", "duplicate") and line["key"] and line["reason"] not in OF_THE_TABLE
        ]


def check_grown(parent: Parent, config: ShardStage) -> bool:
    """Whether a source has new rows since a set was made of it; one that differs by more is refused.

    Raises:
        SourceError: If rows or archives are gone, or captions have changed.
    """
    source = config.source
    if source.by_archive:
        there = archive_marks(source)
        if gone := [mark for mark in parent.manifest.facts["archives"] if mark not in there]:
            name, size = gone[0]
            raise SourceError(
                f"{len(gone)} archives of {parent.manifest.fingerprint[:12]} are gone or others, such as {name} of "
                f"{size} bytes"
            )
        if source.embedded:
            return len(there) > len(parent.manifest.facts["archives"])
    selection = Selection(Change(kind="grow", parent=parent.manifest.fingerprint), parent, limit=config.limit)
    new = [record for record in selection(read_records(source)) if str(record.reason) not in OF_THE_TABLE]
    again = parent.row_rejects["reason"].to_pylist().count(str(RejectReason.UNMATCHED_ROW))
    more_archives = source.by_archive and len(archive_marks(source)) > len(parent.manifest.facts["archives"])
    return len(new) > again or more_archives


def hashes_of(texts: Sequence[str]) -> np.ndarray:
    """64-bit digests of texts, (N,) uint64: what stands for keys where there are too many to keep."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, np.uint64)


def read_removals(store: Store, lists: Iterable[str]) -> frozenset[str]:
    """The lines of removal lists, which are objects of the store.

    Raises:
        StoreError: If one is gone.
    """
    lines: set[str] = set()
    for sha256 in lists:
        try:
            lines.update(store.read(f"objects/{sha256}").decode().split("\n"))
        except KeyError:
            raise StoreError(f"the removal list {sha256[:12]} is no longer in the store; give it again") from None
    return frozenset(lines)
