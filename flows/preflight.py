"""Deployment preflight/recipe: what a run needs, looked at before it runs. The driver starts it before its first stage;
it can be run alone, to see what is still to be got."""

from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.body import told_in_one_line
from flows.shown import ShownProgress, show_findings
from vc2.pipeline.driver import StageName
from vc2.pipeline.preflight import preflight_of_recipe, require
from vc2.pipeline.recipes import DEFAULT_WORK, PipelineOverrides, Recipe, default_store

__all__ = ["preflight"]

AS_IN_RECIPE = PipelineOverrides()


@flow(name="preflight")
@told_in_one_line
def preflight(
    recipe: Recipe = "miniature",
    store: str = "",
    stages: tuple[StageName, ...] = (),
    shards: tuple[str, ...] = (),
    checkpoint: str = "",
    start_at: StageName | None = None,
    repeat: Annotated[int, Field(ge=0)] = 0,
    overrides: PipelineOverrides = AS_IN_RECIPE,  # pyright: ignore[reportInvalidTypeForm]
) -> str:
    """Look at sources, weights, prompts, store and machines; start the ranks for a moment. Trains nothing.

    Args:
        recipe: Where all settings start from.
        store: Local path or s3://bucket/prefix; empty: the one of the worker (VC2_STORE).
        stages: Those whose needs are looked at; empty: all that are not done.
        shards: Shard sets that will be taken in place of the recipe's, as URI or source=URI.
        checkpoint: Checkpoint that will be taken in place of the recipe's, by URI.
        start_at: First stage that may run, as the run will have it.
        repeat: As the run will have it.
        overrides: Settings to change; what is left empty keeps the recipe's value.
    """
    looks = preflight_of_recipe(
        recipe,
        overrides,
        store or default_store(),
        DEFAULT_WORK,
        stages=stages,
        start_at=start_at,
        repeat=repeat,
        shards=shards,
        checkpoint=checkpoint,
        progress=ShownProgress("preflight"),
    )
    findings = list(looks)
    show_findings(findings)
    require(findings)
    return f"all is well: {len(findings)} things looked at" if findings else "nothing has to run"
