"""Counts what the networks of the recipes cost, for `vc2 plan`.

`python -m benchmarks.counted` writes vc2/train/counted.json: both training stages of every recipe, as each row of the
paper's Table 3 has them, and what sampling needs. It takes some minutes, no GPU and no weights; do it again whenever a
network, a recipe's sizes or the way of counting changes (a test says so).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from vc2.data.config import SampleForm
from vc2.pipeline.recipes import Recipe, resolve
from vc2.pipeline.table3 import Row
from vc2.train.config import TrainStage
from vc2.train.counted import COUNTED_FILE, Recorded
from vc2.train.estimate import estimate
from vc2.train.fit import Kind, stage_forms

__all__ = ["main", "stages_of"]


def stages_of(recipe: str, row: str = "") -> Iterator[tuple[TrainStage, dict[Kind, SampleForm]]]:
    """The training stages of a recipe with the forms of their samples."""
    config = resolve(recipe, work=Path("work").absolute(), table3=row, bind=False)
    yield config.full, stage_forms(video=config.webvid.form, image=config.laion_coco.form)
    yield config.spatial, stage_forms(image=config.jdb.form)


def main() -> None:
    """Count, and write."""
    from vc2.train.memory import COUNTING

    counts = Recorded({}, COUNTING)
    for recipe in get_args(Recipe):
        for row in ("", *Row):
            for stage, forms in stages_of(recipe, row):
                estimate(stage, forms, counts=counts)
                print(f"{recipe} {row or 'as it is'} {stage.name}: {len(counts.entries)} counts", flush=True)
    COUNTED_FILE.write_text(json.dumps(counts.entries, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
