"""From a train state to a checkpoint: whole weights, raw and averaged, with everything that sampling needs.

Any committed state can become a checkpoint, at any time and without the ranks that made it: trained parameters are put
together from the fragments of all ranks, frozen ones come from where training started. Low-rank updates are merged into
the weights they update; the averaged ones also stand in a file of their own.

One network is in host memory, and one parameter's fragments at a time.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

from vc2.artifacts import (
    Artifact,
    Checkpoint,
    FileEntry,
    Manifest,
    checkpoint_prefix,
    commit,
    find,
    load_manifest,
    put_file,
    put_object,
)
from vc2.data.config import LoaderConfig
from vc2.data.loader import Loader
from vc2.errors import StoreError
from vc2.launch import cpu_count
from vc2.model.files import write_weights
from vc2.model.lora import merged_state_dict, save_lora
from vc2.model.schedule import NoiseSchedule
from vc2.model.unet import UNet3D
from vc2.storage import Store
from vc2.train.attempts import Run, StateDamaged, StateManifest, StateRef, Superseded, whole_state
from vc2.train.card import model_card
from vc2.train.config import STAGE_VERSION, TrainStage
from vc2.train.fragments import Fragment, read_fragments
from vc2.train.metrics import Metrics, read_metrics
from vc2.train.objective import best_linear_loss
from vc2.train.parts import build_unet, check_unchanged, digest_of_tensors, parameter_counts, put_learning
from vc2.train.request import (
    AUTOENCODER,
    EMA_WEIGHTS,
    IMAGE_WEIGHTS,
    LORA,
    MODEL_CARD,
    MODEL_CONFIG,
    RAW_WEIGHTS,
    TEXT_WEIGHTS,
    RankRequest,
)
from vc2.train.states import state_files

__all__ = ["commit_checkpoint", "curve_facts", "export_state", "export_step", "licenses_of", "open_loader"]

log = logging.getLogger(__name__)


def export_step(run: Run, work: Path, step: int | None = None) -> Checkpoint:
    """Make a state of a run a checkpoint, or find the one that it is already. The run may be going on: the state is
    pinned meanwhile, so that retention leaves it alone.

    Args:
        run: The run.
        work: Folder of this machine for passing files.
        step: Of the state; None: the newest whole one.

    Raises:
        StoreError: If there is no whole state of that step.
    """
    if step is not None and (done := find(run.store, checkpoint_prefix(run.stage, run.fingerprint, step), Checkpoint)):
        return done
    states, damaged = list(run.states()), []
    for ref in states:
        if step not in (None, ref.step):
            continue
        if done := find(run.store, checkpoint_prefix(run.stage, run.fingerprint, ref.step), Checkpoint):
            return done
        try:
            with _pinned(run, ref):
                return export_state(_request_of(run, ref, work), run, whole_state(run, ref), work)
        except StateDamaged as error:
            damaged.append(str(error))
            log.warning("%s: the state of step %d is damaged: %s", run.prefix, ref.step, error)
    steps = ", ".join(str(ref.step) for ref in states) or "none"
    raise StoreError(
        f"{run.store.uri}/{run.prefix}: no whole train state{'' if step is None else f' of step {step}'}"
        f"{' (' + damaged[0] + ')' if damaged else ''}; there are states of steps {steps}"
    )


def _request_of(run: Run, ref: StateRef, work: Path) -> RankRequest:
    asked = run.attempt(ref.attempt).request
    if not asked:
        raise StoreError(f"{run.prefix}: attempt {ref.attempt} does not say what was asked of it")
    return RankRequest.model_validate(asked).evolve(work=str(work))


@contextmanager
def _pinned(run: Run, ref: StateRef) -> Iterator[None]:
    """Keep a state meanwhile; a pin that somebody else has set stays."""
    if ref in run.pinned():
        yield
        return
    run.pin(ref)
    try:
        yield
    finally:
        try:
            run.unpin(ref)
        except StoreError as error:
            uri = f"{run.store.uri}/{run.state_prefix(ref)}"
            log.warning("%s stays pinned, take the pin away with `vc2 gc --unpin`: %s", uri, error)


def export_state(
    request: RankRequest,
    run: Run,
    state: StateManifest,
    work: Path,
    *,
    facts: Mapping[str, Any] | None = None,
    frozen_digest: str | None = None,
) -> Checkpoint:
    """Make a state a checkpoint, without the network of the rank that made it.

    Args:
        request: What the ranks were asked.
        facts: What else is known of the run.
        frozen_digest: Of the frozen parameters in the network that was trained.

    Raises:
        Superseded: If the state is not on the chain (any more).
        WeightsError: If the frozen parameters are not those that training ended with.
    """
    unet = build_unet(request, run.store, work)
    trained = frozenset(put_learning(unet, request))
    frozen = {name: parameter for name, parameter in unet.named_parameters() if name not in trained}
    found = digest_of_tensors(frozen)
    check_unchanged(found, frozen_digest or found, "frozen parameters")
    lines = [line for line in read_metrics(run.store, run.stage, run.fingerprint) if line["step"] <= state.step]
    known = curve_facts(request.stage, state, lines) | {"layout": state.layout.model_dump(), "attempt": state.attempt}
    with closing(open_loader(request, run.store)) as loader:
        fps = loader.image_fps
    return cast(
        Checkpoint,
        commit_checkpoint(
            request,
            run,
            state,
            unet,
            trained,
            work,
            counts={f"{name}_parameters": count for name, count in parameter_counts(unet, trained).items()},
            facts=known | {"updates": state.updates, "frozen_digest": found} | dict(facts or {}),
            licenses=licenses_of(request, run.store),
            fps=fps,
            seconds=round(sum(line.get("seconds", 0.0) for line in lines), 1),
        ),
    )


def commit_checkpoint(
    request: RankRequest,
    run: Run,
    state: StateManifest,
    unet: UNet3D,
    trainable: frozenset[str],
    work: Path,
    *,
    counts: Mapping[str, int],
    facts: Mapping[str, Any],
    licenses: Mapping[str, str],
    seconds: float,
    fps: Mapping[int, int],
) -> Artifact:
    """Write weights, model, card and manifest of a state.

    Args:
        unet: The network with its frozen parameters; its trained ones are overwritten.
        fps: Frame rates that the network was told, with their weights.

    Raises:
        Superseded: If the state is not on the chain (any more).
    """
    store, lora = run.store, request.stage.strategy.lora
    prefix = checkpoint_prefix(run.stage, run.fingerprint, state.step)
    work.mkdir(parents=True, exist_ok=True)
    files = []
    with tempfile.TemporaryDirectory(dir=work, prefix="export-") as folder:
        for kind, name in (("master", RAW_WEIGHTS), ("ema", EMA_WEIGHTS)):
            _fill(unet, trainable, run, state, kind, work)
            path = Path(folder) / name
            write_weights(path, merged_state_dict(unet), unet.config)  # readers need not know how it was trained
            files.append(put_object(store, path, name))
            path.unlink()
        if lora is not None:
            save_lora(unet, Path(folder) / LORA, lora)
            files.append(put_object(store, Path(folder) / LORA, LORA))
    files.append(request.autoencoder.evolve(name=AUTOENCODER))
    if request.start_from is not None:  # what an imported model brought along goes on with it
        before = load_manifest(store, request.start_from.prefix).files
        files += [file for file in before if file.name in (TEXT_WEIGHTS, IMAGE_WEIGHTS)]
    files.append(_put_model(run, prefix, request.stage, fps))
    data = [load_manifest(store, shards.prefix) for shards in (*request.videos, *request.images)]
    card = model_card(request, state, data=data, counts=counts, facts=facts, licenses=licenses, fps=fps)
    files.append(put_file(store, prefix, MODEL_CARD, card.encode()))
    manifest = Manifest(
        kind="checkpoint",
        stage=run.stage,
        stage_version=STAGE_VERSION,
        fingerprint=run.fingerprint,
        repeat=request.repeat,
        config=request.stage.model_dump(mode="json"),
        inputs=request.inputs,
        files=tuple(files),
        counts={"steps": state.step, "samples": state.samples, **counts},
        facts=dict(facts),
        licenses=dict(licenses),
        seconds=seconds,
    )
    _ensure_on_chain(run, state.ref)
    return commit(store, prefix, manifest)


def _fill(unet: UNet3D, trainable: frozenset[str], run: Run, state: StateManifest, kind: str, work: Path) -> None:
    parameters = {name: parameter.data for name, parameter in unet.named_parameters() if name in trainable}
    whole = {Fragment(name, 0, tensor.numel()): tensor.view(-1) for name, tensor in parameters.items()}
    with state_files(run, state, kind, work) as paths:
        read_fragments(paths, whole)


def _put_model(run: Run, prefix: str, config: TrainStage, fps: Mapping[int, int]) -> FileEntry:
    model = config.model.identity() | {"fps": {str(rate): weight for rate, weight in sorted(fps.items())}}
    text = json.dumps(model, indent=1, sort_keys=True)
    return put_file(run.store, prefix, MODEL_CONFIG, text.encode())


def _ensure_on_chain(run: Run, ref: StateRef) -> None:
    if not any(attempt == ref.attempt and (limit is None or ref.step <= limit) for attempt, limit in run.chain()):
        raise Superseded(
            f"{run.prefix}: another attempt has gone on from before step {ref.step} of attempt {ref.attempt}, so that "
            "state is no part of the run; nothing was committed"
        )


def curve_facts(config: TrainStage, state: StateManifest, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Losses of the last tenth of the curve, beside what is easily reached.

    Args:
        config: Of the run.
        state: The state where the curve ends.
        lines: Of the training curve, up to that state.
    """
    learnt = [
        line for line in lines if line.get("loss") is not None
    ]  # None: nothing was learnt in any step of the line
    last = learnt[-max(1, len(learnt) // 10) :]
    window = Metrics.resumed(state.step, state.window).window  # for runs too short to have a line
    power = _mean([line["latent_power"] for line in last] or [figures.latent_power for figures in window])
    return {
        "final_loss": _mean([line["loss"] for line in last] or [figures.loss for figures in window]),
        "trivial_loss": 1.0,  # of predicting zero
        "linear_loss": best_linear_loss(NoiseSchedule(config.model.schedule), power),
        "latent_power": power,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def licenses_of(request: RankRequest, store: Store) -> dict[str, str]:
    """Terms of all data and weights that a run uses, by name."""
    found: dict[str, str] = {}
    for origin in (*request.videos, *request.images, request.start_from):
        if origin is not None:
            found |= load_manifest(store, origin.prefix).licenses
    return found


def open_loader(request: RankRequest, store: Store) -> Loader:
    """The loader of a run."""
    config = request.stage
    share = config.image_share if request.videos and request.images else 0.0  # of one kind alone, it takes all
    loader = config.loader
    settings = LoaderConfig(
        **dict(
            loader.evolve(
                threads=min(loader.threads, cpu_count()), cache_dir=loader.cache_dir or f"{request.work}/data"
            )
        ),
        batch_size=config.batch_size,
        image_share=share,
        seed=config.seed,
    )
    rates = None if request.videos else _rates_told_before(request, store)
    return Loader(store, request.videos, request.images, settings, image_fps=rates)


def _rates_told_before(request: RankRequest, store: Store) -> dict[int, int] | None:
    """Frame rates that the network was told when the checkpoint that training starts from was made."""
    if request.start_from is None:
        return None
    file = load_manifest(store, request.start_from.prefix).file(MODEL_CONFIG)
    return {int(rate): weight for rate, weight in json.loads(store.read(file.key)).get("fps", {}).items()} or None
