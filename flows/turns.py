"""Two runs that would make the same thing: one works, the other waits and then finds it made.

A run that works on a stage bears a tag that stands for the artifact, and draws a number, one more than the numbers it
sees. Of the runs that bear the tag and are at work, the lowest number goes on; each of the others waits until it is the
lowest itself, however the one before it ended, and looks into the store only then. So a driver, another driver, and a
run by hand never do the same work twice.

A run bears the tag before it draws, and one that has not drawn yet is waited for (Lamport's bakery, 1974): so nobody
can draw a lower number than one that was already looked at and passed. No clock is asked.
"""

import time
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.runtime import flow_run as this_run

from vc2.config import digest

__all__ = ["wait_for_turn"]

LOOK_EVERY = 1.0  # seconds
AT_WORK = [StateType.RUNNING, StateType.CANCELLING]
NUMBER = "vc2.turn"  # label of a run; 0: not drawn yet


def wait_for_turn(work: str) -> None:
    """Return when no run that came before this one works on the same.

    Args:
        work: What is to be made, by any name that is the same for all who make it.
    """
    if not this_run.id:
        return
    tag, run_id = f"work:{digest(work)[:12]}", UUID(str(this_run.id))
    waits_for: UUID | None = None
    with get_client(sync_client=True) as client:
        try:
            client.update_flow_run_labels(run_id, {NUMBER: 0})
            client.update_flow_run(run_id, tags={*this_run.tags, tag})
        except ObjectNotFound:
            return  # the server lost its database: nobody is known
        own = 1 + max((_number(run) for run in _others(client, tag, run_id)), default=0)
        client.update_flow_run_labels(run_id, {NUMBER: own})
        while before := [run for run in _others(client, tag, run_id) if (_number(run), run.id) < (own, run_id)]:
            first = min(before, key=_number)
            if first.id != waits_for and _number(first):
                waits_for = first.id
                get_run_logger().info("run %s makes the same: waiting for it", first.name)
            time.sleep(LOOK_EVERY)


def _others(client: SyncPrefectClient, tag: str, run_id: UUID) -> list[FlowRun]:
    at_work = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            tags=FlowRunFilterTags(all_=[tag]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=AT_WORK)),
        )
    )
    return [run for run in at_work if run.id != run_id]


def _number(run: FlowRun) -> int:
    return int(str((run.labels or {}).get(NUMBER, 0)))
