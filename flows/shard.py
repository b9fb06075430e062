"""Deployments shard/webvid, shard/laion-coco, shard/jdb: a source to a shard set."""

from collections.abc import Sequence
from typing import Annotated, Literal

from prefect import flow, get_run_logger
from pydantic import Field

from flows.body import told_in_one_line
from flows.shown import ShownProgress
from flows.stage import opened, shown
from flows.turns import wait_for_turn
from vc2.config import Config, canonical_json
from vc2.pipeline.driver import FIELDS
from vc2.pipeline.recipes import DEFAULT_WORK, PipelineConfig, PipelineOverrides, Recipe
from vc2.pipeline.shard import ShardRequest
from vc2.pipeline.stages import run_shards
from vc2.storage import Store

__all__ = ["shard"]

Source = Literal["webvid", "laion-coco", "jdb"]
AS_IN_RECIPE = PipelineOverrides()


@flow(name="shard")
@told_in_one_line
def shard(
    source: Source,
    recipe: Recipe = "miniature",
    store: str = "",
    retry: Sequence[str] = (),
    fresh: bool = False,
    repeat: Annotated[int, Field(ge=0)] = 0,
    overrides: PipelineOverrides = AS_IN_RECIPE,  # pyright: ignore[reportInvalidTypeForm]
) -> str:
    """Fetch, filter and shard one source. Safe to repeat: a shard set appears whole or not at all.

    Args:
        source: Which source of the recipe.
        recipe: Where all settings start from.
        store: Local path or s3://bucket/prefix; empty: the one of the worker (VC2_STORE).
        retry: Reasons, such as timeout: rejects of the newest set are tried again and make its next generation.
        fresh: Make it from scratch, though an earlier set of a source that has grown since could grow too.
        repeat: Raise it to make the same shard set once more.
        overrides: Settings to change; what is left empty keeps the recipe's value.
    """
    name = f"shard/{source}"
    config, place = opened(recipe, store, overrides)
    request = ShardRequest(retry=tuple(retry), fresh=fresh, repeat=repeat)
    note = get_run_logger().info
    wait_for_turn(_what(name, config, place, request))
    made = run_shards(name, config, place, DEFAULT_WORK, request, progress=ShownProgress(name), note=note)
    assert made is not None
    return shown(name, made, place)


def _what(name: str, config: PipelineConfig, store: Store, request: ShardRequest) -> str:
    """A name of what is made. Whether it grows out of an earlier set is the one thing that two runs may differ in."""
    stage: Config = getattr(config, FIELDS[name])
    world = config.world.identity() if config.world else None
    return canonical_json([store.uri, name, stage.identity(), world, request.repeat, request.retry])
