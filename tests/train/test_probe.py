"""Finding a micro-batch: the memory model proposes, a dry step in a process of its own decides."""

from pathlib import Path

import pytest

from vc2.artifacts import Manifest, ShardSet, commit
from vc2.data.config import SampleForm
from vc2.errors import ConfigError
from vc2.storage import LocalStore
from vc2.train.config import TrainStage
from vc2.train.fit import Clip
from vc2.train.memory import memory_of_rank
from vc2.train.probe import ProbeRequest, ProbeResult, fitting_micro_batch, main

VIDEO = SampleForm(num_frames=4, width=16, height=16)
CLIP = Clip(4, 16, 16)


def gib_for(stage: TrainStage, micro_batch: int) -> float:
    """Memory of a device on which just that micro-batch fits, by the model."""
    memory = memory_of_rank(stage, {CLIP}, 1, stills=False)
    return (memory.total(micro_batch) + memory.sample_bytes / 2) / 0.94 / 2**30


def videos(store: LocalStore, config: dict, facts: dict) -> ShardSet:
    """A shard set as far as its manifest goes."""
    manifest = Manifest(
        kind="shard_set", stage="shard", stage_version=1, fingerprint="f" * 64, config=config, inputs={}, files=(),
        facts={"media": "video", **facts},
    )  # fmt: skip
    made = commit(store, "shards/videos/x", manifest)
    assert isinstance(made, ShardSet)
    return made


@pytest.mark.parametrize("fitting", [8, 4, 1])
def test_the_largest_divisor_that_fits_is_found_and_measured(stage: TrainStage, tmp_path: Path, fitting: int) -> None:
    """What the dry step takes is no more than the model says, and what is next larger would not fit."""
    config = stage.evolve(batch_size=8, image_share=0.0)
    config = config.evolve(memory_gib=gib_for(config, fitting))
    request = ProbeRequest(stage=config, forms={"video": VIDEO}, world_size=1, result=str(tmp_path / "result.json"))
    (tmp_path / "request.json").write_text(request.model_dump_json())
    main(str(tmp_path / "request.json"))
    result = ProbeResult.model_validate_json((tmp_path / "result.json").read_text())
    assert result.micro_batch == fitting and not result.refused
    assert 0 < result.measured_bytes <= result.predicted_bytes <= result.usable_bytes
    memory = memory_of_rank(config, {CLIP}, 1, stills=False)
    assert memory.total(2 * fitting) > result.usable_bytes


def test_a_step_that_does_not_fit_is_tried_with_half(
    stage: TrainStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that believes in too much is corrected by the step."""
    config = stage.evolve(batch_size=8, image_share=0.0)
    config = config.evolve(memory_gib=gib_for(config, 2))
    monkeypatch.setattr("vc2.train.fit.RankMemory.working", lambda self, micro_batch: 0)
    request = ProbeRequest(stage=config, forms={"video": VIDEO}, world_size=1, result=str(tmp_path / "result.json"))
    (tmp_path / "request.json").write_text(request.model_dump_json())
    main(str(tmp_path / "request.json"))
    result = ProbeResult.model_validate_json((tmp_path / "result.json").read_text())
    assert (result.micro_batch, result.refused) == (2, (8, 4))


def test_a_process_of_its_own_answers(stage: TrainStage, tmp_path: Path) -> None:
    """The caller reads the size of samples off the manifests, of latents too, and gets a number."""
    store = LocalStore(tmp_path / "store")
    config = stage.evolve(batch_size=8, image_share=0.0)
    config = config.evolve(memory_gib=gib_for(config, 2))
    form = {"num_frames": 4, "width": 16, "height": 16}
    shards = videos(store, {"dtype": "float16"}, {"form": form})
    assert fitting_micro_batch(config, store, [shards], tmp_path, world_size=1) == 2


def test_what_cannot_fit_is_refused(stage: TrainStage, tmp_path: Path) -> None:
    config = stage.evolve(memory_gib=0.001)
    request = ProbeRequest(stage=config, forms={"video": VIDEO}, world_size=1, result=str(tmp_path / "result.json"))
    (tmp_path / "request.json").write_text(request.model_dump_json())
    with pytest.raises(ConfigError, match=r"one sample at a time needs .* GiB, .* are usable; recompute more"):
        main(str(tmp_path / "request.json"))


def test_a_set_that_does_not_say_its_size_is_refused(stage: TrainStage, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    with pytest.raises(ConfigError, match="does not say how large its samples are; set micro_batch"):
        fitting_micro_batch(stage, store, [videos(store, {}, {})], tmp_path, world_size=1)
