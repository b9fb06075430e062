"""The rows of Table 3 beside each other, for real and tiny: what is shared, broken off, damaged, asked wrongly."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vc2.artifacts import Artifact, Checkpoint, Report, load_manifest
from vc2.cli import main
from vc2.errors import ConfigError
from vc2.miniature.references import Separation
from vc2.miniature.scene import parse_caption
from vc2.pipeline.compare import FIGURES, PAGE, Comparison, Member, chosen_rows, compare, members, to_do
from vc2.pipeline.compare_page import render_markdown
from vc2.pipeline.driver import PlannedStage, plan
from vc2.pipeline.stages import execute
from vc2.pipeline.table3 import Row
from vc2.storage import Store, open_store

TINY: Mapping[str, Any] = {
    "world": {"num_videos": 16, "num_web_images": 24, "num_jdb_images": 16, "num_prompts": 8},
    "full": {"num_steps": 3, "batch_size": 4, "hang_seconds": 600},
    "spatial": {"num_steps": 4, "keep_every_steps": 2, "batch_size": 4, "hang_seconds": 600},
    "evaluation": {"sampler": {"num_steps": 2}},
}
ROWS = (Row.F_BASE, Row.F_SPA_LORA, Row.F_SPA_DIR)


class Runner:
    """Makes stages in this process, counts them, and breaks off before one if it is told to."""

    def __init__(self, store: Store, work: Path, stop_before: int | None = None) -> None:
        self.store, self.work, self.stop_before = store, work, stop_before
        self.ran: list[str] = []

    def __call__(self, member: Member, planned: PlannedStage, inputs: Mapping[str, Artifact]) -> Artifact:
        if len(self.ran) == self.stop_before:
            raise KeyboardInterrupt
        self.ran.append(planned.name)
        return execute(planned, member.config, self.store, self.work, inputs=inputs)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Member], Store, Path, Runner, Runner, Report]:
    """A comparison that was broken off before its last stage, and run again."""
    work = tmp_path_factory.mktemp("compare")
    store = open_store(str(work / "store"))
    asked = members("study", TINY, ROWS, (0,), work)
    first = Runner(store, work, stop_before=5)
    with pytest.raises(KeyboardInterrupt):
        compare(asked, store, work, first)
    second = Runner(store, work)
    return asked, store, work, first, second, compare(asked, store, work, second)


def test_what_rows_share_is_made_once_and_what_was_done_before_the_break_is_not_again(made) -> None:
    asked, store, _, first, second, _ = made
    assert first.ran == ["shard/webvid", "shard/laion-coco", "shard/jdb", "train/full", "train/spatial"]
    assert second.ran == ["train/spatial"]
    assert to_do(asked, store) == {}


def test_once_more_makes_nothing_and_finds_the_same(made) -> None:
    asked, store, work, _, _, report = made
    third = Runner(store, work)
    assert compare(asked, store, work, third) == report and third.ran == []


def test_every_clip_is_in_the_table_and_every_claim_has_its_verdict(made) -> None:
    _, store, _, _, _, report = made
    manifest = load_manifest(store, report.prefix)
    data = json.loads(store.read(manifest.file("table.json").key))
    assert list(data["rows"]) == [row.value for row in ROWS]
    assert manifest.counts == {"members": 3, "videos": 3 * 8}
    for figures in data["rows"].values():
        assert {"quality", "motion", "text", "composition", "watermarked"} <= set(figures) <= set(FIGURES)
        assert all(one["low"] - 1e-9 <= one["mean"] <= one["high"] + 1e-9 for one in figures.values())
    verdicts = {claim["key"]: claim["verdict"] for claim in data["claims"]}
    assert verdicts == manifest.facts["verdicts"]
    assert verdicts["c"] != "not run" and verdicts["a"] == "not run"  # F alone was run
    assert {row: list(curve["motion"]) for row, curve in data["curves"].items()} == {
        row.value: ["0", "2", "4"] for row in ROWS[1:]
    }


def test_the_page_and_the_picture_can_be_opened(made) -> None:
    _, store, _, _, _, report = made
    manifest = load_manifest(store, report.prefix)
    page = store.read(manifest.file(PAGE).key).decode()
    assert page.count("<video") == 3 * 5 and "data:video/mp4;base64," in page and "F-Spa-LoRA" in page
    assert store.read(manifest.file("before_after.png").key).startswith(b"\x89PNG")
    text = store.read(manifest.file("table.md").key).decode()
    assert all(row.value in text for row in ROWS)
    data = json.loads(store.read(manifest.file("table.json").key))
    aside = [says for claim in data["claims"] for says, _ in claim["beside"]]
    assert aside and all(f"beside: {says}" in text and f"beside: {escape(says)}" in page for says in aside)


@pytest.mark.parametrize("name", ["table", "three_seeds", "knowing_start", "longer"])
def test_the_tables_of_the_study_are_those_of_their_data(name: str) -> None:
    folder = Path(__file__).parents[2] / "docs" / "study"
    data = json.loads((folder / f"{name}.json").read_text())
    assert (folder / f"{name}.md").read_text() == render_markdown(data, FIGURES)


def test_a_row_brings_its_base_and_rows_of_a_base_share_its_training(tmp_path: Path) -> None:
    assert chosen_rows(["p-spa-lora"]) == (Row.P_BASE, Row.P_SPA_LORA)
    assert set(chosen_rows([])) == set(Row)
    store = open_store(str(tmp_path / "store"))
    names = {
        (member.row, member.seed): plan(member.config, store)[3].fingerprint
        for member in members("study", TINY, tuple(Row), (0, 1), tmp_path)
    }
    assert len(set(names.values())) == 4  # two bases, two seeds
    assert all(name == names[row.base, seed] for (row, seed), name in names.items())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["paper"], "no small world"),
        (["--seeds", "0,0"], "expected different numbers"),
        (["--seeds", "one"], "expected numbers"),
        (["--rows", "F-Spa"], "its rows are"),
        (["--set", "full.nothing=1"], "no setting"),
        (["--set", "spatial.seed=7"], "what the rows and seeds differ in"),
        (["--set", 'spatial.strategy.trainable="all"'], "what the rows and seeds differ in"),
    ],
)
def test_wrong_requests_are_refused_in_a_sentence(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *arguments, "--work", str(tmp_path), "--dry-run"]) == 1
    assert says in capsys.readouterr().err


def test_a_prompt_whose_truth_is_not_known_is_refused(tmp_path: Path) -> None:
    prompts = {"evaluation": {"prompts": [{"id": "one", "text": "a red panda eats bamboo"}]}}
    with pytest.raises(ConfigError, match="has no attribute `truth`"):
        members("study", prompts, ROWS, (0,), tmp_path)


def test_a_judge_that_is_unsure_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as drawn nor through the autoencoder; of one that decides nothing it is only told."""
    store = open_store(str(tmp_path / "store"))
    asked = members("study", TINY, ROWS, (0,), tmp_path)

    def tried_out(figure: str, accuracy: float, through: float) -> None:
        told = (Separation(figure, "damaged", accuracy, through, 24),)
        monkeypatch.setattr("vc2.pipeline.compare._separation", lambda *_: told)
        compare(asked, store, tmp_path, Runner(store, tmp_path, stop_before=0))

    for accuracy, through in ((0.8, 1.0), (1.0, 0.8)):
        with pytest.raises(ConfigError, match=r"the judge of jitter tells .* expected 90%"):
            tried_out("jitter", accuracy, through)
    with pytest.raises(KeyboardInterrupt):  # of the runner, which was reached
        tried_out("noise", 0.5, 0.5)


def test_prompts_that_tell_nothing_of_motion_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    resting = parse_caption("a red circle beside a blue square over a grey background")
    prompt = {"id": "one", "text": resting.caption(), "attributes": {"truth": resting.as_json()}}
    with pytest.raises(ConfigError, match="none of the 1 prompts names a single thing that moves"):
        members("study", {"evaluation": {"prompts": [prompt]}}, ROWS, (0,), tmp_path)


def test_the_fate_of_a_watermark_is_asked_where_the_base_has_one() -> None:
    """Gone, lighter by half, as before; of a base without one nothing is said."""
    base = {"one": 0.4, "two": 0.4, "three": 0.4, "four": 0.01}
    tuned = {"one": 0.01, "two": 0.15, "three": 0.4, "four": 0.4}
    found = Comparison([0], {name: name for name in base})
    for row, opacities in ((Row.F_BASE, base), (Row.F_TEMP_DIR, tuned)):
        found.finals[row, 0] = {name: {"watermark": opacity} for name, opacity in opacities.items()}
    kept, lighter = (found.values(name, Row.F_TEMP_DIR) for name in ("still watermarked", "lightened"))
    assert kept is not None and lighter is not None
    assert kept[0, :3].tolist() == [0, 1, 1] and lighter[0, :3].tolist() == [1, 1, 0]
    assert np.isnan(kept[0, 3]) and np.isnan(lighter[0, 3])


def test_a_curve_begins_with_the_base_and_leaves_out_what_a_seed_lacks() -> None:
    found = Comparison([0, 1], {"one": "one", "two": "two"})
    for seed in found.seeds:
        found.finals[Row.F_BASE, seed] = {"one": {"motion": 1.0}, "two": {"motion": 9.0}}
        found.finals[Row.F_SPA_DIR, seed] = {"one": {"motion": 4.0}, "two": {"motion": 9.0}}
        found.curves[Row.F_SPA_DIR, seed] = {2: {"one": {"motion": 2.0 + seed}}}
        found.checkpoints[Row.F_SPA_DIR, seed] = Checkpoint(
            kind="checkpoint", uri="x://x", prefix="x/00000004", fingerprint="x", content_digest="x", counts={}
        )
    found.curves[Row.F_SPA_DIR, 1][3] = {"one": {"motion": 7.0}}
    assert found.curve("motion", Row.F_SPA_DIR) == {0: 1.0, 2: 2.5, 4: 4.0}
    start = found.values("motion", Row.F_SPA_DIR, "start")
    assert start is not None and start[:, 0].tolist() == [1, 1] and np.isnan(start[:, 1]).all()


def test_seeds_from_nowhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected different numbers"):
        members("study", TINY, ROWS, (), tmp_path)


def test_a_dry_run_says_what_is_to_do_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--rows", "F-Spa-DIR", "--seeds", "0", "--work", str(tmp_path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 members, 5 stages to do" in said and "train/full" in said
    assert not list((tmp_path / "store").glob("runs/*"))
