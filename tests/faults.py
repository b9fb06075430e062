"""A network that fails: a proxy on a real loopback socket between a client and an HTTP server.

Calls fail by a seeded draw, each in one of the ways in which networks and stores do; what was changed in the server by
a call whose answer got lost stays changed, as in life.

    slow_down     503 SlowDown, nothing is done
    reset         the connection is closed before anything is sent on
    torn_request  half of the body goes to the server, then the connection to it is closed
    torn_answer   the server has done what was asked, half of its answer comes back
    lost_answer   the server has done what was asked, nothing comes back
    stall         everything as it should be, after a while

During an *outage* connections are closed without an answer.
"""

import http.client
import random
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

__all__ = ["WAYS", "FaultyProxy"]

WAYS = ("slow_down", "reset", "torn_request", "torn_answer", "lost_answer", "stall")
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class FaultyProxy:
    """Passes calls on to `endpoint` while a `with` block runs; a share `rate` of them fails."""

    def __init__(self, endpoint: str, *, rate: float = 0.1, seed: int = 0, stall: float = 1.0) -> None:
        self.rate, self.stall = rate, stall
        self.is_out = False
        self.counts: Counter[str] = Counter()
        self._draws, self._lock = random.Random(seed), threading.Lock()
        self._target = urlsplit(endpoint)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def way(self) -> str:
        """What happens to the next call."""
        with self._lock:
            if self.is_out:
                found = "outage"
            else:
                found = self._draws.choice(WAYS) if self._draws.random() < self.rate else "passed"
            self.counts[found] += 1
            return found

    def ask(
        self, method: str, path: str, headers: dict[str, str], body: bytes, *, cut: bool
    ) -> tuple[int, dict, bytes]:
        """The server's answer; with `cut` it gets half of the body, and there is none."""
        connection = http.client.HTTPConnection(self._target.hostname or "", self._target.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body[: len(body) // 2] if cut else body)
            if cut:
                return 0, {}, b""
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_call(self) -> None:
                way = proxy.way()
                if way == "outage":
                    return self.hang_up()
                body = self.body()
                if way == "reset":
                    return self.hang_up()
                if way == "slow_down":
                    return self.answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
                if way == "stall":
                    time.sleep(proxy.stall)
                headers = {
                    name: value
                    for name, value in self.headers.items()
                    if name.lower() not in ("transfer-encoding", "expect", "connection", "content-length")
                } | ({"Content-Length": str(len(body))} if body or self.command in ("PUT", "POST") else {})
                try:
                    cut = way == "torn_request" and len(body) > 1
                    status, given, data = proxy.ask(self.command, self.path, headers, body, cut=cut)
                except OSError:
                    return self.hang_up()
                if cut or way == "lost_answer":
                    return self.hang_up()
                self.answer(status, given, data, torn=way == "torn_answer")

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one_call

            def body(self) -> bytes:
                if self.headers.get("Expect", "").lower() == "100-continue":
                    self.send_response_only(100)
                    self.end_headers()
                if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                    return b"".join(iter(self.chunk, b""))
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def chunk(self) -> bytes:
                size = int(self.rfile.readline().split(b";")[0], 16)
                data = self.rfile.read(size)
                self.rfile.readline()
                return data

            def answer(self, status: int, headers: dict[str, str], data: bytes, *, torn: bool = False) -> None:
                self.send_response_only(status)
                length = headers.pop("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
                for name, value in headers.items():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command == "HEAD":
                    return
                self.wfile.write(data[: len(data) // 2] if torn else data)
                if torn:
                    self.hang_up()

            def hang_up(self) -> None:
                self.close_connection = True
                try:
                    self.connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:  # the client has gone
                    pass

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler
