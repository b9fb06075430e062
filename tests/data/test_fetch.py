"""Downloads against a real server on loopback that misbehaves in every way we know."""

import json
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from vc2.data.config import FolderSource, JourneyDBSource, ShardStage
from vc2.data.fetch import fetch_archive, fetch_rows
from vc2.data.ledger import collect, is_last, part_names, read_part
from vc2.data.rejects import RejectReason
from vc2.data.sources import Record
from vc2.storage import LocalStore

HOST = "pictures.test"


class Web:
    """The server: how it answers a path, and how often it was asked."""

    def __init__(self, picture: bytes) -> None:
        self.picture = picture
        self.asked: Counter[str] = Counter()
        self.hosts: set[str] = set()
        self.closing = threading.Event()
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                web.asked[self.path] += 1
                web.hosts.add(self.headers["Host"])
                web.answer(self, self.path.strip("/").split("-")[0])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def answer(self, to: BaseHTTPRequestHandler, how: str) -> None:
        body, status, headers, length = self.picture, 200, {}, None
        if how == "missing":
            body, status = b"", 404
        elif how == "forbidden":
            body, status = b"", 403
        elif how == "broken":
            body, status = b"", 503
        elif how == "busy" and self.asked[to.path] == 1:
            body, status, headers = b"", 429, {"Retry-After": "0"}
        elif how == "html":
            body = b"<!DOCTYPE html><html><body>gone</body></html>" * 50
        elif how == "corrupt":
            body = self.picture[:600]
        elif how == "short":
            length = len(body) + 1000
        elif how == "huge":
            length = 10**9
        elif how == "redirect":
            body, status, headers = b"", 302, {"Location": "/good-again"}
        elif how == "trap":
            body, status, headers = b"", 302, {"Location": f"http://127.0.0.1:{self.port}/good-inside"}
        elif how == "circle":
            body, status, headers = b"", 302, {"Location": to.path}
        elif how == "silent":
            self.closing.wait(20)
            return
        to.send_response(status)
        for name, value in headers.items():
            to.send_header(name, value)
        to.send_header("Content-Length", str(len(body) if length is None else length))
        if length is not None:
            to.send_header("Connection", "close")
            to.close_connection = True
        to.end_headers()
        try:
            if how == "drip":
                for number in range(len(body)):
                    to.wfile.write(body[number : number + 1])
                    to.wfile.flush()
                    if self.closing.wait(0.05):
                        return
            to.wfile.write(body)
        except OSError:
            pass

    @property
    def port(self) -> int:
        return self.server.server_port

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def web(media: Any) -> Iterator[Web]:
    web = Web(media.jpeg(3))
    yield web
    web.close()


def stage(web: Web, **fetch: Any) -> ShardStage:
    asked = {"idle_timeout": 1.0, "total_timeout": 4.0, "retries": 1, "backoff": 0.01, "max_bytes": 10**6} | fetch
    asked.setdefault("connect_to", {HOST: f"127.0.0.1:{web.port}"})
    source = FolderSource(name="mine", media="image", folder=".", table=None)
    form = {"num_frames": 1}
    return ShardStage.model_validate({"source": source, "form": form, "fetch": asked})


def fetched(config: ShardStage, urls: list[str], tmp_path: Path) -> list[dict[str, Any]]:
    records = [Record(row, f"k{row}", url, "caption") for row, url in enumerate(urls)]
    store = LocalStore(tmp_path / "store")
    fetch_rows(store, "ledgers/x", "part-00000", records, config, tmp_path / "work")
    return read_part(store, "ledgers/x", "part-00000").to_pylist()


EXPECTED = {
    "good": None,
    "busy": None,
    "redirect": None,
    "missing": RejectReason.HTTP_404,
    "forbidden": RejectReason.HTTP_STATUS,
    "broken": RejectReason.HTTP_STATUS,
    "circle": RejectReason.HTTP_STATUS,
    "html": RejectReason.NOT_MEDIA,
    "corrupt": RejectReason.UNDECODABLE,
    "short": RejectReason.TRUNCATED,
    "huge": RejectReason.TOO_LARGE,
    "silent": RejectReason.TIMEOUT,
    "drip": RejectReason.TIMEOUT,
    "trap": RejectReason.FORBIDDEN_ADDRESS,
}


def test_every_way_to_fail_has_its_reason_and_good_bytes_are_packed(web: Web, tmp_path: Path) -> None:
    """Status, length, size, silence, content: each is checked; what passes lies in one blob, as it was sent."""
    lines = fetched(stage(web), [f"http://{HOST}/{how}-x" for how in EXPECTED], tmp_path)
    assert {how: line["reason"] for how, line in zip(EXPECTED, lines, strict=True)} == EXPECTED
    blobs = {line["blob"] for line in lines if line["reason"] is None}
    assert len(blobs) == 1
    for line in lines:
        if line["reason"] is None:
            key = f"ledgers/x/{line['blob']}"
            assert LocalStore(tmp_path / "store").read_range(key, line["offset"], line["size"]) == web.picture
            assert (line["width"], line["height"], line["frames"]) == (96, 64, 1)
    assert web.asked["/busy-x"] == 2 and web.asked["/broken-x"] == 2 and web.asked["/missing-x"] == 1
    assert web.hosts == {HOST}, "the Host header is that of the URL"
    assert not list((tmp_path / "work" / "tmp").iterdir())


def test_addresses_inside_a_network_are_refused(web: Web, tmp_path: Path) -> None:
    """A list of URLs cannot make us ask machines around us, by number, by name or by another scheme."""
    urls = [
        f"http://127.0.0.1:{web.port}/good",
        f"http://localhost:{web.port}/good",
        f"http://[::ffff:127.0.0.1]:{web.port}/good",
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/hostname",
    ]
    lines = fetched(stage(web, connect_to={}), urls, tmp_path)
    assert [line["reason"] for line in lines] == [RejectReason.FORBIDDEN_ADDRESS] * len(urls)
    assert not web.asked
    allowed = stage(web, connect_to={f"localhost:{web.port}": f"127.0.0.1:{web.port}"})
    assert fetched(allowed, urls[1:2], tmp_path / "allowed")[0]["reason"] is None


def test_the_ledger_does_not_depend_on_timing(web: Web, tmp_path: Path) -> None:
    """One request at a time or eight: the same part, byte for byte, and the same blob."""
    urls = [f"http://{HOST}/{how}-{number}" for number in range(3) for how in ("good", "missing", "busy", "redirect")]
    found = []
    for concurrency in (1, 8):
        place = tmp_path / str(concurrency)
        fetched(stage(web, concurrency=concurrency), urls, place)
        web.asked.clear()
        store = LocalStore(place / "store")
        found.append({entry.key: store.read(entry.key) for entry in store.list("ledgers/")})
    assert found[0] == found[1] and len(found[0]) == 2


def test_a_server_that_is_not_there_is_a_reason(web: Web, tmp_path: Path) -> None:
    """Connections that fail are tried again, then told."""
    config = stage(web, connect_to={HOST: "127.0.0.1:9"})
    begun = time.monotonic()
    (line,) = fetched(config, [f"http://{HOST}/good"], tmp_path)
    assert line["reason"] == RejectReason.CONNECTION
    assert time.monotonic() - begun < 30


def test_local_files_stay_where_they_are(media: Any, tmp_path: Path) -> None:
    """Files of a tree are probed and hashed, not copied; one that is missing is a reason."""
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").write_bytes(media.mp4(10, 25))
    source = FolderSource(name="mine", media="video", folder=str(tmp_path))
    store = LocalStore(tmp_path / "store")
    records = [Record(0, "a", "v/a.mp4", "x"), Record(1, "b", "v/b.mp4", "x")]
    fetch_rows(store, "ledgers/x", "part-00000", records, ShardStage(source=source), tmp_path / "work")
    found, missing = read_part(store, "ledgers/x", "part-00000").to_pylist()
    assert (found["rate"], found["frames"], found["blob"], found["locator"]) == ("25", 10, None, "v/a.mp4")
    assert missing["reason"] == RejectReason.MISSING_FILE
    assert [entry.key for entry in store.list("ledgers/")] == ["ledgers/x/part-00000.parquet"]


def test_archives_are_read_once_and_joined_by_uuid(media: Any, tmp_path: Path) -> None:
    """Members are packed in parts that a restart goes on from; what is alone on either side is told; cuts too."""
    ids = [f"0a1b2c3d-0000-4000-8000-00000000000{number}" for number in range(6)]
    (tmp_path / "imgs").mkdir()
    path = tmp_path / "imgs" / "000.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for number in range(5):
            data = media.jpeg(number) if number != 2 else media.jpeg(number)[:500]
            member = tarfile.TarInfo(f"000/{ids[number]}.jpg")
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    table = tmp_path / "anno.jsonl"
    table.write_text(
        "\n".join(json.dumps({"img_path": f"./0/{ids[n]}.jpg", "prompt": f"p {n}"}) for n in (5, 0, 1, 2, 3))
    )
    source = JourneyDBSource(table=str(table), archives=str(path.parent))
    config = ShardStage.model_validate({"source": source, "form": {"num_frames": 1}, "fetch": {"part_rows": 2}})
    store = LocalStore(tmp_path / "store")
    fetch_archive(store, "ledgers/x", 0, path, config, tmp_path / "work")
    names = part_names(store, "ledgers/x")
    assert names == ["part-000-00000", "part-000-00001", "part-000-00002"]
    assert [is_last(store, "ledgers/x", name) for name in names] == [False, False, True]
    whole = {entry.key: store.read(entry.key) for entry in store.list("ledgers/")}
    for name in names[1:]:
        store.delete(f"ledgers/x/{name}.parquet")
    fetch_archive(store, "ledgers/x", 0, path, config, tmp_path / "work", first=1)
    assert {entry.key: store.read(entry.key) for entry in store.list("ledgers/")} == whole
    rows, alone = collect(store, "ledgers/x", config)
    assert rows["reason"].to_pylist() == [RejectReason.UNMATCHED_ROW, None, None, RejectReason.UNDECODABLE, None]
    assert rows["caption"].to_pylist()[1:3] == ["p 0", "p 1"]
    assert alone["key"].to_pylist() == [ids[4]]
    path.write_bytes(path.read_bytes()[:-2000])
    other = LocalStore(tmp_path / "cut")
    fetch_archive(other, "ledgers/x", 0, path, config, tmp_path / "work")
    _, alone = collect(other, "ledgers/x", config)
    assert any("end of archive" in locator for locator in alone["locator"].to_pylist())
