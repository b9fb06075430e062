"""What a worker does for one shard: its slots of the plan become a tar and a line for each slot.

    shards/<source>/<fingerprint>/parts/shard-000123.<plan>.parquet   the lines (`shards.SLOTS`), in order of the slots
    objects/<sha256>                                                  the tar

A shard is finished when its lines are there; their name tells of which plan, so a listing is enough to see what is
left to do. What a shard holds depends on plan and ledger alone. A file that misses its deadline or kills the decoder is
entered among the verdicts of the set before the shard is committed, so that it is missing from every other shard too.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter

from vc2.artifacts import FileEntry, put_object
from vc2.data.config import ShardStage, Source, archive_uris
from vc2.data.decode import ClipJob, Decoder, Encoded, MediaError, shared_decoder
from vc2.data.fetch import raw_bytes, workplace
from vc2.data.filters import clip_unfit
from vc2.data.ledger import parquet_bytes, read_part
from vc2.data.places import read_span
from vc2.data.plan import read_slots, stored_parquet, url_of
from vc2.data.rejects import RejectReason
from vc2.data.shards import SLOTS, ShardSample, shard_name, write_shard
from vc2.errors import ShardCorrupted, SourceError
from vc2.storage import Store, file_digest, open_store

__all__ = [
    "build_shard",
    "finished_shards",
    "read_shard",
    "read_verdicts",
    "sample_of",
    "strip_shard",
    "write_verdict",
]


def part_key(prefix: str, shard: int, plan_sha256: str) -> str:
    """Where the lines of a shard lie."""
    return f"{prefix}/parts/{shard_name(shard).removesuffix('.tar')}.{plan_sha256[:16]}.parquet"


def finished_shards(store: Store, prefix: str, plan_sha256: str) -> dict[int, str]:
    """Shards of this very plan that are built: number -> key of their lines."""
    ending = f".{plan_sha256[:16]}.parquet"
    keys = (entry.key for entry in store.list(f"{prefix}/parts/shard-"))
    return {int(key.rpartition("/shard-")[2].partition(".")[0]): key for key in keys if key.endswith(ending)}


def read_shard(store: Store, key: str) -> tuple[pa.Table, FileEntry]:
    """Lines of a shard, and its tar, which is empty if no slot gave a sample."""
    folder, _, name = key.rpartition("/")
    table = read_part(store, folder, name.removesuffix(".parquet"))
    tar = FileEntry.model_validate_json(table.schema.metadata[b"tar"])
    return table.replace_schema_metadata(None), tar


def build_shard(item: Mapping[str, Any]) -> dict[str, Any]:
    """Build a shard and commit it.

    Args:
        item: `config`, `store`, `work`, `prefix`, `ledger` and `generation` of the set, `plan_sha256`, `shard`, and its
            place `group` among the shards of the plan.

    Returns:
        What it came to: samples, rejects by reason, bytes of the tar, seconds.
    """
    started = time.monotonic()
    config, store = ShardStage.model_validate_json(item["config"]), open_store(item["store"])
    if store.entry(part_key(item["prefix"], item["shard"], item["plan_sha256"])) is not None:
        return {"samples": 0, "reasons": {}, "bytes": 0, "seconds": 0.0}  # by another driver, meanwhile
    decoder = shared_decoder(config.decode_seconds, config.fetch.max_pixels)
    slots = read_slots(store, f"{item['prefix']}/plan.parquet", item["plan_sha256"], item["group"])
    spoiled = read_verdicts(store, item["prefix"], {slot["sha256"] for slot in slots})
    lines: list[dict[str, Any]] = []

    def samples() -> Iterator[ShardSample]:
        for result in _samples(slots, config, store, decoder, spoiled):
            line = _line(result.slot, config, item)
            if isinstance(result.made, MediaError):
                reason, detail = result.made.reason, result.made.detail
                if reason in (RejectReason.DECODE_TIMEOUT, RejectReason.DECODER_CRASHED):
                    write_verdict(store, item["prefix"], result.slot["sha256"], reason, detail)
                lines.append(line | {"reason": str(reason), "detail": detail})
                continue
            made = result.made
            lines.append(line | {"phash": made.phash, "motion": made.motion, "cuts": made.cuts})
            yield ShardSample(line["key"], made, _facts(result.slot, config))

    with workplace(Path(item["work"])) as folder:
        path = folder / "shard.tar"
        placed = {place["key"]: place for place in write_shard(path, samples())}
        tar = put_object(store, path, shard_name(item["shard"]))
    _write_lines(store, item, [line | placed.get(line["key"], {}) for line in lines], tar)
    return {
        "samples": len(placed),
        "reasons": Counter(line["reason"] for line in lines if "reason" in line),
        "bytes": tar.size,
        "seconds": time.monotonic() - started,
    }


def _write_lines(store: Store, item: Mapping[str, Any], lines: list[dict[str, Any]], tar: FileEntry) -> None:
    empty = {name: None for name in SLOTS.names}
    table = pa.Table.from_pylist([empty | line for line in lines], SLOTS)
    said = json.dumps(tar.model_dump(mode="json"), sort_keys=True)
    key = part_key(item["prefix"], item["shard"], item["plan_sha256"])
    store.write_if_absent(key, parquet_bytes(table.replace_schema_metadata({"tar": said})))


def write_verdict(store: Store, prefix: str, sha256: str, reason: RejectReason, detail: str) -> None:
    """Fix that a file is rejected from a set, before the shard that lacks it is committed."""
    said = json.dumps({"reason": str(reason), "detail": detail}).encode()
    store.write_if_absent(f"{prefix}/verdicts/{sha256}.json", said)


def read_verdicts(store: Store, prefix: str, sha256: Collection[str]) -> dict[str, tuple[RejectReason, str]]:
    """Verdicts on some files, by their sha256."""
    found = {}
    for entry in store.list(f"{prefix}/verdicts/"):
        name = entry.key.rpartition("/")[2].removesuffix(".json")
        if name in sha256:
            said = json.loads(store.read(entry.key))
            found[name] = RejectReason(said["reason"]), said["detail"]
    return found


@dataclass(frozen=True, slots=True)
class _Result:
    slot: dict[str, Any]
    made: Encoded | MediaError


def _samples(
    slots: list[dict[str, Any]],
    config: ShardStage,
    store: Store,
    decoder: Decoder,
    spoiled: Mapping[str, tuple[RejectReason, str]],
) -> Iterator[_Result]:
    for slot in slots:
        try:
            if slot["sha256"] in spoiled:
                raise MediaError(*spoiled[slot["sha256"]])
            yield _Result(slot, sample_of(slot, config, store, decoder))
        except MediaError as error:
            yield _Result(slot, error)


def sample_of(slot: Mapping[str, Any], config: ShardStage, store: Store, decoder: Decoder) -> Encoded:
    """The sample of a slot of the plan.

    Raises:
        MediaError: If there is none, and why.
    """
    source = _media(slot, config, store)
    found = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else file_digest(source).sha256
    if found != slot["sha256"]:
        raise MediaError(RejectReason.CHANGED, "not the bytes that were probed")
    if config.source.media == "image":
        made = decoder.picture(source, config.form)
    else:
        job = ClipJob(slot["indices"], slot["fps"])
        (made,) = decoder.clips(source, [job], slot, config.form, decoder=config.decoder)
    if (unfit := clip_unfit(made, config.filters)) is not None:
        raise MediaError(*unfit)
    return made


def _media(slot: Mapping[str, Any], config: ShardStage, store: Store) -> Path | bytes:
    """Where the bytes of a slot's source are, or they themselves."""
    blob = slot["blob"]
    try:
        if blob is None:
            return raw_bytes(config.source, slot["locator"])
        if "/" in blob:  # a tar of its own
            return read_span(_archive(config.source, blob), slot["offset"], slot["size"])
        return store.read_range(f"{slot['ledger']}/{blob}", slot["offset"], slot["size"])
    except (KeyError, SourceError, ShardCorrupted) as error:
        raise MediaError(RejectReason.CHANGED, str(error)[:200]) from None


def _archive(source: Source, uri: str) -> str:
    """Where an archive is now: it may have been moved since it was read."""
    known = _archives(source.model_dump_json())
    return uri if uri in known.values() else known.get(uri.rpartition("/")[2], uri)


@lru_cache(maxsize=4)
def _archives(source: str) -> dict[str, str]:
    return {uri.rpartition("/")[2]: uri for uri in archive_uris(TypeAdapter(Source).validate_json(source))}


def _line(slot: Mapping[str, Any], config: ShardStage, item: Mapping[str, Any]) -> dict[str, Any]:
    form = config.form
    key = slot["key"] if form.clips_per_video == 1 else f"{slot['key']}_{slot['clip']:02d}"
    same = {name: slot[name] for name in ("shard", "slot", "row", "clip", "locator", "caption", "fps", "sha256")}
    size = {"num_frames": form.num_frames, "width": form.width, "height": form.height, "url": url_of(slot)}
    return same | size | {"key": key, "source_key": slot["key"], "generation": item["generation"]}


def _facts(slot: Mapping[str, Any], config: ShardStage) -> dict[str, Any]:
    """What stands in the json beside the media."""
    form = config.form
    facts = {
        "source": config.source.name,
        "license": config.source.license,
        "num_frames": form.num_frames,
        "width": form.width,
        "height": form.height,
        **{name: slot[name] for name in ("row", "clip", "locator", "sha256", "caption")},
        "captions": json.loads(slot["captions"]),
        "extra": json.loads(slot["extra"]),
    }
    if config.source.media == "video":
        facts |= {name: slot[name] for name in ("fps", "start", "stride", "indices")} | {"source_fps": slot["rate"]}
    return facts


def lines_of(store: Store, index: str, shard: int) -> list[dict[str, Any]]:
    """Lines of one shard in an index, of which only the row groups that hold them are read."""
    file = stored_parquet(store, index)
    column = file.schema_arrow.get_field_index("shard")
    limits = [file.metadata.row_group(number).column(column).statistics for number in range(file.num_row_groups)]
    groups = [number for number, limit in enumerate(limits) if limit.min <= shard <= limit.max]
    table = file.read_row_groups(groups, use_threads=False)
    return table.filter(pc.equal(table["shard"], shard)).to_pylist()  # type: ignore[attr-defined]


def strip_shard(item: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a shard without some of its samples and commit the copy.

    Args:
        item: As for `build_shard`; `index`, the key of the index that the shard stands in; `tar`, its own; and
            `without`, the keys of the samples to leave out.
    """
    started = time.monotonic()
    store, without = open_store(item["store"]), frozenset(item["without"])
    kept = [line for line in lines_of(store, item["index"], item["shard"]) if line["key"] not in without]

    def samples() -> Iterator[ShardSample]:
        for line in kept:
            facts = json.loads(store.read_range(item["tar"], line["json_offset"], line["json_length"]))
            media = store.read_range(item["tar"], line["offset"], line["length"])
            ends = [sum(line["frame_bytes"][: number + 1]) for number in range(len(line["frame_bytes"]))]
            parts = tuple(media[end - size : end] for end, size in zip(ends, line["frame_bytes"], strict=True))
            encoded = Encoded(line["ending"], parts, tuple(line["phash"]), line["motion"], line["cuts"])
            yield ShardSample(line["key"], encoded, facts)

    with workplace(Path(item["work"])) as folder:
        path = folder / "shard.tar"
        placed = {place["key"]: place for place in write_shard(path, samples())}
        tar = put_object(store, path, shard_name(item["shard"]))
    _write_lines(store, item, [line | placed[line["key"]] for line in kept], tar)
    seconds = time.monotonic() - started
    return {"samples": len(kept), "reasons": {}, "bytes": tar.size, "seconds": seconds}
