"""Whole sources through fetch, plan, Ray Data and commit, with planted defects, other worker counts and kills."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from vc2.artifacts import Manifest, ShardSet, load_manifest, shard_set_prefix, verify
from vc2.data.build import write_verdict
from vc2.data.config import FolderSource, ShardStage, WebVidSource, ledger_prefix, shard_fingerprint, source_digest
from vc2.data.fetch import workplace
from vc2.data.prepare import prepare
from vc2.data.rejects import RejectReason
from vc2.data.shards import read_frames
from vc2.errors import YieldTooLow
from vc2.storage import LocalStore, Store

RATES = [Fraction(10), Fraction(24000, 1001), Fraction(25), Fraction(60)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, media: Any, bikes: Path) -> WebVidSource:
    """WebVid as it lies on people's disks: 16 rows, one of them natural video, six of them bad, one a copy."""
    root = tmp_path_factory.mktemp("webvid")
    rows = []
    for number in range(16):
        folder, videoid = f"00000{number % 2}_000050", f"10{number:02d}"
        path = root / "videos" / folder / f"{videoid}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        mp4 = media.mp4(30 + number, RATES[number % 4], first=number)
        caption = f"grey number {number}, rising"
        if number == 1:
            shutil.copyfile(bikes, path)
        elif number == 2:
            caption = ""
        elif number == 3:
            mp4 = b"<html>not found</html>" * 40
        elif number == 4:
            mp4 = mp4[: len(mp4) - 300]
        elif number == 5:
            mp4 = media.mp4(5, 25)
        elif number == 7:
            mp4 = media.mp4(36, RATES[2], first=6)
            (root / "videos" / "000000_000050" / "1006.mp4").write_bytes(mp4)
        if number not in (1, 6, 8):
            path.write_bytes(mp4)
        rows.append(f'{videoid},"{caption}",1,{folder},PT00H00M02S,http://h/{videoid}.mp4')
    rows.append("only,three,fields")
    table = root / "results.csv"
    table.write_text("videoid,name,page_idx,page_dir,duration,contentUrl\n" + "\n".join(rows) + "\n")
    return WebVidSource(table=str(table), videos=str(root / "videos"))


def stage_of(source: Any, **changes: Any) -> ShardStage:
    form = {"num_frames": 8, "width": 40, "height": 24, **changes.pop("form", {})}
    return ShardStage.model_validate(
        {"source": source, "form": form, "fetch": {"part_rows": 5}, "samples_per_shard": 3} | changes
    )


def fingerprint_of(config: ShardStage) -> str:
    return shard_fingerprint("shard", config, source_digest(config.source))


def made(config: ShardStage, root: Path) -> tuple[Store, ShardSet, Manifest]:
    store = LocalStore(root / "store")
    shards = prepare(config, store, root / "work", fingerprint=fingerprint_of(config))
    assert shards is not None
    return store, shards, load_manifest(store, shards.prefix)


def rows_of(store: Store, shards: ShardSet, name: str) -> list[dict[str, Any]]:
    return pq.read_table(io.BytesIO(store.read(f"{shards.prefix}/{name}.parquet"))).to_pylist()


@pytest.fixture(scope="module")
def unbroken(
    source: WebVidSource, ray_address: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, ShardSet, Manifest]:
    return made(stage_of(source), tmp_path_factory.mktemp("unbroken"))


def test_every_row_is_a_sample_a_reject_or_a_copy(unbroken: tuple[Store, ShardSet, Manifest]) -> None:
    """In = samples + rejects by reason + exact duplicates, and each planted defect is told by its name."""
    store, shards, manifest = unbroken
    counts = manifest.counts
    assert counts["rows"] == 17 == counts["rows_with_samples"] + counts["rows_rejected"] + counts["rows_duplicate"]
    assert manifest.facts["reasons"] == {
        "missing_file": 1,
        "no_caption": 1,
        "not_media": 1,
        "too_short": 1,
        "truncated": 1,
        "unparsable": 1,
    }
    assert (counts["samples"], counts["rows_duplicate"]) == (10, 1)
    index, rejects = rows_of(store, shards, "index"), rows_of(store, shards, "rejects")
    assert len(index) == 10 and len(rejects) == 7
    assert {row["row"] for row in index}.isdisjoint(row["row"] for row in rejects)
    (copy,) = [row for row in rejects if row["what"] == "duplicate"]
    assert copy["duplicate_of"] == "000000_000050/1006"
    assert [row["shard"] for row in index] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert manifest.licenses == {"webvid": manifest.config["source"]["license"]}
    assert Counter(row["fps"] for row in index) == {
        int(fps): count for fps, count in manifest.facts["fps_histogram"].items()
    }
    assert list(verify(store, shards.prefix)) == []


def test_frames_are_those_of_the_plan(unbroken: tuple[Store, ShardSet, Manifest], source: WebVidSource) -> None:
    """Each sample holds the planned source frames, by an independent decoder, scaled and cropped; the label is the true
    rate."""
    store, shards, manifest = unbroken
    plan = {(row["shard"], row["slot"]): row for row in rows_of(store, shards, "plan")}
    for row in rows_of(store, shards, "index"):
        slot = plan[row["shard"], row["slot"]]
        key = manifest.file(f"shard-{row['shard']:06d}.tar").key
        frames = read_frames(store, key, row["offset"], row["length"], row["frame_bytes"], row["ending"])
        assert frames.shape == (8, 24, 40, 3)
        with av.open(str(Path(source.videos or "") / slot["locator"])) as container:
            rate = container.streams.video[0].average_rate
            whole = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
        truth = np.array([whole[number].mean() for number in slot["indices"]])
        if "1001" not in slot["key"]:  # of the natural clip the crop shows only a part
            assert np.abs(frames.mean(axis=(1, 2, 3)) - truth).max() < 4
        assert rate is not None and row["fps"] == int(rate / slot["stride"])


def test_a_finished_set_is_found_not_made(unbroken: tuple[Store, ShardSet, Manifest], source: WebVidSource) -> None:
    """The second call answers with the same artifact and touches nothing."""
    store, shards, _ = unbroken
    before = {entry.key: entry.modified for entry in store.list("shards/")}
    assert prepare(stage_of(source), store, Path("/nowhere"), fingerprint=shards.fingerprint) == shards
    assert {entry.key: entry.modified for entry in store.list("shards/")} == before


@pytest.mark.parametrize("moment", [1, 2])
def test_any_kill_and_any_number_of_workers_give_the_same_bytes(
    unbroken: tuple[Store, ShardSet, Manifest], source: WebVidSource, ray_address: str, tmp_path: Path, moment: int
) -> None:
    """kill -9 while fetching or while building, then one worker instead of two: the set is that of the unbroken run."""
    config = stage_of(source, workers=1)
    code = (
        "import sys; from pathlib import Path; from vc2.storage import open_store; "
        "from vc2.data.config import ShardStage; from vc2.data.prepare import prepare; "
        "prepare(ShardStage.model_validate_json(sys.argv[1]), open_store(sys.argv[2]), Path(sys.argv[3]), "
        "fingerprint=sys.argv[4])"
    )
    store = LocalStore(tmp_path / "store")
    arguments = [config.model_dump_json(), store.uri, str(tmp_path / "work"), fingerprint_of(config)]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "RAY_ADDRESS": ray_address},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    awaited = [f"{ledger_prefix(config)}/part-0000001.parquet", f"{unbroken[1].prefix}/parts/shard-000001."][moment - 1]
    deadline = time.monotonic() + 120
    while not [*store.list(awaited)] and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert [*store.list(awaited)]
    _, _, manifest = made(config, tmp_path)
    assert manifest.content_digest == unbroken[2].content_digest
    assert [entry.sha256 for entry in manifest.files] == [entry.sha256 for entry in unbroken[2].files]
    for _ in range(600):  # Ray takes a moment to end the workers of a driver that was killed
        with workplace(tmp_path / "work") as folder:
            left = [path for path in folder.parent.iterdir() if path != folder]
        if not left:
            break
        time.sleep(0.1)
    assert not left


def test_clips_of_one_video_share_its_fate_or_are_counted_apart(
    source: WebVidSource, ray_address: str, tmp_path: Path
) -> None:
    """With several clips a row counts once; a file with a verdict leaves its slots empty and is rejected once."""
    config = stage_of(source, form={"clips_per_video": 2})
    store = LocalStore(tmp_path / "store")
    victim = Path(source.videos or "") / "000001_000050" / "1009.mp4"
    sha256 = hashlib.sha256(victim.read_bytes()).hexdigest()
    write_verdict(
        store, shard_set_prefix("webvid", fingerprint_of(config)), sha256, RejectReason.DECODE_TIMEOUT, "too slow"
    )
    _, shards, manifest = made(config, tmp_path)
    counts = manifest.counts
    assert (counts["samples"], counts["clips_rejected"]) == (18, 0)
    assert (counts["rows_with_samples"], counts["rows_rejected"], counts["rows_duplicate"]) == (9, 7, 1)
    assert manifest.facts["reasons"]["decode_timeout"] == 1
    index = rows_of(store, shards, "index")
    assert {row["key"][-3:] for row in index} == {"_00", "_01"}
    assert len({row["key"] for row in index}) == 18 and len({row["source_key"] for row in index}) == 9


def test_a_wrong_path_fails_and_says_why(source: WebVidSource, ray_address: str, tmp_path: Path) -> None:
    """Where nothing is found the stage fails early, with the top reasons and an example; no set appears."""
    (tmp_path / "empty").mkdir()
    config = stage_of(source.evolve(videos=str(tmp_path / "empty")))
    with pytest.raises(
        YieldTooLow, match=r"webvid: only 0 of 17 rows .* missing_file 15.*example row 0 \(000000_000050/1000"
    ):
        made(config, tmp_path)
    assert not list(LocalStore(tmp_path / "store").list("shards/"))


def test_own_photographs_go_the_same_way(photographs: list[Path], ray_address: str, tmp_path: Path) -> None:
    """A folder of natural pictures with captions beside them becomes images of one frame, sharp and in place."""
    from PIL import Image

    folder = tmp_path / "mine"
    folder.mkdir()
    for path in photographs:
        shutil.copyfile(path, folder / path.name)
        (folder / path.name).with_suffix(".txt").write_text(f"a photograph of a {path.stem}")
    source = FolderSource(name="mine", media="image", folder=str(folder), license="CC0")
    config = stage_of(source, form={"num_frames": 1, "width": 320, "height": 200})
    store, shards, manifest = made(config, tmp_path)
    assert manifest.counts["samples"] == 2
    for row in rows_of(store, shards, "index"):
        assert row["caption"] == f"a photograph of a {row['key']}"
        assert (row["fps"], row["num_frames"]) == (0, 1)
        key = manifest.file("shard-000000.tar").key
        frame = read_frames(store, key, row["offset"], row["length"], row["frame_bytes"], row["ending"])[0]
        with Image.open(folder / f"{row['key']}.jpg") as image:
            scale = max(320 / image.width, 200 / image.height)
            size = round(image.width * scale), round(image.height * scale)
            whole = np.asarray(image.resize(size, Image.Resampling.BOX)).astype(int)
        top, left = (size[1] - 200) // 2, (size[0] - 320) // 2
        assert np.abs(frame - whole[top : top + 200, left : left + 320]).mean() < 7


def test_what_a_sample_is_made_of_stands_in_the_tar(unbroken: tuple[Store, ShardSet, Manifest]) -> None:
    """The json of a sample tells source row, file, digest, frames and licence."""
    store, shards, manifest = unbroken
    with tarfile.open(fileobj=io.BytesIO(store.read(manifest.file("shard-000000.tar").key))) as tar:
        members = [member for member in tar if member.name.endswith(".json")]
        facts = [json.loads((tar.extractfile(member) or io.BytesIO()).read()) for member in members]
    plan = rows_of(store, shards, "plan")[:3]
    for fact, slot in zip(facts, plan, strict=True):
        assert fact["indices"] == slot["indices"]
        assert fact["sha256"] == slot["sha256"]
        assert fact["source_fps"] == slot["rate"]
        assert fact["license"].startswith("WebVid terms")
