"""The command line: one clear line and a non-zero exit for whatever is wrong, and names that stay."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vc2.artifacts import Manifest, commit, put_file
from vc2.cli import main
from vc2.storage import LocalStore

COMMANDS = (
    "run", "plan", "shard", "train", "sample", "evaluate", "show", "verify", "index", "convert", "mirror", "doctor",
)  # fmt: skip


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert command in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "minature"], "no recipe 'minature'"),
        (["plan", "--set", "full.num_step=3"], "no setting 'full.num_step'"),
        (["plan", "--set", "full.num_steps=many"], "full.num_steps = 'many'"),
        (["plan", "--set", "full.num_steps"], "expected name=value"),
        (["run", "--start-at", "train/ful"], "no stage 'train/ful'"),
        (["run", "--start-at", "train/full"], "needs shard/webvid, which is to do"),
        (["run", "--checkpoint", "/elsewhere/runs/full/x"], "is not in the store"),
        (["shard", "./no-such-folder"], "no such folder or file, and no source of that name"),
        (["shard", ".", "--set", "form.width=8"], "needs --media video or --media image"),
        (["plan", "paper"], "prompts cannot be read"),
        (["show", "nonsense"], "is no URI of an artifact"),
        (["plan", "--store", "ftp://x"], "unknown scheme"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VC2_STORE", str(tmp_path / "store"))
    if arguments[0] != "show":
        arguments = [*arguments, "--work", str(tmp_path / "work")]
    assert main(arguments) == 1
    last = lines_of(capsys)[-1]
    assert last.startswith("vc2: ") and words in last


def test_a_command_line_that_cannot_be_read_exits_with_2() -> None:
    for arguments in ([], ["fly"], ["run", "--repeat", "-1"], ["train", "both"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_an_unwritable_store_is_said_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["run", "--store", str(tmp_path / "file" / "store"), "--work", str(tmp_path / "work")]) == 1
    assert lines_of(capsys) == [f"vc2: {tmp_path}/file/store: a part of this path is a file; choose another place"]


def test_the_plan_is_the_same_everywhere_and_says_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = []
    for place in ("a", "b"):
        assert main(["plan", "--work", str(tmp_path / place), "--store", str(tmp_path / place), "--json"]) == 0
        plans.append([stage["fingerprint"] for stage in json.loads(capsys.readouterr().out)["stages"]])
    assert plans[0] == plans[1]


def test_verify_finds_damage_and_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = LocalStore(tmp_path)
    file = put_file(store, "reports/x", "report.html", b"<p>")
    made = commit(
        store,
        "reports/x",
        Manifest(
            kind="report", stage="evaluate", stage_version=1, fingerprint="x", config={}, inputs={}, files=(file,)
        ),
    )
    assert main(["verify", made.uri]) == 0
    assert main(["show", made.uri]) == 0
    store.write("reports/x/report.html", b"<q>")
    assert main(["verify", made.uri]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_the_installed_command_answers() -> None:
    done = subprocess.run([sys.executable, "-m", "vc2.cli", "--help"], capture_output=True, text=True, check=True)
    assert all(f" {command} " in done.stdout for command in COMMANDS)


def test_the_doctor_says_where_weights_are_and_what_mends_what_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing weights are told and are no failure: a recipe may do without; damaged ones are one."""
    monkeypatch.setenv("VC2_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("VC2_MIRROR", str(tmp_path / "mirror"))
    arguments = ["doctor", "--store", str(tmp_path / "store")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "shipped with vc2" in said and f"vc2 mirror {tmp_path}/mirror --only sd21-base" in said
    assert all(word in said for word in ("python", "memory", "disk", "torch"))
    place = tmp_path / "mirror" / "raft" / "raft_large_C_T_V1-22a6c225.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"a web page")
    assert main([*arguments, "--json", "--digests"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["weights"]["raft-things"]["digest"] == "differs" and not told["well"]


def test_mirroring_fails_when_anything_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "DOVER.pth").write_bytes(b"dover")
    arguments = ["mirror", str(tmp_path / "mirror"), "--from", str(tmp_path), "--json", "--only", "dover"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)[0]["outcome"] == "copied"
    assert main([*arguments, "sam2"]) == 1
    assert [step["outcome"] for step in json.loads(capsys.readouterr().out)] == ["there already", "missing"]


def test_mirroring_all_succeeds_without_what_the_hub_does_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody asked for it by name; where it is published is said."""
    from vc2.pretrained import WEIGHTS

    for weight in WEIGHTS.values():
        if weight.hub is not None:
            place = tmp_path / "downloads" / weight.file
            place.parent.mkdir(parents=True)
            place.write_bytes(weight.name.encode())
    assert main(["mirror", str(tmp_path / "mirror"), "--from", str(tmp_path / "downloads")]) == 0
    said = capsys.readouterr().out
    assert f"fetch it from {WEIGHTS['dover'].url} and give --from FOLDER" in said
