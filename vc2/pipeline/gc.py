"""Garbage collection: what no manifest reaches goes, and what somebody may still need stays.

Everything under `objects/` is *marked* from all manifests of all kinds, from shards that are built of sets that are not
finished, and from attempts at training; what has no mark is garbage. Of runs that nobody works on, train states go
that retention does not keep (`Run.kept`), and heartbeats. Of finished shard sets go the tables that only making them
needed. Nothing younger than the grace period is touched, by the store's own clock, nor any run whose attempt is alive.
Whoever puts a shared file that has been there for long stores it again (`vc2.artifacts.put_object`), so that it is
young when a manifest names it.

    states       train states off the chain or beyond retention, and files of states that were never committed
    objects      shared files that nothing names any more
    parts        parts, verdicts and plans' leftovers of shard sets that have their manifest
    heartbeats   of attempts that have ended
    catalogue    notes and marks of artifacts that are gone
    pages        pages that were made from artifacts and runs that are gone
    probes       what trying a store or a cluster left behind

A file is looked at once more right before it is deleted, so that one that was stored anew in the meantime stays.
Ledgers are never garbage: what was fetched may not be there to be fetched again.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from vc2.artifacts import Manifest, load_manifest, noted_prefix
from vc2.config import Config
from vc2.errors import ConfigError, StoreError
from vc2.progress import Progress, silent
from vc2.storage import Entry, Store, open_store
from vc2.train.attempts import Attempt, Run, StateRef, doomed_keys, is_alive

__all__ = ["CLASSES", "Garbage", "collect_garbage", "find_garbage", "pin", "run_at"]

CLASSES = ("states", "objects", "parts", "heartbeats", "catalogue", "pages", "probes")
HEARTBEATS_KEPT = 1  # of the newest attempt: it says that it has ended
LEFTOVERS = re.compile(r"(parts|verdicts|jobs[^/]*)/[^/]+|(unplanned|unmatched)\.parquet|planned\.json")
ARTIFACTS = re.compile(r"((shards|runs)/.*|(samples|scores|reports)/[^/]+)/manifest\.json")
FINGERPRINT = re.compile(r"[0-9a-f]{64}")
OBJECT = re.compile(rb"objects/([0-9a-f]{64})")
RUN = re.compile(r"runs/([^/]+)/([^/]+)/")


class Garbage(Config):
    """What nobody needs."""

    classes: dict[str, tuple[str, ...]]  # class -> keys, in the order in which they must go
    sizes: dict[str, int]  # class -> bytes
    alive: tuple[str, ...] = ()  # runs that were left alone because somebody works on them

    def among(self, other: "Garbage") -> "Garbage":
        """What both hold. Sizes are upper bounds."""
        told = {name: set(keys) for name, keys in other.classes.items()}
        return self.evolve(
            classes={name: tuple(key for key in keys if key in told[name]) for name, keys in self.classes.items()},
            sizes={name: min(size, other.sizes[name]) for name, size in self.sizes.items()},
        )

    @property
    def is_empty(self) -> bool:
        return not any(self.classes.values())


def collect_garbage(
    store: Store,
    *,
    keep: int = 2,
    grace_hours: float = 24.0,
    dry_run: bool = False,
    shown: Garbage | None = None,
    progress: Progress = silent,
) -> Garbage:
    """Delete what nobody needs, and tell what that was.

    Args:
        store: Where.
        keep: Newest train states that each run keeps at least, whether it is finished or not; one that was asked to
            keep more (`keep_states` of its newest attempt) keeps those.
        grace_hours: What was stored less than so long ago stays.
        dry_run: Delete nothing.
        shown: What a dry run has told: nothing but that goes, as far as it still may. None: all that may go.
        progress: Told about deletions.

    Raises:
        StoreError: If a manifest or an attempt cannot be read; nothing is deleted then, since it may name anything.
    """
    found = find_garbage(store, keep=keep, grace_hours=grace_hours)
    if shown is not None:
        found = found.among(shown)
    if dry_run:
        return found
    keys = [key for name in CLASSES for key in found.classes[name]]
    until = store.now() - grace_hours * 3600
    for done, key in enumerate(keys, 1):
        entry = store.entry(key)
        if entry is not None and entry.modified <= until:
            store.delete(key)
        progress("garbage", done, len(keys))
    return found


def find_garbage(store: Store, *, keep: int = 2, grace_hours: float = 24.0) -> Garbage:
    """What `collect_garbage` would delete."""
    until = store.now() - grace_hours * 3600
    there = _There(store)
    marked, alive = _marked(there), []
    found: dict[str, list[Entry]] = {name: [] for name in CLASSES}
    for run in there.runs:
        newest = run.newest()
        if newest and is_alive(run, newest):
            alive.append(run.prefix)
        elif newest:
            keep_states, keep_every = _retention(run.attempt(newest))
            found["states"] += doomed_keys(run, max(keep, keep_states), keep_every)
            found["heartbeats"] += _old_heartbeats(run, newest)
    for entry in store.list("objects/"):
        if entry.key.removeprefix("objects/") not in marked:
            found["objects"].append(entry)
    found["parts"] += there.leftovers()
    known = {part for prefix in (*there.artifacts, *(run.prefix for run in there.runs)) for part in prefix.split("/")}
    found["catalogue"] += [entry for entry in store.list("catalog/") if noted_prefix(entry.key) not in there.artifacts]
    found["catalogue"] += [entry for entry in store.list("sets/") if _set_marked(entry.key) not in there.artifacts]
    found["pages"] += [entry for entry in store.list("pages/") if not known.issuperset(FINGERPRINT.findall(entry.key))]
    found["probes"] += [*store.list("probe/"), *store.list("rehearsals/")]
    old = {name: [entry for entry in entries if entry.modified <= until] for name, entries in found.items()}
    return Garbage(
        classes={name: tuple(entry.key for entry in entries) for name, entries in old.items()},
        sizes={name: sum(entry.size for entry in entries) for name, entries in old.items()},
        alive=tuple(alive),
    )


def run_at(uri: str) -> tuple[Run, StateRef | None]:
    """The run that a URI means, of its folder, a train state or a checkpoint of it; and the state, if it names one.

    Raises:
        ConfigError: If it is no such URI.
        StoreError: If there is no such run.
    """
    root, found, rest = uri.rstrip("/").rpartition("/runs/")
    match = re.fullmatch(
        r"([^/]+)/([^/]+)(?:/states/(\d+)/(\d+)(?:/manifest\.json)?|/checkpoints/(\d+)(?:/.*)?)?", rest
    )
    if not found or match is None:
        raise ConfigError(
            f"{uri}: no URI of a run; expected <store>/runs/<stage>/<fingerprint>, and for one state "
            "/states/<attempt>/<step> behind it"
        )
    stage, fingerprint, attempt, step, of_checkpoint = match.groups()
    run = Run(open_store(root), stage, fingerprint)
    if not run.newest():
        raise StoreError(f"{uri}: there is no run")
    if of_checkpoint is not None:
        states = [ref for ref in run.states() if ref.step == int(of_checkpoint)]
        if not states:
            raise StoreError(f"{uri}: the train state of that step is gone; the checkpoint needs no pin, it stays")
        return run, states[0]
    return run, StateRef(attempt=int(attempt), step=int(step)) if step is not None else None


def pin(uri: str, *, keep: bool) -> StateRef:
    """Keep the train state that a URI means for good, or no longer.

    Raises:
        ConfigError: If it names no state.
        StoreError: If there is no such state.
    """
    run, ref = run_at(uri)
    if ref is None:
        raise ConfigError(f"{uri}: name a state, .../states/<attempt>/<step>, or the checkpoint of its step")
    if keep:
        run.pin(ref)
    else:
        run.unpin(ref)
    return ref


# ---- marks ----


class _There:
    """What artifacts and runs have in a store, each family listed once, when it is first asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._entries: dict[str, list[Entry]] = {}

    def entries(self, kind: str) -> list[Entry]:
        if kind not in self._entries:
            self._entries[kind] = [*self.store.list(f"{kind}/")]
        return self._entries[kind]

    def keys(self, *kinds: str) -> Iterator[str]:
        return (entry.key for kind in kinds for entry in self.entries(kind))

    @cached_property
    def artifacts(self) -> set[str]:
        """Where there are artifacts."""
        matches = map(ARTIFACTS.fullmatch, self.keys("shards", "runs", "samples", "scores", "reports"))
        return {found[1] for found in matches if found and "/states/" not in found[0]}

    @cached_property
    def finished_sets(self) -> set[str]:
        """Where there are shard sets with their manifest."""
        return {_set_of(key) for key in self.keys("shards") if re.fullmatch(r"shards/[^/]+/[^/]+/manifest\.json", key)}

    @cached_property
    def runs(self) -> list[Run]:
        names = {match.groups() for key in self.keys("runs") if (match := RUN.match(key))}
        return [Run(self.store, stage, fingerprint) for stage, fingerprint in sorted(names)]

    def leftovers(self) -> list[Entry]:
        """What only making shard sets needed."""
        return [
            entry
            for entry in self.entries("shards")
            if _set_of(entry.key) in self.finished_sets and LEFTOVERS.fullmatch("/".join(entry.key.split("/")[3:]))
        ]


def _marked(there: _There) -> set[str]:
    """sha256 of all shared objects that something names."""
    store, marked = there.store, set[str]()
    for key in there.keys("shards"):
        if key.endswith("/manifest.json"):
            marked |= _named(load_manifest(store, key.removesuffix("/manifest.json")))
        elif _set_of(key) not in there.finished_sets and ("/parts/" in key or key.endswith(".json")):
            marked |= _found_in(store.read(key))  # shards that are there of sets that are not, and what was asked
    for entry in store.list("removals/"):
        marked.add(entry.key.rsplit("/", 1)[1])
    for key in there.keys("runs"):
        if re.search(r"/attempts/\d+\.json$", key):
            text = store.read(key)
            _check_attempt(store, key, text)
            marked |= _found_in(text)
        elif re.search(r"/checkpoints/\d+/manifest\.json$", key):
            marked |= _named(load_manifest(store, key.removesuffix("/manifest.json")))
        elif re.search(r"/states/\d+/\d+/manifest\.json$", key):
            _check_state(store, key)
    for key in there.keys("samples", "scores", "reports"):
        if re.fullmatch(r"[^/]+/[^/]+/manifest\.json", key):
            marked |= _named(load_manifest(store, key.removesuffix("/manifest.json")))
        elif key.endswith(".json"):  # groups of sets that are not finished
            marked |= _found_in(store.read(key))
    return marked


def _named(manifest: Manifest) -> set[str]:
    """Objects that a manifest names, among its files and elsewhere; and removal lists, which it names by sha256."""
    found = _found_in(manifest.model_dump_json().encode())
    return found | {str(sha256) for sha256 in manifest.facts.get("removals", ())}


def _found_in(text: bytes) -> set[str]:
    return {match.decode() for match in OBJECT.findall(text)}


def _check_attempt(store: Store, key: str, text: bytes) -> None:
    try:
        Attempt.model_validate_json(text)
    except ValidationError as error:
        raise _unreadable(store, key, error) from None


def _check_state(store: Store, key: str) -> None:
    _, stage, fingerprint, _, attempt, step, _ = key.split("/")
    Run(store, stage, fingerprint).manifest(StateRef(attempt=int(attempt), step=int(step)))


def _unreadable(store: Store, key: str, error: Exception) -> StoreError:
    return StoreError(
        f"{store.uri}/{key}: cannot be read ({str(error).splitlines()[0]}); nothing is deleted while it is unknown "
        "what it names. Mend it or delete it first"
    )


# ---- what is old ----


def _retention(attempt: Attempt) -> tuple[int, int | None]:
    """`keep_states` and `keep_every_steps` of what the ranks were asked."""
    stage = attempt.request.get("stage", {})
    return int(stage.get("keep_states") or 0), int(stage.get("keep_every_steps") or 0) or None


def _old_heartbeats(run: Run, newest: int) -> list[Entry]:
    entries = [entry for entry in run.store.list(f"{run.prefix}/attempts/") if entry.key.endswith(".heartbeat")]
    return [entry for entry in entries if int(Path(entry.key).stem) <= newest - HEARTBEATS_KEPT]


def _set_marked(key: str) -> str:
    """The shard set that a mark under `sets/` is of."""
    return key.replace("sets/", "shards/", 1)


def _set_of(key: str) -> str:
    return "/".join(key.split("/")[:3])
