"""One small interface over local folders and `s3://` buckets: the only place that knows how bytes are kept.

Keys are relative, with `/` between parts. Every write appears whole or not at all: locally by a temporary file, fsync
and rename; on S3 a PUT is atomic by itself. `write_if_absent` is the commit primitive of the project (one of all racing
writers wins): a hard link locally, `If-None-Match: *` on S3. `If-Match` is never used, since some endpoints refuse it.

Endpoint and credentials of S3 come from boto3's own environment variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
"""

import base64
import errno
import hashlib
import io
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from vc2.errors import ShardCorrupted, StoreError

__all__ = [
    "LINK_SECONDS",
    "MEDIA_TYPES",
    "Entry",
    "FileDigest",
    "LocalStore",
    "S3Store",
    "Store",
    "file_digest",
    "join_uri",
    "located",
    "media_type",
    "open_store",
    "write_pieces",
]

CHUNK = 8 * 2**20  # bytes held in memory at a time by file transfers
#: Of the files that people look at; `mimetypes` would ask the machine, which may know others.
MEDIA_TYPES = {
    ".csv": "text/csv; charset=utf-8",
    ".gif": "image/gif",
    ".html": "text/html; charset=utf-8",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".jsonl": "text/plain; charset=utf-8",
    ".log": "text/plain; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
    ".mp4": "video/mp4",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".webp": "image/webp",
}
READS = 4  # attempts at an answer of S3 that breaks off
READ_PAUSE = 0.2  # seconds after the first
LINK_SECONDS = 7 * 24 * 3600  # the longest that a signature of S3 is good for
SWEEP_AFTER = 24 * 3600  # seconds after which a temporary file of a dead writer is removed


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored object, as a listing tells it."""

    key: str
    size: int
    modified: float  # seconds since the epoch, by the store's clock
    etag: str = ""  # of S3: another one means other bytes


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size and sha256 of a file."""

    size: int
    sha256: str


def file_digest(path: Path) -> FileDigest:
    """Size and sha256 of a local file, read in bounded memory."""
    sha256, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            size += len(chunk)
    return FileDigest(size, sha256.hexdigest())


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> FileDigest:
    """Write pieces of memory to a local file, down to the disk; their digest is taken on the way."""
    hashed = _Hashed(pieces)
    with open(path, "wb") as file:
        for piece in hashed:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return hashed.digest


class _Hashed(io.RawIOBase):
    """Pieces of memory as a file that can be read once, and the digest of what was read."""

    def __init__(self, pieces: Iterable[bytes | memoryview]) -> None:
        self._pieces = (
            view[start : start + CHUNK]
            for view in map(memoryview, pieces)
            for start in range(0, view.nbytes, CHUNK)
        )  # fmt: skip
        self._rest = memoryview(b"")
        self._sha256, self._size = hashlib.sha256(), 0

    @property
    def digest(self) -> FileDigest:
        return FileDigest(self._size, self._sha256.hexdigest())

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = next(self, memoryview(b""))  # type: ignore[call-overload] - an iterator of memory, not lines
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        piece = next(self._pieces)
        self._sha256.update(piece)
        self._size += piece.nbytes
        return piece


def join_uri(root: str, key: str) -> str:
    return f"{root.rstrip('/')}/{key}"


def media_type(key: str) -> str:
    """What a browser is told that a file is, by its name; of names that say nothing, bytes."""
    return MEDIA_TYPES.get(PurePosixPath(key).suffix.lower(), "application/octet-stream")


class Store(Protocol):
    """Where artifacts are kept."""

    uri: str  #: absolute path, or s3://bucket/prefix

    def read(self, key: str) -> bytes:
        """The whole object. Raises `KeyError` if there is none."""
        ...

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`. Raises `KeyError` without the object, `ShardCorrupted` if it ends before."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Store an object, replacing what was there."""
        ...

    def write_if_absent(self, key: str, data: bytes) -> bool:
        """Store an object unless there is one. True if this call stored it."""
        ...

    def upload(self, path: Path, key: str) -> FileDigest:
        """Store a local file, in bounded memory."""
        ...

    def upload_pieces(self, pieces: Iterable[bytes | memoryview], key: str) -> FileDigest:
        """Store an object out of pieces of memory, copied by no more than a few chunks at a time."""
        ...

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> FileDigest:
        """Fetch an object to a local file, whole or not at all; with `sha256` the content is checked."""
        ...

    def entry(self, key: str) -> Entry | None:
        """What a listing would say of one object, or None."""
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """All objects whose key starts with `prefix`, in key order."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; no error if there is none."""
        ...

    def now(self) -> float:
        """The store's own clock, the one that stamps `Entry.modified`."""
        ...

    def check(self) -> None:
        """Raise `StoreError` unless this store can be written and keeps the promise of `write_if_absent`."""
        ...

    def link(self, key: str, seconds: int = LINK_SECONDS) -> str:
        """A link that opens an object in a browser; of a bucket for so many seconds, for whoever has it."""
        ...


def open_store(uri: str) -> Store:
    """The store at a local path or an `s3://bucket/prefix`.

    Raises:
        StoreError: If the scheme is unknown or the place cannot be written.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalStore(Path(uri))
    if scheme == "file":
        return LocalStore(Path(rest))
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise StoreError(f"{uri}: no bucket; expected s3://bucket/prefix")
        return S3Store(bucket, prefix.strip("/"))
    raise StoreError(f"{uri}: unknown scheme {scheme!r}; a store is a local path or s3://bucket/prefix")


def located(store: Store, key: str) -> tuple[Store, str]:
    """Where a file of an artifact is: in its store, or, under an absolute path or `s3://` URI, outside of it.

    Files outside are those that an artifact names and does not own, such as tars made by others.
    """
    if key.startswith("s3://"):
        bucket, _, name = key.removeprefix("s3://").partition("/")
        return _bucket(bucket, os.environ.get("AWS_ENDPOINT_URL")), name
    if key.startswith("/"):
        return LocalStore(Path(key).parent, is_ours=False), Path(key).name
    return store, key


@lru_cache(maxsize=16)
def _bucket(bucket: str, endpoint: str | None) -> Store:  # another endpoint is another store
    return open_store(f"s3://{bucket}")


def _checked_key(key: str) -> str:
    if not key or key.startswith("/") or ".." in key.split("/"):
        raise StoreError(f"{key!r} is no key of a store: expected a relative path without '..'")
    return key


class LocalStore:
    """A folder. Temporary files lie in `<root>/.tmp`, so that no reader ever lists one."""

    def __init__(self, root: Path, *, is_ours: bool = True) -> None:
        self.root = root.expanduser().resolve()
        self.uri = str(self.root)
        self._temporary = self.root / ".tmp"
        if not is_ours:  # only read from
            return
        try:
            self._temporary.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _store_error(self.uri, error) from error
        self._sweep()

    def read(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            raise KeyError(f"{self.uri}/{key}") from None

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        try:
            with open(self._path(key), "rb") as file:
                file.seek(offset)
                data = file.read(length)
        except (FileNotFoundError, IsADirectoryError):
            raise KeyError(f"{self.uri}/{key}") from None
        return _complete(data, length, f"{self.uri}/{key}", offset)

    def write(self, key: str, data: bytes) -> None:
        self._publish(key, lambda temporary: _write_through(temporary, data), os.replace)

    def write_if_absent(self, key: str, data: bytes) -> bool:
        if self._path(key).exists():
            return False
        try:
            self._publish(key, lambda temporary: _write_through(temporary, data), os.link)
        except FileExistsError:
            return False
        return True

    def upload(self, path: Path, key: str) -> FileDigest:
        found = []

        def copy(temporary: Path) -> None:
            found.append(_copy_through(path, temporary))

        self._publish(key, copy, os.replace)
        return found[0]

    def upload_pieces(self, pieces: Iterable[bytes | memoryview], key: str) -> FileDigest:
        found = []
        self._publish(key, lambda temporary: found.append(write_pieces(temporary, pieces)), os.replace)
        return found[0]

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> FileDigest:
        source = self._path(key)
        if not source.is_file():
            raise KeyError(f"{self.uri}/{key}")
        return _land(path, lambda temporary: _copy_through(source, temporary), f"{self.uri}/{key}", sha256)

    def entry(self, key: str) -> Entry | None:
        try:
            facts = self._path(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Entry(key, facts.st_size, facts.st_mtime)

    def list(self, prefix: str) -> Iterator[Entry]:
        folder = self.root / prefix.rpartition("/")[0]
        found = []
        for parent, folders, names in os.walk(folder):
            if Path(parent) == self.root:
                folders[:] = [name for name in folders if name != ".tmp"]
            for name in names:
                key = (Path(parent) / name).relative_to(self.root).as_posix()
                if key.startswith(prefix):
                    found.append(key)
        for key in sorted(found):
            if entry := self.entry(key):
                yield entry

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def now(self) -> float:
        return time.time()

    def check(self) -> None:
        _check_commits(self)

    def link(self, key: str, seconds: int = LINK_SECONDS) -> str:
        return self._path(key).as_uri()

    def _path(self, key: str) -> Path:
        return self.root / _checked_key(key)

    def _publish(self, key: str, fill: Callable[[Path], object], place: Callable[[Path, Path], object]) -> None:
        final = self._path(key)
        temporary = self._temporary / f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            fill(temporary)
            place(temporary, final)
            _sync_folder(final.parent)
        except FileExistsError:
            raise
        except OSError as error:
            raise _store_error(f"{self.uri}/{key}", error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _sweep(self) -> None:
        for path in self._temporary.iterdir():
            try:
                if time.time() - path.stat().st_mtime > SWEEP_AFTER:
                    path.unlink()
            except FileNotFoundError:
                continue


def _write_through(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _copy_through(source: Path, target: Path) -> FileDigest:
    sha256, size = hashlib.sha256(), 0
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while chunk := reader.read(CHUNK):
            sha256.update(chunk)
            size += len(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return FileDigest(size, sha256.hexdigest())


def _land(path: Path, fill: Callable[[Path], FileDigest], uri: str, sha256: str | None) -> FileDigest:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        found = fill(temporary)
        if sha256 is not None and found.sha256 != sha256:
            raise ShardCorrupted(
                f"{uri}: sha256 {found.sha256[:12]}, its manifest says {sha256[:12]}; delete it and make it again"
            )
        os.replace(temporary, path)
        return found
    except OSError as error:
        raise _store_error(str(path), error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _complete(data: bytes, length: int, uri: str, offset: int) -> bytes:
    if len(data) != length:
        raise ShardCorrupted(
            f"{uri}: {len(data)} bytes at {offset}, expected {length}; the object is shorter than its index"
        )
    return data


def _store_error(place: str, error: OSError) -> StoreError:
    causes = {
        errno.ENOSPC: "no space left on the device; free some or choose another place",
        errno.EDQUOT: "disk quota exceeded; free some or choose another place",
        errno.EACCES: "permission denied; choose a place that you can write",
        errno.EROFS: "read-only file system; choose a place that you can write",
        errno.ENOTDIR: "a part of this path is a file; choose another place",
        errno.EEXIST: "a file is in the way; choose another place",
    }
    return StoreError(f"{place}: {causes.get(error.errno or 0, error.strerror or str(error))}")


def _check_commits(store: Store) -> None:
    key = f"probe/{secrets.token_hex(8)}"
    try:
        first, second = store.write_if_absent(key, b"1"), store.write_if_absent(key, b"2")
        kept = store.read(key)
    finally:
        store.delete(key)
    if not (first and not second and kept == b"1"):
        raise StoreError(
            f"{store.uri} does not honour conditional writes (If-None-Match): two writers could overwrite each other; "
            "use an endpoint that does"
        )


class S3Store:
    """A prefix in an S3 bucket, by boto3.

    Args:
        bucket, prefix: The place.
        attempts: How often a call is sent, with growing pauses between, until it is an error.
        patience: Seconds that an answer may take.
    """

    def __init__(self, bucket: str, prefix: str, *, attempts: int = 6, patience: float = 60) -> None:
        import boto3
        from boto3.s3.transfer import TransferConfig
        from botocore.config import Config as ClientConfig

        self.bucket = bucket
        self.prefix = prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client: Any = boto3.client(
            "s3",
            config=ClientConfig(
                retries={"mode": "standard", "max_attempts": attempts},  # a call ends after 7 minutes at the latest
                connect_timeout=min(10, patience),
                read_timeout=patience,
                tcp_keepalive=True,
                signature_version="s3v4",  # of links; left to itself boto3 signs them in a way that few still take
                # Servers other than AWS answer ranged reads with the checksum of the whole object.
                response_checksum_validation="when_required",
            ),
        )
        self._transfer = TransferConfig(multipart_chunksize=CHUNK, multipart_threshold=4 * CHUNK, max_concurrency=4)

    def read(self, key: str) -> bytes:
        return self._call(key, self._get)

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        if length == 0:
            return b""
        data = self._call(key, lambda name: self._get(name, Range=f"bytes={offset}-{offset + length - 1}"))
        return _complete(data, length, join_uri(self.uri, key), offset)

    def write(self, key: str, data: bytes) -> None:
        self._call(key, lambda name: self._put(name, data))

    def write_if_absent(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        for _ in range(8):
            try:
                self._call(key, lambda name: self._put(name, data, IfNoneMatch="*"), translate=False)
                return True
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == 412:
                    return False
                if status != 409:  # a concurrent delete; S3 asks to try again
                    raise self._failure(key, error) from error
        raise StoreError(
            f"{join_uri(self.uri, key)}: eight conflicts in a row; another process keeps deleting this key"
        )

    def upload(self, path: Path, key: str) -> FileDigest:
        found = file_digest(path)
        self._call(key, lambda name: self._client.upload_file(str(path), self.bucket, name, Config=self._transfer))
        return self._arrived(key, found)

    def upload_pieces(self, pieces: Iterable[bytes | memoryview], key: str) -> FileDigest:
        hashed = _Hashed(pieces)
        file = io.BufferedReader(hashed, CHUNK)
        self._call(key, lambda name: self._client.upload_fileobj(file, self.bucket, name, Config=self._transfer))
        return self._arrived(key, hashed.digest)

    def _arrived(self, key: str, found: FileDigest) -> FileDigest:
        stored = self.entry(key)
        if stored is None or stored.size != found.size:
            raise StoreError(
                f"{join_uri(self.uri, key)}: {found.size} bytes sent, {stored and stored.size} stored; try again"
            )
        return found

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> FileDigest:
        def fill(temporary: Path) -> FileDigest:
            self._call(
                key, lambda name: self._client.download_file(self.bucket, name, str(temporary), Config=self._transfer)
            )
            return file_digest(temporary)

        return _land(path, fill, join_uri(self.uri, key), sha256)

    def entry(self, key: str) -> Entry | None:
        try:
            facts = self._call(key, lambda name: self._client.head_object(Bucket=self.bucket, Key=name))
        except KeyError:
            return None
        return Entry(key, facts["ContentLength"], facts["LastModified"].timestamp(), facts["ETag"].strip('"'))

    def list(self, prefix: str) -> Iterator[Entry]:
        asked = {"Bucket": self.bucket, "Prefix": self._name(prefix)}
        pages = iter(self._client.get_paginator("list_objects_v2").paginate(**asked))
        start = len(self.prefix) + 1 if self.prefix else 0
        while (page := self._call(prefix, lambda _: next(pages, None))) is not None:  # who stops early asks no more
            for item in page.get("Contents", ()):
                yield Entry(
                    item["Key"][start:], item["Size"], item["LastModified"].timestamp(), item["ETag"].strip('"')
                )

    def delete(self, key: str) -> None:
        self._call(key, lambda name: self._client.delete_object(Bucket=self.bucket, Key=name))

    def now(self) -> float:
        from email.utils import parsedate_to_datetime

        answer = self._call("", lambda _: self._client.list_objects_v2(Bucket=self.bucket, MaxKeys=1))
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def check(self) -> None:
        _check_commits(self)

    def link(self, key: str, seconds: int = LINK_SECONDS) -> str:
        # The media type is asked for, since objects are stored without one: a browser would save a page, not show it.
        asked = {"ResponseContentType": media_type(key), "ResponseContentDisposition": "inline"}
        return self._call(
            key,
            lambda name: self._client.generate_presigned_url(
                "get_object", Params={"Bucket": self.bucket, "Key": name, **asked}, ExpiresIn=seconds
            ),
        )

    def _get(self, name: str, **asked: str) -> bytes:
        """The content of an object. boto3 asks again where no answer comes, not where one breaks off: we do. Nothing
        where a range begins behind the end."""
        from botocore.exceptions import ClientError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        for attempt in range(1, READS + 1):
            try:
                body = self._client.get_object(Bucket=self.bucket, Key=name, **asked)["Body"]
            except ClientError as error:
                if error.response["Error"]["Code"] in ("InvalidRange", "416"):
                    return b""
                raise
            try:
                return body.read()
            except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                if attempt == READS:
                    raise
            time.sleep(READ_PAUSE * attempt)
        raise AssertionError("no attempt was made")

    def _put(self, name: str, data: bytes, **conditions: str) -> None:
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        self._client.put_object(Bucket=self.bucket, Key=name, Body=data, ContentMD5=md5, **conditions)

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _call(self, key: str, call: Callable[[str], Any], *, translate: bool = True) -> Any:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        name = self._name(_checked_key(key) if key else key)
        try:
            return call(name)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                raise KeyError(join_uri(self.uri, key)) from None
            if not translate:
                raise
            raise self._failure(key, error) from error
        except (BotoCoreError, Boto3Error) as error:
            raise self._failure(key, error) from error

    def _failure(self, key: str, error: Exception) -> StoreError:
        return StoreError(
            f"{join_uri(self.uri, key)}: {error}; check bucket, AWS_ENDPOINT_URL and credentials in the environment"
        )
