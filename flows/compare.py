"""Deployment compare/strategies: the rows of Table 3 in a small world, trained as deployments, sampled and judged here.

The stages of all rows are runs of their own, found again by (fingerprint, root run) as the driver's are, so a run that
is retried goes on; what rows share is run once.
"""

from collections.abc import Mapping
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.body import told_in_one_line
from flows.pipeline import Children, attempt_started
from flows.shown import ShownProgress, place_of, show_link, show_table
from flows.stage import Asked, opened
from vc2.artifacts import Artifact, load_manifest
from vc2.pipeline.compare import PAGE, Member, chosen_rows, members
from vc2.pipeline.compare import compare as compare_members
from vc2.pipeline.driver import STAGES, PlannedStage, plan
from vc2.pipeline.recipes import DEFAULT_WORK, PipelineOverrides, Recipe

__all__ = ["compare"]

AS_IN_RECIPE = PipelineOverrides()


@flow(name="compare")
@told_in_one_line
def compare(
    recipe: Recipe = "study",
    store: str = "",
    rows: tuple[str, ...] = (),
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2),
    overrides: PipelineOverrides = AS_IN_RECIPE,  # pyright: ignore[reportInvalidTypeForm]
) -> str:
    """Train, sample and judge rows of Table 3; one table, a verdict per claim. Safe to repeat and to retry.

    Args:
        recipe: Where all settings start from; one with a small world.
        store: Local path or s3://bucket/prefix; empty: the one of the worker (VC2_STORE).
        rows: Rows of Table 3, such as F-Spa-DIR; their bases come with them; empty: all eleven.
        seeds: Of training.
        overrides: Settings to change; what is left empty keeps the recipe's value.
    """
    asked = members(recipe, overrides, chosen_rows(rows), seeds, DEFAULT_WORK)
    _, place = opened(recipe, store, overrides)
    progress = ShownProgress("compare/strategies")
    children: dict[tuple[str, int], Children] = {}

    def run(member: Member, planned: PlannedStage, inputs: Mapping[str, Artifact]) -> None:
        key = member.row.value, member.seed
        if key not in children:
            what = Asked(member.config, place, {}, plan(member.config, place))
            own = PipelineOverrides.model_validate(member.settings)
            children[key] = Children(recipe, what, own, list(STAGES), None, None, attempt_started(), progress=progress)
        children[key].run(planned, inputs)

    try:
        made = compare_members(asked, place, DEFAULT_WORK, run, progress=progress)
    finally:
        for each in children.values():
            each.end_ray()
    progress.end()
    verdicts = load_manifest(place, made.prefix).facts["verdicts"]
    show_table("verdicts", [{"claim": claim, "verdict": verdict} for claim, verdict in verdicts.items()], "verdicts")
    page = f"{made.prefix}/{PAGE}"
    show_link("comparison", place_of(place, page), "comparison", f"{place.uri}/{page}")
    return f"Report {place.uri}/{page}"
