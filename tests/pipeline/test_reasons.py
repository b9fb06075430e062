"""Why a stage is not done: exactly what differs from the nearest thing that was finished, found with few reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.finished import finish
from vc2.artifacts import Manifest, commit, load_manifest, newest_notes
from vc2.config import merge
from vc2.errors import ConfigError
from vc2.pipeline.driver import FIELDS, STAGES, plan
from vc2.pipeline.preview import previewed
from vc2.pipeline.reasons import Difference, Past, Reason, reasons
from vc2.pipeline.recipes import PipelineConfig, resolve
from vc2.storage import Entry, LocalStore


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return resolve("miniature", work=tmp_path)


def why(config: PipelineConfig, store: LocalStore, *, repeat: int = 0, against: str = "") -> dict[str, Reason]:
    return reasons(plan(config, store, repeat=repeat), config, Past(store), against=against)


def keys(reason: Reason) -> list[str]:
    return [difference.key for difference in reason.differences]


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The settings of an identity, those in lists left out."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from leaves(part, (*path, name))
    elif not isinstance(value, list):
        yield path, value


def others(value: Any) -> list[Any]:
    """Values that a setting may have instead."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2, value - 1]
    if isinstance(value, float):
        return [value / 2, value + 0.25, value * 2]
    if value is None:
        return [1, 0.5, 3]
    return [f"{value}x", "pyav", "x264", "hold", "reject", "raw", "raft", "fixed", "spatial", "none"]


def changed(config: PipelineConfig, field: str) -> Iterator[tuple[str, PipelineConfig]]:
    """The config with each setting of a stage changed, one after the other, as far as the setting has another value."""
    for path, value in leaves(getattr(config, field).identity()):
        for other in others(value):
            nested: Any = other
            for name in reversed((field, *path)):
                nested = {name: nested}
            try:
                found = merge(config, nested)
            except ConfigError:
                continue
            if getattr(found, field).identity() != getattr(config, field).identity():
                yield ".".join((field, *path)), found
                break


@pytest.mark.parametrize(("stage", "least"), [("shard/webvid", 30), ("train/full", 50), ("evaluate/evalcrafter", 15)])
def test_every_setting_that_is_changed_is_named_and_no_other(
    config: PipelineConfig, store: LocalStore, stage: str, least: int
) -> None:
    """And what comes after the stage names it as the reason of its input."""
    finish(config, store)
    tried = 0
    past, field = Past(store), FIELDS[stage]
    for key, other in changed(config, field):
        # Another source has sets of its own; what metrics are measured with is set as a whole.
        if key.startswith((f"{field}.source.name", f"{field}.measured_with", f"{field}.not_measured")):
            continue
        found = reasons(plan(other, store), other, past)
        assert keys(found[stage]) == [key], key
        for later in found.keys() - {stage}:
            assert key in found[later].line and not {key} & set(keys(found[later]))
        tried += 1
    assert tried >= least


def test_a_knob_is_no_reason(config: PipelineConfig, store: LocalStore) -> None:
    finish(config, store)
    knobs = {"full": {"log_every": 7, "keep_states": 5}, "webvid": {"workers": 3}, "evaluation": {"world_size": 1}}
    assert why(merge(config, knobs), store) == {}


def test_a_reason_is_told_in_a_line(config: PipelineConfig, store: LocalStore) -> None:
    finish(config, store)
    few = why(merge(config, {"full": {"optimizer": {"lr": 1e-4}}}), store)
    assert few["train/full"].line == "full.optimizer.lr 0.0015 -> 0.0001"
    assert few["train/spatial"].line == (
        "input start_from: train/full is to be made (full.optimizer.lr 0.0015 -> 0.0001)"
    )
    assert few["evaluate/evalcrafter"].line == "inputs checkpoint, base: others (full.optimizer.lr 0.0015 -> 0.0001)"
    many = {"seed": 5, "ema_decay": 0.5, "caption_dropout": 0.25, "batch_size": 16, "image_share": 0.5}
    line = why(merge(config, {"full": many}), store)["train/full"].line
    assert line.endswith(" and 2 more") and line.count("->") == 3


def test_more_steps_are_a_reason_of_the_same_run(config: PipelineConfig, store: LocalStore) -> None:
    finish(config, store)
    assert why(merge(config, {"full": {"num_steps": 1200}}), store)["train/full"].line == "full.num_steps 1100 -> 1200"


def test_repeat_version_and_raw_data_are_named(config: PipelineConfig, store: LocalStore, tmp_path: Path) -> None:
    finish(config, store, version=1)
    for stage, reason in why(config, store, repeat=2).items():
        assert f"repeat of {stage}" in keys(reason) and f"version of {stage}" in keys(reason)
    other = resolve("miniature", {"world": {"seed": 7}}, work=tmp_path)
    finish(other, store, stop_after="shard/jdb")
    third = resolve("miniature", {"world": {"seed": 8}}, work=tmp_path)
    assert why(third, store)["shard/jdb"].line == "jdb.source: table or files changed"


def test_the_nearest_has_the_fewest_differences(config: PipelineConfig, store: LocalStore) -> None:
    """Not the newest."""
    finish(config, store)
    finish(merge(config, {"full": {"seed": 3, "batch_size": 16, "ema_decay": 0.5}}), store)
    assert keys(why(merge(config, {"full": {"batch_size": 16}}), store)["train/full"]) == ["full.batch_size"]


def test_nothing_like_it_says_so(config: PipelineConfig, store: LocalStore) -> None:
    assert {reason.line for reason in why(config, store).values()} == {
        "nothing like it was ever finished in this store"
    }


def test_a_plan_is_compared_with_what_one_artifact_was_made_by(config: PipelineConfig, store: LocalStore) -> None:
    """Done stages too, however near others are; an artifact in mid-chain has only what comes before it."""
    made = finish(config, store)
    other = merge(config, {"full": {"optimizer": {"lr": 1e-4}}})
    finish(other, store)
    assert why(other, store) == {}
    found = why(other, store, against=made["evaluate/evalcrafter"].uri)
    assert set(found) == set(STAGES)
    assert keys(found["train/full"]) == ["full.optimizer.lr"] and found["shard/jdb"].line == "the same"
    assert keys(found["train/spatial"]) == ["input start_from"]
    assert "another checkpoint (full.optimizer.lr" in found["train/spatial"].line
    assert set(why(other, store, against=made["train/full"].uri)) == {"train/full", "shard/webvid", "shard/laion-coco"}
    with pytest.raises(ConfigError, match="is not in the store"):
        why(other, store, against="/somewhere/else")


class Counting(LocalStore):
    """A store that counts what is asked of it."""

    calls = 0

    def read(self, key: str) -> bytes:
        self.calls += 1
        return super().read(key)

    def entry(self, key: str) -> Entry | None:
        self.calls += 1
        return super().entry(key)

    def list(self, prefix: str) -> Iterator[Entry]:
        self.calls += 1
        for entry in super().list(prefix):
            self.calls += 1
            yield entry


def test_few_objects_are_read_however_many_there_are(config: PipelineConfig, tmp_path: Path) -> None:
    store = Counting(tmp_path / "store")
    finish(config, store)
    asked = []
    for number in range(40, 161, 60):
        for seed in range(number - 40, number + 20):
            text = store.read(newest_notes(store, "runs/full", 1)[0].prefix + "/manifest.json")
            old = Manifest.model_validate_json(text)
            name = f"{seed:064x}"
            manifest = old.evolve(fingerprint=name, config=old.config | {"seed": seed + 9}, content_digest="")
            commit(store, f"runs/full/{name}/checkpoints/{config.full.num_steps:08d}", manifest)
        store.calls = 0
        other = merge(config, {"full": {"seed": 77}, "jdb": {"seed": 78}})
        previewed(plan(other, store), other, store)
        asked.append(store.calls)
    assert asked[0] == asked[1] == asked[2] < 300


def test_a_store_from_before_the_catalogue_is_looked_through(config: PipelineConfig, store: LocalStore) -> None:
    finish(config, store)
    for entry in [*store.list("catalog/")]:
        store.delete(entry.key)
    assert keys(why(merge(config, {"full": {"seed": 5}}), store)["train/full"]) == ["full.seed"]


def test_a_set_of_many_generations_is_told_from_changed_data(config: PipelineConfig, store: LocalStore) -> None:
    """However long its history: what its note leaves out is no difference."""
    made = finish(config, store)["shard/webvid"]
    manifest = load_manifest(store, made.prefix)
    store.delete(f"{made.prefix}/manifest.json")
    history = [{"change": {"kind": "grow"}, "ledger": f"ledgers/webvid/{number:064x}"} for number in range(99)]
    commit(store, made.prefix, manifest.evolve(facts=manifest.facts | {"generations": history}))
    assert keys(why(merge(config, {"webvid": {"seed": 5}}), store)["shard/webvid"]) == [
        "webvid.seed", "webvid.generation",
    ]  # fmt: skip


def test_a_note_of_what_is_gone_or_torn_is_passed_over(config: PipelineConfig, store: LocalStore) -> None:
    made = finish(config, store)
    near = finish(merge(config, {"full": {"seed": 4}}), store)
    other = merge(config, {"full": {"seed": 4, "batch_size": 16}})
    assert keys(why(other, store)["train/full"]) == ["full.batch_size"]
    store.delete(f"{near['train/full'].prefix}/manifest.json")
    found = why(other, store)["train/full"]
    assert found.prefix == made["train/full"].prefix and set(keys(found)) == {"full.seed", "full.batch_size"}
    for entry in [*store.list("catalog/runs/full/")]:
        store.write(entry.key, b"torn")
    assert why(other, store)["train/full"].differences == ()


def test_settings_of_another_version_are_compared_as_far_as_they_go(config: PipelineConfig, store: LocalStore) -> None:
    made = finish(config, store)["train/full"]
    for entry in [*store.list("catalog/runs/full/")]:
        store.delete(entry.key)
    key = f"{made.prefix}/manifest.json"
    manifest = Manifest.model_validate_json(store.read(key))
    old = manifest.config | {"was_there_once": 1, "log_every": 99}
    store.write(key, manifest.evolve(config=old).model_dump_json().encode())
    found = why(merge(config, {"full": {"seed": 5}}), store)["train/full"]
    assert found.differences == (
        Difference(key="full.seed", before=0, now=5),
        Difference(key="full.was_there_once", before=1, now=None),
    )
