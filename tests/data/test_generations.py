"""A set becomes the next one: grown, retried, with samples removed; nothing that was built is built again."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from vc2.artifacts import Manifest, ShardSet, load_manifest, verify
from vc2.data.config import FolderSource, JourneyDBSource, ShardStage, TarSource
from vc2.errors import ConfigError, YieldTooLow
from vc2.pipeline.shard import ShardRequest, make_shards
from vc2.storage import LocalStore

pytestmark = pytest.mark.usefixtures("ray_address")

TIMES = ("missing_file",)


class Workshop:
    """A folder of pictures with a table of captions, and the sets made of it."""

    def __init__(self, root: Path, media: Any) -> None:
        self.root, self.media = root, media
        self.folder = root / "mine"
        self.folder.mkdir(parents=True)
        self.store = LocalStore(root / "store")
        self.notes: list[str] = []

    def write(self, captions: dict[str, str]) -> None:
        lines = [json.dumps({"file": name, "caption": caption}) for name, caption in captions.items()]
        (self.folder / "table.jsonl").write_text("\n".join(lines) + "\n")

    def paint(self, name: str, seed: int) -> None:
        (self.folder / name).write_bytes(self.media.jpeg(seed))

    def source(self) -> FolderSource:
        return FolderSource(
            name="mine", media="image", folder=str(self.folder), table=str(self.folder / "table.jsonl"), min_yield=0.1
        )

    def stage(self, source: Any = None, **settings: Any) -> ShardStage:
        form = {"num_frames": 1, "width": 32, "height": 32}
        return ShardStage.model_validate(
            {"source": source or self.source(), "form": form, "samples_per_shard": 4} | settings
        )

    def make(self, stage: ShardStage | None = None, **request: Any) -> tuple[ShardSet, Manifest]:
        stage = stage or self.stage()
        made = make_shards(
            "shard/mine", stage, self.store, self.root / "work", ShardRequest(**request), note=self.notes.append
        )
        assert made is not None
        manifest = load_manifest(self.store, made.prefix)
        counts = manifest.counts
        assert counts["rows"] == counts["rows_with_samples"] + counts["rows_rejected"] + counts["rows_duplicate"]
        assert list(verify(self.store, made.prefix)) == []
        tars = [entry.name for entry in manifest.files if entry.name.endswith(".tar")]
        assert tars == [f"shard-{number:06d}.tar" for number in range(len(tars))]
        return made, manifest

    def rows(self, manifest: Manifest, name: str) -> list[dict[str, Any]]:
        return pq.read_table(io.BytesIO(self.store.read(manifest.file(f"{name}.parquet").key))).to_pylist()

    def keys_in_tars(self, manifest: Manifest) -> list[str]:
        found: list[str] = []
        for entry in manifest.files:
            if entry.name.endswith(".tar"):
                with tarfile.open(fileobj=io.BytesIO(self.store.read(entry.key))) as tar:
                    found += [name.removesuffix(".json") for name in tar.getnames() if name.endswith(".json")]
        return found


@pytest.fixture
def workshop(tmp_path: Path, media: Any) -> Workshop:
    """Ten rows: eight pictures, one that is missing, one whose caption is too short."""
    workshop = Workshop(tmp_path, media)
    for number in range(8):
        workshop.paint(f"p{number}.jpg", number)
    workshop.write({f"p{n}.jpg": f"picture {n}" for n in range(8)} | {"late.jpg": "a late one", "x.jpg": "x"})
    workshop.paint("x.jpg", 99)
    return workshop


def tars_of(manifest: Manifest) -> list[str]:
    return [entry.sha256 for entry in manifest.files if entry.name.endswith(".tar")]


def test_a_grown_source_adds_a_generation_and_rewrites_nothing(workshop: Workshop) -> None:
    """Old tars stay by digest, new rows alone are built, a copy of an old picture is a duplicate."""
    first, before = workshop.make()
    workshop.paint("p8.jpg", 8)
    workshop.paint("p9.jpg", 3)
    rows = {"p9.jpg": "a copy of picture 3", "p8.jpg": "picture 8"}
    workshop.write(rows | {f"p{n}.jpg": f"picture {n}" for n in range(8)} | {"late.jpg": "a late one", "x.jpg": "x"})
    grown, after = workshop.make()
    assert "the source has grown" in workshop.notes[-1]
    assert tars_of(after)[:2] == tars_of(before) and len(tars_of(after)) == 3
    assert after.inputs["parent"].fingerprint == first.fingerprint
    assert [(row["key"], row["generation"]) for row in workshop.rows(after, "index")][8:] == [("p8", 1)]
    (copy,) = [row for row in workshop.rows(after, "rejects") if row["what"] == "duplicate"]
    assert (copy["key"], copy["duplicate_of"]) == ("p9", "p3")
    assert after.counts["rows"] == 12 and after.facts["reasons"] == {"caption_too_short": 1, "missing_file": 1}
    assert workshop.make()[0] == grown
    assert workshop.make(fresh=True)[1].facts["generations"][0]["samples"] == 9


def test_a_source_that_changed_is_made_from_scratch(workshop: Workshop) -> None:
    """Another caption or a lost row is no growth; it is said."""
    workshop.make()
    workshop.write({f"p{n}.jpg": f"photograph {n}" for n in range(7)})
    _, manifest = workshop.make()
    assert "from scratch" in workshop.notes[-1] and "3 are gone and 7 have another caption" in workshop.notes[-1]
    assert len(manifest.facts["generations"]) == 1 and manifest.counts["rows"] == 7


def test_rejects_are_tried_again_by_reason(workshop: Workshop) -> None:
    """What now succeeds is added, what fails again stays a reject, the rest is carried; nothing can be retried that
    was not rejected, or that trying again cannot change."""
    _, before = workshop.make()
    with pytest.raises(ConfigError, match=r"nothing was rejected for timeout; the rejects are: .*missing_file 1"):
        workshop.make(retry=("timeout",))
    with pytest.raises(ConfigError, match="no reason 'flood'"):
        workshop.make(retry=("flood",))
    again, still = workshop.make(retry=TIMES)
    assert still.counts["samples"] == 8 and tars_of(still) == tars_of(before)
    workshop.paint("late.jpg", 50)
    assert workshop.make(retry=TIMES)[1].counts["samples"] == 9
    assert load_manifest(workshop.store, again.prefix) == still
    assert workshop.make()[1].counts["samples"] == 9
    assert workshop.make(fresh=True)[1] == before


def test_a_removal_list_makes_a_set_without_those_samples(workshop: Workshop) -> None:
    """Named by key, path or digest of the source: gone from index and tars; tars that held none of them stay."""
    _, before = workshop.make()
    index = workshop.rows(before, "index")
    out = [index[0]["key"], index[1]["locator"], index[2]["sha256"]]
    listed = workshop.root / "out.txt"
    listed.write_text("\n".join([*out, "never-heard-of"]) + "\n")
    _, after = workshop.make(remove=str(listed))
    gone = {row["key"] for row in index[:3]}
    assert {row["key"] for row in workshop.rows(after, "index")} == {row["key"] for row in index} - gone
    assert set(workshop.keys_in_tars(after)) == {row["key"] for row in index} - gone
    assert tars_of(after)[1:] == tars_of(before)[1:] and tars_of(after)[0] != tars_of(before)[0]
    assert after.facts["reasons"]["removed"] == 3 and after.counts["rows"] == before.counts["rows"]
    for row in workshop.rows(after, "index"):
        key = after.file(f"shard-{row['shard']:06d}.tar").key
        old = next(line for line in index if line["key"] == row["key"])
        assert row["media_sha256"] == old["media_sha256"]
        assert len(workshop.store.read_range(key, row["offset"], row["length"])) == old["length"]
    workshop.paint("p8.jpg", 8)
    workshop.write({f"p{n}.jpg": f"picture {n}" for n in range(9)} | {"late.jpg": "a late one", "x.jpg": "x"})
    _, grown = workshop.make()
    assert {row["key"] for row in workshop.rows(grown, "index")} == {row["key"] for row in index} - gone | {"p8"}


def test_shards_built_apart_are_the_set_built_at_once(workshop: Workshop, tmp_path: Path, media: Any) -> None:
    """--shards on several machines: whoever finds all built commits, and the bytes are the same."""
    whole = workshop.make()[1]
    other = LocalStore(tmp_path / "other")
    parts = [
        make_shards("shard/mine", workshop.stage(), other, tmp_path / "work", ShardRequest(only=only))
        for only in ((1, 9), (0, 0))
    ]
    assert parts[0] is None and parts[1] is not None
    assert load_manifest(other, parts[1].prefix).content_digest == whole.content_digest


def test_a_limit_takes_the_first_rows(workshop: Workshop) -> None:
    """Only they are counted."""
    _, manifest = workshop.make(workshop.stage(limit=3))
    assert manifest.counts["rows"] == 3 and {row["row"] for row in workshop.rows(manifest, "index")} == {0, 1, 2}


def tar_of(path: Path, members: dict[str, bytes], mode: Any = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_new_tars_are_new_rows(workshop: Workshop, tmp_path: Path, media: Any) -> None:
    """Of tars made by others only those not seen before are read."""
    tars = tmp_path / "tars"
    tars.mkdir()

    def add(number: int) -> None:
        members = {}
        for item in range(3):
            members |= {f"{item}.jpg": media.jpeg(10 * number + item), f"{item}.txt": b"a caption of a picture"}
        tar_of(tars / f"{number:05d}.tar", members)

    add(0)
    source = TarSource(name="mine", media="image", archives=str(tars))
    _, before = workshop.make(workshop.stage(source))
    assert (before.counts["rows"], before.counts["samples"]) == (3, 3)
    add(1)
    _, after = workshop.make(workshop.stage(source))
    assert "the source has grown" in workshop.notes[-1]
    assert (after.counts["rows"], after.counts["samples"]) == (6, 6) and tars_of(after)[:1] == tars_of(before)
    assert Counter(row["generation"] for row in workshop.rows(after, "index")) == {0: 3, 1: 3}
    assert {row["row"] for row in workshop.rows(after, "index")} == set(range(6))


def test_a_row_finds_its_picture_in_a_later_archive(workshop: Workshop, tmp_path: Path, media: Any) -> None:
    """JourneyDB: rows without a picture and pictures without a row are looked at again when either side grows."""
    root = tmp_path / "jdb"
    root.mkdir()
    names = [f"{number:08x}-0000-4000-8000-000000000000" for number in range(5)]
    lines = [json.dumps({"img_path": f"./000/{name}.jpg", "prompt": f"a prompt {name[:8]} --v 5"}) for name in names]
    (root / "anno.jsonl").write_text("\n".join(lines[:3]) + "\n")
    tar_of(root / "000.tgz", {f"000/{names[n]}.jpg": media.jpeg(n) for n in (0, 1, 3)}, "w:gz")
    source = JourneyDBSource(name="mine", table=str(root / "anno.jsonl"), archives=str(root), min_yield=0.1)
    _, before = workshop.make(workshop.stage(source))
    assert before.facts["reasons"] == {"unmatched_row": 1} and before.counts["media_unmatched"] == 1
    (root / "anno.jsonl").write_text("\n".join(lines) + "\n")
    tar_of(root / "001.tgz", {f"001/{names[n]}.jpg": media.jpeg(n) for n in (2, 4)}, "w:gz")
    _, after = workshop.make(workshop.stage(source))
    assert (after.counts["rows"], after.counts["samples"], after.counts["media_unmatched"]) == (5, 5, 0)
    assert tars_of(after)[:1] == tars_of(before) and after.facts["reasons"] == {}


def test_what_was_removed_stays_away(workshop: Workshop) -> None:
    """The same bytes under another name, a reject on the list that now works, rows that came before the removal: what
    is on the list is rejected, what is not comes in; and the newest set is the one that is found."""
    workshop.make()
    workshop.paint("p8.jpg", 8)
    rows = {f"p{n}.jpg": f"picture {n}" for n in range(9)} | {"late.jpg": "a late one", "x.jpg": "x"}
    workshop.write(rows)
    listed = workshop.root / "out.txt"
    listed.write_text(f"{hashlib.sha256((workshop.folder / 'p3.jpg').read_bytes()).hexdigest()}\nlate.jpg\n")
    workshop.make(remove=str(listed))
    _, grown = workshop.make()
    assert {row["key"] for row in workshop.rows(grown, "index")} == {f"p{n}" for n in range(9)} - {"p3"}
    workshop.paint("late.jpg", 50)
    _, again = workshop.make(retry=TIMES)
    assert again.facts["reasons"] == {"caption_too_short": 1, "removed": 2}
    (workshop.folder / "copy.jpg").write_bytes((workshop.folder / "p3.jpg").read_bytes())
    workshop.write(rows | {"copy.jpg": "another name"})
    _, last = workshop.make()
    assert last.facts["reasons"]["removed"] == 3 and last.counts["samples"] == 8
    assert workshop.make()[1] == last
    _, anew = workshop.make(fresh=True)
    assert anew.facts["reasons"]["removed"] == 3 and len(anew.facts["generations"]) == 1
    with pytest.raises(ConfigError, match="none of the 1 lines"):
        (workshop.root / "none.txt").write_text("never-heard-of")
        workshop.make(remove=str(workshop.root / "none.txt"))


def test_a_retry_of_tars_keeps_rows_and_numbers(workshop: Workshop, tmp_path: Path, media: Any) -> None:
    """Also under a limit: rows that are tried again keep their numbers, none is lost; a replaced tar is no growth."""
    tars = tmp_path / "tars"
    tars.mkdir()
    members: dict[str, bytes] = {}
    for item in range(6):
        members |= {f"{item}.jpg": media.jpeg(item), f"{item}.txt": b"a caption of a picture"}
    members["2.jpg"] = members["2.jpg"][:-30]
    tar_of(tars / "a.tar", members)
    source = TarSource(name="mine", media="image", archives=str(tars))
    _, before = workshop.make(workshop.stage(source, limit=5))
    (reason,) = before.facts["reasons"]
    _, after = workshop.make(workshop.stage(source, limit=5), retry=(reason,))
    assert (after.counts["rows"], after.facts["reasons"]) == (5, before.facts["reasons"])
    assert [row["row"] for row in workshop.rows(after, "rejects")] == [2]
    tar_of(tars / "a.tar", members | {"more.txt": b"." * 30_000})
    _, other = workshop.make(workshop.stage(source, limit=5))
    assert "from scratch" in workshop.notes[-1] and len(other.facts["generations"]) == 1


def test_a_mended_path_starts_anew(workshop: Workshop) -> None:
    """What a wrong path brought is forgotten with it."""
    wrong = workshop.source().evolve(folder=str(workshop.root), min_yield=0.5)
    with pytest.raises(YieldTooLow, match="missing_file"):
        workshop.make(workshop.stage(wrong))
    assert workshop.make(workshop.stage(workshop.source().evolve(min_yield=0.5)))[1].counts["samples"] == 8
