"""Crashed runs go on by themselves, as long as that gets them further.

A run crashes when something may pass: its process was killed, a machine taken away, a rank or a store did not answer
(`flows.body`). It is then put back to work under its old id, after 10 s and after 60 s; but no more than twice in a row
unless its work got further in between, asked of the store (`driver.reached`). So a loss of power costs a minute, and a
loop of crashes ends after three. Who presses Retry starts the count anew.

The driver does this for its stages. For runs that nobody waits for, a driver or a stage run by hand, it is done by the
deployment rescue/crashed: started by an automation for the one that crashed, and every few minutes for those that were
missed (`flows.automations`). What was tried is noted in the run's labels.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import AwaitingRetry, Cancelled
from pydantic import Field

from flows.automations import RESCUED
from flows.body import told_in_one_line
from flows.stage import asked
from vc2.errors import ConfigError, Vc2Error
from vc2.pipeline.driver import STAGES, PlannedStage, reached
from vc2.storage import Store

__all__ = ["LIMIT", "LONGEST_PAUSE", "Tries", "crashed", "far", "is_put_off", "put_back", "rescue", "started"]

FIRST_PAUSE = float(os.environ.get("VC2_RESCUE_SECONDS", "10"))
LONGEST_PAUSE = 300.0  # seconds, whatever the first one is
SETTLES = 5.0  # seconds: a worker tells of the end of a process twice, and the second time must not meet the next try
LIMIT = 2  # new tries that may get no further
DONE = 10**12  # a stage that is done is further than any that is not
PUT_OFF = timedelta(hours=1)
MISSED_AFTER = timedelta(seconds=30)  # of a crash: until then the automation has its turn
MISSED_WITHIN = timedelta(days=1)
GIVEN_UP = "vc2.rescue.given_up"  # label of a run: the attempt after which it was left as it is


@dataclass(frozen=True, slots=True)
class Tries:
    """What was tried with a crashed run so far; kept in its labels."""

    used: int = 0  #: tries in a row that got no further
    reached: int = -1  #: how far it was at the last of them
    attempt: int = 0  #: the run's own count of attempts then
    begun: int = 1  #: the attempt that somebody started, of which this is the rescue

    @classmethod
    def of(cls, run: FlowRun) -> "Tries":
        labels: Mapping[str, Any] = run.labels or {}
        return cls(*(int(labels.get(f"vc2.rescue.{name}", default)) for name, default in cls().labels().items()))

    def labels(self) -> dict[str, int]:
        return {"used": self.used, "reached": self.reached, "attempt": self.attempt, "begun": self.begun}

    def after(self, attempt: int, reached: int) -> "Tries | None":
        """What is noted when the run crashed once more and is tried again; None if it should not be."""
        is_by_hand = attempt > self.attempt + 1  # somebody pressed Retry since
        used = 0 if reached > self.reached or is_by_hand else self.used
        if used >= LIMIT:
            return None
        if is_by_hand:
            return Tries(used + 1, reached, attempt, attempt)
        return Tries(used + 1, max(reached, self.reached), attempt, self.begun)

    @property
    def pause(self) -> float:
        """Seconds before the try."""
        return min(FIRST_PAUSE * 6 ** (self.used - 1), LONGEST_PAUSE)


def started(run: FlowRun) -> int:
    """The attempt of a run that somebody started: the one at work, or the one that it is the rescue of."""
    tries = Tries.of(run)
    return tries.begun if run.run_count == tries.attempt + 1 else run.run_count


def rescue(
    client: SyncPrefectClient, run: FlowRun, far: Callable[[], int], job: Callable[[], Mapping[str, Any]] = dict
) -> float | None:
    """Put a crashed run back to work after a pause, if that may help.

    Args:
        far: How far its work has come, in any unit that grows.
        job: Job variables to change; called only if the run is put back.

    Returns:
        The pause in seconds, 0 if somebody else has put it back meanwhile; None if the run is left as it is.
    """
    if _was_cancelled(client, run):
        client.set_flow_run_state(run.id, Cancelled(message="It crashed while it was being cancelled."), force=True)
        return None
    tries = Tries.of(run).after(run.run_count, _known(far))
    if tries is None:
        client.update_flow_run_labels(run.id, {GIVEN_UP: run.run_count})
        return None
    if run.state is not None:
        time.sleep(max(0.0, SETTLES - (datetime.now(UTC) - run.state.timestamp).total_seconds()))
    variables = job()
    now = client.read_flow_run(run.id)
    if (now.state_type, now.run_count) != (StateType.CRASHED, run.run_count):
        return 0.0
    client.update_flow_run_labels(run.id, {f"vc2.rescue.{name}": value for name, value in tries.labels().items()})
    why = (run.state and run.state.message) or "no message"
    put_back(
        client, run, variables, pause=tries.pause, message=f"crashed ({why}); tried again after {tries.pause:.0f} s"
    )
    return tries.pause


def _known(far: Callable[[], int]) -> int:
    """How far work has come; 0 where that cannot be told: the store may be what the run crashed of."""
    try:
        return far()
    except (Vc2Error, OSError) as error:
        get_run_logger().warning("how far it has come is not known: %s", error)
        return 0


def _is_given_up(run: FlowRun) -> bool:
    return (run.labels or {}).get(GIVEN_UP) == run.run_count


def _was_cancelled(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether somebody wanted the end of a run that crashed."""
    states = sorted(client.read_flow_run_states(run.id), key=lambda state: state.timestamp)
    before = [state for state in states if state.type != StateType.CRASHED]
    return bool(before) and before[-1].type == StateType.CANCELLING


def put_back(
    client: SyncPrefectClient,
    run: FlowRun,
    job: Mapping[str, Any] | None = None,
    *,
    pause: float = 0.0,
    message: str | None = None,
) -> None:
    """Put a run that has ended back to work under its old id.

    The server takes new job variables only while a run is scheduled, and a worker may pick it up as soon as it is due.
    So it is put off first. Whoever is killed then leaves it so (`is_put_off`).
    """
    now = datetime.now(UTC)
    if job:
        client.set_flow_run_state(run.id, AwaitingRetry(scheduled_time=now + PUT_OFF))
        client.update_flow_run(run.id, job_variables={**(run.job_variables or {}), **job})
    client.set_flow_run_state(run.id, AwaitingRetry(scheduled_time=now + timedelta(seconds=pause), message=message))


def is_put_off(run: FlowRun) -> bool:
    """Whether a run was to be put back to work by somebody who did not come to the end of it."""
    due = run.state.state_details.scheduled_time if run.state and run.state_name == "AwaitingRetry" else None
    return due is not None and due.timestamp() - time.time() > LONGEST_PAUSE


def far(stages: list[PlannedStage], store: Store) -> int:
    """How far several stages have come together."""
    return sum(DONE if stage.artifact is not None else reached(stage, store) for stage in stages)


@flow(name="rescue")
@told_in_one_line
def crashed(run: Annotated[str, Field(pattern="^$|[0-9a-fA-F-]{36}$")] = "") -> str:
    """Put crashed runs back to work that no driver sees to, if their work got further since the last time.

    Args:
        run: Id of the crashed flow run; empty: all that crashed within a day and were not given up.
    """
    with get_client(sync_client=True) as client:
        if not run:
            return "; ".join([_see_to(client, missed) for missed in _missed(client)]) or "no run is left crashed"
        try:
            found = client.read_flow_run(UUID(run[-36:]))
        except (ObjectNotFound, ValueError):
            raise ConfigError(f"there is no flow run {run}; name one by its id, or none for all that crashed") from None
        return _see_to(client, found)


def _missed(client: SyncPrefectClient) -> list[FlowRun]:
    """Runs that crashed when nobody was there to put them back."""
    now = datetime.now(UTC)
    runs = client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=list(RESCUED))),
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED])),
            end_time=FlowRunFilterEndTime.model_validate(
                {"after_": now - MISSED_WITHIN, "before_": now - MISSED_AFTER}
            ),
        ),
        sort=FlowRunSort.END_TIME_DESC,
    )
    return [run for run in runs if not _is_given_up(run) and not _has_driver(client, run)]


def _see_to(client: SyncPrefectClient, run: FlowRun) -> str:
    if run.state_type != StateType.CRASHED or run.deployment_id is None:
        return f"{run.name} is {run.state_name}: nothing to do"
    if _has_driver(client, run):
        return f"{run.name} is seen to by its driver"
    try:
        name = f"{client.read_flow(run.flow_id).name}/{client.read_deployment(run.deployment_id).name}"
        pause = None if _is_given_up(run) else rescue(client, run, lambda: _reached_by(name, run.parameters))
        now = client.read_flow_run(run.id)
    except ObjectNotFound:
        return f"{run.name} was deleted, or its deployment: nothing to do"
    if now.state_type == StateType.CANCELLED:
        return f"{run.name} was being cancelled: now it is"
    if pause is None:
        get_run_logger().warning("%s crashed %d times and got no further: left as it is", run.name, LIMIT + 1)
        return f"{run.name} got no further: left crashed; look at its log, then press Retry"
    return f"{run.name} goes on in {pause:.0f} s"


def _has_driver(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether a driver sees to a run: one that has not ended, or has crashed and will come back to it."""
    if run.parent_task_run_id is None:
        return False
    try:
        driver_id = client.read_task_run(run.parent_task_run_id).flow_run_id
        driver = client.read_flow_run(driver_id) if driver_id else None
    except ObjectNotFound:
        return False
    if driver is not None and driver.state_type == StateType.CRASHED:
        return not _is_given_up(driver)
    return driver is not None and driver.state_type not in TERMINAL_STATES


def _reached_by(name: str, parameters: Mapping[str, Any]) -> int:
    plan = asked(name, parameters)
    return far([stage for stage in plan.stages if name not in STAGES or stage.name == name], plan.store)
