"""Adapters: the rows of a source, in its own order, as one kind of `Record`.

The total order of a source is the order of its tables by name and of the rows in them; for a folder without a table,
of the relative paths; for tars, of the tars by name and of the samples in them. Every row gives exactly one record; a
row that is no use carries its reason. Keys are stable: they are made of what the source says about the row, never of
its place.

    webvid              <page_dir>/<videoid>: videoid alone is not unique
    laion-coco, ...     first 20 hex digits of the sha256 of the URL
    journeydb           the UUID at the end of the file name, the only thing that tables and archives share
    folder              the relative path (or URL), without its ending if that is .mp4 (of videos) or .jpg (of images)
    webdataset, tars    <name of the tar>/<key of the sample>

Sources call the same thing by many names. What is kept of a row beside its captions has one name each (`SYNONYMS`):
`similarity`, `punsafe`, `pwatermark`, `aesthetic`, `width`, `height` (pixels) and `duration` (seconds) are numbers,
`sha256` and `md5` promise the bytes of the file; all else keeps the name it has.

Text is UTF-8. A row or a caption with bytes that are not is unparsable; nothing is guessed, nothing replaced.
"""

import csv
import hashlib
import json
import math
import re
import sys
import tarfile
import zlib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

from vc2.data.config import (
    FolderSource,
    JourneyDBSource,
    LaionSource,
    Source,
    TarSource,
    WebVidSource,
    archive_stem,
    folder_files,
    table_files,
)
from vc2.data.places import RawFile, is_url, open_file, open_text, read_file, scheme_of, shown
from vc2.data.rejects import RejectReason
from vc2.errors import SourceError

__all__ = [
    "Record",
    "Seen",
    "is_url",
    "language_of",
    "media_key",
    "parse_duration",
    "read_records",
    "safe_name",
    "sample_key",
    "split_prompt",
    "tar_record",
]

UUID = re.compile(r"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})(?:\.[A-Za-z]+)?$", re.IGNORECASE)
FLAG = re.compile(r"(?:^|\s)(?:--|—)(?=[A-Za-z])")  # Midjourney flags come last; some editors make one dash of two
PROMPT_URL = re.compile(r"<?https?://[^\s>]+>?")  # Midjourney puts those it has shortened in angle brackets
NO_UTF8 = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of such bytes
ARRAY = re.compile(r"\s*\[\s*(\{|$)")
DURATION = re.compile(r"P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?)?", re.IGNORECASE)
LONGEST_KEY = 96  # with the number of a clip and an ending it still fits a ustar name
LONGEST_FIELD = 2**20  # characters of a CSV field; where a quote is never closed, the row ends here
LONGEST_VALUE = 1000  # characters of what is kept beside the captions of a sample in a tar
LARGEST_SIDECAR = 2**22  # bytes of a .txt or .json beside a medium
OWN_COLUMNS = "--set source.file_column=... --set source.caption_column=..."

SYNONYMS = {  # name in the source, lower case -> ours
    "url": "url",
    "contenturl": "url",
    "top_caption": "top_caption",
    "text": "text",
    "caption": "text",
    "width": "width",
    "original_width": "width",
    "height": "height",
    "original_height": "height",
    "duration": "duration",
    "similarity": "similarity",
    "punsafe": "punsafe",
    "pwatermark": "pwatermark",
    "aesthetic": "aesthetic",
    "aesthetic_score": "aesthetic",
    "aesthetics_score": "aesthetic",
    "sha256": "sha256",
    "md5": "md5",
    "hash": "hash",
    "license": "license",
    "nsfw": "nsfw",
    "sample_id": "sample_id",
}
TEXTS = ("url", "top_caption", "text")
NUMBERS = ("similarity", "punsafe", "pwatermark", "aesthetic")
PIXELS = ("width", "height")
OF_THE_TOOL = ("key", "status", "error_message", "exif")  # of img2dataset and video2dataset: about their run


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a source."""

    row: int  #: place in the total order; of an archive: in that archive
    key: str
    locator: str = ""  #: URL, path below the source's folder, archive/member, or UUID to be found in the archives
    caption: str = ""
    captions: Mapping[str, str] = field(default_factory=dict)  #: all there are, by their name in the source
    extra: Mapping[str, Any] = field(default_factory=dict)  #: scores, flags, expected sizes
    reason: RejectReason | None = None
    detail: str = ""


class Seen:
    """A set of texts that holds 8 bytes of each: ten million take 100 MB. Two texts are taken for one with a
    probability of n^2 / 2^65."""

    def __init__(self) -> None:
        self._buckets: dict[int, array[int]] = {}

    def add(self, text: str) -> bool:
        """Add a text; False if it was there."""
        number = int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")
        bucket = self._buckets.setdefault(number & 0xFFFF, array("Q"))
        if number in bucket:
            return False
        bucket.append(number)
        return True


def read_records(source: Source) -> Iterator[Record]:
    """The rows of a source's tables in total order, keys (and URLs) unique among those without a reason. Not for
    `embedded` sources, whose rows are in their archives.

    Raises:
        SourceError: If the tables cannot be found or are not in the format of the source.
    """
    readers = {
        "webvid": _webvid,
        "laion-coco": _laion,
        "laion-aesthetics": _laion,
        "journeydb": _journeydb,
        "folder": _folder,
    }
    if source.embedded:
        raise ValueError(f"source {source.name}: its rows come out of its archives, by `fetch_archive`")
    keys, urls = Seen(), Seen()
    row = -1
    for row, record in enumerate(readers[source.kind](source)):  # type: ignore[operator]
        record = replace(record, row=row)
        if record.reason is None:
            url = record.extra.get("url") or record.locator
            if not record.caption:
                record = replace(record, reason=RejectReason.NO_CAPTION)
            elif not keys.add(record.key):
                record = replace(record, reason=RejectReason.DUPLICATE_KEY, detail="an earlier row has the same key")
            elif is_url(url) and not urls.add(url):
                record = replace(record, reason=RejectReason.DUPLICATE_KEY, detail="an earlier row has the same URL")
        yield record
    if row < 0:
        raise SourceError(f"source {source.name}: its tables have no rows")


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
    urls = [url.strip("<>") for url in PROMPT_URL.findall(text)]
    extra: dict[str, Any] = {"flags": found} if found else {}
    if urls:
        extra["image_urls"] = urls
    return _clean(PROMPT_URL.sub(" ", text)), extra


def language_of(caption: str) -> str:
    """ISO 639-1 code of the language that a caption is most likely in. Short ones are guesses."""
    import py3langid

    return py3langid.classify(caption)[0]


def parse_duration(text: str) -> float | None:
    """Seconds of `PT00H00M17S` or of a plain number; None if it is neither."""
    found = DURATION.fullmatch(text.strip())
    if found is None or not any(found.groups()):
        return _number(text)
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + seconds


# ---- one adapter per format ----


def _webvid(source: WebVidSource) -> Iterator[Record]:
    by_url = source.videos is None
    needed = ("videoid", "name", "page_dir", *(("contentUrl",) if by_url else ()))
    others = ("duration", "page_idx", "contentUrl")
    remedy = f"of a table of your own, name the columns: --as folder {OWN_COLUMNS}"
    web = source.videos if source.videos is not None and scheme_of(source.videos) in ("http", "https") else None
    videoids = Seen()
    for line in (line for file in table_files(source) for line in _csv_of(file, needed, ",", remedy, others)):
        if isinstance(line, Record):
            yield line
            continue
        videoid, page_dir, url = (line.get(name, "").strip() for name in ("videoid", "page_dir", "contentUrl"))
        place = f"{page_dir}/{videoid}.mp4"
        if not videoid or not page_dir or not _is_below(place):
            yield _unparsable("videoid or page_dir is empty or no name")
            continue
        if by_url and not is_url(url):
            yield _unparsable("contentUrl is no URL")
            continue
        locator = url if by_url else f"{web.rstrip('/')}/{place}" if web else place
        extra = _kept({"duration": line.get("duration"), "page_idx": line.get("page_idx"), "url": url})
        if not videoids.add(videoid):
            extra["repeated_videoid"] = True
        yield Record(0, _key(f"{page_dir}/{videoid}"), locator, _clean(line["name"]), {"name": line["name"]}, extra)


def _laion(source: LaionSource) -> Iterator[Record]:
    for file in table_files(source):
        columns = _parquet_columns(file)
        # Releases differ in case and in what they carry: columns are found by name, none but the URL is needed.
        names = {
            column: SYNONYMS[column.lower()]
            for column, is_bytes in columns.items()
            if SYNONYMS.get(column.lower()) in (TEXTS if is_bytes else SYNONYMS.values())
        }
        if "url" not in names.values():
            raise SourceError(
                f"{file.uri}: no column URL; its columns are {_listing(columns)}; "
                f"of a table of your own, name the columns: --as folder {OWN_COLUMNS}"
            )
        for line in _parquet_rows(file, list(names)):
            if isinstance(line, Record):
                yield line
                continue
            # The text of a release that has both `caption` and `TEXT` is TEXT: last, so that it stays.
            given = {names[name]: value for name, value in sorted(line.items(), key=lambda item: item[0].lower())}
            url = str(given.pop("url") or "").strip()
            if not is_url(url):
                yield _unparsable("URL is empty or none")
                continue
            captions = {name: str(value) for name in ("top_caption", "text") if (value := given.pop(name, None))}
            caption, chosen = _first_of(captions, ("top_caption", "text"))
            key = hashlib.sha256(url.encode(errors="replace")).hexdigest()[:20]
            yield Record(0, key, url, caption, captions, _kept(given) | chosen)


def _journeydb(source: JourneyDBSource) -> Iterator[Record]:
    for file in table_files(source):
        for line in _json_rows(file):
            if isinstance(line, Record):
                yield line
                continue
            key = media_key(str(line.get("img_path") or ""))
            if key is None:
                yield _unparsable("img_path does not end in a UUID")
                continue
            task = line.get("Task2")
            prompt, written = line.get("prompt"), task.get("Caption") if isinstance(task, dict) else None
            if wrong := [_kind(value) for value in (prompt, written) if not isinstance(value, str | None)]:
                yield _unparsable(f"a caption is no text but {wrong[0]}")
                continue
            prompt, written = prompt or "", written or ""
            bare, extra = split_prompt(prompt)
            captions = _given({"prompt": bare, "caption": _clean(written), "raw_prompt": prompt})
            caption, chosen = _first_of(captions, (source.caption, "prompt", "caption"))
            style = line.get("Task1")
            extra |= {"style": style} if isinstance(style, dict) else {}
            yield Record(0, key, key, caption, captions, extra | chosen)


def _folder(source: FolderSource) -> Iterator[Record]:
    if source.table is None:
        yield from _folder_alone(source)
        return
    web = source.folder if scheme_of(source.folder) in ("http", "https") else None
    for line in _table_rows(source):
        if isinstance(line, Record):
            yield line
            continue
        file = str(line.pop(source.file_column) or "").strip()
        caption = line.pop(source.caption_column)
        if not isinstance(caption, str | None):
            yield _unparsable(f"the caption is no text but {_kind(caption)}")
            continue
        caption = caption or ""
        if not is_url(file) and not _is_below(file):
            yield _unparsable("file is empty, or no path below the folder")
            continue
        locator = f"{web.rstrip('/')}/{file}" if web and not is_url(file) else file
        captions = {source.caption_column: caption}
        yield Record(0, _file_key(source, file), locator, _clean(caption), captions, _kept(line))


def _folder_alone(source: FolderSource) -> Iterator[Record]:
    media, others = folder_files(source)
    beside = {file.name: file for file in others}
    for file in media:
        if shown(file.name) != file.name:
            yield replace(_unparsable("the name of the file is no UTF-8"), locator=shown(file.name))
            continue
        stem = _without_ending(file.name)
        text, line = beside.get(f"{stem}.txt"), beside.get(f"{stem}.json")
        try:
            captions, extra = _captions_beside(
                None if text is None else read_file(text.uri, LARGEST_SIDECAR),
                None if line is None else read_file(line.uri, LARGEST_SIDECAR),
            )
        except SourceError as error:
            yield replace(_unparsable(str(error)), key=_file_key(source, file.name), locator=file.name)
            continue
        caption, chosen = _first_of(captions, ("txt", "top_caption", "text"))
        yield Record(0, _file_key(source, file.name), file.name, caption, captions, _kept(extra) | chosen)


def sample_key(archive: str, name: str) -> str:
    """The key of a sample in a webdataset tar, of the name of the tar and the sample's key in it."""
    return _key(f"{archive_stem(archive)}/{name}")


def tar_record(
    source: TarSource | LaionSource,
    row: int,
    archive: str,
    name: str,
    member: str,
    text: bytes | None,
    line: bytes | None,
) -> Record:
    """The record of a sample in a webdataset tar.

    Args:
        source: Tells which caption comes first: that of the .txt, or, for LAION, the synthetic one.
        row: Place of the sample in the tar.
        archive: Name of the tar.
        name: Key of the sample in the tar.
        member: Name of the member with its medium.
        text: Content of its .txt, if it has one.
        line: Content of its .json, if it has one.
    """
    locator = f"{archive}/{shown(member)}"
    try:
        captions, extra = _captions_beside(text, line)
    except SourceError as error:
        return replace(_unparsable(str(error)), row=row, key=sample_key(archive, name), locator=locator)
    first = ("txt", "top_caption", "text") if isinstance(source, TarSource) else ("top_caption", "txt", "text")
    caption, chosen = _first_of(captions, first)
    # Their hash is of the file that was downloaded, which may have been encoded anew since.
    hashes = {f"download_{name}": extra.pop(name) for name in ("sha256", "md5") if name in extra}
    kept = {
        name: value
        for name, value in _kept(extra).items()
        if name not in OF_THE_TOOL and isinstance(value, str | int | float) and len(str(value)) <= LONGEST_VALUE
    }
    record = Record(row, sample_key(archive, name), locator, caption, captions, kept | hashes | chosen)
    return record if caption else replace(record, reason=RejectReason.NO_CAPTION)


def _captions_beside(text: bytes | None, line: bytes | None) -> tuple[dict[str, str], dict[str, Any]]:
    """Captions, and all else, of a .txt and a .json beside a medium; names are ours where there is one.

    Raises:
        SourceError: If one of them is no UTF-8.
    """
    try:
        captions = {} if text is None else {"txt": _clean(text.decode("utf-8-sig"))}
        given = {} if line is None else _json_object(line.decode("utf-8-sig")) or {}
    except UnicodeDecodeError as error:
        raise SourceError(f"the .txt or .json beside it is no UTF-8 (byte {error.start})") from None
    extra: dict[str, Any] = {}
    for name, value in given.items():
        extra.setdefault(SYNONYMS.get(name.lower(), name), value)
    for name in ("top_caption", "text"):
        if isinstance(found := extra.pop(name, None), str):
            captions[name] = found
    return _given(captions), extra


# ---- reading lines ----


def _table_rows(source: FolderSource) -> Iterator[dict[str, Any] | Record]:
    needed = (source.file_column, source.caption_column)
    remedy = f"name yours: {OWN_COLUMNS}"
    for file in table_files(source):
        name = file.name.lower().removesuffix(".gz")
        if name.endswith(".parquet"):
            columns = _parquet_columns(file)
            laion = {"url", "text"} <= {column.lower() for column in columns}
            hint = f"{remedy}; if it is one of LAION: --as laion-coco" if laion else remedy
            names = _named(file, list(columns), needed, hint)
            plain = [column for column, is_bytes in columns.items() if not is_bytes or names[column] in needed]
            for line in _parquet_rows(file, plain):
                yield line if isinstance(line, Record) else {names[column]: value for column, value in line.items()}
        elif name.endswith((".jsonl", ".json", ".ndjson")):
            for line in _json_rows(file):
                yield line if isinstance(line, Record) else _named_fields(source, line, needed, remedy)
        else:
            yield from _csv_of(file, needed, "\t" if name.endswith(".tsv") else ",", remedy)


def _named_fields(
    source: FolderSource, line: dict[str, Any], needed: Sequence[str], remedy: str
) -> dict[str, Any] | Record:
    """One JSON object by the names that are needed: each line may have fields of its own."""
    names, problem = _found(list(line), needed)
    line = {names[name]: value for name, value in line.items()}
    if not problem:
        return line
    detail = f"{problem}; its fields are {_listing(names)}; {remedy}"
    if problem == f"no column {source.caption_column}":
        file = str(line[source.file_column] or "")
        return Record(0, _file_key(source, file), file, reason=RejectReason.NO_CAPTION, detail=detail)
    return _unparsable(detail)


def _found(columns: Sequence[str], needed: Sequence[str], others: Sequence[str] = ()) -> tuple[dict[str, str], str]:
    """What each column is called here, and what is wrong with the `needed` ones. Of those that differ in case alone
    the exact one is meant."""
    names, problems = {column: column for column in columns}, []
    for name in (*needed, *others):
        alike = [column for column in columns if column == name]
        alike = alike or [column for column in columns if column.lower() == name.lower()]
        if len(alike) == 1:
            names[alike[0]] = name
        elif name in needed:
            problems.append(f"{len(alike)} columns {name}" if alike else f"no column {name}")
    return names, " and ".join(problems)


def _named(
    file: RawFile, columns: Sequence[str], needed: Sequence[str], remedy: str, others: Sequence[str] = ()
) -> dict[str, str]:
    names, problem = _found(columns, needed, others)
    if problem:
        are = "its first line is" if file.name.lower().removesuffix(".gz").endswith(".csv") else "its columns are"
        raise SourceError(f"{file.uri}: {problem}; {are} {_listing(columns)}; {remedy}")
    return names


def _listing(columns: Iterable[str]) -> str:
    """Names of columns as a terminal can show them."""
    text = ",".join(columns)[:200]
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _csv_of(
    file: RawFile, needed: Sequence[str], delimiter: str, remedy: str, others: Sequence[str] = ()
) -> Iterator[dict[str, str] | Record]:
    """Rows of a CSV, or what is wrong with them. Of several lines that are no row together, as those after a quote
    that is never closed, the first is left out, and the others are read by themselves."""
    csv.field_size_limit(min(sys.maxsize, LONGEST_FIELD))
    with open_text(file.uri, newline="") as text:
        text.reconfigure(errors="surrogateescape")
        lines = _Lines(text)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            if not (columns := [name.strip() for name in next(filter(None, rows), [])]):
                raise SourceError(f"{file.uri}: the table is empty")
            columns = list(map(_named(file, columns, needed, remedy, others).__getitem__, columns))
            while True:
                lines.taken.clear()
                try:
                    if (values := next(rows, None)) is None:
                        return
                    problem = f"{len(values)} fields, expected {len(columns)}" if len(values) != len(columns) else ""
                except csv.Error as error:
                    values, problem = [""], str(error)
                if not values:  # an empty line is no row
                    continue
                line = dict(zip(columns, values, strict=False))
                if problem and (more := len(lines.taken) - 1) > 0:
                    lines.give_back()
                    problem += f": its quote is not closed where the line ends; the {more} lines after it are read anew"
                yield _unparsable(problem) if problem else _in_utf8(line)
        except (EOFError, OSError, zlib.error, csv.Error) as error:
            raise SourceError(f"{file.uri}: not a readable table ({error})") from None


class _Lines:
    """Lines of a file, of which those taken for one row can be read again."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines, self._again = iter(lines), deque[str]()
        self.taken: list[str] = []

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.taken.append(line)
        return line

    def give_back(self) -> None:
        """All that were taken but the first."""
        self._again.extendleft(reversed(self.taken[1:]))


def _in_utf8(line: dict[str, Any]) -> dict[str, Any] | Record:
    for name, value in line.items():
        if isinstance(value, str) and not value.isascii() and NO_UTF8.search(value):
            return _unparsable(f"column {_listing([name])} is no UTF-8")
    return line


def _parquet_columns(file: RawFile) -> dict[str, bool]:
    """Columns that hold one value a row, and whether it is bytes, which may be text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.size == 0:
        raise SourceError(f"{file.uri}: the table is empty")
    try:
        with open_file(file.uri) as opened:
            schema = pq.read_schema(opened)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{file.uri}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    names = [column.name for column in schema]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SourceError(f"{file.uri}: several columns {_listing(twice)}; each needs a name of its own")
    bare = {column.name: getattr(column.type, "value_type", column.type) for column in schema}  # of a dictionary
    of_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return {
        column.name: any(is_one(bare[column.name]) for is_one in of_bytes)
        for column in schema
        if not pa.types.is_nested(column.type)
    }


def _parquet_rows(file: RawFile, columns: list[str]) -> Iterator[dict[str, Any] | Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Row groups may be large: pages are read as they are needed.
        with open_file(file.uri) as opened, pq.ParquetFile(opened, pre_buffer=False, buffer_size=2**20) as table:
            for batch in table.iter_batches(batch_size=4096, columns=columns, use_threads=False):
                values = [_values(column) for column in batch.columns]
                for row in zip(*values, strict=True):
                    yield _in_utf8(dict(zip(batch.schema.names, row, strict=True)))
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{file.uri}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _values(column: Any) -> list[Any]:
    """Values of an Arrow array, bytes as text."""
    import pyarrow as pa

    try:
        values = column.to_pylist()
    except UnicodeDecodeError:  # Arrow does not check what a writer calls text
        values = column.cast(pa.large_binary()).to_pylist()
    return [value.decode(errors="surrogateescape") if isinstance(value, bytes) else value for value in values]


def _json_rows(file: RawFile) -> Iterator[dict[str, Any] | Record]:
    """Rows of a JSON-lines file, or what is wrong with them."""
    lines = _lines(file)
    first = next(lines, "")
    ahead = [first, *islice(lines, 1)]
    if first.lstrip().startswith("[") and (len(ahead) == 1 or (ARRAY.match(first) and not _is_json(first))):
        raise SourceError(f"{file.uri}: JSON lines expected, this is an array; write one object a line")
    for text in chain(filter(None, ahead), lines):
        if not text.isascii() and NO_UTF8.search(text):
            yield _unparsable("the line is no UTF-8")
        else:
            line = _json_object(text)
            yield _unparsable("not a JSON object") if line is None else line


def _lines(file: RawFile) -> Iterator[str]:
    """Lines of a JSON-lines file, bare, packed, or inside a tar."""
    if file.name.lower().endswith((".tgz", ".tar.gz", ".tar")):
        yield from _lines_of_tar(file)
        return
    try:
        with open_text(file.uri) as lines:
            lines.reconfigure(errors="surrogateescape")
            yield from (line for line in lines if line.strip())
    except (EOFError, OSError, zlib.error) as error:
        raise SourceError(f"{file.uri}: not a readable table ({error})") from None


def _lines_of_tar(file: RawFile) -> Iterator[str]:
    try:
        with open_file(file.uri) as opened, tarfile.open(fileobj=opened, mode="r|*") as tar:
            members = 0
            for member in tar:
                if member.isfile() and (content := tar.extractfile(member)) is not None:
                    members += 1
                    yield from (line.decode(errors="surrogateescape") for line in content if line.strip())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SourceError(f"{file.uri}: not a readable archive ({error})") from None
    if members == 0:
        raise SourceError(f"{file.uri}: an archive without a file in it; expected JSON lines")


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
        if "\\ud" in text.lower():  # half a character, which no file of ours can hold
            line = json.loads(json.dumps(line, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


# ---- values ----


def _kind(value: Any) -> str:
    return {bool: "true or false", list: "a list", dict: "an object"}.get(type(value), f"a {type(value).__name__}")


def _unparsable(detail: str) -> Record:
    return Record(0, "", reason=RejectReason.UNPARSABLE, detail=detail)


def _clean(text: str) -> str:
    return " ".join(text.replace("\x00", " ").split())


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, "")}


def _kept(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a row beside its captions, under our names, numbers as numbers; what is empty is left out."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
            continue
        own = SYNONYMS.get(name.lower(), name)
        if own in NUMBERS:
            value = _number(value)
        elif own in PIXELS:
            number = _number(value)
            value = None if number is None else int(number)
        elif own == "duration":
            if isinstance(value, str):
                found["raw_duration"] = value
            value = parse_duration(value) if isinstance(value, str) else _number(value)
        elif own in ("sha256", "md5"):
            value = str(value).strip().lower()
        if value is not None:
            found.setdefault(own, value)
    return found


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _first_of(captions: Mapping[str, str], order: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The first caption there is, and its name as what `extra` says of it."""
    for name in order:
        if text := _clean(captions.get(name, "")):
            return text, {"caption_from": name}
    return "", {}


def _is_below(path: str) -> bool:
    """Whether a path stays below the folder that it is taken from."""
    return bool(path) and not path.startswith("/") and ".." not in path.split("/") and "\x00" not in path


def safe_name(name: str) -> bool:
    """Whether the name of a member stays below the folder that a tar would be unpacked to."""
    return _is_below(name.removeprefix("./")) and "\\" not in name


def _without_ending(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + (file.rpartition(".")[0] or file)


def _file_key(source: FolderSource, name: str) -> str:
    usual = ".mp4" if source.media == "video" else ".jpg"
    return _key(_without_ending(name) if name.lower().endswith(usual) else name)


def _key(text: str) -> str:
    """`text` if it can name a member of a tar for every reader, else made safe, with a hash that keeps it unique."""
    safe = re.sub(r"[^A-Za-z0-9_/-]+", "-", text).strip("/")
    if safe == text and len(safe) <= LONGEST_KEY:
        return safe
    return f"{safe[: LONGEST_KEY - 13]}-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:12]}"
