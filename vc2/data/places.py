"""Raw data wherever it lies: one way to list, open and read files at local paths, `s3://bucket/key` and `http(s)://`.

    /data/x.csv   ~/x.csv   x.csv            one file
    /data/x   s3://bucket/x                  a folder, whose files are taken in order of their names
    .../part-{00000..00127}.parquet          a range of numbers; over http(s) the only way to name several files

A place is named by whoever starts the run, so its host may be one of the network we run in. Where that host sends us
on to is checked as the address of any stranger (see `web`).
"""

import errno
import gzip
import hashlib
import io
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from vc2.errors import ShardCorrupted, SourceError, StoreError
from vc2.storage import S3Store, Store, file_digest, open_store

__all__ = [
    "RawFile",
    "digest_of",
    "find_files",
    "find_tree",
    "is_url",
    "local_path",
    "open_file",
    "open_text",
    "read_file",
    "read_span",
    "s3_place",
    "scheme_of",
    "shown",
    "unpacked",
]

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_OF_A_RANGE = 1_000_000
READ_AHEAD = 8 * 2**20  # bytes of a remote file that are fetched at a time
T = TypeVar("T")
SETTLED = 2.0  # seconds after which a file that changes has another time stamp


@dataclass(frozen=True, slots=True)
class RawFile:
    """A file of a source."""

    uri: str  #: absolute local path, s3:// or http(s)://
    name: str  #: below the folder that was asked for, else its own name; `/` between parts
    size: int  #: bytes
    stamp: str  #: changes with the content: time of the last change, ETag


def is_url(text: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def scheme_of(place: str) -> str:
    """`""` of a local path, `s3`, `http` or `https`.

    Raises:
        SourceError: If it is none of these.
    """
    if not is_url(place) or place.startswith("file://"):
        return ""
    scheme = place.partition("://")[0].lower()
    if scheme not in ("s3", "http", "https"):
        raise SourceError(f"{place}: unknown scheme {scheme!r}; expected a local path, s3:// or http(s)://")
    return scheme


def local_path(place: str) -> Path:
    """The absolute path of a local place; `~` and relative paths work."""
    return Path(os.path.abspath(Path(place.removeprefix("file://")).expanduser()))


def shown(name: str) -> str:
    """The name of a file or member as text that any table can hold, whatever its bytes are."""
    return name.removeprefix("./").encode(errors="backslashreplace").decode()


def s3_place(uri: str) -> tuple[Store, str]:
    """The bucket as a store, and the key in it."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    if not bucket:
        raise SourceError(f"{uri}: no bucket; expected s3://bucket/key")
    return _bucket(bucket, os.environ.get("AWS_ENDPOINT_URL")), key


@cache
def _bucket(bucket: str, endpoint: str | None) -> S3Store:  # another endpoint is another store
    return cast(S3Store, open_store(f"s3://{bucket}"))


# ---- what is there ----


def find_files(place: str, endings: tuple[str, ...], role: str) -> list[RawFile]:
    """The files that a place names: itself, those of a range, or those of a folder with one of the endings, by name.

    Args:
        place: A file, a folder or a range.
        endings: In lower case, such as `.csv`; asked of files in a folder only.
        role: What errors call it, such as `source webvid: table`.

    Raises:
        SourceError: If there is none, or one of a range is missing.
    """
    if RANGE.search(place):
        names = list(_expanded(place))
        found = _stat_all(names)
        if missing := [name for name, file in zip(names, found, strict=True) if file is None]:
            raise SourceError(
                f"{role}: {len(missing)} of {len(names)} files of {place} are missing, first {missing[0]}"
            )
        return [file for file in found if file is not None]
    if (file := _stat_all([place])[0]) is not None:
        return [file]
    if scheme_of(place) in ("http", "https"):
        raise SourceError(f"{role} {place} does not exist; name a file, or several by a range such as {{000..127}}")
    inside, folder_is_there = _inside(place)
    if not folder_is_there:
        raise SourceError(f"{role} {place} does not exist; give a file or a folder ({' '.join(endings)})")
    found = [file for file in inside if file.name.lower().endswith(endings)]
    if not found:
        raise SourceError(f"{role} {place} holds no file ending in {' or '.join(endings)}")
    return sorted(found, key=lambda file: file.name)


def find_tree(place: str, role: str) -> list[RawFile]:
    """All files below a local or S3 folder, in order of their names; hidden files and folders are left out. A link that
    leads nowhere is an empty file; one to a folder is not followed.

    Raises:
        SourceError: If there is no such folder, or nothing in it.
    """
    scheme = scheme_of(place)
    if scheme in ("http", "https"):
        raise SourceError(f"{role} {place}: folders cannot be listed over http; give a table that names the files")
    if scheme == "s3":
        found = list(_listed(place))
    else:
        root = local_path(place)
        if not root.is_dir():
            raise SourceError(f"{role} {place} is not a folder; check the path")
        found = [
            _local(path, path.relative_to(root).as_posix()) if path.exists() else _nowhere(path, root)
            for path in root.rglob("*")
            if path.is_file() or (path.is_symlink() and not path.exists())
        ]
    found = [file for file in found if not any(part.startswith(".") for part in file.name.split("/"))]
    if not found:
        raise SourceError(f"{role}: no file below {place}; check the path")
    return sorted(found, key=lambda file: file.name)


def _expanded(place: str) -> Iterator[str]:
    if (found := RANGE.search(place)) is None:
        yield place
        return
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + MOST_OF_A_RANGE:
        raise SourceError(f"{place}: a range goes up, by less than {MOST_OF_A_RANGE}")
    for number in range(first, last + 1):
        yield from _expanded(f"{place[: found.start()]}{number:0{len(found[1])}d}{place[found.end() :]}")


def _stat_all(places: list[str]) -> list[RawFile | None]:
    if scheme_of(places[0]) in ("http", "https"):
        from vc2.data.web import facts_of_places

        return [
            facts and RawFile(place, _last_name(place), facts.size, facts.stamp)
            for place, facts in zip(places, facts_of_places(places), strict=True)
        ]
    return [_stat(place) for place in places]


def _stat(place: str) -> RawFile | None:
    if scheme_of(place) == "s3":
        store, key = s3_place(place)
        entry = _asked(place, lambda: store.entry(key)) if key and not key.endswith("/") else None
        return entry and RawFile(place, _last_name(place), entry.size, entry.etag)
    path = local_path(place)
    return _local(path, path.name) if path.is_file() else None


def _local(path: Path, name: str) -> RawFile:
    facts = path.stat()
    return RawFile(str(path), name, facts.st_size, str(facts.st_mtime_ns))


def _nowhere(path: Path, root: Path) -> RawFile:
    """A link to nothing."""
    return RawFile(str(path), path.relative_to(root).as_posix(), 0, str(path.lstat().st_mtime_ns))


def _inside(place: str) -> tuple[list[RawFile], bool]:
    """Files right in a folder, and whether there is such a folder."""
    if scheme_of(place) == "s3":
        found = [file for file in _listed(place) if "/" not in file.name]
        return found, bool(found)
    root = local_path(place)
    if not root.is_dir():
        return [], False
    return [_local(entry, entry.name) for entry in root.iterdir() if entry.is_file()], True


def _listed(place: str) -> Iterator[RawFile]:
    store, key = s3_place(place)
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    for entry in _asked(place, lambda: list(store.list(prefix))):
        if not entry.key.endswith("/"):
            yield RawFile(f"{store.uri}/{entry.key}", entry.key[len(prefix) :], entry.size, entry.etag)


def _last_name(place: str) -> str:
    return urlsplit(place).path.rstrip("/").rpartition("/")[2] or "file"


def _asked(place: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except KeyError:
        raise SourceError(f"{place}: no such object; check the path") from None
    except StoreError as error:
        raise SourceError(str(error)) from None


# ---- what is in it ----


def open_file(uri: str, work: Path | None = None) -> BinaryIO:
    """Open a file for reading and seeking, in bounded memory. Remote files are read by ranges; one whose server does
    not know ranges is copied to a temporary file first.

    Args:
        uri: As of `RawFile`; also a relative path.
        work: Where a temporary file goes.

    Raises:
        SourceError: If it cannot be opened, and later, if reading fails for good.
    """
    scheme = scheme_of(uri)
    if scheme == "s3":
        store, key = s3_place(uri)
        if (entry := _asked(uri, lambda: store.entry(key))) is None:
            raise SourceError(f"{uri}: no such object; check the path")
        return _buffered(_Ranges(entry.size, lambda offset, size: _asked_range(uri, store, key, offset, size)))
    if scheme:
        from vc2.data.web import PlaceReader

        place = PlaceReader(uri)
        if place.ranged:
            return _buffered(_Ranges(place.size, place.read))
        copy = tempfile.NamedTemporaryFile(dir=work)  # noqa: SIM115  (closed by the caller, and gone with it)
        place.copy(Path(copy.name))
        return cast(BinaryIO, copy)
    try:
        return open(local_path(uri), "rb")
    except OSError as error:
        raise SourceError(f"{uri}: {_why(error)}") from None


def open_text(uri: str, *, encoding: str = "utf-8-sig", newline: str | None = None) -> io.TextIOWrapper:
    """Open a text file, packed by gzip or not; bytes that are no text are replaced."""
    file = unpacked(open_file(uri))
    return io.TextIOWrapper(file, encoding, errors="replace", newline=newline)


def unpacked(file: BinaryIO) -> BinaryIO:
    """The content of a file, which may be packed by gzip whatever its name says."""
    is_packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return cast(BinaryIO, _Unpacked(file)) if is_packed else file


class _Unpacked(gzip.GzipFile):
    """Closes the file below, too."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(fileobj=file)
        self._below = file

    def close(self) -> None:
        super().close()
        self._below.close()


def read_file(uri: str, most: int) -> bytes:
    """The whole of a small file.

    Raises:
        SourceError: If it cannot be read, or has more than `most` bytes.
    """
    with open_file(uri) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise SourceError(f"{uri}: more than {most} bytes; too much for what it should be")
    return data


def read_span(uri: str, offset: int, size: int) -> bytes:
    """`size` bytes of a local file or an S3 object, from `offset`.

    Raises:
        SourceError: If it cannot be read, or ends before.
    """
    if scheme_of(uri) == "s3":
        store, key = s3_place(uri)
        return _asked_range(uri, store, key, offset, size)
    with open_file(uri) as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise SourceError(f"{uri}: {len(data)} bytes at {offset}, expected {size}; it is not the file that was fetched")
    return data


def digest_of(file: RawFile, cache: Path | None = None) -> str:
    """What stands for the content of a file in fingerprints: sha256 of a local file; of others size and ETag or, over
    http(s), the time of the last change; sha256 where a server tells neither.

    Args:
        file: As `find_files` gives it.
        cache: Folder where digests of large files are kept, so that a file that has not changed is not read again.
    """
    if scheme_of(file.uri):
        if file.stamp:
            return f"{file.size} {file.stamp}"
        with open_file(file.uri) as opened:
            return hashlib.file_digest(cast(Any, opened), "sha256").hexdigest()
    if file.size == 0 and not Path(file.uri).exists():  # a link of `find_tree` that leads nowhere
        return "missing"
    known = _Known(cache, file) if cache is not None else None
    if known is not None and (found := known.read()) is not None:
        return found
    found = file_digest(Path(file.uri)).sha256
    if known is not None:
        known.write(found)
    return found


class _Known:
    """The remembered digest of a local file, as it is by size and time of its last change."""

    def __init__(self, cache: Path, file: RawFile) -> None:
        self.file = file
        self.path = cache / f"{hashlib.sha256(file.uri.encode()).hexdigest()[:32]}.json"

    def read(self) -> str | None:
        try:
            said = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None
        same = isinstance(said, dict) and (said.get("size"), said.get("stamp")) == (self.file.size, self.file.stamp)
        return said["sha256"] if same else None

    def write(self, sha256: str) -> None:
        if time.time_ns() - int(self.file.stamp) < SETTLED * 1e9:  # it may still change without a new time
            return
        said = {"path": self.file.uri, "size": self.file.size, "stamp": self.file.stamp, "sha256": sha256}
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(said))
        os.replace(temporary, self.path)


class _Ranges(io.RawIOBase):
    """A remote file, read by ranges."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._size, self._read, self._place = size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        size = max(0, min(len(buffer), self._size - self._place))
        if size:
            buffer[:size] = self._read(self._place, size)
            self._place += size
        return size


def _buffered(raw: _Ranges) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(raw, READ_AHEAD))


def _asked_range(uri: str, store: Store, key: str, offset: int, size: int) -> bytes:
    try:
        return _asked(uri, lambda: store.read_range(key, offset, size))
    except ShardCorrupted:
        raise SourceError(f"{uri}: changed while it was read; start again") from None


def _why(error: OSError) -> str:
    return "does not exist; check the path" if error.errno == errno.ENOENT else error.strerror or str(error)
