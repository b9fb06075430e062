"""Answers of raters, good and bad: what is in is used or rejected, with a reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vc2.errors import ConfigError
from vc2.eval.study.analyse import analyse
from vc2.eval.study.answers import StudyKey, read_answers, read_key
from vc2.eval.study.build import BuiltStudy

QUESTIONS = 3
FIRST, AGAIN, ATTENTION = 27, 8, 2  # trials of each rater


def adds_up(accounts: dict[str, Any]) -> bool:
    files, answers = accounts["files"], accounts["answers"]
    counted = answers["votes"] + answers["repeats"] + answers["attention"] + sum(answers["rejected"].values())
    return files["in"] == files["used"] + sum(files["rejected"].values()) and answers["in"] == counted


def test_votes_are_about_models_whatever_the_side(
    key: StudyKey, rate: Callable, likes: Callable, saved: Callable
) -> None:
    """A rater who likes one model best votes for it wherever it stood, in first showings and in repeats."""
    answers = read_answers(key, [saved("anna", rate("anna", likes("Moonlit", "Sunrise")))])
    assert len(answers.votes) == FIRST * QUESTIONS and answers.attention == ATTENTION * QUESTIONS
    assert 0 < len(answers.repeats) <= AGAIN * QUESTIONS
    for vote in answers.votes + answers.repeats:
        winner = "Moonlit" if "Moonlit" in vote.pair else "Sunrise"
        assert vote.choice == ("a" if vote.pair[0] == winner else "b") and vote.pair in key.pairs
    assert {vote.is_left for vote in answers.votes} == {True, False}
    assert answers.files[0].attention == (ATTENTION * QUESTIONS, ATTENTION * QUESTIONS)
    assert adds_up(answers.accounts())


def test_every_bad_file_has_a_reason(
    study: BuiltStudy, key: StudyKey, rate: Callable, likes: Callable, saved: Callable, tmp_path: Path
) -> None:
    """Another study, another version, truncated, no JSON, no answers, a hostile rater, a missing file, a bomb."""
    good = rate("anna", likes("Sunrise"))
    text = json.dumps(good)
    files = [
        saved("good", good),
        saved("other", good | {"study": "f" * 64}),
        saved("version", good | {"version": 99}),
        saved("truncated", text[: len(text) // 2]),
        saved("bytes", "\x00\x01"),
        saved("list", [1, 2]),
        saved("kind", good | {"kind": "shopping"}),
        saved("answers", good | {"answers": {"0": 1}}),
        saved("rater", good | {"rater": "<script>alert(1)</script>"}),
        saved("nobody", good | {"rater": None}),
        saved("deep", "[" * 100_000),
        tmp_path / "missing.json",
        tmp_path,
    ]
    answers = read_answers(key, files)
    reasons = {Path(fate.file).stem: fate.reason for fate in answers.files}
    assert reasons.pop("good") == ""
    assert all(reasons.values()) and len(reasons) == len(files) - 1
    for name, words in {
        "other": "other study", "version": "other version", "truncated": "no JSON", "rater": "no rater",
        "deep": "no JSON", "missing": "unreadable", "kind": "no answers",
    }.items():  # fmt: skip
        assert reasons[name].startswith(words)
    accounts = answers.accounts()
    assert adds_up(accounts) and accounts["files"]["used"] == 1
    with pytest.raises(ConfigError, match=r"no answers to analyse: .*other\.json: other study"):
        analyse(study.key, [tmp_path / "other.json"])


def test_every_bad_answer_has_a_reason(key: StudyKey, rate: Callable, likes: Callable, saved: Callable) -> None:
    """Hostile values, things that were not shown, sides that were not so, twice, too fast, broken videos."""
    good = rate("anna", likes("Sunrise"))
    answers = good["answers"]
    trials = key.trials_of("anna")
    spoiled = [dict(answer) for answer in answers]
    spoiled[0] |= {"seconds": -1}
    spoiled[1] |= {"seconds": float("nan")}
    spoiled[2] |= {"answer": "__proto__"}
    spoiled[3] |= {"question": ["visual_quality"]}
    spoiled[4] |= {"trial": True}
    spoiled[5] |= {"trial": 10**9}
    spoiled[6] |= {"trial": -1}
    spoiled[7] |= {"left": spoiled[7]["right"], "right": spoiled[7]["left"]}
    spoiled[8] |= {"matchup": {}}
    spoiled[9] |= {"seconds": 0.1}
    spoiled[10] |= {"plays": 0}
    spoiled[11] |= {"answer": "broken", "seconds": 0.0, "plays": 0}
    spoiled[12] = dict(spoiled[13])
    extra: list[Any] = [None, 7, "left", [], {}, {"trial": 1}]
    found = read_answers(key, [saved("anna", good | {"answers": spoiled + extra})])
    assert found.rejected == {
        "malformed": 5 + len(extra), "not what this rater was shown": 4, "too fast": 2, "a video did not play": 1,
        "answered twice": 1,
    }  # fmt: skip
    accounts = found.accounts()
    assert adds_up(accounts) and accounts["answers"]["in"] == len(trials) * QUESTIONS + len(extra)


def test_anything_at_all_adds_up(key: StudyKey, rate: Callable, likes: Callable, saved: Callable) -> None:
    """Values of good files replaced at random by others, of any kind: no error, and nothing lost."""
    chance = np.random.default_rng(3)
    values = [None, True, -1, 0, 3.5, 10**30, "", "left", "broken", "anna", [], {}, "\ud800", float("inf"), [[]]]
    for number in range(30):
        data = rate("anna", likes("Sunrise"))
        for _ in range(20):
            answer = data["answers"][chance.integers(len(data["answers"]))]
            answer[str(chance.choice(list(answer)))] = values[chance.integers(len(values))]
        if chance.random() < 0.3:
            data[str(chance.choice(list(data)))] = values[chance.integers(len(values))]
        assert adds_up(read_answers(key, [saved(f"f{number}", data)]).accounts())


def test_of_two_files_of_a_rater_the_fuller_counts(
    key: StudyKey, rate: Callable, likes: Callable, saved: Callable
) -> None:
    """Whatever the files are called and in whatever order they come."""
    full = rate("anna", likes("Sunrise"))
    part = full | {"answers": full["answers"][:30], "saved": "2027-01-01T00:00:00.000Z"}
    for names in (("a", "b"), ("z", "b")):
        files = [saved(names[0], full), saved(names[1], part)]
        for order in (files, files[::-1]):
            answers = read_answers(key, order)
            used = [Path(fate.file).stem for fate in answers.files if not fate.reason]
            assert used == [names[0]] and answers.accounts()["files"]["rejected"] == {"duplicate rater": 1}
    votes = read_answers(key, [saved("a", full), saved("c", full)]).votes
    assert len(votes) == FIRST * QUESTIONS


def test_raters_who_see_differences_where_there_are_none_can_be_left_out(
    key: StudyKey, rate: Callable, likes: Callable, saved: Callable
) -> None:
    """By their answers to trials that show one video twice; only where that is asked for."""
    files = [saved("anna", rate("anna", likes("Sunrise"))), saved("bert", rate("bert", lambda *_: "left"))]
    assert read_answers(key, files).raters == ["anna", "bert"]
    answers = read_answers(key, files, min_attention=0.5)
    assert answers.raters == ["anna"] and adds_up(answers.accounts())
    assert "inattentive: 0 of 6" in answers.files[1].reason


def test_a_key_that_was_changed_is_refused(study: BuiltStudy, tmp_path: Path) -> None:
    """Its digest is over all that raters saw; a key with other videos, questions or texts is not the study's."""
    path = tmp_path / "key.json"
    shutil.copy(study.key, path)
    assert read_key(path).models == ("Sunrise", "Moonlit", "Noonday")
    data = json.loads(path.read_text())
    data["page"]["questions"][0]["title"] = "Which is cheaper?"
    for text, words in (
        (json.dumps(data), "was changed"),
        ("{}", "not the key"),
        ("{", "not the key"),
        ("[]", "not the"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_key(path)
    data = json.loads(study.key.read_text())
    del data["matchups"]
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="damaged key"):
        read_key(path)
