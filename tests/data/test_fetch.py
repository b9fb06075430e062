"""Files of one's own and archives, as they are, damaged and hostile, to parts of the ledger."""

import hashlib
import io
import json
import random
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from vc2.data.config import (
    FolderSource,
    JourneyDBSource,
    LaionSource,
    ShardStage,
    Source,
    TarSource,
    WebVidSource,
    archive_uris,
)
from vc2.data.fetch import _Archive, fetch_archive, fetch_rows, raw_bytes
from vc2.data.ledger import SCHEMA, is_last, part_names, read_part, row_of
from vc2.data.media import MediaError
from vc2.data.places import read_span
from vc2.data.rejects import RejectReason
from vc2.data.sources import Record
from vc2.errors import StoreError
from vc2.storage import LocalStore, Store, open_store

IDS = [f"0a1b2c3d-0000-4000-8000-00000000000{number}" for number in range(6)]


def stage(source: Source, **fetch: Any) -> ShardStage:
    form = {"num_frames": 1} if source.media == "image" else {}
    return ShardStage.model_validate({"source": source, "form": form, "fetch": fetch})


def lines_of(store: Store, prefix: str = "ledgers/x") -> list[dict[str, Any]]:
    return [line for name in part_names(store, prefix) for line in read_part(store, prefix, name).to_pylist()]


def bytes_of(store: Store, line: dict[str, Any]) -> bytes:
    """The medium of a line, by the rule of the ledger."""
    if "/" in line["blob"]:
        return read_span(line["blob"], line["offset"], line["size"])
    return store.read_range(f"ledgers/x/{line['blob']}", line["offset"], line["size"])


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data), link
    return info, data


def pack(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


# ---- files of one's own ----


def test_local_files_stay_where_they_are(media: Any, tmp_path: Path) -> None:
    """Files of a tree are probed and hashed, not copied; one that is missing, or too large, is a reason."""
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").write_bytes(media.mp4(10, 25))
    (tmp_path / "v" / "c.mp4").write_bytes(bytes(10**6))
    source = FolderSource(name="mine", media="video", folder=str(tmp_path))
    store = LocalStore(tmp_path / "store")
    records = [Record(row, name, f"v/{name}.mp4", "x") for row, name in enumerate("abc")]
    counts = fetch_rows(store, "ledgers/x", "part-00000", records, stage(source, max_bytes=10**5), tmp_path / "work")
    found, missing, large = lines_of(store)
    assert (found["rate"], found["frames"], found["blob"], found["locator"]) == ("25", 10, None, "v/a.mp4")
    assert missing["reason"] == RejectReason.MISSING_FILE
    assert large["reason"] == RejectReason.TOO_LARGE
    assert [entry.key for entry in store.list("ledgers/")] == ["ledgers/x/part-00000.parquet"]
    assert (counts.rows, counts.bytes) == (3, found["size"])
    assert raw_bytes(source, "v/a.mp4") == tmp_path / "v" / "a.mp4"
    with pytest.raises(MediaError, match="missing_file"):
        raw_bytes(source, "v/b.mp4")


def test_a_webvid_tree_may_have_one_more_level(media: Any, tmp_path: Path) -> None:
    """<part>/<page_dir>/<videoid>.mp4 is found as well as <page_dir>/<videoid>.mp4."""
    for place in ("000001_000050/1.mp4", "00001/000051_000100/2.mp4"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_bytes(b"x")
    source = WebVidSource(table="t.csv", videos=str(tmp_path))
    assert raw_bytes(source, "000001_000050/1.mp4") == tmp_path / "000001_000050/1.mp4"
    assert raw_bytes(source, "000051_000100/2.mp4") == tmp_path / "00001/000051_000100/2.mp4"
    with pytest.raises(MediaError, match="missing_file"):
        raw_bytes(source, "000001_000050/3.mp4")


@pytest.mark.s3
def test_files_in_a_bucket_are_read_where_they_are(media: Any, s3_uri: str, tmp_path: Path) -> None:
    """An s3 tree gives the facts that a local one gives, and nothing is copied."""
    data = media.jpeg(1)
    bucket = open_store(s3_uri)
    bucket.write("pictures/a.jpg", data)
    source = FolderSource(name="mine", media="image", folder=f"{s3_uri}/pictures")
    records = [Record(0, "a", "a.jpg", "x"), Record(1, "b", "b.jpg", "x")]
    fetch_rows(bucket, "ledgers/x", "part-00000", records, stage(source), tmp_path / "work")
    found, missing = lines_of(bucket)
    assert (found["sha256"], found["blob"], found["width"]) == (hashlib.sha256(data).hexdigest(), None, 96)
    assert missing["reason"] == RejectReason.MISSING_FILE
    assert raw_bytes(source, "a.jpg") == data


def test_a_bucket_that_refuses_is_no_fault_of_its_rows(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where credentials have expired nothing is entered: the rows are as good as before."""

    class Expired(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(403)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Expired) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        config = stage(FolderSource(name="mine", media="image", folder="s3://bucket/pictures"))
        store, records = LocalStore(tmp_path / "store"), [Record(n, f"k{n}", f"{n}.jpg", "x") for n in range(3)]
        try:
            with pytest.raises(StoreError, match="credentials"):
                fetch_rows(store, "ledgers/x", "part-00000", records, config, tmp_path / "work")
        finally:
            server.shutdown()
            thread.join()
    assert not part_names(store, "ledgers/x")


# ---- archives of JourneyDB ----


def journey(tmp_path: Path) -> JourneyDBSource:
    return JourneyDBSource(table=str(tmp_path / "anno.jsonl"), archives=str(tmp_path / "imgs"))


def test_archives_are_read_once_and_a_restart_goes_on(media: Any, tmp_path: Path) -> None:
    """Members are packed in parts, known by their UUID; deleted parts come back byte for byte."""
    pictures = [media.jpeg(number) if number != 2 else media.jpeg(number)[:500] for number in range(5)]
    path = tmp_path / "imgs" / "000.tgz"
    pack(path, [member(f"000/{IDS[number]}.jpg", data) for number, data in enumerate(pictures)], "w:gz")
    config = stage(journey(tmp_path), part_rows=2)
    store = LocalStore(tmp_path / "store")
    counts = fetch_archive(store, "ledgers/x", 0, str(path), config, tmp_path / "work")
    names = part_names(store, "ledgers/x")
    assert names == ["part-000000-00000", "part-000000-00001", "part-000000-00002.last"]
    assert [is_last(name) for name in names] == [False, False, True]
    lines = lines_of(store)
    assert [line["key"] for line in lines] == IDS[:5]
    assert [line["reason"] for line in lines] == [None, None, RejectReason.UNDECODABLE, None, None]
    assert all(bytes_of(store, line) == pictures[line["row"]] for line in lines if line["reason"] is None)
    assert (counts.rows, dict(counts.reasons)) == (5, {"undecodable": 1})
    whole = {entry.key: store.read(entry.key) for entry in store.list("ledgers/")}
    for name in names[1:]:
        store.delete(f"ledgers/x/{name}.parquet")
    fetch_archive(store, "ledgers/x", 0, str(path), config, tmp_path / "work", first=1)
    assert {entry.key: store.read(entry.key) for entry in store.list("ledgers/")} == whole
    again = LocalStore(tmp_path / "again")
    wanted = frozenset({IDS[1], IDS[4]})
    fetch_archive(again, "ledgers/x", 0, str(path), config, tmp_path / "work", wanted=wanted)
    assert [line["key"] for line in lines_of(again)] == [IDS[1], IDS[4]]
    assert not list((tmp_path / "work" / "tmp").iterdir())


@pytest.mark.parametrize(
    ("mode", "end"), [("w", 0.3), ("w", 0.99), ("w", "block"), ("w", "last block"), ("w:gz", 0.3), ("w:gz", 0.99)]
)
def test_a_cut_archive_keeps_what_came_before(media: Any, tmp_path: Path, mode: str, end: float | str) -> None:
    """Cut within a picture, between two, or before the mark of the end: the last row says so, the others stand."""
    pictures = [media.jpeg(number) for number in range(5)]
    path = pack(tmp_path / "imgs" / "0.tar", [member(f"{IDS[n]}.jpg", data) for n, data in enumerate(pictures)], mode)
    data = path.read_bytes()
    size = sum(512 + -(-len(picture) // 512) * 512 for picture in pictures)
    if isinstance(end, str):
        data = data[: size if end == "last block" else 512 + -(-len(pictures[0]) // 512) * 512]
    else:
        data = data[: int(end * (size if mode == "w" else len(data)))]
    path.write_bytes(data)
    store = LocalStore(tmp_path / "store")
    fetch_archive(store, "ledgers/x", 0, str(path), stage(journey(tmp_path)), tmp_path / "work")
    *good, last = lines_of(store)
    assert last["reason"] == RejectReason.TRUNCATED and "end of archive" in last["locator"]
    assert last["row"] == len(good) and last["detail"]
    assert [line["reason"] for line in good] == [None] * len(good)
    assert len(good) == {"block": 1, "last block": 5, 0.3: 1 if mode == "w" else len(good), 0.99: 4}[end]


def test_what_is_no_archive_is_one_row(tmp_path: Path) -> None:
    """A web page under the name of a tar does not stop the others."""
    path = tmp_path / "imgs" / "0.tar"
    path.parent.mkdir()
    path.write_bytes(b"<!DOCTYPE html>" * 100)
    store = LocalStore(tmp_path / "store")
    fetch_archive(store, "ledgers/x", 0, str(path), stage(journey(tmp_path)), tmp_path / "work")
    assert [line["reason"] for line in lines_of(store)] == [RejectReason.TRUNCATED]


# ---- webdataset tars ----


def rows_of(path: Path, source: Source, folder: Path) -> list[dict[str, Any]]:
    """The rows of an archive before they are probed, as a table can hold them."""
    with open(path, "rb") as file:
        samples = _Archive(str(path), file, stage(source), folder, None, skip=0).samples()
        return pa.Table.from_pylist([row_of(sample.record) for sample in samples], SCHEMA).to_pylist()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damaged_headers_end_an_archive_and_no_run(media: Any, tmp_path: Path, form: int) -> None:
    """Whatever stands in a header, rows are numbered without gaps and can be stored; nothing is raised or hangs."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=form) as packed:
        for number in range(6):
            for ending, data in (("jpg", media.jpeg(1)[:700]), ("txt", b"a dog"), ("json", b'{"width": 5}')):
                info, _ = member(f"{'é' * (40 * (number % 2))}{number}.{ending}", data)
                packed.addfile(info, io.BytesIO(data))
    whole, rng = tar.getvalue(), random.Random(form)
    for number in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 2, 8])):
            block = 512 * rng.randrange(len(data) // 512)
            data[block + rng.choice([rng.randrange(512), rng.randrange(124, 136), 156])] = rng.choice([0, 255, 48, 129])
        for block in range(0, len(data) - 511, 512):
            if data[block + 257 : block + 262] == b"ustar" and number % 3:  # so that the damage is believed
                data[block + 148 : block + 156] = b" " * 8
                data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
        path = tmp_path / "0.tar"
        path.write_bytes(data)
        source = TarSource(name="x", media="image", archives="x") if number % 2 else journey(tmp_path)
        rows = rows_of(path, source, tmp_path)
        assert [row["row"] for row in rows] == list(range(len(rows)))


def test_a_header_cannot_lead_backwards(media: Any, tmp_path: Path) -> None:
    """A negative size would make a reader go round for ever."""
    path = pack(tmp_path / "0.tar", [member("0.jpg", media.jpeg(1)), member("0.txt", b"a dog")])
    data = bytearray(path.read_bytes())
    place = data.index(b"0.txt")
    data[place + 124 : place + 136] = b"\xff" * 10 + b"\xf0\x00"  # -4096, in base 256
    data[place + 148 : place + 156] = b" " * 8
    data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
    path.write_bytes(data)
    source = TarSource(name="x", media="image", archives="x")
    assert rows_of(path, source, tmp_path)[-1]["reason"] == RejectReason.TRUNCATED


def hostile(media: Any) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Samples good and bad, in the order of `EXPECTED`."""
    said = {"caption": "json says", "width": 96, "height": 64, "PWATERMARK": "0.25", "sha256": "0" * 64, "key": "0",
            "status": "success", "url": "http://h/0.jpg", "exif": "x" * 5000}  # fmt: skip
    picture = media.jpeg(1)
    return [
        member("0.jpg", picture), member("0.json", json.dumps(said).encode()), member("0.txt", b"text says\n"),
        member("1.json", b'{"caption": "from json"}'), member("1.png", picture),  # a JPEG, whatever its name
        member("2.json", b'{"caption": "no medium"}'), member("2.txt", b"no medium"),
        member("3.jpg", picture),
        member("4.mp4", media.mp4(4, 8)), member("4.txt", b"a video"),
        member("5.jpg", b"<html>gone</html>" * 9), member("5.txt", b"a page"),
        member("0.jpg", picture), member("0.txt", b"again"),
        member("../6.jpg", picture), member("../6.txt", b"out"),
        member("/7.jpg", picture), member("/7.txt", b"absolute"),
        member("8.jpg", kind=tarfile.SYMTYPE, link="/etc/hostname"), member("8.txt", b"a link"),
        member("9.jpg", kind=tarfile.CHRTYPE), member("9.txt", b"a device"),
        member("10.pickle", b"cos\nsystem\n(S'false'\ntR."), member("10.pth", picture), member("10.txt", b"code"),
        member("11.jpg", picture[:700]), member("11.txt", b"damaged"),
        member("folder", kind=tarfile.DIRTYPE), member("._12.jpg", b"junk"),
        member("folder/a b.c.jpg", picture), member("folder/a b.c.txt", "caf\u00e9".encode()),
        member("13.json", b"{broken"), member("13.jpg", picture), member("13.txt", b"still fine"),
        member("14.jpg", bytes(40_000)), member("14.txt", b"large"),
    ]  # fmt: skip


EXPECTED: list[RejectReason | None] = [
    None,
    None,
    RejectReason.MISSING_FILE,
    RejectReason.NO_CAPTION,
    RejectReason.NOT_MEDIA,
    RejectReason.NOT_MEDIA,
    RejectReason.DUPLICATE_KEY,
    RejectReason.UNPARSABLE,
    RejectReason.UNPARSABLE,
    RejectReason.UNPARSABLE,
    RejectReason.UNPARSABLE,
    RejectReason.MISSING_FILE,
    RejectReason.UNDECODABLE,
    None,
    None,
    RejectReason.TOO_LARGE,
]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_each_sample_of_a_tar_is_a_row(media: Any, tmp_path: Path, mode: str) -> None:
    """Good samples come with captions and scores, bad ones with one reason; of plain tars nothing is copied."""
    path = pack(tmp_path / "tars" / "00003.tar", hostile(media), mode)
    source = TarSource(name="theirs", media="image", archives=str(path.parent))
    store = LocalStore(tmp_path / "store")
    config = stage(source, part_rows=5, max_bytes=30_000)
    counts = fetch_archive(store, "ledgers/x", 3, archive_uris(source)[0], config, tmp_path / "work")
    lines = lines_of(store)
    assert [line["reason"] for line in lines] == EXPECTED
    assert [line["row"] for line in lines] == list(range(len(EXPECTED)))
    assert counts.rows == len(EXPECTED) and sum(counts.reasons.values()) == len(EXPECTED) - EXPECTED.count(None)
    good = [line for line in lines if line["reason"] is None]
    assert [line["caption"] for line in good] == ["text says", "from json", "caf\u00e9", "still fine"]
    assert [line["key"] for line in good][:2] == ["00003/0", "00003/1"]
    assert len({line["key"] for line in good}) == 4 and all(" " not in line["key"] for line in good)
    assert all(bytes_of(store, line) == media.jpeg(1) for line in good)
    assert {line["blob"] == str(path) for line in good} == {mode == "w"}
    extra = json.loads(good[0]["extra"])
    assert extra == {"width": 96, "height": 64, "pwatermark": 0.25, "download_sha256": "0" * 64,
                     "url": "http://h/0.jpg", "caption_from": "txt"}  # fmt: skip
    assert not (tmp_path / "6.jpg").exists() and not list((tmp_path / "work" / "tmp").iterdir())


def test_a_restart_within_a_tar_goes_on(media: Any, tmp_path: Path) -> None:
    """Parts that are there are skipped without being read; with `wanted`, so is all else."""
    path = pack(tmp_path / "tars" / "a.tar", hostile(media))
    source = TarSource(name="theirs", media="image", archives=str(path))
    config = stage(source, part_rows=4, max_bytes=30_000)
    whole, rest = LocalStore(tmp_path / "whole"), LocalStore(tmp_path / "rest")
    fetch_archive(whole, "ledgers/x", 0, str(path), config, tmp_path / "work")
    fetch_archive(rest, "ledgers/x", 0, str(path), config, tmp_path / "work", first=2)
    assert lines_of(rest) == lines_of(whole)[8:]
    some = LocalStore(tmp_path / "some")
    fetch_archive(some, "ledgers/x", 0, str(path), config, tmp_path / "work", wanted=frozenset({"a/5", "a/13"}))
    assert [line["row"] for line in lines_of(some)] == [5, 14]


def test_laion_tars_take_the_synthetic_caption(media: Any, tmp_path: Path) -> None:
    """`top_caption` comes before the .txt, which may hold the original."""
    line = json.dumps({"top_caption": "a red bird", "TEXT": "IMG_1", "similarity": 0.3, "AESTHETIC_SCORE": 6.5})
    members = [member("1.jpg", media.jpeg(1)), member("1.json", line.encode()), member("1.txt", b"IMG_1")]
    source = LaionSource(archives=str(pack(tmp_path / "0.tar", members)))
    store = LocalStore(tmp_path / "store")
    fetch_archive(store, "ledgers/x", 0, archive_uris(source)[0], stage(source), tmp_path / "work")
    (row,) = lines_of(store)
    assert row["caption"] == "a red bird"
    assert json.loads(row["captions"]) == {"txt": "IMG_1", "top_caption": "a red bird", "text": "IMG_1"}
    assert json.loads(row["extra"]) == {"similarity": 0.3, "aesthetic": 6.5, "caption_from": "top_caption"}


@pytest.mark.s3
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tars_in_a_bucket_give_the_same_rows(media: Any, s3_uri: str, tmp_path: Path, mode: str) -> None:
    """A plain tar in a bucket is read by ranges and referred to there; a packed one is copied into the blob."""
    path = pack(tmp_path / "00003.tar", hostile(media), mode)
    open_store(s3_uri).upload(path, "tars/00003.tar")
    found = []
    for place in (str(path), f"{s3_uri}/tars"):
        source = TarSource(name="theirs", media="image", archives=place)
        store = LocalStore(tmp_path / f"store{len(found)}")
        config = stage(source, max_bytes=30_000)
        fetch_archive(store, "ledgers/x", 0, archive_uris(source)[0], config, tmp_path / "work")
        lines = lines_of(store)
        assert all(bytes_of(store, line) == media.jpeg(1) for line in lines if line["reason"] is None)
        found.append([{name: value for name, value in line.items() if name != "blob"} for line in lines])
        assert {str(line["blob"]).startswith("s3://") for line in lines if line["reason"] is None} == {
            mode == "w" and place.startswith("s3")
        }
    assert found[0] == found[1]


def test_large_members_pass_through_files(media: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video beyond what is held in memory gives the same row and the same bytes."""
    members = [member("v.mp4", media.mp4(30, 25)), member("v.txt", b"a video")]
    source = TarSource(name="theirs", media="video", archives=str(pack(tmp_path / "0.tar.gz", members, "w:gz")))
    found = []
    for limit in (2**23, 100):
        monkeypatch.setattr("vc2.data.fetch.IN_MEMORY", limit)
        store = LocalStore(tmp_path / str(limit))
        fetch_archive(store, "ledgers/x", 0, archive_uris(source)[0], stage(source), tmp_path / "work")
        found.append({entry.key: store.read(entry.key) for entry in store.list("ledgers/")})
    assert found[0] == found[1] and len(found[0]) == 2
    assert not list((tmp_path / "work" / "tmp").iterdir())
