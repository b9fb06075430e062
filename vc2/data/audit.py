"""What a shard set is made of, down to the byte: which samples are damaged, and where any one of them comes from.

A tar is nothing but headers, members and the zeros between them. The index has the sha256 of each member and a header
its own checksum, so a single flipped byte is found wherever it is, and named by the shard, the sample and the part of
it. Everything is read a piece at a time.
"""

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vc2.artifacts import FileEntry, Manifest, shard_set_prefix
from vc2.data.cache import is_absolute, read_range
from vc2.data.foreign import FOREIGN
from vc2.data.ledger import part_names, read_part
from vc2.data.places import open_file
from vc2.data.shards import shard_name
from vc2.errors import ShardCorrupted, StoreError
from vc2.storage import Store, join_uri

__all__ = ["check_samples", "explain", "shard_table", "stored_table"]

BLOCK = tarfile.BLOCKSIZE
CHUNK = 8 * 2**20
PLACES = ("shard", "key", "ending", "json_offset", "json_length", "json_sha256", "offset", "length", "media_sha256")


@contextmanager
def stored_table(store: Store, key: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file of a set, by its key or absolute URI, to be read within the block.

    Raises:
        ShardCorrupted: If its bytes are no such table.
    """
    try:
        with open_file(_place(store, key)) as file:
            yield pq.ParquetFile(file)
    except (pa.ArrowException, UnicodeDecodeError, KeyError, OSError) as error:  # damage has many voices
        if isinstance(error, OSError) and error.errno is not None:
            raise
        words = (str(error).splitlines() or ["no reason is given"])[0]
        raise ShardCorrupted(
            f"{key.rpartition('/')[2]}: its bytes are no table that can be read ({words[:120]}); bring back {key} "
            "from a copy, or make the set once more (vc2 shard ... --force)"
        ) from None


# ---- damage ----


def check_samples(store: Store, manifest: Manifest, names: Collection[str] | None = None) -> Iterator[str]:
    """Read the tars of a shard set and say what is wrong with them, a line for each thing.

    Args:
        store: Where the set is.
        manifest: Of the set.
        names: Only these tars, such as those whose sha256 is not that of the manifest; default: all.
    """
    tars = {entry.name: entry for entry in manifest.files if entry.name.endswith(".tar")}
    try:
        for number, rows in _by_shard(store, manifest):
            entry = tars.pop(shard_name(number), None)
            if entry is None:
                yield f"index.parquet: names {shard_name(number)}, which the manifest does not have"
            elif names is None or entry.name in names:
                yield from _check_tar(store, entry, rows)
    except ShardCorrupted as error:  # without the index nothing is known of samples
        yield str(error)
        return
    for entry in tars.values():  # without a sample
        if names is None or entry.name in names:
            yield from _check_tar(store, entry, [])


def _by_shard(store: Store, manifest: Manifest) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Rows of the index, shard by shard."""
    waiting: list[dict[str, Any]] = []
    with stored_table(store, manifest.file("index.parquet").key) as index:
        for batch in index.iter_batches(4096, columns=list(PLACES), use_threads=False):
            for row in batch.to_pylist():
                if waiting and row["shard"] != waiting[0]["shard"]:
                    yield waiting[0]["shard"], waiting
                    waiting = []
                waiting.append(row)
    if waiting:
        yield waiting[0]["shard"], waiting


def _check_tar(store: Store, entry: FileEntry, rows: list[dict[str, Any]]) -> Iterator[str]:
    end = 0  # of what has been looked at
    try:
        for row in rows:
            for member, prefix in (("json", "json_"), (row["ending"], "")):
                offset, length = row[f"{prefix}offset"], row[f"{prefix}length"]
                if offset is None:
                    continue
                sample = f"{entry.name} sample {row['key']}"
                if problem := _header_problem(read_range(store, entry.key, offset - BLOCK, BLOCK), length):
                    yield f"{sample}: the header of its {member} at byte {offset - BLOCK} {problem}"
                expected = row["json_sha256" if prefix else "media_sha256"]
                if expected is not None and (found := _sha256(store, entry.key, offset, length)) != expected:
                    place = f"bytes {offset} to {offset + length}"
                    yield f"{sample}: its {member} ({place}) has sha256 {found[:12]}, the index says {expected[:12]}"
                end = -(-(offset + length) // BLOCK) * BLOCK
                if any(read_range(store, entry.key, offset + length, end - offset - length)):
                    yield f"{sample}: the zeros after its {member} at byte {offset + length} are none"
        if not is_absolute(entry.key):  # tars of others may have further members
            for place in range(end, entry.size, CHUNK):
                if any(read_range(store, entry.key, place, min(CHUNK, entry.size - place))):
                    yield f"{entry.name}: after its last sample, from byte {place} on, are others than zeros"
                    break
    except KeyError:
        yield f"{entry.name}: {entry.key} is gone"
    except ShardCorrupted as error:
        yield f"{entry.name}: {error}"


def _header_problem(block: bytes, length: int) -> str | None:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"is damaged ({error})"
    return None if header.size == length else f"says {header.size} bytes, the index {length}"


def _sha256(store: Store, key: str, offset: int, length: int) -> str:
    sha256 = hashlib.sha256()
    for place in range(offset, offset + length, CHUNK):
        sha256.update(read_range(store, key, place, min(CHUNK, offset + length - place)))
    return sha256.hexdigest()


# ---- shard by shard ----


def shard_table(store: Store, manifest: Manifest) -> list[dict[str, Any]]:
    """A line for each tar: `shard` (number), `generation`, `samples`, `rejected` (None where it is not known: the plan
    is gone), `bytes`, and `tar` (its key in the store, or its URI)."""
    samples = Counter[int]()
    with stored_table(store, manifest.file("index.parquet").key) as index:
        for batch in index.iter_batches(columns=["shard"], use_threads=False):
            samples.update(batch["shard"].to_pylist())
    generations = [range(said["first_shard"], said["next_shard"]) for said in manifest.facts.get("generations", [])]
    slots = _slots_of_shards(store, manifest, samples)
    lines = []
    for entry in manifest.files:
        if not entry.name.endswith(".tar"):
            continue
        number = int(entry.name.removeprefix("shard-").removesuffix(".tar"))
        rejected = slots[number] - samples[number] if number in slots else None
        generation = next((place for place, shards in enumerate(generations) if number in shards), 0)
        line = {"shard": number, "generation": generation, "samples": samples[number]}
        lines.append(line | {"rejected": rejected, "bytes": entry.size, "tar": entry.key})
    return lines


def _slots_of_shards(store: Store, manifest: Manifest, samples: Mapping[int, int]) -> dict[int, int]:
    """Samples and rejects of each shard: one row group of a plan is one shard; rejects of foreign tars name theirs."""
    if manifest.stage == FOREIGN:
        with stored_table(store, manifest.file("rejects.parquet").key) as table:
            rejects = table.read(columns=["locator"], use_threads=False)["locator"].to_pylist()
        lost = Counter(f"{(locator or '').partition('.tar/')[0]}.tar" for locator in rejects)
        tars = [entry.key for entry in manifest.files if entry.name.endswith(".tar")]
        return {number: samples.get(number, 0) + lost[key] for number, key in enumerate(tars)}
    slots: dict[int, int] = {}
    for generation in manifest.facts.get("generations", []):
        plan = f"{shard_set_prefix(manifest.facts['source'], generation['fingerprint'])}/plan.parquet"
        if store.entry(plan) is None:
            continue
        with stored_table(store, plan) as table:
            groups = table.metadata
            for group in range(groups.num_row_groups):
                slots[generation["first_shard"] + group] = groups.row_group(group).num_rows
    return slots


# ---- where it comes from ----


def explain(store: Store, manifest: Manifest, key: str) -> dict[str, Any]:
    """Everything known of one sample, from the row of its source to its bytes; or why a row has none.

    Args:
        store: Where the set is.
        manifest: Of the set.
        key: Of a sample or of a row of the source; or the path or URL by which the source names it.

    Returns:
        Of a sample: `key`, `source` (row and locator), `ledger` (what was fetched and found), `plan` (start, stride,
        frames, seed), `filters` (the limits it passed), `tar` (object, offsets, digests), `index` and `json`; parts
        that the set does not have are left out. Of a row of the source: `key`, its `samples` and its `rejects`.

    Raises:
        StoreError: If the set knows nothing of that key.
    """
    found = _lines(store, manifest, "index.parquet", "key", key)
    if found:
        return _explained(store, manifest, found[0])
    samples, rejects = [], []
    for of_index, of_rejects in (("source_key", "key"), ("locator", "locator")):
        if not samples and not rejects:
            samples = _lines(store, manifest, "index.parquet", of_index, key)
            rejects = _lines(store, manifest, "rejects.parquet", of_rejects, key)
    if not samples and not rejects:
        with stored_table(store, manifest.file("index.parquet").key) as index:
            batches = index.iter_batches(1, columns=["key"], use_threads=False)
            example = next((repr(batch["key"][0].as_py()) for batch in batches if batch.num_rows), "none, it is empty")
        raise StoreError(f"nothing in this set is called {key!r}; its keys look like {example} (see index.parquet)")
    return {"key": key, "samples": [line["key"] for line in samples], "rejects": rejects}


def _explained(store: Store, manifest: Manifest, row: dict[str, Any]) -> dict[str, Any]:
    tar = manifest.file(shard_name(row["shard"]))
    said: dict[str, Any] = {
        "key": row["key"],
        "source": {"name": manifest.facts.get("source")}
        | {name: row[name] for name in ("source_key", "row", "locator")},
        "tar": {"name": tar.name, "uri": _place(store, tar.key), "size": tar.size, "sha256": tar.sha256},
        "index": row,
    }
    generation = _generation(manifest, row["generation"])
    if (slot := _slot(store, manifest, generation, row)) is not None:
        said["plan"] = slot
    if (line := _ledger_line(store, generation.get("ledger", ""), manifest, row)) is not None:
        said["ledger"] = {name: value for name, value in line.items() if value is not None}
    if limits := {name: limit for name, limit in manifest.config.get("filters", {}).items() if limit not in (None, [])}:
        said["filters"] = limits
    if row["json_offset"] is not None:
        text = read_range(store, tar.key, row["json_offset"], row["json_length"])
        try:
            said["json"] = json.loads(text)
        except ValueError:
            said["json"] = f"damaged: {text[:80]!r}"
    return said


def _lines(store: Store, manifest: Manifest, name: str, column: str, value: str) -> list[dict[str, Any]]:
    """Lines of a table whose column has a value; a row group in memory at a time."""
    found: list[dict[str, Any]] = []
    with stored_table(store, manifest.file(name).key) as table:
        for group in range(table.num_row_groups):
            keys = table.read_row_group(group, columns=[column], use_threads=False)[column]
            places = pc.indices_nonzero(pc.fill_null(pc.equal(keys, value), False))  # type: ignore[attr-defined]
            if len(places):
                found += table.read_row_group(group, use_threads=False).take(places).to_pylist()
    return found


def _generation(manifest: Manifest, number: int | None) -> dict[str, Any]:
    known = manifest.facts.get("generations", [])
    return known[number] if number is not None and number < len(known) else {}


def _slot(
    store: Store, manifest: Manifest, generation: Mapping[str, Any], row: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The line of the plan that a sample was made by: one row group of the plan is one shard."""
    if not generation:
        return None
    key = f"{shard_set_prefix(manifest.facts['source'], generation['fingerprint'])}/plan.parquet"
    if store.entry(key) is None:
        return None
    with stored_table(store, key) as plan:
        group = row["shard"] - generation["first_shard"]
        slots = plan.read_row_group(group, use_threads=False).to_pylist() if group < plan.num_row_groups else []
    return next((s for s in slots if (s["key"], s["clip"]) == (row["source_key"], row["clip"])), None)


def _ledger_line(store: Store, prefix: str, manifest: Manifest, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was fetched and found of a row: first looked for where it stands if all rows have a line each."""
    if not prefix:
        return None
    names = part_names(store, prefix)
    likely = row["row"] // manifest.config.get("fetch", {}).get("part_rows", 1000)
    for name in chain(names[likely : likely + 1], names[:likely], names[likely + 1 :]):
        part = read_part(store, prefix, name)
        found = part.filter(pc.equal(part["key"], row["source_key"])).to_pylist()  # type: ignore[attr-defined]
        usable = [line for line in found if line["reason"] is None and line["sha256"] == row["sha256"]]
        if usable:
            return usable[0]
    return None


def _place(store: Store, key: str) -> str:
    return key if is_absolute(key) else join_uri(store.uri, key)
