import logging
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vc2.artifacts import ShardSet, load_manifest
from vc2.data import loader as loaders
from vc2.data.config import LoaderConfig
from vc2.data.loader import Loader
from vc2.data.order import Epochs, Mixture, is_image_step
from vc2.errors import ConfigError, ShardCorrupted, StoreError
from vc2.storage import LocalStore

# ---- the order, as arithmetic ----


@given(st.fractions(0, 1, max_denominator=1000), st.fractions(0, Fraction(99, 100)), st.integers(1, 300))
def test_kinds_are_spread_evenly(share: Fraction, phase: Fraction, steps: int) -> None:
    """After any number of steps the image steps are the share of them, to less than one step."""
    images = sum(is_image_step(step, share, phase) for step in range(steps))
    assert abs(images - share * steps) < 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 9), st.integers(0, 10**9))
def test_a_mixture_takes_each_stream_in_order_and_in_proportion(weights: list[int], seed: int, start: int) -> None:
    """Positions of a stream follow each other; over any whole period each stream comes exactly its weight's times, and
    never is it two samples away from its share."""
    mixture, total = Mixture(weights, seed), sum(weights)
    taken = [mixture.at(position) for position in range(start, start + 2 * total)]
    for stream, weight in enumerate(weights):
        places = [place for number, place in taken if number == stream]
        assert places == list(range(places[0], places[0] + 2 * weight))
        assert abs(places[0] - Fraction(start * weight, total)) < 2
        assert sum(number == stream for number, _ in taken[:total]) == weight


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any), st.integers(1, 40), st.integers(0, 5))
def test_each_epoch_has_every_row_once(counts: list[int], window: int, seed: int) -> None:
    """Epochs are permutations, whatever the shards hold and however wide the window is."""
    epochs, total = Epochs(counts, window, seed, "order"), sum(counts)
    for epoch in (0, 3):
        rows = [epochs.row(position) for position in range(epoch * total, (epoch + 1) * total)]
        assert sorted(rows) == list(range(total))
    assert epochs.row(total + 7) == Epochs(counts, window, seed, "order").row(total + 7)


def test_reads_stay_within_a_window_of_shards() -> None:
    """What is read at a time lies in few tars, and it is known which come next; yet every epoch is another order."""
    epochs = Epochs([10] * 40, 4, 0, "order")
    orders = []
    for epoch in range(2):
        rows = [epochs.row(position) for position in range(400 * epoch, 400 * (epoch + 1))]
        for start in range(0, 400, 40):
            shards = {row // 10 for row in rows[start : start + 40]}
            assert shards == set(epochs.window(400 * epoch + start))
            if epoch or start:
                assert shards == set(epochs.window(400 * epoch + start - 1, ahead=1))
        orders.append(rows)
    assert orders[0] != orders[1]


def test_ten_million_samples_need_no_permutation_of_their_own() -> None:
    """A position costs a permutation of the shards and one of a window, however large the set is."""
    epochs = Epochs(np.full(10_700, 1000), 8, 0, "order")
    rows = {epochs.row(position) for position in range(5 * 10_700_000 + 123_456, 5 * 10_700_000 + 123_456 + 1000)}
    assert len(rows) == 1000
    assert len({row // 1000 for row in rows}) <= 16


# ---- sets ----


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    return LocalStore(tmp_path_factory.mktemp("loader"))


@pytest.fixture(scope="module")
def sets(store: LocalStore, make_set: Any) -> dict[str, ShardSet]:
    kinds = {"va": (10, False), "vb": (5, False), "ia": (9, True)}
    return {name: make_set(store, name, count, images=images) for name, (count, images) in kinds.items()}


@pytest.fixture(scope="module")
def make_loader(store: LocalStore, sets: dict[str, ShardSet]) -> Callable[..., Loader]:
    def make(**config: Any) -> Loader:
        config = {"batch_size": 8, "image_share": 0.25, "seed": 3, "shuffle_shards": 2} | config
        return Loader(store, [sets["va"], sets["vb"]], [sets["ia"]], LoaderConfig.model_validate(config))

    return make


@pytest.fixture
def loader(make_loader: Callable[..., Loader]) -> Loader:
    return make_loader()


@settings(max_examples=25)
@given(st.integers(0, 5000), st.integers(0, 3), st.fractions(0, 1, max_denominator=8), st.booleans())
def test_any_world_size_sees_the_same_batches(
    make_loader: Callable[..., Loader], step: int, seed: int, share: Fraction, weighted: bool
) -> None:
    """The ranks' parts, one after the other, are the batch, of one kind; and a loader that starts at the step sees what
    one sees that has come there step by step."""
    weights = {"va": 1.0, "vb": 2.5} if weighted else {}
    config = {"seed": seed, "image_share": float(share), "weights": weights}
    unbroken, resumed = make_loader(**config), make_loader(**config)
    for earlier in range(max(0, step - 3), step):
        unbroken.refs(earlier)
    batch = unbroken.refs(step)
    assert {ref.kind for ref in batch} == {unbroken.kind(step)} and len(batch) == 8
    for world_size in (1, 2, 4, 8):
        assert [ref for rank in range(world_size) for ref in resumed.refs(step, rank, world_size)] == batch


def test_an_epoch_is_a_permutation_and_positions_follow_each_other(loader: Loader) -> None:
    """Each kind's positions count up without gap; each set brings every sample once before any comes again."""
    refs = [ref for step in range(60) for ref in loader.refs(step)]
    for kind, counts in (("video", {"va": 10, "vb": 5}), ("image", {"ia": 9})):
        own = [ref for ref in refs if ref.kind == kind]
        assert [ref.position for ref in own] == list(range(len(own)))
        for name, count in counts.items():
            keys = [ref.key for ref in own if ref.key.startswith(name)]
            epochs = [keys[start : start + count] for start in range(0, len(keys) - count + 1, count)]
            assert len(epochs) >= 4
            assert all(len(set(epoch)) == count for epoch in epochs)
            assert epochs[0] != epochs[1]
    assert sum(loader.kind(step) == "image" for step in range(60)) == 15
    everything = [ref.key for ref in refs if ref.kind == "video"][:15]
    assert len(set(everything)) == 15  # without weights, each sample as often as any other


def test_weights_are_kept_exactly(make_loader: Callable[..., Loader]) -> None:
    """Three samples of one set to one of the other, whatever their sizes; labels of images follow."""
    loader = make_loader(image_share=0.0, weights={"va": 0.75, "vb": 0.25})
    refs = [ref for step in range(50) for ref in loader.refs(step)]
    assert Counter(ref.key[:2] for ref in refs) == {"va": 300, "vb": 100}
    assert sum(ref.key[:2] == "va" for ref in refs[:4]) == 3
    assert loader.image_fps == {8: 800_000, 12: 200_000}


def test_two_loaders_agree_and_seeds_differ(make_loader: Callable[..., Loader], loader: Loader) -> None:
    """A restart anywhere goes on as if nothing had happened; another seed is another order."""
    assert make_loader().refs(41) == loader.refs(41)
    other = make_loader(seed=4)
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


def test_near_duplicates_are_left_out(tmp_path: Path, make_set: Any) -> None:
    """They are in the set, and marked; training does not see them."""
    store = LocalStore(tmp_path / "store")
    videos = make_set(store, "va", 6, duplicates={2: 0, 5: 1})
    loader = Loader(store, [videos], [], LoaderConfig(batch_size=4))
    assert {ref.key for step in range(20) for ref in loader.refs(step)} == {"va0", "va1", "va3", "va4"}


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
    make_set: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One flipped bit costs one sample, the same way on every rank and in every run; log and count say so."""
    store = LocalStore(tmp_path / "store")
    videos = make_set(store, "va", 8)
    loader = Loader(store, [videos], [], LoaderConfig(batch_size=8))
    refs = loader.refs(0)
    broken = refs[0]
    path = tmp_path / "store" / broken.shard
    data = bytearray(path.read_bytes())
    data[broken.offset + broken.length // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(ShardCorrupted, match=broken.key):
        loader.frames(broken)
    with caplog.at_level(logging.WARNING):
        found, frames = loader.read(broken)
    assert "replaced" in caplog.text and loader.replaced == 1
    assert (found.position, found.key != broken.key) == (broken.position, True)
    assert found == Loader(store, [videos], [], LoaderConfig(batch_size=8)).read(broken)[0]
    assert len(frames) == 3
    assert loader.read(refs[1])[0] == refs[1] and loader.replaced == 1
    path.unlink()
    with pytest.raises(StoreError, match="is gone"):
        loader.read(refs[1])  # a store that has lost a shard is no damaged sample


def test_what_cannot_work_is_refused(
    store: LocalStore, sets: dict[str, ShardSet], loader: Loader, tmp_path: Path, make_set: Any
) -> None:
    """Nothing to load, a share of what is not there, an empty set, another form, another kind, weights of nothing."""
    videos, images = [sets["va"], sets["vb"]], [sets["ia"]]
    other = LocalStore(tmp_path / "store")
    small, empty = make_set(other, "va", 4, num_frames=2), make_set(other, "vb", 2, duplicates={0: 1, 1: 0})
    more = make_set(other, "vc", 4)
    refused: list[tuple[str, Any, Any, Any, dict[str, Any]]] = [
        ("nothing to load", store, [], [], {}),
        ("only videos", store, videos, [], {"image_share": 0.5}),
        ("no samples to train on", other, [empty], [], {}),
        ("3 frames of 64 x 48 and .*2 frames", other, [more, small], [], {}),
        ("set of images, given as one of videos", store, images, [], {}),
        (r"not \['vb'\]", store, videos, images, {"weights": {"va": 1.0}}),
        (r"name \['vx'\]", store, videos, images, {"weights": {"vx": 1.0}}),
        ("tell sets of one source apart", store, [sets["va"]] * 2, [], {"weights": {"va": 1.0}}),
    ]
    for match, where, some_videos, some_images, config in refused:
        with pytest.raises(ConfigError, match=match):
            Loader(where, some_videos, some_images, LoaderConfig(batch_size=4, **config))
    with pytest.raises(ConfigError, match="3 ranks"):
        loader.refs(0, 0, 3)


def test_an_index_is_mapped_not_held(
    store: LocalStore, sets: dict[str, ShardSet], make_loader: Callable[..., Loader], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With a cache folder the index is made into a file once, and read from there; the samples are the same."""
    monkeypatch.setattr(loaders, "BATCH_ROWS", 4)  # several record batches out of ten rows
    expected = make_loader().refs(5)
    mapped = make_loader(cache_dir=str(tmp_path / "cache"))
    assert mapped.refs(5) == expected
    index = load_manifest(store, sets["va"].prefix).file("index.parquet")
    made = tmp_path / "cache" / "indexes" / f"{index.sha256}-{loaders.INDEX_VERSION}"
    assert made.exists() and len(list(made.parent.iterdir())) == 3
    before = made.stat()
    assert make_loader(cache_dir=str(tmp_path / "cache")).refs(5) == expected
    assert made.stat() == before
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert make_loader(cache_dir=str(blocked)).refs(5) == expected


def test_rows_out_of_order_are_refused(tmp_path: Path, make_set: Any) -> None:
    """The order of training stands on the order of the shards in the index."""
    store = LocalStore(tmp_path / "store")
    videos = make_set(store, "va", 8)
    path = tmp_path / "store" / load_manifest(store, videos.prefix).file("index.parquet").key
    pq.write_table(pq.read_table(path).take(list(range(7, -1, -1))), path)
    with pytest.raises(StoreError, match="not in order"):
        Loader(store, [videos], [], LoaderConfig(batch_size=4))


# ---- what is kept back ----


@pytest.mark.parametrize("holdout", [1, 3])
def test_no_step_ever_sees_a_sample_that_is_held_out(make_loader: Callable[..., Loader], holdout: int) -> None:
    """Over several epochs all rows come but the last of each set; those are had by another door, at other positions."""
    loader = make_loader(holdout=holdout)
    for kind, split in loader.splits.items():
        seen = {split.ref(position).key for position in range(5 * len(split))}
        held = loader.held_out(kind)
        assert len(held) == holdout * len(split.sets) and not seen & {ref.key for ref in held}
        assert len(seen) + len(held) == sum(len(one.rows) for one in split.sets)
        assert [ref.position for ref in held] == [-1 - place for place in range(len(held))]
        assert all(ref.fps in loader.image_fps for ref in held)
        assert loader.frames(held[0]).shape == loader.frames(split.ref(0)).shape


def test_a_set_that_is_held_out_whole_is_refused(make_loader: Callable[..., Loader]) -> None:
    """Nothing would be left to train on."""
    with pytest.raises(ConfigError, match="holdout=5 keeps back"):
        make_loader(holdout=5)
