"""Prefect's server, for the browsers of this machine and no page of somebody else.

It asks nobody who they are, and a run is code that is run. Loopback keeps other machines away, not the pages that a
browser here has open. Such a page may

    make its own name point to 127.0.0.1, and talk to the server as if it were its own    refused by the name
    open a web socket under the server's name; no rule of the browser forbids that        refused by the page's origin
    send what needs no leave, under the server's name, and read no answer                 left to the server: it takes
                                                                                          nothing but JSON, which needs
                                                                                          one (CORS, `flows.server`)

And for its own database: `collect_aside` keeps a wait of a minute out of it.
"""

import gc
import itertools
import threading
import time
from urllib.parse import urlsplit

from prefect.server.api import server
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

__all__ = ["collect_aside", "create_app"]

NAMES = ("127.0.0.1", "localhost")
FULL_COLLECTION = 30  # seconds from one to the next; the young are collected every second


def create_app() -> ASGIApp:
    """The server with its UI, as uvicorn starts it.

    The checks stand before the server, not in it: its own automations call it from inside, under another name.
    """
    collect_aside()
    return TrustedHostMiddleware(OwnSockets(server.create_app()), allowed_hosts=list(NAMES))


def collect_aside() -> None:
    """Collect garbage in a thread of its own from now on, and never in the one that runs the event loop.

    A statement of SQLite that failed is left in a cycle, with its cursor. Who collects it resets it, and waits for its
    connection. If the connection waits for the right to write, and that is with a request which the loop has to go on
    with, then the loop waits for itself: nothing is answered until SQLite gives up, after a minute.
    """

    def collect() -> None:
        for second in itertools.count(1):
            time.sleep(1)
            gc.collect(1 if second % FULL_COLLECTION else 2)

    gc.disable()
    threading.Thread(target=collect, name="garbage", daemon=True).start()


class OwnSockets:
    """Refuses web sockets to pages of somebody else. Workers and flow runs are no pages and name no origin."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and not _is_own(Headers(scope=scope).get("origin")):
            await WebSocketClose()(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _is_own(origin: str | None) -> bool:
    try:
        return origin is None or urlsplit(origin).hostname in NAMES
    except ValueError:
        return False
