"""Attempts instead of locks: who may write to a run, and which of its train states count.

    runs/<stage>/<fingerprint>/
      attempts/<n>.json         claimed by a conditional write: attempt n has one holder; names the state it starts from
      attempts/<n>.heartbeat    touched by the holder while it lives
      states/<n>/<step>/        written by attempt n: files first, manifest.json last
      pins/<n>-<step>           such a state is kept for good
      metrics/<n>-<step>.jsonl  one line per logged step, from the step at which attempt n started

The newest attempt is the writer. Readers follow its *chain*: its own states, then those of the attempt it started from
up to the state it started from, and so on. What a replaced writer (a zombie) still writes lies off the chain, is never
read, and is collected. An attempt may be claimed when the newest one has ended, or its holder is known to be dead, or
its heartbeat is older than three intervals by the store's own clock.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vc2.artifacts import FileEntry
from vc2.config import Config
from vc2.errors import ShardCorrupted, StoreError, Vc2Error
from vc2.storage import Entry, Store
from vc2.train.config import Layout

__all__ = [
    "Attempt",
    "Heartbeat",
    "Holder",
    "Run",
    "StateDamaged",
    "StateFile",
    "StateManifest",
    "StateRef",
    "Superseded",
    "collect",
    "commit_state",
    "doomed_keys",
    "is_alive",
    "newest_state",
    "this_process",
    "whole_state",
]

log = logging.getLogger(__name__)

MISSED_BEATS = 3  # intervals of silence after which a holder may be replaced
PIECE = 8 * 2**20  # bytes read at a time when a file is verified


class Superseded(Vc2Error):
    """A newer attempt has taken over this run; nothing was written."""


class StateDamaged(StoreError):
    """A train state that is not what was committed: a part of it is missing, torn or changed.

    A store that does not answer damages nothing: what it holds is as good as before.
    """


class StateRef(Config):
    """A train state of a run."""

    attempt: int
    step: int

    def __hash__(self) -> int:
        return hash((self.attempt, self.step))


class Holder(Config):
    """The process that holds an attempt, told apart from every other one as far as the platform allows."""

    host: str
    pid: int
    place: str = ""  # boot and process namespace: where `pid` means something; empty: not known
    started: str = ""  # start time of the process, in the kernel's own count


class Attempt(Config):
    """One try at a run, from a state to wherever it gets."""

    number: int
    start: StateRef | None
    layout: Layout
    holder: Holder
    heartbeat_seconds: float
    damaged: tuple[str, ...] = ()  # states that were newer than `start` but could not be read, and why
    request: dict[str, Any] = {}  # the resolved configuration of the ranks
    token: str = ""  # drawn by whoever claims: tells its own claim from that of another


class StateFile(FileEntry):
    """The fragments of one kind that one rank holds."""

    rank: int
    kind: str


class StateManifest(Config):
    """What a train state is made of. It exists when this does."""

    attempt: int
    step: int  # batches looked at, whether they changed the weights or not
    samples: int  # clips seen
    ema_updates: int
    updates: int  # optimizer steps that changed the weights: all but the skipped ones
    window: tuple[tuple[float, ...], ...] = ()  # steps since the last line of metrics
    loop: dict[str, float] = {}  # what else the loop remembers
    layout: Layout
    files: tuple[StateFile, ...]

    @property
    def ref(self) -> StateRef:
        return StateRef(attempt=self.attempt, step=self.step)


@dataclass(frozen=True)
class Run:
    """The folder of one training run in a store."""

    store: Store
    stage: str
    fingerprint: str

    @property
    def prefix(self) -> str:
        return f"runs/{self.stage}/{self.fingerprint}"

    def state_prefix(self, ref: StateRef) -> str:
        return f"{self.prefix}/states/{ref.attempt:04d}/{ref.step:08d}"

    def metrics_key(self, attempt: int, start_step: int) -> str:
        return f"{self.prefix}/metrics/{attempt:04d}-{start_step:08d}.jsonl"

    def newest(self) -> int:
        """Number of the newest attempt, 0 where there is none."""
        names = (entry.key.rsplit("/", 1)[1] for entry in self.store.list(f"{self.prefix}/attempts/"))
        return max((int(name[:-5]) for name in names if name.endswith(".json")), default=0)

    def attempt(self, number: int) -> Attempt:
        """What attempt `number` wrote when it was claimed."""
        key = f"{self.prefix}/attempts/{number:04d}.json"
        try:
            return Attempt.model_validate_json(self.store.read(key))
        except (KeyError, ValidationError) as error:
            raise StoreError(
                f"{self.store.uri}/{key}: not an attempt of this version ({str(error).splitlines()[0]})"
            ) from None

    def claim(self, attempt: Attempt) -> bool:
        """Become attempt `attempt.number`; False if another process was first."""
        attempt = attempt.evolve(token=secrets.token_hex(8))
        text = json.dumps(attempt.model_dump(mode="json"), indent=1)
        if self.store.write_if_absent(f"{self.prefix}/attempts/{attempt.number:04d}.json", text.encode()):
            return True
        # An answer that got lost on the way makes the store's client write once more, and then find its own write.
        return self.attempt(attempt.number).token == attempt.token

    def ensure_newest(self, number: int) -> None:
        """Raise `Superseded` unless attempt `number` is still the writer.

        Raises:
            StoreError: If the attempt itself is gone: a mount that is lost looks like an empty folder.
        """
        newest = self.newest()
        if newest > number:
            raise Superseded(f"{self.prefix}: attempt {newest} has taken over from attempt {number}, which stops")
        if newest < number:
            raise StoreError(f"{self.store.uri}/{self.prefix}: attempt {number} is gone; is this the same store?")

    def chain(self) -> Iterator[tuple[int, int | None]]:
        """(attempt, last step of it that counts), newest attempt first; None: all its steps count."""
        number, limit = self.newest(), None
        while number:
            yield number, limit
            start = self.attempt(number).start
            number, limit = (start.attempt, start.step) if start else (0, None)

    def states(self) -> Iterator[StateRef]:
        """Committed states on the chain, newest first."""
        for number, limit in self.chain():
            steps = [ref.step for ref in self._committed(f"{self.prefix}/states/{number:04d}/")]
            for step in sorted(steps, reverse=True):
                if limit is None or step <= limit:
                    yield StateRef(attempt=number, step=step)

    def all_states(self) -> list[StateRef]:
        """Committed states of all attempts, those of zombies included."""
        return list(self._committed(f"{self.prefix}/states/"))

    def manifest(self, ref: StateRef) -> StateManifest:
        """The manifest of a state.

        Raises:
            StateDamaged: If there is none, or it is torn.
            StoreError: If the store does not answer.
        """
        key = f"{self.state_prefix(ref)}/manifest.json"
        try:
            return StateManifest.model_validate_json(self.store.read(key))
        except (KeyError, ValidationError) as error:
            raise StateDamaged(f"{self.store.uri}/{key}: no readable manifest ({str(error).splitlines()[0]})") from None

    def pin(self, ref: StateRef) -> None:
        """Keep a state for good.

        Raises:
            StateDamaged: If there is no such state.
        """
        self.manifest(ref)
        self.store.write(self._pin_key(ref), b"")

    def unpin(self, ref: StateRef) -> None:
        """Let a state go the way of all others."""
        self.store.delete(self._pin_key(ref))

    def pinned(self) -> set[StateRef]:
        """States that are kept whatever else is said."""
        names = (entry.key.rsplit("/", 1)[1] for entry in self.store.list(f"{self.prefix}/pins/"))
        parts = (name.split("-") for name in names)
        return {StateRef(attempt=int(attempt), step=int(step)) for attempt, step in parts}

    def kept(self, keep: int, keep_every: int | None) -> set[StateRef]:
        """States that retention keeps: the newest `keep` on the chain, those of the chain at multiples of `keep_every`
        steps, the pinned ones, and the one that the newest attempt started from."""
        chain = list(self.states())
        start = self.attempt(newest).start if (newest := self.newest()) else None
        spaced = [ref for ref in chain if keep_every and ref.step % keep_every == 0]
        return {*chain[:keep], *spaced, *self.pinned(), *filter(None, [start])}

    def _pin_key(self, ref: StateRef) -> str:
        return f"{self.prefix}/pins/{ref.attempt:04d}-{ref.step:08d}"

    def _committed(self, prefix: str) -> Iterator[StateRef]:
        for entry in self.store.list(prefix):
            if (ref := _ref_of(entry.key)) and entry.key.endswith("/manifest.json"):
                yield ref


def _ref_of(key: str) -> StateRef | None:
    """The state that an object belongs to."""
    found = re.search(r"/states/(\d+)/(\d+)/[^/]+$", key)
    return StateRef(attempt=int(found[1]), step=int(found[2])) if found else None


def commit_state(run: Run, manifest: StateManifest, metrics: tuple[str, bytes] | None) -> None:
    """Make a state exist: its files are all there. The training curve, (key, lines), is stored before it, if known.

    Raises:
        Superseded: If a newer attempt has taken over.
    """
    run.ensure_newest(manifest.attempt)
    if metrics is not None:
        run.store.write(*metrics)
    key = f"{run.state_prefix(manifest.ref)}/manifest.json"
    run.store.write_if_absent(key, manifest.model_dump_json(indent=1).encode())


def newest_state(run: Run, *, at_most: int | None = None) -> tuple[StateManifest | None, list[str]]:
    """The newest state on the chain whose every byte is what its manifest says.

    Args:
        run: The run.
        at_most: Take no state after this step.

    Returns:
        Its manifest, or None where a run starts from its beginning; and a line for every newer state that was damaged.

    Raises:
        StoreError: If the store does not answer. That says nothing about a state, so none is passed over for it.
    """
    damaged = []
    for ref in run.states():
        if at_most is not None and ref.step > at_most:
            continue
        try:
            return whole_state(run, ref), damaged
        except StateDamaged as error:
            damaged.append(f"state {ref.attempt}/{ref.step} is damaged, going back to the one before: {error}")
            log.warning(damaged[-1])
    return None, damaged


def whole_state(run: Run, ref: StateRef) -> StateManifest:
    """The manifest of a state, once every byte of its files is found to be what it says.

    Raises:
        StateDamaged: If one is not.
        StoreError: If the store does not answer.
    """
    manifest = run.manifest(ref)
    for file in manifest.files:
        if damage := _damage(run.store, file):
            raise StateDamaged(damage)
    return manifest


def _damage(store: Store, file: FileEntry) -> str | None:
    entry = store.entry(file.key)
    if entry is None:
        return f"{file.key} is missing"
    if entry.size != file.size:
        return f"{file.key} has {entry.size} bytes, its manifest says {file.size}"
    sha256 = hashlib.sha256()
    try:
        for offset in range(0, file.size, PIECE):
            sha256.update(store.read_range(file.key, offset, min(PIECE, file.size - offset)))
    except KeyError:  # deleted since
        return f"{file.key} is missing"
    except ShardCorrupted as error:  # shorter since
        return str(error)
    if sha256.hexdigest() != file.sha256:
        return f"{file.key} has sha256 {sha256.hexdigest()[:12]}, its manifest says {file.sha256[:12]}"
    return None


def doomed_keys(run: Run, keep: int, keep_every: int | None = None) -> list[Entry]:
    """What retention does not keep, in the order in which it must go: a state is gone when its manifest is.

    That is committed states, those of zombies included, and files of states that were never committed, unless the
    newest attempt may still be writing them: those after its last committed state.
    """
    entries = [(ref, entry) for entry in run.store.list(f"{run.prefix}/states/") if (ref := _ref_of(entry.key))]
    committed = {ref for ref, entry in entries if entry.key.endswith("/manifest.json")}
    kept, newest = run.kept(keep, keep_every), run.newest()
    last = max((ref.step for ref in committed if ref.attempt == newest), default=-1)
    doomed = [
        (ref, entry)
        for ref, entry in entries
        if ref not in kept and (ref in committed or ref.attempt < newest or ref.step < last)
    ]
    doomed.sort(key=lambda item: (item[0].attempt, item[0].step, not item[1].key.endswith("/manifest.json")))
    return [entry for _, entry in doomed]


def collect(run: Run, keep: int, keep_every: int | None = None) -> None:
    """Delete all train states but those that retention keeps (`Run.kept`). For the newest attempt only."""
    for entry in doomed_keys(run, keep, keep_every):
        run.store.delete(entry.key)


# ---- holders ----


def this_process() -> Holder:
    pid = os.getpid()
    return Holder(host=socket.gethostname(), pid=pid, place=_place(), started=_start_time(pid))


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_alive(run: Run, number: int) -> bool:
    """Whether the holder of an attempt must be waited for."""
    attempt = run.attempt(number)
    beat_key = _beat_key(run, number)
    try:
        if json.loads(run.store.read(beat_key)).get("ended"):
            return False
    except (KeyError, ValueError):
        pass  # claimed a moment ago
    holder = attempt.holder
    if holder.place and holder.place == _place() and _start_time(holder.pid) != holder.started:
        return False
    entries = (run.store.entry(f"{run.prefix}/attempts/{number:04d}.json"), run.store.entry(beat_key))
    last = max((entry.modified for entry in entries if entry is not None), default=0.0)
    return run.store.now() - last <= MISSED_BEATS * attempt.heartbeat_seconds


def _beat_key(run: Run, number: int) -> str:
    return f"{run.prefix}/attempts/{number:04d}.heartbeat"


class Heartbeat:
    """Says that the holder of an attempt lives, while a `with` block runs; then that it has ended."""

    def __init__(self, run: Run, number: int, seconds: float) -> None:
        self.run, self.number, self.seconds = run, number, seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._write({"ended": True})

    def _beat(self) -> None:
        while True:
            self._write({"ended": False})
            if self._ended.wait(self.seconds):
                return

    def _write(self, state: Mapping[str, bool]) -> None:
        try:
            self.run.store.write(_beat_key(self.run, self.number), json.dumps(state).encode())
        except StoreError as error:  # a store that is away for a moment is no reason to stop
            log.warning("heartbeat of attempt %d: %s", self.number, error)
