"""Attempts instead of locks: who may write to a run, and which of its train states count.

    runs/<stage>/<fingerprint>/
      attempts/<n>.json         claimed by a conditional write: attempt n has one holder; names the state it starts from
      attempts/<n>.heartbeat    touched by the holder while it lives
      states/<n>/<step>/        written by attempt n: files first, manifest.json last
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
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vc2.artifacts import FileEntry
from vc2.config import Config
from vc2.errors import StoreError, Vc2Error
from vc2.storage import Store
from vc2.train.config import Layout

__all__ = [
    "Attempt",
    "Heartbeat",
    "Holder",
    "Run",
    "StateFile",
    "StateManifest",
    "StateRef",
    "Superseded",
    "collect",
    "is_alive",
    "newest_state",
    "this_process",
]

log = logging.getLogger(__name__)

MISSED_BEATS = 3  # intervals of silence after which a holder may be replaced
PIECE = 8 * 2**20  # bytes read at a time when a file is verified


class Superseded(Vc2Error):
    """A newer attempt has taken over this run; nothing was written."""


class StateRef(Config):
    """A train state of a run."""

    attempt: int
    step: int


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


class StateFile(FileEntry):
    """The fragments of one kind that one rank holds."""

    rank: int
    kind: str


class StateManifest(Config):
    """What a train state is made of. It exists when this does."""

    attempt: int
    step: int  # optimizer steps taken
    samples: int  # clips seen
    ema_updates: int
    window: tuple[tuple[float, ...], ...] = ()  # steps since the last line of metrics
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
        text = json.dumps(attempt.model_dump(mode="json"), indent=1)
        return self.store.write_if_absent(f"{self.prefix}/attempts/{attempt.number:04d}.json", text.encode())

    def ensure_newest(self, number: int) -> None:
        """Raise `Superseded` unless attempt `number` is still the writer."""
        if (newest := self.newest()) != number:
            raise Superseded(f"{self.prefix}: attempt {newest} has taken over from attempt {number}, which stops")

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
            StoreError: If there is none, or it cannot be read.
        """
        key = f"{self.state_prefix(ref)}/manifest.json"
        try:
            return StateManifest.model_validate_json(self.store.read(key))
        except (KeyError, ValidationError) as error:
            raise StoreError(f"{self.store.uri}/{key}: no readable manifest ({str(error).splitlines()[0]})") from None

    def _committed(self, prefix: str) -> Iterator[StateRef]:
        for entry in self.store.list(prefix):
            if found := re.search(r"/states/(\d+)/(\d+)/manifest\.json$", entry.key):
                yield StateRef(attempt=int(found[1]), step=int(found[2]))


def newest_state(run: Run, *, at_most: int | None = None) -> tuple[StateManifest | None, list[str]]:
    """The newest state on the chain whose every byte is what its manifest says.

    Args:
        run: The run.
        at_most: Take no state after this step.

    Returns:
        Its manifest, or None where a run starts from its beginning; and a line for every newer state that was damaged.
    """
    damaged = []
    for ref in run.states():
        if at_most is not None and ref.step > at_most:
            continue
        try:
            manifest = run.manifest(ref)
            trouble = next((line for file in manifest.files if (line := _damage(run.store, file))), None)
            if trouble is None:
                return manifest, damaged
        except StoreError as error:
            trouble = str(error)
        damaged.append(f"state {ref.attempt}/{ref.step} is damaged, going back to the one before: {trouble}")
        log.warning(damaged[-1])
    return None, damaged


def _damage(store: Store, file: FileEntry) -> str | None:
    entry = store.entry(file.key)
    if entry is None:
        return f"{file.key} is missing"
    if entry.size != file.size:
        return f"{file.key} has {entry.size} bytes, its manifest says {file.size}"
    sha256 = hashlib.sha256()
    for offset in range(0, file.size, PIECE):
        sha256.update(store.read_range(file.key, offset, min(PIECE, file.size - offset)))
    if sha256.hexdigest() != file.sha256:
        return f"{file.key} has sha256 {sha256.hexdigest()[:12]}, its manifest says {file.sha256[:12]}"
    return None


def collect(run: Run, keep: int) -> None:
    """Delete all train states but the newest `keep` on the chain, those of zombies too. For the newest attempt only."""
    kept = [ref for ref, _ in zip(run.states(), range(keep), strict=False)]
    for ref in run.all_states():
        if ref not in kept:
            prefix = f"{run.state_prefix(ref)}/"
            run.store.delete(f"{prefix}manifest.json")  # first: a state without one does not exist
            for entry in list(run.store.list(prefix)):
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
