"""In = samples + rejects + copies, whatever befalls rows and clips."""

import hashlib
import io
import json
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vc2.artifacts import load_manifest
from vc2.data.accounts import IndexWriter, counts_of, reject_lines
from vc2.data.config import FolderSource, ShardStage, shard_fingerprint, source_digest
from vc2.data.ledger import SCHEMA
from vc2.data.plan import Planner
from vc2.data.prepare import prepare
from vc2.data.shards import SLOTS
from vc2.storage import LocalStore

FATES = ["good", "http_404", "copy", "short", "one clip fails", "all clips fail"]


@settings(max_examples=60)
@given(fates=st.lists(st.sampled_from(FATES), min_size=1, max_size=30), clips=st.integers(1, 3))
def test_every_row_has_one_fate(fates: list[str], clips: int) -> None:
    """Planned or not, built or not: each row is counted once, with the reason that befell it first."""
    source = FolderSource(name="mine", media="video", folder=".")
    form = {"num_frames": 4, "width": 32, "height": 32, "clips_per_video": clips}
    config = ShardStage.model_validate({"source": source, "form": form, "samples_per_shard": 4})
    empty = {name: None for name in SCHEMA.names} | {"captions": "{}", "extra": "{}", "detail": "", "ledger": "ledger"}
    rows = []
    for number, fate in enumerate(fates):
        sha256 = hashlib.sha256(b"" if fate == "copy" else b"%d" % number).hexdigest()
        row = {"row": number, "key": f"k{number}", "locator": f"{number}.mp4", "caption": "a dog runs"}
        row |= {"sha256": sha256, "width": 64, "height": 64, "rate": "25", "rotation": 0, "aspect": "1", "size": 9}
        rows.append(
            empty | row | {"frames": 2 if fate == "short" else 60, "reason": {"http_404": "http_404"}.get(fate)}
        )
    with tempfile.TemporaryDirectory() as folder:
        planner = Planner(config, Path(folder) / "spool")
        planner.add(pa.Table.from_pylist(rows, SCHEMA.append(pa.field("ledger", pa.string()))))
        unplanned = planner.write(Path(folder) / "plan")
        slots = [_slot(line, fates) for line in pq.read_table(Path(folder) / "plan").to_pylist()]
        index = IndexWriter(config, Path(folder) / "slots")
        index.add(pa.Table.from_pylist(slots, SLOTS))
        kept = frozenset(slot["row"] for slot in slots if slot["reason"] is None)
        rejects = reject_lines(unplanned, index, kept, SCHEMA.empty_table())
        index.write(Path(folder) / "index")
        counts = counts_of(len(rows), index, rejects)
        written = pq.read_table(Path(folder) / "index")
    copies = max(0, fates.count("copy") - 1)
    single = clips == 1
    lost = fates.count("all clips fail") + (fates.count("one clip fails") if single else 0)
    assert counts["rows_duplicate"] == copies
    assert counts["rows_rejected"] == fates.count("http_404") + fates.count("short") + lost
    assert counts["clips_rejected"] == (0 if single else fates.count("one clip fails"))
    assert counts["samples"] == written.num_rows == sum(slot["reason"] is None for slot in slots)
    reasons = Counter(line["reason"] for line in rejects.to_pylist() if line["what"] == "row")
    assert reasons["undecodable"] == lost and reasons["too_short"] == fates.count("short")


def _slot(line: dict[str, Any], fates: list[str]) -> dict[str, Any]:
    fate = fates[line["row"]]
    failed = fate == "all clips fail" or (fate == "one clip fails" and line["clip"] == 0)
    slot = {name: None for name in SLOTS.names} | {name: line[name] for name in ("shard", "slot", "row", "clip", "fps")}
    slot |= {"key": f"{line['key']}_{line['clip']}", "source_key": line["key"], "locator": line["locator"]}
    if failed:
        return slot | {"reason": "undecodable", "detail": ""}
    return slot | {"phash": [line["seed"]] * 3, "length": 5}


@pytest.mark.parametrize("seed", [1])
def test_a_whole_run_over_faulty_rows_adds_up(seed: int, media: Any, ray_address: str, tmp_path: Path) -> None:
    """Rows with random faults through fetch, plan and build: every fault is told by its name, nothing is lost."""
    chance, folder, lines, expected = random.Random(seed), tmp_path / "mine", [], Counter[str]()
    folder.mkdir()
    good = media.mp4(30, 25, width=160, height=96)
    (folder / "original.mp4").write_bytes(good)
    lines.append(json.dumps({"file": "original.mp4", "caption": "the first of all"}))
    faults = {
        "missing_file": None,
        "not_media": b"<!doctype html><html>" * 30,
        "truncated": good[: len(good) * 2 // 3],
        "duplicate": good,
        "too_short": media.mp4(3, 25),
        "too_small": media.mp4(30, 25, width=16, height=16),
        "no_caption": good,
        "unparsable": None,
        "duplicate_key": None,
    }
    for number in range(40):
        fault = chance.choice([*faults, "good", "good", "good"])
        if fault != "good":
            expected[fault] += 1
        name, caption = f"{number}.mp4", "" if fault == "no_caption" else f"clip number {number}"
        if fault == "duplicate_key":
            name = "original.mp4"
        elif (data := faults.get(fault, media.mp4(30 + number, 25, first=number))) is not None:
            (folder / name).write_bytes(data)
        lines.append("{broken" if fault == "unparsable" else json.dumps({"file": name, "caption": caption}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    source = FolderSource(
        name="mine", media="video", folder=str(folder), table=str(folder / "rows.jsonl"), min_yield=0.01
    )
    form = {"num_frames": 8, "width": 40, "height": 24, "max_stride": 3}
    config = ShardStage.model_validate(
        {"source": source, "form": form, "samples_per_shard": 5, "fetch": {"part_rows": 7}}
    )
    store = LocalStore(tmp_path / "store")
    name = shard_fingerprint("shard/mine", config, source_digest(source))
    made = prepare(config, store, tmp_path / "work", fingerprint=name)
    assert made is not None
    manifest = load_manifest(store, made.prefix)
    copies = expected.pop("duplicate", 0)
    assert manifest.facts["reasons"] == dict(expected)
    assert (manifest.counts["rows"], manifest.counts["rows_duplicate"]) == (41, copies)
    assert manifest.counts["samples"] == 41 - copies - expected.total()
    rejects = pq.read_table(io.BytesIO(store.read(manifest.file("rejects.parquet").key))).to_pylist()
    assert len(rejects) == copies + expected.total()
