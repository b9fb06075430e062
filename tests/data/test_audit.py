import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vc2.artifacts import ShardSet, load_manifest, verify
from vc2.data.audit import check_samples, explain, shard_table
from vc2.data.config import FolderSource, SampleForm, ShardStage
from vc2.data.foreign import adopt
from vc2.data.sheet import contact_sheet
from vc2.errors import ShardCorrupted, StoreError
from vc2.storage import LocalStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    return LocalStore(tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="module")
def shards(store: LocalStore, make_set: Any) -> ShardSet:
    rejects = [
        {"what": "row", "row": 8, "key": "va8", "locator": "files/va8", "reason": "too_short", "detail": "2 frames"},
        {"what": "duplicate", "row": 9, "key": "va9", "reason": "duplicate", "duplicate_of": "va0"},
    ]
    return make_set(store, "va", 8, rejects=rejects)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_one_flipped_byte_is_named(store: LocalStore, shards: ShardSet, data: st.DataObject) -> None:
    """In json, media, header or the zeros between: the shard is named, and the sample if it is one's."""
    manifest = load_manifest(store, shards.prefix)
    assert list(check_samples(store, manifest)) == []
    entry = data.draw(st.sampled_from([file for file in manifest.files if file.name.endswith(".tar")]))
    path = Path(store.uri) / entry.key
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = {member.name: -(-(member.offset_data + member.size) // 512) * 512 for member in tar}
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        wrong = list(check_samples(store, manifest, {entry.name}))
    finally:
        path.write_bytes(whole)
    assert len(wrong) == 1 and wrong[0].startswith(entry.name)
    name = next((name for name, end in ends.items() if place < end), None)
    if name is not None:
        assert f"sample {name.rpartition('.')[0]}: " in wrong[0]
        assert name.rpartition(".")[2] in wrong[0]


def test_lost_and_shortened_shards_are_told(make_set: Any, tmp_path: Path) -> None:
    """The others are still looked at."""
    store = LocalStore(tmp_path / "store")
    made = make_set(store, "va", 12)
    manifest = load_manifest(store, made.prefix)
    tars = [tmp_path / "store" / entry.key for entry in manifest.files if entry.name.endswith(".tar")]
    tars[0].unlink()
    tars[2].write_bytes(tars[2].read_bytes()[:700])
    wrong = list(check_samples(store, manifest))
    assert [line[:16] for line in wrong] == ["shard-000000.tar", "shard-000002.tar"]
    assert "is gone" in wrong[0] and "shorter" in wrong[1]


def test_a_damaged_index_is_said_in_a_line(make_set: Any, tmp_path: Path) -> None:
    """Cut short, overwritten or of another shape: no error of Arrow's reaches the reader."""
    store = LocalStore(tmp_path / "store")
    manifest = load_manifest(store, make_set(store, "va", 8).prefix)
    path = Path(store.uri) / manifest.file("index.parquet").key
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.chmod(0o644)
    for damaged in (b"", whole[:middle], b"\0" * len(whole), whole[: middle - 99] + bytes(200) + whole[middle + 101 :]):
        path.write_bytes(damaged)
        for look in (shard_table, lambda *place: explain(*place, "va1"), contact_sheet):
            with pytest.raises(ShardCorrupted, match="its bytes are no table") as caught:
                look(store, manifest)
            assert "\n" not in str(caught.value)
        assert ["index.parquet: " in line for line in check_samples(store, manifest)] == [True]


def test_a_sample_is_explained(store: LocalStore, shards: ShardSet) -> None:
    """From the row of its source to its bytes; a row without a sample has its reason."""
    manifest = load_manifest(store, shards.prefix)
    said = explain(store, manifest, "va5")
    assert said["source"] == {"name": "va", "source_key": "va5", "row": 5, "locator": "files/va5"}
    assert said["tar"]["name"] == "shard-000001.tar" and said["json"]["caption"] == "a va5"
    assert json.loads(json.dumps(said)) == said
    assert explain(store, manifest, "va8")["rejects"][0]["reason"] == "too_short"
    assert explain(store, manifest, "va9")["rejects"][0]["duplicate_of"] == "va0"
    with pytest.raises(StoreError, match="look like 'va0'"):
        explain(store, manifest, "vb0")


def test_tars_of_others_are_checked_and_explained_too(tmp_path: Path, media: Any) -> None:
    """Of a sample in somebody's tar a flipped byte is named by its sample, and its facts are told."""
    store = LocalStore(tmp_path / "store")
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for number in range(3):
            for ending, content in (("jpg", media.jpeg(number)), ("txt", b"a picture")):
                (tmp_path / "file").write_bytes(content)
                tar.add(tmp_path / "file", f"{number}.{ending}")
    form = SampleForm(num_frames=1, width=32, height=32)
    made = adopt(str(path), media="image", form=form, name="theirs", store=store, work=tmp_path)
    manifest = load_manifest(store, made.prefix)
    assert list(check_samples(store, manifest)) == []
    said = explain(store, manifest, "a/1")
    assert said["tar"]["uri"] == str(path) and json.loads(said["index"]["facts"])["width"] == 96
    data = bytearray(path.read_bytes())
    data[said["index"]["offset"] + 100] ^= 1
    path.write_bytes(data)
    wrong = list(check_samples(store, manifest))
    assert len(wrong) == 1 and "shard-000000.tar sample a/1: its jpg" in wrong[0]
    line = {"shard": 0, "generation": 0, "samples": 3, "rejected": 0, "bytes": len(data), "tar": str(path)}
    assert shard_table(store, manifest) == [line]


def test_a_prepared_sample_is_explained_to_its_row(tmp_path: Path, media: Any, ray_address: str) -> None:
    """Plan and ledger are found for a set that was prepared."""
    from vc2.data.prepare import prepare

    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.mp4").write_bytes(media.mp4(40, 24, first=10 * number))
        (folder / f"{number}.txt").write_text(f"a video number {number}")
    (folder / "page.mp4").write_bytes(b"<html>")
    (folder / "page.txt").write_text("a page")
    store = LocalStore(tmp_path / "store")
    config = ShardStage(
        source=FolderSource(name="mine", media="video", folder=str(folder)),
        form=SampleForm(num_frames=4, width=32, height=32),
        samples_per_shard=2,
    )
    made = prepare(config, store, tmp_path / "work", fingerprint="a" * 64)
    assert made is not None
    manifest = load_manifest(store, made.prefix)
    assert list(verify(store, made.prefix)) == list(check_samples(store, manifest)) == []
    said = explain(store, manifest, "2")
    assert said["source"]["locator"] == "2.mp4" and said["ledger"]["frames"] == 40
    assert said["plan"]["indices"] == said["json"]["indices"] and said["plan"]["stride"] == said["json"]["stride"]
    assert said["ledger"]["sha256"] == said["index"]["sha256"] and said["filters"]["min_caption"] == 3
    table = shard_table(store, manifest)
    assert [(line["shard"], line["samples"], line["rejected"]) for line in table] == [(0, 2, 0), (1, 1, 0)]
    assert explain(store, manifest, "page")["rejects"][0]["reason"] == "not_media"
