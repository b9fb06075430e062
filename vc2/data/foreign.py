"""Tars that others wrote, taken as they are: video2dataset, img2dataset, anything with `<key>.mp4|.jpg|... ` and
`<key>.txt|.json` beside each other.

`adopt` reads each tar once from its start, in bounded memory, and writes down where every sample lies: a shard set
whose tars stay where they are. Nothing is copied or unpacked, so names like `../x` lead nowhere; what a member is, its
first bytes say; pickles and whatever else is no medium, text or JSON are passed over unread. Media are probed by the
guarded decoder, and what cannot be used has its reason in rejects.parquet:

    members in groups of one key, and members that belong to none = samples + rejects + exact duplicates

In training (`draw`, `Extractor`) clips are drawn by (seed, position) with the rule of `plan.draw_clips`, so each epoch
sees others, and pictures are fitted as `vc2 shard` fits them.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vc2.artifacts import FileEntry, Manifest, ShardSet, commit, find, fingerprint, put_file, shard_set_prefix
from vc2.config import digest
from vc2.data.accounts import REJECTS
from vc2.data.config import FetchConfig, SampleForm, archive_stem
from vc2.data.decode import ClipJob, Decoder, MediaError, sniff
from vc2.data.ledger import parquet_bytes, read_part
from vc2.data.places import RawFile, find_files, open_file, scheme_of
from vc2.data.plan import draw_clips
from vc2.data.rejects import RejectReason
from vc2.data.shards import SLOTS, decode_frames, shard_name
from vc2.data.tars import DAMAGE, files_of, open_tar
from vc2.errors import ShardCorrupted, SourceError
from vc2.launch import cpu_count
from vc2.progress import Progress, silent
from vc2.seeding import derive_seed
from vc2.storage import Store

__all__ = ["FOREIGN", "Extractor", "adopt", "draw"]

FOREIGN = "adopt"  # stage of such sets
VERSION = 1

Media = Literal["video", "image"]
ROWS = pa.schema([*SLOTS, ("facts", pa.string())])  # what a probe found, as JSON
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # <key>.<ending>: the key ends at the first dot of the file's name
TEXTS = ("txt", "json")
CAPTIONS = ("caption", "top_caption", "text", "TEXT")  # names in the json, where there is no .txt
MOST_TEXT = 2**20  # bytes of a .txt, a .json, or a header
CHUNK = 2**20


def adopt(
    uri: str,
    *,
    media: Media,
    form: SampleForm,
    name: str,
    store: Store,
    work: Path,
    license: str = "not stated",
    progress: Progress = silent,
) -> ShardSet:
    """Index tars of others on first use; find the index again afterwards.

    Args:
        uri: A tar, a folder of tars, or a range such as `s3://bucket/{00000..00099}.tar`.
        media: What their samples are.
        form: What a training sample shall be: clips are drawn and pictures fitted on the fly.
        name: Of the set.
        store: Where index and manifest go; the tars stay where they are.
        work: For temporary files.
        license: Of the media.
        progress: Told about tars.

    Raises:
        SourceError: If there are no tars, or none of their samples can be used.
        StoreError: If the store fails.
    """
    form = form.evolve(clips_per_video=1)
    tars = _tars(uri)
    config = {"source": name, "media": media, "form": form.identity()}
    made = fingerprint(FOREIGN, VERSION, config, {"tars": digest([[tar.uri, tar.size, tar.stamp] for tar in tars])})
    prefix = shard_set_prefix(name, made)
    if (done := find(store, prefix, ShardSet)) is not None:
        return done
    started = time.monotonic()
    with Extractor(FetchConfig().probe_seconds) as extractor, ThreadPoolExecutor(cpu_count()) as pool:

        def index(number: int) -> None:
            if store.entry(_part(prefix, number)) is None:
                _index_tar(tars[number], number, media, form, extractor, store, _part(prefix, number))

        for done_tars, _ in enumerate(pool.map(index, range(len(tars))), 1):
            progress(f"{name}: index", done_tars, len(tars))
    entries, counts, reasons = [], Counter[str](), Counter[str]()
    seen: dict[bytes, str] = {}
    rejects: list[dict[str, Any]] = []
    work.mkdir(parents=True, exist_ok=True)
    spool = work / f"index-{made[:16]}-{os.getpid()}.parquet"
    try:
        with pq.ParquetWriter(spool, ROWS, compression="zstd") as writer:
            for number in range(len(tars)):
                table = read_part(store, prefix, f"parts/{shard_name(number)}")
                said = json.loads(cast(Any, table.schema.metadata)[b"vc2"])
                entries.append(FileEntry.model_validate(said["tar"]))
                table = _without_duplicates(table.replace_schema_metadata(None), seen)
                kept = table.filter(pc.is_null(table["reason"]))  # type: ignore[attr-defined]
                writer.write_table(kept)
                lines = table.filter(pc.is_valid(table["reason"])).to_pylist()  # type: ignore[attr-defined]
                rejects += [_reject(line) for line in lines]
                counts += Counter(rows=len(table), samples=len(kept))
                if said["members"] != len(table):
                    raise AssertionError(f"{tars[number].uri}: {said['members']} groups, {len(table)} accounted for")
        what = Counter(line["what"] for line in rejects)
        reasons = Counter(line["reason"] for line in rejects if line["what"] == "row")
        if not counts["samples"]:
            top = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(3)) or "they are empty"
            raise SourceError(
                f"{uri}: {len(tars)} tars without a {media} that can be used: {top}; is it the other kind?"
            )
        manifest = Manifest(
            kind="shard_set",
            stage=FOREIGN,
            stage_version=VERSION,
            fingerprint=made,
            config=config | {"uri": uri, "form": form.model_dump(mode="json")},
            inputs={},
            files=(
                *entries,
                put_file(store, prefix, "index.parquet", spool.read_bytes()),
                put_file(store, prefix, "rejects.parquet", parquet_bytes(pa.Table.from_pylist(rejects, REJECTS))),
            ),
            counts={
                "rows": counts["rows"],
                "samples": counts["samples"],
                "rows_with_samples": counts["samples"],
                "rows_rejected": what["row"],
                "rows_duplicate": what["duplicate"],
                "shards": len(tars),
            },
            facts={"source": name, "media": media, "reasons": dict(sorted(reasons.items()))},
            licenses={name: license},
            seconds=round(time.monotonic() - started, 2),
        )
    finally:
        spool.unlink(missing_ok=True)
    return cast(ShardSet, commit(store, prefix, manifest))


def _part(prefix: str, number: int) -> str:
    return f"{prefix}/parts/{shard_name(number)}.parquet"


def _tars(uri: str) -> list[RawFile]:
    if uri.startswith("pipe:"):
        raise SourceError(f"{uri}: commands are not run; give a local path or s3://bucket/prefix")
    if scheme_of(uri) in ("http", "https"):
        raise SourceError(f"{uri}: tars are read again in each epoch, by ranges; copy them to a disk or a bucket first")
    found = find_files(uri, (".tar",), "tars")
    if packed := [tar.uri for tar in found if not tar.name.lower().endswith(".tar")]:
        raise SourceError(f"{packed[0]} is no plain .tar: a sample in it has no place; unpack it, or use `vc2 shard`")
    stems: dict[str, str] = {}
    for tar in found:
        if (other := stems.setdefault(archive_stem(tar.name), tar.uri)) != tar.uri:
            raise SourceError(f"{other} and {tar.uri} have the same name, which makes the keys of their samples")
    return found


def _reject(line: Mapping[str, Any]) -> dict[str, Any]:
    what = "duplicate" if line["reason"] == RejectReason.DUPLICATE else "row"
    kept = {name: line[name] for name in ("row", "key", "locator", "reason", "detail", "duplicate_of")}
    return kept | {"what": what, "clip": None}


def _without_duplicates(table: pa.Table, seen: dict[bytes, str]) -> pa.Table:
    """The table with a reason for rows whose media an earlier row has."""
    places = {}
    columns = (table[name].to_pylist() for name in ("key", "sha256", "reason"))
    for place, (key, sha256, reason) in enumerate(zip(*columns, strict=True)):
        if reason is None and (first := seen.setdefault(bytes.fromhex(sha256)[:16], key)) != key:
            places[place] = first
    if not places:
        return table
    for name, value in (("reason", str(RejectReason.DUPLICATE)), ("duplicate_of", None)):
        values = table[name].to_pylist()
        for place, first in places.items():
            values[place] = value or first
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
    return table


# ---- one tar ----


@dataclass(slots=True)
class _Group:
    """Members of one key that follow each other."""

    key: str
    texts: dict[str, tuple[int, bytes]] = field(default_factory=dict)  # ending -> offset and content
    medium: dict[str, Any] | None = None  # offset, length, ending, locator, data
    others: list[str] = field(default_factory=list)  # endings of what is neither
    too_large: int = 0  # bytes of a member that is not read


def _index_tar(
    tar: RawFile, number: int, media: Media, form: SampleForm, extractor: "Extractor", store: Store, key: str
) -> None:
    """Write the rows of a tar, samples and rejects, as a part."""
    rows: list[dict[str, Any]] = []
    stem, seen = archive_stem(tar.name), set[str]()
    with open_file(tar.uri) as opened:
        forward = _Forward(opened)
        for item in _groups(forward, media):
            row = {name: None for name in ROWS.names}
            row |= {"generation": 0, "shard": number, "slot": len(rows), "row": len(rows), "clip": 0}
            if isinstance(item, _Group):
                row |= {"key": _text(f"{stem}/{item.key}"), "locator": _text(f"{tar.uri}/{item.key}")}
                again = item.key in seen
                seen.add(item.key)
                row |= _reason(RejectReason.DUPLICATE_KEY) if again else _sample(item, media, form, extractor)
            else:
                row |= {"key": "", "locator": _text(f"{tar.uri}/{item.name}"), **_reason(item.reason, item.detail)}
            row["source_key"] = row["key"]
            rows.append(row)
        forward.seek(tar.size)
    entry = FileEntry(name=shard_name(number), key=tar.uri, size=forward.tell(), sha256=forward.sha256.hexdigest())
    table = pa.Table.from_pylist(rows, ROWS)
    said = {"tar": entry.model_dump(mode="json"), "members": len(rows)}
    store.write_if_absent(key, parquet_bytes(table.replace_schema_metadata({"vc2": json.dumps(said, sort_keys=True)})))


def _sample(group: _Group, media: Media, form: SampleForm, extractor: "Extractor") -> dict[str, Any]:
    """What is known of a sample, or the reason why it is none."""
    medium = group.medium
    if medium is None:
        if group.too_large:
            return _reason(RejectReason.TOO_LARGE, f"{group.too_large} bytes")
        if group.others:
            return _reason(RejectReason.NOT_MEDIA, f"no {media} by their first bytes: .{', .'.join(group.others[:4])}")
        return _reason(RejectReason.MISSING_FILE, f"no {media} beside .{', .'.join(group.texts) or 'nothing'}")
    data: bytes = medium.pop("data")
    found = {**medium, "frame_bytes": [len(data)], "sha256": hashlib.sha256(data).hexdigest()}
    found["media_sha256"] = found["sha256"]
    if "json" in group.texts:
        offset, text = group.texts["json"]
        place = {"json_offset": offset, "json_length": len(text), "json_sha256": hashlib.sha256(text).hexdigest()}
        found |= place
    caption = _caption(group.texts)
    if not caption:
        return found | _reason(RejectReason.NO_CAPTION)
    try:
        facts = extractor.probe(media, data)
    except MediaError as error:
        return found | _reason(error.reason, error.detail)
    known = {"frames": facts.frames, "rate": facts.rate, "rotation": facts.rotation, "aspect": facts.aspect}
    text = json.dumps(known | {"times": facts.times, "width": facts.width, "height": facts.height})
    fps = 0
    if media == "video":
        clips = draw_clips(json.loads(text) | {"key": group.key}, form, 0)
        if not clips:
            return found | _reason(RejectReason.TOO_SHORT, f"{facts.frames} frames")
        fps = clips[0]["fps"]  # an example: each position draws its own
    size = {"num_frames": form.num_frames, "width": form.width, "height": form.height}
    return found | size | {"caption": _text(caption), "fps": fps, "facts": text}


def _caption(texts: Mapping[str, tuple[int, bytes]]) -> str:
    if "txt" in texts and (caption := texts["txt"][1].decode("utf-8", "replace").strip()):
        return caption
    try:
        said = json.loads(texts["json"][1])
    except (KeyError, ValueError, RecursionError):
        return ""
    found = (said.get(name) for name in CAPTIONS) if isinstance(said, dict) else ()
    return next((text.strip() for text in found if isinstance(text, str) and text.strip()), "")


def _reason(reason: RejectReason, detail: str = "") -> dict[str, str]:
    return {"reason": str(reason), "detail": detail}


def _text(name: str) -> str:
    """Names in tars need not be text."""
    return name.encode("utf-8", "replace").decode()


@dataclass(frozen=True, slots=True)
class _Alone:
    """A member that belongs to no sample."""

    name: str
    reason: RejectReason
    detail: str


def _groups(forward: "_Forward", media: Media) -> Iterator["_Group | _Alone"]:
    """Samples in the order of the tar, a sample at a time in memory; where it is damaged it ends, and says so."""
    group: _Group | None = None
    try:
        for member in files_of(open_tar(cast(BinaryIO, forward))):
            parts = NAME.fullmatch(member.name)
            if not member.isreg() or member.issparse() or parts is None:
                what = "no plain file" if parts else "no ending"
                yield _Alone(member.name, RejectReason.NOT_MEDIA, f"{what}; not part of a sample")
                continue
            if group is None or group.key != parts[1]:
                if group is not None:
                    yield group
                group = _Group(parts[1])
            _take(member, parts[2].lower(), group, forward, media)
    except DAMAGE as error:
        if group is not None:
            yield group
        yield _Alone("(end of the tar)", RejectReason.TRUNCATED, f"{error} at {forward.tell()}; what follows is lost")
        return
    if group is not None:
        yield group


def _take(member: tarfile.TarInfo, ending: str, group: _Group, forward: "_Forward", media: Media) -> None:
    """Read a member into its group, if it is of use."""
    if ending in TEXTS:
        if member.size <= MOST_TEXT:
            group.texts[ending] = member.offset_data, forward.take(member.size)
        return
    if group.medium is not None:
        return
    if member.size > FetchConfig().max_bytes:
        group.too_large = member.size
        return
    head = forward.take(min(32, member.size))
    if sniff(head) != media:
        group.others.append(ending)
        return
    data = head + forward.take(member.size - len(head))
    group.medium = {"offset": member.offset_data, "length": member.size, "ending": ending, "data": data}


class _Forward:
    """A file that is read once from its start and hashed on the way; headers that claim to be huge are refused."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._place = file, 0
        self.sha256 = hashlib.sha256()

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self._place:
            raise tarfile.ReadError("a header that leads back")
        while self._place < offset and self._taken(min(CHUNK, offset - self._place)):
            pass
        return self._place

    def read(self, size: int) -> bytes:
        if size > MOST_TEXT:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._taken(size)

    def take(self, size: int) -> bytes:
        """Exactly so many bytes."""
        data = self._taken(size)
        if len(data) < size:
            raise EOFError("the file ends")
        return data

    def _taken(self, size: int) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        self._place += len(data)
        return data


# ---- in training ----


def draw(key: str, facts: str, form: SampleForm, seed: int, position: int) -> dict[str, Any]:
    """The clip that a position takes out of a video: `indices` and `fps`, and what the decoder must know.

    Args:
        key: Of the sample.
        facts: JSON of what the probe found.
        form: What a sample is.
        seed: Of the run.
        position: Of the sample, global.
    """
    known = json.loads(facts)
    clip = draw_clips(known | {"key": key}, form, derive_seed(seed, "clip of a tar", position))[0]
    return {name: clip[name] for name in ("start", "stride", "fps", "indices")} | known


class Extractor:
    """Pictures out of media of strangers, by guarded decoders: one for each thread that asks."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._own, self._all = seconds, threading.local(), list[Decoder]()

    def probe(self, media: Media, data: bytes) -> Any:
        """Facts of a medium. Raises `MediaError` if it cannot be used."""
        return self._decoder().probe(media, data)

    def frames(self, data: bytes, media: Media, form: SampleForm, clip: Mapping[str, Any] | None) -> np.ndarray:
        """Frames of a sample, (T, H, W, 3) uint8.

        Raises:
            ShardCorrupted: If the medium cannot be decoded.
        """
        try:
            if media == "image":
                found = self._decoder().picture(data, form)
            else:
                assert clip is not None
                job = ClipJob(clip["indices"], clip["fps"])
                found = self._decoder().clips(data, [job], clip, form, decoder="decord")[0]
        except MediaError as error:
            raise ShardCorrupted(str(error)) from None
        return decode_frames(b"".join(found.parts), [len(part) for part in found.parts], found.ending)

    def close(self) -> None:
        """End the child processes."""
        for decoder in self._all:
            decoder.close()

    def __enter__(self) -> "Extractor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decoder(self) -> Decoder:
        if not hasattr(self._own, "decoder"):
            self._own.decoder = Decoder(self._seconds)
            self._all.append(self._own.decoder)
        return self._own.decoder
