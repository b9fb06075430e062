"""Adapters: the rows of a source, in its own order, as one kind of `Record`.

The total order of a source is the order of its tables by name and of the rows in them; for a folder without a table,
of the relative paths. Every row gives exactly one record; a row that is no use carries its reason. Keys are stable:
they are made of what the source says about the row, never of its place.

    webvid       <page_dir>/<videoid>: videoid alone is not unique
    laion-coco   first 20 hex digits of the sha256 of the URL
    journeydb    the UUID at the end of the file name, the only thing that tables and archives share
    folder       the relative path (or URL) without its ending
"""

import csv
import hashlib
import json
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vc2.data.config import (
    FolderSource,
    JourneyDBSource,
    LaionCocoSource,
    Source,
    WebVidSource,
    media_files,
    table_files,
)
from vc2.data.rejects import RejectReason
from vc2.errors import SourceError

__all__ = ["Record", "is_url", "media_key", "read_records", "split_prompt"]

UUID = re.compile(r"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})(?:\.[A-Za-z]+)?$", re.IGNORECASE)
FLAG = re.compile(r"(?:^|\s)(?:--|—)(?=[A-Za-z])")  # Midjourney flags come last; some editors make one dash of two
PROMPT_URL = re.compile(r"https?://\S+")
LONGEST_KEY = 96  # with the number of a clip and an ending it still fits a ustar name


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a source."""

    row: int  #: place in the total order
    key: str
    locator: str = ""  #: URL, path below the source's folder, or UUID to be found in the archives
    caption: str = ""
    captions: Mapping[str, str] = field(default_factory=dict)  #: all there are, by their name in the source
    extra: Mapping[str, Any] = field(default_factory=dict)  #: scores, flags, expected sizes: kept, not used
    reason: RejectReason | None = None
    detail: str = ""


def read_records(source: Source) -> Iterator[Record]:
    """The rows of a source in total order, keys unique among those without a reason.

    Raises:
        SourceError: If the tables cannot be found or are not in the format of the source.
    """
    readers = {"webvid": _webvid, "laion-coco": _laion, "journeydb": _journeydb, "folder": _folder}
    seen: set[str] = set()
    row = -1
    for row, record in enumerate(readers[source.kind](source)):  # type: ignore[operator]
        record = replace(record, row=row)
        if record.reason is None:
            if record.key in seen:
                record = replace(record, reason=RejectReason.DUPLICATE_KEY, detail="an earlier row has the same key")
            elif not record.caption:
                record = replace(record, reason=RejectReason.NO_CAPTION)
            seen.add(record.key)
        yield record
    if row < 0:
        raise SourceError(f"source {source.name}: its tables have no rows")


def is_url(locator: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", locator) is not None


def media_key(name: str) -> str | None:
    """The UUID at the end of a JourneyDB file name, lower case."""
    found = UUID.search(name)
    return found[1].lower() if found else None


def split_prompt(prompt: str) -> tuple[str, dict[str, Any]]:
    """A Midjourney prompt without its flags and image URLs, and those: `a cat --ar 16:9` -> `a cat`, {"ar": "16:9"}."""
    text, *flags = FLAG.split(" " + prompt)
    found: dict[str, Any] = {}
    for flag in flags:
        name, _, value = flag.strip().partition(" ")
        found[name.lower()] = value.strip() or True
    urls = PROMPT_URL.findall(text)
    extra: dict[str, Any] = {"flags": found} if found else {}
    if urls:
        extra["image_urls"] = urls
    return _clean(PROMPT_URL.sub(" ", text)), extra


# ---- one adapter per format ----


def _webvid(source: WebVidSource) -> Iterator[Record]:
    needed = (
        ("videoid", "name", "page_dir") if source.videos is not None else ("videoid", "name", "page_dir", "contentUrl")
    )
    for line in _csv_rows(source, needed):
        if isinstance(line, Record):
            yield line
            continue
        videoid, page_dir, url = (line.get(name, "").strip() for name in ("videoid", "page_dir", "contentUrl"))
        if not videoid or not page_dir:
            yield _unparsable("videoid or page_dir is empty")
            continue
        key = _key(f"{page_dir}/{videoid}")
        locator = f"{page_dir}/{videoid}.mp4" if source.videos is not None else url
        extra = _given({"duration": line.get("duration"), "page_idx": line.get("page_idx"), "url": url})
        yield Record(0, key, locator, _clean(line["name"]), {"name": line["name"]}, extra)


def _laion(source: LaionCocoSource) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    scores = (
        "similarity",
        "punsafe",
        "pwatermark",
        "aesthetic",
        "width",
        "height",
        "license",
        "hash",
        "sample_id",
        "nsfw",
    )
    for path in table_files(source):
        try:
            with pq.ParquetFile(path) as table:
                # Releases differ in case and in what they carry: columns are found by name, none but the URL is needed.
                names = {name.lower(): name for name in table.schema_arrow.names}
                names.setdefault("aesthetic", names.get("aesthetic_score", ""))
                names.setdefault("text", names.get("caption", ""))
                if "url" not in names:
                    raise SourceError(f"{path}: no column URL; it has {', '.join(table.schema_arrow.names)}")
                wanted = {name: names[name] for name in ("url", "top_caption", "text", *scores) if names.get(name)}
                for batch in table.iter_batches(batch_size=4096, columns=sorted(set(wanted.values()))):
                    for line in batch.to_pylist():
                        yield _laion_record({name: line[column] for name, column in wanted.items()}, scores)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _laion_record(line: dict[str, Any], scores: tuple[str, ...]) -> Record:
    url = str(line["url"] or "").strip()
    if not url:
        return _unparsable("URL is empty")
    captions = {name: str(line[name]) for name in ("top_caption", "text") if line.get(name)}
    caption = next((text for text in map(_clean, captions.values()) if text), "")
    extra = _given({name: line.get(name) for name in scores})
    return Record(0, hashlib.sha256(url.encode()).hexdigest()[:20], url, caption, captions, extra)


def _journeydb(source: JourneyDBSource) -> Iterator[Record]:
    for text in _lines(source):
        line = _json_object(text)
        path, prompt = (str(line.get(name) or "") for name in ("img_path", "prompt")) if line else ("", "")
        key = media_key(path)
        if line is None or key is None:
            yield _unparsable("not a JSON object" if line is None else "img_path does not end in a UUID")
            continue
        bare, extra = split_prompt(prompt)
        task = line.get("Task2")
        written = str(task.get("Caption") or "") if isinstance(task, dict) else ""
        captions = _given({"prompt": bare, "caption": _clean(written), "raw_prompt": prompt})
        caption = captions.get(source.caption) or captions.get("prompt") or captions.get("caption") or ""
        style = line.get("Task1")
        yield Record(0, key, key, caption, captions, extra | ({"style": style} if isinstance(style, dict) else {}))


def _folder(source: FolderSource) -> Iterator[Record]:
    if source.table is None:
        root = Path(source.folder).expanduser()
        for path in media_files(source):
            name = path.relative_to(root).as_posix()
            caption, extra = _caption_beside(path)
            yield Record(0, _key(_without_ending(name)), name, caption, {"caption": caption}, extra)
        return
    for line in _table_rows(source):
        if isinstance(line, Record):
            yield line
            continue
        file, caption = str(line.get("file") or "").strip(), str(line.get("caption") or "")
        if not file or (not is_url(file) and (file.startswith("/") or ".." in file.split("/"))):
            yield _unparsable("file is empty, or no path below the folder")
            continue
        extra = _given({name: value for name, value in line.items() if name not in ("file", "caption")})
        yield Record(0, _key(_without_ending(file)), file, _clean(caption), {"caption": caption}, extra)


# ---- reading lines ----


def _table_rows(source: FolderSource) -> Iterator[dict[str, Any] | Record]:
    if all(path.suffix.lower() == ".csv" for path in table_files(source)):
        yield from _csv_rows(source, ("file", "caption"))
        return
    for text in _lines(source):
        yield _json_object(text) or _unparsable("not a JSON object")


def _csv_rows(source: Source, needed: tuple[str, ...]) -> Iterator[dict[str, str] | Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    for path in table_files(source):
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = csv.reader(file)
            columns = [name.strip() for name in next(rows, [])]
            if missing := [name for name in needed if name not in columns]:
                raise SourceError(
                    f"{path}: no column {' and '.join(missing)}; the first line is {','.join(columns)[:200]}"
                )
            while True:
                try:
                    values = next(rows)
                except StopIteration:
                    break
                except csv.Error as error:
                    yield _unparsable(str(error))
                    continue
                if not values:  # an empty line is no row
                    continue
                if len(values) != len(columns):
                    yield _unparsable(f"{len(values)} fields, expected {len(columns)}")
                    continue
                yield dict(zip(columns, values, strict=True))


def _lines(source: Source) -> Iterator[str]:
    """Lines of JSON-lines files, bare or inside a tar."""
    for path in table_files(source):
        if path.name.lower().endswith((".tgz", ".tar.gz", ".tar")):
            yield from _lines_of_tar(path)
            continue
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from (line for line in file if line.strip())


def _lines_of_tar(path: Path) -> Iterator[str]:
    try:
        with tarfile.open(path, "r|*") as tar:
            members = 0
            for member in tar:
                if member.isfile() and (content := tar.extractfile(member)) is not None:
                    members += 1
                    yield from (line.decode("utf-8", "replace") for line in content if line.strip())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SourceError(f"{path}: not a readable archive ({error})") from None
    if members == 0:
        raise SourceError(f"{path}: an archive without a file in it; expected JSON lines")


def _caption_beside(path: Path) -> tuple[str, dict[str, Any]]:
    if (text := path.with_suffix(".txt")).is_file():
        return _clean(text.read_text(encoding="utf-8", errors="replace")), {}
    if (text := path.with_suffix(".json")).is_file():
        line = dict(_json_object(text.read_text(encoding="utf-8", errors="replace")) or {})
        return _clean(str(line.pop("caption", "") or "")), line
    return "", {}


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _unparsable(detail: str) -> Record:
    return Record(0, "", reason=RejectReason.UNPARSABLE, detail=detail)


def _clean(text: str) -> str:
    return " ".join(text.replace("\x00", " ").split())


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, "")}


def _without_ending(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + (file.rpartition(".")[0] or file)


def _key(text: str) -> str:
    """`text` if it can name a member of a tar for every reader, else made safe, with a hash that keeps it unique."""
    safe = re.sub(r"[^A-Za-z0-9_/-]+", "-", text).strip("/")
    if safe == text and len(safe) <= LONGEST_KEY:
        return safe
    return f"{safe[: LONGEST_KEY - 13]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
