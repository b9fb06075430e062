"""Every flow run watches what the server says of it, and ends its own work when that is over.

Who cancels a run, or calls it crashed, changes a state on the server. Commonly the worker then ends the process; but
the worker that started it may be gone, and a new one does not know of it. So each run looks for itself:

    Cancelling, and nobody acts for some seconds    end the work; the run becomes Cancelled
    ended or put back to work by somebody else      end the work and say nothing: the state is no longer ours
    no answer, or the run is unknown                go on: what is made is in the store, whatever the server knows
    an answer after some silence                    beat at once: a server that was away has missed heartbeats

To end the work is to send this process SIGTERM, as a worker does: ranks write a state and end, and so does the flow.
"""

import contextvars
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import Logger, LoggerAdapter
from types import FrameType
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events import emit_event
from prefect.exceptions import Abort, ObjectNotFound, PrefectHTTPStatusError
from prefect.logging import get_run_logger
from prefect.runtime import flow_run as this_run
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled

__all__ = ["AWAY", "NO_ANSWER", "SERVER_MAY_BE_AWAY", "supervised", "wait_for_server"]

NO_ANSWER = (httpx.HTTPError, PrefectHTTPStatusError, OSError)  # of a server that is away, or being restarted
LOOK_EVERY = 2.0  # seconds
WORKERS_TURN = 8.0  # seconds that a worker has for a cancelled run; it looks every five
AWAY = 3 * LOOK_EVERY  # seconds without an answer after which the server may have missed a heartbeat
LAST_RESORT = 330.0  # seconds from SIGTERM to SIGKILL: more than ranks have to write a state (vc2.train.run)
SERVER_MAY_BE_AWAY = 900.0  # seconds that a finished run waits to tell so


@contextmanager
def supervised() -> Iterator[None]:
    """The body of a flow, under watch.

    Raises:
        Abort: If the run was ended elsewhere; Prefect's engine then leaves its state alone.
    """
    if not this_run.id or threading.current_thread() is not threading.main_thread():
        yield  # called as a plain function
        return
    watch = Watch(UUID(str(this_run.id)), get_run_logger(), this_run.run_count)
    with watch.noting_signals():
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(watch.keep,), name="supervisor", daemon=True).start()
        try:
            yield
        except BaseException:
            if watch.verdict:
                raise watch.left() from None
            raise
        finally:
            watch.over.set()
        if watch.verdict:
            raise watch.left()


@dataclass
class Watch:
    """What is known of the run of this process."""

    run_id: UUID
    log: "Logger | LoggerAdapter[Any]"
    run_count: int  #: of the attempt that this process works on
    over: threading.Event = field(default_factory=threading.Event)
    verdict: str = ""  #: why the work has to end; empty while it may go on
    is_cancelled: bool = False
    is_ending: bool = False  #: whether a SIGTERM came, from whomever
    cancelling_since: float | None = None

    def keep(self) -> None:
        """Look until the work is over, or has to be."""
        # By itself the client would ask again in steps of up to half a minute before it says that nobody answers.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
            heard = time.monotonic()
            while not self.over.wait(LOOK_EVERY):
                try:
                    run = client.read_flow_run(self.run_id)
                except (*NO_ANSWER, ObjectNotFound):
                    continue
                self.judge(run)
                if self.verdict:
                    break
                if time.monotonic() - heard > AWAY:
                    _beat(run)
                heard = time.monotonic()
        if self.verdict and not self.over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            self.log.warning("%s: ending the work of this process", self.verdict)
            if not self.over.wait(LAST_RESORT):
                self._tell_cancelled()
                os.kill(os.getpid(), signal.SIGKILL)

    def judge(self, run: FlowRun) -> None:
        """Set the verdict by the state of the run."""
        state = run.state_type
        if self.is_ending:  # somebody was faster
            return
        if state == StateType.RUNNING:
            self.cancelling_since = None
            if run.run_count > self.run_count:
                self.verdict = "another process works on this run"
        elif state == StateType.CANCELLING:
            self.cancelling_since = self.cancelling_since or time.monotonic()
            if time.monotonic() - self.cancelling_since >= WORKERS_TURN:
                self.is_cancelled = True
                self.verdict = "the run was cancelled, and no worker ended it"
        elif state != StateType.PAUSED:
            self.verdict = f"the run was set to {str(run.state_name).lower()} from outside"

    def left(self) -> Abort:
        """What to raise when the work has ended because of the verdict."""
        self._tell_cancelled()
        return Abort(self.verdict)

    def _tell_cancelled(self) -> None:
        if not self.is_cancelled:
            return
        state = Cancelled(message=f"{self.verdict}; it ended by itself")
        try:
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(self.run_id, state, force=True)
        except NO_ANSWER as error:
            self.log.warning("the server was not told that this run is cancelled: %s", error)

    @contextmanager
    def noting_signals(self) -> Iterator[None]:
        """Know of a SIGTERM: a second one would break off what the first one's clean-up does."""
        before = signal.getsignal(signal.SIGTERM)

        def note(number: int, frame: FrameType | None) -> None:
            self.is_ending = True
            if callable(before):
                before(number, frame)

        signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _beat(run: FlowRun) -> None:
    """A heartbeat between those of Prefect's engine, with all that an automation asks of one."""
    flow = {
        "prefect.resource.id": f"prefect.flow.{run.flow_id}",
        "prefect.resource.role": "flow",
        "prefect.resource.name": this_run.flow_name or "",
    }
    emit_event(
        "prefect.flow-run.heartbeat",
        resource={"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name},
        related=[flow],
        payload={"why": "the server answers again"},
    )


def wait_for_server() -> None:
    """Wait until the server answers: what ends while it is being restarted could tell it nothing."""
    until = time.monotonic() + SERVER_MAY_BE_AWAY
    while time.monotonic() < until:
        try:
            with get_client(sync_client=True) as client:
                if client.api_healthcheck() is None:
                    return
        except NO_ANSWER:
            pass
        time.sleep(LOOK_EVERY)
