"""Deployments train/full and train/spatial: shard sets to finished weights."""

from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from flows.body import told_in_one_line
from flows.stage import run
from vc2.pipeline.recipes import PipelineOverrides, Recipe

__all__ = ["train"]

Stage = Literal["full", "spatial"]
AS_IN_RECIPE = PipelineOverrides()


@flow(name="train")
@told_in_one_line
def train(
    stage: Stage,
    recipe: Recipe = "miniature",
    store: str = "",
    shards: tuple[str, ...] = (),
    checkpoint: str = "",
    repeat: Annotated[int, Field(ge=0)] = 0,
    overrides: PipelineOverrides = AS_IN_RECIPE,  # pyright: ignore[reportInvalidTypeForm]
) -> str:
    """Train one stage, from its newest state where there is one.

    Args:
        stage: Which training stage of the recipe.
        recipe: Where all settings start from.
        store: Local path or s3://bucket/prefix; empty: the one of the worker (VC2_STORE).
        shards: Shard sets, as URI or source=URI; empty: those that recipe and overrides resolve to.
        checkpoint: Weights to start from, by URI; empty: those that recipe and overrides resolve to.
        repeat: Raise it to train the same once more.
        overrides: Settings to change; what is left empty keeps the recipe's value.
    """
    inputs = {"shards": shards, "checkpoint": checkpoint}
    request = {"recipe": recipe, "store": store, "repeat": repeat, "overrides": overrides, **inputs}
    return run(f"train/{stage}", request)
