"""What flows have in common: they resolve what is asked for; a stage flow then runs it and shows what it made."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.shown import ShownProgress, show_artifact
from flows.turns import wait_for_turn
from vc2.artifacts import Artifact
from vc2.config import Config
from vc2.errors import ConfigError, StoreError
from vc2.pipeline.driver import NODES, PlannedStage, given_artifacts, plan
from vc2.pipeline.recipes import DEFAULT_WORK, PipelineConfig, PipelineOverrides, Recipe, default_store, resolve
from vc2.pipeline.stages import run_stage
from vc2.storage import Store, join_uri, open_store

__all__ = ["RAY_VARIABLES", "Asked", "asked", "opened", "run", "shown"]

RAY_VARIABLES = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the parameters of a run come to."""

    config: PipelineConfig
    store: Store
    given: Mapping[str, Artifact]  #: by stage name
    stages: list[PlannedStage]


def asked(name: str, parameters: Mapping[str, Any]) -> Asked:
    """What a run of a deployment was asked for, and what of it is done.

    Args:
        name: Of the deployment: a stage of the DAG, or the driver.
        parameters: Of the run, as the server keeps them.

    Raises:
        ConfigError: If a parameter does not fit: no such setting, no such artifact, an artifact of another kind.
    """
    overrides = PipelineOverrides.model_validate(parameters.get("overrides") or {})
    config = resolve(parameters.get("recipe") or "miniature", overrides, work=DEFAULT_WORK)
    store = _store(parameters.get("store") or default_store())
    try:
        given = _given(name, store, parameters)
    except StoreError as error:
        next(iter(store.list("shards/")), None)  # raises what may pass, if the store does not answer
        raise ConfigError(str(error)) from None  # it does, and has no such thing: asking again does not help
    start_at = name if name in NODES else parameters.get("start_at")
    stages = plan(config, store, repeat=parameters.get("repeat") or 0, start_at=start_at, given=given)
    return Asked(config, store, given, stages)


def run(stage: str, parameters: Mapping[str, Any]) -> str:
    """Run one stage that takes artifacts; one line on what it made."""
    _leave_lost_ray()
    what = asked(stage, parameters)
    planned = next(found for found in what.stages if found.name == stage)
    wait_for_turn(join_uri(what.store.uri, planned.prefix))
    progress = ShownProgress(stage)
    artifact = run_stage(
        stage,
        what.config,
        what.store,
        DEFAULT_WORK,
        given=what.given,
        repeat=parameters["repeat"],
        progress=progress,
    )
    progress.end()
    return shown(stage, artifact, what.store)


def opened(recipe: Recipe, store: str, overrides: Config) -> tuple[PipelineConfig, Store]:
    """The resolved recipe and the store of a stage flow that takes no artifacts."""
    _leave_lost_ray()
    return resolve(recipe, overrides, work=DEFAULT_WORK), _store(store or default_store())


def shown(stage: str, artifact: Artifact, store: Store) -> str:
    """Show an artifact in the UI; one line on it."""
    show_artifact(stage, artifact, store)
    return f"{artifact.kind} {artifact.uri}"


def _store(uri: str) -> Store:
    try:
        return open_store(uri)
    except StoreError as error:  # nothing is asked of it yet, so it is the URI
        raise ConfigError(str(error)) from None


def _given(name: str, store: Store, parameters: Mapping[str, Any]) -> dict[str, Artifact]:
    """Artifacts named by URI. A stage knows the roles of its checkpoints, the driver goes by who made them."""
    shards: Sequence[str] = parameters.get("shards") or ()
    if name not in NODES:
        return given_artifacts(store, shards, parameters.get("checkpoint") or "")
    node = NODES[name]
    given = given_artifacts(store, shards, "")
    if strangers := set(given) - set(node.inputs.values()):
        raise ConfigError(
            f"{name} takes {', '.join(node.inputs.values())}; {', '.join(sorted(strangers))} is none of them"
        )
    for parameter in ("checkpoint", "base"):
        if not (uri := parameters.get(parameter)):
            continue
        role = "start_from" if name.startswith("train/") else parameter
        if role not in node.inputs:
            raise ConfigError(f"{name} starts from no checkpoint; name other weights by {node.field}.sd_path")
        (given[node.inputs[role]],) = given_artifacts(store, (), uri).values()
    return given


def _leave_lost_ray() -> None:
    """A run that is retried by itself must not look for the Ray session of a driver that is gone."""
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    if host != "127.0.0.1":
        return
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        for name in RAY_VARIABLES:
            os.environ.pop(name, None)
