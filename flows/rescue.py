"""Crashed runs go on by themselves, as long as that gets them further.

A run crashes when something may pass: its process was killed, a machine taken away, a rank or a store did not answer
(`flows.body`). It is then put back to work under its old id after a pause, 10 s, 60 s, 300 s; but no more than twice in
a row unless its work got further in between, asked of the store (`driver.reached`). So a loss of power costs a minute,
and a loop of crashes ends after three. Who presses Retry starts the count anew.

The driver does this for its stages. For runs that nobody waits for, a driver or a stage run by hand, it is done by the
deployment rescue/crashed, started by an automation (`flows.automations`). What was tried is noted in the run's labels.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.logging import get_run_logger
from prefect.states import AwaitingRetry, Cancelled
from pydantic import Field

from flows.body import told_in_one_line
from flows.stage import asked
from vc2.pipeline.driver import STAGES, PlannedStage, reached
from vc2.storage import Store

__all__ = ["Tries", "crashed", "far", "put_back", "rescue"]

FIRST_PAUSE = float(os.environ.get("VC2_RESCUE_SECONDS", "10"))
LONGEST_PAUSE = 300.0
SETTLES = 5.0  # seconds: a worker tells of the end of a process twice, and the second time must not meet the next try
LIMIT = 2  # new tries that may get no further
DONE = 10**12  # a stage that is done is further than any that is not


@dataclass(frozen=True, slots=True)
class Tries:
    """What was tried with a crashed run so far; kept in its labels."""

    used: int = 0  #: tries in a row that got no further
    reached: int = -1  #: how far it was at the last of them
    attempt: int = 0  #: the run's own count of attempts then

    @classmethod
    def of(cls, run: FlowRun) -> "Tries":
        labels: Mapping[str, Any] = run.labels or {}
        return cls(*(int(labels.get(f"vc2.rescue.{name}", default)) for name, default in cls().labels().items()))

    def labels(self) -> dict[str, int]:
        return {"used": self.used, "reached": self.reached, "attempt": self.attempt}

    def after(self, attempt: int, reached: int) -> "Tries | None":
        """What is noted when the run crashed once more and is tried again; None if it should not be."""
        is_by_hand = attempt > self.attempt + 1  # somebody pressed Retry since
        used = 0 if reached > self.reached or is_by_hand else self.used
        return None if used >= LIMIT else Tries(used + 1, reached, attempt)

    @property
    def pause(self) -> float:
        """Seconds before the try."""
        return min(FIRST_PAUSE * 6 ** (self.used - 1), LONGEST_PAUSE)


def rescue(client: SyncPrefectClient, run: FlowRun, reached: int, job: Mapping[str, Any] | None = None) -> float | None:
    """Put a crashed run back to work after a pause, if that may help.

    Args:
        reached: How far its work has come, in any unit that grows.
        job: Job variables to change.

    Returns:
        The pause in seconds; None if the run is left crashed.
    """
    if _was_cancelled(client, run):
        client.set_flow_run_state(run.id, Cancelled(message="It crashed while it was being cancelled."), force=True)
        return None
    tries = Tries.of(run).after(run.run_count, reached)
    if tries is None:
        return None
    if run.state is not None:
        time.sleep(max(0.0, SETTLES - (datetime.now(UTC) - run.state.timestamp).total_seconds()))
    client.update_flow_run_labels(run.id, {f"vc2.rescue.{name}": value for name, value in tries.labels().items()})
    why = (run.state and run.state.message) or "no message"
    put_back(client, run, job, pause=tries.pause, message=f"crashed ({why}); tried again after {tries.pause:.0f} s")
    return tries.pause


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
    """
    now = datetime.now(UTC)
    if job:
        client.set_flow_run_state(run.id, AwaitingRetry(scheduled_time=now + timedelta(hours=1)))
        client.update_flow_run(run.id, job_variables={**(run.job_variables or {}), **job})
    client.set_flow_run_state(run.id, AwaitingRetry(scheduled_time=now + timedelta(seconds=pause), message=message))


def far(stages: list[PlannedStage], store: Store) -> int:
    """How far several stages have come together."""
    return sum(DONE if stage.artifact is not None else reached(stage, store) for stage in stages)


@flow(name="rescue")
@told_in_one_line
def crashed(run: Annotated[str, Field(description="id of the crashed flow run", min_length=36)]) -> str:
    """Put a crashed run back to work, if it is nobody's child and its work got further since the last time."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(UUID(run[-36:]))
        if found.state_type != StateType.CRASHED or found.deployment_id is None:
            return f"{found.name} is {found.state_name}: nothing to do"
        if found.parent_task_run_id is not None:
            return f"{found.name} is seen to by its driver"
        deployment = client.read_deployment(found.deployment_id)
        name = f"{client.read_flow(deployment.flow_id).name}/{deployment.name}"
        pause = rescue(client, found, _reached_by(name, found.parameters))
        now = client.read_flow_run(found.id)
    if now.state_type == StateType.CANCELLED:
        return f"{found.name} was being cancelled: now it is"
    if pause is None:
        get_run_logger().warning("%s crashed %d times and got no further: left as it is", found.name, LIMIT + 1)
        return f"{found.name} got no further: left crashed; look at its log, then press Retry"
    return f"{found.name} goes on in {pause:.0f} s"


def _reached_by(name: str, parameters: Mapping[str, Any]) -> int:
    plan = asked(name, parameters)
    return far([stage for stage in plan.stages if name not in STAGES or stage.name == name], plan.store)
