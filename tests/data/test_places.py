"""Raw data at local paths, in buckets and on web servers: the same files, the same bytes."""

import gzip
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vc2.data.config import FolderSource, JourneyDBSource, LaionSource, WebVidSource, archive_uris, source_digest
from vc2.data.places import RawFile, digest_of, find_files, find_tree, open_file, open_text, read_file, read_span
from vc2.data.sources import read_records
from vc2.errors import SourceError
from vc2.storage import open_store

WEBVID = "videoid,name,page_dir,contentUrl\n1,a dog,1_50,http://h/1.mp4\n2,a cat,1_50,http://h/2.mp4\n"


class Files:
    """A web server of files, with or without ranges."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranged = True
        self.asked: list[str | None] = []
        files = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                files.asked.append(self.headers["Range"])
                files.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        self.root = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        headers, data, status = {}, self.files.get(to.path, b""), 200
        if to.path == "/moved":
            status, headers = 302, {"Location": "http://169.254.169.254/x"}
        elif to.path not in self.files:
            status = 404
        else:
            headers["ETag"] = f'"{hash(data):x}"'
            if to.path.startswith("/unstamped"):
                del headers["ETag"]
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", to.headers["Range"] or "")
            if self.ranged and wanted and to.headers.get("If-Range") in (None, headers.get("ETag")):
                first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                data, status = data[first : last + 1], 206
        to.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            to.send_header(name, value)
        to.end_headers()
        to.wfile.write(data)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def web() -> Iterator[Files]:
    web = Files()
    yield web
    web.close()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder to put files in, by `open_store`."""
    return str(tmp_path / "raw") if request.param == "local" else request.getfixturevalue("s3_uri")


def test_files_of_a_folder_come_in_order_of_their_names(place: str) -> None:
    """Only those right in it, only with the endings asked for; the file itself may be named too, and a range."""
    store = open_store(place)
    for name in ("b.csv", "a.CSV", "c.txt", "below/d.csv", "p-00.csv", "p-01.csv"):
        store.write(name, name.encode())
    found = find_files(place, (".csv",), "table")
    assert [file.name for file in found] == ["a.CSV", "b.csv", "p-00.csv", "p-01.csv"]
    assert [file.size for file in found][:2] == [5, 5]
    assert [file.name for file in find_files(f"{place}/c.txt", (".csv",), "table")] == ["c.txt"]
    assert find_files(f"{place}/p-{{00..01}}.csv", (".csv",), "table") == found[2:]
    assert [file.name for file in find_tree(place, "folder")] == [
        "a.CSV", "b.csv", "below/d.csv", "c.txt", "p-00.csv", "p-01.csv"
    ]  # fmt: skip


def test_links_are_files_and_never_a_way_round(tmp_path: Path) -> None:
    """One that leads nowhere, or to itself, is an empty file that cannot be opened; a folder is not entered twice."""
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a").write_bytes(b"12")
    (tmp_path / "below" / "round").symlink_to(tmp_path)
    (tmp_path / "good").symlink_to("below/a")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "self").symlink_to("self")
    found = find_tree(str(tmp_path), "folder")
    assert [(file.name, file.size) for file in found] == [("below/a", 2), ("gone", 0), ("good", 2), ("self", 0)]
    for file in (found[1], found[3]):
        assert digest_of(file) == "missing"
        with pytest.raises(SourceError):
            open_file(file.uri)


def test_wrong_places_are_one_clear_line(place: str) -> None:
    """What was asked for, and what is missing."""
    open_store(place).write("p-0.csv", b"x")
    with pytest.raises(SourceError, match=r"2 of 3 files .* are missing, first .*p-1\.csv"):
        find_files(f"{place}/p-{{0..2}}.csv", (".csv",), "table")
    with pytest.raises(SourceError, match="does not exist; give a file or a folder"):
        find_files(f"{place}/nowhere", (".csv",), "table")
    with pytest.raises(SourceError, match=r"no file ending in \.parquet"):
        find_files(place, (".parquet",), "table")
    with pytest.raises(SourceError, match="check the path"):
        open_file(f"{place}/nowhere")
    with pytest.raises(SourceError, match="nowhere"):
        find_tree(f"{place}/nowhere", "folder")


def test_unknown_schemes_are_refused() -> None:
    """No shell, no foreign protocol."""
    for name in ("ftp://h/x.csv", "gs://b/x.csv"):
        with pytest.raises(SourceError, match="unknown scheme"):
            find_files(name, (".csv",), "table")
    with pytest.raises(SourceError, match="does not exist"):
        find_files("pipe:cat /etc/hostname", (".csv",), "table")


def test_home_and_relative_paths_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are made absolute once, so that workers elsewhere mean the same file."""
    (tmp_path / "x.csv").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("~/x.csv", "x.csv", "./x.csv", f"file://{tmp_path}/x.csv"):
        assert [file.uri for file in find_files(name, (".csv",), "table")] == [str(tmp_path / "x.csv")]


def test_remote_files_seek_and_read_like_local_ones(place: str, web: Files, tmp_path: Path) -> None:
    """Bytes at any place are those that were stored, wherever the file is read from."""
    data = os.urandom(100_000)
    open_store(place).write("x.bin", data)
    web.files["/x.bin"] = data
    for uri in (f"{place}/x.bin", f"{web.root}/x.bin"):
        with open_file(uri) as file:
            assert file.read(10) == data[:10]
            assert file.seek(50_000) == 50_000 and file.read(7) == data[50_000:50_007]
            assert file.seek(-5, os.SEEK_END) == 99_995 and file.read() == data[-5:]
            assert file.seek(0) == 0 and file.read() == data
    assert read_file(f"{place}/x.bin", 100_000) == data
    with pytest.raises(SourceError, match="more than 10 bytes"):
        read_file(f"{place}/x.bin", 10)
    assert read_span(f"{place}/x.bin", 99_000, 1000) == data[-1000:]
    with pytest.raises(SourceError):
        read_span(f"{place}/x.bin", 99_500, 1000)


def test_a_server_without_ranges_is_read_once(web: Files, tmp_path: Path) -> None:
    """The body goes to a temporary file, which is gone once it is closed."""
    web.ranged = False
    web.files["/x.csv.gz"] = gzip.compress(WEBVID.encode())
    with open_file(f"{web.root}/x.csv.gz", tmp_path) as file:
        assert len(list(tmp_path.iterdir())) == 1
        assert gzip.decompress(file.read()).decode() == WEBVID
    assert not list(tmp_path.iterdir())
    with open_text(f"{web.root}/x.csv.gz") as lines:
        assert lines.read() == WEBVID


def test_a_file_that_changes_while_it_is_read_is_an_error(web: Files) -> None:
    """Half of one file and half of another are no file."""
    web.files["/x"] = bytes(20 * 2**20)
    with open_file(f"{web.root}/x") as file:
        file.read(10)
        web.files["/x"] = os.urandom(20 * 2**20)
        with pytest.raises(SourceError, match="changed while it was read"):
            file.read()


def test_a_place_on_the_web_cannot_lead_inside(web: Files) -> None:
    """The host that the user names may be one of the user's network; where it sends us is checked."""
    with pytest.raises(SourceError, match="private network"):
        find_files(f"{web.root}/moved", (".csv",), "table")
    with pytest.raises(SourceError, match="does not exist"):
        find_files(f"{web.root}/gone.csv", (".csv",), "table")


def test_tables_read_the_same_from_everywhere(place: str, web: Files, tmp_path: Path) -> None:
    """CSV, packed or not, and Parquet: local, in a bucket, over http, by name or as a range."""
    store = open_store(place)
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"URL": ["http://h/1", "http://h/2"], "TEXT": ["one", "two"]}), table)
    contents = {"a.csv": WEBVID.encode(), "a.csv.gz": gzip.compress(WEBVID.encode()), "p-0.parquet": table.read_bytes()}
    for name, data in contents.items():
        store.write(name, data)
        web.files[f"/{name}"] = data
    expected = list(read_records(WebVidSource(table=f"{place}/a.csv")))
    assert [record.caption for record in expected] == ["a dog", "a cat"]
    for root in (place, web.root):
        for name in ("a.csv", "a.csv.gz"):
            assert list(read_records(WebVidSource(table=f"{root}/{name}"))) == expected
        records = read_records(LaionSource(table=f"{root}/p-{{0..0}}.parquet"))
        assert [record.locator for record in records] == ["http://h/1", "http://h/2"]


def test_a_digest_tells_contents_apart(place: str, web: Files) -> None:
    """Another content is another source, wherever it lies; the same is the same."""
    store = open_store(place)
    for root, put in ((place, store.write), (web.root, lambda name, data: web.files.update({f"/{name}": data}))):
        digests = []
        for text in (WEBVID, WEBVID, WEBVID.replace("dog", "fox")):
            put("a.csv", text.encode())
            digests.append(source_digest(WebVidSource(table=f"{root}/a.csv")))
        assert digests[0] == digests[1] != digests[2], root
    web.files["/unstamped.csv"] = WEBVID.encode()
    (file,) = find_files(f"{web.root}/unstamped.csv", (".csv",), "table")
    assert digest_of(file) == hashlib.sha256(WEBVID.encode()).hexdigest()


def test_archives_lie_beside_their_table(place: str) -> None:
    """In name order, without the table; two of one name are refused where names make keys."""
    store = open_store(place)
    for name in ("001.tgz", "000.tgz", "anno.jsonl.tgz"):
        store.write(name, b"x")
    source = JourneyDBSource(table=f"{place}/anno.jsonl.tgz", archives=place)
    assert [uri.rpartition("/")[2] for uri in archive_uris(source)] == ["000.tgz", "001.tgz"]
    store.write("000.tar", b"x")
    with pytest.raises(SourceError, match="same name"):
        archive_uris(LaionSource(archives=place))


def test_a_folder_in_a_bucket_is_a_source(place: str) -> None:
    """Own files with captions beside them, local or not."""
    store = open_store(place)
    for name, data in {
        "a/x.jpg": b"1",
        "a/x.txt": b"a lake",
        "b.jpg": b"2",
        "b.json": b'{"caption": "a hill"}',
    }.items():
        store.write(name, data)
    source = FolderSource(name="mine", media="image", folder=place)
    records = list(read_records(source))
    assert [(record.key, record.caption) for record in records] == [("a/x", "a lake"), ("b", "a hill")]
    before = source_digest(source)
    store.write("b.json", b'{"caption": "a cave"}')
    assert source_digest(source) != before


def test_a_large_table_is_not_read_again(tmp_path: Path) -> None:
    """With a cache the digest is remembered as long as size and time of the last change are the same."""
    path, cache = tmp_path / "t.csv", tmp_path / "cache"

    def digest(text: str, time: int) -> str:
        path.write_text(text)
        os.utime(path, (time, time))
        facts = path.stat()
        return digest_of(RawFile(str(path), path.name, facts.st_size, str(facts.st_mtime_ns)), cache)

    first = digest("one", 1_000_000)
    assert digest("two", 1_000_000) == first, "known by size and time"
    assert digest("two", 1_000_001) != first
    assert digest("three", 1_000_001) != digest("two", 1_000_001)
    path.write_text("four")
    fresh = RawFile(str(path), path.name, 4, str(path.stat().st_mtime_ns))
    assert digest_of(fresh, tmp_path / "other") == digest_of(fresh)
    assert not (tmp_path / "other").exists(), "a file that was just written may change within its time stamp"
