"""The file server of the stack: what it hands out, to whom, and what it never does."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from flows.files import FileServer
from tests.browser import DESKTOP, browser_or_skip, watched
from tests.flows.stacks import wait_until
from vc2.eval.page import data_uri, element, page

PAGE = "<!doctype html><title>A &amp; B <script>alert(1)</script></title><p>hello"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store, and beside it what is not to be seen."""
    store = tmp_path / "store"
    for place, content in {
        "store/reports/abc/report.html": PAGE,
        "store/pages/lineage/abc.html": "<title>Lineage</title>",
        "store/pages/grids/a b&c#1.html": "<h1>no title",
        "store/samples/abc/0000.mp4": "0123456789",
        "store/samples/abc/manifest.json": "{}",
        "store/runs/full/abc/weights.safetensors": "secret weights",
        "store/objects/abcdef": "secret shard",
        "store/.tmp/half.html": "secret half",
        "store/empty.txt": "",
        "other/secret.html": "secret",
        "store-2/secret.html": "secret",
    }.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(content)
    (store / "out.html").symlink_to(tmp_path / "other" / "secret.html")
    (store / "folder").symlink_to(tmp_path / "other")
    (store / "round.html").symlink_to("round.html")
    return store


@pytest.fixture
def server(root: Path) -> Iterator[FileServer]:
    with FileServer(root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: FileServer, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.request(method, f"{server.url}{path}", headers=named, trust_env=False)


def raw(server: FileServer, path: str) -> bytes:
    """The answer to a path that no client would send as it is."""
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/reports/abc/report.html", "text/html; charset=utf-8"),
        ("/pages/grids/a%20b%26c%231.html", "text/html; charset=utf-8"),
        ("/samples/abc/0000.mp4", "video/mp4"),
        ("/samples/abc/manifest.json", "application/json"),
    ],
)
def test_what_is_made_to_be_looked_at_is_served(server: FileServer, root: Path, path: str, kind: str) -> None:
    answer = get(server, path)
    assert answer.status_code == 200
    assert answer.content == (root / httpx.URL(path).path.removeprefix("/")).read_bytes()
    assert answer.headers["content-type"] == kind
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert ("script-src" in answer.headers["content-security-policy"]) == path.endswith(".html")


@pytest.mark.parametrize(
    "path",
    [
        "/../other/secret.html",
        "/reports/../../other/secret.html",
        "/%2e%2e/other/secret.html",
        "/..%2fother%2fsecret.html",
        "/%2e%2e%2fother/secret.html",
        "/..%5cother%5csecret.html",
        "/%252e%252e/other/secret.html",
        "//etc/passwd",
        "/%2fetc/hosts.txt",
        "/../store-2/secret.html",
        "/out.html",
        "/folder/secret.html",
        "/round.html",
        "/.tmp/half.html",
        "/runs/full/abc/weights.safetensors",
        "/objects/abcdef",
        "/reports",
        "/reports/",
        "/reports/abc/report.html/",
        "/reports/abc/report.html%00.txt",
        "/reports//abc/report.html",
        "/%ff%fe.html",
        f"/{'x' * 5000}.html",
        "/nothing.html",
    ],
)
def test_nothing_else_is(server: FileServer, path: str) -> None:
    """Neither what lies outside, by whatever way, nor what is hidden, nor weights and shards, nor lists of folders."""
    answer = raw(server, path)
    assert answer.split(b" ", 2)[1] == b"404", answer[:200]
    assert b"secret" not in answer


@pytest.mark.parametrize(
    ("asked", "status", "content"),
    [
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-3", 206, b"789"),
        ("bytes=8-99", 206, b"89"),
        ("bytes=0-", 200, b"0123456789"),
        ("bytes=-99", 200, b"0123456789"),
        ("bytes=10-", 416, b""),
        ("bytes=-0", 416, b""),
        ("bytes=4-2", 200, b"0123456789"),
        ("bytes=0-1,4-5", 200, b"0123456789"),
        ("lines=1-2", 200, b"0123456789"),
    ],
)
def test_a_video_can_be_read_in_parts(server: FileServer, asked: str, status: int, content: bytes) -> None:
    answer = get(server, "/samples/abc/0000.mp4", Range=asked)
    assert (answer.status_code, answer.content) == (status, content)
    if status == 206:
        first = b"0123456789".index(content)
        assert answer.headers["content-range"] == f"bytes {first}-{first + len(content) - 1}/10"


def test_an_empty_file_is_empty(server: FileServer) -> None:
    assert (get(server, "/empty.txt").status_code, get(server, "/empty.txt").content) == (200, b"")
    assert get(server, "/empty.txt", Range="bytes=0-").status_code == 416


def test_what_did_not_change_is_not_sent_again(server: FileServer, root: Path) -> None:
    path = "/samples/abc/0000.mp4"
    tag = get(server, path).headers["etag"]
    assert get(server, path, If_None_Match=tag).status_code == 304
    (root / "samples/abc/0000.mp4").write_text("changed!")
    os.utime(root / "samples/abc/0000.mp4", (1, 1))
    assert get(server, path, If_None_Match=tag).status_code == 200
    assert get(server, path, Range="bytes=1-2", If_Range=tag).content == b"changed!"


def test_the_head_of_an_answer_can_be_asked_for(server: FileServer) -> None:
    answer = get(server, "/samples/abc/0000.mp4", "HEAD")
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "10", b"")
    assert get(server, "/", "HEAD").content == b""


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_written(server: FileServer, root: Path, method: str) -> None:
    assert get(server, "/reports/abc/report.html", method).status_code == 501
    assert (root / "reports/abc/report.html").read_text() == PAGE


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1:x", "localhost.evil.example", ""])
def test_a_page_of_somebody_else_learns_nothing(server: FileServer, host: str) -> None:
    """A name that was made to point here is refused, on every path."""
    for path in ("/", "/metrics", "/reports/abc/report.html", "/nothing"):
        answer = get(server, path, Host=host.format(port=server.server_port))
        assert answer.status_code == 421
        assert "hello" not in answer.text and "report" not in answer.text


def test_the_first_page_leads_to_all_pages(server: FileServer) -> None:
    """With their titles as words, whatever these are."""
    text = get(server, "/").text
    assert 'href="/reports/abc/report.html"' in text
    assert 'href="/pages/grids/a%20b%26c%231.html"' in text
    assert "Where it comes from" in text and ">Lineage<" in text
    assert "A &amp; B &lt;script&gt;" in text and "<script" not in text
    assert "secret" not in text


def test_a_store_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    with FileServer(tmp_path / "later") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        assert "Nothing to look at yet" in get(server, "/").text
        assert get(server, "/a.html").status_code == 404
        assert 'vc2_artifacts{kind="report"} 0' in get(server, "/metrics").text
        server.shutdown()
        thread.join()


def test_it_listens_on_loopback_alone(server: FileServer) -> None:
    found = [one.laddr for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN]
    assert {address.ip for address in found if address.port == server.server_port} == {"127.0.0.1"}


def test_a_viewer_who_leaves_is_no_error(server: FileServer, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (root / "long.mp4").write_bytes(bytes(50_000_000))
    others = threading.active_count()
    connection = socket.create_connection(("127.0.0.1", server.server_port))
    connection.sendall(b"GET /long.mp4 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    connection.recv(1000)
    connection.close()
    wait_until(lambda: threading.active_count() <= others, "the handler goes on", seconds=20)
    assert get(server, "/empty.txt").status_code == 200
    assert capfd.readouterr().err == ""


def test_a_page_of_ours_works_as_it_does_from_disk(server: FileServer, root: Path) -> None:
    """What is forbidden to all pages is nothing that ours need: styles, their script, pictures and videos inside."""
    inside = element("img", src=data_uri("image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), alt="")
    (root / "pages" / "ours.html").write_text(page("ours", element("main", inside)))
    with browser_or_skip() as browser:
        view = browser.new_context(viewport=DESKTOP).new_page()
        with watched(view) as trouble:
            view.goto(f"{server.url}/pages/ours.html")
            view.goto(f"{server.url}/")
    assert not trouble
