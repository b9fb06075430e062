"""What a preference study asks, of whom nothing but a browser is needed.

People see two videos of one prompt side by side, made by two models whose names they are not told, and answer each
question with the one, the other, or *comparable*, as in Tables 2 and 4 of the VideoCrafter2 paper (Chen et al. 2024,
arXiv 2401.09047): its users judged visual quality, motion quality and text-video alignment.

A *pair* is two models; a *matchup* is a prompt and a pair, so two videos; a *trial* is one showing of a matchup to one
rater, with a left and a right; a *vote* is one answer of a rater to one question about a trial.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from vc2.config import Config
from vc2.errors import ConfigError

__all__ = ["PAGE_VERSION", "QUESTIONS", "Question", "StudyConfig", "parse_folders", "parse_pairs", "parse_questions"]

PAGE_VERSION = 1  # of the page and of the files it exports: raised when old answers can no longer be read


class Question(Config):
    """A question about two videos."""

    id: str
    title: str = Field(min_length=1, max_length=200)  # the question itself
    hint: str = Field("", max_length=400)  # what to look at, in smaller type

    @field_validator("id")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", value):
            raise ValueError("expected up to 40 small letters, digits or '_', a letter first")
        return value


QUESTIONS = {
    question.id: question
    for question in (
        Question(
            id="visual_quality",
            title="Which video has the better visual quality?",
            hint="The picture alone: sharp, clean, well composed, free of artefacts. Leave the movement aside.",
        ),
        Question(
            id="motion_quality",
            title="Which video has the better motion quality?",
            hint="The movement alone: natural and steady; no flicker, no sudden flash of foreground or background.",
        ),
        Question(
            id="text_video_alignment",
            title="Which video follows the text better?",
            hint="Everything the text names is there, as the text says it: things, number, colours, action, style.",
        ),
    )
}


class StudyConfig(Config):
    """A study. Defaults: the three questions of the paper's Table 2 about every pair of models."""

    title: str = Field("Which video is better?", min_length=1, max_length=120)
    questions: tuple[Question, ...] = Field(tuple(QUESTIONS.values()), min_length=1)
    pairs: Literal["all", "first"] | tuple[tuple[str, str], ...] = Field(
        "all", description="all: every two models; first: the first model against each other one; or pairs of names"
    )
    max_prompts: int | None = Field(None, ge=1, description="so many prompts, drawn by the seed; empty: all")
    trials_per_rater: int | None = Field(
        None, ge=1, description="matchups that one rater sees, another draw for each; empty: all"
    )
    repeats: float = Field(
        0.1, ge=0, le=1 / 3, description="share of a rater's matchups shown again with sides changed, far from before"
    )
    attention: int = Field(0, ge=0, le=20, description="trials that show the same video twice: comparable is right")
    min_seconds: float = Field(2.0, ge=0, le=120, description="seconds of looking before an answer is taken")
    min_plays: int = Field(1, ge=0, le=5, description="times that both videos must have played to their end")
    captions: bool = Field(True, description="show the prompt; without, alignment cannot be judged")
    seed: int = 0

    @model_validator(mode="after")
    def _questions_differ(self) -> "StudyConfig":
        names = [question.id for question in self.questions]
        if len(set(names)) != len(names):
            raise ValueError(f"questions {', '.join(names)}: ids must differ")
        if not self.captions and "text_video_alignment" in names:
            raise ValueError("text_video_alignment cannot be judged without captions; leave out one of the two")
        return self

    def pairs_of(self, models: Iterable[str]) -> tuple[tuple[str, str], ...]:
        """The pairs to compare of these models.

        Raises:
            ConfigError: If a pair names no model, names one twice, or is given twice.
        """
        names = list(models)
        if len(names) < 2:
            raise ConfigError(f"a study compares models: {len(names)} given, expected two folders or more")
        if self.pairs == "first":
            return tuple((names[0], other) for other in names[1:])
        if self.pairs == "all":
            return tuple((one, other) for place, one in enumerate(names) for other in names[place + 1 :])
        seen: set[frozenset[str]] = set()
        for pair in self.pairs:
            if unknown := [name for name in pair if name not in names]:
                raise ConfigError(f"pair {pair[0]}:{pair[1]}: no model {unknown[0]!r}; there are {', '.join(names)}")
            if pair[0] == pair[1] or frozenset(pair) in seen:
                raise ConfigError(f"pair {pair[0]}:{pair[1]}: expected two different models, each pair once")
            seen.add(frozenset(pair))
        if not self.pairs:
            raise ConfigError("no pairs to compare")
        return self.pairs


def parse_questions(texts: Iterable[str]) -> tuple[Question, ...]:
    """Questions from `visual_quality` (one of `QUESTIONS`) or `id=Question?` or `id=Question?|what to look at`.

    Raises:
        ConfigError: If one is neither; says which.
    """
    found = []
    for text in texts:
        name, equals, rest = text.partition("=")
        if not equals and name in QUESTIONS:
            found.append(QUESTIONS[name])
            continue
        title, _, hint = rest.partition("|")
        try:
            found.append(Question(id=name, title=title.strip(), hint=hint.strip()))
        except ValidationError as error:
            known = ", ".join(QUESTIONS)
            problem = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"question {text!r:.80}: {problem}; give one of {known}, or id=Question?") from None
    return tuple(found) or tuple(QUESTIONS.values())


def parse_pairs(texts: Iterable[str]) -> Literal["all", "first"] | tuple[tuple[str, str], ...]:
    """Pairs from `all`, `first`, or any number of `A:B`.

    Raises:
        ConfigError: If one is no pair.
    """
    given = list(texts)
    if given in ([], ["all"]):
        return "all"
    if given == ["first"]:
        return "first"
    pairs = []
    for text in given:
        one, colon, other = text.partition(":")
        if not colon or not one or not other:
            raise ConfigError(f"pair {text!r}: expected A:B, two names of models; or all, or first, alone")
        pairs.append((one, other))
    return tuple(pairs)


def parse_folders(texts: Iterable[str]) -> dict[str, Path]:
    """Model names and folders from `name=FOLDER` or `FOLDER`, whose last part is then the name.

    Raises:
        ConfigError: If two have one name.
    """
    folders: dict[str, Path] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not equals or "/" in name:
            name, place = Path(text).resolve().name, text
        if not place or not name:
            raise ConfigError(f"{text!r}: expected FOLDER or name=FOLDER")
        if name in folders:
            raise ConfigError(f"two folders are called {name!r}: tell them apart by name=FOLDER")
        folders[name] = Path(place)
    return folders
