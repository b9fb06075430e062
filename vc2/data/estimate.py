"""A dry run: what sharding a source would cost and give, judged by a few of its rows.

The rows are fetched, probed and some of them built as in earnest, in this process and into a temporary folder; without
Ray, and nothing is kept. All figures are extrapolated from them, so they are as good as the sample is large.
"""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vc2.config import Config
from vc2.data.build import sample_of
from vc2.data.config import ShardStage, archive_files, table_files
from vc2.data.decode import MediaError, shared_decoder
from vc2.data.fetch import fetch_archive, fetch_rows
from vc2.data.ledger import Media, read_parts
from vc2.data.places import open_file, unpacked
from vc2.data.plan import Verdict, judge
from vc2.data.rejects import RejectReason
from vc2.data.sources import Record, read_records
from vc2.errors import ConfigError, SourceError
from vc2.launch import cpu_count
from vc2.progress import counted, duration_text, size_text
from vc2.seeding import derive_seed
from vc2.storage import LocalStore

__all__ = ["Estimate", "estimate"]

PROBING, BUILDING = 0.3, 0.25  # seconds spent on either where no number of rows is asked for
AT_ONCE = 16  # rows
MOST_READ = 20_000  # rows of the tables among which the sample is drawn
HEAD = 2**20  # bytes of a table from which its rows are counted


class Estimate(Config):
    """What a dry run found. Counts and bytes are of the whole source; None where it does not tell its size."""

    sampled: int  #: rows that were looked at
    built: int  #: samples that were built
    rows: int | None
    rows_are_exact: bool
    reject_share: float  #: of the rows looked at
    min_yield: float  #: share of good rows below which the source is refused
    reasons: dict[str, int]  #: among them; and of media beside them that no row names
    duplicates: int  #: rows among them with the bytes of another
    samples: int | None
    shards: int | None
    raw_bytes: int | None
    shard_bytes: int | None
    core_hours: float | None
    cores: int
    hours: float | None  #: on that many cores, waiting for the network aside

    def lines(self) -> Iterator[str]:
        """For people."""
        reasons = ", ".join(f"{name} {count}" for name, count in Counter(self.reasons).most_common(5))
        yield f"looked at        {counted(self.sampled, 'row')}, built {counted(self.built, 'sample')}"
        yield f"rejects          {100 * self.reject_share:.0f} % of these rows{f': {reasons}' if reasons else ''}"
        if self.sampled and 1 - self.reject_share < self.min_yield:
            yield f"REFUSED          if all rows are like these: source.min_yield is {self.min_yield:g}"
        if self.duplicates:
            yield f"duplicates       {self.duplicates} of them"
        if self.rows is None:
            yield "rows             not known before they are read"
            return
        yield f"rows             {'' if self.rows_are_exact else 'about '}{self.rows:,}"
        yield f"samples          about {self.samples:,} in {counted(self.shards or 0, 'shard')}"
        yield f"to read          about {size_text(self.raw_bytes or 0)}"
        yield f"to store         about {size_text(self.shard_bytes or 0)}"
        one, all_cores = (duration_text(3600 * (hours or 0.0)) for hours in (self.core_hours, self.hours))
        yield f"to compute       {one} on one core, {all_cores} on {self.cores}"


def estimate(config: ShardStage, work: Path, *, sample: int | None = None) -> Estimate:
    """Look at some rows of a source.

    Args:
        config: The stage.
        work: For temporary files.
        sample: Rows to look at, at least one; None: as many as half a second allows.

    Raises:
        ConfigError: If no row is to be looked at.
        SourceError: If the source as a whole cannot be read, or has no rows.
    """
    if sample is not None and sample < 1:
        raise ConfigError(f"a sample of {sample} rows tells nothing; expected 1 or more")
    work.mkdir(parents=True, exist_ok=True)
    shared_decoder(config.fetch.probe_seconds, config.fetch.max_pixels)
    with tempfile.TemporaryDirectory(dir=work, prefix="dry-run-") as folder:
        store = LocalStore(Path(folder))
        seen = _probed(config, store, Path(folder), sample)
        total, rows = seen.total, seen.rows
        if not rows:
            found = f"its tables name none of the {seen.alone} media looked at" if seen.alone else "it has no rows"
            raise SourceError(f"source {config.source.name}: {found}; check its paths, and that they belong together")
        verdicts = [judge(row, config) for row in rows]
        reasons = Counter(str(verdict.reason) for verdict in verdicts if verdict.reason is not None)
        if seen.alone:
            reasons[str(RejectReason.UNMATCHED_MEDIA)] = seen.alone
        copies = _copies(rows, verdicts)
        slots = [
            row | clip
            for place, (row, verdict) in enumerate(zip(rows, verdicts, strict=True))
            for clip in verdict.clips
            if place not in copies
        ]
        sizes, lost, building = _built(slots, config, store, sample)
        reasons += lost
    tried = len(sizes) + lost.total()
    kept = len(slots) / len(rows) * (len(sizes) / tried if tried else 1.0)  # samples a row
    raw = sum(row["size"] or 0 for row in rows) / len(rows)
    if total is None:
        samples = shards = raw_bytes = shard_bytes = core_hours = None
    else:
        samples = round(total * kept)
        shards = -(-samples // config.samples_per_shard)
        raw_bytes = round(total * raw)
        shard_bytes = round(samples * sum(sizes) / max(1, len(sizes)))
        core_hours = (total * seen.seconds / len(rows) + samples * building / max(1, tried)) / 3600
    rejected = len(rows) - sum(bool(verdict.clips) for verdict in verdicts)
    share_lost = lost.total() / tried if tried else 0.0
    cores = config.workers or cpu_count()
    return Estimate(
        sampled=len(rows),
        built=len(sizes),
        rows=total,
        rows_are_exact=seen.exact,
        min_yield=config.source.min_yield,
        reject_share=round((rejected + (len(rows) - rejected) * share_lost) / len(rows), 4),
        reasons=dict(reasons),
        duplicates=len(copies),
        samples=samples,
        shards=shards,
        raw_bytes=raw_bytes,
        shard_bytes=shard_bytes,
        core_hours=core_hours,
        cores=cores,
        hours=None if core_hours is None else core_hours / cores,
    )


@dataclass(frozen=True, slots=True)
class _Probed:
    """Some rows of a source as in its ledger."""

    rows: list[dict[str, Any]]
    total: int | None  #: rows there are
    exact: bool  #: whether that is counted
    seconds: float  #: CPU seconds that the rows took
    alone: int = 0  #: media that were looked at and no row names


def _probed(config: ShardStage, store: LocalStore, work: Path, sample: int | None) -> _Probed:
    if config.source.by_archive:
        return _probed_archive(config, store, work, sample)
    records = list(islice(read_records(config.source), min(MOST_READ, config.limit or MOST_READ)))
    exact = len(records) < MOST_READ
    total = len(records) if exact else _counted(config)
    if total is not None and config.limit is not None:
        total = min(total, config.limit)
    drawn = sorted(records, key=lambda record: derive_seed(config.seed, "dry run", record.row))[:sample]
    until, started, done = time.monotonic() + PROBING, _cpu(), 0
    while done < len(drawn) and (sample is not None or done == 0 or time.monotonic() < until):
        fetch_rows(store, "ledger", f"part-{done:05d}", drawn[done : done + AT_ONCE], config, work)
        done += AT_ONCE
    return _Probed(_rows(store), total, exact, _cpu() - started)


def _probed_archive(config: ShardStage, store: LocalStore, work: Path, sample: int | None) -> _Probed:
    """The same for media in archives: the first of the first archives."""
    archives, limit = archive_files(config.source), config.limit
    most = sample or AT_ONCE
    if config.source.embedded:
        most = min(most, limit or most)
    started, found = _cpu(), 0
    for number, archive in enumerate(archives):
        found += fetch_archive(store, "ledger", number, archive.uri, config, work, most=most - found).rows
        if found >= most:
            break
    spent = _cpu() - started
    if config.source.embedded:
        rows, is_all = _rows(store), found < most or found == limit
        return _Probed(rows, found if is_all else None, is_all, spent)
    media = Media(read_parts(store, "ledger"))
    keys = set(media.table["key"].to_pylist())
    records: list[Record] = []
    total = 0
    for record in read_records(config.source):
        total += 1
        if record.key in keys:
            records.append(record)
    media.claim(records)
    rows = media.join(records).to_pylist()
    return _Probed(rows, min(total, limit or total), True, spent, media.unclaimed().num_rows)


def _rows(store: LocalStore) -> list[dict[str, Any]]:
    return [row for part in read_parts(store, "ledger") for row in part.to_pylist()]


def _copies(rows: Sequence[dict[str, Any]], verdicts: Sequence[Verdict]) -> set[int]:
    """Places of the good rows whose bytes an earlier one has."""
    seen: set[str] = set()
    copies: set[int] = set()
    for place, (row, verdict) in enumerate(zip(rows, verdicts, strict=True)):
        if verdict.reason is None:
            if row["sha256"] in seen:
                copies.add(place)
            seen.add(row["sha256"])
    return copies


def _counted(config: ShardStage) -> int | None:
    """Rows of the tables, from the footers of Parquet files or the density of lines at the head of others."""
    import pyarrow.parquet as pq

    total = 0
    for file in table_files(config.source):
        if file.name.lower().endswith(".parquet"):
            with open_file(file.uri) as opened:
                total += pq.ParquetFile(opened).metadata.num_rows
            continue
        if file.name.lower().endswith((".gz", ".tgz", ".tar")):
            return None
        with open_file(file.uri) as opened:
            head = unpacked(opened).read(HEAD)
        total += round(head.count(b"\n") * file.size / max(1, len(head)))
    return total


def _built(
    slots: list[dict[str, object]], config: ShardStage, store: LocalStore, sample: int | None
) -> tuple[list[int], Counter[str], float]:
    """Bytes of some samples, rejects among them by reason, and the CPU seconds that they took."""
    decoder = shared_decoder(config.decode_seconds, config.fetch.max_pixels)
    sizes: list[int] = []
    lost: Counter[str] = Counter()
    until, started = time.monotonic() + BUILDING, _cpu()
    for number, slot in enumerate(slots):
        if number and sample is None and time.monotonic() > until:
            break
        try:
            sizes.append(sum(len(part) for part in sample_of(slot, config, store, decoder).parts))
        except MediaError as error:
            lost[str(error.reason)] += 1
    return sizes, lost, _cpu() - started


def _cpu() -> float:
    """CPU seconds of this process and, as far as it has ended, of its children; those of the decoder are added live."""
    import psutil

    own = psutil.Process()
    times = [own.cpu_times(), *(child.cpu_times() for child in own.children(recursive=True))]
    ended = os.times()
    return sum(spent.user + spent.system for spent in times) + ended.children_user + ended.children_system
