"""Train states: a snapshot in memory, written to the store behind the step, its manifest last.

Every rank writes the fragments it owns and then a list of its files; the first rank waits for all lists, looks whether
it is still the newest attempt, and commits the manifest. A kill at any moment leaves the state whole or not there.
"""

import json
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from vc2.errors import StoreError
from vc2.launch import Rank
from vc2.train.attempts import Run, StateFile, StateManifest, StateRef, collect
from vc2.train.config import Layout
from vc2.train.ema import Ema
from vc2.train.engine import Engine
from vc2.train.fragments import KINDS, Fragment, read_fragments, write_fragments

__all__ = ["StateWriter", "passing_folder", "restore", "state_files"]

PATIENCE = 600.0  # seconds that the first rank waits for the lists of the others


def passing_folder(run: Run, work: Path) -> Path:
    """Where files of a run's states lie on their way to and from the store; emptied by the next attempt."""
    folder = work / "states" / run.fingerprint[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class StateWriter:
    """Writes the states of one rank of one attempt. One state is under way at a time."""

    def __init__(self, run: Run, attempt: int, layout: Layout, rank: Rank, work: Path, keep: int) -> None:
        self.run, self.attempt, self.layout, self.rank, self.work, self.keep = run, attempt, layout, rank, work, keep
        self.saved_step = -1  # of the last state this attempt began to write
        self.stall = 0.0  # seconds that training has waited for states so far
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise what went wrong behind the step, if anything did."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until the state under way is written, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def save(self, engine: Engine, ema: Ema, facts: Mapping[str, Any], metrics: tuple[str, bytes]) -> None:
        """Copy the state to memory and write it behind the step; waits first for a state still under way.

        Args:
            facts: `step`, `samples` and `window` of the manifest.
            metrics: Key and lines of the training curve, stored before the manifest.
        """
        started = time.perf_counter()
        self.wait()
        shards = {kind: engine.shard(kind) for kind in KINDS if kind != "ema"} | {"ema": ema.shard}
        snapshot = {kind: shard.detach().to("cpu", copy=True) for kind, shard in shards.items()}
        fragments = {kind: engine.fragments(shard) for kind, shard in snapshot.items()}
        facts = dict(facts) | {"ema_updates": ema.updates}
        self.saved_step = facts["step"]
        self._thread = threading.Thread(target=self._write, args=(fragments, facts, metrics), name="state", daemon=True)
        self._thread.start()
        self.stall += time.perf_counter() - started

    def _write(
        self, kinds: Mapping[str, Mapping[Fragment, Tensor]], facts: dict[str, Any], metrics: tuple[str, bytes]
    ) -> None:
        try:
            ref = StateRef(attempt=self.attempt, step=facts["step"])
            prefix = self.run.state_prefix(ref)
            files = [self._upload(prefix, kind, fragments) for kind, fragments in kinds.items()]
            text = json.dumps([file.model_dump() for file in files])
            self.run.store.write(f"{prefix}/rank-{self.rank.rank}.json", text.encode())
            if self.rank.is_first:
                self._commit(prefix, facts, metrics)
        except BaseException as error:
            self._error = error

    def _upload(self, prefix: str, kind: str, fragments: Mapping[Fragment, Tensor]) -> StateFile:
        name = f"rank-{self.rank.rank}-{kind}.safetensors"
        path = passing_folder(self.run, self.work) / f"{self.attempt:04d}-{name}"
        write_fragments(path, fragments)
        found = self.run.store.upload(path, f"{prefix}/{name}")
        path.unlink()
        return StateFile(
            name=name, key=f"{prefix}/{name}", size=found.size, sha256=found.sha256, rank=self.rank.rank, kind=kind
        )

    def _commit(self, prefix: str, facts: dict[str, Any], metrics: tuple[str, bytes]) -> None:
        files = [file for rank in range(self.layout.world_size) for file in self._listed(f"{prefix}/rank-{rank}.json")]
        manifest = StateManifest(attempt=self.attempt, layout=self.layout, files=tuple(files), **facts)
        self.run.ensure_newest(self.attempt)
        self.run.store.write(*metrics)
        self.run.store.write_if_absent(f"{prefix}/manifest.json", manifest.model_dump_json(indent=1).encode())
        collect(self.run, self.keep)

    def _listed(self, key: str) -> list[StateFile]:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return [StateFile.model_validate(file) for file in json.loads(self.run.store.read(key))]
            except KeyError:
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"{key}: not there after {PATIENCE:.0f} s; a rank could not write its state"
                    ) from None
                time.sleep(0.05)


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
    engine.load_fragments({kind: kinds[kind] for kind in KINDS if kind != "ema"}, manifest.step)


@contextmanager
def state_files(
    run: Run, manifest: StateManifest, kind: str, work: Path, *, rank: int | None = None
) -> Iterator[list[Path]]:
    """Local copies, content checked, of a state's files of one kind: those of one rank, or of all."""
    with tempfile.TemporaryDirectory(dir=passing_folder(run, work)) as folder:
        files = [file for file in manifest.files if file.kind == kind and rank in (None, file.rank)]
        for file in files:
            run.store.download(file.key, Path(folder) / file.name, sha256=file.sha256)
        yield [Path(folder) / file.name for file in files]
