"""The body of a flow: one line on what was made, or one line on what went wrong, never a traceback for users.

How a run ends says whether trying again can help:

    Completed   made, or found
    Failed      the same request fails again: a wrong setting, bad bytes, no memory for it, a defect
    Crashed     the same request may succeed: a rank or a store did not answer, something was killed or preempted

A crashed run is put back to work by itself (`flows.rescue`), a failed one when somebody presses Retry.
"""

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec

import httpx
from prefect.client.schemas.objects import State
from prefect.exceptions import CrashedRun, FailedRun, PrefectHTTPStatusError
from prefect.logging import get_run_logger
from prefect.runtime import flow_run as this_run
from prefect.states import Completed, Crashed, Failed

from flows.supervise import supervised, wait_for_server
from vc2.errors import FailureKind, Vc2Error
from vc2.failures import classify, may_pass

__all__ = ["told_in_one_line"]

P = ParamSpec("P")


class _NoEcho(logging.Filter):
    """Prefect's engine logs a failed state that a flow returned once more, as an exception with its traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], FailedRun | CrashedRun))


NO_ECHO = _NoEcho()


def told_in_one_line(run: Callable[P, str]) -> Callable[P, State]:
    """Body of a flow: `run` returns one line on what was made; an error meant for users becomes one line too.

    The run is under watch while it works (`flows.supervise`).
    """

    for name in ("prefect.engine", "prefect.flow_runs"):
        logging.getLogger(name).addFilter(NO_ECHO)
    # Handed to Prefect by PREFECT_LOGGING_EXTRA_LOGGERS, which sets no level: warnings alone would come through.
    logging.getLogger("vc2").setLevel(logging.INFO)

    @functools.wraps(run)
    def body(*args: P.args, **kwargs: P.kwargs) -> State:
        with supervised():
            try:
                state = Completed(message=run(*args, **kwargs))
            except Exception as error:
                kind = "communication" if _is_of_server(error) else classify(error)
                if not (may_pass(kind) or isinstance(error, Vc2Error)):
                    raise  # a defect: it keeps its traceback
                state = _ended(str(error) or type(error).__name__, kind)
            if this_run.id:
                wait_for_server()
        return state

    return body


def _is_of_server(error: Exception) -> bool:
    """Whether Prefect's server did not answer, or had no time to."""
    too_busy = isinstance(error, PrefectHTTPStatusError) and error.response.status_code >= 500
    return too_busy or isinstance(error, httpx.TransportError)


def _ended(message: str, kind: FailureKind) -> State:
    log = get_run_logger()
    if may_pass(kind) or kind == "preemption":
        log.warning("%s", message)
        return Crashed(message=message)
    log.error("%s", message)
    return Failed(message=message)
