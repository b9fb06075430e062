"""The command line: one clear line and a non-zero exit for whatever is wrong, and names that stay."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vc2.artifacts import Manifest, commit, put_file
from vc2.cli import described, in_a_line, main
from vc2.storage import LocalStore

COMMANDS = (
    "run", "plan", "shard", "train", "sample", "evaluate", "show", "verify", "index", "convert", "mirror", "doctor",
    "study", "references", "refit",
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
        (["train", "full", "--recipe", "paper"], "prompts cannot be read"),
        (["show", "nonsense"], "is no URI of an artifact"),
        (["plan", "--store", "ftp://x"], "unknown scheme"),
        (["shard", ".", "--media", "image", "--dry-run", "--retry", "timeout"], "leave out --retry"),
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
    sharding = ["shard", ".", "--media", "image", "--dry-run"]
    for arguments in (
        [], ["fly"], ["run", "--repeat", "-1"], ["train", "both"], [*sharding, "--sample", "0"],
        [*sharding, "--limit", "0"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_an_unwritable_store_is_said_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["run", "--store", str(tmp_path / "file" / "store"), "--work", str(tmp_path / "work")]) == 1
    assert lines_of(capsys) == [f"vc2: {tmp_path}/file/store: a part of this path is a file; choose another place"]


def test_what_the_system_refuses_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scratch folder that is a file, and whatever else is no defect of ours: what, where, what to do."""
    (tmp_path / "file").write_text("")
    (tmp_path / "a.csv").write_text("file,caption\n")
    sharding = ["shard", str(tmp_path / "a.csv"), "--media", "image", "--dry-run", "--work"]
    assert main([*sharding, str(tmp_path / "file")]) == 1
    assert lines_of(capsys) == [f"vc2: {tmp_path}/file: file exists; choose another place"]
    assert main([*sharding, str(tmp_path / "file" / "work")]) == 1
    assert "not a directory; a part of this path is a file" in lines_of(capsys)[-1]


def test_sharding_asks_for_no_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The form of the paper's samples is known without what its evaluation needs."""
    (tmp_path / "a.csv").write_text("file,caption\n")
    sharding = ["shard", str(tmp_path / "a.csv"), "--media", "image", "--recipe", "paper", "--dry-run", "--work"]
    assert main([*sharding, str(tmp_path / "work")]) == 1
    assert "its tables have no rows" in lines_of(capsys)[-1]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space", "/x"), "no space left (/x); make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: permission denied; let this user"),
        (OSError("odd"), "odd; check the disk"),
        (ConnectionError(), "ConnectionError; check the disk"),
    ],
)
def test_every_refusal_has_its_advice(error: OSError, words: str) -> None:
    assert words in in_a_line(error)


def test_a_shard_set_is_told_in_the_order_that_matters() -> None:
    """Rows with their fates, samples, bytes in a unit; generations, reasons and rates as words, no JSON."""
    change = {"kind": "retry", "parent": "a" * 64, "reasons": ["timeout"], "removals": ""}
    generations = [
        {"fingerprint": "a" * 64, "change": None, "first_shard": 0, "next_shard": 2, "rows": 9, "samples": 5},
        {"fingerprint": "b" * 64, "change": change, "first_shard": 2, "next_shard": 3, "rows": 9, "samples": 6},
    ]
    manifest = Manifest(
        kind="shard_set", stage="shard", stage_version=1, fingerprint="b" * 64, config={}, inputs={}, files=(),
        counts={"clips_rejected": 0, "media_bytes": 1_500_000, "near_duplicates": 1, "rows": 9, "rows_duplicate": 1,
                "rows_rejected": 2, "rows_with_samples": 6, "samples": 6, "shards": 3},
        facts={"source": "mine", "media": "video", "reasons": {"cut": 1, "timeout": 12}, "generations": generations,
               "fps_histogram": {"12": 1, "8": 5}, "seconds": {"build": 2.0, "fetch": 1.0}, "archives": []},
        licenses={"mine": "CC0"},
    )  # fmt: skip
    lines = list(described(manifest))
    assert lines[0] == "shard set of videos: mine"
    told = [line.partition(" ")[0] for line in lines if line[0] != " "]
    assert told.index("rows") < told.index("samples") < told.index("near") < told.index("rejects") < told.index("rates")
    text = "\n".join(lines)
    assert "9 = 6 with samples + 2 rejected + 1 exact duplicate\n" in text and "6 in 3 shards, 1.5 MB" in text
    assert text.index("12 timeout") < text.index("1 cut") and "5 at 8 fps, 1 at 12 fps" in text
    assert "fetch 1 s, build 2 s" in text and "mine: CC0" in text and not set(text) & set("{}[]")
    assert re.search(r" 0  from scratch +\+5 samples +2 shards", text)
    assert re.search(r" 1  retry of timeout +\+1 samples +1 shard ", text)


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
    assert {command for command in COMMANDS if f" {command}" in done.stdout} == set(COMMANDS)


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
    assert main([*arguments, "amt-s"]) == 1
    assert [step["outcome"] for step in json.loads(capsys.readouterr().out)] == ["there already", "missing"]


def test_mirroring_all_succeeds_without_what_the_hub_does_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody asked for it by name; where it is published is said."""
    from vc2.pretrained import WEIGHTS

    for weight in [part for whole in WEIGHTS.values() for part in whole.parts()]:
        if weight.hub is not None:
            place = tmp_path / "downloads" / weight.file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(weight.name.encode())
    assert main(["mirror", str(tmp_path / "mirror"), "--from", str(tmp_path / "downloads")]) == 0
    said = capsys.readouterr().out
    assert f"fetch it from {WEIGHTS['dover'].url} and give --from FOLDER" in said
