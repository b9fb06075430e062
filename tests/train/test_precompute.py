"""Laws of precomputed latents: training cannot tell them from frames, and no other encoders' latents are taken."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch

from vc2.artifacts import Checkpoint, Manifest, ShardSet, commit, find, load_manifest, put_file, put_object, verify
from vc2.cli import described
from vc2.data.audit import check_samples, explain
from vc2.data.config import LoaderConfig
from vc2.data.ledger import parquet_bytes
from vc2.data.loader import Loader
from vc2.data.media import Encoded
from vc2.data.shards import SLOTS, ShardSample, shard_name, write_shard
from vc2.errors import ConfigError, ShardCorrupted
from vc2.seeding import generator
from vc2.storage import LocalStore
from vc2.train.attempts import Run
from vc2.train.config import Phase, TrainStage
from vc2.train.latents import pack, unpack
from vc2.train.loop import Trainer
from vc2.train.precompute import check_latents, precompute, text_digest
from vc2.train.request import TEXT_WEIGHTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback: Linux")

STARTER = """
import json, sys
from pathlib import Path
from vc2.artifacts import ShardSet
from vc2.storage import open_store
from vc2.train.config import TrainStage
from vc2.train.precompute import precompute
stage, store, work, shards = json.loads(sys.argv[1])
precompute(TrainStage.model_validate(stage), open_store(store), Path(work), ShardSet.model_validate(shards),
           dtype="float32")
assert "torch" not in sys.modules
"""


def clip_shards(store: LocalStore, folder: Path) -> ShardSet:
    """Nine clips of noise in three shards; one near duplicate, and one whose bytes are damaged."""
    files, lines = [], []
    for shard in range(3):
        samples, facts = [], {}
        for number in range(3 * shard, 3 * shard + 3):
            key = f"clip-{number}"
            frames = generator(0, "frames", key).integers(0, 256, (4, 16, 16, 3), dtype="uint8")
            facts[key] = {"caption": f"thing number {number}", "fps": 8 + number % 3}
            parts = tuple(simplejpeg.encode_jpeg(frame, 95) for frame in frames)
            samples.append(ShardSample(key, Encoded("mjpeg", parts, (), None, 0), facts[key] | {"license": "none"}))
        path = folder / f"{shard}.tar"
        same = {"shard": shard, "num_frames": 4, "width": 16, "height": 16}
        rows = [
            same | {"slot": slot, "source_key": place["key"], **place, **facts[place["key"]]}
            for slot, place in enumerate(write_shard(path, samples))
        ]
        if shard == 1:
            rows[0]["duplicate_of"] = "clip-0"
            with open(path, "r+b") as file:
                file.seek(rows[1]["offset"] + 5)
                file.write(b"damage")
        files.append(put_object(store, path, shard_name(shard)))
        lines += rows
    index = parquet_bytes(pa.Table.from_pylist(lines, SLOTS))
    manifest = Manifest(
        kind="shard_set", stage="shard", stage_version=1, fingerprint="c" * 64, config={}, inputs={},
        files=(*files, put_file(store, "shards/webvid/c", "index.parquet", index)),
        facts={"media": "video", "source": "webvid"}, licenses={"webvid": "made up"},
    )  # fmt: skip
    made = commit(store, "shards/webvid/c", manifest)
    assert isinstance(made, ShardSet)
    return made


@dataclass(frozen=True)
class World:
    store: LocalStore
    work: Path
    stage: TrainStage
    frames: ShardSet
    latents: ShardSet


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, stage: TrainStage, autoencoder_file: Path) -> World:
    """Frames, and their latents made by two ranks in float32."""
    folder = tmp_path_factory.mktemp("latents")
    store = LocalStore(folder / "store")
    model = stage.model.evolve(
        autoencoder_path=str(autoencoder_file), unet=stage.model.unet.evolve(temporal_conv_dropout=0.0)
    )
    stage = stage.evolve(model=model, image_share=0.0, num_steps=5)
    frames = clip_shards(store, folder)
    told: list[Any] = []
    latents = precompute(
        stage.evolve(world_size=2), store, folder / "work", frames, dtype="float32",
        progress=lambda work, done, total=None, **figures: told.append((work, done, total)),
    )  # fmt: skip
    assert ("precompute/webvid", 3, 3) in told
    return World(store, folder / "work", stage, frames, latents)


def loader(world: World, shards: ShardSet) -> Loader:
    return Loader(world.store, [shards], [], LoaderConfig(batch_size=4, seed=0))


def test_training_cannot_tell_float32_latents_from_frames(world: World, start_attempt: Callable[..., Trainer]) -> None:
    """The same samples at the same positions, a damaged one replaced alike, and the same weights bit for bit."""
    masters, keys = [], []
    for name, shards in (("a", world.frames), ("b", world.latents)):
        samples = loader(world, shards)
        trainer = start_attempt(world.stage, samples, run=Run(world.store, "full", name * 64))
        keys.append([trainer.batches.at(step).keys for step in range(4)])
        trainer.train()
        masters.append(trainer.engine.shard("master").clone())
        assert samples.replaced > 0
        samples.close()
    assert keys[0] == keys[1] and not any("clip-4" in batch for batch in keys[0])
    assert torch.equal(masters[0], masters[1])


def test_the_set_says_what_it_is_and_verifies(world: World) -> None:
    """Every digest, every sample; licences and the set it was made from; a reason for what was damaged."""
    manifest = load_manifest(world.store, world.latents.prefix)
    assert list(verify(world.store, world.latents.prefix)) == list(check_samples(world.store, manifest)) == []
    assert manifest.licenses == {"webvid": "made up"} and manifest.inputs["shards"].prefix == world.frames.prefix
    assert manifest.counts["samples"] == 7 and manifest.counts["rows_rejected"] == 1
    assert "rows" in "\n".join(described(manifest))
    said = explain(world.store, manifest, "clip-8")
    assert said["json"]["caption"] == said["index"]["caption"] == "thing number 8"
    (reject,) = pq.read_table(Path(world.store.uri) / manifest.file("rejects.parquet").key).to_pylist()
    assert (reject["key"], reject["reason"]) == ("clip-4", "damaged") and "differ" in reject["detail"]


def test_killed_and_run_again_gives_the_same_bytes(world: World, tmp_path: Path) -> None:
    """`kill -9` when the first shard is there; the next call goes on with the others. And a finished set is found."""
    store = LocalStore(tmp_path / "store")
    frames = clip_shards(store, tmp_path)
    stage = world.stage.evolve(world_size=1)
    asked = json.dumps([stage.model_dump(mode="json"), store.uri, str(tmp_path / "work"), frames.model_dump()])
    starter = subprocess.Popen([sys.executable, "-c", STARTER, asked])
    parts = f"{world.latents.prefix}/parts/"
    while not list(store.list(parts)):
        assert starter.poll() is None
        time.sleep(0.01)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    first = next(store.list(parts))
    made = precompute(stage, store, tmp_path / "work", frames, dtype="float32")
    assert made.content_digest == world.latents.content_digest
    assert next(store.list(parts)) == first
    manifest = load_manifest(store, made.prefix)
    assert precompute(stage, store, tmp_path / "work", frames, dtype="float32") == manifest.reference(
        store, made.prefix
    )


def test_float16_is_off_by_its_rounding_and_no_more() -> None:
    """Half a unit of the eleventh bit; bytes are a function of the numbers."""
    moments, text = torch.randn(8, 4, 2, 2) * 5, torch.randn(8, 16)
    data = np.frombuffer(pack(moments, text, "float16"), np.uint8)
    found = unpack(data)
    for exact, rounded in zip((moments, text), found, strict=True):
        assert rounded.dtype == torch.float32
        assert ((rounded - exact).abs() <= exact.abs() * 2**-11 + 2**-25).all()
    exactly = unpack(np.frombuffer(pack(moments, text, "float32"), np.uint8))
    assert exactly[0].equal(moments) and exactly[1].equal(text)
    assert pack(moments, text, "float16") == data.tobytes()
    with pytest.raises(ShardCorrupted, match="no file of latents"):
        unpack(data[:20])


def test_latents_that_do_not_belong_to_the_run_are_refused(world: World) -> None:
    """Of another autoencoder, of another text tower, or of another size than a phase asks for."""
    manifest = load_manifest(world.store, world.latents.prefix)
    own = manifest.facts["latents"]["autoencoder"]

    def check(stage: TrainStage, autoencoder: str = own) -> None:
        check_latents(stage, world.store, world.work, [world.latents, world.frames], autoencoder)

    check(world.stage.evolve(phases=(Phase(num_frames=4, width=16, height=16),)))
    with pytest.raises(ConfigError, match=r"latents of autoencoder .* this stage has 000000000000; make it anew"):
        check(world.stage, "0" * 64)
    model = world.stage.model
    with pytest.raises(ConfigError, match="another text tower"):
        check(world.stage.evolve(model=model.evolve(text=model.text.evolve(seed=1))))
    with pytest.raises(ConfigError, match=r"phases\[0\] asks for \{'num_frames': 2\}"):
        check(world.stage.evolve(phases=(Phase(num_frames=2),)))
    with pytest.raises(ConfigError, match="holds latents already"):
        precompute(world.stage, world.store, world.work, world.latents)


def test_the_text_tower_that_a_checkpoint_brings_is_part_of_the_name(world: World, tmp_path: Path) -> None:
    """As in training: the one that is named, else the one that comes with what training starts from."""
    prefixes = ("checkpoints/imported/d", "checkpoints/imported/e")
    for prefix in prefixes:
        manifest = Manifest(
            kind="checkpoint", stage="import", stage_version=1, fingerprint=prefix[-1] * 64, config={}, inputs={},
            files=(put_file(world.store, prefix, TEXT_WEIGHTS, prefix.encode()),),
        )  # fmt: skip
        assert isinstance(commit(world.store, prefix, manifest), Checkpoint)
    first, second = (find(world.store, prefix, Checkpoint) for prefix in prefixes)
    model = world.stage.model

    def digest(start_from: Checkpoint | None, text_path: str = "", seed: int | None = None) -> str:
        text = model.text.evolve(seed=seed)
        stage = world.stage.evolve(model=model.evolve(text=text, text_path=text_path))
        return text_digest(stage, world.store, world.work, start_from)

    named = tmp_path / "text.safetensors"
    named.write_bytes(prefixes[0].encode())
    assert digest(first) != digest(second)
    assert digest(first) == digest(None, str(named)) == digest(second, str(named))
    assert digest(first, seed=0) == digest(second, seed=0) == digest(None, seed=0)
