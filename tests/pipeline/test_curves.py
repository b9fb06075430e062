"""The page of a run's curves."""

import json
import re

from vc2.artifacts import Manifest
from vc2.pipeline.curves import publish_curves
from vc2.storage import LocalStore
from vc2.train.attempts import Attempt, Run, this_process
from vc2.train.config import Layout

CHECKPOINT = Manifest(
    kind="checkpoint", stage="full", stage_version=1, fingerprint="f" * 64, config={}, inputs={}, files=(),
    facts={"trivial_loss": 1.0},
)  # fmt: skip


def test_what_was_logged_is_drawn(store: LocalStore) -> None:
    """A chart for each figure that there is, none for one that there is not."""
    run = Run(store, "full", CHECKPOINT.fingerprint)
    layout = Layout(world_size=1, micro_batch=1, threads=1)
    assert run.claim(Attempt(number=1, start=None, layout=layout, holder=this_process(), heartbeat_seconds=2))
    lines = [{"step": step, "loss": 1 / step, "loss_image": None, "samples_per_s": 8.0} for step in range(1, 9)]
    lines.append({"step": 8, "val_loss_ema": 0.5})
    store.write(run.metrics_key(1, 0), "".join(json.dumps(line) + "\n" for line in lines).encode())

    page = store.read(publish_curves(store, CHECKPOINT)).decode()
    assert re.findall("<h3>(.*?)</h3>", page) == ["Loss", "Validation loss of the EMA weights", "Speed"]
    assert page.count("trivial predictor") == 2, "of losses alone"
    assert ">samples per second<" in page
    assert "://" not in re.sub("<style>.*?</style>", "", page, flags=re.DOTALL), "it asks nobody for anything"


def test_a_run_that_logged_nothing_says_so(store: LocalStore) -> None:
    """An imported checkpoint has no run."""
    assert "Nothing was logged." in store.read(publish_curves(store, CHECKPOINT)).decode()
