"""Laws of checkpoints: any state can become one, by itself, with the bytes that the run would have committed."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from vc2.artifacts import Checkpoint, FileEntry, ShardSet, checkpoint_prefix, find, load_manifest, put_object, verify
from vc2.cli import main
from vc2.errors import StoreError
from vc2.model.bundle import Parts
from vc2.model.config import LoraConfig
from vc2.storage import LocalStore
from vc2.train import rank
from vc2.train.attempts import Attempt, Run, StateRef, Superseded, newest_state, this_process
from vc2.train.config import Layout, Strategy, TrainStage
from vc2.train.export import _pinned, export_state, export_step
from vc2.train.request import RankRequest


@dataclass(frozen=True)
class World:
    """A store with noise to train on, and a stage that one rank trains in this process."""

    store: LocalStore
    work: Path
    stage: TrainStage
    shards: dict[str, ShardSet]
    autoencoder: FileEntry

    def train(
        self, stage: TrainStage, name: str, *, media: tuple[str, ...] = ("video", "image"),
        start_from: Checkpoint | None = None,
    ) -> Checkpoint:  # fmt: skip
        """What a rank does that was started for the next attempt; it ends with a checkpoint."""
        run = Run(self.store, stage.name, name * 64)
        state, _ = newest_state(run)
        request = RankRequest(
            stage=stage, store=self.store.uri, work=str(self.work), fingerprint=run.fingerprint,
            attempt=run.newest() + 1, start=state.ref if state else None,
            layout=Layout(world_size=1, micro_batch=2, threads=1),
            videos=tuple(self.shards[kind] for kind in media if kind == "video"),
            images=tuple(self.shards[kind] for kind in media if kind == "image"),
            autoencoder=self.autoencoder, start_from=start_from, inputs={kind: self.shards[kind] for kind in media},
        )  # fmt: skip
        attempt = Attempt(
            number=request.attempt, start=request.start, layout=request.layout, holder=this_process(),
            heartbeat_seconds=60, request=request.model_dump(mode="json"),
        )  # fmt: skip
        assert run.claim(attempt)
        path = self.work / f"{name}-{request.attempt}.json"
        path.write_text(request.model_dump_json())
        rank.main(str(path))
        done = find(self.store, checkpoint_prefix(stage.name, run.fingerprint, stage.num_steps), Checkpoint)
        assert done is not None
        return done


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, stage: TrainStage, autoencoder_file: Path,
    noise_shards: Callable[..., ShardSet],
) -> Iterator[World]:  # fmt: skip
    folder = tmp_path_factory.mktemp("world")
    store = LocalStore(folder / "store")
    (folder / "work").mkdir()
    shards = {kind: noise_shards(store, folder, kind) for kind in ("video", "image")}
    autoencoder = put_object(store, autoencoder_file, "autoencoder.safetensors")
    stage = stage.evolve(caption_dropout=0.2, tensorboard=False)
    before, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield World(store, folder / "work", stage, shards, autoencoder)
    signal.signal(signal.SIGTERM, before)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(world: World) -> Checkpoint:
    """Six steps, by way of three."""
    world.train(world.stage.evolve(num_steps=3), "a")
    return world.train(world.stage.evolve(num_steps=6), "a")


def removed(world: World, prefix: str) -> None:
    """As if the checkpoint had never been; its objects go too, so that they must be made again."""
    manifest = load_manifest(world.store, prefix)
    for file in manifest.files:
        if file.name != "autoencoder.safetensors":
            world.store.delete(file.key)
    world.store.delete(f"{prefix}/manifest.json")


def test_a_state_on_the_way_becomes_the_checkpoint_that_the_run_committed_there(
    world: World, base: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, while later steps are there; a second time it is found."""
    prefix = checkpoint_prefix("full", "a" * 64, 3)
    before = load_manifest(world.store, prefix)
    removed(world, prefix)
    uri = f"{world.store.uri}/runs/full/{'a' * 64}"
    for _ in range(2):
        assert main(["checkpoint", uri, "--step", "3", "--work", str(world.work)]) == 0
        assert f"checkpoint: {world.store.uri}/{prefix}" in capsys.readouterr().out
    after = load_manifest(world.store, prefix)
    assert after.content_digest == before.content_digest and list(verify(world.store, prefix)) == []
    assert after.facts["final_loss"] == before.facts["final_loss"]
    assert after.facts["frozen_digest"] == before.facts["frozen_digest"]
    assert main(["checkpoint", f"{uri}/states/0002/00000006", "--work", str(world.work)]) == 0
    assert base.uri in capsys.readouterr().out
    assert main(["checkpoint", uri, "--step", "4", "--work", str(world.work)]) == 1
    assert "no whole train state of step 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(Strategy(trainable="temporal"), id="middle taps"),
        pytest.param(Strategy(trainable="all", lora=LoraConfig(rank=2)), id="low-rank"),
    ],
)
def test_what_was_tuned_on_images_is_exported_alike(world: World, base: Checkpoint, strategy: Strategy) -> None:
    """Frozen parts come from the checkpoint that training started from, updates are merged, taps joined."""
    name = "b" if strategy.lora is None else "c"
    stage = world.stage.evolve(name="spatial", strategy=strategy, image_share=0.0, num_steps=2)
    made = world.train(stage, name, media=("image",), start_from=base)
    before = load_manifest(world.store, made.prefix)
    removed(world, made.prefix)
    again = export_step(Run(world.store, "spatial", name * 64), world.work)
    assert again.content_digest == made.content_digest and list(verify(world.store, made.prefix)) == []
    names = {file.name for file in load_manifest(world.store, made.prefix).files}
    assert names == {file.name for file in before.files} and ("lora.safetensors" in names) == (name == "c")


def test_the_card_says_what_a_stranger_must_know(world: World, base: Checkpoint) -> None:
    """Data and its licences, how far it was trained, how it is used; no time, host or path; readers pass it by."""
    manifest = load_manifest(world.store, base.prefix)
    card = world.store.read(manifest.file("README.md").key).decode()
    for words in (
        "| video | video | 6 | made up |", "image: made up", "| steps | 6, of which 6 changed the weights |",
        "24, 4 a step", "vc2 convert URI", "TextToVideoSDPipeline", "8, 9, 10", "seeded random weights",
    ):  # fmt: skip
        assert words in card, words
    for words in (
        str(world.store.uri),
        str(world.work),
        "aaaa",
    ):  # nor the name of the run: equal content, equal digest
        assert words not in card
    parts = Parts.of_checkpoint(world.store, manifest, world.work / "cache")
    assert parts.autoencoder is not None and parts.text is None and parts.fps == {8: 2, 9: 2, 10: 2}


def test_retention_leaves_a_state_alone_while_it_is_exported(world: World, base: Checkpoint) -> None:
    """Also when the run has gone on so far that it would go; a pin that was there before stays, no other does."""
    run, ref = Run(world.store, "full", "a" * 64), StateRef(attempt=1, step=3)
    with _pinned(run, ref):
        assert ref in run.pinned() and ref in run.kept(1, None)
    assert run.pinned() == set()
    prefix = checkpoint_prefix("full", run.fingerprint, 3)
    for pins in (set(), {ref}):
        for pin in pins:
            run.pin(pin)
        removed(world, prefix)
        assert export_step(run, world.work, 3).prefix == prefix
        assert run.pinned() == pins
    run.unpin(ref)


def test_a_state_off_the_chain_is_no_checkpoint(
    world: World, base: Checkpoint, claim: Callable[..., Attempt], tmp_path: Path
) -> None:
    """Another attempt has gone on from before it: the run has no such state."""
    run = Run(world.store, "full", "a" * 64)
    asked = RankRequest.model_validate(run.attempt(2).request)
    state = run.manifest(StateRef(attempt=2, step=6))
    claim(run, 3, start=StateRef(attempt=1, step=3))
    with pytest.raises(Superseded, match="no part of the run"):
        export_state(asked, run, state.evolve(step=6), tmp_path)
    with pytest.raises(StoreError, match=r"no whole train state of step 7.*states of steps 3"):
        export_step(run, tmp_path, 7)
