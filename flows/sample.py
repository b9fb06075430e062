"""Deployment sample/grid: a few videos of a checkpoint on one page, for somebody to look at."""

from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.body import told_in_one_line
from flows.shown import ShownProgress, show_artifact
from flows.stage import Asked, asked
from flows.turns import wait_for_turn
from vc2.artifacts import Checkpoint
from vc2.errors import ConfigError
from vc2.pipeline.grid import MOST, PAGE, grid_prefix, make_grid
from vc2.pipeline.recipes import DEFAULT_WORK, PipelineOverrides, Recipe
from vc2.storage import join_uri

__all__ = ["sample"]

AS_IN_RECIPE = PipelineOverrides()
NEWEST_FIRST = ("train/spatial", "train/full")


@flow(name="sample")
@told_in_one_line
def sample(
    recipe: Recipe = "miniature",
    store: str = "",
    checkpoint: str = "",
    count: Annotated[int, Field(ge=1, le=MOST)] = 16,
    repeat: Annotated[int, Field(ge=0)] = 0,
    overrides: PipelineOverrides = AS_IN_RECIPE,  # pyright: ignore[reportInvalidTypeForm]
) -> str:
    """Sample the evaluation's first prompts and lay them on a page.

    Args:
        recipe: Where all settings start from.
        store: Local path or s3://bucket/prefix; empty: the one of the worker (VC2_STORE).
        checkpoint: Weights to sample, by URI; empty: those that recipe and overrides resolve to, of the last training
            stage that is done.
        count: Videos on the page.
        repeat: Raise it to make the same page once more.
        overrides: Settings to change; what is left empty keeps the recipe's value.
    """
    what = asked("sample/grid", {"recipe": recipe, "store": store, "checkpoint": checkpoint, "overrides": overrides})
    weights = _weights(what)
    prefix = grid_prefix(what.config, weights, count=count, repeat=repeat)
    wait_for_turn(join_uri(what.store.uri, prefix))
    progress = ShownProgress("sample/grid")
    made = make_grid(what.config, what.store, DEFAULT_WORK, weights, count=count, repeat=repeat, progress=progress)
    show_artifact("sample/grid", made, what.store)
    return f"Report {join_uri(made.uri, PAGE)}"


def _weights(what: Asked) -> Checkpoint:
    given = [artifact for artifact in what.given.values() if isinstance(artifact, Checkpoint)]
    done = {stage.name: stage.artifact for stage in what.stages}
    found = [artifact for name in NEWEST_FIRST if isinstance(artifact := done[name], Checkpoint)]
    if not (chosen := [*given, *found]):
        raise ConfigError(f"no checkpoint: none of {', '.join(NEWEST_FIRST)} is done; train first, or give its URI")
    return chosen[0]
