"""Deployment evaluate/evalcrafter: a checkpoint to samples, scores and the report."""

from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.body import told_in_one_line
from flows.stage import run
from vc2.pipeline.recipes import PipelineOverrides, Recipe

__all__ = ["evaluate"]

AS_IN_RECIPE = PipelineOverrides()


@flow(name="evaluate")
@told_in_one_line
def evaluate(
    recipe: Recipe = "miniature",
    store: str = "",
    shards: tuple[str, ...] = (),
    checkpoint: str = "",
    base: str = "",
    repeat: Annotated[int, Field(ge=0)] = 0,
    overrides: PipelineOverrides = AS_IN_RECIPE,  # pyright: ignore[reportInvalidTypeForm]
) -> str:
    """Sample videos, score them, write the report.

    Args:
        recipe: Where all settings start from.
        store: Local path or s3://bucket/prefix; empty: the one of the worker (VC2_STORE).
        shards: Shard sets to compare with, as URI or source=URI; empty: those that recipe and overrides resolve to.
        checkpoint: Weights to evaluate, by URI; empty: those that recipe and overrides resolve to.
        base: Weights to compare with (before stage 2), by URI; empty: those that recipe and overrides resolve to.
        repeat: Raise it to evaluate the same once more.
        overrides: Settings to change; what is left empty keeps the recipe's value.
    """
    inputs = {"shards": shards, "checkpoint": checkpoint, "base": base}
    request = {"recipe": recipe, "store": store, "repeat": repeat, "overrides": overrides, **inputs}
    return run("evaluate/evalcrafter", request)
