"""What docs/study.md tells beside the table of `vc2 compare`, from the checkpoints that a comparison left in its store.

`python -m benchmarks.study --store STORE` prints it and writes `benchmarks/results/study-<date>.json`. Nothing is
trained: what is not in the store yet is said, and left out. Videos of one frame are sampled into the store.

    frames   share of clips with a watermark where a checkpoint is asked for one frame, and for as many as the recipe's
    losses   of each tuning on what it is tuned to: mean of its first 40 steps and of its last 80
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from vc2.artifacts import Checkpoint, environment
from vc2.eval.ranks import run_here
from vc2.eval.scorecard import sampled_videos
from vc2.miniature.judges import judge
from vc2.miniature.references import WATERMARKED
from vc2.miniature.scene import Truth
from vc2.pipeline.compare import Member, chosen_rows, members
from vc2.pipeline.driver import plan
from vc2.pipeline.stages import sampled
from vc2.progress import counted, silent
from vc2.storage import Store, open_store
from vc2.train.metrics import read_metrics

FIRST, LAST = 40, 80  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="of a comparison")
    parser.add_argument("--recipe", default="study")
    parser.add_argument("--rows", default="", help="separated by commas; none: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--work", type=Path, default=Path("work"))
    options = parser.parse_args()
    store = open_store(options.store)
    rows = chosen_rows([name for name in options.rows.split(",") if name])
    asked = members(options.recipe, {}, rows, [int(seed) for seed in options.seeds.split(",")], options.work)
    figures = {
        "watermarked by frames": dict(_watermarked(asked, store, options.work)),
        "losses": dict(_losses(asked, store)),
    }
    for name, found in figures.items():
        print(f"\n{name}")
        for member, values in found.items():
            print(f"  {member:<22}" + "   ".join(f"{what}: {value:.3f}" for what, value in values.items()))
    file = Path(__file__).parent / "results" / f"study-{datetime.now(UTC):%Y-%m-%d}.json"
    said: dict[str, Any] = {
        "recipe": options.recipe,
        "rows": rows,
        "seeds": options.seeds,
        "environment": environment(),
        **figures,
    }
    file.write_text(json.dumps(said, indent=1) + "\n")
    print(f"\n{file}")


def _watermarked(asked: Sequence[Member], store: Store, work: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Of the bases, by the prompts that name a single moving thing."""
    for member in asked:
        if not member.row.is_base or (made := _checkpoint(member, store)) is None:
            continue
        whole = member.config.evaluation
        moving = [prompt for prompt in whole.all_prompts() if _is_moving(prompt.attributes["truth"])]
        shares = {}
        for frames in (1, whole.frames):
            wanted = whole.evolve(frames=frames)
            videos = sampled_videos(store, sampled(wanted.sampling(), store, work, made, 0, silent, run_here), moving)
            truths = [Truth.from_json(prompt.attributes["truth"]) for prompt in moving]
            opacities = [
                judge(video.frames, truth, float(whole.play_fps))["watermark"]
                for video, truth in zip(videos, truths, strict=True)
            ]
            shares[counted(frames, "frame")] = float(np.mean(np.array(opacities) > WATERMARKED))
        yield f"{member.row} {member.seed}", shares


def _losses(asked: Sequence[Member], store: Store) -> Iterator[tuple[str, dict[str, float]]]:
    for member in asked:
        if member.row.is_base or (made := _checkpoint(member, store)) is None:
            continue
        lines = read_metrics(store, member.config.spatial.name, made.fingerprint)
        known = [(line["step"], line["loss"]) for line in lines if line["loss"] is not None]
        first = [loss for step, loss in known if step <= FIRST]
        last = [loss for step, loss in known if made.step - LAST < step <= made.step]  # a longer run has more
        yield f"{member.row} {member.seed}", {"first": float(np.mean(first)), "last": float(np.mean(last))}


def _checkpoint(member: Member, store: Store) -> Checkpoint | None:
    made = next(stage.artifact for stage in plan(member.config, store) if stage.name == member.last)
    if made is None:
        print(f"{member.row}, seed {member.seed}: not in the store")
    return made if isinstance(made, Checkpoint) else None


def _is_moving(truth: dict[str, Any]) -> bool:
    return len(truth["things"]) == 1 and truth["things"][0]["motion"] is not None


if __name__ == "__main__":
    main()
