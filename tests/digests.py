"""What a run of the pipeline has made, told by digests: of two runs that made the same, these are equal.

`python -m tests.digests STORE WORK SETTINGS` prints them as JSON, for a store that only another host reaches.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vc2.artifacts import load_manifest, verify
from vc2.pipeline.driver import STAGES, plan
from vc2.pipeline.recipes import resolve
from vc2.storage import Store, open_store

__all__ = ["as_options", "faults_of", "made"]

ROWS = ("rows_with_samples", "rows_rejected", "rows_duplicate")


def as_options(settings: Mapping[str, Any]) -> list[str]:
    """Settings as `vc2 run` takes them."""
    return [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]


def made(store: Store, work: Path, settings: Mapping[str, Any], *, last: str = STAGES[-1]) -> dict[str, str]:
    """Digests of all that the plan of the miniature has made, up to a stage: by stage the content, by stage and name
    each file. Videos, scores and the report have to be there, no more: a report tells of times and places, and the last
    bits of a video may differ from one process to the next, where the network adds numbers up in another order."""
    found: dict[str, str] = {}
    for stage in plan(resolve("miniature", settings, work=work), store)[: STAGES.index(last) + 1]:
        assert stage.state == "done", f"{stage.name} is {stage.state}: {stage.why}"
        if not stage.name.startswith("evaluate/"):
            manifest = load_manifest(store, stage.prefix)
            found[stage.name] = manifest.content_digest
            found |= {f"{stage.name} {entry.name}": entry.sha256 for entry in manifest.files}
    for folder in ("samples/", "scores/"):
        for prefix in manifests(store, folder):
            found |= {f"{prefix} {entry.name}": "is there" for entry in load_manifest(store, prefix).files}
    return found


def faults_of(store: Store) -> Iterator[str]:
    """What is wrong with the artifacts of a store: bytes, and accounts that do not add up."""
    for prefix in manifests(store):
        yield from verify(store, prefix)
        manifest = load_manifest(store, prefix)
        counts = manifest.counts
        if manifest.kind == "shard_set" and counts["rows"] != sum(counts[way] for way in ROWS):
            yield f"{prefix}: counts do not add up: {counts}"


def manifests(store: Store, below: str = "") -> Iterator[str]:
    """Prefixes of the artifacts of a store."""
    for entry in store.list(below):
        if entry.key.endswith("/manifest.json") and "/states/" not in entry.key:
            yield entry.key.rpartition("/")[0]


if __name__ == "__main__":
    print(json.dumps(made(open_store(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))))
