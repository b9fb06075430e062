"""Answers of raters, read back with the key: votes about models, and a reason for each one that does not count.

A file comes from somebody's browser, so nothing in it is believed: what a rater was shown, and on which side, is drawn
again from the study and the rater's name, and an answer about anything else is no answer. Files in = used + rejected;
answers in (of the files used) = votes + repeats + attention + rejected.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vc2.config import digest
from vc2.errors import ConfigError
from vc2.eval.study.build import KEY_KIND
from vc2.eval.study.config import PAGE_VERSION
from vc2.eval.study.order import Matchup, Trial, trials_of

__all__ = ["Answers", "FileFate", "StudyKey", "Vote", "read_answers", "read_key"]

ANSWERS_KIND = "vc2 study answers"
MOST_BYTES = 20_000_000  # of a file
ROUNDING = 0.1  # seconds: the page writes tenths
RATER = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")

Choice = Literal["a", "b", "tie"]


@dataclass(frozen=True, slots=True)
class StudyKey:
    """A study, and whose videos are whose."""

    study: str  # digest
    models: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    questions: tuple[str, ...]
    titles: Mapping[str, str]  # of questions, by id
    matchups: tuple[Matchup, ...]
    prompts: Mapping[str, str]  # prompt ids by matchup
    owners: Mapping[str, tuple[str, str]]  # by matchup: the models of its first and its second video
    page: Mapping[str, Any]

    def trials_of(self, rater: str) -> list[Trial]:
        """What this rater saw, in order."""
        page = self.page
        return trials_of(page["order_seed"], rater, self.matchups, repeats=page["repeats"], most=page["most"])


@dataclass(frozen=True, slots=True)
class Vote:
    """One answer that counts, said about models."""

    rater: str
    question: str
    matchup: str
    prompt: str
    pair: tuple[str, str]  # as the key lists it: a, b
    choice: Choice
    is_left: bool | None  # whether the left video was chosen; None: comparable
    seconds: float
    is_repeat: bool = False


@dataclass(frozen=True, slots=True)
class FileFate:
    """What became of one file."""

    file: str
    rater: str  # empty where the file was not understood
    reason: str  # empty: used
    answers: int = 0  # in it, of all kinds
    counted: int = 0  # votes and repeats
    attention: tuple[int, int] = (0, 0)  # answers to attention trials: right ones, all


@dataclass(slots=True)
class Answers:
    """All that raters said."""

    files: list[FileFate] = field(default_factory=list)
    votes: list[Vote] = field(default_factory=list)
    repeats: list[Vote] = field(default_factory=list)
    attention: int = 0  # answers to trials that show one video twice
    rejected: Counter[str] = field(default_factory=Counter)  # answers, by reason
    unanswered: int = 0  # questions that raters did not get to

    @property
    def raters(self) -> list[str]:
        return sorted(fate.rater for fate in self.files if not fate.reason)

    def accounts(self) -> dict[str, Any]:
        """Counts that add up."""
        rejected_files = Counter(fate.reason.partition(":")[0] for fate in self.files if fate.reason)
        return {
            "files": {
                "in": len(self.files),
                "used": len(self.files) - rejected_files.total(),
                "rejected": dict(sorted(rejected_files.items())),
            },
            "answers": {
                "in": sum(fate.answers for fate in self.files if not fate.reason),
                "votes": len(self.votes),
                "repeats": len(self.repeats),
                "attention": self.attention,
                "rejected": dict(sorted(self.rejected.items())),
            },
            "unanswered": self.unanswered,
        }


def read_key(path: Path) -> StudyKey:
    """The key that `build` wrote.

    Raises:
        ConfigError: If it is none, or was changed.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: not the key of a study ({error}); expected the file beside the study's folder"
        ) from None
    if not isinstance(data, dict) or data.get("kind") != KEY_KIND:
        raise ConfigError(f"{path}: not the key of a study; expected the file beside the study's folder")
    try:
        page = data["page"]
        if page["version"] != PAGE_VERSION:
            raise ConfigError(f"{path}: a study of version {page['version']}, this program reads {PAGE_VERSION}")
        if digest(page) != data["study"]:
            raise ConfigError(f"{path}: was changed since the study was made; take the file as it was")
        matchups = tuple(
            Matchup(one["id"], one["caption"], tuple(one["videos"]), one["twos"], one["attention"])
            for one in page["matchups"]
        )
        secrets = data["matchups"]
        return StudyKey(
            study=data["study"],
            models=tuple(data["models"]),
            pairs=tuple((one, other) for one, other in data["pairs"]),
            questions=tuple(question["id"] for question in page["questions"]),
            titles={question["id"]: question["title"] for question in page["questions"]},
            matchups=matchups,
            prompts={matchup.id: secrets[matchup.id]["prompt"] for matchup in matchups},
            owners={matchup.id: tuple(secrets[matchup.id]["models"]) for matchup in matchups},
            page=page,
        )
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: a damaged key ({type(error).__name__} {error})") from None


def read_answers(
    key: StudyKey, files: Iterable[Path], *, min_seconds: float | None = None, min_attention: float | None = None
) -> Answers:
    """Votes from the files of raters. The order of the files does not matter.

    Args:
        key: Of the study.
        files: What raters saved.
        min_seconds: Seconds of looking under which an answer does not count; None: those the page asked for.
        min_attention: Share of attention trials that a rater must get right; None: any.
    """
    opened = sorted((_open(key, path) for path in files), key=_rank)
    answers, by_rater = Answers(), {}
    least = key.page["min_seconds"] if min_seconds is None else min_seconds
    for fate, data in opened:
        if not fate.reason and fate.rater in by_rater:
            reason = f"duplicate rater: {fate.rater} is in {by_rater[fate.rater]}, which has as many answers or more"
            fate, data = FileFate(fate.file, fate.rater, reason, fate.answers), None
        if fate.reason or data is None:
            answers.files.append(fate)
            continue
        by_rater[fate.rater] = fate.file
        own = _Ballot(key, fate, data["answers"], least)
        right, all_of_them = own.attention
        if min_attention is not None and all_of_them and right < min_attention * all_of_them:
            reason = f"inattentive: {right} of {all_of_them} attention trials right"
            answers.files.append(FileFate(fate.file, fate.rater, reason, fate.answers, 0, own.attention))
            continue
        answers.votes += own.votes
        answers.repeats += own.repeats
        answers.attention += all_of_them
        answers.rejected.update(own.rejected)
        answers.unanswered += len(own.trials) * len(key.questions) - len(own.seen)
        counted = len(own.votes) + len(own.repeats)
        answers.files.append(FileFate(fate.file, fate.rater, "", fate.answers, counted, own.attention))
    answers.files.sort(key=lambda fate: fate.file)
    return answers


def _open(key: StudyKey, path: Path) -> tuple[FileFate, dict[str, Any] | None]:
    """A file that is what it should be as a whole, or why not."""

    def reject(reason: str) -> tuple[FileFate, None]:
        return FileFate(str(path), "", reason), None

    try:
        if path.stat().st_size > MOST_BYTES:
            return reject(f"too large: over {MOST_BYTES // 10**6} MB")
        data = json.loads(path.read_bytes())
    except OSError as error:
        return reject(f"unreadable: {error.strerror}")
    except (ValueError, RecursionError):
        return reject("no JSON: truncated, or another kind of file")
    if not isinstance(data, dict) or data.get("kind") != ANSWERS_KIND or not isinstance(data.get("answers"), list):
        return reject("no answers: not a file that the page of a study saves")
    if data.get("study") != key.study:
        return reject(f"other study: {str(data.get('study'))[:12]!r}, the key is of {key.study[:12]!r}")
    if data.get("version") != key.page["version"]:
        return reject(f"other version: {str(data.get('version'))[:12]!r}, the key is of {key.page['version']}")
    rater = data.get("rater")
    if not isinstance(rater, str) or not RATER.fullmatch(rater):
        return reject("no rater: a name the page would not take")
    return FileFate(str(path), rater, "", len(data["answers"])), data


def _rank(opened: tuple[FileFate, dict[str, Any] | None]) -> tuple[Any, ...]:
    """Of several files of a rater, that with the most answers comes first; whatever their names."""
    fate, data = opened
    whole = hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest() if data else ""
    saved = str((data or {}).get("saved"))[:40]
    return fate.rater, -fate.answers, [-ord(letter) for letter in saved], whole, fate.file


class _Ballot:
    """The answers of one rater, sorted out."""

    def __init__(self, key: StudyKey, fate: FileFate, answers: list[Any], least: float) -> None:
        self.key, self.rater, self.least = key, fate.rater, least
        self.trials = key.trials_of(fate.rater)
        self.matchups = {matchup.id: matchup for matchup in key.matchups}
        self.votes: list[Vote] = []
        self.repeats: list[Vote] = []
        self.rejected: Counter[str] = Counter()
        self.attention = 0, 0
        self.seen: set[tuple[int, str]] = set()
        for answer in answers:
            if reason := self._take(answer):
                self.rejected[reason] += 1

    def _take(self, answer: Any) -> str:
        """Count an answer; returns the reason for which it does not count, or nothing."""
        if not isinstance(answer, dict):
            return "malformed"
        number, question, said = answer.get("trial"), answer.get("question"), answer.get("answer")
        seconds, plays = answer.get("seconds"), answer.get("plays")
        if isinstance(number, bool) or not isinstance(number, int) or not isinstance(question, str):
            return "malformed"
        if isinstance(plays, bool) or not isinstance(plays, int) or not isinstance(said, str):
            return "malformed"
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e6:
            return "malformed"
        if question not in self.key.questions or said not in ("left", "right", "comparable", "broken"):
            return "malformed"
        if not 0 <= number < len(self.trials) or not self._is_shown(answer, self.trials[number]):
            return "not what this rater was shown"
        if (number, question) in self.seen:
            return "answered twice"
        self.seen.add((number, question))
        if said == "broken":
            return "a video did not play"
        if seconds + ROUNDING < self.least or plays < self.key.page["min_plays"]:
            return "too fast"
        self._count(self.trials[number], question, said, float(seconds))
        return ""

    def _is_shown(self, answer: Mapping[str, Any], trial: Trial) -> bool:
        shown = trial.matchup, trial.left, trial.right, trial.is_repeat
        return tuple(answer.get(name) for name in ("matchup", "left", "right", "repeat")) == shown

    def _count(self, trial: Trial, question: str, said: str, seconds: float) -> None:
        matchup = self.matchups[trial.matchup]
        if matchup.is_attention:
            right, all_of_them = self.attention
            self.attention = right + (said == "comparable"), all_of_them + 1
            return
        owners = self.key.owners[matchup.id]
        pair = owners if owners in self.key.pairs else (owners[1], owners[0])
        choice: Choice = "tie"
        if said != "comparable":
            chosen = owners[matchup.videos.index(trial.left if said == "left" else trial.right)]
            choice = "a" if chosen == pair[0] else "b"
        vote = Vote(
            self.rater,
            question,
            matchup.id,
            self.key.prompts[matchup.id],
            pair,
            choice,
            None if said == "comparable" else said == "left",
            seconds,
            trial.is_repeat,
        )
        (self.repeats if trial.is_repeat else self.votes).append(vote)
