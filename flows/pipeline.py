"""Deployment vc2/full-pipeline: the driver. It asks the store what is done and runs the rest as deployments, in order.

A stage's run is found again by its key, (fingerprint, root run). So a driver that is retried re-attaches to what runs,
and puts what an earlier attempt left failed back to work in place. Whether a stage is done is asked of the store alone.
"""

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, cast

import httpx
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging import get_run_logger
from prefect.runtime import flow_run as this_run
from prefect.states import AwaitingRetry, Cancelling
from pydantic import Field

from flows.shown import ShownProgress, show_link, show_table, told_in_one_line
from flows.stage import RAY_VARIABLES
from vc2.artifacts import Artifact, Checkpoint, ShardSet, load_manifest
from vc2.errors import LaunchFailed
from vc2.eval.config import EvaluateStage
from vc2.pipeline.driver import STAGES, PlannedStage, StageName, drive, given_artifacts, plan, session
from vc2.pipeline.recipes import DEFAULT_WORK, PipelineOverrides, Recipe, default_store, resolve
from vc2.storage import Store, join_uri, open_store

__all__ = ["pipeline"]

AS_IN_RECIPE = PipelineOverrides()
LOOK_EVERY = 0.5  # seconds
SERVER_MAY_BE_AWAY = 120.0  # seconds without an answer, for a server that is being restarted


@flow(name="vc2")
@told_in_one_line
def pipeline(
    recipe: Recipe = "miniature",
    store: str = "",
    shards: tuple[str, ...] = (),
    checkpoint: str = "",
    start_at: StageName | None = None,
    stop_after: StageName | None = None,
    repeat: Annotated[int, Field(ge=0)] = 0,
    overrides: PipelineOverrides = AS_IN_RECIPE,  # pyright: ignore[reportInvalidTypeForm]
) -> str:
    """Source to report: run what is not in the store, reuse what is. Safe to repeat and to retry.

    Args:
        recipe: Where all settings start from.
        store: Local path or s3://bucket/prefix; empty: the one of the worker (VC2_STORE).
        shards: Shard sets to take in place of the recipe's, as URI or source=URI.
        checkpoint: Checkpoint to take in place of the recipe's, by URI.
        start_at: First stage that may run; those before it must be done.
        stop_after: Last stage to run.
        repeat: Raise it to make everything (with start_at: that stage and what follows) once more.
        overrides: Settings to change; what is left empty keeps the recipe's value.
    """
    config = resolve(recipe, overrides, work=DEFAULT_WORK)
    place = open_store(store or default_store())
    given = given_artifacts(place, shards, checkpoint)
    planned = plan(config, place, repeat=repeat, start_at=start_at, given=given)
    show_table("plan", [_row(stage) for stage in planned], "What is done, what will run, and why.")
    with ExitStack() as cleanup:
        children = Children(
            recipe, place, overrides, config.evaluation, cleanup, sum(stage.state == "done" for stage in planned)
        )
        last = drive(config, place, children.run, start_at=start_at, stop_after=stop_after, repeat=repeat, given=given)
    return _shown_result(last, place)


@dataclass
class Children:
    """Runs stages as deployments."""

    recipe: str
    store: Store
    overrides: PipelineOverrides  # pyright: ignore[reportInvalidTypeForm]
    evaluation: EvaluateStage
    cleanup: ExitStack
    num_done: int
    progress: ShownProgress = field(default_factory=lambda: ShownProgress("vc2", every=0.0))
    has_ray: bool = False

    def run(self, planned: PlannedStage, inputs: Mapping[str, Artifact]) -> Artifact:
        """Start or re-attach to the run of a stage, and wait for its end.

        Raises:
            LaunchFailed: If it ended other than well.
            StoreError: If it ended well and left no manifest.
        """
        self.progress("stages", self.num_done, len(STAGES), now=planned.name)
        job = {"env": self._ray(planned)}
        key = f"{planned.fingerprint}:{this_run.root_flow_run_id or this_run.id}"
        with get_client(sync_client=True) as client:
            child = run_deployment(
                planned.name,
                parameters=self._parameters(planned, inputs),
                flow_run_name=planned.name,
                idempotency_key=key,
                job_variables=job,
                timeout=0,
            )
            _wait(client, cast(FlowRun, child), job)
        self.num_done += 1
        self.progress("stages", self.num_done, len(STAGES))
        return load_manifest(self.store, planned.prefix).reference(self.store, planned.prefix)

    def _parameters(self, stage: PlannedStage, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "recipe": self.recipe,
            "store": self.store.uri,
            "repeat": stage.repeat,
            "overrides": self.overrides.model_dump(mode="json", exclude_none=True),
        }
        if stage.name == "evaluate/evalcrafter":  # what is measured with what was seen, and planned, here
            asked = parameters["overrides"].setdefault("evaluation", {})
            asked |= self.evaluation.model_dump(include={"measured_with", "not_measured"})
        shards = []
        for role, artifact in inputs.items():
            if isinstance(artifact, ShardSet):
                shards.append(f"{stage.inputs[role].removeprefix('shard/')}={artifact.uri}")
            elif isinstance(artifact, Checkpoint):
                parameters["base" if role == "base" else "checkpoint"] = artifact.uri
        if shards:
            parameters["shards"] = shards
        if stage.name.startswith("shard/"):
            parameters["fresh"] = True  # the set that was planned, and no other
        return parameters

    def _ray(self, stage: PlannedStage) -> dict[str, str]:
        """One Ray session for all shard stages: started for the first that has to run, ended before anything trains."""
        if not stage.name.startswith("shard/"):
            self.cleanup.close()
            return {}
        if not self.has_ray:
            self.cleanup.enter_context(session([stage]))
            self.has_ray = True
        return {name: os.environ[name] for name in RAY_VARIABLES if name in os.environ}


def _wait(client: SyncPrefectClient, child: FlowRun, job: dict[str, Any]) -> None:
    """Wait until a stage's run is completed. One that an earlier attempt left failed is put back to work, once."""
    may_restart = child.run_count > 0 or _is_final(child)
    away_since: float | None = None
    try:
        while True:
            if _is_final(child):
                if child.state_type == StateType.COMPLETED:
                    return
                ended = str(child.state_name).lower()
                if not may_restart:
                    message = (child.state and child.state.message) or "no message"
                    raise LaunchFailed(f"{child.name} {ended}: {message}")
                may_restart = False
                get_run_logger().info("%s was left %s: trying it again", child.name, ended)
                _restart(client, child, job)
            time.sleep(LOOK_EVERY)
            try:
                child, away_since = client.read_flow_run(child.id), None
            except (httpx.HTTPError, PrefectHTTPStatusError):
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > SERVER_MAY_BE_AWAY:
                    raise
    except BaseException as error:
        if not isinstance(error, Exception):  # cancelled: what we started ends with us
            client.set_flow_run_state(child.id, Cancelling())
        raise


def _restart(client: SyncPrefectClient, child: FlowRun, job: dict[str, Any]) -> None:
    """Put a failed run back to work under its old id, with the environment of this attempt.

    The server takes that only while a run is scheduled, and a worker may pick it up as soon as it is due.
    """
    client.set_flow_run_state(child.id, AwaitingRetry(scheduled_time=datetime.now(UTC) + timedelta(hours=1)))
    client.update_flow_run(child.id, job_variables=(child.job_variables or {}) | job)
    client.set_flow_run_state(child.id, AwaitingRetry())


def _is_final(run: FlowRun) -> bool:
    return run.state_type in TERMINAL_STATES


def _row(stage: PlannedStage) -> dict[str, str]:
    return {"stage": stage.name, "state": stage.state, "why": stage.why, "fingerprint": stage.fingerprint[:12]}


def _shown_result(artifact: Artifact, store: Store) -> str:
    """Show where the result is: the report's page, or the artifact."""
    pages = [entry.key for entry in load_manifest(store, artifact.prefix).files if entry.name.endswith(".html")]
    place = join_uri(store.uri, pages[0] if pages else artifact.prefix)
    show_link("result", place, artifact.kind, place)
    return f"{artifact.kind} {place}"
