"""Downloads against a real server on loopback that misbehaves in every way we know."""

import asyncio
import contextlib
import datetime
import email.utils
import gzip
import hashlib
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vc2.data.config import FetchConfig, FolderSource, ShardStage
from vc2.data.fetch import fetch_rows
from vc2.data.ledger import read_part
from vc2.data.rejects import RejectReason
from vc2.data.sources import Record
from vc2.data.web import Web as Client
from vc2.data.web import is_public
from vc2.storage import LocalStore

HOST = "pictures.test"
OPT_OUTS = {
    "noai": ("X-Robots-Tag", "noai"),
    "noimageai": ("X-Robots-Tag", "all, NoImageAI"),
    "noindex": ("X-Robots-Tag", "somebot: noindex, nofollow"),
    "noimageindex": ("X-Robots-Tag", "noimageindex"),
    "none": ("X-Robots-Tag", "somebot: none"),
    "tdm": ("tdm-reservation", "1"),
}
TRAPS = {
    "linklocal": "http://169.254.169.254/latest/meta-data",
    "mapped": "http://[::ffff:127.0.0.1]/x",
    "file": "file:///etc/hostname",
    "octal": "http://0177.0.0.1/x",
}


class Web:
    """The server: how it answers a path, and how often it was asked."""

    def __init__(self, picture: bytes) -> None:
        self.picture = picture
        self.asked: Counter[str] = Counter()
        self.hosts: set[str] = set()
        self.agents: set[str] = set()
        self.starts: list[float] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                web.asked[self.path] += 1
                web.hosts.add(self.headers["Host"])
                web.agents.add(self.headers["User-Agent"])
                web.starts.append(time.monotonic())
                with web.lock:
                    web.at_once += 1
                    web.most_at_once = max(web.most_at_once, web.at_once)
                web.answer(self, self.path.strip("/").split("-")[0])
                with web.lock:
                    web.at_once -= 1

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
        elif how == "twice" and self.asked[to.path] <= 2:
            body, status = b"", 503
        elif how == "closed":
            body, status, headers = b"", 429, {"Retry-After": "3600"}
        elif how == "dated" and self.asked[to.path] == 1:
            body, status, headers = b"", 503, {"Retry-After": email.utils.formatdate(time.time() + 1, usegmt=True)}
        elif how == "bomb":
            body, headers = gzip.compress(bytes(10**6)), {"Content-Encoding": "gzip"}
        elif how == "preview":
            headers = {"X-Robots-Tag": "all, max-image-preview:none"}
        elif how in OPT_OUTS:
            headers = dict([OPT_OUTS[how]])
        elif how == "empty":
            body = b""
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
        elif how in TRAPS:
            body, status, headers = b"", 302, {"Location": TRAPS[how]}
        elif how == "circle":
            body, status, headers = b"", 302, {"Location": to.path}
        elif how == "silent":
            self.closing.wait(20)
            return
        to.send_response(status)
        if how == "endless":
            to.send_header("Connection", "close")
            to.close_connection = True
            to.end_headers()
            self.pour(to, body)
            return
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

    def pour(self, to: BaseHTTPRequestHandler, body: bytes) -> None:
        try:
            to.wfile.write(body)
            while not self.closing.wait(0.001):
                to.wfile.write(bytes(2**16))
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
    asked = {"idle_timeout": 2.0, "total_timeout": 6.0, "retries": 1, "backoff": 0.01, "max_bytes": 10**6} | fetch
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
    "dated": None,
    "redirect": None,
    "preview": None,
    "twice": RejectReason.HTTP_STATUS,  # one attempt more would do
    "empty": RejectReason.NOT_MEDIA,
    "bomb": RejectReason.NOT_MEDIA,
    "endless": RejectReason.TOO_LARGE,
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
    **dict.fromkeys(TRAPS, RejectReason.FORBIDDEN_ADDRESS),
    **dict.fromkeys(OPT_OUTS, RejectReason.OPT_OUT),
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
    assert web.agents == {"vc2 (dataset preparation)"}
    assert not list((tmp_path / "work" / "tmp").iterdir())


def test_addresses_inside_a_network_are_refused(web: Web, tmp_path: Path) -> None:
    """A list of URLs cannot make us ask machines around us, by number, by name or by another scheme."""
    urls = [
        f"http://127.0.0.1:{web.port}/good",
        f"http://localhost:{web.port}/good",
        f"http://[::ffff:127.0.0.1]:{web.port}/good",
        f"http://2130706433:{web.port}/good",
        f"http://0x7f.1:{web.port}/good",
        f"http://0177.0.0.1:{web.port}/good",
        f"http://127.1:{web.port}/good",
        f"http://127.0.0.1.:{web.port}/good",
        f"http://user:word@pictures.test:{web.port}/good",
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/hostname",
    ]
    lines = fetched(stage(web, connect_to={}), urls, tmp_path)
    assert [line["reason"] for line in lines] == [RejectReason.FORBIDDEN_ADDRESS] * len(urls)
    assert not web.asked
    for named in ({"connect_to": {f"localhost:{web.port}": f"127.0.0.1:{web.port}"}},
                  {"connect_to": {}, "allow_hosts": ["localhost"]},
                  {"connect_to": {}, "allow_hosts": [f"localhost:{web.port}"]}):  # fmt: skip
        (line,) = fetched(stage(web, **named), urls[1:2], tmp_path / str(len(str(named))))
        assert line["reason"] is None, named


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///x", "http://h:99999/", "http://h:0/", f"http://{'a' * 70}.com/", "http://a..b/", "http://.../",
     "http://xn--a/", "http://127.0.0.1\\@good.com/", "http://[::1", "http://\x00/", "http://no such host/"],
)  # fmt: skip
def test_what_is_hardly_a_url_is_a_reason(web: Web, tmp_path: Path, url: str) -> None:
    """Whatever stands in a table, the other rows are fetched."""
    bad, good = fetched(stage(web, retries=0), [url, f"http://{HOST}/good"], tmp_path)
    assert bad["reason"] in (RejectReason.UNPARSABLE, RejectReason.CONNECTION) and good["reason"] is None


def certificate(path: Path) -> Path:
    """A key and a certificate that it signed itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    signed = (
        builder.not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(secret + signed.public_bytes(pem))
    return path


def test_a_certificate_that_nobody_signed_is_refused(web: Web, tmp_path: Path) -> None:
    """https means the host that the URL names, also where `connect_to` leads elsewhere."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(tmp_path / "cert.pem"))
    web.server.socket = context.wrap_socket(web.server.socket, server_side=True)
    (line,) = fetched(stage(web, retries=0), [f"https://{HOST}/good"], tmp_path)
    assert (line["reason"], line["detail"]) == (RejectReason.CONNECTION, "ClientConnectorCertificateError")


GARBAGE = {
    "noise": bytes(range(256)),
    "nothing": b"",
    "headers": b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"a" * 4000) for n in range(500)) + b"\r\n",
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabc",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabc",
    "place": b"HTTP/1.1 302 x\r\nLocation: http://\xff\xfe:99999999/\r\nContent-Length: 0\r\n\r\n",
    "date": b"HTTP/1.1 503 x\r\nRetry-After: Fri, 99 Foo 99999 00:00:00 GMT\r\nContent-Length: 0\r\n\r\n",
    "number": b"HTTP/1.1 503 x\r\nRetry-After: nan\r\nContent-Length: 0\r\n\r\n",
}


def test_answers_that_are_no_http_are_reasons(web: Web, tmp_path: Path) -> None:
    """Noise, oversized headers, impossible lengths and dates: no row stops the others."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):  # closed
                while True:
                    connection, _ = server.accept()
                    with connection, contextlib.suppress(OSError, IndexError):
                        how = connection.recv(2**16).split(b" ")[1].strip(b"/").decode()
                        connection.sendall(GARBAGE[how])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        config = stage(web, retries=0, connect_to={"garbage.test": f"127.0.0.1:{server.getsockname()[1]}"})
        lines = fetched(config, [f"http://garbage.test/{how}" for how in GARBAGE], tmp_path)
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    expected = {RejectReason.CONNECTION, RejectReason.HTTP_STATUS, RejectReason.UNPARSABLE, RejectReason.TRUNCATED}
    assert {line["reason"] for line in lines} <= expected
    assert lines[list(GARBAGE).index("number")]["reason"] == RejectReason.HTTP_STATUS


@pytest.mark.parametrize(
    ("address", "expected"),
    [("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True),
     ("10.0.0.1", False), ("127.0.0.1", False), ("100.64.0.1", False), ("224.0.0.1", False), ("0.0.0.0", False),
     ("::1", False), ("fe80::1%eth0", False), ("fc00::1", False), ("ff02::1", False), ("::ffff:127.0.0.1", False),
     ("2002:7f00:1::", False), ("64:ff9b::7f00:1", False), ("::127.0.0.1", False), ("fec0::1", False)],
)  # fmt: skip
def test_an_address_is_public_in_every_spelling_or_in_none(address: str, expected: bool) -> None:
    """What an IPv6 address stands for counts, not how it is written."""
    assert is_public(address) is expected


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


def test_a_host_is_asked_gently(web: Web, tmp_path: Path) -> None:
    """Never more requests at a time than allowed, and no two closer than the interval."""
    config = stage(web, per_host=2, host_interval=0.12, total_timeout=2.5)
    begun = time.monotonic()
    lines = fetched(config, [f"http://{HOST}/good-{number}" for number in range(24)], tmp_path)
    assert all(line["reason"] is None for line in lines), "waiting for its turn does not take a row's time"
    assert web.most_at_once <= 2
    assert web.starts[-1] - begun >= 23 * 0.12


def test_a_host_that_asks_for_peace_gets_it(web: Web, tmp_path: Path) -> None:
    """`Retry-After` beyond a row's time ends all rows of that host, unasked."""
    config = stage(web, per_host=1)
    lines = fetched(config, [f"http://{HOST}/closed", *(f"http://{HOST}/good-{n}" for n in range(5))], tmp_path)
    assert [line["reason"] for line in lines] == [RejectReason.HTTP_STATUS] * 6
    assert sum(web.asked.values()) == 1
    (later,) = fetched(config, [f"http://{HOST}/good"], tmp_path / "next part")
    assert later["reason"] == RejectReason.HTTP_STATUS and sum(web.asked.values()) == 1


def test_a_server_may_fail_twice(web: Web, tmp_path: Path) -> None:
    """With two retries the third answer counts."""
    (line,) = fetched(stage(web, retries=2), [f"http://{HOST}/twice"], tmp_path)
    assert line["reason"] is None and web.asked["/twice"] == 3


def test_opting_out_is_honoured_unless_told_otherwise(web: Web, tmp_path: Path) -> None:
    """`opt_out: false` takes what the headers would keep back."""
    lines = fetched(stage(web, opt_out=False), [f"http://{HOST}/{how}" for how in OPT_OUTS], tmp_path)
    assert all(line["reason"] is None for line in lines)


def test_bytes_must_be_those_that_the_row_promises(web: Web, tmp_path: Path) -> None:
    """sha256 and md5 of a table are compared; one that differs rejects the row."""
    good = {"sha256": hashlib.sha256(web.picture).hexdigest(), "md5": hashlib.md5(web.picture).hexdigest()}
    extras = [good, {"sha256": "0" * 64}, {"md5": "0" * 32}, {}]
    records = [
        Record(row, f"k{row}", f"http://{HOST}/good-{row}", "x", extra=extra) for row, extra in enumerate(extras)
    ]
    store = LocalStore(tmp_path / "store")
    counts = fetch_rows(store, "ledgers/x", "part-00000", records, stage(web), tmp_path / "work")
    reasons = [line["reason"] for line in read_part(store, "ledgers/x", "part-00000").to_pylist()]
    assert reasons == [None, RejectReason.HASH_MISMATCH, RejectReason.HASH_MISMATCH, None]
    assert counts.rows == 4 and counts.reasons == {"hash_mismatch": 2} and counts.bytes >= 2 * len(web.picture)


def test_a_download_knows_its_hash(web: Web, tmp_path: Path) -> None:
    """What is written is what was sent."""

    async def run() -> None:
        config = FetchConfig(connect_to={HOST: f"127.0.0.1:{web.port}"})
        async with Client(config) as client:
            body = await client.download(f"http://{HOST}/good", tmp_path / "x")
        assert (body.size, body.sha256) == (len(web.picture), hashlib.sha256(web.picture).hexdigest())

    asyncio.run(run())
    assert (tmp_path / "x").read_bytes() == web.picture
