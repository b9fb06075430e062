"""Deployment vc2/full-pipeline: the driver. It asks the store what is done and runs the rest as deployments, in order.

A stage's run is found again by its key, (fingerprint, root run). So a driver that is retried, resumed or rescued
re-attaches to what runs, and puts what an earlier attempt left failed back to work in place. Whether a stage is done is
asked of the store alone.

Before anything runs: everything asked for is checked, what it would cost is predicted, and a preflight looks at what
the stages need. A run that would cost more than `cost_limit`, or that is told to stop at a gate, is suspended (no
process is left) until somebody answers its form (`flows.gates`).
"""

import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, cast

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.runtime import flow_run as this_run
from prefect.states import Cancelled, Cancelling
from pydantic import Field

from flows.body import told_in_one_line
from flows.gates import ask
from flows.rescue import is_put_off, put_back, rescue, started
from flows.shown import ShownProgress, place_of, show_cost, show_link, show_plan
from flows.stage import RAY_VARIABLES, Asked, asked
from flows.supervise import NO_ANSWER, SERVER_MAY_BE_AWAY
from vc2.artifacts import Artifact, Checkpoint, ShardSet, find, load_manifest
from vc2.errors import ConfigError, LaunchFailed
from vc2.pipeline.driver import FIELDS, NODES, STAGES, PlannedStage, StageName, check_measurable, drive, reached, span
from vc2.pipeline.preview import PlanRow, previewed, spent
from vc2.pipeline.recipes import PipelineOverrides, Recipe
from vc2.ray_session import HeldSession
from vc2.storage import Store

__all__ = ["Children", "attempt_started", "pipeline"]

AS_IN_RECIPE = PipelineOverrides()
LOOK_EVERY = 0.5  # seconds


@flow(name="vc2")
@told_in_one_line
def pipeline(
    recipe: Recipe = "miniature",
    store: str = "",
    shards: tuple[str, ...] = (),
    checkpoint: str = "",
    start_at: StageName | None = None,
    stop_after: StageName | None = None,
    gate_before: StageName | None = None,
    cost_limit: Annotated[float, Field(ge=0)] = 100.0,
    preflight: bool = True,
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
        gate_before: Stage before which somebody has to approve, shown samples of the checkpoint that it starts from.
        cost_limit: US dollars; a run that is predicted to cost more waits for somebody to approve it.
        preflight: Look at sources, weights, store and machines before the first stage that has to run.
        repeat: Raise it to make everything (with start_at: that stage and what follows) once more.
        overrides: Settings to change; what is left empty keeps the recipe's value.
    """
    inputs = {"shards": shards, "checkpoint": checkpoint, "start_at": start_at}
    request = {"recipe": recipe, "store": store, "repeat": repeat, "overrides": overrides, **inputs}
    what = asked("vc2/full-pipeline", request)
    first, last = span(start_at, stop_after)
    wanted = what.stages[first : last + 1]
    if gate_before and gate_before not in {stage.name for stage in wanted}:
        raise ConfigError(f"gate_before={gate_before} is none of the stages asked for; nobody would be asked")
    todo = [stage for stage in wanted if stage.artifact is None]
    check_measurable(what.config, wanted)
    rows = previewed(what.stages, what.config, what.store)
    show_plan(rows)
    show_cost(spent(what.stages, what.store))
    _pass_cost(rows, {stage.name for stage in todo}, cost_limit)
    names = [stage.name for stage in todo]
    looks = {**inputs, "repeat": repeat, "stages": tuple(names)} if preflight else None
    children = Children(recipe, what, overrides, names, gate_before, looks, attempt_started())
    try:
        result = drive(
            what.config,
            what.store,
            children.run,
            start_at=start_at,
            stop_after=stop_after,
            repeat=repeat,
            given=what.given,
        )
    finally:
        children.end_ray()
    return _shown_result(result, what.store)


def attempt_started() -> int:
    """The attempt of this run that somebody started; where it was rescued since, an earlier one."""
    with get_client(sync_client=True) as client:
        return started(client.read_flow_run(this_run.id))


def _pass_cost(rows: list[PlanRow], todo: Collection[str], limit: float) -> None:
    """Ask whether a run shall go on that is predicted to cost more than it may."""
    costs = {row.stage: row.usd for row in rows if row.stage in todo and row.usd}
    total = sum(costs.values())
    if total > limit:
        parts = ", ".join(f"{name} {usd:,.2f}" for name, usd in costs.items())
        unknown = ", ".join(row.stage for row in rows if row.stage in todo and row.usd is None)
        more = f" Not known, and not counted: {unknown}." if unknown else ""
        ask(
            "cost", f"What is left is predicted to cost **{total:,.2f} US dollars** ({parts}), over {limit:,.2f}.{more}"
        )


@dataclass
class Children:
    """Runs stages as deployments.

    What an earlier attempt left unfinished gets a new try if somebody started this attempt. In one that is a rescue
    nobody asked for that: what was cancelled stays so, what failed has failed, and what was looked at is not again.
    """

    recipe: str
    what: Asked
    overrides: PipelineOverrides  # pyright: ignore[reportInvalidTypeForm]
    todo: list[str]
    gate_before: str | None
    looks: Mapping[str, Any] | None  #: what the preflight is asked; None: it was, or need not be
    begun: int  #: the attempt that somebody started
    progress: ShownProgress = field(default_factory=lambda: ShownProgress("vc2", every=0.0))
    ray: HeldSession | None = None
    stages: list[PlannedStage] = field(init=False)  #: as they are now

    def __post_init__(self) -> None:
        self.stages = self.what.stages

    def run(self, planned: PlannedStage, inputs: Mapping[str, Artifact]) -> None:
        """Start or re-attach to the run of a stage, and wait for its end.

        Raises:
            LaunchFailed: If it ended other than well.
        """
        self._preflight()
        self._gate(planned, inputs)
        self._tell(planned.name)
        store = self.what.store
        if not planned.name.startswith("shard/"):
            self.end_ray()  # before anything trains

        def job() -> dict[str, Any]:
            return {"env": self._ray() if self._needs_ray(planned) else {}}

        self._child(
            planned.name,
            f"{planned.fingerprint}:{_root()}",
            self._parameters(planned, inputs),
            job,
            lambda: reached(planned, store),
        )
        made = find(store, planned.prefix, NODES[planned.name].kind)
        if made is None:
            return  # `drive` says so
        self.todo.remove(planned.name)
        self._tell()
        done = replace(planned, state="done", artifact=made)
        self.stages = [done if stage.name == done.name else stage for stage in self.stages]
        show_cost(spent(self.stages, store))

    def end_ray(self) -> None:
        """End the Ray session that the shard stages share."""
        session, self.ray = self.ray, None
        if session is not None:
            session.stop()

    def _child(
        self,
        deployment: str,
        key: str,
        parameters: dict[str, Any],
        job: Callable[[], dict[str, Any]] = dict,
        far: Callable[[], int] = int,
    ) -> FlowRun:
        with get_client(sync_client=True) as client:
            by_key = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key]))
            if found := client.read_flow_runs(flow_run_filter=by_key):
                child = found[0]
            else:
                child = _created(deployment, key, parameters, job())
            return _wait(client, child, job, far, is_rescue=self.begun != this_run.run_count)

    def _preflight(self) -> None:
        """Look at what the stages need, once in an attempt, before the first of them."""
        looks, self.looks = self.looks, None
        if looks is not None:
            self._child("preflight/recipe", f"preflight:{_root()}:{self.begun}", {**self._common(), **looks})

    def _gate(self, planned: PlannedStage, inputs: Mapping[str, Artifact]) -> None:
        """Wait for approval before a stage, with samples of the checkpoint that it would start from."""
        if planned.name != self.gate_before:
            return
        shown = f"Shall **{planned.name}** run?"
        weights = next((artifact for artifact in inputs.values() if isinstance(artifact, Checkpoint)), None)
        if weights is not None:
            key = f"sample:{weights.fingerprint}@{weights.step}:{_root()}"
            child = self._child("sample/grid", key, self._common() | {"checkpoint": weights.uri})
            said = (child.state and child.state.message) or ""
            uri = said.removeprefix("Report ")
            page = place_of(self.what.store, uri.removeprefix(self.what.store.uri + "/"))
            show_link("gate", page, "samples", f"samples of {weights.uri}, before {planned.name}")
            shown += f" It starts from `{weights.uri}` (step {weights.step}); samples of it: [{page}]({page})"
        self.end_ray()  # nothing of ours stays behind while nobody answers
        ask(f"before-{planned.name}", shown)

    def _tell(self, name: str = "") -> None:
        done = len(STAGES) - len(self.todo)
        self.progress("stages", done, len(STAGES), **({"now": name} if name else {}))

    def _common(self) -> dict[str, Any]:
        """Parameters that every child has."""
        return {
            "recipe": self.recipe,
            "store": self.what.store.uri,
            "overrides": self.overrides.model_dump(mode="json", exclude_none=True),
        }

    def _parameters(self, stage: PlannedStage, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        parameters: dict[str, Any] = {**self._common(), "repeat": stage.repeat}
        if stage.name == "evaluate/evalcrafter":  # what is measured with what was seen, and planned, here
            asked_for = parameters["overrides"].setdefault("evaluation", {})
            asked_for |= self.what.config.evaluation.model_dump(include={"measured_with", "not_measured"})
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

    def _needs_ray(self, planned: PlannedStage) -> bool:
        """Whether a stage can share a Ray of this machine: the stack's runs are all here; a job has its cluster."""
        is_here = planned.name.startswith("shard/") and bool(os.environ.get("VC2_STACK"))
        return is_here and getattr(self.what.config, FIELDS[planned.name]).launcher == "local"

    def _ray(self) -> dict[str, str]:
        """One Ray session for all shard stages, in a process of its own; a new one where it was lost."""
        if self.ray is not None and not self.ray.is_alive():
            get_run_logger().warning("Ray is lost; starting it again")
            self.end_ray()
        if self.ray is None:
            self.ray = HeldSession()
            self.ray.start()
        return {name: value for name, value in self.ray.environment.items() if name in RAY_VARIABLES}


def _root() -> str:
    return str(this_run.root_flow_run_id or this_run.id)


def _created(deployment: str, key: str, parameters: dict[str, Any], variables: dict[str, Any]) -> FlowRun:
    try:
        created = run_deployment(
            deployment,
            parameters=parameters,
            flow_run_name=deployment,
            idempotency_key=key,
            job_variables=variables,
            timeout=0,
        )
    except ObjectNotFound:
        raise ConfigError(f"there is no deployment {deployment}; prefect deploy --all makes it") from None
    return cast(FlowRun, created)


def _wait(
    client: SyncPrefectClient,
    child: FlowRun,
    job: Callable[[], dict[str, Any]],
    far: Callable[[], int],
    *,
    is_rescue: bool,
) -> FlowRun:
    """Wait until a child is completed.

    One that an earlier attempt left unfinished is put back to work, unless this attempt is a rescue; one that crashes
    is, as long as that may help.
    """
    was_left = not is_rescue and (_is_final(child) or child.state_type == StateType.CANCELLING)
    away_since: float | None = None
    try:
        while True:
            if _is_final(child):
                if child.state_type == StateType.COMPLETED:
                    return child
                _again(client, child, job, far, was_left)
                was_left = False
            elif is_put_off(child):
                put_back(client, child, job())
            time.sleep(LOOK_EVERY)
            try:
                child, away_since = client.read_flow_run(child.id), None
            except NO_ANSWER:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > SERVER_MAY_BE_AWAY:
                    raise
    except ObjectNotFound:
        raise LaunchFailed(f"{child.name} was deleted on the server; Retry starts it anew") from None
    except BaseException as error:
        if not isinstance(error, Exception):
            _end_with_us(client, child)
        raise


def _again(
    client: SyncPrefectClient,
    child: FlowRun,
    job: Callable[[], dict[str, Any]],
    far: Callable[[], int],
    was_left: bool,
) -> None:
    """Put a child that ended other than well back to work, or raise what it ended with."""
    message = (child.state and child.state.message) or "no message"
    ended = str(child.state_name).lower()
    log = get_run_logger().info
    if was_left:
        log("%s was left %s: trying it again", child.name, ended)
        put_back(client, child, job())
        return
    if child.state_type == StateType.CRASHED:
        pause = rescue(client, child, far, job)
        if pause is not None:
            log("%s crashed (%s): trying it again in %.0f s", child.name, message, pause)
            return
        if client.read_flow_run(child.id).state_type == StateType.CANCELLED:
            ended = "cancelled"
        else:
            message = f"again and again without getting further, the last time: {message}"
    raise LaunchFailed(f"{child.name} {ended}: {message}")


def _end_with_us(client: SyncPrefectClient, child: FlowRun) -> None:
    """Who cancels a driver cancels its stages. A driver that is ended otherwise comes back to them."""
    try:
        own = client.read_flow_run(this_run.id)
        if own.state_type not in (StateType.CANCELLING, StateType.CANCELLED):
            return
        child = client.read_flow_run(child.id)
        if child.state_type == StateType.SCHEDULED:  # nobody works on it
            client.set_flow_run_state(child.id, Cancelled(), force=True)
        elif not _is_final(child):
            client.set_flow_run_state(child.id, Cancelling())
    except NO_ANSWER as error:
        get_run_logger().warning("%s was not told to end: %s", child.name, error)


def _is_final(run: FlowRun) -> bool:
    return run.state_type in TERMINAL_STATES


def _shown_result(artifact: Artifact, store: Store) -> str:
    """Show where the result is: the report's page, or the artifact."""
    pages = [entry.key for entry in load_manifest(store, artifact.prefix).files if entry.name.endswith(".html")]
    place = f"{store.uri}/{pages[0] if pages else artifact.prefix}"
    show_link("result", place_of(store, pages[0]) if pages else place, artifact.kind, place)
    return f"{artifact.kind} {place}"
