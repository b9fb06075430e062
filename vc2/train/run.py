"""A training stage as its caller sees it: find the finished checkpoint, or become the run's writer and start ranks.

Safe to call again at any time, from any process: a finished run is found, a running one is waited for, a broken one
goes on from its newest whole state.
"""

import glob
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vc2.artifacts import Artifact, Checkpoint, FileEntry, ShardSet, checkpoint_prefix, find, load_manifest, put_object
from vc2.errors import ConfigError, LaunchFailed, PretrainedMissing
from vc2.launch import cpu_count, run_ranks
from vc2.progress import Progress, silent
from vc2.storage import Store, file_digest
from vc2.train.attempts import Attempt, Heartbeat, Run, StateManifest, is_alive, newest_state, this_process
from vc2.train.config import Layout, TrainStage
from vc2.train.request import AUTOENCODER, RankRequest

__all__ = ["train"]


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
        ConfigError: If shards or layout do not fit the stage.
        LaunchFailed: If a rank failed, with its first error.
        Preempted: If the ranks were asked to stop; call again to go on.
    """
    work = work.resolve()
    videos, images = _by_medium(config, store, shards)
    run = Run(store, config.name, fingerprint)
    known: dict[str, Artifact] = {**shards, **({"start_from": start_from} if start_from else {})}
    while True:
        if done := find(store, checkpoint_prefix(run.stage, fingerprint, config.num_steps), Checkpoint):
            return done
        newest = run.newest()
        if newest and is_alive(run, newest):
            progress(f"train/{config.name}", 0, config.num_steps, waiting_for=f"attempt {newest}")
            time.sleep(min(run.attempt(newest).heartbeat_seconds, 5.0))
            continue
        state, damaged = newest_state(run, at_most=config.num_steps)
        request = RankRequest(
            stage=config,
            store=store.uri,
            work=str(work),
            fingerprint=fingerprint,
            attempt=newest + 1,
            start=state.ref if state else None,
            layout=_layout(config, run, newest),
            videos=videos,
            images=images,
            autoencoder=_autoencoder(config, store, work, start_from),
            start_from=start_from,
            inputs=dict(inputs) if inputs is not None else known,
            repeat=repeat,
        )
        if run.claim(_attempt(request, damaged)):
            try:
                return _run_attempt(run, request, state, work, progress)
            except LaunchFailed:
                if run.newest() == request.attempt:
                    raise  # else another process has taken over: wait for it


def _run_attempt(
    run: Run, request: RankRequest, state: StateManifest | None, work: Path, progress: Progress
) -> Checkpoint:
    config = request.stage
    path = work / "train" / f"{run.stage}-{run.fingerprint[:12]}-{request.attempt:04d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(request.model_dump_json(indent=1))
    shutil.rmtree(work / "states" / run.fingerprint[:16], ignore_errors=True)  # left by a killed attempt
    progress(f"train/{run.stage}", state.step if state else 0, config.num_steps)
    with Heartbeat(run, request.attempt, config.heartbeat_seconds):
        run_ranks(
            "vc2.train.rank",
            str(path),
            world_size=request.layout.world_size,
            work=work,
            name=f"train-{run.stage}",
            progress=progress,
        )
    done = find(run.store, checkpoint_prefix(run.stage, run.fingerprint, config.num_steps), Checkpoint)
    if done is None:
        raise LaunchFailed(f"train/{run.stage}: the ranks ended without a checkpoint of step {config.num_steps}")
    return done


def _attempt(request: RankRequest, damaged: list[str]) -> Attempt:
    return Attempt(
        number=request.attempt,
        start=request.start,
        layout=request.layout,
        holder=this_process(),
        heartbeat_seconds=request.stage.heartbeat_seconds,
        damaged=tuple(damaged),
        request=request.model_dump(mode="json"),
    )


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


def _layout(config: TrainStage, run: Run, newest: int) -> Layout:
    """The layout asked for; what is left open is as in the run's newest attempt, or fits this machine."""
    before = run.attempt(newest).layout if newest else None
    world_size = config.world_size or (before.world_size if before else _gpu_count(config) or 1)
    share, rest = divmod(config.batch_size, world_size)
    micro_batch = config.micro_batch or (before.micro_batch if before and before.world_size == world_size else share)
    if rest or share % micro_batch:
        raise ConfigError(
            f"batch_size={config.batch_size} is no multiple of world_size x micro_batch = {world_size} x {micro_batch}"
        )
    threads = config.threads or (before.threads if before else max(1, cpu_count() // world_size))
    return Layout(world_size=world_size, micro_batch=micro_batch, threads=threads)


def _gpu_count(config: TrainStage) -> int:
    if config.device == "cpu":
        return 0
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len(visible.split(","))
    return len(glob.glob("/dev/nvidia[0-9]*"))


def _autoencoder(config: TrainStage, store: Store, work: Path, start_from: Checkpoint | None) -> FileEntry:
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
