"""One shard set by itself: of a source of a recipe or of one's own, from scratch or as a further generation.

What is wanted is decided by what the store holds. The newest set of this very source is found. Where there is one of
the same settings whose source has only grown since, the new rows become a generation of it. Else a set is made from
scratch.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

from vc2.artifacts import ShardSet, find, shard_set_prefix
from vc2.config import Config
from vc2.data.config import (
    ARCHIVES,
    SOURCE_NAME,
    TABLES,
    Change,
    FolderSource,
    JourneyDBSource,
    LaionSource,
    ShardStage,
    Source,
    TarSource,
    WebVidSource,
    removal_lists,
    shard_fingerprint,
    source_digest,
)
from vc2.data.places import find_files, scheme_of
from vc2.errors import ConfigError, SourceError
from vc2.miniature.config import WorldConfig
from vc2.pipeline.recipes import PipelineConfig, world_folder
from vc2.progress import Progress, silent
from vc2.storage import Store

__all__ = [
    "ShardRequest",
    "SourceKind",
    "make_shards",
    "name_of",
    "own_source",
    "prepare_where_asked",
    "ready",
    "ready_source",
    "unused_repeat",
]

SourceKind = Literal["webvid", "laion-coco", "laion-aesthetics", "journeydb", "webdataset", "folder"]


class ShardRequest(Config):
    """What is wanted of a shard set beside its settings."""

    retry: tuple[str, ...] = ()  #: reasons whose rejects are tried again
    remove: str = ""  #: file with a key, URL, path or sha256 of a source a line
    fresh: bool = False  #: from scratch, though an earlier set could grow
    repeat: int = 0  #: raised to make the same set once more
    only: tuple[int, int] | None = None  #: first and last of the shards to build


def unused_repeat(name: str, stage: ShardStage, store: Store) -> int:
    """The smallest `repeat` under which there is no set of this source yet."""
    source, repeat = source_digest(stage.source), 0
    while find(
        store, shard_set_prefix(stage.source.name, shard_fingerprint(name, stage, source, repeat=repeat)), ShardSet
    ):
        repeat += 1
    return repeat


def ready_source(
    config: PipelineConfig, stage: ShardStage, work: Path, progress: Progress
) -> AbstractContextManager[ShardStage]:
    """A stage of a recipe whose raw data is there; see `ready`."""
    return ready(config.world, stage, work, progress)


@contextmanager
def ready(
    world: WorldConfig | None, stage: ShardStage, work: Path, progress: Progress, *, host: str = "127.0.0.1"
) -> Iterator[ShardStage]:
    """A stage whose raw data is there: a small world is made first, and its web served meanwhile, at `host`."""
    if world is None:
        yield stage
        return
    from vc2.miniature.server import serve
    from vc2.miniature.world import IMAGE_HOST, make_world

    root = world_folder(world, work)
    progress("small world", 0, 1)
    make_world(world, root)
    progress("small world", 1, 1)
    if stage.source.kind != "laion-coco":
        yield stage
        return
    with serve(root, host=host) as address:
        yield stage.evolve(fetch=stage.fetch.evolve(connect_to={IMAGE_HOST: address}))


def make_shards(
    name: str,
    stage: ShardStage,
    store: Store,
    work: Path,
    request: ShardRequest,
    *,
    source: str = "",
    world: WorldConfig | None = None,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda text: None,
) -> ShardSet | None:
    """The shard set that a request means: found, finished or made.

    Args:
        name: Of the stage, such as `shard/webvid`.
        stage: Its settings.
        store: Where sets are.
        work: For temporary files.
        request: What is wanted.
        source: Digest that stands for the source; empty: of the raw data.
        world: The small world that the raw data is of: a Ray Job makes its own.
        progress: Told what is being done.
        note: Told, in a line, which way was chosen.

    Returns:
        None if only some shards were asked for and others are still to be built.

    Raises:
        ConfigError: If there is no set to retry or to remove from, or nothing to retry.
    """
    work.mkdir(parents=True, exist_ok=True)
    now = source_digest(stage.source, work / "digests")
    change = _change(name, stage, store, request, source, now, note)
    if isinstance(change, ShardSet):
        return change
    digest = source if source and change is None else now
    removals = removal_lists(store, stage.source.name)
    return prepare_where_asked(
        stage,
        store,
        work,
        world=world,
        fingerprint=shard_fingerprint(name, stage, digest, change=change, removals=removals, repeat=request.repeat),
        change=change,
        removals=removals,
        repeat=request.repeat,
        only=range(request.only[0], request.only[1] + 1) if request.only else None,
        progress=progress,
    )


def prepare_where_asked(
    stage: ShardStage, store: Store, work: Path, *, world: WorldConfig | None, **asked: Any
) -> ShardSet | None:
    """`vc2.data.prepare.prepare`, in this process or as a Ray Job."""
    if stage.launcher == "ray":
        from vc2.pipeline.remote import prepare_as_job

        return prepare_as_job(stage, store, work, world=world, **asked)
    from vc2.data.prepare import prepare

    return prepare(stage, store, work, **asked)


def _change(
    name: str,
    stage: ShardStage,
    store: Store,
    request: ShardRequest,
    source: str,
    now: str,
    note: Callable[[str], None],
) -> Change | ShardSet | None:
    """The change to an earlier set that is meant; None: a set from scratch; or the finished set itself."""
    from vc2.data.generations import Parent, check_grown, latest_set, retry_reasons

    if request.retry or request.remove:
        parent = latest_set(store, stage)
        if parent is None:
            raise ConfigError(
                f"{name}: {store.uri} has no finished set of this source in this form; make it first, or look at the "
                "settings (another form, filter or limit is another set)"
            )
        if request.remove:
            removals = _stored_list(store, request.remove, stage.source.name)
            return Change(kind="remove", parent=parent.fingerprint, removals=removals)
        reasons = retry_reasons(Parent.of(store, stage.source.name, parent.fingerprint), request.retry)
        note(f"a generation of {parent.uri}")
        return Change(kind="retry", parent=parent.fingerprint, reasons=reasons)
    removals = removal_lists(store, stage.source.name)
    plain = shard_fingerprint(name, stage, source or now, removals=removals, repeat=request.repeat)
    prefix = shard_set_prefix(stage.source.name, plain)
    if request.fresh or source or request.repeat:
        return None
    if (same := latest_set(store, stage, source_digest=now)) is not None:
        return same  # made from scratch, or grown, retried or stripped since
    if find(store, prefix, ShardSet) is not None:
        return None
    if (parent := latest_set(store, stage)) is None:
        return None
    try:
        if not check_grown(Parent.of(store, stage.source.name, parent.fingerprint), stage):
            note("the source has other files than before, but no new rows (--fresh makes a new set)")
            return parent
    except SourceError as error:
        note(f"from scratch: {error}")
        return None
    note(f"the source has grown: a generation of {parent.uri}")
    return Change(kind="grow", parent=parent.fingerprint)


def _stored_list(store: Store, path: str, source: str) -> str:
    """Put a removal list into the store, for all that is made of this source from now on; its sha256."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--remove {path}: not a readable text file ({error})") from None
    lines = sorted({line.strip() for line in text.splitlines() if line.strip()})
    if not lines:
        raise ConfigError(f"--remove {path} is empty; expected a key, URL, path or sha256 a line")
    data = "\n".join(lines).encode()
    sha256 = hashlib.sha256(data).hexdigest()
    store.write(f"objects/{sha256}", data)
    store.write(f"removals/{source}/{sha256}", b"")
    return sha256


def own_source(
    place: str, *, kind: SourceKind | None, media: Literal["video", "image"] | None, table: str | None, name: str | None
) -> Source:
    """The source that a path or URI means.

    Args:
        place: A folder of media, a table, a tar, or a folder of tars.
        kind: Its format; None: told by what is there.
        media: What it holds, where the format does not say.
        table: Of a folder: where its captions stand.
        name: Of the source; None: that of the place.

    Raises:
        ConfigError: If something is missing or contradictory.
    """
    local = not scheme_of(place)
    path = Path(place).expanduser()
    if local and not path.exists() and "{" not in place:
        raise ConfigError(f"{place}: no such folder or file, and no source of that name (webvid, laion-coco, jdb)")
    lower = place.lower().rstrip("/")
    if kind is None:
        is_tars = lower.endswith(ARCHIVES) or (local and path.is_dir() and _holds(path, ARCHIVES))
        kind = "webdataset" if is_tars else "folder"
    where = str(path.absolute()) if local else place
    name = name or name_of(place)
    if re.fullmatch(SOURCE_NAME, name) is None:
        raise ConfigError(
            f"--name {name!r}: a name is of a to z, 0 to 9, - and _, at most 64, and begins with neither - nor _"
        )
    if kind == "webvid":
        return WebVidSource(name=name, table=where)
    if kind in ("laion-coco", "laion-aesthetics"):
        if lower.endswith(ARCHIVES) or (local and path.is_dir() and _holds(path, ARCHIVES)):
            return LaionSource(kind=kind, name=name, archives=where)
        return LaionSource(kind=kind, name=name, table=where)
    if kind == "journeydb":
        if table is None:
            raise ConfigError("journeydb needs --table, the .jsonl or .tgz with the annotations")
        return JourneyDBSource(name=name, table=table, archives=where)
    if media is None:
        raise ConfigError("a source of your own needs --media video or --media image")
    if kind == "webdataset":
        return TarSource(name=name, media=media, archives=where)
    if lower.endswith(TABLES):
        if table is not None:
            raise ConfigError(f"{place} is a table already; leave out --table")
        return FolderSource(name=name, media=media, folder=where.rpartition("/")[0], table=where)
    if table is not None and not find_files(table, TABLES, "table"):
        raise ConfigError(f"--table {table}: expected {' '.join(TABLES)}")
    return FolderSource(name=name, media=media, folder=where, table=table)


def _holds(folder: Path, endings: tuple[str, ...]) -> bool:
    return any(entry.name.lower().endswith(endings) for entry in folder.iterdir())


def name_of(place: str) -> str:
    """A name for a source that lies at a path or URI."""
    path = place if scheme_of(place) else str(Path(place).expanduser().absolute())
    stem = path.lower().partition("{")[0].rstrip("/").rpartition("/")[2].partition(".")[0]
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in stem).strip("-")[:64] or "own"
