"""Laws of a training stage as it is run: real shards, two gloo ranks under torchrun, DeepSpeed's ZeRO-1."""

import json
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vc2.artifacts import (
    Checkpoint,
    Manifest,
    ShardSet,
    checkpoint_prefix,
    commit,
    load_manifest,
    verify,
)
from vc2.data.config import LoaderConfig
from vc2.data.loader import Loader
from vc2.errors import ConfigError
from vc2.model.autoencoder import Autoencoder
from vc2.model.config import LoraConfig
from vc2.model.lora import load_lora, merged_state_dict
from vc2.model.partition import is_temporal
from vc2.model.weights import autoencoder_to_released, load_unet
from vc2.storage import LocalStore, Store
from vc2.train.attempts import Attempt, Run
from vc2.train.config import Strategy, TrainStage
from vc2.train.loop import Trainer
from vc2.train.metrics import read_metrics
from vc2.train.run import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed and gloo over loopback: Linux")

STARTER = """
import sys
from pathlib import Path
from vc2.artifacts import ShardSet
from vc2.storage import open_store
from vc2.train.config import TrainStage
from vc2.train.run import train
import json
asked = json.loads(sys.argv[1])
train(
    TrainStage.model_validate(asked["stage"]), open_store(asked["store"]), Path(asked["work"]),
    fingerprint=asked["fingerprint"], shards={k: ShardSet.model_validate(v) for k, v in asked["shards"].items()},
    progress=lambda work, done, total=None, **figures: print(done, flush=True),
)
assert "torch" not in sys.modules
"""


@dataclass(frozen=True)
class World:
    """A store with a few clips and images, a place to work in, and a stage of eight steps on two ranks."""

    store: Store
    work: Path
    stage: TrainStage
    shards: dict[str, ShardSet]

    def train(self, stage: TrainStage, fingerprint: str, **more: object) -> Checkpoint:
        return train(stage, self.store, self.work, fingerprint=fingerprint, shards=self.shards, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    stage: TrainStage,
    autoencoder_file: Path,
    noise_shards: Callable[..., ShardSet],
) -> World:
    folder = tmp_path_factory.mktemp("world")
    store = LocalStore(folder / "store")
    model = stage.model.evolve(
        autoencoder_path=str(autoencoder_file), unet=stage.model.unet.evolve(temporal_conv_dropout=0.0)
    )
    return World(
        store=store,
        work=folder / "work",
        stage=stage.evolve(model=model, world_size=2, caption_dropout=0.2),
        shards={medium: noise_shards(store, folder, medium) for medium in ("video", "image")},
    )


@pytest.fixture(scope="module")
def unbroken(world: World) -> Checkpoint:
    """The finished run that the others are compared with."""
    return world.train(world.stage, "a" * 64)


def losses(world: World, fingerprint: str) -> list[float]:
    return [line["loss"] for line in read_metrics(world.store, "full", fingerprint)]


def test_a_checkpoint_is_whole_and_says_what_it_is(world: World, unbroken: Checkpoint) -> None:
    """Weights raw and averaged, autoencoder, model; counts and losses; every digest verifies; found again at once."""
    assert list(verify(world.store, unbroken.prefix)) == []
    manifest = load_manifest(world.store, unbroken.prefix)
    assert {file.name for file in manifest.files} == {
        "unet.safetensors", "unet_ema.safetensors", "autoencoder.safetensors", "model.json", "README.md",
    }  # fmt: skip
    assert manifest.counts["steps"] == 8 and manifest.counts["samples"] == 32
    assert (
        manifest.counts["spatial_parameters"] + manifest.counts["temporal_parameters"]
        == manifest.counts["total_parameters"]
    )
    assert manifest.facts["engine"] == "DeepSpeedEngine" and manifest.facts["layout"]["world_size"] == 2
    assert manifest.facts["final_loss"] > 0 and 0 < manifest.facts["linear_loss"] < manifest.facts["trivial_loss"]
    assert manifest.licenses == {"video": "made up", "image": "made up"}
    model = json.loads(world.store.read(manifest.file("model.json").key))
    assert model["fps"] == {"8": 2, "9": 2, "10": 2}
    attempts = Run(world.store, "full", "a" * 64).newest()
    assert world.train(world.stage, "a" * 64) == unbroken
    assert Run(world.store, "full", "a" * 64).newest() == attempts


def test_killed_and_run_again_equals_unbroken(world: World, unbroken: Checkpoint) -> None:
    """`kill -9` of the process that started the ranks at a random step, then the same call: same weights and curve."""
    fingerprint = "b" * 64
    run = Run(world.store, "full", fingerprint)
    longer = world.stage.evolve(num_steps=80, keep_states=80)  # so that it cannot be done before it is killed
    asked = {
        "stage": longer.model_dump(mode="json"), "store": world.store.uri, "work": str(world.work),
        "fingerprint": fingerprint, "shards": {name: s.model_dump() for name, s in world.shards.items()},
    }  # fmt: skip
    kill_at = random.Random(0).randint(1, 7)
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, json.dumps(asked)], stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        for line in starter.stdout:
            if int(line) >= kill_at and run.all_states():
                starter.send_signal(signal.SIGKILL)
                break
    assert starter.returncode == -signal.SIGKILL
    for ref in run.all_states():  # go on within the shorter run, however far the ranks came before they died
        if ref.step > world.stage.num_steps:
            world.store.delete(f"{run.state_prefix(ref)}/manifest.json")
    resumed = world.train(world.stage, fingerprint)
    assert resumed.content_digest == unbroken.content_digest
    start = run.attempt(2).start
    assert run.newest() == 2 and start is not None and start.step in (3, 6)
    assert losses(world, fingerprint) == losses(world, "a" * 64)
    assert len(losses(world, fingerprint)) == 8


def test_one_rank_learns_what_two_do(world: World, unbroken: Checkpoint, start_attempt: Callable[..., Trainer]) -> None:
    """Plain torch on one rank, in micro-batches of two, has the losses of ZeRO-1 on two ranks (dropout 0)."""
    videos, images = ([world.shards[medium]] for medium in ("video", "image"))
    loader = Loader(world.store, videos, images, LoaderConfig(batch_size=4, image_share=0.3, seed=0))
    alone = Run(world.store, "full", "c" * 64)
    start_attempt(world.stage.evolve(world_size=1), loader, run=alone).train()
    assert losses(world, "c" * 64) == pytest.approx(losses(world, "a" * 64), abs=1e-5)


def test_states_of_two_ranks_go_on_on_one(
    world: World, unbroken: Checkpoint, start_attempt: Callable[..., Trainer]
) -> None:
    """Re-sharding 2 -> 1: weights bit for bit, and two more steps go as they would have."""
    videos, images = ([world.shards[medium]] for medium in ("video", "image"))
    loader = Loader(world.store, videos, images, LoaderConfig(batch_size=4, image_share=0.3, seed=0))
    longer = world.stage.evolve(world_size=1, num_steps=10)
    trainer = start_attempt(longer, loader, run=Run(world.store, "full", "a" * 64))
    assert trainer.step == 8
    manifest = load_manifest(world.store, unbroken.prefix)
    stored = load_file(Path(world.store.uri) / manifest.file("unet.safetensors").key)
    found = trainer.engine.module.state_dict()
    assert found.keys() == stored.keys() and all(found[name].equal(stored[name]) for name in stored)
    trainer.train()
    start_attempt(longer, loader, run=Run(world.store, "full", "c" * 64)).train()
    assert losses(world, "a" * 64) == pytest.approx(losses(world, "c" * 64), abs=1e-5)


def test_resuming_at_the_end_of_an_epoch_goes_on_with_the_next(
    world: World, start_attempt: Callable[..., Trainer]
) -> None:
    """Six clips in batches of two: a state after three steps is one after an epoch, and no step is lost or doubled."""
    loader = Loader(world.store, [world.shards["video"]], [], LoaderConfig(batch_size=2, seed=0))
    stage = world.stage.evolve(world_size=1, batch_size=2, image_share=0.0, num_steps=7)
    whole, resumed = Run(world.store, "full", "5" * 64), Run(world.store, "full", "6" * 64)
    start_attempt(stage, loader, run=whole).train()
    start_attempt(stage.evolve(num_steps=3), loader, run=resumed).train()
    again = start_attempt(stage, loader, run=resumed)
    assert again.step == 3
    again.train()
    assert losses(world, "6" * 64) == losses(world, "5" * 64) and len(losses(world, "6" * 64)) == 7
    epochs = [{ref.key for step in steps for ref in loader.refs(step)} for steps in (range(3), range(3, 6))]
    assert [len(keys) for keys in epochs] == [6, 6]


def test_fewer_gpus_go_on_with_the_same_batch(
    world: World, unbroken: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the number of ranks is left open and a GPU is gone, the next attempt has one rank less and learns the same.

    The GPUs are told by their variable; with none really there, `device=auto` computes on the CPU.
    """
    stage = world.stage.evolve(world_size=None, micro_batch=1, device="auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    world.train(stage.evolve(num_steps=5), "4" * 64)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    world.train(stage, "4" * 64)
    run = Run(world.store, "full", "4" * 64)
    assert [run.attempt(number).layout.world_size for number in (1, 2)] == [2, 1]
    assert losses(world, "4" * 64) == pytest.approx(losses(world, "a" * 64)[:8], abs=1e-5)


def test_spatial_tuning_keeps_every_temporal_bit(world: World, unbroken: Checkpoint) -> None:
    """Images alone tune the averaged weights of a checkpoint; of the result only spatial parameters differ."""
    stage = world.stage.evolve(name="spatial", strategy=Strategy(trainable="spatial"), image_share=0.0, num_steps=2)
    images = {"jdb": world.shards["image"]}
    tuned = train(stage, world.store, world.work, fingerprint="d" * 64, shards=images, start_from=unbroken)
    before, after = (
        load_file(Path(world.store.uri) / load_manifest(world.store, found.prefix).file("unet_ema.safetensors").key)
        for found in (unbroken, tuned)
    )
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and not any(is_temporal(name) for name in changed)
    manifest = load_manifest(world.store, tuned.prefix)
    assert manifest.counts["frozen_parameters"] == manifest.counts["temporal_parameters"]
    assert set(manifest.inputs) == {"jdb", "start_from"}
    lines = read_metrics(world.store, "spatial", "d" * 64)
    assert [line["loss_video"] for line in lines] == [None, None]


def test_low_rank_tuning_gives_a_plain_network_and_its_updates(world: World, unbroken: Checkpoint) -> None:
    """Only attention of the tuned group differs; the checkpoint's base with the file of updates is the checkpoint.

    What an imported model brought goes on with it, and an autoencoder under foreign names becomes one under ours.
    """
    before = load_manifest(world.store, unbroken.prefix)
    text = before.file("model.json").evolve(name="text.safetensors")  # passed on unread: this tower is seeded
    imported = commit(world.store, "runs/imported/1/checkpoints/00000000", before.evolve(files=(*before.files, text)))
    assert isinstance(imported, Checkpoint)
    ours = Autoencoder.from_safetensors(Path(world.store.uri) / before.file("autoencoder.safetensors").key)
    levels = len(ours.config.block_out_channels)
    foreign = autoencoder_to_released(ours.net.state_dict(), levels).renamed(lambda name: f"first_stage_model.{name}")
    save_file(dict(foreign), world.work / "ldm.safetensors")
    strategy = Strategy(trainable="temporal", lora=LoraConfig(rank=2))
    model = world.stage.model.evolve(autoencoder_path=str(world.work / "ldm.safetensors"), autoencoder_sha256="")
    stage = world.stage.evolve(strategy=strategy, num_steps=2, model=model)
    tuned = train(
        stage, world.store, world.work, fingerprint="7" * 64, shards=world.shards, start_from=imported, inputs={}
    )
    after = load_manifest(world.store, tuned.prefix)
    assert after.file("text.safetensors") == text
    assert after.file("autoencoder.safetensors").sha256 == before.file("autoencoder.safetensors").sha256
    assert after.counts["trainable_parameters"] == after.counts["lora_parameters"] < 10_000
    base, merged = (load_unet(Path(world.store.uri) / m.file("unet_ema.safetensors").key) for m in (before, after))
    state, result = base.state_dict(), merged.state_dict()
    changed = {name for name in state if not state[name].equal(result[name])}
    assert changed and all(is_temporal(name) and "_attention." in name for name in changed)
    load_lora(base, Path(world.store.uri) / after.file("lora.safetensors").key)
    again = merged_state_dict(base)
    assert all(torch.allclose(again[name], result[name], atol=1e-6) for name in result)


def test_a_live_attempt_is_waited_for_and_its_result_adopted(
    world: World, claim: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process trains, the same call waits, and returns what that process commits."""
    monkeypatch.setattr("vc2.train.run.start", lambda *_, **__: pytest.fail("started ranks of its own"))
    run = Run(world.store, "full", "e" * 64)
    claim(run, 1, seconds=5)
    prefix = checkpoint_prefix("full", "e" * 64, 8)
    manifest = Manifest(
        kind="checkpoint", stage="full", stage_version=1, fingerprint="e" * 64, config={}, inputs={}, files=()
    )
    told = []

    def other_commits(work: str, done: int, total: int | None = None, **figures: float | str) -> None:
        told.append(figures)
        commit(world.store, prefix, manifest)

    assert world.train(world.stage, "e" * 64, progress=other_commits).prefix == prefix
    assert [figures["waiting_for"] for figures in told] == [f"attempt 1 on {socket.gethostname()}"]


@pytest.mark.parametrize(
    ("changes", "shards", "message"),
    [
        ({}, [], "expected sets of 'video' and 'image'"),
        ({}, ["video"], "no shard set of images"),
        ({"micro_batch": 2, "world_size": 1, "batch_size": 6}, ["video", "image"], "autoencoder_path is empty"),
        ({"world_size": None, "micro_batch": 3, "batch_size": 3}, ["video", "image"], "sha256"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_in_one_line(
    world: World, changes: dict[str, object], shards: list[str], message: str
) -> None:
    """Before anything is claimed or started."""
    model = world.stage.model
    if "empty" in message:
        changes = changes | {"model": model.evolve(autoencoder_path="")}
    if message == "sha256":
        changes = changes | {"model": model.evolve(autoencoder_sha256="0" * 64)}
    given = {medium: world.shards[medium] for medium in shards}
    with pytest.raises(ConfigError, match=message) as caught:
        train(world.stage.evolve(**changes), world.store, world.work, fingerprint="9" * 64, shards=given)
    assert "\n" not in str(caught.value)
    assert Run(world.store, "full", "9" * 64).newest() == 0
