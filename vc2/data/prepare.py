"""From a source to a shard set: fetch and probe, plan, build, commit. The one place in this package that knows of Ray.

Work is spread as *parts* of the ledger and then as *shards* of the plan, one Ray Data row each (`vc2.ray_session`);
what travels is a small description, and a worker reads and writes the store by itself. Each part and each shard is
committed on its own, so a kill costs those in work and no more, and what a shard holds depends on ledger and plan
alone: same bytes for any number of workers and after any kill.

    shards/<source>/<fingerprint>/plan.parquet       what goes where
    shards/<source>/<fingerprint>/parts/...          a shard is finished: its slots, and its tar among the objects
    shards/<source>/<fingerprint>/index.parquet      a row per sample
    shards/<source>/<fingerprint>/rejects.parquet    a row per thing left out, with its reason
    shards/<source>/<fingerprint>/manifest.json      the set is finished
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vc2.artifacts import FileEntry, ShardSet, find, put_file, shard_set_prefix
from vc2.data import ledger as ledgers
from vc2.data.accounts import require_yield
from vc2.data.build import build_shard, finished_shards, strip_shard
from vc2.data.config import Change, ShardStage, archive_marks, archive_uris
from vc2.data.fetch import fetch_archive, fetch_rows, workplace
from vc2.data.generations import Selection, mark_set, read_removals
from vc2.data.ledger import SCHEMA, parquet_bytes
from vc2.data.plan import UNPLANNED, Planner, judge
from vc2.data.rejects import RejectReason
from vc2.data.sets import Gathered, Job, Removal, commit_set, gather, is_reconsidered
from vc2.data.sources import Record, read_records
from vc2.errors import YieldTooLow
from vc2.launch import cpu_count
from vc2.progress import Meter, Progress, silent
from vc2.ray_session import HeldSession, ray_session
from vc2.storage import Store, open_store

__all__ = ["prepare"]

EARLY_ROWS = 1000  # rows after which a hopeless source is given up
WINDOW = 256  # shards described to Ray at a time
FETCH_WINDOW = 64  # likewise, parts of the ledger, which hold a thousand rows each
JOINED_AT_ONCE = 4096  # rows


def prepare(
    config: ShardStage,
    store: Store,
    work: Path,
    *,
    fingerprint: str,
    change: Change | None = None,
    removals: Sequence[str] = (),
    repeat: int = 0,
    only: range | None = None,
    progress: Progress = silent,
) -> ShardSet | None:
    """Make the shard set of a source, or find it, or finish it.

    Args:
        config: The source and the form of its samples.
        store: Where ledger and shards go; workers reach it by its URI.
        work: Folder for temporary files, on every machine.
        fingerprint: Name of the set (`generations.shard_fingerprint`).
        change: How the set differs from its parent; None: made from scratch.
        removals: Removal lists that a set made from scratch heeds (`config.removal_lists`).
        repeat: Raised to fetch and build once more.
        only: Build these shards alone. The set is committed by whoever finds all shards built.
        progress: Told about parts and shards.

    Returns:
        The set; None if `only` leaves shards to be built.

    Raises:
        SourceError: If the source as a whole cannot be read.
        YieldTooLow: If too few of its rows become samples.
        StoreError: If the store fails.
    """
    prefix = shard_set_prefix(config.source.name, fingerprint)
    if (done := find(store, prefix, ShardSet)) is not None:
        mark_set(store, config.source.name, fingerprint)
        return done
    with workplace(work) as folder, ExitStack() as stack:
        job = Job.of(config, store, folder, fingerprint, change, removals, repeat)
        return _Making(job, work, stack, progress).make(only)


class _Making:
    """A set in the making."""

    def __init__(self, job: Job, work: Path, stack: ExitStack, progress: Progress) -> None:
        self.job, self.config, self.store, self.ledger = job, job.config, job.store, job.ledger
        self.stack, self.progress = stack, progress
        self.common = {
            "config": job.config.model_dump_json(),
            "store": job.store.uri,
            "work": str(work),
            "ledger": job.ledger,
            "prefix": job.prefix,
            "generation": job.generation,
        }
        self.ray: HeldSession | None = None

    def make(self, only: range | None) -> ShardSet | None:
        started = time.monotonic()
        if self.job.change and self.job.change.kind == "remove":
            return commit_set(self.job, self._strip(), started)
        self._timed("fetch", self._fetch)
        self._timed("plan", self._plan)
        if not self._timed("build", self._build, only):
            return None
        return commit_set(self.job, gather(self.job, self.planned, self._tells_unmatched), started)

    def _spread(self, work: Callable[[dict[str, Any]], dict[str, Any]], items: list[dict[str, Any]]) -> Iterator[Any]:
        """Do `work` for each item; results as they come. Ray is started when there is first something to spread: one
        piece alone is done here, unless there is a cluster to do it."""
        if len(items) == 1 and self.ray is None and "RAY_ADDRESS" not in os.environ:
            yield work(items[0])
            return
        if items and self.ray is None:
            started = time.monotonic()
            self.ray = self.stack.enter_context(ray_session())
            self.job.seconds["ray_start"] = round(time.monotonic() - started, 2)
        if self.ray is not None:
            yield from self.ray.spread(f"{work.__module__}:{work.__name__}", items, self.config.workers)

    def _timed(self, name: str, act: Callable[..., Any], *args: Any) -> Any:
        started = time.monotonic()
        result = act(*args)
        self.job.seconds[name] = round(time.monotonic() - started, 2)
        return result

    # ---- fetch and probe ----

    def _fetch(self) -> None:
        """Complete the ledger; gives up after the first rows if they are hopeless."""
        self.job.resumed["parts"] = len(ledgers.part_names(self.store, self.ledger))
        if ledgers.is_complete(self.store, self.ledger):
            return
        selection = Selection(self.job.change, self.job.parent, limit=self.config.limit)
        by_archive = self.config.source.by_archive
        pieces = self._archive_pieces(selection) if by_archive else self._row_pieces(selection)
        meter = Meter(self.progress, f"{self.config.source.name}: fetch", "rows")
        early = -(-EARLY_ROWS // self.config.fetch.part_rows)
        if by_archive:
            early = self.config.workers or cpu_count()
        window = 1 if self._most_rows is not None else FETCH_WINDOW  # of a limit so much is left as was not read before
        some = list(islice(pieces, min(early, window)))
        self._fetch_all(some, meter)
        if self.job.change is None and some:
            self._check_early(some)
        while some := list(islice(pieces, window)):
            self._fetch_all(some, meter)
        meter.end()
        ledgers.set_complete(self.store, self.ledger, selection.carried)

    def _row_pieces(self, selection: Selection) -> Iterator[dict[str, Any]]:
        """A piece for each slice of the tables; without `records` where its part is there already."""
        present = set(ledgers.part_names(self.store, self.ledger))
        records, number = selection(read_records(self.config.source)), 0
        while slice_ := list(islice(records, self.config.fetch.part_rows)):
            name = f"part-{number:07d}"
            piece = {"name": name, "rows": len(slice_)}
            yield piece if name in present else piece | {"records": [asdict(record) for record in slice_]}
            number += 1

    def _archive_pieces(self, selection: Selection) -> Iterator[dict[str, Any]]:
        """A piece for each archive; without its URI where all its parts are there already."""
        present: dict[str, list[str]] = {}
        for name in ledgers.part_names(self.store, self.ledger):
            present.setdefault(name[: len("part-000000")], []).append(name)
        is_retry = self.job.change is not None and self.job.change.kind == "retry"
        read = self.job.parent.manifest.facts["archives"] if self.job.parent and not is_retry else []
        read = {tuple(mark) for mark in read}
        wanted = self._wanted(selection)
        source = self.config.source
        for number, (uri, mark) in enumerate(zip(archive_uris(source), archive_marks(source), strict=True)):
            if tuple(mark) in read:
                continue
            name = f"part-{number:06d}"
            own = present.get(name, [])
            piece: dict[str, Any] = {"name": name, "number": number, "first": len(own), "rows": 0}
            if own and ledgers.is_last(own[-1]):
                yield piece
                continue
            if is_retry:
                folder = uri.rpartition("/")[2] + "/"
                keys = [key for key, place in selection.retried_places.items() if place.startswith(folder)]
                if keys:
                    yield piece | {"archive": uri, "wanted": sorted(keys), "most": None}
                continue
            most = self._most_rows
            if most is not None:
                most -= sum(part.num_rows for part in ledgers.read_parts(self.store, self.ledger))
                if most <= 0:
                    return
            yield piece | {"archive": uri, "wanted": wanted, "most": most}

    @property
    def _most_rows(self) -> int | None:
        """Rows after which no archive need be read, where the rows come out of archives."""
        return self.config.limit if self.config.source.embedded and self.job.change is None else None

    def _wanted(self, selection: Selection) -> list[str] | None:
        """Keys of the only media to look at, where not all of an archive are."""
        if self.config.limit is None or self.config.source.embedded:
            return None
        return [record.key for record in islice(read_records(self.config.source), self.config.limit) if record.key]

    def _fetch_all(self, pieces: list[dict[str, Any]], meter: Meter) -> None:
        missing = [piece for piece in pieces if "records" in piece or "archive" in piece]
        meter.found(sum(piece["rows"] for piece in pieces) - sum(piece["rows"] for piece in missing))
        for said in self._spread(_fetch_piece, [self.common | piece for piece in missing]):
            meter.add(said["rows"], said["bytes"], said["reasons"])

    def _check_early(self, pieces: list[dict[str, Any]]) -> None:
        """Look at what the first pieces brought. If that is hopeless, paths or settings may be wrong: nothing is kept,
        so that mended ones start anew."""
        heads = {piece["name"] for piece in (pieces[:1] if self.config.source.by_archive else pieces)}
        names = [
            name
            for name in ledgers.part_names(self.store, self.ledger)
            if name in heads or name[: len("part-000000")] in heads
        ]
        if self._is_joined:  # rows of the other archives are not missing yet; media here that no row names do count
            media = ledgers.Media(ledgers.read_parts(self.store, self.ledger, names))
            table = pa.concat_tables(self._joined_rows(media))
            unmatched = pc.equal(pc.fill_null(table["reason"], ""), str(RejectReason.UNMATCHED_ROW))  # type: ignore[attr-defined]
            tables = iter((table.filter(pc.invert(unmatched)), media.unclaimed()))  # type: ignore[attr-defined]
        else:
            tables = ledgers.read_parts(self.store, self.ledger, names)
        rows = [row for table in tables for row in table.slice(0, 2 * EARLY_ROWS).to_pylist()]
        judged = [(row, judge(row, self.config)) for row in rows]
        rejects = [
            {name: row[name] for name in ("row", "key", "locator")}
            | {"reason": str(verdict.reason), "detail": verdict.detail, "duplicate_of": None}
            for row, verdict in judged
            if verdict.reason is not None
        ]
        table = pa.Table.from_pylist(rejects, UNPLANNED)
        try:
            require_yield(self.config, len(rows) - len(rejects), len(rows), table, "the first rows")
        except YieldTooLow:
            ledgers.drop(self.store, self.ledger)
            raise

    # ---- plan ----

    def _plan(self) -> None:
        """Put the plan into the store, unless it is there: the ledger is complete, so it can only be the same."""
        key = f"{self.job.prefix}/plan.parquet"
        if self.store.entry(f"{self.job.prefix}/planned.json") is None:
            known = self.job.parent.known if self.job.parent else None
            place = {"first_shard": self.job.first_shard, "removed": read_removals(self.store, self.job.removals)}
            planner = Planner(self.config, self.job.folder / "spool", known=known, **place)
            selection = Selection(self.job.change, self.job.parent, limit=self.config.limit)
            for table in self._ledger_rows(selection):
                planner.add(table)
            path = self.job.folder / "plan.parquet"
            unplanned = planner.write(path)
            unmatched = self.media.unclaimed() if self.media is not None and self._tells_unmatched else None
            if self.job.change is None:
                copies = pc.equal(unplanned["reason"], str(RejectReason.DUPLICATE))  # type: ignore[attr-defined]
                rejects = unplanned.filter(pc.invert(copies))  # type: ignore[attr-defined]
                good, rows = planner.rows - unplanned.num_rows, planner.rows - unplanned.num_rows + rejects.num_rows
                require_yield(self.config, good, rows, rejects, f"{planner.rows} rows")
            put_file(self.store, self.job.prefix, "unplanned.parquet", parquet_bytes(unplanned))
            put_file(self.store, self.job.prefix, "unmatched.parquet", parquet_bytes(unmatched or SCHEMA.empty_table()))
            found = self.store.upload(path, key)
            shards, slots = pq.ParquetFile(path).metadata.num_row_groups, pq.ParquetFile(path).metadata.num_rows
            entry = FileEntry(name="plan.parquet", key=key, size=found.size, sha256=found.sha256)
            rows = planner.rows + self._carried(selection)
            said = {"plan": entry.model_dump(), "rows": rows, "shards": shards, "slots": slots}
            put_file(self.store, self.job.prefix, "planned.json", json.dumps(said).encode())
        self.planned = json.loads(self.store.read(f"{self.job.prefix}/planned.json"))
        self.plan = FileEntry.model_validate(self.planned["plan"])

    @property
    def _tells_unmatched(self) -> bool:
        """Whether all archives were looked at, so that it is known which media no row names."""
        return self.config.limit is None and (self.job.change is None or self.job.change.kind == "grow")

    @property
    def _is_joined(self) -> bool:
        """Whether media and what is said of them come from different places."""
        return self.config.source.by_archive and not self.config.source.embedded

    @cached_property
    def media(self) -> ledgers.Media | None:
        """What archives hold that are joined with tables: of this ledger first, then of those before it."""
        if not self._is_joined:
            return None
        earlier = (
            [generation["ledger"] for generation in reversed(self.job.parent.generations)] if self.job.parent else []
        )
        folders = [self.ledger, *(folder for folder in earlier if folder)]
        return ledgers.Media(*(ledgers.read_parts(self.store, folder) for folder in folders))

    def _ledger_rows(self, selection: Selection) -> Iterator[pa.Table]:
        """Rows of the source that this generation looks at, in order, with what was found of them."""
        if self.media is not None:
            yield from self._joined_rows(self.media, selection)
            return
        parts = ledgers.read_parts(self.store, self.ledger)
        if not self.config.source.embedded:
            yield from parts
        elif self.job.change is not None and self.job.change.kind == "retry" and self.job.parent is not None:
            yield from _as_numbered(parts, self.job.parent.retry_rows)
        else:
            first = self.job.parent.manifest.counts["rows"] if self.job.parent else 0
            yield from _numbered(parts, first, self.config.limit)

    def _joined_rows(self, media: ledgers.Media, selection: Selection | None = None) -> Iterator[pa.Table]:
        """Rows of the tables with what archives hold of them."""

        def claimed() -> Iterator[Record]:
            records = read_records(self.config.source)
            while some := list(islice(records, JOINED_AT_ONCE)):
                media.claim(some)
                yield from some

        records = (selection or Selection(None, None, limit=self.config.limit))(claimed())
        while some := list(islice(records, JOINED_AT_ONCE)):
            yield media.join(some)

    def _carried(self, selection: Selection) -> int:
        """Rows of the source that earlier generations tell of."""
        if self.job.parent is None:
            return 0
        if not self.config.source.by_archive:
            return ledgers.rows_carried(self.store, self.ledger)
        if self.config.source.embedded:
            rejects = self.job.parent.table("rejects")
            return self.job.parent.manifest.counts["rows"] - rejects.filter(is_reconsidered(self.job, rejects)).num_rows
        return selection.carried

    # ---- build ----

    def _strip(self) -> Gathered:
        """The set without the samples of a removal list: tars that hold some are copied without them."""
        removal = Removal(self.job)
        items = [self.common | item for item in removal.items()]
        meter = Meter(self.progress, f"{self.config.source.name}: shards", "samples", len(items))
        for said in self._spread(strip_shard, items):
            meter.add(1, said["bytes"], {}, said["samples"])
        meter.end()
        return removal.gathered()

    def _build(self, only: range | None) -> bool:
        """Build the shards that are not there. True if the set is complete."""
        total = self.planned["shards"]
        finished = finished_shards(self.store, self.job.prefix, self.plan.sha256)
        numbers = {self.job.first_shard + group: group for group in range(total)}
        missing = {shard: group for shard, group in numbers.items() if shard not in finished}
        asked = [shard for shard in missing if only is None or shard in only]
        self.job.resumed["shards"] = total - len(asked)  # those that others build in the meantime too
        items = (
            self.common | {"shard": shard, "group": missing[shard], "plan_sha256": self.plan.sha256} for shard in asked
        )
        meter = Meter(self.progress, f"{self.config.source.name}: shards", "samples", total)
        meter.found(total - len(missing))
        while window := list(islice(items, WINDOW)):
            for said in self._spread(build_shard, window):
                meter.add(1, said["bytes"], said["reasons"], said["samples"])
        meter.end()
        return numbers.keys() <= finished_shards(self.store, self.job.prefix, self.plan.sha256).keys()


def _numbered(parts: Iterable[pa.Table], first: int, limit: int | None) -> Iterator[pa.Table]:
    """Members of archives as rows of the source: numbered through, in order, up to a limit."""
    for part in parts:
        part = part.slice(0, None if limit is None else max(0, limit - first))
        rows = pa.array(range(first, first + part.num_rows), pa.int64())
        yield part.set_column(part.schema.get_field_index("row"), "row", rows)
        first += part.num_rows


def _as_numbered(parts: Iterable[pa.Table], numbers: Mapping[str, int]) -> Iterator[pa.Table]:
    """Members of archives under the numbers that their rows had before."""
    for part in parts:  # which may end in a line on the archive itself
        part = part.filter(pc.greater(pc.utf8_length(part["key"]), 0))  # type: ignore[attr-defined]
        rows = pa.array([numbers[key] for key in part["key"].to_pylist()], pa.int64())
        yield part.set_column(part.schema.get_field_index("row"), "row", rows)


# ---- work that is spread ----


def _fetch_piece(item: dict[str, Any]) -> dict[str, Any]:
    config, store = ShardStage.model_validate_json(item["config"]), open_store(item["store"])
    work = Path(item["work"])
    if "archive" not in item and store.entry(f"{item['ledger']}/{item['name']}.parquet") is not None:
        return {"rows": item["rows"], "bytes": 0, "reasons": {}}  # by another driver, meanwhile
    if "archive" in item:
        wanted = None if item["wanted"] is None else frozenset(item["wanted"])
        place, some = (item["number"], item["archive"]), {"first": item["first"], "most": item["most"]}
        counts = fetch_archive(store, item["ledger"], *place, config, work, wanted=wanted, **some)
    else:
        records = [
            Record(**{**said, "reason": said["reason"] and RejectReason(said["reason"])}) for said in item["records"]
        ]
        counts = fetch_rows(store, item["ledger"], item["name"], records, config, work)
    return {"rows": counts.rows, "bytes": counts.bytes, "reasons": dict(counts.reasons)}
