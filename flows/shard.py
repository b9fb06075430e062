"""Deployments shard/webvid, shard/laion-coco, shard/jdb: a source to a shard set."""

from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from flows.shown import told_in_one_line
from flows.stage import run
from vc2.pipeline.recipes import PipelineOverrides, Recipe

__all__ = ["shard"]

Source = Literal["webvid", "laion-coco", "jdb"]
AS_IN_RECIPE = PipelineOverrides()


@flow(name="shard")
@told_in_one_line
def shard(
    source: Source,
    recipe: Recipe = "miniature",
    store: str = "",
    repeat: Annotated[int, Field(ge=0)] = 0,
    overrides: PipelineOverrides = AS_IN_RECIPE,  # pyright: ignore[reportInvalidTypeForm]
) -> str:
    """Fetch, filter and shard one source. Safe to repeat: a shard set appears whole or not at all.

    Args:
        source: Which source of the recipe.
        recipe: Where all settings start from.
        store: Local path or s3://bucket/prefix; empty: the one of the worker (VC2_STORE).
        repeat: Raise it to make the same shard set once more.
        overrides: Settings to change; what is left empty keeps the recipe's value.
    """
    return run(f"shard/{source}", recipe, store, overrides, repeat)
