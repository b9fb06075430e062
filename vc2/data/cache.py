"""Bytes of shards, near at hand: whole shards of a remote store on a local disk, once per machine.

    <folder>/shards/<sha256 of the tar>      brought in the background, checked, least recently used goes first
    <folder>/indexes/<sha256>-<version>      an index in the form in which it can be memory-mapped (see `loader`)
    <folder>/shards.lock, indexes.lock       held by the one process of the machine that brings or makes one

A shard that is not there yet is read by ranges, so nobody waits for a download; a store on a local disk is read in
place. Whatever fails here (a full disk, a folder that cannot be written) costs speed and one warning, never a run.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from vc2.artifacts import FileEntry
from vc2.errors import ShardCorrupted, StoreError
from vc2.storage import LocalStore, Store, located

__all__ = ["ShardCache", "kept_file", "read_range"]

log = logging.getLogger(__name__)

CHUNK = 8 * 2**20  # bytes of a download that are asked for at a time
STREAMS = 4  # chunks on their way at a time
PATIENCE = 0.2  # seconds between looks at a lock that another process holds


def read_range(store: Store, key: str, offset: int, length: int) -> bytes:
    """Bytes of a file of an artifact, inside its store or outside of it (`storage.located`).

    Raises:
        KeyError: If there is no such file.
        ShardCorrupted: If it ends before.
        StoreError: If it cannot be read.
    """
    place, name = located(store, key)
    return place.read_range(name, offset, length)


def is_absolute(key: str) -> bool:
    """Whether a file lies outside of the store whose artifact names it."""
    return key.startswith("/") or "://" in key


def kept_file(folder: Path, name: str, make: Callable[[BinaryIO], object]) -> Path:
    """A file in `folder`, made once per machine: whole or not at all, by one process at a time.

    Raises:
        OSError: If the folder cannot be written.
    """
    path = folder / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.parent.with_suffix(".lock"), threading.Event()) as held:
        if held and not path.exists():
            _sweep(path.parent)
            with _whole(path) as file:
                make(file)
    return path


class ShardCache:
    """Reads files of artifacts, through whole copies on a local disk where that is worth it.

    Args:
        folder: Of the copies; None: none are kept.
        limit: Bytes that the copies may take together.
    """

    def __init__(self, folder: Path | None, limit: int) -> None:
        self._folder, self._limit = folder, limit if folder is not None else 0
        self._guard = threading.Lock()
        self._asked: set[str] = set()  # on their way, or given up
        self._stop = threading.Event()
        self._fetching: ThreadPoolExecutor | None = None

    @property
    def is_used(self) -> bool:
        """Whether copies are kept at all."""
        return self._limit > 0

    def read(self, store: Store, file: FileEntry, offset: int, length: int, sha256: str | None) -> bytes:
        """Bytes of a file: out of its copy, or by a ranged read while there is none.

        Raises:
            ShardCorrupted: Also if they are not those that `sha256` names. Errors are else those of `read_range`.
        """
        if self._keeps(store, file):
            data = self._copied(file, offset, length)
            if data is not None and _is_right(data, sha256):
                return data
            if data is not None:
                self._path(file).unlink(missing_ok=True)
            self.bring(store, [file])
        data = read_range(store, file.key, offset, length)
        if not _is_right(data, sha256):
            raise ShardCorrupted("bytes differ from those that the index names; run `vc2 verify` on the set")
        return data

    def bring(self, store: Store, files: Iterable[FileEntry]) -> None:
        """Begin to copy files that will be read soon, in the background; those that are there stay longer."""
        for file in files:
            with self._guard:
                if not self._keeps(store, file) or file.sha256 in self._asked or self._stop.is_set():
                    continue
                if self._path(file).exists():
                    continue
                self._asked.add(file.sha256)
                if self._fetching is None:
                    self._fetching = ThreadPoolExecutor(1, thread_name_prefix="shards")
                self._fetching.submit(self._bring, store, file)

    def close(self) -> None:
        """Stop copying and end the threads; what is half copied goes away."""
        self._stop.set()
        if self._fetching is not None:
            self._fetching.shutdown(cancel_futures=True)

    def _keeps(self, store: Store, file: FileEntry) -> bool:
        remote = file.key.startswith("s3://") if is_absolute(file.key) else not isinstance(store, LocalStore)
        return remote and file.size <= self._limit

    def _path(self, file: FileEntry) -> Path:
        assert self._folder is not None
        return self._folder / "shards" / file.sha256

    def _copied(self, file: FileEntry, offset: int, length: int) -> bytes | None:
        path = self._path(file)
        try:
            with open(path, "rb") as copy:
                data = os.pread(copy.fileno(), length, offset)
                os.utime(copy.fileno())  # when it was last used
        except OSError:
            return None
        return data if len(data) == length else None

    def _bring(self, store: Store, file: FileEntry) -> None:
        path = self._path(file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _lock(path.parent.with_suffix(".lock"), self._stop) as held:
                if held and not path.exists():
                    self._make_room(path.parent, file.size)
                    self._copy(store, file, path)
        except (OSError, KeyError, StoreError) as error:
            if not self._stop.is_set():
                log.warning("%s is not kept in %s (%s); read by ranges instead", file.key, self._folder, error)
            if isinstance(error, OSError):
                self._limit = 0  # the disk's fault: it will not be better for the next one
            return  # stays in `_asked`: not tried again
        with self._guard:
            self._asked.discard(file.sha256)

    def _make_room(self, folder: Path, size: int) -> None:
        """Remove copies, least recently used first, until `size` more bytes are within the limit. Under the lock."""
        _sweep(folder)
        found = []
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a reader that finds one damaged removes it
                fact = path.stat()
                found.append((fact.st_mtime_ns, fact.st_size, path))
        used = sum(size for _, size, _ in found)
        for _, freed, path in sorted(found):
            if used + size <= self._limit:
                return
            path.unlink(missing_ok=True)
            used -= freed

    def _copy(self, store: Store, file: FileEntry, path: Path) -> None:
        sha256, offsets = hashlib.sha256(), range(0, file.size, CHUNK)
        with _whole(path) as copy, ThreadPoolExecutor(STREAMS, thread_name_prefix="shards") as streams:
            for first in range(0, len(offsets), STREAMS):
                if self._stop.is_set():
                    raise StoreError("stopped")
                some = offsets[first : first + STREAMS]
                sizes = [min(CHUNK, file.size - offset) for offset in some]
                for data in streams.map(lambda at, size: read_range(store, file.key, at, size), some, sizes):
                    sha256.update(data)
                    copy.write(data)
            if sha256.hexdigest() != file.sha256:
                raise ShardCorrupted(f"sha256 {sha256.hexdigest()[:12]}, its manifest says {file.sha256[:12]}")


def _is_right(data: bytes, sha256: str | None) -> bool:
    return sha256 is None or hashlib.sha256(data).hexdigest() == sha256


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half written: whoever writes holds the lock."""
    for path in folder.glob(".*"):
        path.unlink()


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears when its block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(path: Path, stop: threading.Event) -> Iterator[bool]:
    """Be the only one on this machine to hold a lock; False if told to stop before."""
    with open(path, "ab") as file:
        while not stop.is_set():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(PATIENCE)
                continue
            yield True
            return
        yield False
