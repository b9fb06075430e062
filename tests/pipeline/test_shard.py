"""`vc2 shard` and what one does with a shard set afterwards, from the command line."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vc2.cli import main
from vc2.errors import ConfigError
from vc2.pipeline.shard import name_of, own_source
from vc2.ray_session import ray_session


def picture(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((128, 96)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures with captions, and one that is none."""
    folder = tmp_path_factory.mktemp("cli") / "My Pictures"
    folder.mkdir()
    for number in range(6):
        (folder / f"p{number}.jpg").write_bytes(picture(number))
        (folder / f"p{number}.txt").write_text(f"picture <b>{number}</b>")
    (folder / "page.jpg").write_bytes(b"<html>" * 20)
    (folder / "page.txt").write_text("a web page")
    return folder


class Vc2:
    """The command, in one store and work folder."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        self.capsys.readouterr()
        places = ["--store", str(self.root / "store"), "--work", str(self.root / "work")]
        assert main([*arguments, *(places if arguments[0] in ("shard", "index") else ())]) == code
        said = self.capsys.readouterr()
        return said.out if code == 0 or arguments[0] == "verify" else said.err


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """One Ray session for all commands."""
    with ray_session(2):
        yield


@pytest.fixture
def vc2(ray: None, mine: Path, capsys: pytest.CaptureFixture[str]) -> Vc2:
    return Vc2(mine.parent, capsys)


def shard(vc2: Vc2, mine: Path, *more: str, code: int = 0) -> str:
    return vc2("shard", str(mine), "--media", "image", "--set", "samples_per_shard=3", *more, code=code)


def test_a_dry_run_tells_and_keeps_nothing(vc2: Vc2, mine: Path) -> None:
    """Counts, rejects and sizes from a few rows; without Ray, without a store."""
    found = json.loads(shard(vc2, mine, "--dry-run", "--json", "--sample", "7"))
    assert (found["rows"], found["sampled"], found["reasons"]) == (7, 7, {"not_media": 1})
    assert (found["samples"], found["shards"]) == (6, 2) and found["shard_bytes"] > 1000
    assert "to store" in shard(vc2, mine, "--dry-run")
    assert not (mine.parent / "store").exists() and not list((mine.parent / "work").iterdir())


def test_from_a_folder_to_a_page_and_back_to_a_byte(vc2: Vc2, mine: Path, tmp_path: Path) -> None:
    """Made, found again, shown as numbers, as a page and sample by sample; a flipped byte is named."""
    made = json.loads(shard(vc2, mine, "--json"))
    uri = made["uri"]
    assert json.loads(shard(vc2, mine, "--json"))["uri"] == uri and "/shards/my-pictures/" in uri
    said = vc2("show", uri)
    assert "1 not_media" in said and "7 = 6 with samples + 1 rejected + 0 exact duplicates" in said
    assert all(len(line) < 120 for line in shard(vc2, mine).splitlines() if uri not in line)
    assert [line["samples"] for line in json.loads(vc2("show", uri, "--shards", "--json"))] == [3, 3]
    page = tmp_path / "sheet.html"
    vc2("show", uri, "--sheet", str(page))
    text = page.read_text()
    assert "picture &lt;b&gt;3&lt;/b&gt;" in text and "<b>3</b>" not in text and "http://" not in text
    told = json.loads(vc2("show", f"{uri}#p3"))
    assert told["ledger"]["sha256"] == told["index"]["sha256"] and told["json"]["caption"] == "picture <b>3</b>"
    assert json.loads(vc2("show", f"{uri}#page"))["rejects"][0]["reason"] == "not_media"
    assert json.loads(vc2("show", f"{uri}#p3.jpg"))["samples"] == ["p3"]
    assert "ok" in vc2("verify", uri)
    tar = Path(told["tar"]["uri"])
    data = bytearray(tar.read_bytes())
    data[told["index"]["offset"] + 50] ^= 1
    tar.chmod(0o644)
    tar.write_bytes(data)
    said = vc2("verify", uri, code=1)
    assert told["tar"]["name"] in said and "p3" in said and "p2" not in said
    data[told["index"]["offset"] + 50] ^= 1
    tar.write_bytes(data)


def test_generations_from_the_command_line(vc2: Vc2, mine: Path) -> None:
    """Retry and removal speak of the newest set; what cannot be is said in a line."""
    shard(vc2, mine)
    assert "the rejects are: not_media 1" in shard(vc2, mine, "--retry", "timeout", code=1)
    assert "--retry and --remove" in shard(vc2, mine, "--retry", "timeout", "--remove", "x", code=1)
    assert "not a readable text file" in shard(vc2, mine, "--remove", "/nowhere", code=1)
    assert "no finished set" in shard(vc2, mine, "--retry", "timeout", "--set", "seed=9", code=1)
    again = json.loads(shard(vc2, mine, "--retry", "all", "--json"))
    assert again["counts"]["rows_rejected"] == 1
    listed = mine.parent / "out.txt"
    listed.write_text("p1\n")
    less = json.loads(shard(vc2, mine, "--remove", str(listed), "--json"))
    assert (less["counts"]["samples"], less["counts"]["rows"]) == (5, 7)


@pytest.mark.parametrize(
    ("place", "options", "kind"),
    [
        ("tars/x.tar", {"media": "image"}, "webdataset"),
        ("tars", {"media": "image"}, "webdataset"),
        ("s3://bucket/{000..127}.tar", {"media": "video"}, "webdataset"),
        ("rows.parquet", {"media": "image"}, "folder"),
        ("tars", {"kind": "laion-aesthetics"}, "laion-aesthetics"),
        ("parts", {"kind": "laion-coco"}, "laion-coco"),
        ("tars", {"kind": "journeydb", "table": "rows.jsonl"}, "journeydb"),
        ("rows.csv", {"kind": "webvid"}, "webvid"),
        ("parts", {"media": "video"}, "folder"),
    ],
)
def test_a_place_tells_what_it_is(place: str, options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    """A folder, a table, tars; or what --as says."""
    for name in ("tars/x.tar", "parts/p.parquet", "rows.parquet", "rows.csv", "rows.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    where = place if "://" in place else str(tmp_path / place)
    settings: dict[str, Any] = {"kind": None, "media": None, "table": None, "name": None} | options
    assert own_source(where, **settings).kind == kind


def test_a_place_that_tells_nothing_is_refused(tmp_path: Path) -> None:
    """What is missing is asked for."""
    nothing: dict[str, Any] = {"kind": None, "media": None, "table": None, "name": None}
    with pytest.raises(ConfigError, match="needs --media"):
        own_source(str(tmp_path), **nothing)
    with pytest.raises(ConfigError, match="no such folder or file"):
        own_source(str(tmp_path / "x"), **nothing)
    with pytest.raises(ConfigError, match="--name 'Bad Name'"):
        own_source(str(tmp_path), **(nothing | {"media": "video", "name": "Bad Name"}))
    with pytest.raises(ConfigError, match="journeydb needs --table"):
        own_source(str(tmp_path), **(nothing | {"kind": "journeydb"}))
    assert [name_of(place) for place in ("s3://b/Raw Data/{0..9}.tar", "/x/clips.v2/", "/")] == [
        "raw-data",
        "clips",
        "own",
    ]
