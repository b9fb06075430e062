import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vc2.data.config import FolderSource, JourneyDBSource, LaionCocoSource, WebVidSource
from vc2.data.rejects import RejectReason
from vc2.data.sources import read_records, split_prompt
from vc2.errors import SourceError

UUID = "0a1b2c3d-0000-4000-8000-00000000000{}"


def test_webvid_is_read_as_csv_with_every_column_as_text(tmp_path: Path) -> None:
    """Quoted commas stay in captions, leading zeros in keys; each bad line is one record with its reason."""
    table = tmp_path / "results.csv"
    table.write_text(
        "videoid,name,page_idx,page_dir,duration,contentUrl\n"
        '0012,"A dog, running; isn\'t it",1,000001_000050,PT00H00M17S,http://h/a.mp4\n'
        "13,too few\n"
        "0012,the same key,1,000001_000050,PT00H00M17S,http://h/b.mp4\n"
        "14,,1,000001_000050,PT00H00M17S,http://h/c.mp4\n"
        "15,no folder,1,,PT00H00M17S,http://h/d.mp4\n"
    )
    good, *bad = read_records(WebVidSource(table=str(table), videos=str(tmp_path)))
    assert (good.key, good.caption) == ("000001_000050/0012", "A dog, running; isn't it")
    assert good.locator == "000001_000050/0012.mp4"
    assert [record.reason for record in bad] == [
        RejectReason.UNPARSABLE,
        RejectReason.DUPLICATE_KEY,
        RejectReason.NO_CAPTION,
        RejectReason.UNPARSABLE,
    ]
    assert [record.row for record in [good, *bad]] == list(range(5))
    assert next(iter(read_records(WebVidSource(table=str(table))))).locator == "http://h/a.mp4"


def test_laion_columns_are_found_by_name_in_any_release(tmp_path: Path) -> None:
    """The synthetic caption comes first, the original is the fall-back; case and missing columns do not matter."""
    old = {
        "URL": ["http://h/1", "http://h/2", None],
        "TEXT": ["alt", "alt two", "x"],
        "top_caption": ["a cat", "", "y"],
    }
    new = {"url": ["http://h/3", "http://h/1"], "caption": ["a bird", "again"], "AESTHETIC_SCORE": [6.5, 1.0]}
    for name, columns in (("part-0.parquet", old), ("part-1.parquet", new)):
        pq.write_table(pa.table(columns), tmp_path / name)
    records = list(read_records(LaionCocoSource(table=str(tmp_path))))
    assert [record.caption for record in records[:2]] == ["a cat", "alt two"]
    assert records[2].reason is RejectReason.UNPARSABLE
    assert (records[3].caption, records[3].extra["aesthetic"]) == ("a bird", 6.5)
    assert records[4].reason is RejectReason.DUPLICATE_KEY
    assert all("." not in record.key and "/" not in record.key for record in records)


@pytest.mark.parametrize("packed", [False, True])
def test_journeydb_joins_by_the_uuid_at_the_end_of_the_path(tmp_path: Path, packed: bool) -> None:
    """Both spellings of img_path give the UUID; flags and image URLs leave the prompt and are kept."""
    lines = [
        {"img_path": f"./000/{UUID.format(1)}.jpg", "prompt": "a fox --ar 3:2 --v 4", "Task2": {"Caption": "A fox."}},
        {
            "img_path": f"MidjourneyDB/./imgs/Upscaled_x_a_{UUID.format(2).upper()}.jpg",
            "prompt": "https://s/i.png an owl",
        },
        {"img_path": "no-id.jpg", "prompt": "x"},
    ]
    text = "\n".join([*map(json.dumps, lines), "{broken"]).encode()
    table = tmp_path / ("train_anno.jsonl.tgz" if packed else "train_anno.jsonl")
    if packed:
        with tarfile.open(table, "w:gz") as tar:
            member = tarfile.TarInfo("train_anno.jsonl")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    else:
        table.write_bytes(text)
    records = list(read_records(JourneyDBSource(table=str(table), archives=str(tmp_path))))
    assert [record.key for record in records[:2]] == [UUID.format(1), UUID.format(2)]
    assert [record.caption for record in records[:2]] == ["a fox", "an owl"]
    assert records[0].extra["flags"] == {"ar": "3:2", "v": "4"}
    assert [record.reason for record in records[2:]] == [RejectReason.UNPARSABLE] * 2
    written = read_records(JourneyDBSource(table=str(table), archives=str(tmp_path), caption="caption"))
    assert [record.caption for record in written][:2] == ["A fox.", "an owl"]


def test_flags_are_cut_wherever_they_begin() -> None:
    """A dash inside a word is no flag; a flag without a value is set."""
    assert split_prompt("a well-lit room --tile --no people, cars") == (
        "a well-lit room",
        {"flags": {"tile": True, "no": "people, cars"}},
    )
    assert split_prompt("--v 5")[0] == ""


def test_own_files_come_with_captions_beside_them(tmp_path: Path) -> None:
    """A folder is read in order of its paths; captions are .txt or .json; hidden files are no rows; keys are safe."""
    (tmp_path / "b dir").mkdir()
    for name in ("z.jpg", "b dir/ä.b.png", ".hidden.jpg", "a.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a lake\n")
    (tmp_path / "z.json").write_text('{"caption": "a hill", "score": 3}')
    records = list(read_records(FolderSource(name="mine", media="image", folder=str(tmp_path))))
    assert [record.locator for record in records] == ["a.jpg", "b dir/ä.b.png", "z.jpg"]
    assert [record.caption for record in records] == ["a lake", "", "a hill"]
    assert records[1].reason is RejectReason.NO_CAPTION
    assert records[2].extra == {"score": 3}
    assert all("." not in record.key and " " not in record.key for record in records)


def test_own_tables_name_files_or_urls(tmp_path: Path) -> None:
    """CSV and JSON lines mean the same; a path that leaves the folder is refused."""
    (tmp_path / "t.csv").write_text("file,caption,mood\nv/a.mp4,a dog,calm\n../b.mp4,out,\nhttp://h/c.mp4,far,\n")
    (tmp_path / "t.jsonl").write_text(
        '{"file": "v/a.mp4", "caption": "a dog", "mood": "calm"}\n'
        '{"file": "../b.mp4", "caption": "out"}\n{"file": "http://h/c.mp4", "caption": "far"}\n'
    )
    read = [
        list(read_records(FolderSource(name="mine", media="video", folder=str(tmp_path), table=str(tmp_path / name))))
        for name in ("t.csv", "t.jsonl")
    ]
    assert read[0] == read[1]
    assert [record.reason for record in read[0]] == [None, RejectReason.UNPARSABLE, None]
    assert read[0][0].extra == {"mood": "calm"}


def test_a_table_of_another_format_fails_as_a_whole(tmp_path: Path) -> None:
    """Wrong columns are no bad row but a wrong source, and the error names what was found."""
    (tmp_path / "t.csv").write_text("id,text\n1,a\n")
    with pytest.raises(SourceError, match=r"videoid.*id,text"):
        list(read_records(WebVidSource(table=str(tmp_path / "t.csv"), videos=str(tmp_path))))
    (tmp_path / "p.parquet").write_bytes(b"not parquet")
    with pytest.raises(SourceError, match="not a readable Parquet"):
        list(read_records(LaionCocoSource(table=str(tmp_path / "p.parquet"))))
