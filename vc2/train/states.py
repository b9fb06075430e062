"""Train states: a snapshot in memory, written to the store behind the step, its manifest last.

Every rank sends the fragments it owns, as they lie in host memory, and then a list of its files; the first rank waits
for all lists, looks whether it is still the newest attempt, and commits the manifest. A kill at any moment leaves the
state whole or not there.

One state is under way and one may wait, each in its own buffer of host memory (the second is made when it is first
needed). While the store takes states, a third one waits for its turn and training with it: states that were asked for
are made, unless that takes longer than `patience`; then the newest takes the place of the one that waits. While the
store fails, training goes on: writing is tried again with growing pauses, the state under way is put on the local disk
if there is room, and the newest state takes the place of the one that waits. After `outage_seconds` the newest state
is kept on the local disk and the run ends, before more could be lost; the next attempt on this machine brings it home
(`vc2.train.kept`).
"""

import json
import logging
import random
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vc2.errors import StoreError
from vc2.launch import Rank
from vc2.train.attempts import Run, StateFile, StateManifest, StateRef, collect, commit_state
from vc2.train.config import Layout
from vc2.train.ema import Ema
from vc2.train.engine import Engine
from vc2.train.fragments import KINDS, Fragment, fragment_pieces, read_fragments, write_fragments
from vc2.train.kept import KeptPart, drop_replaced, kept_folder, list_key, passing_folder

__all__ = ["StateWriter", "restore", "state_files"]

log = logging.getLogger(__name__)

LISTS_LATE = 60.0  # seconds after which the first rank finds that the lists of the others are late
PAUSES = (0.5, 30.0)  # seconds between two tries to write a state: after the first, and at most
SENDERS = len(KINDS)  # files of a rank that are sent at once


@dataclass
class Snapshot:
    """A state of one rank in host memory."""

    manifest: StateManifest  # no files yet
    metrics: tuple[str, bytes]
    buffer: int
    kinds: dict[str, dict[Fragment, Tensor]]
    copied: Any = None  # event of the GPU after which the memory holds the state
    stored: dict[str, StateFile] = field(default_factory=dict)  # by kind: what the store has
    tries: int = 0
    is_over: bool = False  # stored, or left out: it needs no place on the disk

    @property
    def ref(self) -> StateRef:
        return self.manifest.ref


class PassedOver(Exception):
    """Another rank has gone on to a later state, so this one will never be whole."""


class StateWriter:
    """Writes the states of one rank of one attempt.

    Args:
        run, attempt, layout, rank: Whose states.
        work: Folder of this machine, for what the store does not take.
        keep: How many of the newest states are kept.
        keep_every: States at multiples of so many steps are kept for good.
        outage_seconds: How long training may go on while the store takes nothing.
        patience: Seconds that training waits at most for the turn of a state, while the others wait for this rank;
            less than what they call a hang.
        overlap: Whether the caller promises to call `settle` before the next update; then training does not wait for
            the copy from a GPU.
    """

    def __init__(
        self,
        run: Run,
        attempt: int,
        layout: Layout,
        rank: Rank,
        work: Path,
        keep: int,
        *,
        keep_every: int | None = None,
        outage_seconds: float = 3600.0,
        patience: float = 900.0,
        overlap: bool = False,
    ) -> None:
        self.run, self.attempt, self.layout, self.rank, self.work = run, attempt, layout, rank, work
        self.keep, self.keep_every, self.outage_seconds, self.overlap = keep, keep_every, outage_seconds, overlap
        self.patience = patience
        self.saved_step = -1  # of the last state this attempt began to write
        self.stall = 0.0  # seconds that training has waited for states so far
        self._buffers: dict[int, dict[str, Tensor]] = {}
        self._stream: Any = None  # of the GPU, for copies
        self._copied: Any = None
        self._changed = threading.Condition()  # guards all below
        self._under_way: Snapshot | None = None
        self._waiting: Snapshot | None = None
        self._is_writing = False
        self._error: BaseException | None = None
        self._trouble: str = ""  # the first thing that went wrong since a state was last written
        self._since = 0.0  # when that was, monotonic
        self._next_warning = 0.0
        self._ended = threading.Event()
        self._on_disk = threading.Lock()  # one thread puts states on the disk
        drop_replaced(run, work, attempt)

    @property
    def is_busy(self) -> bool:
        """Whether a further state would have to wait. In an outage none does: it replaces the one that waits."""
        with self._changed:
            return self._is_writing and not self._trouble

    @property
    def has_failed(self) -> bool:
        """Whether `check` would raise."""
        with self._changed:
            return self._error is not None or self._is_outage_over()

    def check(self) -> None:
        """Raise what went wrong behind the step, if it cannot be mended or lasts for too long.

        Raises:
            Superseded: If a newer attempt has taken over.
            StoreError: If the store has taken nothing for `outage_seconds`; the newest state is kept on this machine.
        """
        with self._changed:
            if self._error is not None:
                raise self._error
            if not self._is_outage_over():
                return
            trouble, minutes = self._trouble, (time.monotonic() - self._since) / 60
        kept = self.keep_newest()
        where = f"the newest one is kept in {kept} on {socket.gethostname()}" if kept else "the newest one is lost"
        raise StoreError(
            f"{self.run.prefix}: no train state could be written for {minutes:.1f} minutes ({trouble}); {where}. Run "
            "again on this machine when the store is back: it goes on from there"
        )

    def wait(self, *, keep_after: float | None = None) -> None:
        """Until all states are written. With `keep_after` the newest is put on the local disk as well if that takes
        longer than so many seconds: a process that was asked to stop may not have the time to wait.

        Raises:
            As `check` does.
        """
        until = None if keep_after is None else time.monotonic() + keep_after
        while self._goes_on():
            if self.has_failed:
                self.check()
            if until is not None and time.monotonic() >= until:
                with self._changed:
                    newest = self._waiting or self._under_way
                self._keep(newest)
                until = None
        self.check()

    def _goes_on(self) -> bool:
        with self._changed:
            if self._is_writing:
                self._changed.wait(0.1)
            return self._is_writing

    # ---- the training thread: copy ----

    def save(self, engine: Engine, ema: Ema, facts: Mapping[str, Any], metrics: tuple[str, bytes]) -> None:
        """Copy the state to host memory and write it behind the step.

        Args:
            facts: `step`, `samples`, `updates`, `window` and `loop` of the manifest.
            metrics: Key and lines of the training curve, stored before the manifest.

        Raises:
            As `check` does.
        """
        started = time.perf_counter()
        self.check()
        self.settle()
        buffer = self._free_buffer()
        facts = {"updates": facts["step"]} | dict(facts)
        manifest = StateManifest(attempt=self.attempt, layout=self.layout, ema_updates=ema.updates, files=(), **facts)
        kinds = self._copy(buffer, engine, ema)
        if not self.overlap:
            self.settle()
        with self._changed:
            self._waiting = Snapshot(manifest, metrics, buffer, kinds, self._copied)
            if not self._is_writing:
                self._is_writing = True
                threading.Thread(target=self._write_all, name="states", daemon=True).start()
        self.saved_step = manifest.step
        self.stall += time.perf_counter() - started

    def settle(self) -> None:
        """Until the last copy is done. What was copied must not change before."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def _free_buffer(self) -> int:
        """A buffer that nothing is written from."""
        until = time.monotonic() + self.patience
        with self._changed:
            while self._waiting is not None and self._error is None and not self._trouble:
                if time.monotonic() >= until:
                    log.warning(
                        "%s: rank %d leaves out the state of step %d: the one before it is still being written after "
                        "%.0f s. The store is too slow for states so close to each other: ask for fewer",
                        self.run.prefix, self.rank.rank, self._waiting.ref.step, self.patience,
                    )  # fmt: skip
                    break
                self._changed.wait(0.1)  # the store is slow: training waits, and says so as `stall`
            self._waiting = None  # in an outage, or with no patience left, the newest state counts
            return 0 if self._under_way is None or self._under_way.buffer == 1 else 1

    def _copy(self, number: int, engine: Engine, ema: Ema) -> dict[str, dict[Fragment, Tensor]]:
        shards = {kind: engine.shard(kind).detach() for kind in KINDS if kind != "ema"} | {"ema": ema.shard}
        if number not in self._buffers:  # once: page-locked memory is dear to get
            self._buffers[number] = {
                kind: torch.empty(shard.shape, dtype=shard.dtype, pin_memory=shard.is_cuda)
                for kind, shard in shards.items()
            }
        buffers = self._buffers[number]
        if not shards["master"].is_cuda:
            for kind, shard in shards.items():
                buffers[kind].copy_(shard)
        else:
            device = shards["master"].device
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the update is done before it is copied
            with torch.cuda.stream(self._stream):
                for kind, shard in shards.items():
                    buffers[kind].copy_(shard, non_blocking=True)
                self._copied = self._stream.record_event()
        return {kind: engine.fragments(buffer) for kind, buffer in buffers.items()}

    # ---- the other thread: write ----

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._under_way, self._waiting = self._waiting, None
                self._is_writing = self._under_way is not None
                self._changed.notify_all()
                if self._under_way is None:
                    return
            try:
                self._write(self._under_way)
            except BaseException as error:
                with self._changed:
                    self._error, self._waiting = error, None

    def _write(self, snapshot: Snapshot) -> None:
        """Until it is written, or given up."""
        if snapshot.copied is not None:
            snapshot.copied.synchronize()
        pause, longest = PAUSES
        while not self._ended.is_set():
            try:
                self._send(snapshot)
                if self.rank.is_first:
                    self._commit(snapshot)
                self._forget_trouble(snapshot)
                if self.rank.is_first or not self._ended.is_set():  # one rank's part alone makes no state yet
                    self._drop_kept(snapshot)
                return
            except PassedOver as reason:
                log.warning("%s: the state of step %d is left out: %s", self.run.prefix, snapshot.ref.step, reason)
                with self._changed:
                    self._trouble = ""  # the store has answered; what comes next has its own time
                self._drop_kept(snapshot)
                return
            except (StoreError, OSError) as error:
                snapshot.tries += 1
                self._note_trouble(snapshot, str(error) or type(error).__name__)
            if snapshot.tries > 1:  # more than a hiccup
                self._keep_if_there_is_room(snapshot)
            self._ended.wait(pause * random.Random().uniform(0.5, 1.0))  # ranks do not all come back at once
            pause = min(2 * pause, longest)

    def _send(self, snapshot: Snapshot) -> None:
        """Store the files of this rank that are not stored yet, and then their list."""
        missing = [kind for kind in KINDS if kind not in snapshot.stored]
        with ThreadPoolExecutor(SENDERS) as senders:
            for sent in [senders.submit(self._send_kind, snapshot, kind) for kind in missing]:
                file = sent.result()
                snapshot.stored[file.kind] = file
        text = json.dumps([snapshot.stored[kind].model_dump() for kind in KINDS])
        self.run.store.write(list_key(self.run, snapshot.ref, self.rank.rank), text.encode())

    def _send_kind(self, snapshot: Snapshot, kind: str) -> StateFile:
        key = self._file_key(snapshot, kind)
        found = self.run.store.upload_pieces(fragment_pieces(snapshot.kinds[kind]), key)
        name = key.rpartition("/")[2]
        return StateFile(name=name, key=key, size=found.size, sha256=found.sha256, rank=self.rank.rank, kind=kind)

    def _file_key(self, snapshot: Snapshot, kind: str) -> str:
        return f"{self.run.state_prefix(snapshot.ref)}/rank-{self.rank.rank}-{kind}.safetensors"

    def _commit(self, snapshot: Snapshot) -> None:
        files = [file for rank in range(self.layout.world_size) for file in self._listed(snapshot, rank)]
        commit_state(self.run, snapshot.manifest.evolve(files=tuple(files)), snapshot.metrics)
        try:
            collect(self.run, self.keep, self.keep_every)
        except StoreError as error:
            log.warning("%s: old states are still there: %s", self.run.prefix, error)

    def _listed(self, snapshot: Snapshot, rank: int) -> list[StateFile]:
        """The files that a rank has stored, once it has."""
        started, pause = time.monotonic(), 0.02
        while not self._ended.is_set():
            try:
                lines = json.loads(self.run.store.read(list_key(self.run, snapshot.ref, rank)))
                return [StateFile.model_validate(line) for line in lines]
            except KeyError:
                if pause > 0.5:
                    self._look_ahead(snapshot, rank)
            if time.monotonic() - started > LISTS_LATE:
                self._note_trouble(snapshot, f"rank {rank} has not stored its part of step {snapshot.ref.step}")
            self._ended.wait(pause)
            pause = min(1.5 * pause, 5.0)
        raise StoreError("given up")

    def _look_ahead(self, snapshot: Snapshot, rank: int) -> None:
        ref = snapshot.ref
        for entry in self.run.store.list(f"{self.run.prefix}/states/{ref.attempt:04d}/"):
            *_, step, name = entry.key.split("/")
            if int(step) > ref.step and name == f"rank-{rank}.json":
                if self.run.store.entry(list_key(self.run, ref, rank)) is not None:
                    return  # both came while this rank looked
                raise PassedOver(f"rank {rank} could not store its part and has gone on to step {int(step)}")

    # ---- outage ----

    def _is_outage_over(self) -> bool:
        return bool(self._trouble) and time.monotonic() - self._since >= self.outage_seconds

    def _note_trouble(self, snapshot: Snapshot, trouble: str) -> None:
        now = time.monotonic()
        with self._changed:
            if not self._trouble:
                self._trouble, self._since, self._next_warning = trouble, now, now
            if now < self._next_warning:
                return
            self._next_warning = now + max(1.0, now - self._since)  # each time it has lasted twice as long
            self._changed.notify_all()
        log.warning(
            "%s: rank %d cannot write its state of step %d, for %.0f s now: %s. Training goes on and it is tried again;"
            " the run ends after %.0f s of this. Look at the store and the network",
            self.run.prefix, self.rank.rank, snapshot.ref.step, now - self._since, trouble, self.outage_seconds,
        )  # fmt: skip

    def _forget_trouble(self, snapshot: Snapshot) -> None:
        with self._changed:
            if self._trouble:
                log.warning("%s: the store takes states again; step %d is there", self.run.prefix, snapshot.ref.step)
            self._trouble = ""

    def keep_newest(self) -> Path | None:
        """Put the newest state that the store does not have on the local disk, and write no more. To be called on all
        ranks when one of them ends because of its store.

        Returns:
            The folder; None if there was nothing to keep, or no room.
        """
        with self._changed:
            newest = self._waiting or self._under_way
            self._ended.set()  # not before: the other thread ends by it, and forgets its states
        return self._keep(newest)

    def _keep(self, newest: Snapshot | None) -> Path | None:
        self.settle()
        if newest is None or not self._keep_if_there_is_room(newest):
            return None
        return kept_folder(self.run, self.work, newest.ref)

    def _keep_if_there_is_room(self, snapshot: Snapshot) -> bool:
        folder = kept_folder(self.run, self.work, snapshot.ref)
        marker = folder / f"rank-{self.rank.rank}.json"
        with self._on_disk:
            if snapshot.is_over:
                return False
            if marker.exists():
                return True
            try:
                files = [self._keep_kind(snapshot, kind, folder) for kind in KINDS]
                part = KeptPart(
                    rank=self.rank.rank,
                    state=snapshot.manifest.evolve(files=tuple(files)),
                    metrics=(snapshot.metrics[0], snapshot.metrics[1].decode()),
                )
                marker.write_text(part.model_dump_json(indent=1))
            except OSError as error:
                for path in folder.glob(f"rank-{self.rank.rank}[-.]*"):
                    path.unlink(missing_ok=True)
                log.warning("%s: the state of step %d stays in memory alone: %s", folder, snapshot.ref.step, error)
                return False
        return True

    def _keep_kind(self, snapshot: Snapshot, kind: str, folder: Path) -> StateFile:
        key = self._file_key(snapshot, kind)
        name = key.rpartition("/")[2]
        found = write_fragments(folder / name, snapshot.kinds[kind])
        return StateFile(name=name, key=key, size=found.size, sha256=found.sha256, rank=self.rank.rank, kind=kind)

    def _drop_kept(self, snapshot: Snapshot) -> None:
        """This rank's part of a state needs no place on the disk any more."""
        with self._on_disk:
            snapshot.is_over = True
            for path in kept_folder(self.run, self.work, snapshot.ref).glob(f"rank-{self.rank.rank}[-.]*"):
                path.unlink(missing_ok=True)


def restore(run: Run, manifest: StateManifest, engine: Engine, ema: Ema, rank: Rank, work: Path) -> None:
    """Put a state into the engine and the average, whatever number of ranks wrote it.

    Raises:
        ShardCorrupted: If a file is not what the manifest says, or the state does not cover this rank's parameters.
    """
    kinds = {}
    same_cut = manifest.layout.world_size == rank.world_size  # then this rank's own files hold all it needs
    for kind in KINDS:
        shard = ema.shard if kind == "ema" else engine.shard(kind)
        kinds[kind] = engine.fragments(shard.new_zeros(shard.shape, device="cpu"))
        with state_files(run, manifest, kind, work, rank=rank.rank if same_cut else None) as paths:
            read_fragments(paths, kinds[kind])
    for fragment, view in engine.fragments(ema.shard).items():
        view.copy_(kinds["ema"][fragment])
    ema.updates = manifest.ema_updates
    # Adam's bias correction counts updates, not steps: a skipped step has moved no moment.
    engine.load_fragments({kind: kinds[kind] for kind in KINDS if kind != "ema"}, manifest.updates)


@contextmanager
def state_files(
    run: Run, manifest: StateManifest, kind: str, work: Path, *, rank: int | None = None
) -> Iterator[list[Path]]:
    """Local copies, content checked, of a state's files of one kind: those of one rank, or of all."""
    files = [file for file in manifest.files if file.kind == kind and rank in (None, file.rank)]
    with tempfile.TemporaryDirectory(dir=passing_folder(run, work), prefix="fetch-") as folder:
        fetch = partial(_fetch, run, Path(folder))
        with ThreadPoolExecutor(SENDERS) as fetchers:
            yield list(fetchers.map(fetch, files))


def _fetch(run: Run, folder: Path, file: StateFile) -> Path:
    run.store.download(file.key, folder / file.name, sha256=file.sha256)
    return folder / file.name
