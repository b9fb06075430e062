import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import av
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vc2.errors import SourceError
from vc2.miniature.config import WorldConfig
from vc2.miniature.scene import Truth, parse_caption
from vc2.miniature.world import World, make_world, open_world

TINY = WorldConfig(num_videos=16, num_web_images=24, num_jdb_images=16, num_prompts=8)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(small_world: World, tmp_path: Path) -> None:
    again = make_world(small_world.config, tmp_path / "elsewhere")
    assert _digests(again.root) == _digests(small_world.root)
    other = make_world(TINY.evolve(seed=7), tmp_path / "other")
    assert _digests(other.root) != _digests(small_world.root)


def test_a_finished_world_is_found_not_made_again(small_world: World) -> None:
    before = {path: path.stat().st_mtime_ns for path in small_world.root.rglob("*")}
    assert make_world(small_world.config, small_world.root) == small_world == open_world(small_world.root)
    assert {path: path.stat().st_mtime_ns for path in small_world.root.rglob("*")} == before


def test_a_killed_run_leaves_nothing_half_there(tmp_path: Path) -> None:
    """kill -9 in the middle: nothing at the final place, and the next run removes what lies beside it."""
    code = (
        "import sys; from pathlib import Path; from vc2.miniature.world import *; from vc2.miniature.config import *; "
    )
    code += "make_world(WorldConfig(), Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "world")])
    while process.poll() is None and not list(tmp_path.glob(".world.*.partial/webvid/videos/*/*.mp4")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "world").exists() and len(list(tmp_path.iterdir())) == 1
    make_world(TINY, tmp_path / "world")
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_a_run_beside_a_living_one_leaves_its_work_alone(tmp_path: Path) -> None:
    import fcntl

    place = tmp_path / ".world.0123456789ab.partial"
    place.mkdir()
    handle = os.open(place, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    make_world(TINY, tmp_path / "world")
    assert place.exists()
    os.close(handle)


def test_what_is_no_world_is_not_overwritten(small_world: World, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SourceError, match="no miniature world"):
        make_world(TINY, tmp_path)
    with pytest.raises(SourceError, match="another config"):
        make_world(TINY.evolve(seed=7), small_world.root)
    with pytest.raises(SourceError, match="no finished miniature world"):
        open_world(tmp_path)


def test_webvid_rows_have_six_columns_and_every_file_is_what_the_truth_says(small_world: World) -> None:
    with open(small_world.webvid_csv, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["videoid", "name", "page_idx", "page_dir", "duration", "contentUrl"]
    assert any("," in row["name"] for row in rows) and any(row["videoid"].startswith("0") for row in rows)
    truth = small_world.truth("webvid")
    assert [f"{row['page_dir']}/{row['videoid']}" for row in rows] == [line["key"] for line in truth]
    for row, line in zip(rows, truth, strict=True):
        path = small_world.webvid_videos / f"{line['key']}.mp4"
        assert path.exists() != (line["defect"] == "missing")
        if line["defect"] == "empty_caption":
            assert row["name"] == ""
        else:
            assert parse_caption(row["name"]) == Truth.from_json(line["truth"])
        if line["defect"] in (None, "empty_caption", "too_short"):
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                assert stream.codec_context.name == "h264"
                assert float(stream.average_rate) == pytest.approx(line["fps"])
                assert (stream.width, stream.height) == (line["width"], line["height"])
                assert sum(1 for _ in container.decode(stream)) == line["num_frames"]
        if line["defect"] == "duplicate":
            assert path.read_bytes() == (small_world.webvid_videos / f"{line['duplicate_of']}.mp4").read_bytes()
    assert {line["defect"] for line in truth} == {
        None,
        "missing",
        "truncated",
        "html",
        "empty_caption",
        "too_short",
        "duplicate",
    }


def test_laion_parts_have_the_columns_of_laion_coco(small_world: World) -> None:
    parts = sorted(small_world.laion.glob("part-*-c000.snappy.parquet"))
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert len(parts) == 2 and len(rows) == small_world.config.num_web_images
    wanted = "URL TEXT HEIGHT WIDTH similarity hash punsafe pwatermark top_caption all_captions all_similarities"
    assert list(rows[0]) == wanted.split()
    for row, line in zip(rows, small_world.truth("laion"), strict=True):
        assert row["URL"] == line["key"]
        if line["defect"] is None:
            assert parse_caption(row["top_caption"] or row["TEXT"]) == Truth.from_json(line["truth"])
            with Image.open(small_world.laion / "www" / row["URL"].rsplit("/", 1)[1]) as image:
                assert image.size == (row["WIDTH"], row["HEIGHT"])


def test_jdb_archives_and_annotations_match_but_for_the_planted_rows(small_world: World) -> None:
    folder = small_world.jdb / "data" / "train"
    with tarfile.open(folder / "train_anno_realease_repath.jsonl.tgz") as tar:
        records = [json.loads(line) for line in tar.extractfile("train_anno_realease_repath.jsonl")]
    bodies = {}
    for part in ("000", "001"):
        with tarfile.open(folder / "imgs" / f"{part}.tgz") as tar:
            bodies |= {f"./{member.name}": tar.extractfile(member).read() for member in tar}
    assert any("Task2" not in record for record in records) and all(" --" in record["prompt"] for record in records)
    prompts = {record["img_path"]: record["prompt"] for record in records}
    for line in small_world.truth("jdb"):
        path = f"./{line['key']}.jpg"
        assert (path in bodies) == (line["defect"] != "no_media")
        assert (path in prompts) == (line["defect"] != "no_row")
        if line["defect"] is None:
            assert parse_caption(prompts[path]) == Truth.from_json(line["truth"])
            Image.open(io.BytesIO(bodies[path])).load()
        if line["defect"] == "corrupt":
            with pytest.raises(OSError):
                Image.open(io.BytesIO(bodies[path])).load()


def test_archives_carry_no_times(small_world: World) -> None:
    for path in small_world.jdb.rglob("*.tgz"):
        assert path.read_bytes()[4:8] == b"\0\0\0\0" and not path.read_bytes()[3] & 8, (
            "no time, no name in the gzip header"
        )
        with tarfile.open(path) as tar:
            assert {member.mtime for member in tar} == {0}


def test_prompts_name_a_real_clip_where_there_is_one_and_hold_some_that_no_clip_shows(small_world: World) -> None:
    prompts = small_world.prompts()
    shown = {parse_caption(line["caption"]): line for line in small_world.truth("webvid") if line["caption"]}
    sound = {line["key"] for line in small_world.truth("webvid") if line["defect"] is None}
    assert len(prompts) == 8 and sum(not prompt["seen"] for prompt in prompts) == 2
    for prompt in prompts:
        truth = parse_caption(prompt["prompt"])
        assert truth == Truth.from_json(prompt["truth"])
        assert (truth in shown) == prompt["seen"] == (prompt["key"] is not None)
        assert prompt["key"] is None or prompt["key"] in sound


def _digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }
