"""Laws of a store, the same for a folder and for a bucket."""

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from urllib.request import url2pathname

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vc2.errors import ShardCorrupted, StoreError
from vc2.storage import LINK_SECONDS, LocalStore, Store, file_digest, media_type, open_store


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    return open_store(request.getfixturevalue("s3_uri"))


def test_what_is_written_is_read(any_store: Store) -> None:
    any_store.write("a/b/c", b"once")
    any_store.write("a/b/c", b"again")
    assert any_store.read("a/b/c") == b"again"


@pytest.mark.parametrize("sizes", [(), (5,), (3, 9_000_000, 1), (20_000_001, 20_000_001)])
def test_pieces_of_memory_become_one_object(any_store: Store, tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """However they are cut, small or in many parts; the digest is of what is stored."""
    whole = os.urandom(1000) * (1 + sum(sizes) // 1000)
    cuts = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    pieces = [memoryview(whole)[start:stop] for start, stop in pairwise(cuts)]
    found = any_store.upload_pieces(pieces, "a/b")
    assert any_store.download("a/b", tmp_path / "copy", sha256=found.sha256) == found
    assert (tmp_path / "copy").read_bytes() == whole[: sum(sizes)]


def test_of_many_racing_writers_exactly_one_wins(any_store: Store) -> None:
    """The commit primitive: nobody overwrites, everybody learns who won."""
    won: list[int] = []

    def race(writer: int) -> None:
        if any_store.write_if_absent("manifest.json", b"%d" % writer):
            won.append(writer)

    racers = [threading.Thread(target=race, args=(writer,)) for writer in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(won) == 1
    assert any_store.read("manifest.json") == b"%d" % won[0]


def test_an_object_that_is_not_there_is_a_key_error(any_store: Store) -> None:
    with pytest.raises(KeyError):
        any_store.read("nothing")
    with pytest.raises(KeyError):
        any_store.read_range("nothing", 0, 1)
    assert any_store.entry("nothing") is None
    any_store.delete("nothing")


def test_a_range_is_exactly_the_bytes_asked_for(any_store: Store) -> None:
    any_store.write("x", bytes(range(100)))
    assert any_store.read_range("x", 10, 5) == bytes(range(10, 15))
    assert any_store.read_range("x", 3, 0) == b""
    for offset in (98, 100, 1000):
        with pytest.raises(ShardCorrupted, match="shorter than its index"):
            any_store.read_range("x", offset, 5)


def test_a_listing_has_every_key_below_the_prefix_in_order(any_store: Store) -> None:
    for key in ("a/2", "a/1", "ab", "b/1"):
        any_store.write(key, key.encode())
    assert [entry.key for entry in any_store.list("a")] == ["a/1", "a/2", "ab"]
    assert [entry.key for entry in any_store.list("a/")] == ["a/1", "a/2"]
    assert [entry.size for entry in any_store.list("")] == [3, 3, 2, 3]


def test_a_file_comes_back_as_it_went_up(any_store: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "up", tmp_path / "deep" / "down"
    source.write_bytes(os.urandom(9_000_000))
    found = any_store.upload(source, "objects/x")
    assert any_store.download("objects/x", target, sha256=found.sha256) == found == file_digest(target)


def test_a_download_with_other_bytes_than_promised_leaves_nothing(any_store: Store, tmp_path: Path) -> None:
    any_store.write("x", b"damaged")
    with pytest.raises(ShardCorrupted, match="its manifest says"):
        any_store.download("x", tmp_path / "x", sha256="0" * 64)
    assert list(tmp_path.glob("*x*")) == []


def test_the_store_knows_whether_it_keeps_the_commit_promise(any_store: Store) -> None:
    any_store.check()
    assert list(any_store.list("probe/")) == []


def test_the_stores_clock_is_the_one_that_stamps_objects(any_store: Store) -> None:
    any_store.write("x", b"")
    entry = any_store.entry("x")
    assert entry is not None
    assert abs(any_store.now() - entry.modified) < 5


@pytest.mark.parametrize("key", ["/etc/passwd", "../up", "a/../../b", ""])
def test_no_key_leaves_the_store(store: LocalStore, key: str) -> None:
    with pytest.raises(StoreError):
        store.write(key, b"")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.binary(max_size=200), st.integers(0, 200), st.integers(0, 200))
def test_a_range_is_a_slice(store: LocalStore, data: bytes, offset: int, length: int) -> None:
    store.write("x", data)
    if offset + length <= len(data):
        assert store.read_range("x", offset, length) == data[offset : offset + length]


def test_an_unwritable_place_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"a file is in the way|a part of this path is a file"):
        open_store(str(tmp_path / "file"))
    with pytest.raises(StoreError, match="unknown scheme"):
        open_store("ftp://somewhere")
    with pytest.raises(StoreError, match="no bucket"):
        open_store("s3:///prefix")


@pytest.mark.s3
def test_a_bucket_that_is_not_there_says_what_to_check(s3_endpoint: str) -> None:
    with pytest.raises(StoreError, match="check bucket, AWS_ENDPOINT_URL and credentials"):
        open_store("s3://no-such-bucket/x").write("a", b"")


@pytest.mark.s3
@pytest.mark.parametrize("broken", [2, 100])
def test_an_answer_that_breaks_off_is_asked_for_again(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """A connection may break within a body, a few times; one that always does is an error."""
    data, asked = os.urandom(1000), []

    class Breaking(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("Range"))
            self.send_response(200 if asked[-1] is None else 206)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(data[: 400 if len(asked) <= broken else None])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setattr("vc2.storage.READ_PAUSE", 0.01)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        bucket = open_store("s3://bucket")
        try:
            if broken == 2:
                assert bucket.read("x") == data and len(asked) == 3
                asked.clear()
                assert bucket.read_range("x", 0, 1000) == data and asked == ["bytes=0-999"] * 3
            else:
                with pytest.raises(StoreError):
                    bucket.read("x")
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("key", ["pages/report.html", "a b/ü&c#1.mp4"])
def test_a_link_opens_what_it_names(any_store: Store, key: str) -> None:
    """Whoever has it needs nothing else: no credentials, and the browser is told what it is."""
    any_store.write(key, b"what is there")
    link = any_store.link(key)
    if link.startswith("file://"):
        assert Path(url2pathname(urlsplit(link).path)).read_bytes() == b"what is there"
        return
    answer = httpx.get(link, trust_env=False)
    assert (answer.status_code, answer.content) == (200, b"what is there")
    assert answer.headers["content-type"] == media_type(key)


@pytest.mark.s3
def test_a_link_is_signed_for_its_time(s3_uri: str) -> None:
    """By the fourth version, the one that every region takes."""
    store = open_store(s3_uri)
    asked = parse_qs(urlsplit(store.link("a.html", 60)).query)
    assert asked["X-Amz-Expires"] == ["60"]
    assert asked["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert parse_qs(urlsplit(store.link("a.html")).query)["X-Amz-Expires"] == [str(LINK_SECONDS)]


def test_a_link_stays_in_the_store(any_store: Store) -> None:
    with pytest.raises(StoreError, match="no key"):
        any_store.link("../other")
