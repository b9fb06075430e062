"""What shard building is asked for: a source, how to fetch it, the form of a sample.

Paths are knobs: what stands in a source's tables is part of the fingerprint by `source_digest`, where they lie is not.
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vc2.config import Config, digest, knob
from vc2.errors import SourceError

__all__ = [
    "STAGE",
    "STAGE_VERSION",
    "FetchConfig",
    "FolderSource",
    "JourneyDBSource",
    "LaionCocoSource",
    "LoaderConfig",
    "SampleForm",
    "ShardStage",
    "Source",
    "WebVidSource",
    "archive_files",
    "ledger_prefix",
    "media_files",
    "source_digest",
    "table_files",
]

STAGE = "shard"
STAGE_VERSION = 1  # raised by hand when the same input gives other shards

SOURCE_NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
SIDECARS = (".txt", ".json", ".csv", ".jsonl", ".parquet")  # beside media, never media


class WebVidSource(Config):
    """WebVid: a CSV with the columns videoid, name, page_dir, contentUrl, and the videos as files or URLs."""

    kind: Literal["webvid"] = "webvid"
    name: str = Field(default="webvid", pattern=SOURCE_NAME)
    table: str = knob(description="the CSV, or a folder of CSVs")
    videos: str | None = knob(None, description="folder of <page_dir>/<videoid>.mp4; without it contentUrl is fetched")
    license: str = "WebVid terms: non-commercial research, no redistribution; videos belong to their owners"
    min_yield: float = knob(0.5, ge=0, le=1)

    @property
    def media(self) -> Literal["video", "image"]:
        return "video"


class LaionCocoSource(Config):
    """LAION-COCO and its relatives: Parquet parts with URL, top_caption and TEXT; images are fetched."""

    kind: Literal["laion-coco"] = "laion-coco"
    name: str = Field(default="laion-coco", pattern=SOURCE_NAME)
    table: str = knob(description="a Parquet file, or a folder of them")
    license: str = "captions CC-BY-4.0 (LAION); images belong to their owners"
    min_yield: float = knob(0.2, ge=0, le=1)

    @property
    def media(self) -> Literal["video", "image"]:
        return "image"


class JourneyDBSource(Config):
    """JourneyDB: JSON lines and numbered .tgz archives of pictures, joined by the UUID in the file names."""

    kind: Literal["journeydb"] = "journeydb"
    name: str = Field(default="jdb", pattern=SOURCE_NAME)
    table: str = knob(description="the .jsonl, or the .tgz that holds it")
    archives: str = knob(description="folder of the image archives (.tgz, .tar.gz or .tar)")
    caption: Literal["prompt", "caption"] = Field(
        default="prompt", description="prompt, or the caption written for it (Task2)"
    )
    license: str = "JourneyDB terms: non-commercial research, no redistribution"
    min_yield: float = knob(0.5, ge=0, le=1)

    @property
    def media(self) -> Literal["video", "image"]:
        return "image"


class FolderSource(Config):
    """Your own videos or images.

    With a table (CSV or JSON lines with the columns `file` and `caption`; `file` is a path below `folder` or a URL),
    or without: then every file below `folder` is a row and its caption stands in a .txt (or the field `caption` of a
    .json) of the same name.
    """

    kind: Literal["folder"] = "folder"
    name: str = Field(pattern=SOURCE_NAME)
    media: Literal["video", "image"]
    folder: str = knob(description="where the files lie")
    table: str | None = knob(None, description="CSV or JSON lines: file, caption, and whatever else is worth keeping")
    license: str = "not stated"
    min_yield: float = knob(0.5, ge=0, le=1)


Source = Annotated[WebVidSource | LaionCocoSource | JourneyDBSource | FolderSource, Field(discriminator="kind")]


class FetchConfig(Config):
    """How raw bytes are brought in and checked. Times in seconds."""

    connect_timeout: float = Field(default=10, gt=0)
    idle_timeout: float = Field(default=15, gt=0, description="longest silence within an answer")
    total_timeout: float = Field(default=60, gt=0, description="for one row, all attempts and waits together")
    retries: int = Field(
        default=2, ge=0, description="further attempts after 429, 5xx, broken connections, truncated bodies"
    )
    max_bytes: int = Field(default=256 * 2**20, gt=0)
    max_pixels: int = Field(
        default=100_000_000, gt=0, description="of an image or a frame: guards against decompression bombs"
    )
    probe_seconds: float = Field(default=30, gt=0, description="deadline for one file")
    part_rows: int = Field(default=1000, ge=1, description="rows of a ledger part, the unit of commit")
    backoff: float = knob(0.5, ge=0, description="first wait between attempts; doubles, with jitter")
    concurrency: int = knob(32, ge=1, description="requests at a time per worker")
    user_agent: str = knob("vc2 (dataset preparation)")
    connect_to: dict[str, str] = knob({}, description='"host[:port]" of a URL -> "address:port" to connect to instead')


class SampleForm(Config):
    """One training sample: exactly `num_frames` frames of one size, every `stride`-th of the source (an image: 1)."""

    num_frames: int = Field(default=16, ge=1)
    width: int = Field(default=512, ge=8)  # pixels
    height: int = Field(default=320, ge=8)
    min_stride: int = Field(default=1, ge=1)
    max_stride: int = Field(default=6, ge=1)
    clips_per_video: int = Field(default=1, ge=1)
    min_side: int = Field(default=32, ge=1, description="shorter side that a source must have, pixels")
    min_caption: int = Field(default=3, ge=1, description="characters")

    @model_validator(mode="after")
    def _strides_in_order(self) -> "SampleForm":
        if self.min_stride > self.max_stride:
            raise ValueError(f"min_stride {self.min_stride} is above max_stride {self.max_stride}")
        return self


class ShardStage(Config):
    """A source made into shards."""

    source: Source
    form: SampleForm = SampleForm()
    fetch: FetchConfig = FetchConfig()
    samples_per_shard: int = Field(default=1000, ge=1, description="slots of a shard")
    jpeg_quality: int = Field(default=95, ge=50, le=100)
    decoder: Literal["decord", "pyav"] = Field(
        default="decord", description="PyAV stands in where decord does not install"
    )
    decode_seconds: float = Field(
        60, gt=0, description="deadline for the clips of one file; a file that misses it is rejected"
    )
    seed: int = 0
    workers: int | None = knob(None, ge=1, description="shards at a time; default: as many as there are cores")

    @model_validator(mode="after")
    def _images_have_one_frame(self) -> "ShardStage":
        if self.source.media == "image" and (self.form.num_frames != 1 or self.form.clips_per_video != 1):
            raise ValueError(
                f"source {self.source.name!r} has images: form.num_frames and form.clips_per_video must be 1"
            )
        return self


class LoaderConfig(Config):
    """Which samples make up the batch of a step."""

    batch_size: int = Field(ge=1, description="samples of a step over all ranks")
    image_share: float = Field(default=0.0, ge=0, le=1, description="share of the steps whose batch is of images")
    seed: int = 0

    @field_validator("image_share")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError("must be a number from 0 to 1")
        return value


# ---- where raw data lies, and its digest ----


def table_files(source: Source) -> list[Path]:
    """The tables of a source, in order.

    Raises:
        SourceError: If there are none.
    """
    endings = {
        "webvid": (".csv",),
        "laion-coco": (".parquet",),
        "journeydb": (".jsonl", ".jsonl.tgz", ".tgz", ".tar.gz"),
        "folder": (".csv", ".jsonl"),
    }[source.kind]
    if source.table is None:
        return []
    return _files(source, "table", source.table, endings)


def archive_files(source: JourneyDBSource) -> list[Path]:
    """The image archives, in order of their names."""
    tables = {path.resolve() for path in table_files(source)}
    found = _files(source, "archives", source.archives, (".tgz", ".tar.gz", ".tar"))
    found = [path for path in found if path.resolve() not in tables]
    if not found:
        raise SourceError(f"source {source.name}: archives {source.archives} holds no image archive beside the table")
    return found


def media_files(source: FolderSource) -> list[Path]:
    """All files below the folder that may be media, in order of their relative paths; hidden ones left out."""
    root = _folder(source, "folder", source.folder)
    found = (path for path in root.rglob("*") if path.is_file() and path.suffix.lower() not in SIDECARS)
    seen = [path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if not seen:
        raise SourceError(f"source {source.name}: no file below folder {root}; check the path")
    return sorted(seen, key=lambda path: path.relative_to(root).as_posix())


def source_digest(source: Source) -> str:
    """What a source is made of, as far as it can be told without opening media: the input of a stage's fingerprint.

    sha256 over names and bytes of the tables; names and sizes of archives; and, for a folder without a table, names
    and sizes of all files and the bytes of its captions.

    Raises:
        SourceError: If a path of the source is wrong.
    """
    parts: list[Any] = [["table", path.name, _sha256(path)] for path in table_files(source)]
    if isinstance(source, WebVidSource) and source.videos is not None:
        _folder(source, "videos", source.videos)
    if isinstance(source, JourneyDBSource):
        parts += [["archive", path.name, path.stat().st_size] for path in archive_files(source)]
    if isinstance(source, FolderSource):
        root = _folder(source, "folder", source.folder)
        if source.table is None:
            parts += [["file", path.relative_to(root).as_posix(), path.stat().st_size] for path in media_files(source)]
            captions = (path for path in sorted(root.rglob("*")) if path.suffix.lower() in (".txt", ".json"))
            parts += [
                ["caption", path.relative_to(root).as_posix(), _sha256(path)] for path in captions if path.is_file()
            ]
    return digest({"kind": source.kind, "parts": parts})


def ledger_prefix(config: ShardStage, repeat: int = 0) -> str:
    """Where the ledger of a stage lies in the store: shared by all stages that would fetch the same in the same way."""
    asked = {
        "tables": source_digest(config.source),
        "source": config.source.identity(),
        "fetch": config.fetch.identity(),
        "repeat": repeat,
    }
    return f"ledgers/{config.source.name}/{digest(asked)}"


def _files(source: Source, role: str, place: str, endings: tuple[str, ...]) -> list[Path]:
    path = Path(place).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise SourceError(
            f"source {source.name}: {role} {path} does not exist; give a file or a folder ({' '.join(endings)})"
        )
    found = sorted(entry for entry in path.iterdir() if entry.is_file() and entry.name.lower().endswith(endings))
    if not found:
        raise SourceError(f"source {source.name}: {role} {path} holds no file ending in {' or '.join(endings)}")
    return found


def _folder(source: Source, role: str, place: str) -> Path:
    path = Path(place).expanduser()
    if not path.is_dir():
        raise SourceError(f"source {source.name}: {role} {path} is not a folder; check the path")
    return path


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    for chunk in _chunks(path):
        sha256.update(chunk)
    return sha256.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(8 * 2**20):
            yield chunk
