"""Scores of any folder of videos, and what a scorecard says in a few lines of text."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vc2.artifacts import Report, find, fingerprint, load_manifest
from vc2.eval.config import EvaluateStage
from vc2.eval.leaderboard import ASPECT_LABELS, comparison, shown
from vc2.eval.metrics import ASPECT_NAMES, EVALCRAFTER, METRICS, Metric
from vc2.eval.prompts import Prompt, scoring_text
from vc2.pipeline.driver import REPORT_VERSION
from vc2.progress import Progress, silent
from vc2.storage import Store

__all__ = ["evaluate_folder", "lacking", "paint_references", "score_lines", "scores_of"]

STAGE = "evaluate/folder"


def evaluate_folder(
    folder: Path,
    wanted: EvaluateStage,
    store: Store,
    work: Path,
    *,
    progress: Progress = silent,
    repeat: int = 0,
    force: bool = False,
) -> Report:
    """Score the videos of a folder, whoever made them, and write the report. Safe to repeat.

    Args:
        folder: A video a prompt, called by the prompt's id (`vc2.eval.folder`).
        wanted: What to measure; its prompts are what the videos were made from.
        store, work: Where artifacts are kept; a scratch folder.
        progress: Told as videos are probed and measured.
        repeat: Raise it to measure and report once more.
        force: Raise it beyond what is there.
    """
    from vc2.eval.folder import import_folder
    from vc2.eval.report import publish
    from vc2.eval.scorecard import STAGE_VERSION, score
    from vc2.pipeline.gather import gather_videos

    started = time.monotonic()
    wanted = wanted.with_prompts().with_metrics()
    samples = import_folder(folder, wanted.all_prompts(), store, progress=progress)
    inputs = {"samples": samples.content_digest}

    def name_of(repeat: int) -> str:
        return fingerprint(STAGE, REPORT_VERSION, wanted, inputs, repeat)

    while force and find(store, f"reports/{name_of(repeat)}", Report):
        repeat += 1
    reported = name_of(repeat)
    if done := find(store, f"reports/{reported}", Report):
        return done
    name = fingerprint("score", STAGE_VERSION, wanted, inputs, repeat)
    card = score(wanted, store, work, fingerprint=name, samples=samples, progress=progress, repeat=repeat)
    data = gather_videos(store, samples, card, prompts=wanted.all_prompts(), compare=wanted.compare, progress=progress)
    return publish(
        store,
        data,
        fingerprint=reported,
        stage=STAGE,
        stage_version=REPORT_VERSION,
        inputs={"samples": samples, "scores": card},
        config=wanted.model_dump(mode="json"),
        repeat=repeat,
        seconds=time.monotonic() - started,
        counts={"videos": card.counts["videos"]},
    )


def paint_references(
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    sdxl: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Paint the images that SD_Score compares with into a folder. Safe to repeat: what is painted stays.

    Returns:
        How many prompts and images there are, and the digest that says which.
    """
    import torch

    from vc2 import pretrained
    from vc2.eval.networks.references import ReferencePainter, make_references

    path = pretrained.resolve("sdxl-base", path=sdxl)
    painter = ReferencePainter.load(path if path.is_dir() else path.parent, torch.device(device))
    texts = {prompt.id: scoring_text(prompt, "compat") for prompt in prompts}
    made = make_references(
        painter, texts, folder, seed=seed, progress=lambda done, total: progress("references", done, total)
    )
    return {"prompts": len(made.files), "images": sum(map(len, made.files.values())), "digest": made.digest}


def scores_of(store: Store, report: Report) -> dict[str, Any]:
    """What the scorecard behind a report says of the benchmark, and which files of a folder were left out."""
    inputs = load_manifest(store, report.prefix).inputs
    card = load_manifest(store, inputs["scores"].prefix)
    facts = load_manifest(store, inputs["samples"].prefix).facts
    left_out = {
        words: facts[name]
        for name, words in (("second_videos", "second videos of a prompt"), ("of_no_prompt", "videos of no prompt"))
        if facts.get(name)
    }
    return json.loads(store.read(card.file("summary.json").key))["benchmark"] | (
        {"left_out": left_out} if left_out else {}
    )


def lacking(benchmark: Mapping[str, Any], *, by_default: bool) -> list[str]:
    """Metrics that were asked for and not measured, in a mode or more; of those asked for by default, not those that no
    prompt calls for."""
    return sorted(
        {
            name
            for said in benchmark.get("modes", {}).values()
            for name, found in said["metrics"].items()
            if "not_measured" in found and not (by_default and found["not_measured"].startswith("no prompt "))
        }
    )


def score_lines(benchmark: Mapping[str, Any], compare: tuple[str, ...] = ()) -> Iterator[str]:
    """A scorecard for a terminal: metrics by aspect in both modes, aspects, rows to compare with, what to beware of."""
    modes: Mapping[str, Any] = benchmark.get("modes", {})
    if not modes:
        return
    videos = benchmark["videos"]
    yield f"{videos['scored']} of {videos['expected']} videos scored"
    for name, why in list(videos["rejected"].items())[:8]:
        yield f"  {name}: {why}"
    if len(videos["rejected"]) > 8:
        yield f"  and {len(videos['rejected']) - 8} more"
    for what, names in benchmark.get("left_out", {}).items():
        yield f"  {what}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
    yield f"{'metric':24} " + " ".join(f"{mode:>10}" for mode in modes) + "       n"
    asked = next(iter(modes.values()))["metrics"]
    absent: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
        if name not in asked:
            continue
        found = [modes[mode]["metrics"][name] for mode in modes]
        reasons = {mode: said.get("not_measured") for mode, said in zip(modes, found, strict=True)}
        for mode, reason in reasons.items():
            if reason and len(set(reasons.values())) > 1:
                absent.setdefault(reason, []).append(f"{name} ({mode})")
            elif reason and name not in absent.setdefault(reason, []):
                absent[reason].append(name)
        if any("value" in said for said in found):
            values = " ".join(f"{_number(metric, said):>10}" for said in found)
            count = max(said.get("n", 0) for said in found)
            arrow = {"up": "higher is better", "down": "lower is better", "neutral": ""}[metric.direction]
            yield f"{name:24} {values} {count:7}  {arrow}"
    for name in (*ASPECT_NAMES, "total"):
        if not set(asked) & set(EVALCRAFTER):
            break
        shown = [f"{said['aspects'][name]:.2f}" if name in said["aspects"] else "-" for said in modes.values()]
        plain = next(iter(modes.values()))["averages"].get(name)
        beside = f"  plain average {plain:.2f}" if plain is not None else ""
        yield f"{ASPECT_LABELS[name]:24} {' '.join(f'{value:>10}' for value in shown)}        {beside}".rstrip()
    for reason, names in absent.items():
        yield f"not measured: {', '.join(names)}: {reason}"
    if any(reason.startswith("weights not found") for reason in absent):
        yield "`vc2 doctor` says where weights are to be had"
    withheld = next(iter(modes.values()))["withheld"]
    called_for = {METRICS[name].aspect for name in asked if name in EVALCRAFTER}
    for name in (*ASPECT_NAMES, "total"):
        if name in withheld and (name in called_for or (name == "total" and len(called_for) == len(ASPECT_NAMES))):
            yield f"not given: {ASPECT_LABELS[name]}: {withheld[name]}"
    yield from (f"note: {said}" for said in benchmark.get("warnings", ()))
    if compare:
        yield from _compared(benchmark, compare)


def _compared(benchmark: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    for table in comparison(benchmark, names):
        yield ""
        yield table.title
        width = max(len(line.name) for line in table.lines)
        labels = [column.label for column in table.columns]
        yield f"{'':{width}}  " + "  ".join(labels)
        for line in table.lines:
            cells = (f"{shown(line, column) or '-':>{len(column.label)}}" for column in table.columns)
            note = "" if line.is_comparable or line.is_ours else "  not comparable"
            yield f"{line.name:{width}}  " + "  ".join(cells) + note
        yield from (f"  {note}" for note in table.notes)


def _number(metric: Metric, said: Mapping[str, Any]) -> str:
    if "value" not in said:
        return "-"
    return f"{said['value']:.4f}" if metric.name == "Warping_Error" else f"{said['value']:.2f}"
