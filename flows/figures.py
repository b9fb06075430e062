"""Figures of a local store for Prometheus, in its text form: how far each training is, how fast, and what is finished.

    vc2_run_step{stage,run}                        step of the newest line of the training curve
    vc2_run_steps{stage,run}                       steps that it is asked for
    vc2_run_loss, vc2_run_grad_norm, vc2_run_samples_per_second, vc2_run_goodput_ratio, vc2_run_mfu_ratio,
    vc2_run_data_wait_ratio, vc2_run_memory_gib    of that line; left out where it has none
    vc2_run_updated_timestamp_seconds{stage,run}   when it was written
    vc2_artifacts{kind}                            finished artifacts
    vc2_store_free_bytes                           left on the disk of the store

`run` is the first 12 digits of the fingerprint. All is read from the store, so it tells of runs however they were
started. A run that has been silent for a week is left out.
"""

import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vc2.errors import Vc2Error
from vc2.storage import LocalStore
from vc2.train.metrics import read_metrics

__all__ = ["Figures"]

FRESH = 10.0  # seconds that an answer is good for
SILENT = 7 * 24 * 3600.0  # seconds
OF_A_LINE = {
    "step": "step",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "samples_per_s": "samples_per_second",
    "goodput": "goodput_ratio",
    "mfu": "mfu_ratio",
    "data_wait": "data_wait_ratio",
    "memory_gib": "memory_gib",
}
MANIFESTS = {
    "shard_set": "shards/*/*/manifest.json",
    "checkpoint": "runs/*/*/checkpoints/*/manifest.json",
    "sample_set": "samples/*/manifest.json",
    "scorecard": "scores/*/manifest.json",
    "report": "reports/*/manifest.json",
}


class Figures:
    """Reads a store at most every few seconds, however often it is asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._text, self._read_at = "", -1e9

    def text(self) -> str:
        """All figures, as Prometheus takes them."""
        with self._lock:
            if time.monotonic() - self._read_at > FRESH:
                self._text, self._read_at = "".join(self._families()), time.monotonic()
            return self._text

    def _families(self) -> Iterator[str]:
        by_name: dict[str, list[str]] = {}
        for labels, figures in self._runs():
            for name, value in figures.items():
                by_name.setdefault(f"vc2_run_{name}", []).append(f"{_labels(labels)} {value!r}")
        by_name["vc2_artifacts"] = [
            f"{_labels({'kind': kind})} {sum(1 for _ in self.root.glob(pattern))}"
            for kind, pattern in MANIFESTS.items()
        ]
        if self.root.exists():
            by_name["vc2_store_free_bytes"] = [f" {shutil.disk_usage(self.root).free}"]
        for name, samples in by_name.items():
            yield f"# TYPE {name} gauge\n" + "".join(f"{name}{sample}\n" for sample in samples)

    def _runs(self) -> Iterator[tuple[dict[str, str], dict[str, float]]]:
        store = LocalStore(self.root, is_ours=False)
        for folder in sorted(self.root.glob("runs/*/*/metrics")):
            stage, fingerprint = folder.parts[-3:-1]
            try:
                written = max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)
                lines = read_metrics(store, stage, fingerprint) if time.time() - written < SILENT else []
            except (OSError, ValueError, KeyError, Vc2Error):  # half written, collected, of another version
                continue
            if lines:
                line = lines[-1]
                figures = {name: line[key] for key, name in OF_A_LINE.items() if line.get(key) is not None}
                figures |= {"updated_timestamp_seconds": written} | _asked(folder.parent / "attempts")
                yield {"stage": stage, "run": fingerprint[:12]}, figures


def _asked(attempts: Path) -> dict[str, float]:
    """Steps that the newest attempt was asked for."""
    for path in sorted(attempts.glob("*.json"), reverse=True)[:1]:
        said: Any = json.loads(path.read_text())
        if isinstance(steps := said.get("request", {}).get("stage", {}).get("num_steps"), int):
            return {"steps": steps}
    return {}


def _labels(labels: Mapping[str, str]) -> str:
    def quoted(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{name}="{quoted(value)}"' for name, value in labels.items()) + "}"
