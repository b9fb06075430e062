"""What docs/study.md tells beside the table of `vc2 compare`, from what a comparison left in its store.

`python -m benchmarks.study REPORT --store STORE` prints it and writes it to a JSON file (`--out`). REPORT is the folder
of the comparison's page, `reports/...`. Nothing is trained; videos of one frame are sampled into the store.

    places   of each row and figure, where its clips lie between the ends of the index that the figure is part of: 0 and
             1 are the ends, cut to [-1, 2]. Of moving single things for the index of motion
    rights   share of clips in which what the caption says of a thing is right
    ways     of each base: share of moving clips that go along the captioned line, and of these the share that goes the
             captioned way
    frames   of each base, by the prompts with a moving thing: share with a watermark where one frame is asked for, and
             where as many as the recipe's are
    losses   of each tuning on what it is tuned to: mean of its first 40 steps and of its last 80
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vc2.artifacts import Checkpoint, Scorecard, environment, find, load_manifest
from vc2.config import parse_settings
from vc2.eval.ranks import run_here
from vc2.eval.scorecard import sampled_videos
from vc2.miniature.judges import RIGHTS, judge
from vc2.miniature.references import MOTION, QUALITY, WATERMARKED
from vc2.miniature.scene import Truth
from vc2.pipeline.compare import Member, members
from vc2.pipeline.driver import plan
from vc2.pipeline.gather import judged_figures
from vc2.pipeline.stages import sampled
from vc2.pipeline.table3 import Row
from vc2.progress import counted, silent
from vc2.storage import Store, open_store
from vc2.train.metrics import read_metrics

FIRST, LAST = 40, 80  # steps
Shares = dict[str, float]


@dataclass(frozen=True)
class Study:
    """A comparison that was made."""

    store: Store
    work: Path
    asked: Sequence[Member]
    checkpoints: Mapping[str, Checkpoint]  # by "row seed"
    cards: Mapping[tuple[Row, int], Scorecard]
    yardstick: Mapping[str, Mapping[str, float]]

    @classmethod
    def read(cls, report: str, recipe: str, settings: Mapping[str, Any], store: Store, work: Path) -> "Study":
        manifest = load_manifest(store, report)
        rows, seeds = [Row(name) for name in manifest.config["rows"]], manifest.config["seeds"]
        asked = members(recipe, settings, rows, seeds, work)
        made = {}
        for member in asked:
            found = next(stage.artifact for stage in plan(member.config, store) if stage.name == member.last)
            if not isinstance(found, Checkpoint):
                raise SystemExit(
                    f"{member.row}, seed {member.seed} is not in the store: other settings than the report's?"
                )
            made[_name(member)] = found
        cards = {}
        for member in asked:
            card = find(store, manifest.inputs[f"{member.row} seed {member.seed}"].prefix, Scorecard)
            assert card is not None
            cards[member.row, member.seed] = card
        table = json.loads(store.read(manifest.file("table.json").key))
        return cls(store, work, asked, made, cards, table["yardstick"])

    def clips(self, row: Row, seed: int | None = None) -> list[Mapping[str, float]]:
        """What the judges say of a row's clips, of all seeds or of one."""
        cards = [card for (other, of), card in self.cards.items() if other is row and seed in (None, of)]
        return [clip for card in cards for clip in judged_figures(self.store, card).values()]

    @property
    def rows(self) -> list[Row]:
        return list(dict.fromkeys(member.row for member in self.asked))


def places(study: Study) -> dict[str, Shares]:
    ends = [(name, "unconnected", "real") for name in MOTION] + [(name, "video_set", "image_set") for name in QUALITY]
    found = {}
    for row in study.rows:
        clips, shares = study.clips(row), {}
        for name, low, high in ends:
            at, to = study.yardstick[low][name], study.yardstick[high][name]
            chosen = [clip for clip in clips if name in clip and (name in QUALITY or "path" in clip)]
            shares[name] = float(np.mean([np.clip((clip[name] - at) / (to - at), -1, 2) for clip in chosen]))
        found[row.value] = shares
    return found


def rights(study: Study) -> dict[str, Shares]:
    return {
        row.value: {name: float(np.mean([clip[name] for clip in study.clips(row)])) for name in RIGHTS}
        for row in study.rows
    }


def ways(study: Study) -> dict[str, Shares]:
    found = {}
    for member in study.asked:
        if member.row.is_base:
            moving = [clip for clip in study.clips(member.row, member.seed) if "axis" in clip]
            along = [clip["direction"] for clip in moving if clip["axis"]]
            found[_name(member)] = {
                "along": len(along) / len(moving),
                "right way": float(np.mean(along)),
                "of": len(along),
            }
    return found


def frames(study: Study) -> dict[str, Shares]:
    found = {}
    for member in study.asked:
        if not member.row.is_base:
            continue
        whole = member.config.evaluation
        truths = [(prompt, Truth.from_json(prompt.attributes["truth"])) for prompt in whole.all_prompts()]
        moving = [(prompt, truth) for prompt, truth in truths if truth.is_moving]
        prompts, shares = [prompt for prompt, _ in moving], {}
        for number in (1, whole.frames):
            made = study.checkpoints[_name(member)]
            asked = whole.evolve(frames=number).sampling()
            videos = sampled(asked, study.store, study.work, made, 0, silent, run_here)
            opacities = [
                judge(video.frames, truth, float(whole.play_fps))["watermark"]
                for video, (_, truth) in zip(sampled_videos(study.store, videos, prompts), moving, strict=True)
            ]
            shares[counted(number, "frame")] = float(np.mean(np.array(opacities) > WATERMARKED))
        found[_name(member)] = shares
    return found


def losses(study: Study) -> dict[str, Shares]:
    found = {}
    for member in study.asked:
        if member.row.is_base:
            continue
        made = study.checkpoints[_name(member)]
        lines = read_metrics(study.store, member.config.spatial.name, made.fingerprint)
        known = [(line["step"], line["loss"]) for line in lines if line["loss"] is not None]
        first = [loss for step, loss in known if step <= FIRST]
        last = [loss for step, loss in known if made.step - LAST < step <= made.step]  # a longer run has more
        found[_name(member)] = {"first": float(np.mean(first)), "last": float(np.mean(last))}
    return found


def _name(member: Member) -> str:
    return f"{member.row} {member.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", help="reports/... of a comparison")
    parser.add_argument("--store", required=True)
    parser.add_argument("--recipe", default="study")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="as the comparison had them")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    store, settings = open_store(options.store), parse_settings(options.set)
    study = Study.read(options.report, options.recipe, settings, store, options.work.absolute())
    said = {part.__name__: part(study) for part in (places, rights, ways, frames, losses)}
    for name, found in said.items():
        print(f"\n{name}")
        for row, shares in found.items():
            print(f"  {row:<18}" + "   ".join(f"{what} {share:.3g}" for what, share in shares.items()))
    options.out.write_text(json.dumps({**said, "environment": environment()}, indent=1) + "\n")
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
