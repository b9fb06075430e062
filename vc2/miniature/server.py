"""The web of the miniature world: real HTTP/1.1 with the faults of the real web; on loopback, unless a cluster works.

Paths answer whatever the host name in the request, so a fetcher connects both made-up hosts to this one address.

    /<name>.jpg                         laion/www/<name>.jpg
    /videos/<page_dir>/<videoid>.mp4    webvid/videos/...

A file that is not there is a 404. `laion/answers.json` names the paths that misbehave: `busy` (always 503), `hang`
(no answer within any deadline), `slow` (late, but sound), `truncated` (announces more than it sends). Bodies may lie
about what they are all by themselves.
"""

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

__all__ = ["serve"]

_KINDS = {".jpg": "image/jpeg", ".mp4": "video/mp4"}
_SAFE = re.compile(r"/(?:videos/[\w-]+/)?[\w-]+\.(?:jpg|mp4)")


@contextlib.contextmanager
def serve(
    world_root: Path, *, host: str = "127.0.0.1", hang_seconds: float = 30.0, slow_seconds: float = 0.2
) -> Iterator[str]:
    """Serve a world while the context lasts, on loopback or where machines of a cluster reach it; gives "host:port".
    Ends at once, whatever still hangs."""
    server = _Server(Path(world_root), host, hang_seconds, slow_seconds)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="miniature web", daemon=True
    )
    thread.start()
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        server.hang_up()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, root: Path, host: str, hang_seconds: float, slow_seconds: float) -> None:
        super().__init__((host, 0), _Handler)
        self.root = root
        self.answers: dict[str, str] = json.loads((root / "laion" / "answers.json").read_text())
        self.hang_seconds = hang_seconds
        self.slow_seconds = slow_seconds
        self.closing = threading.Event()
        self._open: set[socket.socket] = set()
        self._changed = threading.Condition()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._changed:
            self._open.discard(request)
            self._changed.notify_all()

    def hang_up(self) -> None:
        """End all connections and wait for their threads to be done with them."""
        with self._changed:
            for request in self._open:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)
            self._changed.wait_for(lambda: not self._open, timeout=5)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or a connection we hung up, is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "miniature"
    sys_version = ""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: what came of a fetch is the fetcher's to report."""

    def _answer(self, *, with_body: bool) -> None:
        path = urlsplit(self.path).path
        server = cast(_Server, self.server)
        manner = server.answers.get(path)
        if manner == "hang":
            server.closing.wait(server.hang_seconds)
        elif manner == "slow":
            server.closing.wait(server.slow_seconds)
        if manner == "busy":
            return self._error(503, with_body)
        body = self._body(path)
        if body is None:
            return self._error(404, with_body)
        self.send_response(200)
        self.send_header("Content-Type", _KINDS[Path(path).suffix])
        self.send_header("Content-Length", str(len(body)))
        if manner == "truncated":
            self.send_header("Connection", "close")
        self.end_headers()
        if with_body:
            self.wfile.write(body[: int(0.6 * len(body))] if manner == "truncated" else body)

    def _body(self, path: str) -> bytes | None:
        if not _SAFE.fullmatch(path):
            return None
        folder = "webvid" if path.startswith("/videos/") else "laion/www"
        try:
            return (cast(_Server, self.server).root / folder / path[1:]).read_bytes()
        except OSError:
            return None

    def _error(self, status: int, with_body: bool) -> None:
        body = f"<html><body><h1>{status}</h1></body></html>\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)
