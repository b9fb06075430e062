"""Any folder of videos is scored and reported by one command, which says what it could not measure."""

import json
from pathlib import Path

import pytest

from tests.eval.test_measure import NAMES, PROMPTS, make_folder
from vc2.artifacts import load_manifest, verify
from vc2.cli import main
from vc2.storage import LocalStore


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """A folder, its prompts, a store of its own; metrics that need no weights."""
    videos = make_folder(tmp_path / "videos")
    lines = [
        json.dumps({"id": prompt.id, "prompt": prompt.text, "attributes": prompt.attributes}) for prompt in PROMPTS
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return [
        "evaluate", "--videos", str(videos), "--prompts", str(tmp_path / "prompts.jsonl"),
        "--store", str(tmp_path / "store"), "--work", str(tmp_path / "work"), "--set", "flow=dis",
    ]  # fmt: skip


def test_a_folder_is_scored_and_reported_and_again_at_once(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that was asked for is measured: exit code 0; the same again makes nothing and says the same."""
    few = [*given, "--metrics", "Flow_Score", "Warping_Error", "temporal_flickering"]
    assert main(few) == 0
    first = capsys.readouterr().out
    assert "7 of 7 videos scored" in first and "needs two frames" not in first.split("not given")[0]
    assert main(few) == 0
    assert capsys.readouterr().out == first
    page = Path(first.strip().splitlines()[-1])
    assert page.name == "report.html" and all(f"a video called {name}" in page.read_text() for name in NAMES)
    store = LocalStore(tmp_path / "store")
    prefix = page.parent.relative_to(store.root).as_posix()
    assert not [*verify(store, prefix)]
    assert {*load_manifest(store, prefix).inputs} == {"samples", "scores"}


def test_what_is_not_measured_is_in_the_exit_code_and_in_words(
    given: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VC2_MIRROR", raising=False)
    assert main([*given, "--metrics", "Flow_Score", "CLIP_Temp", "--compare", "VideoCrafter2"]) == 3
    said = capsys.readouterr().out
    assert "not measured: CLIP_Temp: weights not found: clip-vit-b-32" in said
    assert "not given: Temporal consistency: needs" in said and "VideoCrafter2 (2024.01)" in said and "63.98" in said
    assert main([*given, "--metrics", "Flow_Score", "CLIP_Temp", "--allow-unmeasured", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    modes = told["benchmark"]["modes"]
    assert (
        modes["compat"]["metrics"]["CLIP_Temp"]["not_measured"] and "value" in modes["fixed"]["metrics"]["Flow_Score"]
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--metrics", "FVD"], "'FVD'"),
        (["--compare", "Nobody"], "Nobody"),
        (["--photos", "nowhere"], "no such folder"),
        (["--references", "nowhere"], "no such folder"),
        (["--set", "evaluation.batch=0"], "batch = 0"),
        (["somewhere"], "both a checkpoint and --videos"),
        (["--videos", "nowhere"], "no such folder"),
        (["--prompts", "nowhere.jsonl"], "prompts cannot be read"),
    ],
)
def test_wrong_options_are_told_in_a_line(
    given: list[str], more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*given, *more]) == 1
    said = capsys.readouterr()
    assert words in said.err and len(said.err.strip().splitlines()) == 1 and not said.out


def test_videos_without_prompts_are_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    place = given.index("--prompts")
    assert main([*given[:place], *given[place + 2 :]]) == 1
    assert "--videos needs --prompts" in capsys.readouterr().err
