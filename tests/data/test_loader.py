import logging
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vc2.artifacts import Manifest, ShardSet, commit, put_file, put_object, shard_set_prefix
from vc2.data.config import LoaderConfig
from vc2.data.ledger import parquet_bytes
from vc2.data.loader import Loader, is_image_step
from vc2.data.shards import SLOTS, ShardSample, shard_name, write_shard
from vc2.errors import ConfigError, StoreError
from vc2.storage import LocalStore

LABELS = [8, 8, 8, 12]


def make_set(store: LocalStore, work: Path, name: str, count: int, media: Any, *, images: bool) -> ShardSet:
    """A small shard set, four samples a shard, made without Ray."""
    prefix, files, lines = shard_set_prefix(name, "f" * 64), [], []
    for shard in range(-(-count // 4)):
        numbers = range(4 * shard, min(4 * shard + 4, count))
        samples = [
            ShardSample.of(f"{name}{n}", media.frames(1 if images else 3, first=n), {}, quality=90) for n in numbers
        ]
        path = work / shard_name(shard)
        for number, place in zip(numbers, write_shard(path, samples), strict=True):
            fps = 0 if images else LABELS[number % 4]
            empty = {column: None for column in SLOTS.names}
            lines.append(empty | place | {"shard": shard, "slot": number % 4, "caption": place["key"], "fps": fps})
        files.append(put_object(store, path, shard_name(shard)))
    files.append(put_file(store, prefix, "index.parquet", parquet_bytes(pa.Table.from_pylist(lines, SLOTS))))
    manifest = Manifest(
        kind="shard_set", stage="shard", stage_version=1, fingerprint="f" * 64, config={}, inputs={}, files=tuple(files)
    )
    return cast(ShardSet, commit(store, prefix, manifest))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    return LocalStore(tmp_path_factory.mktemp("loader"))


@pytest.fixture(scope="module")
def sets(store: LocalStore, media: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    work = tmp_path_factory.mktemp("work")
    kinds = {"va": (10, False), "vb": (5, False), "ia": (9, True)}
    return {name: make_set(store, work, name, count, media, images=images) for name, (count, images) in kinds.items()}


@pytest.fixture
def loader(store: LocalStore, sets: dict[str, ShardSet]) -> Loader:
    config = LoaderConfig(batch_size=4, image_share=0.25, seed=3)
    return Loader(store, [sets["va"], sets["vb"]], [sets["ia"]], config)


@given(st.fractions(0, 1, max_denominator=1000), st.fractions(0, Fraction(99, 100)), st.integers(1, 300))
def test_kinds_are_spread_evenly(share: Fraction, phase: Fraction, steps: int) -> None:
    """After any number of steps the image steps are the share of them, to less than one step."""
    images = sum(is_image_step(step, share, phase) for step in range(steps))
    assert abs(images - share * steps) < 1


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_world_size_sees_the_same_batches(loader: Loader, world_size: int) -> None:
    """The ranks' parts, one after the other, are the batch; nothing about a step depends on the steps before."""
    for step in (0, 1, 7, 1000, 3):
        batch = loader.refs(step)
        assert [ref for rank in range(world_size) for ref in loader.refs(step, rank, world_size)] == batch
        assert {ref.kind for ref in batch} == {loader.kind(step)}


def test_an_epoch_is_a_permutation_and_positions_follow_each_other(loader: Loader) -> None:
    """Each kind's positions count up without gap; each epoch brings every sample once, in another order."""
    refs = [ref for step in range(60) for ref in loader.refs(step)]
    for kind, count in (("video", 15), ("image", 9)):
        own = [ref for ref in refs if ref.kind == kind]
        assert [ref.position for ref in own] == list(range(len(own)))
        epochs = [[ref.key for ref in own[start : start + count]] for start in range(0, len(own) - count + 1, count)]
        assert len(epochs) >= 4
        assert all(len(set(epoch)) == count for epoch in epochs)
        assert epochs[0] != epochs[1]
    assert sum(loader.kind(step) == "image" for step in range(60)) == 15


def test_two_loaders_agree_and_seeds_differ(store: LocalStore, sets: dict[str, ShardSet], loader: Loader) -> None:
    """A restart anywhere goes on as if nothing had happened; another seed is another order."""
    again = Loader(store, [sets["va"], sets["vb"]], [sets["ia"]], loader.config)
    assert again.refs(41) == loader.refs(41)
    other = Loader(store, [sets["va"], sets["vb"]], [sets["ia"]], loader.config.evolve(seed=4))
    assert [other.refs(step) for step in range(5)] != [loader.refs(step) for step in range(5)]


def test_images_are_labelled_like_videos(store: LocalStore, sets: dict[str, ShardSet], loader: Loader) -> None:
    """The labels of images follow the histogram of the videos', or one that is given."""
    assert loader.image_fps == {8: 12, 12: 3}
    images = Loader(store, [], [sets["ia"]], LoaderConfig(batch_size=100, seed=3), image_fps=loader.image_fps)
    assert images.kind(0) == "image"
    labels = Counter(ref.fps for step in range(10) for ref in images.refs(step))
    assert set(labels) == {8, 12}
    assert labels[12] / 1000 == pytest.approx(3 / 15, abs=0.05)
    with pytest.raises(ConfigError, match="image_fps"):
        Loader(store, [], [sets["ia"]], LoaderConfig(batch_size=1))


def test_frames_are_those_of_the_sample(loader: Loader, media: Any) -> None:
    """A reference leads to the pixels that went into the shard."""
    for step in range(8):
        for ref in loader.refs(step):
            frames = loader.frames(ref)
            number = int(ref.key[2:])
            expected = media.frames(1 if ref.kind == "image" else 3, first=number)
            assert frames.shape == expected.shape and frames.dtype == np.uint8
            assert np.abs(frames.astype(int) - expected).mean() < 2


def test_an_unreadable_sample_is_replaced_by_a_function_of_its_position(
    media: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Damage costs one sample, the same way on every rank and in every run, and the log says so."""
    store = LocalStore(tmp_path / "store")
    videos = make_set(store, tmp_path, "va", 8, media, images=False)
    loader = Loader(store, [videos], [], LoaderConfig(batch_size=8))
    refs = loader.refs(0)
    broken = refs[0]
    path = tmp_path / "store" / broken.shard
    data = bytearray(path.read_bytes())
    data[broken.offset : broken.offset + broken.length] = bytes(broken.length)
    path.write_bytes(data)
    with pytest.raises(StoreError, match=broken.key):
        loader.frames(broken)
    with caplog.at_level(logging.WARNING):
        found, frames = loader.read(broken)
    assert "replaced" in caplog.text
    assert (found.position, found.key != broken.key) == (broken.position, True)
    assert found == Loader(store, [videos], [], LoaderConfig(batch_size=8)).read(broken)[0]
    assert len(frames) == 3
    assert loader.read(refs[1])[0] == refs[1]


def test_what_cannot_work_is_refused(store: LocalStore, sets: dict[str, ShardSet], loader: Loader) -> None:
    """No samples, a share of what is not there, a world that does not divide the batch."""
    with pytest.raises(ConfigError, match="nothing to load"):
        Loader(store, [], [], LoaderConfig(batch_size=4))
    with pytest.raises(ConfigError, match="only videos"):
        Loader(store, [sets["va"]], [], LoaderConfig(batch_size=4, image_share=0.5))
    with pytest.raises(ConfigError, match="3 ranks"):
        loader.refs(0, 0, 3)
