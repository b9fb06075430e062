"""A training stage as its caller sees it: find the finished checkpoint, or become the run's writer and start ranks.

Safe to call again at any time, from any process: a finished run is found, a running one is waited for, a broken one
goes on from its newest whole state. What an attempt failed by is written beside it (`attempts/<n>.ended`), and where a
new one may help it is made.

Who starts the ranks is the launcher's part. Those of `local` are children of the caller and die with it. A `ray` job
lives on by itself: its first rank keeps the heartbeat (`vc2.train.cluster_rank`), and a caller that was lost comes back
to the same job. With `env` somebody else has started the ranks, and every one of them is a caller: the first decides
for all (`vc2.train.member`).
"""

import glob
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vc2.artifacts import Artifact, Checkpoint, FileEntry, ShardSet, checkpoint_prefix, find, load_manifest, put_object
from vc2.errors import ConfigError, LaunchFailed, Preempted, PretrainedMissing, StoreError, Vc2Error
from vc2.failures import Retries, may_pass
from vc2.launch import Unheard, cpu_count, start, this_rank, watch
from vc2.progress import Progress, silent
from vc2.storage import Store, file_digest, join_uri
from vc2.train.attempts import Attempt, Heartbeat, Holder, Run, is_alive, newest_state, this_process
from vc2.train.config import Layout, TrainStage
from vc2.train.kept import adopt
from vc2.train.probe import fitting_micro_batch
from vc2.train.request import AUTOENCODER, RankRequest

__all__ = ["frozen_autoencoder", "gpu_count", "most_ranks", "open_world_size", "train"]

log = logging.getLogger(__name__)

STOP_SECONDS = 300.0  # that ranks have to take a state and leave, when they are asked to stop
PAUSES = (1.0, 60.0)  # seconds between two questions to a store that is away: at first, at most; doubled in between


def train(
    config: TrainStage,
    store: Store,
    work: Path,
    *,
    fingerprint: str,
    shards: Mapping[str, ShardSet],
    start_from: Checkpoint | None = None,
    inputs: Mapping[str, Artifact] | None = None,
    repeat: int = 0,
    progress: Progress = silent,
) -> Checkpoint:
    """Train to `config.num_steps` steps and return the checkpoint.

    Args:
        config: The stage.
        store: Where the run is kept.
        work: Folder of this machine for logs and passing files.
        fingerprint: Name of the run.
        shards: Shard sets by any name; their manifests say whether they are of videos or of images.
        start_from: Weights to start from; the optimizer starts anew.
        inputs: What the manifest names as inputs; default: `shards` and `start_from`.
        repeat: Recorded in the manifest.
        progress: Told about steps.

    Raises:
        ConfigError: If shards, layout or launcher do not fit the stage.
        LaunchFailed: If a rank failed and trying again cannot help, or did not, with the first error and its kind.
        Preempted: If the ranks were asked to stop; call again to go on.
    """
    videos, images = _by_medium(config, store, shards)
    known: dict[str, Artifact] = {**shards, **({"start_from": start_from} if start_from else {})}
    asked = _Asked(
        config=_fitted(config),
        run=Run(store, config.name, fingerprint),
        work=work.resolve(),
        videos=videos,
        images=images,
        start_from=start_from,
        inputs=dict(inputs) if inputs is not None else known,
        repeat=repeat,
        progress=progress,
    )
    return _as_member(asked) if config.launcher == "env" else _as_starter(asked)


@dataclass
class _Asked:
    """What `train` was called with."""

    config: TrainStage
    run: Run
    work: Path
    videos: tuple[ShardSet, ...]
    images: tuple[ShardSet, ...]
    start_from: Checkpoint | None
    inputs: dict[str, Artifact]
    repeat: int
    progress: Progress
    over: set[int] = field(default_factory=set)  # attempts whose end was seen here, whatever their heartbeat says

    @property
    def name(self) -> str:
        return f"train/{self.config.name}"

    def found(self) -> Checkpoint | None:
        run = self.run
        return find(run.store, checkpoint_prefix(run.stage, run.fingerprint, self.config.num_steps), Checkpoint)

    def uri(self, attempt: int) -> str:
        """Where ranks find their request."""
        return join_uri(self.run.store.uri, f"{self.run.prefix}/attempts/{attempt:04d}.json")

    def tell(self, done: int, **figures: float | str) -> None:
        self.progress(self.name, done, self.config.num_steps, **figures)


def _fitted(config: TrainStage) -> TrainStage:
    """The stage with as many ranks as somebody else has started."""
    if config.launcher != "env":
        return config
    ranks = this_rank().world_size
    if config.world_size not in (None, ranks):
        raise ConfigError(f"launcher=env: WORLD_SIZE is {ranks}, world_size={config.world_size}; leave one of them out")
    return config.evolve(world_size=ranks)


def _next_move(asked: _Asked) -> Checkpoint | RankRequest | float:
    """What is to be done: nothing, since the checkpoint is there; the work of an attempt; or wait for some seconds."""
    config, run = asked.config, asked.run
    if done := asked.found():
        return done
    newest = run.newest()
    if newest and newest not in asked.over:
        if config.launcher == "ray" and _is_running(run, newest):
            return RankRequest.load(asked.uri(newest))  # to be attached to
        if is_alive(run, newest):
            asked.tell(max(0, _reached(run)), waiting_for=f"attempt {newest} on {run.attempt(newest).holder.host}")
            return min(run.attempt(newest).heartbeat_seconds, 5.0)
    autoencoder = frozen_autoencoder(config, run.store, asked.work, asked.start_from)
    _check_latents(asked, autoencoder)
    adopt(run, asked.work)
    if (ahead := _reached(run)) > config.num_steps:
        return _earlier(asked, ahead)
    state, damaged = newest_state(run, at_most=config.num_steps)
    request = RankRequest(
        stage=config,
        store=run.store.uri,
        work=str(asked.work),
        fingerprint=run.fingerprint,
        attempt=newest + 1,
        start=state.ref if state else None,
        layout=_layout(asked, newest),
        videos=asked.videos,
        images=asked.images,
        autoencoder=autoencoder,
        start_from=asked.start_from,
        inputs=asked.inputs,
        repeat=asked.repeat,
    )
    is_used = config.launcher == "ray" and _has_ended(run, request.attempt)  # by a run that the store has forgotten
    if not run.claim(_attempt(request, damaged)):
        return 0.0
    if is_used:
        asked.over.add(request.attempt)
        return 0.0
    return request


def _earlier(asked: _Asked, ahead: int) -> Checkpoint:
    """The checkpoint of a step that the run has left behind, if its state is still there.

    Raises:
        ConfigError: If not: going back would make a new attempt of an earlier state, and all later ones worthless.
    """
    run, steps = asked.run, asked.config.num_steps
    if any(ref.step == steps for ref in run.states()):
        from vc2.train.export import export_step

        return export_step(run, asked.work, steps)
    raise ConfigError(
        f"{asked.name}: the run has come to step {ahead} and keeps no state of step {steps}; raise num_steps, or train "
        f"anew under another name (--repeat N). States: {', '.join(str(ref.step) for ref in run.states())}"
    )


def _patient_move(asked: _Asked, seconds: float) -> Checkpoint | RankRequest | float:
    """The next move; a store that does not answer is borne for so long in all."""
    pause, longest = PAUSES
    until = time.monotonic() + seconds
    while True:
        try:
            return _next_move(asked)
        except StoreError as away:
            if not may_pass(away.kind) or time.monotonic() + pause > until:
                raise
            log.warning("%s: %s; asking again in %.0f s", asked.name, away, pause)
            asked.tell(0, waiting_for=f"the store: {away}")
            time.sleep(pause)
            pause = min(2 * pause, longest)


def _check_latents(asked: _Asked, autoencoder: FileEntry) -> None:
    from vc2.train.precompute import check_latents

    sets = (*asked.videos, *asked.images)
    check_latents(asked.config, asked.run.store, asked.work, sets, autoencoder.sha256, asked.start_from)


def _as_starter(asked: _Asked) -> Checkpoint:
    """Start ranks until the checkpoint is there."""
    retries, run = Retries(asked.config.retries), asked.run
    while True:
        move: Checkpoint | RankRequest | float | None = None
        try:
            move = _patient_move(asked, asked.config.outage_seconds)
            if isinstance(move, Checkpoint):
                return move
            if isinstance(move, RankRequest):
                _run_attempt(asked, move)
            else:
                time.sleep(move)
        except (LaunchFailed, StoreError) as failure:
            if move is None and isinstance(failure, StoreError):
                raise  # was borne long enough
            if isinstance(move, RankRequest) and _is_overtaken(run, move.attempt):
                continue  # by another process, which is waited for
            pause = retries.pause(failure, _reached(run))
            if pause is None:
                raise
            log.warning("%s: %s; a new attempt in %.0f s", asked.name, failure, pause)
            asked.tell(max(0, _reached(run)), failed=f"{failure.kind}: {failure}", next_attempt_in=f"{pause:.0f} s")
            time.sleep(pause)


def _is_overtaken(run: Run, attempt: int) -> bool:
    try:
        return run.newest() != attempt
    except StoreError:
        return False


def _reached(run: Run) -> int:
    """Step of the newest state; -1: none, or not known."""
    try:
        return next((ref.step for ref in run.states()), -1)
    except StoreError:
        return -1


def _run_attempt(asked: _Asked, request: RankRequest) -> None:
    """Start the ranks of an attempt, or attach to them, and wait until they have left their checkpoint."""
    run, config, work = asked.run, request.stage, asked.work
    asked.tell(request.start.step if request.start else 0)
    try:
        if config.launcher == "ray":
            _run_on_ray(asked, request)
        else:
            with Heartbeat(run, request.attempt, config.heartbeat_seconds):
                job = start(
                    "vc2.train.rank",
                    asked.uri(request.attempt),
                    world_size=request.layout.world_size,
                    work=work,
                    name=f"train-{run.stage}",
                    environment={"VC2_WORK": str(work)},
                    grace=STOP_SECONDS,
                )
                watch(job, asked.progress)
        asked.over.add(request.attempt)
        if find(run.store, checkpoint_prefix(run.stage, run.fingerprint, config.num_steps), Checkpoint) is None:
            raise LaunchFailed(f"{asked.name}: the ranks ended without a checkpoint of step {config.num_steps}")
    except Unheard:
        raise  # it may well go on, and is come back to
    except (LaunchFailed, Preempted) as failure:
        asked.over.add(request.attempt)
        _record_end(run, request.attempt, failure)
        raise


def _record_end(run: Run, attempt: int, failure: Vc2Error) -> None:
    """Write beside an attempt what it ended by."""
    said = {"kind": failure.kind, "message": str(failure), "time": round(run.store.now(), 3)}
    try:
        run.store.write_if_absent(f"{run.prefix}/attempts/{attempt:04d}.ended", json.dumps(said, indent=1).encode())
    except StoreError as error:
        log.warning("attempt %d: why it ended cannot be written: %s", attempt, error)


# ---- ray ----


def _job_id(run: Run, attempt: int) -> str:
    from vc2.ray_jobs import job_id

    return job_id(f"vc2-train-{run.stage}-{run.fingerprint[:12]}", run.store, attempt)


def _is_running(run: Run, attempt: int) -> bool:
    from vc2.ray_jobs import is_running

    return is_running(_job_id(run, attempt))


def _has_ended(run: Run, attempt: int) -> bool:
    from vc2.ray_jobs import has_ended

    return has_ended(_job_id(run, attempt))


def _run_on_ray(asked: _Asked, request: RankRequest) -> None:
    from vc2.ray_jobs import start_job

    job = start_job(
        "vc2.train.cluster_rank",
        asked.uri(request.attempt),
        world_size=request.layout.world_size,
        job_id=_job_id(asked.run, request.attempt),
        device=request.stage.device,
    )
    watch(job, asked.progress, interval=1.0)


# ---- env ----


def _as_member(asked: _Asked) -> Checkpoint:
    """Be one of the ranks that somebody else has started. The first one finds out what to do, the others hear it."""
    from vc2.train.member import Member

    member, run, config = Member(asked.config), asked.run, asked.config
    patience = min(config.outage_seconds, config.hang_seconds / 2)  # the others wait, and must not call it a hang
    while True:
        move = member.decided(lambda: _as_told(asked, _patient_move(asked, patience)))
        if isinstance(move, float):
            time.sleep(move)
            continue
        if isinstance(move, str):
            place = asked.work / "train" / f"request-{run.fingerprint[:12]}-{member.rank.rank}.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(move)
            request = RankRequest.load(str(place))
            beat = Heartbeat(run, request.attempt, request.stage.heartbeat_seconds)
            ended = partial(_record_end, run, request.attempt)
            member.work(str(place), beat, ended=ended, progress=asked.progress)
        return member.waited_for(asked.found)


def _as_told(asked: _Asked, move: Checkpoint | RankRequest | float) -> str | float | None:
    """A move in plain values: a request as JSON, seconds to wait, or None where all is done. The request itself is
    told, so that no rank has to ask the store for it: one that failed would leave the others waiting."""
    if isinstance(move, RankRequest):
        asked.tell(move.start.step if move.start else 0)
        return move.model_dump_json()
    return move if isinstance(move, float) else None


# ---- what is asked of the ranks ----


def _attempt(request: RankRequest, damaged: list[str]) -> Attempt:
    return Attempt(
        number=request.attempt,
        start=request.start,
        layout=request.layout,
        holder=_holder(request),
        heartbeat_seconds=request.stage.heartbeat_seconds,
        damaged=tuple(damaged),
        request=request.model_dump(mode="json"),
    )


def _holder(request: RankRequest) -> Holder:
    """This process; but ranks that outlive it are not dead when it is, so then nobody may look for it."""
    return this_process().evolve(place="") if request.stage.launcher == "ray" else this_process()


def _by_medium(
    config: TrainStage, store: Store, shards: Mapping[str, ShardSet]
) -> tuple[tuple[ShardSet, ...], tuple[ShardSet, ...]]:
    """Sets of videos and sets of images, each in order of their names."""
    media = {name: load_manifest(store, shards[name].prefix).facts.get("media") for name in sorted(shards)}
    if not shards or set(media.values()) - {"video", "image"}:
        raise ConfigError(f"train/{config.name} got shard sets of {media}; expected sets of 'video' and 'image'")
    if "image" not in media.values() and config.image_share > 0:
        raise ConfigError(
            f"image_share={config.image_share} but there is no shard set of images; give one, or set it to 0"
        )
    videos, images = (
        tuple(shards[name] for name, found in media.items() if found == medium) for medium in ("video", "image")
    )
    return videos, images


def _layout(asked: "_Asked", newest: int) -> Layout:
    """The layout asked for; what is left open is as in the run's newest attempt, or fits this machine."""
    config, run = asked.config, asked.run
    before = run.attempt(newest).layout if newest else None
    world_size = config.world_size or open_world_size(config, before)
    share, rest = divmod(config.batch_size, world_size)
    micro_batch = config.micro_batch or (before.micro_batch if before and before.world_size == world_size else None)
    if micro_batch is None and config.launcher == "ray":
        raise ConfigError(
            "launcher=ray: how many clips at once? Set micro_batch (vc2 train --dry-run says what fits); this machine "
            "cannot try it on the cluster's GPUs"
        )
    if not (micro_batch or rest) and (gpu_count(config) or config.memory_gib is not None):
        asked.tell(0, looking_for="a micro-batch that fits")
        shards = (*asked.videos, *asked.images)
        micro_batch = fitting_micro_batch(config, run.store, shards, asked.work, world_size)
    micro_batch = micro_batch or share
    if rest or share % micro_batch:
        raise ConfigError(
            f"batch_size={config.batch_size} is no multiple of world_size x micro_batch = {world_size} x {micro_batch}"
        )
    threads = config.threads or (before.threads if before else max(1, cpu_count() // world_size))
    return Layout(world_size=world_size, micro_batch=micro_batch, threads=threads)


def open_world_size(config: TrainStage, before: Layout | None) -> int:
    """As many ranks as before, or as fewer GPUs allow: the batch stays what it is, states are re-sharded."""
    gpus = gpu_count(config) if config.launcher == "local" else 0
    if before is None:
        if config.launcher == "ray":
            raise ConfigError(
                "launcher=ray: how many ranks? Set world_size; this machine cannot see the cluster's GPUs"
            )
        return gpus or 1
    if not 0 < gpus < before.world_size:
        return before.world_size
    found = most_ranks(config, gpus)
    log.warning(
        "train/%s: %d GPUs here, %d before: going on with %d ranks", config.name, gpus, before.world_size, found
    )
    return found


def most_ranks(config: TrainStage, gpus: int) -> int:
    """The most ranks that a batch can be shared by on so many GPUs."""
    return max(number for number in range(1, gpus + 1) if config.batch_size % number == 0)


def gpu_count(config: TrainStage) -> int:
    """GPUs of this machine that a stage may use."""
    if config.device == "cpu":
        return 0
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len(visible.split(","))
    return len(glob.glob("/dev/nvidia[0-9]*"))


def frozen_autoencoder(config: TrainStage, store: Store, work: Path, start_from: Checkpoint | None) -> FileEntry:
    """The frozen autoencoder as an object of the store: of the file asked for, or of what training starts from."""
    model = config.model
    if model.autoencoder_path:
        path = Path(model.autoencoder_path)
        if not path.is_file():
            raise PretrainedMissing(
                f"autoencoder: {path} is no file; set model.autoencoder_path to a file of its weights"
            )
        found = file_digest(path).sha256
        entry = put_object(store, path if _is_of_ours(path) else _as_ours(config, work, path), AUTOENCODER)
    elif start_from is not None:
        entry = load_manifest(store, start_from.prefix).file(AUTOENCODER)
        found = entry.sha256
    elif config.sd_init:
        entry = put_object(store, _as_ours(config, work), AUTOENCODER)
        found = entry.sha256
    else:
        raise ConfigError("model.autoencoder_path is empty; set it to a file of the autoencoder")
    if model.autoencoder_sha256 not in ("", found):
        raise ConfigError(
            f"autoencoder: sha256 {found[:12]}, model.autoencoder_sha256 says {model.autoencoder_sha256[:12]}; "
            "give the file that the configuration names, or change the name"
        )
    return entry


def _is_of_ours(path: Path) -> bool:
    """Whether a file of an autoencoder is one that `Autoencoder.save` wrote."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            return "config" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _as_ours(config: TrainStage, work: Path, path: Path | None = None) -> Path:
    """The autoencoder of a foreign file, or beside what training starts from, in a file that readers expect."""
    from vc2.train.parts import autoencoder_of_file, autoencoder_of_start

    work.mkdir(parents=True, exist_ok=True)
    return autoencoder_of_start(config, work) if path is None else autoencoder_of_file(config, path, work)
