import io
import json
import os
import pickle
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from vc2.artifacts import ShardSet, load_manifest
from vc2.data.config import LoaderConfig, SampleForm
from vc2.data.foreign import adopt
from vc2.data.loader import Loader
from vc2.errors import SourceError
from vc2.storage import LocalStore, open_store

CLIPS = SampleForm(num_frames=4, width=48, height=32, max_stride=3)
PICTURES = SampleForm(num_frames=1, width=48, height=32)


def write_tar(path: Path, members: Mapping[str, bytes | tarfile.TarInfo]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def link(target: str) -> tarfile.TarInfo:
    found = tarfile.TarInfo()
    found.type, found.linkname = tarfile.SYMTYPE, target
    return found


class Bomb:
    def __reduce__(self) -> Any:
        return os._exit, (3,)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def rejects(store: Any, shards: ShardSet) -> dict[str, str]:
    """Reasons by key, of those that have one."""
    data = store.read(load_manifest(store, shards.prefix).file("rejects.parquet").key)
    lines = pq.read_table(io.BytesIO(data)).to_pylist()
    return {line["key"] or line["locator"].rpartition("/")[2]: line["reason"] for line in lines}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, media: Any) -> Path:
    """What video2dataset leaves: mp4, txt and json of one key, and samples that lack a part."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(2):
        members: dict[str, Any] = {}
        for clip in range(3):
            key = f"{number:05d}{clip:04d}"
            members[f"{key}.mp4"] = media.mp4(30 + clip, 24, first=10 * number + clip)
            members[f"{key}.txt"] = f"video {key}".encode()
            members[f"{key}.json"] = json.dumps({"videoid": key, "status": "success"}).encode()
        write_tar(folder / f"{number:05d}.tar", members)
    return folder


def test_clips_out_of_tars_of_others(videos: Path, store: LocalStore, tmp_path: Path, media: Any) -> None:
    """Nothing is copied; each position draws its own clip, the same one in every run, whose frames are those of the
    video at the stride drawn."""
    shards = adopt(str(videos), media="video", form=CLIPS, name="theirs", store=store, work=tmp_path / "work")
    assert shards.counts == {
        "rows": 6, "samples": 6, "rows_with_samples": 6, "rows_rejected": 0, "rows_duplicate": 0, "shards": 2
    }  # fmt: skip
    assert adopt(str(videos), media="video", form=CLIPS, name="theirs", store=store, work=tmp_path) == shards
    assert not list((tmp_path / "work").iterdir())
    config = LoaderConfig(batch_size=6, seed=1)
    loader, again = (Loader(store, [shards], [], config) for _ in range(2))
    epochs = [{ref.key: ref for ref in loader.refs(step)} for step in range(4)]
    assert all(len(epoch) == 6 for epoch in epochs)
    for key in epochs[0]:
        assert len({tuple((epoch[key].clip or {})["indices"]) for epoch in epochs}) > 1
    for ref in loader.refs(2):
        assert ref.clip is not None and ref.caption == f"video {ref.key.partition('/')[2]}"
        stride = ref.clip["stride"]
        assert np.diff(ref.clip["indices"]).tolist() == [stride] * 3 and ref.fps == 24 // stride
        _, frames = loader.read(ref)
        assert frames.shape == (4, 32, 48, 3)
        name = ref.key.partition("/")[2]
        whole = media.frames(40, first=10 * int(name[:5]) + int(name[5:]))[ref.clip["indices"]]
        assert np.abs(frames.mean((1, 2, 3)) - whole.mean((1, 2, 3))).max() < 4
    shown = {ref.identity: ref.clip for step in range(40) for ref in loader.refs(step)}
    assert len(shown) > 6
    for step in range(40):
        assert all(shown[ref.identity] == ref.clip for ref in loader.refs(step))
    assert again.refs(3) == loader.refs(3)
    assert np.array_equal(again.read(again.refs(3)[0])[1], loader.read(loader.refs(3)[0])[1])
    assert sum(loader.image_fps.values()) == 6
    for one in (loader, again):
        one.close()


def test_pictures_are_fitted_as_shards_of_ours(store: LocalStore, tmp_path: Path, media: Any, make_set: Any) -> None:
    """Images of any size become samples of one; they mix with shards of ours that have the same form."""
    members: dict[str, Any] = {}
    for number, size in enumerate([(96, 64), (64, 96), (40, 40)]):
        members[f"{number:09d}.jpg"] = media.jpeg(number, *size)
        members[f"{number:09d}.json"] = json.dumps({"caption": f"picture {number}", "width": 1}).encode()
    write_tar(tmp_path / "in" / "00000.tar", members)
    theirs = adopt(f"{tmp_path}/in/00000.tar", media="image", form=PICTURES, name="laion", store=store, work=tmp_path)
    ours = make_set(store, "ia", 5, images=True, size=(48, 32))
    config = LoaderConfig(batch_size=8, weights={"laion": 1, "ia": 3})
    loader = Loader(store, [], [theirs, ours], config, image_fps={8: 1})
    read = [loader.read(ref) for ref in loader.refs(0)]
    assert {frames.shape for _, frames in read} == {(1, 32, 48, 3)}
    assert Counter(ref.key[:2] for ref, _ in read) == {"00": 2, "ia": 6}
    loader.close()


def test_every_member_of_a_hostile_tar_has_its_fate(
    store: LocalStore, tmp_path: Path, media: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that lead out, links, pickles, pages that call themselves videos: each its reason; nothing is run, nothing
    is written beside, what is good is kept."""
    good = media.mp4(30, 24)
    members: dict[str, Any] = {
        "good.mp4": good, "good.txt": b"a good one", "good.pickle": pickle.dumps(Bomb()),
        "good.pyd": pickle.dumps(Bomb()),
        "../../escape.mp4": media.mp4(30, 24, first=9), "../../escape.txt": b"climbs up",
        "/etc/absolute.mp4": media.mp4(30, 24, first=19), "/etc/absolute.txt": b"starts at the root",
        "page.mp4": b"<html>not found</html>", "page.txt": b"a page",
        "silent.mp4": media.mp4(30, 24, first=29), "silent.json": b'{"caption": 3}',
        "torn.mp4": good[: len(good) // 2], "torn.txt": b"half",
        "short.mp4": media.mp4(2, 24), "short.txt": b"two frames",
        "alone.json": json.dumps({"caption": "no video", "status": "failed_to_download"}).encode(),
        "same.mp4": good, "same.txt": b"the same bytes",
        "weights.pth": pickle.dumps(Bomb()), "weights.txt": b"weights",
        "good.json": b"{}",
        "link.mp4": link("/etc/passwd"),
        "README": b"no ending",
    }  # fmt: skip
    folder = tmp_path / "in"
    write_tar(folder / "a.tar", members)
    (folder / "b.tar").write_bytes((folder / "a.tar").read_bytes()[:1500])  # torn within its first member
    (folder / "c.tar").write_bytes(b"<html>" * 1000)
    (folder / "d.tar").write_bytes(b"")
    monkeypatch.chdir(folder)
    shards = adopt(str(folder), media="video", form=CLIPS, name="hostile", store=store, work=tmp_path / "work")
    found = rejects(store, shards)
    assert found == {
        "a/page": "not_media", "a/silent": "no_caption", "a/torn": found["a/torn"], "a/short": "too_short",
        "a/alone": "missing_file", "a/same": "duplicate", "a/weights": "not_media", "a/good": "duplicate_key",
        "link.mp4": "not_media", "README": "not_media", "(end of the tar)": "truncated",
        "b/good": "missing_file",
    }  # fmt: skip
    assert found["a/torn"] in ("truncated", "undecodable")
    counts = shards.counts
    assert counts["samples"] == 3 and counts["rows_duplicate"] == 1
    assert counts["rows"] == counts["samples"] + counts["rows_rejected"] + counts["rows_duplicate"]
    assert not (tmp_path.parent / "escape.mp4").exists()
    assert sorted(os.listdir(folder)) == ["a.tar", "b.tar", "c.tar", "d.tar"]
    loader = Loader(store, [shards], [], LoaderConfig(batch_size=3))
    assert {ref.key for ref in loader.refs(0)} == {"a/good", "a/../../escape", "a//etc/absolute"}
    assert all(len(loader.read(ref)[1]) == 4 for ref in loader.refs(0))
    loader.close()


def test_a_header_that_claims_to_be_huge_is_not_believed(store: LocalStore, tmp_path: Path, media: Any) -> None:
    """A long name of gigabytes, a size below zero: the tar ends there, what came before is kept."""
    path = tmp_path / "in" / "a.tar"
    write_tar(path, {"good.jpg": media.jpeg(1), "good.txt": b"a good one"})
    data = path.read_bytes()
    end = data.index(bytes(1024), len(data) - 20 * 512 if len(data) > 20 * 512 else 0)
    end = -(-end // 512) * 512
    huge = tarfile.TarInfo("././@LongLink")
    huge.type, huge.size = tarfile.GNUTYPE_LONGNAME, 2**33
    path.write_bytes(data[:end] + huge.tobuf() + bytes(10**5))
    shards = adopt(str(path), media="image", form=PICTURES, name="a", store=store, work=tmp_path)
    assert shards.counts["samples"] == 1
    assert rejects(store, shards) == {"(end of the tar)": "truncated"}


def test_a_damaged_header_is_no_end(store: LocalStore, tmp_path: Path, media: Any) -> None:
    """One wrong byte loses the rest of a tar, and so says the account; so does a tar without its last blocks."""
    members = {f"{n}.{ending}": data for n in range(4) for ending, data in (("jpg", media.jpeg(n)), ("txt", b"a dog"))}
    for name in ("flipped", "cut"):
        write_tar(tmp_path / name / "a.tar", members)
        path = tmp_path / name / "a.tar"
        data = bytearray(path.read_bytes())
        if name == "flipped":
            data[data.index(b"2.jpg")] ^= 1
        else:
            data = data.rstrip(b"\0")
            data += bytes(-len(data) % 512)
        path.write_bytes(data)
        shards = adopt(str(path), media="image", form=PICTURES, name=name, store=store, work=tmp_path)
        assert shards.counts["samples"] == (2 if name == "flipped" else 4)
        assert shards.counts["rows"] == shards.counts["samples"] + 1
        assert rejects(store, shards) == {"(end of the tar)": "truncated"}


def test_tars_in_a_bucket(videos: Path, s3_uri: str, store: LocalStore, tmp_path: Path) -> None:
    """They are read by ranges where they are, and kept near at hand like shards of ours."""
    bucket = open_store(s3_uri)
    for path in sorted(videos.iterdir()):
        bucket.upload(path, f"tars/{path.name}")
    uri = f"{s3_uri}/tars/{{00000..00001}}.tar"
    shards = adopt(uri, media="video", form=CLIPS, name="theirs", store=store, work=tmp_path)
    manifest = load_manifest(store, shards.prefix)
    assert manifest.file("shard-000001.tar").key == f"{s3_uri}/tars/00001.tar"
    local = adopt(str(videos), media="video", form=CLIPS, name="theirs", store=store, work=tmp_path)
    assert (
        load_manifest(store, local.prefix).file("shard-000001.tar").sha256 == manifest.file("shard-000001.tar").sha256
    )
    near = LoaderConfig(batch_size=6, cache_dir=str(tmp_path / "cache"), cache_gib=1)
    loader, there = Loader(store, [shards], [], near), Loader(store, [local], [], LoaderConfig(batch_size=6))
    for ref, same in zip(loader.refs(0), there.refs(0), strict=True):
        assert np.array_equal(loader.frames(ref), there.frames(same))
    loader.close()
    there.close()


def test_what_is_no_tar_of_samples_is_refused(store: LocalStore, tmp_path: Path, media: Any) -> None:
    """Commands, unknown schemes, packed tars, wrong paths, the other kind of medium: one line that says so."""
    write_tar(tmp_path / "in" / "a.tar", {"a.jpg": media.jpeg(1), "a.txt": b"a picture"})
    (tmp_path / "a.tgz").write_bytes(b"\x1f\x8b")
    for part in "01":
        write_tar(tmp_path / part / "a.tar", {"a.jpg": media.jpeg(1), "a.txt": b"a picture"})
    places = {
        f"{tmp_path}/{{0..1}}/a.tar": "have the same name",
        "pipe:cat /etc/passwd": "commands are not run", "ftp://host/a.tar": "unknown scheme",
        "http://host/a.tar": "copy them to a disk", f"{tmp_path}/a.tgz": "no plain .tar",
        f"{tmp_path}/nowhere": "does not exist", f"{tmp_path}/in": "other kind",
    }  # fmt: skip
    for uri, match in places.items():
        with pytest.raises(SourceError, match=match):
            adopt(uri, media="video", form=CLIPS, name="theirs", store=store, work=tmp_path)
