"""Train states on a local disk: where they wait for a store that is away, and how the next attempt brings them home.

    <work>/states/<run>/<attempt>/<step>/rank-<r>-<kind>.safetensors    as they would lie in the store
                                         rank-<r>.json                  last: this rank's part is whole

A rank whose state the store does not take puts it there. When the run is started again on this machine, and before a
new attempt is claimed, the newest state of which every rank's part is whole, here or in the store, is *adopted*: sent
and committed in the name of the attempt that made it. A state of an attempt that was replaced is not: another process
has gone on without it.
"""

import fcntl
import json
import logging
import shutil
from pathlib import Path

from pydantic import ValidationError

from vc2.config import Config
from vc2.errors import StoreError
from vc2.storage import file_digest
from vc2.train.attempts import Run, StateFile, StateManifest, StateRef, commit_state

__all__ = ["KeptPart", "adopt", "clear_passing", "drop_replaced", "kept_folder", "list_key", "passing_folder"]

log = logging.getLogger(__name__)


class KeptPart(Config):
    """One rank's part of a state."""

    rank: int
    state: StateManifest  # with the files of this rank alone
    metrics: tuple[str, str]  # key and lines of the training curve


def passing_folder(run: Run, work: Path) -> Path:
    """Where files of a run's states lie on their way to and from the store; emptied by the next attempt."""
    folder = _passing(run, work)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clear_passing(run: Run, work: Path) -> None:
    """Delete that folder; several ranks of a machine may do so at once."""
    shutil.rmtree(_passing(run, work), ignore_errors=True)


def _passing(run: Run, work: Path) -> Path:
    return work / "states" / run.fingerprint[:16]


def kept_folder(run: Run, work: Path, ref: StateRef) -> Path:
    """Where a state waits for the store."""
    return passing_folder(run, work) / f"{ref.attempt:04d}" / f"{ref.step:08d}"


def list_key(run: Run, ref: StateRef, rank: int) -> str:
    """Where a rank lists the files that it has stored: the last thing that it writes of a state."""
    return f"{run.state_prefix(ref)}/rank-{rank}.json"


def adopt(run: Run, work: Path) -> StateRef | None:
    """Commit the newest state that earlier attempts left on this machine, and empty the folder.

    To be called when no attempt is alive and before a new one is claimed. Parts that ranks on other machines kept there
    cannot be had from here: such a state is lost unless those ranks had stored their parts.

    Returns:
        The state that was committed; None where nothing was left that counts.

    Raises:
        StoreError: If the store does not answer; everything stays as it is.
    """
    folder = passing_folder(run, work)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two starters of one run on one machine
        if not folder.exists():
            return None
        newest = run.newest()
        committed = max((ref.step for ref in run.all_states() if ref.attempt == newest), default=-1)
        adopted = None
        for place in sorted(folder.glob("[0-9]*/[0-9]*"), reverse=True):
            ref = StateRef(attempt=int(place.parent.name), step=int(place.name))
            if ref.attempt > newest:  # a mount that is lost looks like an empty folder
                raise StoreError(
                    f"{place} is of attempt {ref.attempt}, of which {run.store.uri} knows nothing; is this the same "
                    "store? If it was emptied on purpose, delete the folder"
                )
            if ref.attempt == newest and ref.step > committed and _bring_home(run, ref, place):
                adopted = ref
                break
        shutil.rmtree(folder)
        return adopted


def drop_replaced(run: Run, work: Path, attempt: int) -> None:
    """Delete what attempts before this one left on this machine: nobody adopts it any more.

    Where a run is started, `adopt` has done so; on the other machines of its ranks only they can.
    """
    for place in (work / "states" / run.fingerprint[:16]).glob("[0-9]*"):
        if int(place.name) < attempt:
            shutil.rmtree(place, ignore_errors=True)  # other ranks of this machine do the same


def _bring_home(run: Run, ref: StateRef, place: Path) -> bool:
    parts = [part for path in sorted(place.glob("rank-*.json")) if (part := _whole_part(path)) is not None]
    if not parts:
        return False
    layout = parts[0].state.layout
    held = {part.rank: part for part in parts}
    files: list[StateFile] = []
    for rank in range(layout.world_size):
        if rank in held:
            files += held[rank].state.files
        elif (stored := _stored_list(run, ref, rank)) is not None:
            files += stored
        else:
            log.warning(
                "%s: the part of rank %d of a state of step %d that was kept in %s is on another machine or was never "
                "whole; the state before it is taken",
                run.prefix, rank, ref.step, place,
            )  # fmt: skip
            return False
    for part in parts:
        for file in part.state.files:
            if run.store.upload(place / file.name, file.key).sha256 != file.sha256:
                raise StoreError(f"{place / file.name} changed while it was sent; try again")
    # The first rank writes the curve; what another one knows of it must not take its place.
    metrics = (held[0].metrics[0], held[0].metrics[1].encode()) if 0 in held else None
    commit_state(run, parts[0].state.evolve(files=tuple(files)), metrics)
    log.warning("%s: the state of step %d that was kept in %s is in the store now", run.prefix, ref.step, place)
    return True


def _whole_part(path: Path) -> KeptPart | None:
    """What a rank kept, if every byte of it is there."""
    try:
        part = KeptPart.model_validate_json(path.read_bytes())
        found = [file_digest(path.parent / file.name) for file in part.state.files]
    except (OSError, ValidationError) as error:
        log.warning("%s: not a whole part of a state (%s)", path, str(error).splitlines()[0])
        return None
    expected = [(file.size, file.sha256) for file in part.state.files]
    if [(one.size, one.sha256) for one in found] != expected:
        log.warning("%s: files beside it are not what it says; it is not taken", path)
        return None
    return part


def _stored_list(run: Run, ref: StateRef, rank: int) -> list[StateFile] | None:
    try:
        return [StateFile.model_validate(file) for file in json.loads(run.store.read(list_key(run, ref, rank)))]
    except KeyError:
        return None
