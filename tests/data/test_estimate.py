"""The dry run: exact where everything was looked at, honest where not, and nothing left behind."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from vc2.data.config import Filters, FolderSource, JourneyDBSource, SampleForm, ShardStage, Source, TarSource
from vc2.data.estimate import Estimate, estimate
from vc2.errors import ConfigError, SourceError

FORM = SampleForm(num_frames=1, width=32, height=32)


def looked(source: Source, work: Path, *, sample: int | None = None, **settings: Any) -> Estimate:
    """A dry run of images, after which nothing is left."""
    stage = ShardStage(source=source, form=FORM, samples_per_shard=4, **settings)
    before = sorted(work.rglob("*"))
    found = estimate(stage, work, sample=sample)
    assert sorted(work.rglob("*")) == before
    return found


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path: Path, media: Any) -> FolderSource:
    """Seven rows: five pictures, one of them twice, and a page that is none."""
    place = tmp_path / "in"
    place.mkdir()
    for number, seed in enumerate([0, 1, 2, 3, 4, 4]):
        (place / f"{number}.jpg").write_bytes(media.jpeg(seed))
        (place / f"{number}.txt").write_text(f"picture {number}")
    (place / "page.jpg").write_bytes(b"<html>" * 20)
    (place / "page.txt").write_text("a page")
    return FolderSource(name="mine", media="image", folder=str(place))


def test_a_small_folder_is_told_exactly(folder: FolderSource, tmp_path: Path) -> None:
    """Every row has its fate; bytes are those of the files."""
    found = looked(folder, tmp_path, sample=100)
    assert (found.rows, found.rows_are_exact, found.sampled) == (7, True, 7)
    assert (found.reasons, found.duplicates, found.reject_share) == ({"not_media": 1}, 1, round(1 / 7, 4))
    assert (found.built, found.samples, found.shards) == (5, 5, 2)
    files = sum(path.stat().st_size for path in (tmp_path / "in").glob("*.jpg") if path.stem != "page")
    assert found.raw_bytes is not None and abs(found.raw_bytes - files) <= 120
    assert found.shard_bytes is not None and found.shard_bytes > 5 * 500
    text = "\n".join(found.lines())
    assert "7 rows, built 5 samples" in text and "14 % of these rows: not_media 1" in text and "2 shards" in text


def test_rejects_of_filters_and_a_limit_count(folder: FolderSource, tmp_path: Path) -> None:
    """Filters reject as in earnest; of a limited source no more rows are counted than that."""
    found = looked(folder, tmp_path, sample=100, filters=Filters(min_side=1000))
    assert (found.samples, found.reject_share) == (0, 1.0)
    assert found.reasons == {"too_small": 6, "not_media": 1}
    assert looked(folder, tmp_path, limit=3).rows == 3
    assert looked(folder, tmp_path, sample=2).sampled == 2


def test_a_sample_of_nothing_and_a_source_of_nothing_are_refused(folder: FolderSource, tmp_path: Path) -> None:
    """Zero rows tell nothing."""
    with pytest.raises(ConfigError, match="sample of 0 rows"):
        looked(folder, tmp_path, sample=0)
    tar_of(tmp_path / "none.tar", {})
    with pytest.raises(SourceError, match="no rows"):
        looked(TarSource(name="none", media="image", archives=str(tmp_path / "none.tar")), tmp_path)
    table = tmp_path / "none.csv"
    table.write_text("file,caption\n")
    with pytest.raises(SourceError, match="no rows"):
        looked(FolderSource(name="none", media="image", folder=str(tmp_path), table=str(table)), tmp_path)


def test_tars_are_looked_at_from_their_start(tmp_path: Path, media: Any) -> None:
    """An empty one is passed over; the number of rows is known only where all were read."""
    place = tmp_path / "tars"
    place.mkdir()
    tar_of(place / "a.tar", {})
    rows = {f"{n}.{end}": data for n in range(6) for end, data in (("jpg", media.jpeg(n)), ("txt", b"a picture"))}
    tar_of(place / "b.tar", rows | {"6.jpg": b"<html>" * 20, "6.txt": b"a page"})
    source = TarSource(name="tars", media="image", archives=str(place))
    found = looked(source, tmp_path, sample=3)
    assert (found.sampled, found.built, found.rows, found.samples) == (3, 3, None, None)
    assert "not known" in "\n".join(found.lines())
    found = looked(source, tmp_path, sample=50)
    assert (found.rows, found.rows_are_exact, found.samples, found.reasons) == (7, True, 6, {"not_media": 1})
    assert looked(source, tmp_path, limit=2).rows == 2


def test_journeydb_is_joined_before_it_is_judged(tmp_path: Path, media: Any) -> None:
    """Media that no row names are no rows; a limit changes how many rows there are, not what they are like."""
    ids = [f"{number:08d}-0000-4000-8000-000000000000" for number in range(12)]
    lines = [json.dumps({"img_path": f"./000/{name}.jpg", "prompt": f"picture {name} --ar 1:1"}) for name in ids]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[2:]))
    place = tmp_path / "archives"
    place.mkdir()
    tar_of(place / "000.tgz", {f"000/{name}.jpg": media.jpeg(n) for n, name in enumerate(ids[:6])})
    source = JourneyDBSource(name="jdb", table=str(tmp_path / "rows.jsonl"), archives=str(place))
    found = looked(source, tmp_path, sample=16)
    assert (found.rows, found.sampled, found.built, found.samples) == (10, 4, 4, 10)
    assert (found.reasons, found.reject_share) == ({"unmatched_media": 2}, 0.0)
    found = looked(source, tmp_path, sample=16, limit=2)
    assert (found.rows, found.samples, found.reject_share) == (2, 2, 0.0)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[6:]))
    with pytest.raises(SourceError, match="name none of the 6 media"):
        looked(source, tmp_path)
