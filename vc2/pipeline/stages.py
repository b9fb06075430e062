"""The stages of the DAG as plain functions: references in, a reference out. Nothing here knows who calls them.

A stage looks for its artifact first, makes it if there is none, and commits its manifest last; so it can be repeated,
killed and run twice at once.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from vc2.artifacts import (
    Artifact,
    Checkpoint,
    Report,
    SampleSet,
    Scorecard,
    ShardSet,
    find,
    fingerprint,
    shard_set_prefix,
)
from vc2.config import digest
from vc2.data.config import ShardStage, removal_lists, shard_fingerprint
from vc2.errors import ConfigError
from vc2.eval.config import EvaluateStage, SampleStage
from vc2.pipeline.driver import NODES, PlannedStage, plan
from vc2.pipeline.recipes import PipelineConfig
from vc2.pipeline.shard import ShardRequest, make_shards, prepare_where_asked, ready_source
from vc2.progress import Progress, silent
from vc2.storage import Store, join_uri

if TYPE_CHECKING:
    from vc2.eval.metrics import Video
    from vc2.eval.ranks import Launch

__all__ = ["execute", "page_of", "run_shards", "run_stage", "sampled", "scored"]


def run_stage(
    name: str,
    config: PipelineConfig,
    store: Store,
    work: Path,
    *,
    given: Mapping[str, Artifact] | None = None,
    repeat: int = 0,
    progress: Progress = silent,
) -> Artifact:
    """One stage by itself. Its inputs are those given (by stage name), else those that the recipe resolves to.

    Raises:
        ConfigError: If an input is not done.
    """
    stages = {stage.name: stage for stage in plan(config, store, repeat=repeat, start_at=name, given=given)}
    wanted = stages[name]
    if wanted.artifact is not None:
        return wanted.artifact
    inputs: dict[str, Artifact] = {}
    for role, source in wanted.inputs.items():
        artifact = stages[source].artifact
        if artifact is None:
            raise ConfigError(
                f"{name} needs {source}, which is {stages[source].state}; run it first (vc2 run does all), "
                "or give its URI"
            )
        inputs[role] = artifact
    return execute(wanted, config, store, work, inputs=inputs, progress=progress)


def execute(
    stage: PlannedStage,
    config: PipelineConfig,
    store: Store,
    work: Path,
    *,
    inputs: Mapping[str, Artifact],
    progress: Progress = silent,
) -> Artifact:
    """Make the artifact of a planned stage from its inputs."""
    work.mkdir(parents=True, exist_ok=True)
    kind = NODES[stage.name].kind
    if kind is ShardSet:
        return _shard(stage, config, store, work, progress)
    if kind is Checkpoint:
        return _train(stage, config, store, work, inputs, progress)
    return _evaluate(stage, config, store, work, inputs, progress)


def _shard(stage: PlannedStage, config: PipelineConfig, store: Store, work: Path, progress: Progress) -> Artifact:
    wanted: ShardStage = getattr(config, NODES[stage.name].field)
    is_here = wanted.launcher == "local"  # a job makes what it needs where it runs
    with ready_source(config, wanted, work, progress) if is_here else nullcontext(wanted) as ready:
        made = prepare_where_asked(
            ready,
            store,
            work,
            world=config.world,
            fingerprint=stage.fingerprint,
            removals=removal_lists(store, wanted.source.name),
            repeat=stage.repeat,
            progress=progress,
        )
    assert made is not None
    return made


def run_shards(
    name: str,
    config: PipelineConfig,
    store: Store,
    work: Path,
    request: ShardRequest,
    *,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda text: None,
) -> ShardSet | None:
    """A shard stage of the recipe by itself, as a further generation of an earlier set where that is meant.

    Returns:
        None if only some shards were asked for and others are still to be built.
    """
    wanted: ShardStage = getattr(config, NODES[name].field)
    source = digest(config.world.identity()) if config.world else ""
    removals = removal_lists(store, wanted.source.name)
    plain = shard_fingerprint(name, wanted, source, removals=removals)
    found = find(store, shard_set_prefix(wanted.source.name, plain), ShardSet)
    if source and found is not None and not (request.retry or request.remove or request.repeat):
        return found
    with ready_source(config, wanted, work, progress) as ready:
        place = {"source": source, "world": config.world}
        return make_shards(name, ready, store, work, request, **place, progress=progress, note=note)


def _train(
    stage: PlannedStage,
    config: PipelineConfig,
    store: Store,
    work: Path,
    inputs: Mapping[str, Artifact],
    progress: Progress,
) -> Artifact:
    from vc2.train.run import train

    shards = {role: artifact for role, artifact in inputs.items() if isinstance(artifact, ShardSet)}
    start_from = inputs.get("start_from")
    return train(
        getattr(config, NODES[stage.name].field),
        store,
        work,
        fingerprint=stage.fingerprint,
        shards=shards,
        start_from=start_from if isinstance(start_from, Checkpoint) else None,
        inputs=inputs,
        repeat=stage.repeat,
        progress=progress,
    )


def _evaluate(
    stage: PlannedStage,
    config: PipelineConfig,
    store: Store,
    work: Path,
    inputs: Mapping[str, Artifact],
    progress: Progress,
) -> Artifact:
    from vc2.eval.report import publish
    from vc2.pipeline.gather import gather, real_clips

    started = time.monotonic()
    wanted = config.evaluation.with_prompts().with_metrics()
    made = {
        role: sampled(wanted.sampling(), store, work, artifact, stage.repeat, progress)
        for role, artifact in inputs.items()
        if isinstance(artifact, Checkpoint)
    }
    real = real_clips(store, inputs["videos"], wanted.all_prompts()) if "videos" in inputs else {}
    scorecard = scored(wanted, config, store, work, made, real, stage.repeat, progress)
    others = {"base_samples": made["base"]} if "base" in made else {}
    progress("report", 0, 1)
    data = gather(config, store, inputs, made, scorecard, real, progress=progress)
    report = publish(
        store,
        data,
        fingerprint=stage.fingerprint,
        stage=stage.name,
        stage_version=stage.version,
        inputs={**inputs, **others, "samples": made["checkpoint"], "scores": scorecard},
        config=wanted.model_dump(mode="json"),
        repeat=stage.repeat,
        seconds=time.monotonic() - started,
    )
    progress("report", 1, 1)
    return report


def sampled(
    sampling: SampleStage,
    store: Store,
    work: Path,
    checkpoint: Checkpoint,
    repeat: int,
    progress: Progress,
    launch: "Launch | None" = None,
) -> SampleSet:
    """The videos that `sampling` asks of a checkpoint; made if they are not there, by the launcher that it asks for or
    the one given."""
    from vc2.eval.generate import generate, sample_set_name

    name = sample_set_name(sampling, checkpoint, repeat)
    told = {"repeat": repeat, "progress": progress, "launch": launch}
    return generate(sampling, store, work, fingerprint=name, checkpoint=checkpoint, **told)


def scored(
    wanted: EvaluateStage,
    config: PipelineConfig,
    store: Store,
    work: Path,
    made: Mapping[str, SampleSet],
    real: "Mapping[str, Video]",
    repeat: int,
    progress: Progress,
) -> Scorecard:
    """What is measured of the videos of a checkpoint (role `checkpoint`); in a small world judged by its truth, beside
    those from before stage 2 (role `base`) and real clips, where there are such."""
    from vc2.eval.scorecard import STAGE_VERSION, sampled_videos, score

    judge, others = None, {}
    if config.world is not None:
        from vc2.pipeline.gather import BEFORE, REAL, judge_by_truth

        judge = judge_by_truth
        if "base" in made:
            others[BEFORE] = sampled_videos(store, made["base"], wanted.all_prompts())
        if real:
            others[REAL] = list(real.values())
    inputs = {role: samples.fingerprint for role, samples in made.items()}
    return score(
        wanted,
        store,
        work,
        fingerprint=fingerprint("score", STAGE_VERSION, wanted, inputs, repeat),
        samples=made["checkpoint"],
        judge=judge,
        others=others,
        progress=progress,
        repeat=repeat,
    )


def page_of(store: Store, artifact: Artifact) -> str | None:
    """Where the HTML page of a report is, or None for other artifacts."""
    if not isinstance(artifact, Report):
        return None
    return join_uri(store.uri, f"{artifact.prefix}/report.html")
