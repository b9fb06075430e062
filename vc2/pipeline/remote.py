"""A shard stage as a Ray Job: submitted, watched and come back to by whoever wants the set; run on the cluster's head.

    flow or command   `prepare_as_job`                       waits; if it is lost, the next one finds the job
    Ray Job           `python -m vc2.pipeline.remote URI`    `vc2.data.prepare`, on the head; spreads over the cluster
    store             shards/<source>/<fp>/jobs/<n>.json     what attempt n was asked

The job is named `vc2-shard-<source>-<fingerprint>-<store>-<n>`. All machines of the cluster must reach the raw data and
the store under the same names. A small world is made by the job itself, in its own work folder, which they must share
too.
"""

import os
import socket
import tempfile
import time
from pathlib import Path

from vc2.artifacts import ShardSet, find, shard_set_prefix
from vc2.config import Config, canonical_json
from vc2.data.config import Change, ShardStage
from vc2.errors import LaunchFailed, StoreError, first_line
from vc2.launch import report, run_rank
from vc2.miniature.config import WorldConfig
from vc2.pipeline.recipes import world_folder
from vc2.pipeline.shard import ready
from vc2.progress import Progress, silent
from vc2.storage import Store, open_store

__all__ = ["ShardCall", "main", "prepare_as_job"]

HERE = Path("$VC2_WORK")  # in a request: the work folder of whoever does it
TOLD_EVERY = 1.0  # seconds between two reports on one work: the whole log is read anew each time


class ShardCall(Config):
    """What a job is asked: the arguments of `vc2.data.prepare.prepare`, and the world that its raw data is of.

    It is the same whoever asks, so that a job that was asked for is recognised.
    """

    stage: ShardStage  #: its small world lies in the folder `HERE`, whichever that is
    store: str  #: URI
    fingerprint: str
    change: Change | None
    removals: tuple[str, ...]
    repeat: int
    only: tuple[int, int] | None  #: first shard, and the one after the last
    world: WorldConfig | None


def prepare_as_job(
    config: ShardStage,
    store: Store,
    work: Path,
    *,
    fingerprint: str,
    change: Change | None = None,
    removals: tuple[str, ...] | list[str] = (),
    repeat: int = 0,
    only: range | None = None,
    progress: Progress = silent,
    world: WorldConfig | None = None,
) -> ShardSet | None:
    """`vc2.data.prepare.prepare` as a job on the cluster. Safe to repeat: a job that runs is attached to.

    Args:
        world: The small world that the raw data is of, if it is; the others are those of `prepare`.

    Raises:
        ConfigError: If no cluster is named.
        LaunchFailed: If the job failed and another one would not help, or did not.
        Preempted: If the job was stopped.
    """
    from vc2.ray_jobs import do_as_job, submit

    prefix = shard_set_prefix(config.source.name, fingerprint)
    if (done := find(store, prefix, ShardSet)) is not None:
        return done
    asked = ShardCall(
        stage=_moved(config, world, work.absolute(), HERE),
        store=store.uri,
        fingerprint=fingerprint,
        change=change,
        removals=tuple(removals),
        repeat=repeat,
        only=(only.start, only.stop) if only is not None else None,
        world=world,
    )
    part = f"-{only.start}-{only.stop - 1}" if only is not None else ""
    name = f"vc2-shard-{config.source.name}-{fingerprint[:12]}{part}"
    do_as_job(
        name,
        canonical_json(asked.model_dump(mode="json")).encode(),
        store,
        f"{prefix}/jobs{part}",
        lambda uri, job: submit(["vc2.pipeline.remote", uri], job),
        reached=lambda: sum(1 for _ in store.list(f"{prefix}/parts/")),
        progress=progress,
    )
    made = find(store, prefix, ShardSet)
    if made is None and only is None:
        raise LaunchFailed(f"{name}: the job ended well, yet {store.uri}/{prefix} has no manifest; run it again")
    return made


# ---- on the cluster ----


def main(uri: str) -> None:
    """Do what a job was asked."""
    from vc2.data.prepare import prepare

    asked = _read(uri)
    work = Path(os.environ.get("VC2_WORK") or Path(tempfile.gettempdir()) / "vc2")
    work.mkdir(parents=True, exist_ok=True)
    told = _Seldom()
    with ready(asked.world, _moved(asked.stage, asked.world, HERE, work), work, told, host=_own_address()) as stage:
        prepare(
            stage,
            open_store(asked.store),
            work,
            fingerprint=asked.fingerprint,
            change=asked.change,
            removals=asked.removals,
            repeat=asked.repeat,
            only=range(*asked.only) if asked.only else None,
            progress=told,
        )


def _read(uri: str) -> ShardCall:
    folder, _, name = uri.rpartition("/")
    try:
        return ShardCall.model_validate_json(open_store(folder).read(name))
    except (KeyError, ValueError) as error:
        raise StoreError(f"{uri}: nothing is asked there ({first_line(error)})") from None


def _own_address() -> str:
    """Of this machine, as the others of its cluster know it; Ray tells a job where the cluster's head is."""
    head = os.environ.get("RAY_ADDRESS", "").rpartition(":")[0] or "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, 9))  # nothing is sent
        return probe.getsockname()[0]


def _moved(stage: ShardStage, world: WorldConfig | None, old: Path, new: Path) -> ShardStage:
    """The stage with its small world in another work folder."""
    if world is None:
        return stage
    there, here = (str(world_folder(world, folder)) for folder in (old, new))
    paths = {name: value for name, value in stage.source if isinstance(value, str) and value.startswith(there)}
    return stage.evolve(source=stage.source.evolve(**{name: here + paths[name][len(there) :] for name in paths}))


class _Seldom:
    """Reports now and then: the beginning and the end of each work always."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def __call__(self, work: str, done: int, total: int | None = None, **figures: float | str) -> None:
        now = time.monotonic()
        if done == total or now - self._last.get(work, -TOLD_EVERY) >= TOLD_EVERY:
            self._last[work] = now
            report(work, done, total, **figures)


if __name__ == "__main__":
    run_rank(main)
