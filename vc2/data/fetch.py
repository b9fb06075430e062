"""Fetch and probe: bytes are brought in, checked before they are believed, and entered in the ledger with a reason if
they fail.

Rows of tables name their media one by one, by URL (see `web`) or as files of their own. Archives are read once, from
start to end; nothing in them is unpacked under its own name, and what a medium is, its bytes tell. Members of plain
tars stay where they are; those of compressed ones, and what came over the network, lie in the blob of the part.

Nothing about the outcome depends on the order in which answers arrive: rows are written in their own order, bytes
packed likewise. Hashing goes along with reading; while one file is probed, others are on their way.
"""

import asyncio
import errno
import hashlib
import os
import platform
import re
import shutil
import tarfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any, BinaryIO

from vc2.data.config import ShardStage, Source, WebVidSource
from vc2.data.decode import Decoder, MediaError, shared_decoder, sniff
from vc2.data.ledger import row_of, write_part
from vc2.data.places import is_url, local_path, open_file, s3_place, scheme_of, shown
from vc2.data.rejects import RejectReason
from vc2.data.sources import LARGEST_SIDECAR, Record, Seen, media_key, safe_name, sample_key, tar_record
from vc2.data.tars import DAMAGE, files_of, open_tar
from vc2.errors import StoreError
from vc2.storage import Store, file_digest

__all__ = ["Counts", "fetch_archive", "fetch_rows", "raw_bytes", "workplace"]

HEAD = 32  # bytes that tell what a file is
IN_MEMORY = 8 * 2**20  # bytes of a member that are held in memory; a larger one goes to a file
WAITING = 2 * 2**30  # bytes of files that may wait for those of earlier rows
AHEAD = 8  # members that are read while one is probed
PAGE_DIR = re.compile(r"\d+_\d+")  # a folder of WebVid
READERS = 4  # threads that read files of a local tree or a bucket
NEVER_MEDIA = frozenset(  # endings of members that are not even looked at: code in disguise, sound
    {"pyd", "pickle", "pkl", "pth", "pt", "m4a", "mp3", "wav", "flac", "aac", "ogg", "opus"}
)


@dataclass(frozen=True, slots=True)
class Counts:
    """What one call brought in."""

    rows: int
    bytes: int  #: of media, usable or not
    reasons: Mapping[str, int]  #: rows by reason; usable ones are not among them

    def __add__(self, other: "Counts") -> "Counts":
        reasons = Counter(self.reasons) + Counter(other.reasons)
        return Counts(self.rows + other.rows, self.bytes + other.bytes, dict(reasons))


@contextmanager
def workplace(work: Path) -> Iterator[Path]:
    """A temporary folder below `work` that goes away at the end; those of killed processes go with it.

    Raises:
        StoreError: If the disk is full.
    """
    root = work / "tmp"
    root.mkdir(parents=True, exist_ok=True)
    host = platform.node()  # the folder may be shared: whether a process of another machine lives cannot be told
    for old in root.glob(f"{host}-data-*-*"):
        if not _is_alive(int(old.name.split("-")[-2])):
            shutil.rmtree(old, ignore_errors=True)
    folder = root / f"{host}-data-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(f"{root}: no space left for temporary files; free some or choose another --work") from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _counts(rows: list[dict[str, Any]]) -> Counts:
    reasons = Counter(row["reason"] for row in rows if row["reason"] is not None)
    return Counts(len(rows), sum(row["size"] or 0 for row in rows), dict(reasons))


# ---- rows of tables ----


def fetch_rows(store: Store, prefix: str, name: str, records: list[Record], config: ShardStage, work: Path) -> Counts:
    """Fetch and probe some rows of the tables and commit them as a part of the ledger.

    Args:
        store: Where.
        prefix: Folder of the ledger.
        name: Of the part.
        records: The rows; those that have a reason already keep it.
        config: The stage.
        work: For temporary files.
    """
    decoder = shared_decoder(config.fetch.probe_seconds, config.fetch.max_pixels)
    with workplace(work) as folder:
        blob = folder / "blob"
        with open(blob, "wb") as packed:
            rows = asyncio.run(_Part(config, folder, packed, decoder).fetch(records))
        write_part(store, prefix, name, rows, blob)
    return _counts(rows)


@dataclass(frozen=True, slots=True)
class _Arrived:
    """A file that is here, whole."""

    path: Path
    size: int
    sha256: str


class _Part:
    """The rows of a part on their way. Files arrive side by side, one child probes them, and they are packed in the
    order of their rows."""

    def __init__(self, config: ShardStage, folder: Path, packed: BinaryIO, decoder: Decoder) -> None:
        self.config, self.folder, self.packed, self.decoder = config, folder, packed, decoder
        self.rows: list[dict[str, Any]] = []
        self.waiting: deque[tuple[Record, asyncio.Task[dict[str, Any]]]] = deque()  # in order, to be packed
        self.busy: set[asyncio.Task[dict[str, Any]]] = set()
        self.here = 0  # bytes that wait for an earlier row

    async def fetch(self, records: list[Record]) -> list[dict[str, Any]]:
        """The rows of the ledger."""
        from vc2.data.web import Web

        with ThreadPoolExecutor(1) as self.probing, ThreadPoolExecutor(READERS) as self.reading:
            async with Web(self.config.fetch) as self.web:
                try:
                    for record in records:
                        await self._start(record)
                    while self.waiting:
                        await asyncio.wait([self.waiting[0][1]])
                        self._pack()
                finally:
                    left = [task for _, task in self.waiting]
                    for task in left:
                        task.cancel()
                    await asyncio.gather(*left, return_exceptions=True)
        return self.rows

    async def _start(self, record: Record) -> None:
        while self.busy and (len(self.busy) >= 8 * self.config.fetch.concurrency or self.here > WAITING):
            await asyncio.wait(self.busy, return_when=asyncio.FIRST_COMPLETED)
            self._pack()
        task = asyncio.create_task(self._row(record))
        self.waiting.append((record, task))
        self.busy.add(task)
        task.add_done_callback(self.busy.discard)

    async def _row(self, record: Record) -> dict[str, Any]:
        """What was found for a row, or why it is of no use. A good file that is to be packed is left in its place."""
        if record.reason is not None:
            return {}
        path = self.folder / str(record.row)
        loop = asyncio.get_running_loop()
        try:
            if is_url(record.locator):
                body = await self.web.download(record.locator, path, seed=record.key)
                file = _Arrived(path, body.size, body.sha256)
            else:
                file = await loop.run_in_executor(self.reading, _bring, self.config, record.locator, path)
            _check_promise(record, file)
            found = await loop.run_in_executor(self.probing, _probed, self.decoder, self.config.source.media, file)
        except MediaError as error:
            found: dict[str, Any] = {"reason": str(error.reason), "detail": error.detail}
        if found["reason"] is None and is_url(record.locator):
            self.here += found["size"]
        else:
            path.unlink(missing_ok=True)
        return found

    def _pack(self) -> None:
        """Take over the rows that are finished, as far as all before them are."""
        while self.waiting and self.waiting[0][1].done():
            record, task = self.waiting.popleft()
            row = row_of(record, **task.result())
            path = self.folder / str(record.row)
            if row["reason"] is None and path.exists():
                row["offset"] = self.packed.tell()
                self.here -= row["size"]
                _append(path, self.packed)
            self.rows.append(row)


def _append(path: Path, packed: BinaryIO) -> None:
    with open(path, "rb") as file:
        shutil.copyfileobj(file, packed, 2**20)
    path.unlink()


def _bring(config: ShardStage, locator: str, path: Path) -> _Arrived:
    """A file of the source's own, hashed; one in a bucket is copied to `path`.

    Raises:
        MediaError: If it is not there, or too large.
        StoreError: If the bucket cannot be read: no fault of the row.
    """
    place = _place(config.source, locator)
    if isinstance(place, Path):
        return _Arrived(place, *_digest(place, config))
    store, key = s3_place(place)
    try:
        if (entry := store.entry(key)) is None:
            raise MediaError(RejectReason.MISSING_FILE, "no such object below the source's folder")
        if entry.size > config.fetch.max_bytes:
            raise MediaError(RejectReason.TOO_LARGE, f"{entry.size} bytes")
        found = store.download(key, path)
    except KeyError:
        raise MediaError(RejectReason.MISSING_FILE, "no such object below the source's folder") from None
    return _Arrived(path, found.size, found.sha256)


def _digest(path: Path, config: ShardStage) -> tuple[int, str]:
    try:
        if (size := path.stat().st_size) > config.fetch.max_bytes:
            raise MediaError(RejectReason.TOO_LARGE, f"{size} bytes")
        found = file_digest(path)
    except OSError as error:
        raise MediaError(RejectReason.MISSING_FILE, error.strerror or "unreadable") from None
    return found.size, found.sha256


def _check_promise(record: Record, file: _Arrived) -> None:
    """Compare a file with the hash that its row gives, if it gives one."""
    for name in ("sha256", "md5"):
        if (promised := record.extra.get(name)) is None:
            continue
        found = file.sha256 if name == "sha256" else _md5(file.path)
        if found != promised:
            raise MediaError(RejectReason.HASH_MISMATCH, f"{name} {found[:12]}, its row says {str(promised)[:12]}")


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _probed(decoder: Decoder, media: Any, file: "_Arrived | _Sample") -> dict[str, Any]:
    """What a probe finds out about a file, as columns of the ledger."""
    found = {"sha256": file.sha256, "size": file.size, "reason": None, "detail": ""}
    source = file.path if isinstance(file, _Arrived) else file.body
    try:
        return found | decoder.probe(media, source).as_dict()
    except MediaError as error:
        return found | {"reason": str(error.reason), "detail": error.detail}


# ---- files of their own ----


def raw_bytes(source: Source, locator: str) -> Path | bytes:
    """The medium that a locator names: a local file, or what lies in the bucket.

    Raises:
        MediaError: If there is none.
    """
    place = _place(source, locator)
    if isinstance(place, Path):
        return place
    store, key = s3_place(place)
    try:
        return store.read(key)
    except KeyError:
        raise MediaError(RejectReason.MISSING_FILE, "no such object below the source's folder") from None


def _place(source: Source, locator: str) -> Path | str:
    """Where the file of a locator lies: a local path, or its URI in a bucket."""
    folder = source.videos if isinstance(source, WebVidSource) else getattr(source, "folder", None)
    if folder is None:
        raise MediaError(RejectReason.MISSING_FILE, "no URL, and the source has no folder")
    if scheme_of(folder) == "s3":
        return f"{folder.rstrip('/')}/{locator}"
    root = local_path(folder)
    if (path := root / locator).is_file():
        return path
    if isinstance(source, WebVidSource) and not (root / locator).parent.is_dir():
        for part in _parts(root):
            if (path := part / locator).is_file():
                return path
    raise MediaError(RejectReason.MISSING_FILE, "no such file below the source's folder")


@lru_cache(maxsize=8)
def _parts(root: Path) -> list[Path]:
    """Folders of the one more level that some copies of WebVid have: <part>/<page_dir>/<videoid>.mp4."""
    try:
        folders = [entry.path for entry in os.scandir(root) if entry.is_dir()]
    except OSError:
        return []
    return [Path(folder) for folder in sorted(folders) if not PAGE_DIR.fullmatch(Path(folder).name)]


# ---- archives ----


@dataclass(frozen=True, slots=True)
class _Sample:
    """A medium of an archive, with what its row says, or why it is of no use."""

    record: Record
    body: Path | bytes = b""
    size: int = 0
    sha256: str = ""
    offset: int = 0  # in the archive as it is when unpacked


_Row = tuple[int, str, Callable[[], _Sample]]  # its place in the archive, its key, and the reading of it


def fetch_archive(
    store: Store,
    prefix: str,
    number: int,
    uri: str,
    config: ShardStage,
    work: Path,
    *,
    first: int = 0,
    wanted: frozenset[str] | None = None,
    most: int | None = None,
) -> Counts:
    """Read an archive once from its start, probe its members and commit them in parts, `part-NNNNNN-MMMMM`.

    Args:
        store: Where.
        prefix: Folder of the ledger.
        number: Place of the archive among the archives.
        uri: The archive: local, s3:// or http(s)://.
        config: The stage. Of an `embedded` source a row is a sample with its captions; of another a member of the
            archive, with key and facts only.
        work: For temporary files.
        first: Parts of this archive that are there already.
        wanted: Keys of the only rows to look at.
        most: Rows after which to stop.

    Raises:
        SourceError: If the archive cannot be opened. One that is damaged gives the rows before the damage, and a last
            one that says so.
    """
    size = config.fetch.part_rows
    decoder = shared_decoder(config.fetch.probe_seconds, config.fetch.max_pixels)
    counts = Counts(0, 0, {})
    with workplace(work) as folder, open_file(uri, folder) as file, ThreadPoolExecutor(1) as probing:
        archive = _Archive(uri, file, config, folder, wanted, skip=first * size)
        samples = _probed_samples(islice(archive.samples(), most), config, decoder, probing)
        waiting, part = next(samples, None), first
        while True:
            blob, some = folder / "blob", []
            with open(blob, "wb") as packed:
                while waiting is not None and len(some) < size:
                    some.append(_placed(*waiting, archive, packed))
                    waiting = next(samples, None)
            write_part(store, prefix, f"part-{number:06d}-{part:05d}", some, blob, last=waiting is None)
            counts += _counts(some)
            if waiting is None:
                return counts
            part += 1


def _probed_samples(
    samples: Iterator[_Sample], config: ShardStage, decoder: Decoder, probing: ThreadPoolExecutor
) -> Iterator[tuple[_Sample, dict[str, Any]]]:
    """Samples with what was found, in order; some are read ahead while one is probed."""

    def probe(sample: _Sample) -> dict[str, Any]:
        if sample.record.reason is not None:
            return {}
        return _probed(decoder, config.source.media, sample)

    ahead: deque[tuple[_Sample, Future[dict[str, Any]]]] = deque()
    for sample in samples:
        ahead.append((sample, probing.submit(probe, sample)))
        if len(ahead) >= AHEAD:
            yield ahead[0][0], ahead.popleft()[1].result()
    for sample, found in ahead:
        yield sample, found.result()


def _placed(sample: _Sample, found: dict[str, Any], archive: "_Archive", packed: BinaryIO) -> dict[str, Any]:
    """The row of a sample, once its bytes have a place."""
    row = row_of(sample.record, **found)
    if row["reason"] is None and archive.is_plain:
        row |= {"blob": archive.uri, "offset": sample.offset}
    elif row["reason"] is None:
        row["offset"] = packed.tell()
        if isinstance(sample.body, bytes):
            packed.write(sample.body)
        else:
            _append(sample.body, packed)
    _drop(sample)
    return row


class _Archive:
    """An archive of media, read from its start; of rows that are not wanted, or among the first `skip`, no bytes."""

    def __init__(
        self, uri: str, file: BinaryIO, config: ShardStage, folder: Path, wanted: frozenset[str] | None, *, skip: int
    ) -> None:
        self.file, self.config, self.folder, self.wanted, self.skip = file, config, folder, wanted, skip
        self.uri = uri if scheme_of(uri) else str(local_path(uri))
        self.name = uri.rpartition("/")[2]
        head = file.read(HEAD)
        file.seek(0)
        self.is_packed = head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00"))
        self.is_plain = not self.is_packed and scheme_of(uri) in (
            "",
            "s3",
        )  #: whether members can be read where they lie
        self.asked = 0  # rows that are wanted, so far
        self.damage: str | None = None

    def samples(self) -> Iterator[_Sample]:
        """The wanted rows, in the order of the archive."""
        source, done = self.config.source, 0
        try:
            with open_tar(self.file, is_packed=self.is_packed) as self.tar:
                for row, key, read in self._samples(source) if source.embedded else self._members():
                    if self._takes(key):
                        yield read()
                    done = row + 1
        except DAMAGE as error:
            self.damage = str(error) or type(error).__name__
        if self.damage is not None and self._takes(""):
            place = f"{self.name}/(end of archive)"
            yield _Sample(Record(done, "", place, reason=RejectReason.TRUNCATED, detail=self.damage[:200]))

    def _takes(self, key: str) -> bool:
        if self.wanted is not None and key not in self.wanted:
            return False
        self.asked += 1
        return self.asked > self.skip

    def _files(self) -> Iterator[tarfile.TarInfo]:
        """Files that are not hidden. Damage between them ends the archive; what came before counts."""
        try:
            for member in files_of(self.tar):
                if not member.name.rpartition("/")[2].startswith("."):
                    yield member
        except DAMAGE as error:
            self.damage = str(error) or type(error).__name__

    def _members(self) -> Iterator[_Row]:
        """A row for each file: the pictures of JourneyDB."""
        for row, member in enumerate(self._files()):
            key = media_key(member.name) or ""
            record = Record(row, key, f"{self.name}/{shown(member.name)}")
            yield row, key, partial(self._picture, record, member)

    def _picture(self, record: Record, member: tarfile.TarInfo) -> _Sample:
        if (problem := self._problem(member)) is not None:
            return _Sample(replace(record, reason=problem[0], detail=problem[1]))
        return self._read(record, member)

    def _samples(self, source: Any) -> Iterator[_Row]:
        """A row for each sample of a webdataset tar: neighbouring members with the same name up to the first dot."""
        names = Seen()
        for row, (name, members) in enumerate(groupby(self._files(), lambda member: _split(member.name)[0])):
            is_new = names.add(name)
            yield row, sample_key(self.name, name), partial(self._sample, source, row, name, members, is_new)

    def _sample(self, source: Any, row: int, name: str, members: Iterator[tarfile.TarInfo], is_new: bool) -> _Sample:
        bare = Record(row, sample_key(self.name, name), f"{self.name}/{shown(name)}")
        if not is_new:
            return _Sample(
                replace(bare, reason=RejectReason.DUPLICATE_KEY, detail="an earlier sample has the same key")
            )
        medium: _Sample | None = None
        place, problem, beside = name, None, {}
        for member in members:
            ending = _split(member.name)[1].lower()
            kind = ending.rpartition(".")[2]
            if kind in NEVER_MEDIA:
                continue
            if (found := self._problem(member)) is not None:
                problem = problem or found
            elif kind in ("txt", "json"):
                if ending == kind or kind not in beside:
                    beside[kind] = self._content(member).read(LARGEST_SIDECAR)
            elif medium is None:
                one = self._read(bare, member)
                if (said := sniff(_head(one.body))) == source.media:
                    medium, place = one, member.name
                else:
                    _drop(one)
                    found = f".{shown(ending)}: {said or 'no known medium'}, expected {source.media}"
                    problem = problem or (RejectReason.NOT_MEDIA, found)
        if medium is None:
            reason, detail = problem or (RejectReason.MISSING_FILE, f"no {source.media} in the sample")
            return _Sample(replace(bare, reason=reason, detail=detail))
        text, line = beside.get("txt"), beside.get("json")
        return replace(medium, record=tar_record(source, row, self.name, name, place, text, line))

    def _problem(self, member: tarfile.TarInfo) -> tuple[RejectReason, str] | None:
        """Why a member is not even read."""
        if not safe_name(member.name):
            return RejectReason.UNPARSABLE, "the name of a member leads out of its folder"
        if not member.isreg() or member.issparse():
            return RejectReason.UNPARSABLE, "a member that is no plain file but a link, a device or full of holes"
        if member.size > self.config.fetch.max_bytes:
            return RejectReason.TOO_LARGE, f"{member.size} bytes"
        return None

    def _content(self, member: tarfile.TarInfo) -> IO[bytes]:
        content = self.tar.extractfile(member)
        assert content is not None  # of a plain file there is one
        return content

    def _read(self, record: Record, member: tarfile.TarInfo) -> _Sample:
        content, sha256 = self._content(member), hashlib.sha256()
        body: Path | bytes
        if member.size <= IN_MEMORY:
            body = content.read()
            sha256.update(body)
        else:
            body = self.folder / f"member-{member.offset_data}"
            with open(body, "wb") as file:
                while chunk := content.read(IN_MEMORY):
                    sha256.update(chunk)
                    file.write(chunk)
        return _Sample(record, body, member.size, sha256.hexdigest(), member.offset_data)


def _split(name: str) -> tuple[str, str]:
    """Key and ending of a member: the name up to the first dot of its last part, and what comes after."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending


def _head(body: Path | bytes) -> bytes:
    if isinstance(body, bytes):
        return body[:HEAD]
    with open(body, "rb") as file:
        return file.read(HEAD)


def _drop(sample: _Sample) -> None:
    if isinstance(sample.body, Path):
        sample.body.unlink(missing_ok=True)
