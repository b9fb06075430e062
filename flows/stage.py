"""What every stage flow does: resolve the recipe, run the stage of `vc2.pipeline`, show what it made."""

import os
import socket
from collections.abc import Mapping, Sequence

from flows.shown import ShownProgress, show_artifact
from vc2.artifacts import Artifact
from vc2.config import Config
from vc2.errors import ConfigError
from vc2.pipeline.driver import DAG, Node, given_artifacts
from vc2.pipeline.recipes import DEFAULT_WORK, PipelineConfig, Recipe, default_store, resolve
from vc2.pipeline.stages import run_stage
from vc2.storage import Store, open_store

__all__ = ["RAY_VARIABLES", "opened", "run", "shown"]

RAY_VARIABLES = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")


def run(
    stage: str,
    recipe: Recipe,
    store: str,
    overrides: Config,
    repeat: int,
    *,
    shards: Sequence[str] = (),
    checkpoints: Mapping[str, str] | None = None,
) -> str:
    """Run one stage; one line on what it made.

    Args:
        shards: Shard sets to take as inputs, by URI; those not given are what the recipe resolves to.
        checkpoints: Checkpoints to take as inputs: role -> URI, empty for what the recipe resolves to.
    """
    config, place = opened(recipe, store, overrides)
    given = _given(next(node for node in DAG if node.name == stage), place, shards, checkpoints or {})
    artifact = run_stage(stage, config, place, DEFAULT_WORK, given=given, repeat=repeat, progress=ShownProgress(stage))
    return shown(stage, artifact, place)


def opened(recipe: Recipe, store: str, overrides: Config) -> tuple[PipelineConfig, Store]:
    """The resolved recipe and the store of a stage flow."""
    _leave_lost_ray()
    return resolve(recipe, overrides, work=DEFAULT_WORK), open_store(store or default_store())


def shown(stage: str, artifact: Artifact, store: Store) -> str:
    """Show an artifact in the UI; one line on it."""
    show_artifact(stage, artifact, store)
    return f"{artifact.kind} {artifact.uri}"


def _given(node: Node, store: Store, shards: Sequence[str], checkpoints: Mapping[str, str]) -> dict[str, Artifact]:
    given = given_artifacts(store, shards, "")
    if strangers := set(given) - set(node.inputs.values()):
        raise ConfigError(
            f"{node.name} takes {', '.join(node.inputs.values())}; {', '.join(strangers)} is none of them"
        )
    for role, uri in checkpoints.items():
        if uri:
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
