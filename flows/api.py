"""Prefect's server, for the browsers of this machine and no page of somebody else.

It asks nobody who they are, and a run is code that is run. Loopback keeps other machines away, not the pages that a
browser here has open: one of those can make its own name point to 127.0.0.1 and then talk to the server as if it were
its own. So a request under any other name than this machine's is refused. (Without that trick a page may send, but only
what needs no leave: `PREFECT_SERVER_CORS_ALLOWED_ORIGINS` in `flows.server`.)
"""

from prefect.server.api import server
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp

__all__ = ["create_app"]

NAMES = ("127.0.0.1", "localhost")


def create_app() -> ASGIApp:
    """The server with its UI, as uvicorn starts it.

    The check stands before the server, not in it: its own automations call it from inside, under another name.
    """
    return TrustedHostMiddleware(server.create_app(), allowed_hosts=list(NAMES))
