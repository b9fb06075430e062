"""Prefect's server, for the browsers of this machine and no page of somebody else.

It asks nobody who they are, and a run is code that is run. Loopback keeps other machines away, not the pages that a
browser here has open. Such a page may

    make its own name point to 127.0.0.1, and talk to the server as if it were its own    refused by the name
    open a web socket under the server's name; no rule of the browser forbids that        refused by the page's origin
    send what needs no leave, under the server's name, and read no answer                 left to the server: it takes
                                                                                          nothing but JSON, which needs
                                                                                          one (CORS, `flows.server`)
"""

from urllib.parse import urlsplit

from prefect.server.api import server
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

__all__ = ["create_app"]

NAMES = ("127.0.0.1", "localhost")


def create_app() -> ASGIApp:
    """The server with its UI, as uvicorn starts it.

    The checks stand before the server, not in it: its own automations call it from inside, under another name.
    """
    return TrustedHostMiddleware(OwnSockets(server.create_app()), allowed_hosts=list(NAMES))


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
