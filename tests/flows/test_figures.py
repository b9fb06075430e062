"""What Prometheus reads of a store."""

import json
import time
from pathlib import Path

import pytest

from flows.figures import Figures
from vc2.storage import LocalStore
from vc2.train.attempts import Attempt, Run, this_process
from vc2.train.config import Layout


def write(store: Path, key: str, *lines: object) -> None:
    (store / key).parent.mkdir(parents=True, exist_ok=True)
    (store / key).write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(store: Path, stage: str, run: str, *lines: object) -> None:
    """A run of one attempt that was asked for 40 steps, and its training curve."""
    layout = Layout(world_size=1, micro_batch=1, threads=1)
    attempt = Attempt(
        number=1, start=None, layout=layout, holder=this_process(), heartbeat_seconds=2,
        request={"stage": {"num_steps": 40}},
    )  # fmt: skip
    assert Run(LocalStore(store), stage, run).claim(attempt)
    write(store, f"runs/{stage}/{run}/metrics/0001-00000000.jsonl", *lines)


def samples(text: str) -> dict[str, float]:
    """Samples by name and labels, of a text that holds nothing else but their types."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("# TYPE vc2_"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_run(
        tmp_path, "full", "abcdef0123456789",
        {"step": 10, "loss": 1.0, "samples_per_s": 8.0, "mfu": None}, {"step": 20, "loss": 0.5, "samples_per_s": 9.0},
        {"step": 20, "val_loss_ema": 0.4},
    )  # fmt: skip
    write(tmp_path, "shards/webvid/abc/manifest.json", {})
    write(tmp_path, "reports/abc/manifest.json", {})
    return tmp_path


def test_a_training_is_as_far_as_its_newest_line(store: Path) -> None:
    found = samples(Figures(store).text())
    labels = '{stage="full",run="abcdef012345"}'
    assert found[f"vc2_run_step{labels}"] == 20
    assert found[f"vc2_run_steps{labels}"] == 40
    assert found[f"vc2_run_loss{labels}"] == 0.5
    assert found[f"vc2_run_samples_per_second{labels}"] == 9
    assert f"vc2_run_mfu_ratio{labels}" not in found, "what is not known is not zero"
    assert time.time() - found[f"vc2_run_updated_timestamp_seconds{labels}"] < 100
    assert found['vc2_artifacts{kind="shard_set"}'] == found['vc2_artifacts{kind="report"}'] == 1
    assert found['vc2_artifacts{kind="checkpoint"}'] == 0


def test_a_damaged_run_hides_no_other(store: Path) -> None:
    write_run(store, "spatial", "123", {"step": 1, "loss": 2.0})
    (store / "runs/full/abcdef0123456789/metrics/0001-00000000.jsonl").write_text("{half a li")
    found = samples(Figures(store).text())
    assert found['vc2_run_step{stage="spatial",run="123"}'] == 1


def test_labels_are_quoted(store: Path) -> None:
    write_run(store, 'a"b', "123", {"step": 1, "loss": 2.0})
    assert 'vc2_run_step{stage="a\\"b",run="123"} 1' in Figures(store).text()


def test_asked_often_the_store_is_read_seldom(store: Path) -> None:
    figures = Figures(store)
    first = figures.text()
    write(store, "reports/new/manifest.json", {})
    assert figures.text() == first
