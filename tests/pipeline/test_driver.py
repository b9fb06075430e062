"""The driver: what is done is asked of the store alone, and everything is named before it runs."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from vc2.artifacts import Artifact, Manifest, commit
from vc2.errors import ConfigError, LaunchFailed
from vc2.pipeline.driver import DAG, STAGES, PlannedStage, drive, given_artifacts, next_repeat, plan
from vc2.pipeline.recipes import PipelineConfig, resolve
from vc2.storage import LocalStore

KINDS = {"shard": "shard_set", "train": "checkpoint", "evaluate": "report"}


class Runner:
    """Stands in for the work, not for the driver: commits a real, empty artifact and remembers the order."""

    def __init__(self, store: LocalStore) -> None:
        self.store, self.ran = store, []

    def __call__(self, stage: PlannedStage, inputs: Mapping[str, Artifact]) -> Artifact:
        self.ran.append(stage.name)
        assert set(inputs) == set(stage.inputs)
        first, _, second = stage.name.partition("/")
        manifest = Manifest(
            kind=KINDS[first],  # type: ignore[arg-type]
            stage=second if first == "train" else first,
            stage_version=stage.version,
            fingerprint=stage.fingerprint,
            config={},
            inputs=dict(inputs),
            files=(),
            facts={"source": second},
        )
        return commit(self.store, stage.prefix, manifest)


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return resolve("miniature", work=tmp_path)


def test_the_stages_are_the_deployments() -> None:
    assert STAGES == (
        "shard/webvid", "shard/laion-coco", "shard/jdb", "train/full", "train/spatial", "evaluate/evalcrafter",
    )  # fmt: skip
    for number, node in enumerate(DAG):
        assert all(STAGES.index(source) < number for source in node.inputs.values())


def test_nothing_is_done_twice(config: PipelineConfig, store: LocalStore) -> None:
    runner = Runner(store)
    first = drive(config, store, runner)
    assert runner.ran == list(STAGES)
    assert drive(config, store, runner) == first
    assert runner.ran == list(STAGES)


def test_what_could_not_be_measured_is_not_trained_unless_allowed(config: PipelineConfig, store: LocalStore) -> None:
    """Before any stage; not where nothing is to be trained or evaluated, and not for metrics that need no weights."""
    runner = Runner(store)
    strict = config.evolve(evaluation=config.evaluation.evolve(unmeasured="refuse"))
    with pytest.raises(ConfigError, match=r"metrics could not be measured after the training \(VQA_A, .*dover"):
        drive(strict, store, runner)
    assert runner.ran == []
    drive(strict, store, runner, stop_after="train/spatial")
    assert runner.ran == list(STAGES[:-1])
    drive(strict, store, runner)  # what is trained may be measured as far as it goes
    assert runner.ran == list(STAGES)
    few = strict.evolve(evaluation=strict.evaluation.evolve(metrics=("Flow_Score", "temporal_flickering")))
    drive(few, store, runner, repeat=1)
    assert runner.ran == [*STAGES, *STAGES]


def test_a_lost_stage_is_made_again_and_nothing_else(config: PipelineConfig, store: LocalStore) -> None:
    runner = Runner(store)
    drive(config, store, runner)
    lost = next(stage for stage in plan(config, store) if stage.name == "train/spatial")
    store.delete(f"{lost.prefix}/manifest.json")
    drive(config, store, runner)
    assert runner.ran == [*STAGES, "train/spatial"]


def test_a_knob_reuses_and_a_setting_remakes_all_that_follows(config: PipelineConfig, store: LocalStore) -> None:
    names = {stage.name: stage.fingerprint for stage in plan(config, store)}
    knob = config.evolve(full=config.full.evolve(log_every=7))
    assert {stage.name: stage.fingerprint for stage in plan(knob, store)} == names
    changed = config.evolve(laion_coco=config.laion_coco.evolve(seed=80))
    moved = {stage.name for stage in plan(changed, store) if stage.fingerprint != names[stage.name]}
    assert moved == {"shard/laion-coco", "train/full", "train/spatial", "evaluate/evalcrafter"}


def test_more_steps_continue_a_run_and_remake_what_follows(config: PipelineConfig, store: LocalStore) -> None:
    names = {stage.name: stage.fingerprint for stage in plan(config, store)}
    longer = {
        stage.name: stage.fingerprint
        for stage in plan(config.evolve(full=config.full.evolve(num_steps=config.full.num_steps + 1)), store)
    }
    assert longer["train/full"] == names["train/full"]
    assert longer["train/spatial"] != names["train/spatial"]


def test_repeat_makes_one_stage_once_more(config: PipelineConfig, store: LocalStore) -> None:
    runner = Runner(store)
    drive(config, store, runner)
    repeat = next_repeat(config, store, "train/spatial", None)
    assert repeat == 1
    drive(config, store, runner, start_at="train/spatial", repeat=repeat)
    assert runner.ran == [*STAGES, "train/spatial", "evaluate/evalcrafter"]


def test_a_range_of_stages_needs_what_comes_before(config: PipelineConfig, store: LocalStore) -> None:
    runner = Runner(store)
    with pytest.raises(ConfigError, match="needs shard/webvid, which is to do; run it first"):
        drive(config, store, runner, start_at="train/full")
    assert drive(config, store, runner, stop_after="shard/jdb").kind == "shard_set"
    drive(config, store, runner, start_at="train/full", stop_after="train/full")
    assert runner.ran == [*STAGES[:4]]
    with pytest.raises(ConfigError, match="nothing would run"):
        drive(config, store, runner, start_at="train/full", stop_after="shard/jdb")
    with pytest.raises(ConfigError, match="no stage 'training'"):
        drive(config, store, runner, start_at="training")


def test_a_stage_that_ends_well_without_a_manifest_is_an_error(config: PipelineConfig, store: LocalStore) -> None:
    with pytest.raises(LaunchFailed, match="ended well, yet"):
        drive(config, store, lambda stage, inputs: None)  # type: ignore[arg-type, return-value]


def test_an_artifact_given_by_uri_takes_the_place_of_its_stage(config: PipelineConfig, store: LocalStore) -> None:
    runner = Runner(store)
    made = drive(config, store, runner, stop_after="shard/webvid")
    other = config.evolve(webvid=config.webvid.evolve(seed=5))
    given = given_artifacts(store, [made.uri], "")
    drive(other, store, runner, given=given)
    assert runner.ran == list(STAGES)
    with pytest.raises(ConfigError, match="is not in the store"):
        given_artifacts(store, ["/somewhere/else/shards/x"], "")
    with pytest.raises(ConfigError, match="expected a Checkpoint"):
        given_artifacts(store, [], made.uri)
