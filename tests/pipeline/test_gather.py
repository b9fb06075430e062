import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vc2.artifacts import Manifest, SampleSet, Scorecard, commit, find, put_file
from vc2.data.video_files import encode_mp4
from vc2.eval.folder import import_folder
from vc2.eval.prompts import Prompt
from vc2.eval.report import ReportData, publish, render_html
from vc2.pipeline import gather as gathering
from vc2.pipeline.gather import gather_videos
from vc2.storage import LocalStore

PROMPTS = (
    Prompt(id="0000", text="two dogs", attributes={"count": {"n": 2, "object": "dog"}}),
    Prompt(id="0001", text="a slow river", attributes={"amplitude": "slow"}),
    Prompt(id="0002", text="a house", attributes={}),
    Prompt(id="0003", text="a car nobody made", attributes={"color": {"color": "red", "object": "car"}}),
)
BENCHMARK: dict[str, Any] = {
    "name": "evalcrafter",
    "prompts": {"total": 4, "of_benchmark": 0, "whole_list": False},
    "videos": {"expected": 4, "scored": 3, "rejected": {"0003": "no video"}},
    "settings": {"origin": "folder theirs"},
    "modes": {
        mode: {"metrics": {"IS": {"not_measured": "weights not found: x"}}, "aspects": {}, "withheld": {}}
        for mode in ("compat", "fixed")
    },
    "warnings": ["beware"],
}
LINES = [
    {"id": "0000", "metric": "Flow_Score", "mode": "compat", "value": 1.5, "reason": "", "frames": 4},
    {"id": "0000", "metric": "Flow_Score", "mode": "fixed", "value": 1.25, "reason": "looped", "frames": 4},
    {"id": "0001", "metric": "Flow_Score", "mode": "compat", "value": None, "reason": "one frame", "frames": 1},
]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def samples(tmp_path: Path, store: LocalStore) -> SampleSet:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for number in range(3):
        frames = np.full((4, 32, 64 + 16 * number, 3), 60 * number, np.uint8)
        (folder / f"{number:04d}.mp4").write_bytes(encode_mp4(frames, 8))
    return import_folder(folder, PROMPTS, store)


def scorecard(store: LocalStore, samples: SampleSet, lines: list[dict[str, Any]] | None) -> Scorecard:
    summary = {"judges": {}, "num_prompts": 4, "benchmark": BENCHMARK}
    files = [put_file(store, "scores/s", "summary.json", json.dumps(summary).encode())]
    files.append(put_file(store, "scores/s", "videos.jsonl", b""))
    if lines is not None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        files.append(put_file(store, "scores/s", "metrics.jsonl", text.encode()))
    manifest = Manifest(
        kind="scorecard",
        stage="score",
        stage_version=2,
        fingerprint="s" * 64,
        config={},
        inputs={"samples": samples},
        files=tuple(files),
    )
    commit(store, "scores/s", manifest)
    found = find(store, "scores/s", Scorecard)
    assert found is not None
    return found


def test_a_report_of_a_folder_has_all_prompts_with_videos_values_and_reasons(
    store: LocalStore, samples: SampleSet
) -> None:
    """Each prompt is a row, also one without a video; attributes, values, remarks and reasons are told."""
    data = gather_videos(store, samples, scorecard(store, samples, LINES), prompts=PROMPTS, compare=["Gen2"])
    assert [(row.id, row.prompt) for row in data.rows] == [(prompt.id, prompt.text) for prompt in PROMPTS]
    assert [row.tags for row in data.rows] == [
        {"count": "2 dog", "detection": "dog"},
        {"amplitude": "slow"},
        {},
        {"color": "red car", "detection": "car"},
    ]
    first, second, third, last = data.rows
    assert first.values == {"compat": {"Flow_Score": 1.5}, "fixed": {"Flow_Score": 1.25}}
    assert first.reasons == {"fixed": {"Flow_Score": "looped"}}
    assert second.reasons == {"compat": {"Flow_Score": "one frame"}} and second.values == {}
    assert last.sample is None and last.missing == "not scored: no video"
    assert [row.size for row in (first, second, third)] == [(64, 32), (80, 32), (96, 32)]
    assert data.trained_minutes is None and data.sentence == "of folder theirs" and data.fps == 8
    assert [node.kind for node in data.lineage] == ["sample_set", "scorecard"] and data.compare == ["Gen2"]
    report = publish(store, data, fingerprint="r" * 64, inputs={"samples": samples}, config={})
    assert "trained_minutes" not in json.loads(store.read(f"{report.prefix}/manifest.json"))["facts"]


def test_prompts_are_found_beside_the_videos(store: LocalStore, samples: SampleSet) -> None:
    """Not told them, the report takes those of the set; of a prompt without a video only the id is known."""
    data = gather_videos(store, samples, scorecard(store, samples, LINES))
    assert [row.prompt for row in data.rows] == ["two dogs", "a slow river", "a house", "0003"]
    assert data.rows[1].tags == {"amplitude": "slow"}


def test_a_scorecard_without_values_of_videos_still_makes_a_report(store: LocalStore, samples: SampleSet) -> None:
    """Older scorecards have no metrics.jsonl."""
    data = gather_videos(store, samples, scorecard(store, samples, None))
    assert not any(row.values or row.reasons for row in data.rows)
    assert "weights not found: x" in render_html(data)


def test_a_large_report_says_that_its_videos_are_copies(
    store: LocalStore, samples: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the budget the page holds copies, and says where the videos are; rows keep the digest of the original."""
    scores = scorecard(store, samples, LINES)
    whole = gather_videos(store, samples, scores)
    monkeypatch.setattr(gathering, "PREVIEW_BUDGET", 3000)
    small = gather_videos(store, samples, scores)
    assert not whole.notes and samples.uri in small.notes[0]
    assert [row.sha256 for row in small.rows] == [row.sha256 for row in whole.rows]
    assert sum(map(len, (row.sample or b"" for row in small.rows))) * 4 / 3 <= 3000
    assert isinstance(small, ReportData)
