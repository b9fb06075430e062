"""A set put together: what is carried from its parent, the shards of its generation, its accounts and its manifest."""

import io
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vc2.artifacts import FileEntry, Manifest, ShardSet, commit, put_file, shard_set_prefix
from vc2.config import digest
from vc2.data.accounts import IndexWriter, counts_of, reject_lines, require_yield
from vc2.data.build import finished_shards, read_shard
from vc2.data.config import STAGE, STAGE_VERSION, Change, ShardStage, archive_marks, ledger_prefix, source_digest
from vc2.data.generations import OF_THE_TABLE, Parent, mark_set, read_removals
from vc2.data.ledger import parquet_bytes
from vc2.data.rejects import RejectReason
from vc2.data.shards import shard_name
from vc2.errors import ConfigError, Unaccounted
from vc2.storage import Store

__all__ = ["Gathered", "Job", "Removal", "commit_set", "gather", "is_reconsidered"]

READERS, READ_AHEAD = 8, 256  # threads that read parts, and parts that are read ahead


@dataclass(frozen=True, slots=True)
class Job:
    """Which set is made, and of what."""

    config: ShardStage
    store: Store
    folder: Path  #: for temporary files of the driver
    fingerprint: str
    repeat: int
    prefix: str
    ledger: str  #: folder of the ledger of this generation
    change: Change | None
    parent: Parent | None
    source_digest: str  #: of the source as it was when work began
    archives: list[list[Any]]  #: likewise, `config.archive_marks`
    removals: list[str]  #: sha256 of the removal lists that it heeds
    seconds: dict[str, float] = field(default_factory=dict)  #: what took how long
    resumed: dict[str, int] = field(default_factory=dict)  #: parts and shards that were there, which no second is of

    @classmethod
    def of(
        cls,
        config: ShardStage,
        store: Store,
        folder: Path,
        fingerprint: str,
        change: Change | None,
        removals: Sequence[str],
        repeat: int,
    ) -> "Job":
        name = config.source.name
        parent = Parent.of(store, name, change.parent) if change else None
        if change and parent:
            removals = sorted({*parent.manifest.facts["removals"], *filter(None, [change.removals])})
        if change and parent and change.kind != "grow":  # rows that are new since are not looked at
            now, archives = parent.manifest.facts["source_digest"], parent.manifest.facts["archives"]
        else:
            now = source_digest(config.source)
            archives = archive_marks(config.source) if config.source.by_archive else []
        return cls(
            config=config,
            store=store,
            folder=folder,
            fingerprint=fingerprint,
            repeat=repeat,
            prefix=shard_set_prefix(name, fingerprint),
            ledger=ledger_prefix(config, repeat, digest(change.identity()) if change else ""),
            change=change,
            parent=parent,
            source_digest=now,
            archives=archives,
            removals=[*removals],
        )

    @property
    def generation(self) -> int:
        return len(self.parent.generations) if self.parent else 0

    @property
    def first_shard(self) -> int:
        return self.parent.next_shard if self.parent else 0


@dataclass(frozen=True, slots=True)
class Gathered:
    """All of a set but its manifest."""

    index: IndexWriter
    rejects: pa.Table
    tars: list[FileEntry]
    rows: int  #: of the source
    plan: FileEntry | None  #: of this generation
    next_shard: int


def gather(job: Job, planned: Mapping[str, Any], tells_unmatched: bool) -> Gathered:
    """What is carried, and the shards of this generation.

    Args:
        job: The set.
        planned: What is known of its plan: `plan` (file entry), `rows` of the source, `shards` and `slots`.
        tells_unmatched: Whether this generation knows anew which media no row names.
    """
    plan = FileEntry.model_validate(planned["plan"])
    index = IndexWriter(job.config, job.folder / "slots")
    tars: list[FileEntry] = []
    if job.parent is not None:
        index.add(job.parent.table("index"))
        tars += job.parent.tars.values()
    kept: set[int] = set()
    parts = [key for _, key in sorted(finished_shards(job.store, job.prefix, plan.sha256).items())]
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(parts), READ_AHEAD):
            for slots, tar in readers.map(partial(read_shard, job.store), parts[start : start + READ_AHEAD]):
                index.add(slots)
                kept |= set(slots.filter(pc.is_null(slots["reason"]))["row"].to_pylist())  # type: ignore[attr-defined]
                tars.append(tar)
    unplanned, unmatched = (_read(job.store, f"{job.prefix}/{name}.parquet") for name in ("unplanned", "unmatched"))
    rejects = reject_lines(unplanned, index, frozenset(kept), unmatched)
    if job.parent is not None:
        rejects = pa.concat_tables([_carried_rejects(job, tells_unmatched), rejects])
    return Gathered(index, rejects, tars, planned["rows"], plan, job.first_shard + planned["shards"])


def _carried_rejects(job: Job, tells_unmatched: bool) -> pa.Table:
    assert job.parent is not None
    rejects = job.parent.table("rejects")
    again = is_reconsidered(job, rejects)
    if tells_unmatched:
        again = pc.or_(again, pc.equal(rejects["what"], "media"))  # type: ignore[attr-defined]
    return rejects.filter(pc.invert(again))  # type: ignore[attr-defined]


def is_reconsidered(job: Job, rejects: pa.Table) -> Any:
    """Which rejects of the parent are rows that this generation looks at again: an array of booleans."""
    assert job.change is not None
    of_rows = pc.equal(rejects["what"], "row")  # type: ignore[attr-defined]
    if job.change.kind == "retry":
        reasons, keyed = pa.array(job.change.reasons, pa.string()), pc.greater(pc.utf8_length(rejects["key"]), 0)  # type: ignore[attr-defined]
        return pc.and_(pc.and_(of_rows, keyed), pc.is_in(rejects["reason"], reasons))  # type: ignore[attr-defined]
    if job.config.source.embedded:  # members of new archives only
        return pa.array([False] * rejects.num_rows, pa.bool_())
    return pc.and_(of_rows, pc.is_in(rejects["reason"], pa.array(sorted(OF_THE_TABLE))))  # type: ignore[attr-defined]


class Removal:
    """A set without the samples of a removal list. A line names a sample, a row, a path or URL, or the sha256 of a
    source file; all samples of its row go.

    Raises:
        ConfigError: If no line names a sample.
    """

    def __init__(self, job: Job) -> None:
        assert job.change is not None and job.parent is not None
        self.job, self.parent, self.list = job, job.parent, job.change.removals
        listed = pa.array(sorted(read_removals(job.store, [job.change.removals])), pa.string())
        lines = job.parent.table("index")
        hit = pa.array([False] * lines.num_rows, pa.bool_())
        for name in ("key", "source_key", "locator", "url", "sha256"):
            hit = pc.or_(hit, pc.is_in(lines[name], listed))  # type: ignore[attr-defined]
        if not pc.any(hit).as_py():  # type: ignore[attr-defined]
            raise ConfigError(
                f"none of the {len(listed)} lines of the removal list names a sample of "
                f"{job.parent.manifest.fingerprint[:12]}; a line is a key, URL, path or sha256, as `vc2 show URI#KEY` "
                "tells it"
            )
        is_out = pc.is_in(lines["source_key"], pc.unique(lines["source_key"].filter(hit)))  # type: ignore[attr-defined]
        self.lines, self.out, self.kept = lines, lines.filter(is_out), lines.filter(pc.invert(is_out))  # type: ignore[attr-defined]

    def items(self) -> Iterator[dict[str, Any]]:
        """What is to be copied: work for `build.strip_shard`."""
        finished = finished_shards(self.job.store, self.job.prefix, self.list)
        index = self.parent.manifest.file("index.parquet").key
        for shard in pc.unique(self.out["shard"]).to_pylist():  # type: ignore[attr-defined]
            if shard not in finished:
                without = self.out["key"].filter(pc.equal(self.out["shard"], shard)).to_pylist()  # type: ignore[attr-defined]
                tar = self.parent.tars[shard_name(shard)].key
                yield {"shard": shard, "plan_sha256": self.list, "index": index, "tar": tar, "without": without}

    def gathered(self) -> Gathered:
        """The set, all copies being there."""
        job = self.job
        finished = finished_shards(job.store, job.prefix, self.list)
        copies = {shard: read_shard(job.store, key) for shard, key in finished.items()}
        index = IndexWriter(job.config, job.folder / "slots")
        for shard in pc.unique(self.lines["shard"]).to_pylist():  # type: ignore[attr-defined]
            kept = self.kept.filter(pc.equal(self.kept["shard"], shard))  # type: ignore[attr-defined]
            index.add(copies[shard][0] if shard in copies else kept)
        tars = self.parent.tars | {tar.name: tar for _, tar in copies.values()}
        removed = [
            {"what": "row", "row": line["row"], "clip": None, "key": line["source_key"], "locator": line["locator"]}
            | {"reason": str(RejectReason.REMOVED), "detail": "on the removal list", "duplicate_of": None}
            for line in {line["source_key"]: line for line in self.out.to_pylist()}.values()
        ]
        rejects = self.parent.table("rejects")
        rejects = pa.concat_tables([rejects, pa.Table.from_pylist(removed, rejects.schema)])
        rows = self.parent.manifest.counts["rows"]
        return Gathered(index, rejects, [*tars.values()], rows, None, self.parent.next_shard)


def commit_set(job: Job, made: Gathered, started: float) -> ShardSet:
    """Index, accounts and manifest: the set is there.

    Args:
        job: The set.
        made: What it consists of.
        started: When work on it began, `time.monotonic()`.

    Raises:
        YieldTooLow: If too few rows of a source made from scratch became samples.
    """
    path = job.folder / "index.parquet"
    made.index.write(path)
    counts = counts_of(made.rows, made.index, made.rejects)
    if job.parent is not None and made.rows < job.parent.manifest.counts["rows"]:
        before = job.parent.manifest.counts["rows"]
        raise Unaccounted(
            f"{made.rows} rows, {before} before: rows were lost, nothing was committed; please report this"
        )
    fates = Counter(made.rejects.filter(pc.equal(made.rejects["what"], "row"))["reason"].to_pylist())  # type: ignore[attr-defined]
    if job.change is None:
        of_rows = made.rejects.filter(pc.equal(made.rejects["what"], "row"))  # type: ignore[attr-defined]
        rows = counts["rows"] - counts["rows_duplicate"]
        require_yield(job.config, counts["rows_with_samples"], rows, of_rows, f"{counts['rows']} rows")
    key = f"{job.prefix}/index.parquet"
    found = job.store.upload(path, key)
    source = job.config.source
    generation = {
        "fingerprint": job.fingerprint,
        "change": job.change.model_dump(mode="json") if job.change else None,
        "ledger": job.ledger if job.change is None or job.change.kind != "remove" else "",
        "first_shard": job.first_shard,
        "next_shard": made.next_shard,
        "rows": counts["rows"],
        "samples": counts["samples"],
    }
    manifest = Manifest(
        kind="shard_set",
        stage=STAGE,
        stage_version=STAGE_VERSION,
        fingerprint=job.fingerprint,
        repeat=job.repeat,
        config=job.config.model_dump(mode="json"),
        inputs={"parent": job.parent.manifest.reference(job.store, job.parent.prefix)} if job.parent else {},
        files=(
            *made.tars,
            *((made.plan,) if made.plan else ()),
            FileEntry(name="index.parquet", key=key, size=found.size, sha256=found.sha256),
            put_file(job.store, job.prefix, "rejects.parquet", parquet_bytes(made.rejects)),
        ),
        counts=counts | {"shards": len(made.tars)},
        facts={
            "source": source.name,
            "source_digest": job.source_digest,
            "asked": digest(job.config.identity()),
            "archives": job.archives,
            "removals": job.removals,
            "media": source.media,
            "reasons": dict(sorted(fates.items())),
            "fps_histogram": {str(fps): count for fps, count in sorted(made.index.fps.items()) if fps},
            "generations": [*(job.parent.generations if job.parent else []), generation],
            "seconds": job.seconds,
            **{f"resumed_{things}": number for things, number in job.resumed.items()},
        },
        licenses={source.name: source.license},
        seconds=round(time.monotonic() - started, 2),
    )
    mark_set(job.store, source.name, job.fingerprint)
    return cast(ShardSet, commit(job.store, job.prefix, manifest))


def _read(store: Store, key: str) -> pa.Table:
    return pq.read_table(io.BytesIO(store.read(key)), use_threads=False)
