"""The rows of Table 3 beside each other, in a small world whose truth is known: one table, and a verdict per claim.

    member = a row with a seed = a recipe with settings laid over it
    members --drive--> checkpoints --sample--> videos --judge--> figures --claims--> table, verdicts, page

A member's *seed* is that of its training; videos start from the same noise in all.

A member's stages are those of the DAG, under the same names and fingerprints: what members share (shards, the base of a
seed) is made once, and what is in the store already is taken, so that a comparison that was broken off goes on. Of a
tuning the states that its stage keeps on the way (`keep_every_steps`) are made checkpoints too, and judged by the first
twelve prompts: its curve, which begins with its base.

    reports/<fingerprint>/compare.html     the page: table, verdicts, videos, curves
    reports/<fingerprint>/table.json       all of it as data
    reports/<fingerprint>/table.md         table and verdicts as text
    reports/<fingerprint>/before_after.png the same prompts before and after stage 2
    reports/<fingerprint>/manifest.json    last: made from the scorecards
"""

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vc2.artifacts import (
    Artifact,
    Checkpoint,
    Manifest,
    Report,
    SampleSet,
    Scorecard,
    checkpoint_prefix,
    commit,
    find,
    fingerprint,
    put_file,
)
from vc2.config import Config, digest
from vc2.errors import ConfigError
from vc2.eval.config import Prompt
from vc2.eval.ranks import run_here
from vc2.eval.scorecard import sampled_videos
from vc2.miniature.judges import RIGHTS
from vc2.miniature.references import MOTION, QUALITY, WATERMARKED, Separation, Yardstick, separation
from vc2.miniature.references import VERSION as REFERENCES_VERSION
from vc2.miniature.scene import Truth
from vc2.model.config import ModelConfig
from vc2.pipeline.claims import CLAIMS, End, Finding, Interval, Lookup, interval, judged, paper_rows, rank_correlation
from vc2.pipeline.driver import PlannedStage, asked_of, drive, plan
from vc2.pipeline.gather import judged_figures
from vc2.pipeline.recipes import PipelineConfig, resolve
from vc2.pipeline.stages import sampled, scored
from vc2.pipeline.table3 import Row, last_stage, named_row, row_settings
from vc2.progress import Progress, silent
from vc2.storage import Store, join_uri
from vc2.train.attempts import Run

__all__ = [
    "PAGE",
    "STAGE",
    "Comparison",
    "Member",
    "RunMember",
    "chosen_rows",
    "compare",
    "members",
    "page_at",
    "to_do",
]

STAGE = "compare"
STAGE_VERSION = 2
PAGE = "compare.html"
CURVE_PROMPTS = 12  # the first ones, by which the checkpoints on the way are judged
SUREST = 0.9  # a judge that tells less than this share of real clips from damaged ones is not believed
OWN = ("seed", "strategy")  # settings of a training stage that make a member what it is
FIGURES = {  # of the table: what it is, and whether more is better (None: neither)
    "quality": ("0 looks like the video set, 1 like the image set", True),
    "watermarked": ("share of clips with a watermark", False),
    "sharpness": ("slope of edges, 1 / pixel", True),
    "noise": ("grain, grey levels", False),
    "text": ("colour, shape, background, count, direction: mean share right", True),
    "composition": ("the same for what no video shows", True),
    "motion": ("0 unconnected pictures, 1 as real clips", True),
    "axis": (
        "share that moves along the captioned line, either way; by chance 0.5 of the four ways, 0.41 of all",
        True,
    ),
    "direction": ("share that moves as the caption says (rests, where it says so)", True),
    "speed": ("units a second", None),
    "jitter": ("distance from a straight path, units", False),
    "flicker": ("change of the background's level, grey levels", False),
    "flash": ("change of the thing's level, grey levels", False),
    "visible": ("share of frames with a thing; jitter and flash are those of clips that show one", True),
}


@dataclass(frozen=True, slots=True)
class Member:
    """A row with a seed."""

    row: Row
    seed: int
    settings: Mapping[str, Any]  # over the recipe
    config: PipelineConfig  # what they come to

    @property
    def last(self) -> str:
        """The stage that it ends with."""
        return last_stage(self.row) or "train/spatial"


RunMember = Callable[[Member, PlannedStage, Mapping[str, Artifact]], object]
Figures = Mapping[str, Mapping[str, float]]  # by prompt id


@dataclass
class Comparison:
    """All that was measured, and what follows from it."""

    seeds: Sequence[int]
    prompts: Mapping[str, str]  # by id
    finals: dict[tuple[Row, int], Figures] = field(default_factory=dict)
    curves: dict[tuple[Row, int], dict[int, Figures]] = field(default_factory=dict)  # by step
    samples: dict[tuple[Row, int], SampleSet] = field(default_factory=dict)
    checkpoints: dict[tuple[Row, int], Checkpoint] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """Rows that were run, in the paper's order."""
        return [row for row in Row if any(row is found for found, _ in self.finals)]

    def values(self, figure: str, row: Row, end: End = "end") -> np.ndarray | None:
        """A figure clip by clip, (S, P), NaN where there is none; None if the row was not run.

        At the start of a tuning it is its base's, of the prompts that the curve has; of the watermark's fate (`still
        watermarked`, `lightened`) there is one where the base has a watermark.
        """
        found = np.full((len(self.seeds), len(self.prompts)), np.nan)
        there = False
        for number, seed in enumerate(self.seeds):
            if end == "start":
                on_the_way = self.curves.get((row, seed))
                asked = set(next(iter(on_the_way.values()))) if on_the_way else set()
                clips = {name: of for name, of in self.finals.get((row.base, seed), {}).items() if name in asked}
            else:
                clips = self.finals.get((row, seed), {})
            there = there or bool(clips)
            before = self.finals.get((row.base, seed), {})
            for place, prompt in enumerate(self.prompts):
                if prompt in clips:
                    found[number, place] = _figure(figure, clips[prompt], before.get(prompt, {}))
        return found if there else None

    def table(self) -> dict[Row, dict[str, Interval]]:
        """The figures of each row with their intervals."""
        found: dict[Row, dict[str, Interval]] = {}
        for row in self.rows:
            values = {figure: self.values(figure, row) for figure in FIGURES}
            found[row] = {
                figure: interval(known)
                for figure, known in values.items()
                if known is not None and np.isfinite(known).any()
            }
        return found

    def curve(self, figure: str, row: Row) -> dict[int, float | None]:
        """A figure over the steps of tuning: of the prompts that all checkpoints were judged by, the mean over seeds.
        Step 0 is the base; steps that a seed lacks are left out."""
        by_step: dict[int, list[float]] = {}
        seeds = [seed for seed in self.seeds if self.curves.get((row, seed))]
        for seed in seeds:
            curve = self.curves[row, seed]
            ends = {0: self.finals[row.base, seed], self.checkpoints[row, seed].step: self.finals[row, seed]}
            for step, clips in (curve | ends).items():
                known = [clips[name][figure] for name in next(iter(curve.values())) if figure in clips[name]]
                by_step.setdefault(step, []).extend([float(np.mean(known))] if known else [])
        return {step: float(np.mean(of)) for step, of in sorted(by_step.items()) if len(of) == len(seeds)}

    def findings(self) -> list[Finding]:
        """The paper's claims with their verdicts."""
        lookup: Lookup = self.values
        return judged(lookup)


def _figure(name: str, clip: Mapping[str, float], before: Mapping[str, float]) -> float:
    if name not in ("still watermarked", "lightened"):
        return clip.get(name, float("nan"))
    opacity = before.get("watermark", 0.0)
    if opacity <= WATERMARKED:
        return float("nan")
    limit = WATERMARKED if name == "still watermarked" else max(0.5 * opacity, WATERMARKED)
    return float((clip["watermark"] > limit) is (name == "still watermarked"))


def chosen_rows(names: Sequence[str]) -> tuple[Row, ...]:
    """Rows by name, in the paper's order, each with its base; none named: all.

    Raises:
        ConfigError: If there is no such row.
    """
    wanted = {named_row(name) for name in names} or set(Row)
    wanted |= {row.base for row in wanted}
    return tuple(row for row in Row if row in wanted)


def members(
    recipe: str, settings: Mapping[str, Any] | Config | None, rows: Sequence[Row], seeds: Sequence[int], work: Path
) -> list[Member]:
    """Every row with every seed, seed by seed, so that a whole table is there after the first one.

    Raises:
        ConfigError: If the recipe has no world whose truth is known, a seed comes twice, or of the prompts one has no
            truth or none tells of a motion.
    """
    if len(set(seeds)) < len(seeds) or not seeds or min(seeds) < 0:
        raise ConfigError(f"seeds {', '.join(map(str, seeds)) or '(none)'}: expected different numbers from 0 up")
    asked = (
        settings.model_dump(mode="json", exclude_none=True) if isinstance(settings, Config) else dict(settings or {})
    )
    plain = resolve(recipe, asked, work=work, bind=False)
    if plain.world is None:
        raise ConfigError(
            f"recipe {recipe} has no small world whose truth is known, and the judges need one; take study, study_gpu "
            "or miniature"
        )
    for stage in ("full", "spatial"):
        if taken := [name for name in OWN if name in (asked.get(stage) or {})]:
            raise ConfigError(f"{stage}.{taken[0]} is what the rows and seeds differ in; choose them, and leave it out")
    prompts = resolve(recipe, asked, work=work).evaluation.all_prompts()
    if strange := [prompt.id for prompt in prompts if "truth" not in prompt.attributes]:
        raise ConfigError(
            f"prompt {strange[0]} has no attribute `truth`, which the judges need; take the world's own prompts"
        )
    if not any(_truth_of(prompt).is_moving for prompt in prompts):
        raise ConfigError(
            f"none of the {len(prompts)} prompts names a single thing that moves, and the index of motion needs some"
        )
    found = []
    for seed in seeds:
        for row in rows:
            seeded = {"full": {"seed": seed}, "spatial": {"seed": seed}}
            own = _laid_over(_laid_over(row_settings(plain, row), seeded), asked)
            found.append(Member(row, seed, own, resolve(recipe, own, work=work)))
    return found


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        mine = merged.get(name)
        merged[name] = _laid_over(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return merged


def to_do(asked: Sequence[Member], store: Store) -> dict[str, tuple[str, list[str]]]:
    """What is not in the store yet: fingerprint -> stage, and the members that share it. Samples are not counted."""
    found: dict[str, tuple[str, list[str]]] = {}
    for member in asked:
        for stage in asked_of(plan(member.config, store), None, member.last):
            if stage.artifact is None:
                found.setdefault(stage.fingerprint, (stage.name, []))[1].append(f"{member.row} {member.seed}")
    return found


def page_at(report: Report) -> str:
    """Where the page of a comparison is."""
    return join_uri(report.uri, PAGE)


def compare(
    asked: Sequence[Member],
    store: Store,
    work: Path,
    run: RunMember,
    *,
    progress: Progress = silent,
) -> Report:
    """Train, sample and judge all members, and publish what follows. Safe to repeat: what is done is reused.

    Args:
        asked: See `members`.
        store, work: Where artifacts are kept; a scratch folder.
        run: Makes the artifact of a stage of a member, in this process or elsewhere.
        progress: Told as videos are made and judged, and as members are done.

    Raises:
        ConfigError: If a judge does not tell real clips from damaged ones.
    """
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    config = asked[0].config
    prompts = config.evaluation.all_prompts()
    if to_do(asked, store):
        progress("judges tried out", 0, 1)  # half a minute
        _tried_out(config)
    found = Comparison(list(dict.fromkeys(member.seed for member in asked)), {one.id: one.text for one in prompts})
    cards: dict[tuple[Row, int, int | None], Scorecard] = {}  # step: of a checkpoint on the way
    for number, member in enumerate(asked):
        progress("compare", number, len(asked))
        made = drive(
            member.config, store, lambda planned, inputs, of=member: run(of, planned, inputs), stop_after=member.last
        )
        assert isinstance(made, Checkpoint)
        key = member.row, member.seed
        found.checkpoints[key] = made
        found.samples[key], cards[*key, None] = _measured(member.config, store, work, made, None, progress)
        for checkpoint in _on_the_way(member, made, store, work, found.notes):
            _, cards[*key, checkpoint.step] = _measured(member.config, store, work, checkpoint, CURVE_PROMPTS, progress)
    progress("compare", len(asked), len(asked))
    judged_by = {
        "seeds": list(found.seeds),
        "judged by": [REFERENCES_VERSION, digest(repr(CLAIMS)), SUREST, list(FIGURES)],
    }
    inputs: dict[str, Artifact] = {
        f"{row} seed {seed}" + (f" step {step}" if step else ""): card for (row, seed, step), card in cards.items()
    }
    names = {role: card.fingerprint for role, card in inputs.items()}
    name = fingerprint(STAGE, STAGE_VERSION, judged_by, names)
    prefix = f"reports/{name}"
    if done := find(store, prefix, Report):
        return done
    yardstick = _yardstick(config, prompts)
    for (row, seed, step), card in cards.items():
        figures = _with_indices(judged_figures(store, card), prompts, yardstick)
        if step is None:
            found.finals[row, seed] = figures
        else:
            found.curves.setdefault((row, seed), {})[step] = figures
    data = _as_data(found, asked, yardstick, _tried_out(config))
    texts = _texts(store, found, data, prompts)
    texts["before_after.png"] = _before_after(store, found, _shown(prompts)[:1] + _shown(prompts)[2:4])
    manifest = Manifest(
        kind="report",
        stage=STAGE,
        stage_version=STAGE_VERSION,
        fingerprint=name,
        config={"rows": [row.value for row in found.rows], **judged_by},
        inputs=inputs,
        files=tuple(put_file(store, prefix, file, content) for file, content in texts.items()),
        counts={"members": len(asked), "videos": sum(map(len, found.finals.values()))},
        facts={"verdicts": {claim["key"]: claim["verdict"] for claim in data["claims"]}},
        seconds=round(time.monotonic() - started, 3),
    )
    report = commit(store, prefix, manifest)
    assert isinstance(report, Report)
    return report


def _tried_out(config: PipelineConfig) -> tuple[Separation, ...]:
    """The judges, tried out on drawn clips of the size of the samples, as they are and through the autoencoder.

    Raises:
        ConfigError: If one that decides something does not tell real clips from damaged ones.
    """
    wanted = config.evaluation
    apart = _separation(wanted.width, wanted.height, wanted.frames, float(wanted.play_fps), config.full.model)  # pyright: ignore[reportArgumentType] (frozen, so it has a hash)
    decisive = (*RIGHTS, *QUALITY, *MOTION)
    unsure = [one for one in apart if one.figure in decisive and min(one.accuracy, one.through) < SUREST]
    if unsure:
        one = unsure[0]
        raise ConfigError(
            f"the judge of {one.figure} tells {one.accuracy:.0%} of real clips from damaged ones ({one.damage}) in "
            f"{wanted.frames} frames of {wanted.width} x {wanted.height} pixels, {one.through:.0%} of those that went "
            f"through the autoencoder; expected {SUREST:.0%} of both. Larger frames, more of them or a better "
            "autoencoder help"
        )
    return apart


@cache
def _separation(width: int, height: int, num_frames: int, fps: float, model: ModelConfig) -> tuple[Separation, ...]:
    return separation(width, height, num_frames, fps, _autoencoder(model))


def _yardstick(config: PipelineConfig, prompts: Sequence[Prompt]) -> Yardstick:
    """The ends of the indices, for the prompts of single moving things."""
    wanted = config.evaluation
    truths = [truth for prompt in prompts if (truth := _truth_of(prompt)).is_moving]
    size = wanted.width, wanted.height
    return Yardstick.made_for(truths, size, wanted.frames, float(wanted.play_fps), _autoencoder(config.full.model))


def _truth_of(prompt: Prompt) -> Truth:
    return Truth.from_json(prompt.attributes["truth"])


def _autoencoder(config: ModelConfig) -> Callable[[np.ndarray], np.ndarray]:
    """What the frozen autoencoder makes of a clip (T, H, W, 3) uint8."""
    import torch

    from vc2.model.autoencoder import Autoencoder

    torch.set_num_threads(1)  # as ranks do it: the same bits
    model = Autoencoder.from_safetensors(Path(config.autoencoder_path))

    def through(clip: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(clip.astype(np.float32) / 127.5 - 1).permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            mean = model.moments(pixels).chunk(2, dim=1)[0]
            decoded = model.decode(mean * config.autoencoder.scaling_factor)[0]
        return ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()

    return through


def _measured(
    config: PipelineConfig, store: Store, work: Path, checkpoint: Checkpoint, count: int | None, progress: Progress
) -> tuple[SampleSet, Scorecard]:
    """Videos of a checkpoint for the first `count` prompts (None: all), and what the judges say of them."""
    wanted = config.evaluation
    if count is not None:
        wanted = wanted.evolve(num_prompts=min(count, len(wanted.all_prompts())))
    launch = run_here if wanted.launcher == "local" and wanted.world_size == 1 else None
    samples = sampled(wanted.sampling(), store, work, checkpoint, 0, progress, launch)
    return samples, scored(wanted, config, store, work, {"checkpoint": samples}, {}, 0, progress)


def _on_the_way(member: Member, final: Checkpoint, store: Store, work: Path, notes: list[str]) -> list[Checkpoint]:
    """Checkpoints of the states that a tuning kept before its last."""
    every = member.config.spatial.keep_every_steps
    if member.row.is_base or not every:
        return []
    run, found = Run(store, member.config.spatial.name, final.fingerprint), []
    states = {state.step for state in run.states()}
    for step in range(every, final.step, every):
        if done := find(store, checkpoint_prefix(run.stage, run.fingerprint, step), Checkpoint):
            found.append(done)
        elif step in states:
            from vc2.train.export import export_step  # slow to import

            found.append(export_step(run, work, step))
        else:
            notes.append(f"{member.row}, seed {member.seed}: no state of step {step} was kept, and its curve lacks it")
    return found


def _with_indices(clips: Figures, prompts: Sequence[Prompt], yardstick: Yardstick) -> dict[str, dict[str, float]]:
    """Figures of the judges with those that are made of them."""
    by_id = {prompt.id: prompt for prompt in prompts}
    whole = {}
    for name, figures in clips.items():
        text = float(np.mean([figures[right] for right in RIGHTS if right in figures]))
        more = {
            "quality": yardstick.quality(figures),
            "text": text,
            "watermarked": float(figures["watermark"] > WATERMARKED),
        }
        if _truth_of(by_id[name]).is_moving:
            more["motion"] = yardstick.motion(figures)
        if not by_id[name].attributes.get("seen", True):
            more["composition"] = text
        whole[name] = {**figures, **more}
    return whole


def _as_data(
    found: Comparison, asked: Sequence[Member], yardstick: Yardstick, apart: Sequence[Separation]
) -> dict[str, Any]:
    table = found.table()
    quality = {row: figures["quality"].mean for row, figures in table.items()}
    first = asked[0].config
    stages = {stage.name: stage.identity() | {"num_steps": stage.num_steps} for stage in (first.full, first.spatial)}
    return {
        "rows": {row.value: {name: asdict(value) for name, value in figures.items()} for row, figures in table.items()},
        "paper": {row.value: dict(zip(("aesthetic", "technical"), paper_rows()[row], strict=True)) for row in table},
        "seeds": list(found.seeds),
        "by_seed": {
            f"{row} {seed}": {
                figure: float(np.mean(known))
                for figure in FIGURES
                if (known := [clip[figure] for clip in clips.values() if figure in clip])
            }
            for (row, seed), clips in found.finals.items()
        },
        "prompts": dict(found.prompts),
        "claims": [asdict(finding) for finding in found.findings()],
        "rank_correlation_of_quality": rank_correlation(quality),
        "separation": [asdict(one) for one in apart],
        "yardstick": asdict(yardstick),
        "curves": {
            row.value: {figure: found.curve(figure, row) for figure in ("motion", "quality", "flicker", "jitter")}
            for row in found.rows
            if any(row is other for other, _ in found.curves)
        },
        "checkpoints": {f"{row} {seed}": f"{c.fingerprint}@{c.step}" for (row, seed), c in found.checkpoints.items()},
        "notes": list(found.notes),
        "stages": stages,  # of the first member; the others differ in strategy and seed
    }


def _shown(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts whose videos are on the page: two of the first kind, one of each other."""
    by_kind: dict[Any, list[Prompt]] = {}
    for prompt in prompts:
        by_kind.setdefault(prompt.attributes.get("kind"), []).append(prompt)
    return [prompt for number, found in enumerate(by_kind.values()) for prompt in found[: 1 if number else 2]]


def _texts(store: Store, found: Comparison, data: Mapping[str, Any], prompts: Sequence[Prompt]) -> dict[str, bytes]:
    from vc2.pipeline.compare_page import render_markdown, render_page
    from vc2.pipeline.gather import shown_videos

    names = [prompt.id for prompt in _shown(prompts)]
    videos = {
        row.value: {name: shown.data for name, shown in shown_videos(store, samples, names).items()}
        for (row, seed), samples in found.samples.items()
        if seed == found.seeds[0]
    }
    shown = {name: found.prompts[name] for name in names}
    return {
        PAGE: render_page(data, FIGURES, videos, shown).encode(),
        "table.json": (json.dumps(data, indent=1, allow_nan=False) + "\n").encode(),
        "table.md": render_markdown(data, FIGURES).encode(),
    }


BEFORE_AFTER = (Row.F_BASE, Row.F_SPA_DIR, Row.P_BASE, Row.P_SPA_LORA)
ENLARGED = 2


def _before_after(store: Store, found: Comparison, prompts: Sequence[Prompt]) -> bytes:
    """A PNG: of each prompt the frames of rows from left to right, a row of Table 3 below the other."""
    from PIL import Image, ImageDraw

    rows = [row for row in BEFORE_AFTER if row in found.rows] or found.rows[:1]
    strips: list[tuple[str, np.ndarray]] = []
    for prompt in prompts:
        for row in rows:
            if samples := found.samples.get((row, found.seeds[0])):
                (video,) = sampled_videos(store, samples, [prompt])
                strips.append((f"{row}   {prompt.text}", np.concatenate(list(video.frames), axis=1)))
    label, height, width = 14, strips[0][1].shape[0] * ENLARGED, strips[0][1].shape[1] * ENLARGED
    sheet = Image.new("RGB", (width, (height + label) * len(strips)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (text, frames) in enumerate(strips):
        top = number * (height + label)
        draw.text((3, top + 1), text, fill="black")
        sheet.paste(Image.fromarray(frames).resize((width, height), Image.Resampling.NEAREST), (0, top + label))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
