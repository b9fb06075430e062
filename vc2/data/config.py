"""What shard building is asked for: a source, how to fetch it, the form of a sample.

Paths are knobs: what a source is made of is part of the fingerprint by `source_digest`, which folder it lies in is not.
The same files on disk and in a bucket do have different digests: of local tables the bytes are read, of remote ones
the ETag and size are asked for.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vc2.artifacts import fingerprint
from vc2.config import Config, digest, knob
from vc2.data.places import RawFile, digest_of, find_files, find_tree, local_path, scheme_of, shown
from vc2.errors import SourceError
from vc2.storage import Store

__all__ = [
    "STAGE",
    "STAGE_VERSION",
    "Change",
    "FetchConfig",
    "Filters",
    "FolderSource",
    "JourneyDBSource",
    "LaionSource",
    "LoaderConfig",
    "LoaderSettings",
    "SampleForm",
    "ShardStage",
    "Source",
    "TarSource",
    "WebVidSource",
    "archive_files",
    "archive_marks",
    "archive_stem",
    "archive_uris",
    "folder_files",
    "ledger_prefix",
    "removal_lists",
    "shard_fingerprint",
    "source_digest",
    "table_files",
]

STAGE = "shard"
STAGE_VERSION = 3  # raised by hand when the same input gives other shards

SOURCE_NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".parquet")
SIDECARS = (".txt", ".json", *TABLES)  # beside media, never media
ARCHIVES = (".tar", ".tar.gz", ".tgz")


class _Source(Config):
    """What all sources have. Places may be local paths, `s3://bucket/prefix` or, file by file, `http(s)://` URLs with
    `{000..127}` for a range of numbers."""

    name: str = Field(pattern=SOURCE_NAME)  # of the source, in the store and in tables
    license: str = "not stated"  # what may be done with it; kept in the manifest
    min_yield: float = knob(0.5, ge=0, le=1, description="share of rows that must become samples")

    @property
    def by_archive(self) -> bool:
        """Whether media come out of archives, each read once from its start."""
        return self.embedded

    @property
    def embedded(self) -> bool:
        """Whether archives hold captions too, and so whole rows."""
        return False


class WebVidSource(_Source):
    """WebVid: a CSV with the columns videoid, name, page_dir, contentUrl, and the videos as files or URLs."""

    kind: Literal["webvid"] = "webvid"  # which form of source
    name: str = Field(default="webvid", pattern=SOURCE_NAME)  # of the source, in the store and in tables
    table: str = knob(description="the CSV, or a folder of CSVs")
    videos: str | None = knob(None, description="folder of <page_dir>/<videoid>.mp4; without it contentUrl is fetched")
    license: str = Field(
        default="WebVid terms: non-commercial research, no redistribution; videos belong to their owners",
        description="what may be done with it; kept in the manifest",
    )

    @property
    def media(self) -> Literal["video", "image"]:
        return "video"


class LaionSource(_Source):
    """LAION-COCO, LAION-Aesthetics and their relatives: Parquet parts with URL, captions and scores, whose images are
    fetched; or, in `archives`, the tars that img2dataset made of them."""

    kind: Literal["laion-coco", "laion-aesthetics"] = "laion-coco"  # which form of source
    name: str = Field(default="laion-coco", pattern=SOURCE_NAME)  # of the source, in the store and in tables
    table: str | None = knob(None, description="a Parquet file, or a folder of them")
    archives: str | None = knob(None, description="folder of tars made by img2dataset, in place of `table`")
    license: str = "captions CC-BY-4.0 (LAION); images belong to their owners"  # what may be done with it
    min_yield: float = knob(0.2, ge=0, le=1)  # least share of rows that become samples; fewer is an error

    @property
    def media(self) -> Literal["video", "image"]:
        return "image"

    @property
    def embedded(self) -> bool:
        return self.archives is not None

    @model_validator(mode="after")
    def _one_of_both(self) -> "LaionSource":
        if (self.table is None) == (self.archives is None):
            raise ValueError(f"source {self.name}: give either `table` (images are fetched) or `archives` (ready tars)")
        return self


class JourneyDBSource(_Source):
    """JourneyDB: JSON lines and numbered .tgz archives of pictures, joined by the UUID in the file names."""

    kind: Literal["journeydb"] = "journeydb"  # which form of source
    name: str = Field(default="jdb", pattern=SOURCE_NAME)  # of the source, in the store and in tables
    table: str = knob(description="the .jsonl, or the .tgz that holds it")
    archives: str = knob(description="folder of the image archives (.tgz, .tar.gz or .tar)")
    caption: Literal["prompt", "caption"] = Field(
        default="prompt", description="prompt, or the caption written for it (Task2)"
    )
    license: str = "JourneyDB terms: non-commercial research, no redistribution"  # what may be done with it

    @property
    def media(self) -> Literal["video", "image"]:
        return "image"

    @property
    def by_archive(self) -> bool:
        return True


class TarSource(_Source):
    """Any webdataset tars, such as those that video2dataset and img2dataset write: members `<key>.mp4` or `<key>.jpg`
    with `<key>.txt` (the caption) and `<key>.json` (captions, scores, whatever else) beside them."""

    kind: Literal["webdataset"] = "webdataset"  # which form of source
    media: Literal["video", "image"]  # videos or images
    archives: str = knob(description="folder of tars, one tar, or a range {00000..00099}.tar")

    @property
    def embedded(self) -> bool:
        return True


class FolderSource(_Source):
    """Your own videos or images.

    With a table (CSV, TSV, Parquet or JSON lines with the columns `file` and `caption`; `file` is a path below `folder`
    or a URL; `sha256` or `md5`, where given, must be that of the file), or without: then every file below `folder` is a
    row and its caption stands in a .txt (or the field `caption` of a .json) of the same name.
    """

    kind: Literal["folder"] = "folder"  # which form of source
    media: Literal["video", "image"]  # videos or images
    folder: str = knob(description="where the files lie")
    table: str | None = knob(None, description="table of file, caption, and whatever else is worth keeping")
    file_column: str = Field("file", description="name of the column with the path or URL")
    caption_column: str = Field("caption", description="name of the column with the caption")


Source = Annotated[WebVidSource | LaionSource | JourneyDBSource | TarSource | FolderSource, Field(discriminator="kind")]


class FetchConfig(Config):
    """How raw bytes are brought in and checked. Times in seconds."""

    connect_timeout: float = Field(default=10, gt=0)  # seconds
    idle_timeout: float = Field(default=15, gt=0, description="longest silence within an answer")
    total_timeout: float = Field(default=60, gt=0, description="for one row, all attempts and waits together")
    retries: int = Field(
        default=2, ge=0, description="further attempts after 429, 5xx, broken connections, truncated bodies"
    )
    max_bytes: int = Field(default=256 * 2**20, gt=0)  # of one file; more is a reject
    max_pixels: int = Field(
        default=100_000_000, gt=0, description="of an image or a frame: guards against decompression bombs"
    )
    opt_out: bool = Field(
        True,
        description="leave out media whose answer says noai, noimageai, noindex, noimageindex, none or "
        "tdm-reservation: 1",
    )
    probe_seconds: float = Field(default=30, gt=0, description="deadline for one file")
    part_rows: int = Field(default=1000, ge=1, description="rows of a ledger part, the unit of commit")
    backoff: float = knob(0.5, ge=0, description="first wait between attempts; doubles, with jitter")
    concurrency: int = knob(32, ge=1, description="requests at a time per worker")
    per_host: int = knob(8, ge=1, description="requests at a time per worker to one host; workers do not share it")
    host_interval: float = knob(0.0, ge=0, description="least time between requests of a worker to one host")
    user_agent: str = knob("vc2 (dataset preparation)")  # what servers are told that we are
    connect_to: dict[str, str] = knob({}, description='"host[:port]" of a URL -> "address:port" to connect to instead')
    allow_hosts: tuple[str, ...] = Field(
        (),
        description='hosts ("name" or "name:port") of your own network that URLs may name; others there are refused',
    )


class SampleForm(Config):
    """One training sample: exactly `num_frames` frames of one size, every `stride`-th of the source (an image: 1)."""

    num_frames: int = Field(default=16, ge=1)  # 1: images
    width: int = Field(default=512, ge=8)  # pixels
    height: int = Field(default=320, ge=8)  # pixels
    min_stride: int = Field(default=1, ge=1)  # least source frames from one taken frame to the next
    max_stride: int = Field(default=6, ge=1)  # most source frames from one taken frame to the next
    clips_per_video: int = Field(default=1, ge=1)  # at most; spread over the video
    short_clip: Literal["stride", "hold", "reject"] = Field(
        "stride",
        description="a video too short for the stride drawn: take the largest stride that fits, hold its last frame, "
        "or reject it; one too short for min_stride is rejected unless held",
    )
    codec: Literal["jpeg", "x264"] = Field(
        "jpeg", description="of clips: JPEG frames (fast, each on its own) or an H.264 file (a third of the bytes)"
    )
    jpeg_quality: int = Field(default=95, ge=50, le=100)  # of frames and images
    x264_crf: int = Field(default=15, ge=0, le=40, description="smaller: better")

    @model_validator(mode="after")
    def _strides_in_order(self) -> "SampleForm":
        if self.min_stride > self.max_stride:
            raise ValueError(f"min_stride {self.min_stride} is above max_stride {self.max_stride}")
        if self.codec == "x264" and (self.width % 2 or self.height % 2):
            raise ValueError(f"{self.width} x {self.height} pixels: codec x264 needs even sides")
        return self


class Filters(Config):
    """What a row must be like to become a sample. None: no limit. A score that the source does not give passes."""

    min_side: int = Field(default=32, ge=1, description="shorter side of the source, pixels")
    max_aspect: float | None = Field(default=None, ge=1, description="longer side over shorter, as shown")
    min_duration: float | None = Field(default=None, ge=0, description="of a video, seconds")
    max_duration: float | None = Field(default=None, gt=0, description="of a video, seconds")
    min_caption: int = Field(default=3, ge=1, description="characters")
    max_caption: int | None = Field(default=None, ge=1, description="characters")
    languages: tuple[str, ...] = Field((), description="ISO 639-1 codes a caption may be in; empty: any")
    max_pwatermark: float | None = Field(default=None, ge=0, le=1, description="probability of a watermark (LAION)")
    max_punsafe: float | None = Field(default=None, ge=0, le=1, description="probability of unsafe content (LAION)")
    min_similarity: float | None = Field(default=None, ge=-1, le=1, description="of picture and caption (LAION: CLIP)")
    min_aesthetic: float | None = Field(default=None, ge=0, le=10, description="score (LAION-Aesthetics: 1 to 10)")
    min_motion: float | None = Field(
        default=0.02, ge=0, description="a clip whose frames differ less is still: mean luma difference, 0 to 255"
    )
    cuts: Literal["keep", "reject"] = Field("keep", description="clips with a cut inside")
    near_duplicate_bits: int | None = Field(
        default=3, ge=0, le=7, description="perceptual hashes of 64 bits that differ in as many mark a near duplicate"
    )

    @model_validator(mode="after")
    def _limits_in_order(self) -> "Filters":
        for low, high in (("min_duration", "max_duration"), ("min_caption", "max_caption")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low} {least} is above {high} {most}")
        return self


class ShardStage(Config):
    """A source made into shards."""

    source: Source
    form: SampleForm = SampleForm()
    filters: Filters = Filters()
    fetch: FetchConfig = FetchConfig()
    limit: int | None = Field(None, ge=1, description="only the first rows of the source, in its order")
    samples_per_shard: int = Field(default=1000, ge=1, description="slots of a shard")
    decoder: Literal["decord", "pyav"] = Field(
        default="decord", description="PyAV stands in where decord does not install"
    )
    decode_seconds: float = Field(
        60, gt=0, description="deadline for the clips of one file; a file that misses it is rejected"
    )
    seed: int = Field(0, ge=0)  # of the choice and order of samples
    workers: int | None = knob(None, ge=1, description="shards at a time; default: as many as there are cores")
    launcher: Literal["local", "ray"] = knob(
        "local", description="where the stage runs: in this process, which spreads it over Ray; or as a Ray Job"
    )

    @model_validator(mode="after")
    def _images_have_one_frame(self) -> "ShardStage":
        if self.source.media == "image" and (self.form.num_frames != 1 or self.form.clips_per_video != 1):
            raise ValueError(
                f"source {self.source.name!r} has images: form.num_frames and form.clips_per_video must be 1"
            )
        return self


class Change(Config):
    """How a set differs from its parent."""

    kind: Literal["grow", "retry", "remove"]
    parent: str  #: fingerprint
    reasons: tuple[str, ...] = ()  #: retry: of the rejects that are tried again
    removals: str = ""  #: remove: sha256 of the list, which is an object of the store


class LoaderSettings(Config):
    """How samples are mixed, shuffled and brought in."""

    weights: dict[str, float] = Field(
        {}, description="source -> weight among the sources of its kind; empty: each sample as often as any other"
    )
    shuffle_shards: int = Field(8, ge=1, description="shards whose samples are shuffled among each other")
    holdout: int = Field(0, ge=0, description="samples of each set that are never trained on, kept for validation")
    cache_dir: str | None = knob(
        None,
        description="folder on a local disk for indexes and shards, shared by all ranks; default: in the work folder",
    )
    cache_gib: float = knob(0.0, ge=0, description="shards of a remote store kept in cache_dir; 0: ranged reads alone")
    threads: int = knob(4, ge=1, description="threads per rank that read and decode ahead, at most one a core")
    prefetch_mib: int = knob(256, ge=0, description="frames per rank that are read ahead")
    decode_seconds: float = knob(60, gt=0, description="deadline for a clip out of somebody else's tar")

    @field_validator("weights")
    @classmethod
    def _above_zero(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if not (math.isfinite(weight) and weight >= 1e-6):
                raise ValueError(f"weight of {name!r} must be a number of at least 0.000001; leave the set out instead")
        return value


class LoaderConfig(LoaderSettings):
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


def table_files(source: Source) -> list[RawFile]:
    """The tables of a source, in order; none if it does without.

    Raises:
        SourceError: If there should be some and are none.
    """
    endings = {
        "webvid": (".csv", ".csv.gz"),
        "laion-coco": (".parquet",),
        "laion-aesthetics": (".parquet",),
        "journeydb": (".jsonl", ".jsonl.gz", ".jsonl.tgz", ".tgz", ".tar.gz"),
        "folder": TABLES,
    }
    table = None if isinstance(source, TarSource) else source.table
    return find_files(table, endings[source.kind], f"source {source.name}: table") if table is not None else []


def archive_files(source: Source) -> list[RawFile]:
    """The archives that hold the media of a source, in order of their names; none if it has no archives.

    Raises:
        SourceError: If there should be some and are none, or two would give the same keys.
    """
    if not isinstance(source, JourneyDBSource | TarSource | LaionSource) or source.archives is None:
        return []
    role = f"source {source.name}: archives"
    tables = {file.uri for file in table_files(source)}
    found = [file for file in find_files(source.archives, ARCHIVES, role) if file.uri not in tables]
    if not found:
        raise SourceError(f"{role} {source.archives} holds no archive of media beside the table")
    stems: dict[str, str] = {}
    for file in found:
        if source.embedded and (other := stems.setdefault(archive_stem(file.name), file.uri)) != file.uri:
            raise SourceError(
                f"{role}: {other} and {file.uri} have the same name, which makes the keys of their samples"
            )
    return found


def archive_uris(source: Source) -> list[str]:
    """Where the archives of a source lie, in order; see `archive_files`."""
    return [file.uri for file in archive_files(source)]


def archive_marks(source: Source) -> list[list[Any]]:
    """What tells the archives of a source apart: name and size of each, in order; where names repeat, the whole URI."""
    files = archive_files(source)
    unique = len({file.name for file in files}) == len(files)
    return [[file.name if unique else file.uri, file.size] for file in files]


def archive_stem(name: str) -> str:
    """The name of an archive without folder and ending."""
    name = name.rpartition("/")[2]
    ending = next((ending for ending in ARCHIVES if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def folder_files(source: FolderSource) -> tuple[list[RawFile], list[RawFile]]:
    """Files below the folder in order of their relative paths, hidden ones left out: those that may be media, and the
    captions and tables beside them.

    Raises:
        SourceError: If nothing there may be media.
    """
    role = f"source {source.name}: folder"
    media, beside = [], []
    for file in find_tree(source.folder, role):
        (beside if file.name.lower().endswith(SIDECARS) else media).append(file)
    if not media:
        raise SourceError(f"{role} {source.folder}: {len(beside)} files, none of them media")
    return media, beside


def source_digest(source: Source, cache: Path | None = None) -> str:
    """What a source is made of, as far as it can be told without opening media: the input of a stage's fingerprint.

    Content (see `places.digest_of`) and names of the tables; names and sizes of archives; and, for a folder without a
    table, names and sizes of all files and the content of its captions.

    Args:
        source: The source.
        cache: Folder where digests of large tables are remembered.

    Raises:
        SourceError: If a path of the source is wrong.
    """
    parts: list[Any] = [["table", shown(file.name), digest_of(file, cache)] for file in table_files(source)]
    parts += [["archive", shown(file.name), file.size] for file in archive_files(source)]
    if isinstance(source, WebVidSource) and source.videos is not None:
        _check_folder(source, "videos", source.videos)
    if isinstance(source, FolderSource):
        if source.table is not None:
            _check_folder(source, "folder", source.folder)
        else:
            media, beside = folder_files(source)
            parts += [["file", shown(file.name), file.size] for file in media]
            captions = (file for file in beside if file.name.lower().endswith((".txt", ".json")))
            parts += [["caption", shown(file.name), digest_of(file)] for file in captions]
    if isinstance(source, WebVidSource):
        parts.append(["videos", "fetched" if source.videos is None else "at hand"])
    return digest({"kind": source.kind, "parts": parts})


def _check_folder(source: Source, role: str, place: str) -> None:
    if not scheme_of(place) and not local_path(place).is_dir():
        raise SourceError(f"source {source.name}: {role} {place} is not a folder; check the path")


def ledger_prefix(config: ShardStage, repeat: int = 0, change: str = "", *, tables: str = "") -> str:
    """Where the ledger of a stage lies in the store: shared by all stages that would fetch the same in the same way.

    Args:
        config: The stage.
        repeat: Raised to fetch once more.
        change: Digest of the change that a later generation is made by.
        tables: Digest of the source, where it is known; empty: it is taken here.
    """
    asked = {
        "tables": tables or source_digest(config.source),
        "source": config.source.identity(),
        "fetch": config.fetch.identity(),
        "limit": config.limit,
        "repeat": repeat,
        "change": change,
    }
    return f"ledgers/{config.source.name}/{digest(asked)}"


def shard_fingerprint(
    stage: str,
    config: ShardStage,
    source: str,
    *,
    change: Change | None = None,
    removals: Sequence[str] = (),
    repeat: int = 0,
) -> str:
    """Name of a shard set.

    Args:
        stage: Of the DAG, such as `shard/webvid`.
        config: The stage.
        source: Digest of the source.
        change: How it differs from its parent; None: made from scratch.
        removals: Removal lists that a set made from scratch heeds (`removal_lists`).
        repeat: Raised to make the same set once more.
    """
    inputs = {"source": source} | ({"change": digest(change.identity())} if change else {})
    inputs |= {"removals": digest(sorted(removals))} if removals and change is None else {}
    return fingerprint(stage, STAGE_VERSION, config, inputs, repeat)


def removal_lists(store: Store, source: str) -> tuple[str, ...]:
    """The removal lists that were ever given for a source, by their sha256: whatever is made of it heeds them all."""
    return tuple(sorted(entry.key.rpartition("/")[2] for entry in store.list(f"removals/{source}/")))
