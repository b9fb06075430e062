"""A grid of samples: a few videos of a checkpoint on one page, for somebody who is to say whether it goes on.

The videos are the evaluation's own: its first prompts, its seeds, its sampler, by its ranks. They are made in the
evaluation's groups, and a video depends on its group at most by rounding, so bit for bit they are those that the
evaluation of the same checkpoint will want. Its records of finished groups are therefore shared: what the grid has made
the evaluation does not make again, and the other way round.

    samples/<fingerprint>/...                   the videos; those of the evaluation where the grid shows all of them
    reports/<fingerprint>/grid.html             the page
    reports/<fingerprint>/manifest.json         last: stage `grid`, made from the checkpoint and the samples
"""

import time
from collections.abc import Sequence
from pathlib import Path

from vc2.artifacts import (
    Artifact,
    Checkpoint,
    Manifest,
    Report,
    SampleSet,
    commit,
    find,
    fingerprint,
    load_manifest,
    put_file,
)
from vc2.eval.config import SampleStage
from vc2.eval.generate import (
    Group,
    cut_into_groups,
    finished_record,
    record_key,
    sample_set_name,
    samples_prefix,
)
from vc2.eval.prompts import Prompt
from vc2.eval.report_data import ReportData, SampleRow
from vc2.pipeline.driver import IMPORTED
from vc2.pipeline.recipes import PipelineConfig
from vc2.progress import Progress, counted, silent
from vc2.storage import Store

__all__ = ["MOST", "PAGE", "STAGE", "grid_prefix", "make_grid"]

STAGE = "grid"
STAGE_VERSION = 1
PAGE = "grid.html"
MOST = 64  # videos


def grid_prefix(config: PipelineConfig, checkpoint: Checkpoint, *, count: int = 16, repeat: int = 0) -> str:
    """Where the grid of a checkpoint is, or will be.

    Raises:
        ConfigError: If there are no prompts.
    """
    asked = {"samples": _sampling(config, count).identity(), "count": count}
    weights = {"checkpoint": f"{checkpoint.fingerprint}@{checkpoint.step}"}
    return f"reports/{fingerprint(STAGE, STAGE_VERSION, asked, weights, repeat)}"


def make_grid(
    config: PipelineConfig,
    store: Store,
    work: Path,
    checkpoint: Checkpoint,
    *,
    count: int = 16,
    repeat: int = 0,
    progress: Progress = silent,
) -> Report:
    """Sample the evaluation's first prompts from a checkpoint and lay them on a page. Safe to repeat.

    Args:
        config: The run; its evaluation says which prompts and which sampler.
        store, work: Where artifacts are kept; a scratch folder.
        checkpoint: The weights.
        count: Videos on the page, at most; a few more may be made, so that the evaluation can take them over.
        repeat: Raise it to make the same once more.
        progress: Told as videos are made.

    Raises:
        ConfigError: If there are no prompts.
        LaunchFailed: If a rank ends with an error.
    """
    from vc2.pipeline.stages import sampled

    prefix = grid_prefix(config, checkpoint, count=count, repeat=repeat)
    if done := find(store, prefix, Report):
        return done
    started = time.monotonic()
    sampling = _sampling(config, count)
    groups = cut_into_groups(sampling, sampling.all_prompts(), checkpoint)
    ours = samples_prefix(sample_set_name(sampling, checkpoint, repeat))
    whole = samples_prefix(sample_set_name(config.evaluation.with_prompts().sampling(), checkpoint, repeat))
    work.mkdir(parents=True, exist_ok=True)
    _lend(store, groups, whole, ours)
    samples = sampled(sampling, store, work, checkpoint, repeat, progress)
    _lend(store, groups, ours, whole)
    progress("page", 0, 1)
    text = _page(store, checkpoint, samples, sampling, sampling.all_prompts()[:count], prefix, progress)
    inputs: dict[str, Artifact] = {"checkpoint": checkpoint, "samples": samples}
    manifest = Manifest(
        kind="report",
        stage=STAGE,
        stage_version=STAGE_VERSION,
        fingerprint=prefix.removeprefix("reports/"),
        repeat=repeat,
        config={"count": count, "samples": sampling.model_dump(mode="json")},
        inputs=inputs,
        files=(put_file(store, prefix, PAGE, text.encode()),),
        counts={"videos": min(count, samples.counts["videos"])},
        seconds=round(time.monotonic() - started, 3),
    )
    report = commit(store, prefix, manifest)
    assert isinstance(report, Report)
    progress("page", 1, 1)
    return report


def _sampling(config: PipelineConfig, count: int) -> SampleStage:
    """What the evaluation would ask for, of as many of its groups as hold the first `count` prompts."""
    wanted = config.evaluation.with_prompts()
    sampling, prompts = wanted.sampling(), wanted.all_prompts()
    most = -(-count // sampling.group_size) * sampling.group_size
    if most >= len(prompts):
        return sampling
    return sampling.evolve(prompts=prompts[:most], prompts_file="", prompts_digest="", num_prompts=None)


def _lend(store: Store, groups: Sequence[Group], lender: str, borrower: str) -> None:
    """Let a sample set find the groups that another has made: its record of one names the files where they are.

    A record says what was asked for, down to the digest of the weights; only a record of the very same is lent.
    """
    if lender == borrower:
        return
    for group in groups:
        found = finished_record(store, lender, group)
        if found is not None and finished_record(store, borrower, group) is None:
            store.write(record_key(borrower, group.number), found.model_dump_json().encode())


# ---- the page ----


def _page(
    store: Store,
    checkpoint: Checkpoint,
    samples: SampleSet,
    sampling: SampleStage,
    prompts: Sequence[Prompt],
    prefix: str,
    progress: Progress,
) -> str:
    from vc2.eval.grid_page import render_grid
    from vc2.eval.measure import videos_of
    from vc2.pipeline.gather import loss_curve, shown_videos

    made = load_manifest(store, checkpoint.prefix)
    files = videos_of(load_manifest(store, samples.prefix))
    shown = shown_videos(store, samples, [prompt.id for prompt in prompts], progress=progress)
    is_trained = made.stage != IMPORTED
    curves = [curve] if is_trained and (curve := loss_curve(store, made)).points else []
    rows = [
        SampleRow(
            prompt.text,
            shown[prompt.id].data,
            id=prompt.id,
            missing=shown[prompt.id].missing,
            sha256=files[prompt.id].sha256,
            size=(shown[prompt.id].width, shown[prompt.id].height) if shown[prompt.id].width else None,
            note="" if prompt.attributes.get("seen", True) else "no training caption has this combination",
        )
        for prompt in prompts
    ]
    name = f"train/{made.stage}" if is_trained else str(made.facts.get("source", "an imported model"))
    copies = sum(found.is_copy for found in shown.values())
    data = ReportData(
        title=f"{counted(len(rows), 'sample')} of {name}, step {checkpoint.step:,}",
        about=f"The first prompts of the evaluation, each with the video that the {_weights(sampling)} make of it.",
        notes=[f"{copies} of {len(shown)} are shown as small copies; the videos are in {samples.uri}."]
        if copies
        else [],
        rows=rows,
        fps=float(sampling.play_fps),
        size=(sampling.width, sampling.height),
        curves=curves,
        fingerprint=prefix.removeprefix("reports/"),
    )
    return render_grid(data, _facts(checkpoint, made, samples, sampling), _questions(made.stage))


def _weights(sampling: SampleStage) -> str:
    return "averaged weights (EMA)" if sampling.weights == "ema" else "raw weights"


def _facts(checkpoint: Checkpoint, made: Manifest, samples: SampleSet, sampling: SampleStage) -> dict[str, str]:
    facts = {
        "checkpoint": checkpoint.uri,
        "step": f"{checkpoint.step:,}",
        "samples seen": f"{made.counts.get('samples', 0):,}",
        "weights": _weights(sampling),
        "trained by": made.stage
        if made.stage != IMPORTED
        else f"imported from {made.facts.get('source', 'elsewhere')}",
        "finished": made.created_at[:19].replace("T", " "),
        "sampler": f"{sampling.sampler.solver}, {counted(sampling.sampler.num_steps, 'step')}",
        "guidance scale": f"{sampling.sampler.guidance_scale:g}",
        "guidance rescale": f"{sampling.sampler.guidance_rescale:g}",
        "eta": f"{sampling.sampler.eta:g}",
        "frame rate told": f"{sampling.sampler.fps}",
        "shown at": f"{sampling.play_fps} fps",
        "size": f"{counted(sampling.frames, 'frame')} of {sampling.width} x {sampling.height} pixels",
        "seed": str(sampling.seed),
        "precision": sampling.precision,
        "videos": samples.uri,
    }
    return {name: words for name, words in facts.items() if words}


MOVES = ("Does it move as the caption says?", "Things should move, and as they would; not stand, boil or jump.")
SHOWS = ("Is what the caption names in the picture?", "The things, how many, their colours. Compare several videos.")
COLLAPSED = (
    "Are the videos different from each other?",
    "Noise, one grey picture, or the same picture for every prompt: the weights are of no use, whatever the loss says.",
)
FEW = ("How sure can one be?", "A few prompts, one seed each. Good ones may be luck; a fault in all of them is not.")
QUESTIONS = {
    "full": (
        MOVES,
        ("Is the motion good enough to keep?", "Stage 2 tunes the spatial modules alone: it cannot mend motion."),
        SHOWS,
        (
            "Is there a watermark, or are edges soft?",
            "Expected now, if the videos of stage 1 bear one: stage 2 learns from clean pictures what things look "
            "like. By itself it is no reason to stop.",
        ),
        COLLAPSED,
        FEW,
    ),
    "spatial": (
        (
            "Is it crisper than after stage 1, and is the watermark gone?",
            "That is what stage 2 is for. Lay the grid of stage 1 beside this one: same prompts, same seeds.",
        ),
        (
            "Has the motion stayed?",
            "The temporal modules were frozen. Videos that stand still now have lost something.",
        ),
        SHOWS,
        COLLAPSED,
        FEW,
    ),
}


def _questions(stage: str) -> Sequence[tuple[str, str]]:
    return QUESTIONS.get(stage, (MOVES, SHOWS, COLLAPSED, FEW))
