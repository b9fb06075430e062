"""The rows of Table 3 beside each other, in a small world whose truth is known: one table, and a verdict per claim.

    member = a row with a seed = a recipe with settings laid over it
    members --drive--> checkpoints --sample--> videos --judge--> figures --claims--> table, verdicts, page

A member's stages are those of the DAG, under the same names and fingerprints: what members share (shards, the base of a
seed) is made once, and what is in the store already is taken, so that a comparison that was broken off goes on. Of a
tuning the states that its stage keeps on the way (`keep_every_steps`) are made checkpoints too, and judged by fewer
prompts: its curve.

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
    commit,
    find,
    fingerprint,
    put_file,
)
from vc2.config import Config
from vc2.errors import ConfigError, StoreError
from vc2.eval.config import Prompt
from vc2.eval.ranks import run_here
from vc2.eval.scorecard import sampled_videos
from vc2.miniature.references import WATERMARKED, Separation, Yardstick, separation
from vc2.miniature.scene import Truth
from vc2.pipeline.claims import End, Finding, Interval, Lookup, interval, judged, paper_rows, rank_correlation
from vc2.pipeline.driver import PlannedStage, asked_of, drive, plan
from vc2.pipeline.gather import judged_figures
from vc2.pipeline.recipes import PipelineConfig, resolve
from vc2.pipeline.stages import sampled, scored
from vc2.pipeline.table3 import Row, last_stage, named_row, row_settings
from vc2.progress import Progress, silent
from vc2.storage import Store, join_uri
from vc2.train.attempts import Run
from vc2.train.export import export_step

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
STAGE_VERSION = 1
PAGE = "compare.html"
CURVE_PROMPTS = 12  # by which the checkpoints on the way are judged
SUREST = 0.9  # a judge that tells less than this share of real clips from damaged ones is not believed
FIGURES = {  # of the table: what it is, and whether more is better (None: neither)
    "quality": ("0 looks like the video set, 1 like the image set", True),
    "watermarked": ("share of clips with a watermark", False),
    "sharpness": ("slope of edges, 1 / pixel", True),
    "noise": ("grain, grey levels", False),
    "text": ("colour, shape, background, count, direction: mean share right", True),
    "composition": ("the same for what no video shows", True),
    "motion": ("0 unconnected pictures, 1 as real clips", True),
    "direction": ("share that moves as the caption says (rests, where it says so)", True),
    "speed": ("units a second", None),
    "jitter": ("distance from a straight path, units", False),
    "flicker": ("change of the background's level, grey levels", False),
    "flash": ("change of the thing's level, grey levels", False),
}
RIGHTS = ("colour", "shape", "background", "count", "direction")


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
    yardstick: Yardstick
    separation: Sequence[Separation]
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
        """A figure clip by clip, (S, P); None if the row was not run, or has no checkpoint on the way."""
        found = np.full((len(self.seeds), len(self.prompts)), np.nan)
        there = False
        for number, seed in enumerate(self.seeds):
            clips = self._clips(row, seed, end)
            if clips is None:
                continue
            there = True
            for place, prompt in enumerate(self.prompts):
                found[number, place] = self._value(figure, row, seed, prompt, clips)
        return found if there else None

    def _clips(self, row: Row, seed: int, end: End) -> Figures | None:
        if end == "end":
            return self.finals.get((row, seed))
        curve = self.curves.get((row, seed), {})
        return curve[min(curve)] if curve else None

    def _value(self, figure: str, row: Row, seed: int, prompt: str, clips: Figures) -> float:
        found = clips.get(prompt)
        if found is None:
            return float("nan")
        if figure == "lightened":
            before = self.finals.get((row.base, seed), {}).get(prompt, {}).get("watermark")
            now = found["watermark"]
            return float("nan") if before is None else float(now < max(0.5 * before, WATERMARKED))
        return found.get(figure, float("nan"))

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

    def curve(self, figure: str, row: Row) -> dict[int, float]:
        """A figure over the steps of tuning: mean over seeds, of the prompts that all checkpoints were judged by."""
        steps: dict[int, list[float]] = {}
        for seed in self.seeds:
            curve = self.curves.get((row, seed), {})
            if not curve:
                continue
            asked = set(curve[min(curve)])
            whole = curve | {self.checkpoints[row, seed].step: self.finals[row, seed]}
            for step, clips in whole.items():
                steps.setdefault(step, []).append(float(np.nanmean([clips[p].get(figure, np.nan) for p in asked])))
        return {step: float(np.mean(found)) for step, found in sorted(steps.items())}

    def findings(self) -> list[Finding]:
        """The paper's claims with their verdicts."""
        lookup: Lookup = self.values
        return judged(lookup)


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
        ConfigError: If the recipe has no world whose truth is known, or a seed comes twice.
    """
    if len(set(seeds)) < len(seeds) or not seeds or min(seeds) < 0:
        raise ConfigError(f"seeds {', '.join(map(str, seeds)) or '(none)'}: expected different numbers from 0 up")
    asked = (
        settings.model_dump(mode="json", exclude_none=True) if isinstance(settings, Config) else dict(settings or {})
    )
    plain = resolve(recipe, asked, work=work, bind=False)
    if plain.world is None:
        raise ConfigError(
            f"recipe {recipe} has no small world whose truth is known, and the judges need one; take study or miniature"
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
    prompts = asked[0].config.evaluation.all_prompts()
    found = _begun(asked, work)
    cards: dict[str, Artifact] = {}
    for number, member in enumerate(asked):
        progress("compare", number, len(asked))
        made = drive(
            member.config, store, lambda planned, inputs, of=member: run(of, planned, inputs), stop_after=member.last
        )
        assert isinstance(made, Checkpoint)
        key = member.row, member.seed
        found.checkpoints[key] = made
        samples, card = _measured(member.config, store, work, made, None, progress)
        found.samples[key], cards[f"{member.row} {member.seed}"] = samples, card
        found.finals[key] = _with_indices(found, member, judged_figures(store, card))
        for checkpoint in _on_the_way(member, made, store, work, found.notes):
            _, card = _measured(member.config, store, work, checkpoint, CURVE_PROMPTS, progress)
            cards[f"{member.row} {member.seed} {checkpoint.step}"] = card
            figures = _with_indices(found, member, judged_figures(store, card))
            found.curves.setdefault(key, {})[checkpoint.step] = figures
    progress("compare", len(asked), len(asked))
    name = fingerprint(STAGE, STAGE_VERSION, {}, {role: card.fingerprint for role, card in cards.items()})
    prefix = f"reports/{name}"
    if done := find(store, prefix, Report):
        return done
    data = _as_data(found, asked)
    texts = _texts(store, found, data, prompts)
    texts["before_after.png"] = _before_after(store, found, _shown(prompts)[:1] + _shown(prompts)[2:4])
    manifest = Manifest(
        kind="report",
        stage=STAGE,
        stage_version=STAGE_VERSION,
        fingerprint=name,
        config={"rows": [row.value for row in found.rows], "seeds": list(found.seeds)},
        inputs=cards,
        files=tuple(put_file(store, prefix, file, content) for file, content in texts.items()),
        counts={"members": len(asked), "videos": sum(map(len, found.finals.values()))},
        facts={"verdicts": {claim["key"]: claim["verdict"] for claim in data["claims"]}},
        seconds=round(time.monotonic() - started, 3),
    )
    report = commit(store, prefix, manifest)
    assert isinstance(report, Report)
    return report


def _begun(asked: Sequence[Member], work: Path) -> Comparison:
    """The judges, tried out, and the ends of the indices."""
    evaluation = asked[0].config.evaluation
    prompts = evaluation.all_prompts()
    size, fps = (evaluation.width, evaluation.height), float(evaluation.play_fps)
    apart = separation(*size, evaluation.frames, fps)
    if unsure := [one for one in apart if one.accuracy < SUREST]:
        one = unsure[0]
        raise ConfigError(
            f"the judge of {one.figure} tells {one.accuracy:.0%} of real clips from damaged ones ({one.damage}) at "
            f"{size[0]} x {size[1]} pixels, expected {SUREST:.0%}; compare at the recipe's own size"
        )
    truths = [Truth.from_json(prompt.attributes["truth"]) for prompt in prompts]
    moving = [truth for truth in truths if len(truth.things) == 1 and truth.things[0].motion]
    if not moving:
        raise ConfigError("no prompt names a single thing that moves; the index of motion needs some")
    through = _autoencoder(asked[0].config)
    yardstick = Yardstick.made_for(moving, size, evaluation.frames, fps, through)
    seeds = list(dict.fromkeys(member.seed for member in asked))
    return Comparison(seeds, {prompt.id: prompt.text for prompt in prompts}, yardstick, apart)


def _autoencoder(config: PipelineConfig) -> Callable[[np.ndarray], np.ndarray]:
    """What the frozen autoencoder makes of a clip (T, H, W, 3) uint8."""
    import torch

    from vc2.model.autoencoder import Autoencoder

    model = Autoencoder.from_safetensors(Path(config.full.model.autoencoder_path))

    def through(clip: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(clip.astype(np.float32) / 127.5 - 1).permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            mean = model.moments(pixels).chunk(2, dim=1)[0]
            decoded = model.decode(mean * config.full.model.autoencoder.scaling_factor)[0]
        return ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()

    return through


def _measured(
    config: PipelineConfig, store: Store, work: Path, checkpoint: Checkpoint, count: int | None, progress: Progress
) -> tuple[SampleSet, Scorecard]:
    """Videos of a checkpoint for the first `count` prompts (None: all), and what the judges say of them."""
    wanted = config.evaluation if count is None else config.evaluation.evolve(num_prompts=count)
    launch = run_here if wanted.launcher == "local" and wanted.world_size == 1 else None
    samples = sampled(wanted.sampling(), store, work, checkpoint, 0, progress, launch)
    return samples, scored(wanted, config, store, work, {"checkpoint": samples}, {}, 0, progress)


def _on_the_way(member: Member, final: Checkpoint, store: Store, work: Path, notes: list[str]) -> list[Checkpoint]:
    """Checkpoints of the states that a tuning kept before its last."""
    every = member.config.spatial.keep_every_steps
    if member.row.is_base or not every:
        return []
    run, found = Run(store, member.config.spatial.name, final.fingerprint), []
    for step in range(every, final.step, every):
        try:
            found.append(export_step(run, work, step))
        except StoreError as error:
            notes.append(f"{member.row}, seed {member.seed}: no checkpoint of step {step} ({error})")
    return found


def _with_indices(found: Comparison, member: Member, clips: Figures) -> dict[str, dict[str, float]]:
    """Figures of the judges with those that are made of them."""
    kinds = {prompt.id: prompt.attributes.get("kind") for prompt in member.config.evaluation.all_prompts()}
    whole = {}
    for prompt, figures in clips.items():
        text = float(np.mean([figures[name] for name in RIGHTS if name in figures]))
        more = {
            "quality": found.yardstick.quality(figures),
            "text": text,
            "watermarked": float(figures["watermark"] > WATERMARKED),
        }
        if kinds[prompt] != "pair":
            more["motion"] = found.yardstick.motion(figures)
        if kinds[prompt] != "seen":
            more["composition"] = text
        whole[prompt] = {**figures, **more}
    return whole


def _as_data(found: Comparison, asked: Sequence[Member]) -> dict[str, Any]:
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
        "separation": [asdict(one) for one in found.separation],
        "yardstick": asdict(found.yardstick),
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
        "table.json": (json.dumps(data, indent=1) + "\n").encode(),
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
