import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vc2.artifacts import FileEntry, ShardSet, load_manifest
from vc2.data import cache as caches
from vc2.data.cache import ShardCache, kept_file, read_range
from vc2.data.config import LoaderConfig
from vc2.data.loader import Loader
from vc2.errors import ShardCorrupted
from vc2.storage import LocalStore, Store, open_store


@pytest.fixture
def remote(s3_uri: str, make_set: Any) -> tuple[Store, ShardSet]:
    store = open_store(s3_uri)
    return store, make_set(store, "va", 12)


def tars(store: Store, shards: ShardSet) -> list[FileEntry]:
    return [entry for entry in load_manifest(store, shards.prefix).files if entry.name.endswith(".tar")]


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def copies(folder: Path) -> set[str]:
    place = folder / "shards"
    return {path.name for path in place.iterdir() if not path.name.startswith(".")} if place.exists() else set()


def test_shards_of_a_remote_store_are_kept(remote: tuple[Store, ShardSet], tmp_path: Path) -> None:
    """The first reads are ranged; whole shards come meanwhile, and serve from then on, even where the store is gone."""
    store, shards = remote
    config = LoaderConfig(batch_size=12, cache_dir=str(tmp_path), cache_gib=1)
    loader = Loader(store, [shards], [], config)
    plain = Loader(store, [shards], [], LoaderConfig(batch_size=12))
    refs = loader.refs(0)
    assert refs == plain.refs(0)
    frames = [loader.frames(ref) for ref in refs]
    files = tars(store, shards)
    until(lambda: copies(tmp_path) == {file.sha256 for file in files})
    for file in files:
        store.delete(file.key)
    assert all((loader.frames(ref) == before).all() for ref, before in zip(refs, frames, strict=True))
    loader.close()
    plain.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shards")]


def test_the_least_recently_used_goes_first(remote: tuple[Store, ShardSet], tmp_path: Path) -> None:
    """Copies stay within the limit; what was read last stays."""
    store, shards = remote
    files = tars(store, shards)
    cache = ShardCache(tmp_path, 2 * max(file.size for file in files))
    for file in files[:2]:
        cache.bring(store, [file])
        until(lambda file=file: file.sha256 in copies(tmp_path))
    for age, file in enumerate(files[:2]):
        os.utime(tmp_path / "shards" / file.sha256, (1000 + age, 1000 + age))
    cache.read(store, files[0], 0, 512, None)
    cache.bring(store, [files[2]])
    until(lambda: files[2].sha256 in copies(tmp_path))
    assert copies(tmp_path) == {files[0].sha256, files[2].sha256}
    cache.close()
    small = ShardCache(tmp_path / "small", files[0].size - 1)
    small.read(store, files[0], 0, 512, None)
    small.close()
    assert not copies(tmp_path / "small")


def test_a_copy_that_a_reader_removes_meanwhile_is_no_failure(
    remote: tuple[Store, ShardSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who makes room and who finds a copy damaged do not wait for each other."""
    store, shards = remote
    first, second, third = tars(store, shards)[:3]
    cache = ShardCache(tmp_path, first.size + second.size)
    for file in (first, second):
        cache.bring(store, [file])
        until(lambda file=file: file.sha256 in copies(tmp_path))
    stat = Path.stat

    def racing(path: Path, **options: Any) -> os.stat_result:
        """Gone before it is looked at, or just after."""
        if path.name == first.sha256:
            path.unlink(missing_ok=True)
        found = stat(path, **options)
        if path.name == second.sha256:
            path.unlink()
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", racing)
        cache._make_room(tmp_path / "shards", first.size + second.size)
    assert not copies(tmp_path)
    cache.bring(store, [third])
    until(lambda: third.sha256 in copies(tmp_path))
    cache.close()
    assert cache.is_used


def test_a_damaged_copy_is_read_around_and_made_again(remote: tuple[Store, ShardSet], tmp_path: Path) -> None:
    """A copy that rots costs a ranged read; a shard that differs from its manifest is never kept."""
    store, shards = remote
    loader = Loader(store, [shards], [], LoaderConfig(batch_size=1, cache_dir=str(tmp_path), cache_gib=1))
    ref = loader.refs(0)[0]
    file = next(entry for entry in tars(store, shards) if entry.key == ref.shard)
    expected = loader.frames(ref)
    copy = tmp_path / "shards" / file.sha256
    until(copy.exists)
    copy.write_bytes(bytes(file.size))
    assert (loader.frames(ref) == expected).all()
    until(lambda: copy.exists() and copy.read_bytes() != bytes(file.size))
    loader.close()
    wrong = file.evolve(sha256="0" * 64)
    cache = ShardCache(tmp_path, 2**30)
    data = cache.read(store, wrong, ref.offset, ref.length, ref.media_sha256)
    assert len(data) == ref.length
    with pytest.raises(ShardCorrupted, match="differ"):
        cache.read(store, wrong, ref.offset, ref.length, "0" * 64)
    until(lambda: not list((tmp_path / "shards").glob(".*")))
    cache.close()
    assert wrong.sha256 not in copies(tmp_path)


def test_a_disk_that_cannot_be_written_costs_one_warning(
    remote: tuple[Store, ShardSet], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Reads go on by ranges."""
    store, shards = remote
    (tmp_path / "shards").write_text("in the way")
    cache = ShardCache(tmp_path, 2**30)
    with caplog.at_level(logging.WARNING):
        for file in tars(store, shards):
            assert len(cache.read(store, file, 0, 512, None)) == 512
            until(lambda: not cache.is_used)
    cache.close()
    assert len(caplog.records) == 1 and "by ranges instead" in caplog.text


def test_a_local_store_is_read_in_place(tmp_path: Path, make_set: Any) -> None:
    """Nothing is copied from disk to disk; tars that lie elsewhere are read where they are."""
    store = LocalStore(tmp_path / "store")
    file = tars(store, make_set(store, "va", 4))[0]
    cache = ShardCache(tmp_path / "cache", 2**30)
    data = cache.read(store, file, 0, 512, None)
    cache.close()
    assert not (tmp_path / "cache").exists()
    place = tmp_path / "store" / file.key
    assert read_range(store, str(place), 0, 512) == data
    with pytest.raises(KeyError):
        read_range(store, "/no/such.tar", 0, 512)
    with pytest.raises(ShardCorrupted, match="shorter"):
        read_range(store, str(place), file.size, 1)


def bring(uri: str, file: dict[str, Any], folder: str, log: str) -> None:
    """In another process: copy a shard, and write down what was downloaded."""
    store = open_store(uri)
    read = caches.read_range

    def counted(*args: Any) -> bytes:
        with open(log, "a") as lines:
            lines.write("x")
        return read(*args)

    caches.read_range = counted
    cache = ShardCache(Path(folder), 2**30)
    entry = FileEntry.model_validate(file)
    cache.bring(store, [entry])
    until(lambda: entry.sha256 in copies(Path(folder)))
    cache.close()


def test_two_processes_bring_a_shard_once(remote: tuple[Store, ShardSet], tmp_path: Path) -> None:
    """The ranks of a machine share the copies; what a killed one left half written is swept."""
    store, shards = remote
    file, log = tars(store, shards)[0], tmp_path / "log"
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / f".{file.sha256}.1").write_bytes(b"half")
    spawn = multiprocessing.get_context("spawn")
    said = (store.uri, file.model_dump(), str(tmp_path), str(log))
    ranks = [spawn.Process(target=bring, args=said) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert log.read_text() == "x" * -(-file.size // caches.CHUNK)
    assert [path.name for path in (tmp_path / "shards").iterdir()] == [file.sha256]


def test_a_kept_file_is_whole_or_not_there(tmp_path: Path) -> None:
    """What fails in the making leaves nothing behind."""

    def broken(file: Any) -> None:
        file.write(b"half")
        raise ValueError

    with pytest.raises(ValueError):
        kept_file(tmp_path, "indexes/a", broken)
    assert not list((tmp_path / "indexes").iterdir())
    path = kept_file(tmp_path, "indexes/a", lambda file: file.write(b"whole"))
    assert kept_file(tmp_path, "indexes/a", broken) == path and path.read_bytes() == b"whole"
