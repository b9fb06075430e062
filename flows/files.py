"""The third process of the stack: pages, pictures, videos and texts of a local store, for the browser beside the UI.

    /                what there is to look at: reports, lineage, grids, contact sheets, curves
    /<key>           a file of the store
    /metrics         figures for Prometheus (`flows.figures`)

A browser will not follow a link from a page of the server to a file on disk, so the stack serves these files itself. It
listens on loopback alone and, like the Prefect server beside it, asks nobody who they are. So it hands out nothing but
what is made to be looked at: neither weights nor shards, nothing hidden, nothing outside of the store. A name in the
`Host` header other than this machine's own means that a page of somebody else talks to us, under a name that it made
point here: refused. Pages load nothing from elsewhere; where a link in them leads is for whoever follows it to see.

`python -m flows.files --store FOLDER --port N` runs it alone.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from html import escape, unescape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote, urlsplit

from flows.figures import Figures
from vc2.storage import MEDIA_TYPES, media_type

__all__ = ["FileServer", "main"]

HOST = "127.0.0.1"
PIECE = 2**18  # bytes sent at a time
PATIENCE = 30.0  # seconds that a client may be silent
MOST_PAGES = 500  # on the first page, the newest ones
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "media-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STILL = POLICY.replace("script-src 'unsafe-inline'; ", "")  # of all that is no page
KINDS = {
    "reports": "Reports",
    "lineage": "Where it comes from",
    "grids": "Sample grids",
    "sheets": "Contact sheets",
    "curves": "Training curves",
}


class FileServer(ThreadingHTTPServer):
    """Serves a folder on loopback.

    Args:
        root: The store.
        port: 0: any that is free.
    """

    daemon_threads = True

    def __init__(self, root: Path, port: int = 0) -> None:
        self.root = root.resolve()
        self.figures = Figures(self.root)
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}"

    def is_own_name(self, host: str) -> bool:
        """Whether a request under this name can only be meant for us; the port may be that of a tunnel."""
        name, _, port = host.partition(":")
        return name in (HOST, "localhost") and (port.isdecimal() or not port)

    def find(self, path: str) -> Path | None:
        """The file of a URL's path, or None if there is nothing to be had."""
        try:
            parts = unquote(path, errors="strict").removeprefix("/").split("/")
        except UnicodeDecodeError:
            return None
        if any(not part or part.startswith(".") or {"\\", "\0"} & set(part) for part in parts):
            return None
        if Path(parts[-1]).suffix.lower() not in MEDIA_TYPES:
            return None
        try:
            found = self.root.joinpath(*parts).resolve(strict=True)
        except (OSError, RuntimeError):  # not there; too long a name; a loop of links
            return None
        return found if found.is_relative_to(self.root) and found.is_file() else None

    def handle_error(self, request: object, client_address: object) -> None:
        """Browsers hang up in the middle of a video; that is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, slots=True)
class _Page:
    """A page of the store."""

    key: str
    kind: str
    title: str
    modified: float


class _Handler(BaseHTTPRequestHandler):
    server: FileServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "vc2", ""
    timeout = PATIENCE

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Not every request is worth a line."""

    def _answer(self) -> None:
        if not self.server.is_own_name(self.headers.get("Host", "")):
            self._say(HTTPStatus.MISDIRECTED_REQUEST, f"this server is {self.server.url} and nobody else")
            return
        path = urlsplit(self.path).path
        if path in ("/", "/index.html"):
            self._send(HTTPStatus.OK, _index(self.server.root).encode(), media_type("index.html"), STILL)
        elif path == "/metrics":
            self._send(HTTPStatus.OK, self.server.figures.text().encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif (found := self.server.find(path)) is None:
            self._say(HTTPStatus.NOT_FOUND, "no page, picture, video or text of this store")
        else:
            self._send_file(found)

    def _send_file(self, path: Path) -> None:
        try:
            file = open(path, "rb")  # noqa: SIM115
        except OSError:
            self._say(HTTPStatus.NOT_FOUND, "it cannot be read")
            return
        with file:
            facts = os.fstat(file.fileno())
            headers = {
                "Accept-Ranges": "bytes",
                "ETag": f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"',
                "Last-Modified": formatdate(facts.st_mtime, usegmt=True),
                "Content-Type": media_type(path.name),
                "Content-Security-Policy": POLICY if path.suffix.lower() == ".html" else STILL,
            }
            if self.headers.get("If-None-Match") == headers["ETag"]:
                self._head(HTTPStatus.NOT_MODIFIED, headers)
                return
            asked = self.headers.get("Range", "")
            if self.headers.get("If-Range") not in (None, headers["ETag"]):
                asked = ""  # the part of another version is no use
            span = _span(asked, facts.st_size)
            if span is None:
                headers |= {"Content-Range": f"bytes */{facts.st_size}", "Content-Length": "0"}
                self._head(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers)
                return
            start, stop = span
            headers["Content-Length"] = str(stop - start)
            if (start, stop) == (0, facts.st_size):
                self._head(HTTPStatus.OK, headers)
            else:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{facts.st_size}"
                self._head(HTTPStatus.PARTIAL_CONTENT, headers)
            if self.command == "GET":
                self._copy(file, start, stop)

    def _copy(self, file: BinaryIO, start: int, stop: int) -> None:
        file.seek(start)
        while start < stop and (piece := file.read(min(PIECE, stop - start))):
            self.wfile.write(piece)
            start += len(piece)
        if start < stop:  # cut off meanwhile: what was promised cannot be kept
            self.close_connection = True

    def _say(self, status: HTTPStatus, words: str) -> None:
        self._send(status, f"{words}\n".encode(), media_type("answer.txt"))

    def _send(self, status: HTTPStatus, content: bytes, kind: str, policy: str = STILL) -> None:
        length = {"Content-Length": str(len(content)), "Content-Type": kind, "Content-Security-Policy": policy}
        self._head(status, length)
        if self.command == "GET":
            self.wfile.write(content)

    def _head(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response(status)
        always = {
            "Cache-Control": "no-cache",  # pages are written anew while a run goes on
            "Cross-Origin-Resource-Policy": "same-site",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        for name, value in (headers | always).items():
            self.send_header(name, value)
        self.end_headers()


def _span(asked: str, size: int) -> tuple[int, int] | None:
    """The bytes that a Range header asks for, all of them if it cannot be read; None if there are no such bytes."""
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", asked.strip(), re.ASCII)
    if not found or found.groups() == ("", ""):
        return 0, size
    first, last = found.groups()
    if not first:  # the last so many
        return (max(0, size - int(last)), size) if int(last) and size else None
    start, stop = int(first), min(size, int(last) + 1 if last else size)
    if last and int(last) < int(first):
        return 0, size
    return (start, stop) if start < size else None


# ---- the first page ----


def _pages(root: Path) -> Iterator[_Page]:
    for path in (*root.glob("reports/*/*.html"), *root.glob("pages/**/*.html")):
        try:
            modified = path.stat().st_mtime
            with open(path, "rb") as file:
                head = file.read(2**16).decode(errors="replace")
        except OSError:  # gone meanwhile
            continue
        parts = path.relative_to(root).parts
        title = re.search(r"<title[^>]*>(.*?)</title>", head, re.DOTALL | re.IGNORECASE)
        name = " ".join(unescape(title[1]).split()) if title else "/".join(parts[1:])
        yield _Page("/".join(parts), parts[1] if parts[0] == "pages" else parts[0], name, modified)


def _index(root: Path) -> str:
    """Links to all pages, newest first, by kind. Titles may hold the words of strangers."""
    pages = sorted(_pages(root), key=lambda page: -page.modified)[:MOST_PAGES]
    kinds = [*KINDS, *sorted({page.kind for page in pages} - set(KINDS))]
    parts = []
    for kind in kinds:
        lines = [
            f'<li><a href="/{escape(quote(page.key))}">{escape(page.title)}</a> '
            f"<time>{time.strftime('%Y-%m-%d %H:%M', time.localtime(page.modified))}</time> "
            f"<code>{escape(page.key)}</code></li>"
            for page in pages
            if page.kind == kind
        ]
        if lines:
            parts.append(f"<h2>{escape(KINDS.get(kind, kind))}</h2>\n<ul>{''.join(lines)}</ul>")
    body = "\n".join(parts) or "<p>Nothing to look at yet: pages appear as stages end.</p>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>vc2: {escape(root.name)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(str(root))}</h1>\n{body}\n</body></html>\n"
    )


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "h1{font-size:1.2rem;overflow-wrap:anywhere}h2{font-size:1rem;margin:2rem 0 .5rem}ul{list-style:none;padding:0}"
    "li{padding:.3rem 0;border-top:1px solid #8884}time,code{font-size:.8rem;opacity:.7;overflow-wrap:anywhere}"
)


def main(arguments: list[str] | None = None) -> int:
    """Serve a store until the process is ended."""
    parser = argparse.ArgumentParser(prog="python -m flows.files", description="Serve the pages of a local store.")
    parser.add_argument("--store", type=Path, required=True, help="folder")
    parser.add_argument("--port", type=int, required=True, help="on 127.0.0.1")
    options = parser.parse_args(arguments)
    try:
        server = FileServer(options.store, options.port)
    except OSError as error:
        print(f"error: port {options.port}: {error.strerror}; choose another one", file=sys.stderr)
        return 1
    with server:
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
