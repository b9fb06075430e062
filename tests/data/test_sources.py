import gzip
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vc2.data.config import FolderSource, JourneyDBSource, LaionSource, TarSource, WebVidSource, source_digest
from vc2.data.fetch import raw_bytes
from vc2.data.media import MediaError
from vc2.data.rejects import RejectReason
from vc2.data.sources import Seen, language_of, parse_duration, read_records, split_prompt, tar_record
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
    assert good.extra == {"duration": 17.0, "raw_duration": "PT00H00M17S", "page_idx": "1", "url": "http://h/a.mp4"}
    assert next(iter(read_records(WebVidSource(table=str(table))))).locator == "http://h/a.mp4"
    web = next(iter(read_records(WebVidSource(table=str(table), videos="https://mirror/webvid/"))))
    assert web.locator == "https://mirror/webvid/000001_000050/0012.mp4"


def test_webvid_columns_come_in_any_order_and_repeats_are_counted(tmp_path: Path) -> None:
    """A URL that an earlier row has is a duplicate; a videoid is one only together with its page_dir."""
    table = tmp_path / "t.csv.gz"
    lines = ["contentUrl,name,extra,page_dir,videoid", "http://h/a.mp4,a,x,1_50,7", "http://h/b.mp4,b,x,51_100,7",
             "http://h/a.mp4,c,x,1_50,8", "http://h/d.mp4,d,x,../..,9", "/etc/hostname,e,x,1_50,10"]  # fmt: skip
    table.write_bytes(gzip.compress("\n".join(lines).encode("utf-8-sig")))
    records = list(read_records(WebVidSource(table=str(table))))
    reasons = [None, None, RejectReason.DUPLICATE_KEY, RejectReason.UNPARSABLE, RejectReason.UNPARSABLE]
    assert [record.reason for record in records] == reasons
    assert [record.extra.get("repeated_videoid") for record in records][:2] == [None, True]
    assert records[2].detail == "an earlier row has the same URL"


def test_a_quote_that_is_never_closed_costs_a_row_not_the_memory(tmp_path: Path) -> None:
    """The field ends at its limit, and so does the row; what follows is read again."""
    table = tmp_path / "t.csv"
    body = "".join(f"{number},caption,1_50\n" for number in range(100_000))
    table.write_text(f'videoid,name,page_dir\na,"open,1_50\n{body}')
    reasons = Counter(record.reason for record in read_records(WebVidSource(table=str(table), videos=str(tmp_path))))
    assert reasons == {RejectReason.UNPARSABLE: 1, None: 100_000}


def test_a_cut_table_fails_as_a_whole(tmp_path: Path) -> None:
    """A packed table that ends early is not half a source."""
    rows = "\n".join(f"{number},x,1_50" for number in range(10_000))
    data = gzip.compress(f"videoid,name,page_dir\n{rows}".encode())
    (tmp_path / "t.csv.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match="not a readable table"):
        list(read_records(WebVidSource(table=str(tmp_path / "t.csv.gz"), videos=str(tmp_path))))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("PT00H00M17S", 17.0), ("PT00H01M00S", 60.0), ("PT1H2M3.5S", 3723.5), ("P1DT1S", 86401.0), ("12.5", 12.5)],
)
def test_durations_are_seconds(text: str, seconds: float) -> None:
    """As WebVid writes them, as the standard does, or as plain numbers."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "PT", "P", "soon", "nan"])
def test_what_is_no_duration_is_none(text: str) -> None:
    """Not zero."""
    assert parse_duration(text) is None


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
    records = list(read_records(LaionSource(table=str(tmp_path))))
    assert [record.caption for record in records[:2]] == ["a cat", "alt two"]
    assert records[2].reason is RejectReason.UNPARSABLE
    assert (records[3].caption, records[3].extra["aesthetic"]) == ("a bird", 6.5)
    assert records[4].reason is RejectReason.DUPLICATE_KEY
    assert all("." not in record.key and "/" not in record.key for record in records)


def test_scores_have_one_name_whatever_the_release(tmp_path: Path) -> None:
    """LAION-COCO and LAION-Aesthetics say the same in other words; empty scores and NaN are left out."""
    coco = {"URL": ["http://h/1", "http://h/2"], "TEXT": ["alt", "alt"], "top_caption": ["a cat", None],
            "all_captions": [["a", "b"], []], "similarity": [0.3, float("nan")], "pwatermark": [0.1, None],
            "punsafe": [1e-5, 0.2], "WIDTH": [640, None], "HEIGHT": [480, 1], "LICENSE": ["?", "cc"],
            "hash": [-5, 6], "SAMPLE_ID": [11, 12]}  # fmt: skip
    aesthetics = {"url": ["http://h/3"], "caption": ["old"], "TEXT": ["new"], "AESTHETIC_SCORE": [6.5],
                  "NSFW": ["UNLIKELY"], "sha256": ["AB" * 32]}  # fmt: skip
    pq.write_table(pa.table(coco), tmp_path / "0.parquet")
    pq.write_table(pa.table(aesthetics), tmp_path / "1.parquet")
    one, two, three = read_records(LaionSource(kind="laion-aesthetics", table=str(tmp_path)))
    assert one.extra == {"similarity": 0.3, "pwatermark": 0.1, "punsafe": 1e-5, "width": 640, "height": 480,
                         "license": "?", "hash": -5, "sample_id": 11, "caption_from": "top_caption"}  # fmt: skip
    assert one.captions == {"top_caption": "a cat", "text": "alt"}
    assert (two.caption, two.extra["caption_from"]) == ("alt", "text")
    assert not {"similarity", "pwatermark", "width"} & set(two.extra)
    assert three.caption == "new"
    assert three.extra["aesthetic"] == 6.5 and three.extra["sha256"] == "ab" * 32


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
    assert records[2].extra == {"score": 3, "caption_from": "text"}
    assert all("." not in record.key and " " not in record.key for record in records)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "jsonl.gz", "parquet"])
def test_own_tables_name_files_or_urls(tmp_path: Path, ending: str) -> None:
    """All formats mean the same, with any names of columns; a path that leaves the folder is refused."""
    rows = [("v/a.mp4", "a dog", "calm"), ("../b.mp4", "out", ""), ("http://h/c.mp4", "far", ""),
            ("v/a.webm", "another", ""), ("", "none", ""), ("v/d.mp4", "", "")]  # fmt: skip
    names = ("path", "words", "mood")
    lines = [dict(zip(names, row, strict=True)) for row in rows]
    table = tmp_path / f"t.{ending}"
    text = "\n".join(map(json.dumps, lines)).encode()
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(lines), table)
    elif ending.startswith("jsonl"):
        table.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    else:
        delimiter = "," if ending == "csv" else "\t"
        table.write_text("\n".join(delimiter.join(row) for row in [names, *rows]))
    columns = {"file_column": "path", "caption_column": "words"}
    source = FolderSource(name="mine", media="video", folder=str(tmp_path), table=str(table), **columns)
    records = list(read_records(source))
    assert [record.reason for record in records] == [
        None, RejectReason.UNPARSABLE, None, None, RejectReason.UNPARSABLE, RejectReason.NO_CAPTION
    ]  # fmt: skip
    assert records[0].key == "v/a" and records[0].extra == {"mood": "calm"}
    assert records[0].captions == {"words": "a dog"}
    assert records[3].key != records[0].key, "another file, though it has the same name up to the ending"
    assert len({record.key for record in records if record.key}) == 4


def test_a_poster_beside_a_video_takes_nothing_from_it(tmp_path: Path) -> None:
    """Files that differ in their endings alone are rows of their own."""
    for name in ("a.jpg", "a.mp4", "a.txt"):
        (tmp_path / name).write_text("a dog")
    records = list(read_records(FolderSource(name="mine", media="video", folder=str(tmp_path))))
    assert [record.reason for record in records] == [None, None]
    assert records[1].key == "a"


def test_a_file_whose_name_is_no_text_is_a_row(tmp_path: Path) -> None:
    """Names are bytes to a disk; a table needs text."""
    (tmp_path / "a.jpg").write_bytes(b"1")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"2")
    source = FolderSource(name="mine", media="image", folder=str(tmp_path))
    records = list(read_records(source))
    assert [record.reason for record in records] == [RejectReason.NO_CAPTION, RejectReason.UNPARSABLE]
    assert records[1].locator == "caf\\udce9.jpg"
    assert len(source_digest(source)) == 64


def test_half_a_character_does_not_stop_a_run(tmp_path: Path) -> None:
    """JSON can spell what no UTF-8 file can hold; it is replaced."""
    (tmp_path / "t.jsonl").write_text('{"file": "a.mp4", "caption": "a \\ud83d dog \\ud83d\\ude00", "mood": "\\udc00"}')
    (record,) = read_records(
        FolderSource(name="mine", media="video", folder=str(tmp_path), table=str(tmp_path / "t.jsonl"))
    )
    assert record.caption == "a ? dog \N{GRINNING FACE}"
    record.extra["mood"].encode()


def test_the_language_of_a_caption_is_told() -> None:
    """Well enough for whole sentences."""
    assert language_of("a woman walks along the beach with her dog at sunset") == "en"
    assert language_of("eine Frau geht bei Sonnenuntergang mit ihrem Hund am Strand entlang") == "de"
    assert language_of("\u4e00\u4f4d\u5973\u58eb\u5728\u6d77\u6ee9\u4e0a\u904d\u72d7") == "zh"


def test_a_set_of_digests_tells_texts_apart() -> None:
    """Added once is new, added twice is not."""
    seen = Seen()
    texts = [f"text {number}" for number in range(20_000)]
    assert all(seen.add(text) for text in texts)
    assert not any(seen.add(text) for text in texts)


def test_a_table_of_another_format_fails_as_a_whole(tmp_path: Path) -> None:
    """Wrong columns are no bad row but a wrong source, and the error names what was found."""
    (tmp_path / "t.csv").write_text("id,text\n1,a\n")
    with pytest.raises(SourceError, match=r"videoid.*id,text"):
        list(read_records(WebVidSource(table=str(tmp_path / "t.csv"), videos=str(tmp_path))))
    (tmp_path / "p.parquet").write_bytes(b"not parquet")
    with pytest.raises(SourceError, match="not a readable Parquet"):
        list(read_records(LaionSource(table=str(tmp_path / "p.parquet"))))


def _own(tmp_path: Path, name: str, content: bytes) -> FolderSource:
    (tmp_path / name).write_bytes(content)
    return FolderSource(name="mine", media="image", folder=str(tmp_path), table=str(tmp_path / name))


def test_shortened_urls_leave_the_prompt_with_their_brackets() -> None:
    """Midjourney writes those it has shortened as <https://s.mj.run/...>."""
    assert split_prompt("<https://s.mj.run/abc> dog on a mat --q 2") == (
        "dog on a mat",
        {"flags": {"q": "2"}, "image_urls": ["https://s.mj.run/abc"]},
    )
    assert split_prompt("<https://s.mj.run/a><https://s.mj.run/b> x") == (
        "x",
        {"image_urls": ["https://s.mj.run/a", "https://s.mj.run/b"]},
    )


def test_columns_are_found_whatever_their_case(tmp_path: Path) -> None:
    """The exact name first; two that are alike, and none of them exact, are no choice to be made here."""
    for name, content in (
        ("a.csv", b"FILE,Caption,mood\na.jpg,a dog,calm\n"),
        ("a.tsv", b"File\tCAPTION\tmood\na.jpg\ta dog\tcalm\n"),
        ("a.jsonl", b'{"File": "a.jpg", "Caption": "a dog", "mood": "calm"}\n'),
        ("b.csv", b"FILE,file,Caption,mood\nwrong.jpg,a.jpg,a dog,calm\n"),
    ):
        (record,) = read_records(_own(tmp_path, name, content))
        assert (record.locator, record.caption, record.extra["mood"]) == ("a.jpg", "a dog", "calm")
        assert record.captions == {"caption": "a dog"}
    for header in (b"file,file,caption", b"FILE,File,caption"):
        with pytest.raises(SourceError, match="2 columns file"):
            list(read_records(_own(tmp_path, "two.csv", header + b"\na.jpg,b.jpg,x\n")))
    (tmp_path / "webvid.csv").write_text("VideoID,Name,Page_Dir,ContentURL,Duration\n1,a dog,1_50,http://h/a.mp4,12\n")
    (record,) = read_records(WebVidSource(table=str(tmp_path / "webvid.csv")))
    assert (record.key, record.locator, record.extra["duration"]) == ("1_50/1", "http://h/a.mp4", 12.0)


def test_a_missing_column_is_told_with_its_remedy(tmp_path: Path) -> None:
    """What there is, as a terminal can show it, and what to type."""
    remedy = r"--set source\.file_column=\.\.\. --set source\.caption_column=\.\.\."
    with pytest.raises(SourceError, match=rf"no column caption; its first line is file,a\\x1b\[31mb; .*{remedy}"):
        list(read_records(_own(tmp_path, "t.csv", b"file,a\x1b[31mb\nx,y\n")))
    with pytest.raises(SourceError, match=rf"no column file and no column caption; its columns are a,b; .*{remedy}"):
        list(read_records(_own(tmp_path, "t.tsv", b"a\tb\nx\ty\n")))
    pq.write_table(pa.table({"URL": ["http://h/1"], "TEXT": ["x"]}), tmp_path / "p.parquet")
    source = FolderSource(name="mine", media="image", folder=str(tmp_path), table=str(tmp_path / "p.parquet"))
    with pytest.raises(SourceError, match=rf"its columns are URL,TEXT; .*{remedy}.*--as laion-coco"):
        list(read_records(source))
    (tmp_path / "w.csv").write_text("file,caption\n")
    with pytest.raises(SourceError, match=rf"no column videoid .*--as folder {remedy}"):
        list(read_records(WebVidSource(table=str(tmp_path / "w.csv"))))
    for name in ("e.csv", "e.tsv", "e.parquet"):
        with pytest.raises(SourceError, match="the table is empty"):
            list(read_records(_own(tmp_path, name, b"")))
    one, two = read_records(_own(tmp_path, "t.jsonl", b'{"path": "a.jpg", "caption": "x"}\n{"file": "a.jpg"}\n'))
    assert (one.reason, two.reason) == (RejectReason.UNPARSABLE, RejectReason.NO_CAPTION)
    assert all("source.file_column=..." in record.detail for record in (one, two))


def test_text_in_a_binary_column_is_text(tmp_path: Path) -> None:
    """Some writers do not say that bytes are text, some say it of what is none; other bytes are not even read."""
    text = pa.array([b"a caf\xc3\xa9", b"a caf\xe9", b"x"], pa.binary())
    lied = pa.Array.from_buffers(pa.string(), 3, text.buffers())
    for column in (text, text.cast(pa.large_binary()), lied):
        files = pa.array([b"a.jpg", b"b.jpg", b"c.jpg"], pa.binary())
        columns = {"file": files, "caption": column, "pixels": pa.array([b"\xff"] * 3), "hash": [b"\xff"] * 3}
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
        source = FolderSource(name="mine", media="image", folder=str(tmp_path), table=str(tmp_path / "t.parquet"))
        one, two, three = read_records(source)
        assert (one.locator, one.caption, one.extra) == ("a.jpg", "a café", {})
        assert (two.reason, two.detail) == (RejectReason.UNPARSABLE, "column caption is no UTF-8")
        assert three.reason is None
        laion = {"URL": pa.array([b"http://h/1", b"http://h/2", b"http://h/3"]), "TEXT": column}
        pq.write_table(pa.table(laion), tmp_path / "l.parquet")
        reasons = [record.reason for record in read_records(LaionSource(table=str(tmp_path / "l.parquet")))]
        assert reasons == [None, RejectReason.UNPARSABLE, None]


@pytest.mark.parametrize("after", ["", '"A cat, asleep"', 'a 5" cat'])
def test_an_open_quote_costs_its_own_line_alone(tmp_path: Path, after: str) -> None:
    """Whether the file ends inside it or another quote comes first; captions over several lines stay whole."""
    body = f'a.jpg,"two\nlines"\nb.jpg,"open\nc.jpg,plain\nd.jpg,{after or "last"}\ne.jpg,end\n'
    records = list(read_records(_own(tmp_path, "t.csv", ("file,caption\n" + body).encode())))
    assert [record.locator for record in records] == ["a.jpg", "", "c.jpg", "d.jpg", "e.jpg"]
    assert records[0].caption == "two lines"
    assert records[1].reason is RejectReason.UNPARSABLE
    assert "lines after it are read anew" in records[1].detail


def test_bytes_that_are_no_text_are_a_reason(tmp_path: Path) -> None:
    """Never replaced in silence; a replacement character that the source itself holds is text."""
    good, bad = "a \ufffd caf\u00e9".encode(), b"a caf\xe9"
    lines = [(b"a.jpg", good), (b"b.jpg", bad), (b"c.jpg", b"x")]
    tables = {
        "t.csv": b"file,caption\n" + b"".join(b"%s,%s\n" % line for line in lines),
        "t.tsv": b"file\tcaption\n" + b"".join(b"%s\t%s\n" % line for line in lines),
        "t.jsonl": b"".join(b'{"file": "%s", "caption": "%s"}\n' % line for line in lines),
    }
    for name, content in tables.items():
        one, two, three = read_records(_own(tmp_path, name, content))
        assert (one.caption, one.reason, three.reason) == (good.decode(), None, None)
        assert two.reason is RejectReason.UNPARSABLE and "no UTF-8" in two.detail
    folder = tmp_path / "folder"
    folder.mkdir()
    for (name, text), ending in zip(lines, (b".txt", b".txt", b".json"), strict=True):
        (folder / name.decode()).write_bytes(b"x")
        sidecar = name.replace(b".jpg", ending).decode()
        (folder / sidecar).write_bytes(b"\xef\xbb\xbf" + (text if ending == b".txt" else b'{"caption": "x"}'))
    one, two, three = read_records(FolderSource(name="mine", media="image", folder=str(folder)))
    assert (one.caption, three.caption) == (good.decode(), "x")
    assert two.reason is RejectReason.UNPARSABLE and "no UTF-8" in two.detail
    source = TarSource(name="mine", media="image", archives=str(tmp_path))
    record = tar_record(source, 3, "0.tar", "b", "b.jpg", bad, None)
    assert (record.row, record.key, record.reason) == (3, "0/b", RejectReason.UNPARSABLE)


def test_a_link_that_leads_nowhere_is_a_row_without_a_file(tmp_path: Path) -> None:
    """As one whose caption leads nowhere is a row that cannot be read."""
    (tmp_path / "a.jpg").symlink_to("gone.jpg")
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "b.jpg").write_bytes(b"x")
    (tmp_path / "b.txt").symlink_to("gone.txt")
    source = FolderSource(name="mine", media="image", folder=str(tmp_path))
    one, two = read_records(source)
    assert (one.locator, one.caption, one.reason) == ("a.jpg", "a dog", None)
    with pytest.raises(MediaError) as caught:
        raw_bytes(source, one.locator)
    assert caught.value.reason is RejectReason.MISSING_FILE
    assert two.reason is RejectReason.UNPARSABLE
    before = source_digest(source)
    (tmp_path / "gone.jpg").write_bytes(b"here")
    assert source_digest(source) != before


@pytest.mark.parametrize("caption", ["[]", '["a"]', "true", "false", "0", "7", "NaN", '{"a": 1}'])
def test_a_json_caption_that_is_no_string_is_no_caption(tmp_path: Path, caption: str) -> None:
    """It is not made one."""
    line = f'{{"file": "a.jpg", "caption": {caption}}}\n'
    (record,) = read_records(_own(tmp_path, "t.jsonl", line.encode()))
    assert record.reason is RejectReason.UNPARSABLE and "no text but" in record.detail
    (tmp_path / "j.jsonl").write_text(f'{{"img_path": "{UUID.format(1)}.jpg", "prompt": {caption}}}\n')
    (record,) = read_records(JourneyDBSource(table=str(tmp_path / "j.jsonl"), archives=str(tmp_path)))
    assert record.reason is RejectReason.UNPARSABLE and "no text but" in record.detail


def test_one_json_array_is_no_json_lines(tmp_path: Path) -> None:
    """However it is laid out; a line that is a list among objects is a bad line."""
    rows = [{"file": "a.jpg", "caption": "x"}, {"file": "b.jpg", "caption": "y"}]
    compact = ",\n".join(map(json.dumps, rows))
    for text in (json.dumps(rows), json.dumps(rows, indent=1), f"[{compact}]"):
        with pytest.raises(SourceError, match="JSON lines expected, this is an array"):
            list(read_records(_own(tmp_path, "t.jsonl", text.encode())))
    records = list(read_records(_own(tmp_path, "t.jsonl", f"[1]\n{json.dumps(rows[0])}\n".encode())))
    assert [record.reason for record in records] == [RejectReason.UNPARSABLE, None]
