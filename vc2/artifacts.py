"""Artifacts: what stages hand on. An artifact exists when its manifest does, and is named by what went into it.

The *fingerprint* is the sha256 of (stage, stage version, config without knobs, fingerprints of the inputs, repeat): it
can be computed before anything runs. The *content digest* is taken from what came out (names and sha256 of the files,
counts; no times, no hosts). Data is written first, the manifest last, by `Store.write_if_absent`: of two writers one
wins and the other adopts the winner's result.

    shards/<source>/<fingerprint>/manifest.json          ShardSet
    runs/<stage>/<fingerprint>/checkpoints/<step>/...    Checkpoint
    samples|scores|reports/<fingerprint>/manifest.json   SampleSet, Scorecard, Report
    objects/<sha256>                                     files that several artifacts share
    catalog/<folder>/<time, descending>-<name>.json      a note of each artifact, the newest first in a listing

The *catalogue* is a hint and never the truth: it lets a reader look at the newest artifacts of a kind without opening
all manifests. A note may be missing, or tell of an artifact that is gone.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from vc2.config import Config, digest
from vc2.errors import ShardCorrupted, StoreError
from vc2.storage import Store, join_uri, located

__all__ = [
    "Artifact",
    "Checkpoint",
    "FileEntry",
    "Manifest",
    "Note",
    "Report",
    "SampleSet",
    "Scorecard",
    "ShardSet",
    "checkpoint_prefix",
    "commit",
    "environment",
    "find",
    "fingerprint",
    "folder_of",
    "is_there",
    "load_manifest",
    "newest_notes",
    "noted_prefix",
    "notes_of",
    "put_file",
    "put_object",
    "shard_set_prefix",
    "verify",
]

log = logging.getLogger(__name__)

FRESH = 12 * 3600  # seconds in which an object counts as just stored; less than the grace period of `vc2 gc`

Kind = Literal["shard_set", "checkpoint", "sample_set", "scorecard", "report"]


class FileEntry(Config):
    """A file of an artifact: `key` is relative to the store, so shared objects and own files look alike; of files that
    are not its own, such as tars made by others, it is an absolute path or URI (`storage.located`)."""

    name: str
    key: str
    size: int
    sha256: str


class Artifact(Config):
    """A small reference to a finished artifact; this is all that stages hand on."""

    kind: Kind
    uri: str  #: where the manifest's folder is: <store>/<prefix>
    prefix: str
    fingerprint: str
    content_digest: str
    counts: dict[str, int] = {}
    facts: dict[str, Any] = {}


class ShardSet(Artifact):
    """A source made into shards."""


class Checkpoint(Artifact):
    """Finished weights of a training run at a step."""

    @property
    def step(self) -> int:
        return int(self.prefix.rsplit("/", 1)[-1])


class SampleSet(Artifact):
    """Videos generated from a checkpoint."""


class Scorecard(Artifact):
    """Scores of a sample set."""


class Report(Artifact):
    """A page that shows it all."""


KINDS: dict[Kind, type[Artifact]] = {
    "shard_set": ShardSet,
    "checkpoint": Checkpoint,
    "sample_set": SampleSet,
    "scorecard": Scorecard,
    "report": Report,
}


class Manifest(Config):
    """Everything known about an artifact. Written last, once, never changed."""

    kind: Kind
    stage: str
    stage_version: int
    fingerprint: str
    repeat: int = 0
    config: dict[str, Any]
    inputs: dict[str, Artifact]
    files: tuple[FileEntry, ...]
    counts: dict[str, int] = {}
    facts: dict[str, Any] = {}  #: what was found and how it was done: layout, losses, versions of tools
    licenses: dict[str, str] = {}
    content_digest: str = ""
    environment: dict[str, str] = {}
    created_at: str = ""
    seconds: float = 0.0

    def file(self, name: str) -> FileEntry:
        """The entry of a file by its name in the artifact."""
        for entry in self.files:
            if entry.name == name:
                return entry
        raise StoreError(
            f"artifact {self.fingerprint[:12]} has no file {name!r}; it has {[e.name for e in self.files][:8]}"
        )

    def digest_of_content(self) -> str:
        """sha256 over names and digests of the files and the counts: equal content, equal digest."""
        return digest({"files": sorted([entry.name, entry.sha256] for entry in self.files), "counts": self.counts})

    def reference(self, store: Store, prefix: str) -> Artifact:
        return KINDS[self.kind](
            kind=self.kind,
            uri=join_uri(store.uri, prefix),
            prefix=prefix,
            fingerprint=self.fingerprint,
            content_digest=self.content_digest,
            counts=self.counts,
            facts={},
        )


def fingerprint(
    stage: str, version: int, config: Mapping[str, Any] | Config, inputs: Mapping[str, str], repeat: int = 0
) -> str:
    """The name of what a stage will make, computable before it runs.

    Args:
        stage: Name of the stage.
        version: Hand-kept integer of the stage, raised when its results change.
        config: What was asked for; the knobs of a `Config` are left out.
        inputs: Fingerprints (or digests of raw tables) of the inputs by role.
        repeat: Raised to make the same thing once more.
    """
    plain = config.identity() if isinstance(config, Config) else dict(config)
    return digest({"stage": stage, "version": version, "config": plain, "inputs": dict(inputs), "repeat": repeat})


def shard_set_prefix(source: str, name: str) -> str:
    return f"shards/{source}/{name}"


def checkpoint_prefix(stage: str, run: str, step: int) -> str:
    return f"runs/{stage}/{run}/checkpoints/{step:08d}"


def environment() -> dict[str, str]:
    """Versions of what the result was made with: recorded in manifests, never fingerprinted."""
    from importlib import metadata

    names = (
        "vc2",
        "torch",
        "numpy",
        "ray",
        "deepspeed",
        "decord",
        "av",
        "pillow",
        "pyarrow",
        "open_clip_torch",
        "diffusers",
    )
    versions = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def put_object(store: Store, path: Path, name: str) -> FileEntry:
    """Store a local file by its content, once however often it is put; after a while again, so that garbage collection
    does not take it for old before a manifest names it."""
    from vc2.storage import file_digest

    found = file_digest(path)
    key = f"objects/{found.sha256}"
    stored = store.entry(key)
    if stored is None or stored.size != found.size or store.now() - stored.modified > FRESH:
        store.upload(path, key)
    return FileEntry(name=name, key=key, size=found.size, sha256=found.sha256)


def put_file(store: Store, prefix: str, name: str, data: bytes) -> FileEntry:
    """Store a small file inside an artifact's own folder."""
    key = f"{prefix}/{name}"
    store.write(key, data)
    return FileEntry(name=name, key=key, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def commit(store: Store, prefix: str, manifest: Manifest) -> Artifact:
    """Make an artifact exist: write its manifest, or adopt the one that another writer was first to write."""
    if not manifest.content_digest:
        manifest = manifest.evolve(content_digest=manifest.digest_of_content())
    if not manifest.created_at:
        manifest = manifest.evolve(created_at=datetime.now(UTC).isoformat(timespec="seconds"))
    if not manifest.environment:
        manifest = manifest.evolve(environment=environment())
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True)
    if store.write_if_absent(f"{prefix}/manifest.json", text.encode()):
        _catalogue(store, Note.of(prefix, manifest))
        return manifest.reference(store, prefix)
    return load_manifest(store, prefix).reference(store, prefix)


def load_manifest(store: Store, prefix: str) -> Manifest:
    """The manifest in a folder of the store.

    Raises:
        StoreError: If there is none, or it is no manifest.
    """
    place = join_uri(store.uri, f"{prefix}/manifest.json")
    try:
        return Manifest.model_validate_json(store.read(f"{prefix}/manifest.json"))
    except KeyError:
        raise StoreError(f"{place}: no manifest, so this artifact does not exist (yet)") from None
    except ValueError as error:
        raise StoreError(f"{place}: not a manifest of this version ({str(error).splitlines()[0]})") from None


A = TypeVar("A", bound=Artifact)


def find(store: Store, prefix: str, kind: type[A]) -> A | None:
    """The reference of a finished artifact, or None where there is none yet."""
    if store.entry(f"{prefix}/manifest.json") is None:
        return None
    found = load_manifest(store, prefix).reference(store, prefix)
    if not isinstance(found, kind):
        raise StoreError(f"{found.uri} is a {found.kind}; expected a {kind.__name__}")
    return found


# ---- the catalogue ----

LONG = 4096  # characters of a fact that a note leaves out
LAST_ONLY, WHOLE = ("generations",), ("removals",)  # facts of which a note has the last item, or all, however long
LISTED = 2000  # keys that are looked at for artifacts that have no notes
MOST = 120  # notes that are read in search of some, at most
READERS = 8  # notes read at a time
CENTURIES = 10**10  # seconds; what is counted down from


class Note(Config):
    """What the catalogue says of an artifact: its manifest without files, environment and long facts."""

    prefix: str
    size: int  # bytes of its files, shared ones included
    manifest: Manifest

    @classmethod
    def of(cls, prefix: str, manifest: Manifest) -> "Note":
        facts = {name: value[-1:] if name in LAST_ONLY else value for name, value in manifest.facts.items()}
        facts = {name: value for name, value in facts.items() if name in WHOLE or _length(value) < LONG}
        size = sum(entry.size for entry in manifest.files)
        return cls(prefix=prefix, size=size, manifest=manifest.evolve(files=(), environment={}, facts=facts))

    @property
    def key(self) -> str:
        """Where it is kept. What was made last sorts first."""
        made, folder = datetime.fromisoformat(self.manifest.created_at).timestamp(), folder_of(self.prefix)
        name = self.prefix.removeprefix(f"{folder}/").replace("/", ",")
        return f"catalog/{folder}/{CENTURIES - int(made):010d}-{name}.json"


def newest_notes(store: Store, folder: str, limit: int = 30, *, stage: str = "") -> list[Note]:
    """Of the artifacts in a folder (`shards/webvid`, `runs/full`, `reports`) the ones made last, the newest first; only
    those that `stage` made, if it is named."""
    notes = (note for note in notes_of(store, folder, at_once=limit) if stage in ("", note.manifest.stage))
    return list(islice(notes, limit))


def notes_of(store: Store, folder: str, *, at_once: int = 30) -> Iterator[Note]:
    """The artifacts in a folder, the newest first, as far as somebody asks on, up to a bound: few keys are listed and
    few objects read, however many there are.

    Those that have no note follow, as in a store from before the catalogue: a bounded listing finds their manifests.

    Args:
        store: Where.
        folder: As of `folder_of`.
        at_once: How many are read together.
    """
    noted: list[str] = []

    def keys() -> Iterator[str]:
        for entry in islice(store.list(f"catalog/{folder}/"), MOST):
            noted.append(entry.key)
            yield entry.key

    yield from _read_all(store, keys(), _read_note, at_once)
    known = {f"{noted_prefix(key)}/manifest.json" for key in noted}
    if len(noted) < MOST:
        entries = (entry for entry in islice(store.list(f"{folder}/"), LISTED) if _is_manifest_key(entry.key))
        rest = sorted((entry for entry in entries if entry.key not in known), key=lambda entry: -entry.modified)
        manifests = (entry.key for entry in rest[: MOST - len(noted)])
        yield from _read_all(store, manifests, _read_manifest, at_once)


def _read_all(
    store: Store, keys: Iterator[str], read: Callable[[Store, str], Note | None], at_once: int
) -> Iterator[Note]:
    while some := list(islice(keys, at_once)):
        with ThreadPoolExecutor(READERS) as pool:
            yield from filter(None, [*pool.map(partial(read, store), some)])


def noted_prefix(key: str) -> str:
    """The artifact that a note of the catalogue tells of, by the note's key alone."""
    folder, _, name = key.removeprefix("catalog/").rpartition("/")
    return f"{folder}/{name.partition('-')[2].removesuffix('.json').replace(',', '/')}"


def is_there(store: Store, prefix: str) -> bool:
    """Whether an artifact exists."""
    return store.entry(f"{prefix}/manifest.json") is not None


def _catalogue(store: Store, note: Note) -> None:
    try:
        store.write(note.key, note.model_dump_json().encode())
    except (StoreError, OSError) as error:  # the artifact is there: a hint that is not is no reason to fail
        log.warning("%s is in no catalogue: %s", note.prefix, error)


def folder_of(prefix: str) -> str:
    """Where in the catalogue an artifact is noted: beside those of the same source or training stage."""
    parts = prefix.split("/")
    return "/".join(parts[: 2 if parts[0] in ("shards", "runs") else 1])


def _length(value: Any) -> int:
    return len(json.dumps(value, default=str))


def _is_manifest_key(key: str) -> bool:
    return key.endswith("/manifest.json") and "/states/" not in key


def _read_note(store: Store, key: str) -> Note | None:
    try:
        return Note.model_validate_json(store.read(key))
    except (KeyError, ValueError):
        return None


def _read_manifest(store: Store, key: str) -> Note | None:
    prefix = key.removesuffix("/manifest.json")
    try:
        return Note.of(prefix, load_manifest(store, prefix))
    except StoreError:
        return None


def verify(store: Store, prefix: str) -> Iterable[str]:
    """Re-derive every digest of an artifact; yields one line per thing that is wrong."""
    manifest = load_manifest(store, prefix)
    if manifest.digest_of_content() != manifest.content_digest:
        yield f"{prefix}/manifest.json: content digest is not that of its files"
    for entry in manifest.files:
        try:
            place, key = located(store, entry.key)
            data = place.entry(key)
            if data is None:
                yield f"{entry.name}: {entry.key} is missing"
            elif data.size != entry.size:
                yield f"{entry.name}: {data.size} bytes, manifest says {entry.size}"
            elif (found := _stored_sha256(place, key, entry.size)) != entry.sha256:
                yield f"{entry.name}: sha256 {found[:12]}, manifest says {entry.sha256[:12]}"
        except (KeyError, ShardCorrupted) as error:
            yield f"{entry.name}: {error}"


def _stored_sha256(store: Store, key: str, size: int) -> str:
    sha256, step = hashlib.sha256(), 8 * 2**20
    for offset in range(0, size, step):
        sha256.update(store.read_range(key, offset, min(step, size - offset)))
    return sha256.hexdigest()
