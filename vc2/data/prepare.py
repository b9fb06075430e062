"""From a source to a shard set: fetch and probe, plan, build, commit. The one place in this package that knows Ray.

Work is spread as *parts* of the ledger and then as *shards* of the plan, one Ray Data row each; what travels is a
small description, and a worker reads and writes the store by itself. Each part and each shard is committed on its
own, so a kill costs those in work and no more, and what a shard holds depends on ledger and plan alone: same bytes
for any number of workers and after any kill.

    shards/<source>/<fingerprint>/plan.parquet                what goes where
    shards/<source>/<fingerprint>/parts/shard-000123.parquet  a shard is finished: its slots, and its tar among the
    objects shards/<source>/<fingerprint>/index.parquet               a row per sample
    shards/<source>/<fingerprint>/rejects.parquet             a row per thing left out, with its reason
    shards/<source>/<fingerprint>/manifest.json               the set is finished

Accounting, asserted for every set: every row of the source has exactly one fate, so

    rows = rows with at least one sample + rows rejected, by reason + rows with the bytes of an earlier row

A row all of whose clips fail is rejected with the reason of its first clip; clips lost of a row that keeps others are
counted apart (`clips_rejected`), as are media that no row names (`media_unmatched`).
"""

import hashlib
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vc2 import errors
from vc2.artifacts import FileEntry, Manifest, ShardSet, commit, find, put_file, put_object, shard_set_prefix
from vc2.data import ledger as ledgers
from vc2.data.config import (
    STAGE,
    STAGE_VERSION,
    JourneyDBSource,
    ShardStage,
    archive_files,
    ledger_prefix,
    source_digest,
)
from vc2.data.decode import Decoder, MediaError, shared_decoder
from vc2.data.fetch import fetch_archive, fetch_rows, local_file, workplace
from vc2.data.ledger import parquet_bytes
from vc2.data.plan import make_plan, read_slots
from vc2.data.rejects import RejectReason
from vc2.data.shards import SLOTS, ShardSample, shard_name, write_shard
from vc2.data.sources import Record, read_records
from vc2.errors import Vc2Error, YieldTooLow
from vc2.launch import ray_session
from vc2.progress import Progress, silent
from vc2.storage import Store, file_digest, open_store

__all__ = ["REJECTS", "prepare"]

EARLY_ROWS = 1000  # rows after which a hopeless source is given up
WINDOW = 256  # pieces of work described to Ray at a time

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


def prepare(
    config: ShardStage, store: Store, work: Path, *, fingerprint: str, repeat: int = 0, progress: Progress = silent
) -> ShardSet:
    """Make the shard set of a source, or find it, or finish it.

    Args:
        config: The source and the form of its samples.
        store: Where ledger and shards go; workers reach it by its URI.
        work: Folder for temporary files, on every machine.
        fingerprint: Name of the set (`artifacts.fingerprint` with `source_digest` as input).
        repeat: Raised to fetch and build once more.
        progress: Told about parts and shards.

    Raises:
        SourceError: If the source as a whole cannot be read.
        YieldTooLow: If too few of its rows become samples.
        StoreError: If the store fails.
    """
    prefix = shard_set_prefix(config.source.name, fingerprint)
    if (done := find(store, prefix, ShardSet)) is not None:
        return done
    started = time.monotonic()
    ledger = ledger_prefix(config, repeat)
    stage = _Stage(config, store, work, prefix, ledger, progress)
    with ray_session():
        stage.fetch()
        fetched = time.monotonic()
        table, unmatched = ledgers.collect(store, ledger, config)
        plan, verdicts = make_plan(table, config.form, config.seed, config.samples_per_shard)
        _check_yield(config, verdicts, f"{table.num_rows} rows")
        slots, tars = stage.build(plan)
    built = time.monotonic()
    index = slots.filter(pc.is_null(slots["reason"]))  # type: ignore[attr-defined]
    rejects, counts = _accounts(verdicts, slots, unmatched)
    fates = Counter(rejects.filter(pc.equal(rejects["what"], "row"))["reason"].to_pylist())  # type: ignore[attr-defined]
    _require_yield(config, counts, fates, rejects)
    manifest = Manifest(
        kind="shard_set",
        stage=STAGE,
        stage_version=STAGE_VERSION,
        fingerprint=fingerprint,
        repeat=repeat,
        config=config.model_dump(mode="json"),
        inputs={},
        files=(
            *tars,
            put_file(store, prefix, "plan.parquet", _plan_bytes(plan, config)),
            put_file(store, prefix, "index.parquet", parquet_bytes(index)),
            put_file(store, prefix, "rejects.parquet", parquet_bytes(rejects)),
        ),
        counts=counts | {"shards": len(tars)},
        facts={
            "source": config.source.name,
            "source_digest": source_digest(config.source),
            "ledger": ledger,
            "media": config.source.media,
            "reasons": dict(sorted(fates.items())),
            "fps_histogram": _histogram(index) if config.source.media == "video" else {},
            "seconds": {"fetch": round(fetched - started, 2), "build": round(built - fetched, 2)},
        },
        licenses={config.source.name: config.source.license},
        seconds=round(time.monotonic() - started, 2),
    )
    return cast(ShardSet, commit(store, prefix, manifest))


class _Stage:
    """What the driver and all pieces of work of one stage share."""

    def __init__(
        self, config: ShardStage, store: Store, work: Path, prefix: str, ledger: str, progress: Progress
    ) -> None:
        self.config, self.store, self.prefix, self.ledger, self.progress = config, store, prefix, ledger, progress
        self.common = {
            "config": config.model_dump_json(),
            "store": store.uri,
            "work": str(work),
            "ledger": ledger,
            "prefix": prefix,
        }

    # ---- the ledger ----

    def fetch(self) -> None:
        """Complete the ledger; gives up after the first rows if they are hopeless."""
        self.done_rows = 0
        pieces = self._archive_pieces() if isinstance(self.config.source, JourneyDBSource) else self._row_pieces()
        early = 1 if isinstance(self.config.source, JourneyDBSource) else -(-EARLY_ROWS // self.config.fetch.part_rows)
        self._fetch_window(list(islice(pieces, early)))
        self._check_early(early)
        while window := list(islice(pieces, WINDOW)):
            self._fetch_window(window)
        self.progress(f"{self.config.source.name}: fetch", self.done_rows, self.done_rows)

    def _row_pieces(self) -> Iterator[dict[str, Any]]:
        """A piece for each slice of the tables; None in place of `records` where its part is there already."""
        present = set(ledgers.part_names(self.store, self.ledger))
        records, number = read_records(self.config.source), 0
        while slice_ := list(islice(records, self.config.fetch.part_rows)):
            name = f"part-{number:05d}"
            yield {
                "name": name,
                "rows": len(slice_),
                "records": None if name in present else [asdict(record) for record in slice_],
            }
            number += 1

    def _archive_pieces(self) -> Iterator[dict[str, Any]]:
        present = ledgers.part_names(self.store, self.ledger)
        for number, path in enumerate(archive_files(cast(JourneyDBSource, self.config.source))):
            own = [name for name in present if name.startswith(f"part-{number:03d}-")]
            finished = bool(own) and ledgers.is_last(self.store, self.ledger, own[-1])
            yield {"archive": None if finished else str(path), "number": number, "first": len(own), "rows": 1}

    def _fetch_window(self, pieces: list[dict[str, Any]]) -> None:
        missing = [piece for piece in pieces if piece.get("records", piece.get("archive")) is not None]
        self.done_rows += sum(piece["rows"] for piece in pieces) - sum(piece["rows"] for piece in missing)
        for said in _spread(_fetch_piece, [self.common | piece for piece in missing], self.config.workers):
            self.done_rows += said["rows"]
            self.progress(f"{self.config.source.name}: fetch", self.done_rows)

    def _check_early(self, pieces: int) -> None:
        names = ledgers.part_names(self.store, self.ledger)
        if not isinstance(self.config.source, JourneyDBSource):
            table, unmatched = ledgers.collect(self.store, self.ledger, self.config, names[:pieces])
        else:
            names = [name for name in names if name.startswith("part-000-")]
            table, unmatched = ledgers.collect(self.store, self.ledger, self.config, names)
            # Rows of the other archives are not missing yet; media of this one that no row names do count.
            here = pc.not_equal(pc.fill_null(table["reason"], ""), str(RejectReason.UNMATCHED_ROW))  # type: ignore[attr-defined]
            table = table.filter(here)
        _, verdicts = make_plan(table, self.config.form, self.config.seed, self.config.samples_per_shard)
        extra = unmatched.select(["row", "key", "locator", "reason", "detail"]).append_column(
            "duplicate_of", pa.nulls(len(unmatched), pa.string())
        )
        _check_yield(self.config, pa.concat_tables([verdicts, extra.cast(verdicts.schema)]), "the first rows")

    # ---- the shards ----

    def build(self, plan: pa.Table) -> tuple[pa.Table, list[FileEntry]]:
        """Build the shards that are not there; returns all slots in order and the entries of the tars."""
        text = _plan_bytes(plan, self.config)
        plan_sha256 = hashlib.sha256(text).hexdigest()
        put_file(self.store, self.prefix, "plan.parquet", text)
        total = (plan["shard"][-1].as_py() + 1) if plan.num_rows else 0
        finished = self._finished(plan_sha256)
        missing = [number for number in range(total) if number not in finished]
        items = (self.common | {"shard": number, "plan_sha256": plan_sha256} for number in missing)
        label, done, samples = f"{self.config.source.name}: shards", total - len(missing), 0
        self.progress(label, done, total)
        while window := list(islice(items, WINDOW)):
            for said in _spread(_build_piece, window, self.config.workers):
                done, samples = done + 1, samples + said["samples"]
                self.progress(label, done, total, samples=samples, rejected=said["rejected"])
        finished = self._finished(plan_sha256)
        slots = pa.concat_tables([finished[number][0] for number in range(total)]) if total else SLOTS.empty_table()
        return slots, [entry for number in range(total) if (entry := finished[number][1]) is not None]

    def _finished(self, plan_sha256: str) -> dict[int, tuple[pa.Table, FileEntry | None]]:
        """Shards of this very plan that are committed."""
        found = {}
        for entry in self.store.list(f"{self.prefix}/parts/shard-"):
            table = pq.read_table(io.BytesIO(self.store.read(entry.key)), use_threads=False)
            said = json.loads(table.schema.metadata[b"vc2"])
            if said["plan_sha256"] == plan_sha256:
                tar = FileEntry.model_validate(said["tar"]) if said["tar"] else None
                found[said["shard"]] = table.replace_schema_metadata(None), tar
        return found


# ---- work that is spread ----


def _spread(
    work: Callable[[dict[str, Any]], dict[str, Any]], items: list[dict[str, Any]], workers: int | None
) -> Iterator[dict[str, Any]]:
    """Do `work` for each item somewhere on the cluster, an item at a time; results as they come."""
    if not items:
        return
    import ray.data
    from ray.data import DataContext, TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    described = [{"work": work.__name__, "item": json.dumps(item)} for item in items]
    rows = ray.data.from_items(described, override_num_blocks=len(described))
    for row in rows.map(_do, num_cpus=1, compute=TaskPoolStrategy(size=workers)).iter_rows():
        said = json.loads(row["said"])
        if "error" in said:
            raise getattr(errors, said["error"], Vc2Error)(said["message"])
        yield said


def _do(row: dict[str, str]) -> dict[str, str]:
    """On a worker. Errors that are meant for the user travel as text: Ray would bury them in its own."""
    try:
        said = {"_fetch_piece": _fetch_piece, "_build_piece": _build_piece}[row["work"]](json.loads(row["item"]))
    except Vc2Error as error:
        said = {"error": type(error).__name__, "message": str(error)}
    return {"said": json.dumps(said)}


def _fetch_piece(item: dict[str, Any]) -> dict[str, Any]:
    config, store = ShardStage.model_validate_json(item["config"]), open_store(item["store"])
    work = Path(item["work"])
    if "archive" in item:
        fetch_archive(store, item["ledger"], item["number"], Path(item["archive"]), config, work, first=item["first"])
    else:
        records = [
            Record(**{**said, "reason": said["reason"] and RejectReason(said["reason"])}) for said in item["records"]
        ]
        fetch_rows(store, item["ledger"], item["name"], records, config, work)
    return {"rows": item["rows"]}


def _build_piece(item: dict[str, Any]) -> dict[str, Any]:
    config, store = ShardStage.model_validate_json(item["config"]), open_store(item["store"])
    decoder = shared_decoder(config.decode_seconds, config.fetch.max_pixels)
    slots = read_slots(store, f"{item['prefix']}/plan.parquet", item["plan_sha256"], item["shard"])
    rejected_files = ledgers.read_verdicts(store, item["ledger"])
    lines: list[dict[str, Any]] = []

    def samples() -> Iterator[ShardSample]:
        for slot in slots:
            line = _slot_line(slot, config)
            try:
                if slot["sha256"] in rejected_files:
                    raise MediaError(*rejected_files[slot["sha256"]])
                sample = _sample(slot, line["key"], config, store, item["ledger"], decoder)
            except MediaError as error:
                if error.reason in (RejectReason.DECODE_TIMEOUT, RejectReason.DECODER_CRASHED):
                    ledgers.write_verdict(store, item["ledger"], slot["sha256"], error.reason, error.detail)
                lines.append(line | {"reason": str(error.reason), "detail": error.detail})
                continue
            lines.append(line)
            yield sample

    with workplace(Path(item["work"])) as folder:
        path = folder / "shard.tar"
        placed = {place["key"]: place for place in write_shard(path, samples())}
        tar = put_object(store, path, shard_name(item["shard"])) if placed else None
    said = {"shard": item["shard"], "plan_sha256": item["plan_sha256"], "tar": tar and tar.model_dump(mode="json")}
    empty = {name: None for name in SLOTS.names}
    table = pa.Table.from_pylist([empty | line | placed.get(line["key"], {}) for line in lines], SLOTS)
    table = table.replace_schema_metadata({"vc2": json.dumps(said, sort_keys=True)})
    store.write(
        f"{item['prefix']}/parts/{shard_name(item['shard']).removesuffix('.tar')}.parquet", parquet_bytes(table)
    )
    return {"samples": len(placed), "rejected": len(lines) - len(placed)}


def _slot_line(slot: dict[str, Any], config: ShardStage) -> dict[str, Any]:
    form = config.form
    key = slot["key"] if form.clips_per_video == 1 else f"{slot['key']}_{slot['clip']:02d}"
    same = {name: slot[name] for name in ("shard", "slot", "row", "clip", "locator", "caption", "fps", "sha256")}
    size = {"num_frames": form.num_frames, "width": form.width, "height": form.height}
    return same | size | {"key": key, "source_key": slot["key"]}


def _sample(
    slot: dict[str, Any], key: str, config: ShardStage, store: Store, ledger: str, decoder: Decoder
) -> ShardSample:
    form = config.form
    source: Path | bytes
    if slot["blob"] is not None:
        source = store.read_range(f"{ledger}/{slot['blob']}", slot["offset"], slot["size"])
        found = hashlib.sha256(source).hexdigest()
    else:
        source = local_file(config.source, slot["locator"])
        found = file_digest(source).sha256
    if found != slot["sha256"]:
        raise MediaError(RejectReason.CHANGED, "not the bytes that were probed")
    size = {"width": form.width, "height": form.height}
    if config.source.media == "image":
        frames = decoder.picture(source, **size)
    else:
        frames = decoder.clips(source, [slot["indices"]], slot, **size, decoder=config.decoder)[0]
    facts = {
        "source": config.source.name,
        "license": config.source.license,
        "num_frames": form.num_frames,
        **size,
        **{name: slot[name] for name in ("row", "clip", "locator", "sha256", "caption")},
        "captions": json.loads(slot["captions"]),
        "extra": json.loads(slot["extra"]),
    }
    if config.source.media == "video":
        facts |= {name: slot[name] for name in ("fps", "start", "stride", "indices")} | {"source_fps": slot["rate"]}
    return ShardSample.of(key, frames, facts, quality=config.jpeg_quality)


# ---- accounts ----


def _accounts(verdicts: pa.Table, slots: pa.Table, unmatched: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """The rejects table and the counts of a set.

    Raises:
        AssertionError: If a row has no fate, or two: a defect of this package.
    """
    lost: dict[int, list[dict[str, Any]]] = {}
    kept: set[int] = set()
    for line in slots.select(["row", "clip", "source_key", "locator", "reason", "detail"]).to_pylist():
        if line["reason"] is None:
            kept.add(line["row"])
        else:
            lost.setdefault(line["row"], []).append(line | {"key": line["source_key"]})
    rejects: list[dict[str, Any]] = []
    for verdict in verdicts.to_pylist():
        if verdict["reason"] is not None:
            duplicate = verdict["reason"] == RejectReason.DUPLICATE
            rejects.append(verdict | {"what": "duplicate" if duplicate else "row"})
            continue
        failed = sorted(lost.get(verdict["row"], ()), key=lambda line: line["clip"])
        if verdict["row"] not in kept and failed:
            rejects.append(failed[0] | {"what": "row", "clip": None})
        else:
            rejects += [line | {"what": "clip"} for line in failed]
    rejects += [line | {"what": "media"} for line in unmatched.to_pylist()]
    what = Counter(line["what"] for line in rejects)
    counts = {
        "rows": verdicts.num_rows,
        "rows_with_samples": len(kept),
        "rows_rejected": what["row"],
        "rows_duplicate": what["duplicate"],
        "samples": slots["reason"].null_count,
        "clips_planned": slots.num_rows,
        "clips_rejected": what["clip"],
        "media_unmatched": what["media"],
    }
    if counts["rows"] != counts["rows_with_samples"] + counts["rows_rejected"] + counts["rows_duplicate"]:
        raise AssertionError(f"a row without a fate, or with two: {counts}")
    empty = {name: None for name in REJECTS.names}
    table = pa.Table.from_pylist([{name: (empty | line)[name] for name in REJECTS.names} for line in rejects], REJECTS)
    return table, counts


def _check_yield(config: ShardStage, verdicts: pa.Table, where: str) -> None:
    reasons = Counter(reason for reason in verdicts["reason"].to_pylist() if reason is not None)
    duplicates = reasons.pop(str(RejectReason.DUPLICATE), 0)
    rejected = sum(reasons.values())
    example = next((line for line in verdicts.to_pylist() if line["reason"] in reasons), None)
    _require(config, verdicts.num_rows - duplicates - rejected, verdicts.num_rows - duplicates, reasons, example, where)


def _require_yield(config: ShardStage, counts: dict[str, int], reasons: Counter[str], rejects: pa.Table) -> None:
    example = next((line for line in rejects.to_pylist() if line["what"] == "row"), None)
    rows = counts["rows"] - counts["rows_duplicate"]
    _require(config, counts["rows_with_samples"], rows, reasons, example, f"{counts['rows']} rows")


def _require(
    config: ShardStage, good: int, rows: int, reasons: Counter[str], example: dict[str, Any] | None, where: str
) -> None:
    source = config.source
    if good > 0 and good >= source.min_yield * rows:
        return
    top = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(3))
    shown = ""
    if example is not None:
        said = ": ".join(part for part in (example["reason"], example["detail"]) if part)
        shown = f"; for example row {example['row']} ({example['locator'] or example['key'] or 'no key'}) {said}"
    share = 100 * good / rows if rows else 0
    raise YieldTooLow(
        f"source {source.name}: only {good} of {rows} rows ({share:.0f} %) in {where} can become samples, "
        f"{100 * source.min_yield:.0f} % expected: {top}{shown}. "
        "Check the paths and addresses of the source, or lower its min_yield"
    )


def _plan_bytes(plan: pa.Table, config: ShardStage) -> bytes:
    return parquet_bytes(plan, rows_per_group=config.samples_per_shard)


def _histogram(index: pa.Table) -> dict[str, int]:
    return {str(fps): count for fps, count in sorted(Counter(index["fps"].to_pylist()).items())}
