"""Small studies: real mp4 files of a few frames, and raters who answer as they are told."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vc2.data.video_files import encode_mp4
from vc2.eval.study.answers import StudyKey, read_key
from vc2.eval.study.build import BuiltStudy, build
from vc2.eval.study.config import StudyConfig
from vc2.eval.study.order import Matchup, Trial

MODELS = ("Sunrise", "Moonlit", "Noonday")
PROMPTS = 9
SECRET = "made-by-nobody-else"  # what the files say about themselves
HOSTILE = '"><script>document.title="caught"</script><img src=x onerror="document.title=\'caught\'">&amp;</script>'


def tiny_video(model: str, prompt: int, *, frames: int = 6, fps: int = 10) -> bytes:
    """A grey square of its own shade that moves."""
    shade = 40 + 60 * MODELS.index(model)
    pixels = np.full((frames, 48, 64, 3), 200, np.uint8)
    for number, frame in enumerate(pixels):
        frame[8 + prompt : 24 + prompt, 4 * number : 4 * number + 16] = shade
    return encode_mp4(pixels, fps, comment=f"{SECRET} {model}")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models with nine videos each."""
    root = tmp_path_factory.mktemp("videos")
    for model in MODELS:
        (root / model).mkdir()
        for prompt in range(PROMPTS):
            # The models differ in length: players have to wait.
            video = tiny_video(model, prompt, frames=6 + MODELS.index(model))
            (root / model / f"{prompt:04d}.mp4").write_bytes(video)
    return {model: root / model for model in MODELS}


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt file; the text of 0004 is hostile."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    lines = [f"a square of shade {number} moves" for number in range(PROMPTS)]
    lines[4] = HOSTILE
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def study(folders: dict[str, Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> BuiltStudy:
    """All three pairs of three models, a third of the matchups twice, two attention trials."""
    config = StudyConfig(seed=5, repeats=0.3, attention=2, min_seconds=0.3)
    return build(folders, tmp_path_factory.mktemp("study") / "page", config, prompts=prompts)


@pytest.fixture(scope="session")
def key(study: BuiltStudy) -> StudyKey:
    return read_key(study.key)


Choose = Callable[[Trial, str, str, str], str]


@pytest.fixture(scope="session")
def rate(study: BuiltStudy, key: StudyKey) -> Callable[..., dict[str, Any]]:
    """What the page exports for a rater who answers by `choose(trial, question, left model, right model)`."""

    def answers(rater: str, choose: Choose, **changes: Any) -> dict[str, Any]:
        said = []
        for number, trial in enumerate(key.trials_of(rater)):
            matchup = next(one for one in key.matchups if one.id == trial.matchup)
            owner = dict(zip(matchup.videos, key.owners[trial.matchup], strict=True))
            for question in key.questions:
                said.append(
                    {
                        "trial": number, "matchup": trial.matchup, "left": trial.left, "right": trial.right,
                        "repeat": trial.is_repeat, "question": question,
                        "answer": choose(trial, question, owner[trial.left], owner[trial.right]),
                        "seconds": 4.2, "plays": 2, "at": "2026-01-01T12:00:00.000Z",
                    }
                )  # fmt: skip
        whole = {
            "kind": "vc2 study answers", "version": 1, "study": study.study, "rater": rater,
            "started": "2026-01-01T11:00:00.000Z", "saved": "2026-01-01T12:30:00.000Z", "answers": said,
        }  # fmt: skip
        return whole | changes

    return answers


def likes(*order: str) -> Choose:
    """Takes whichever model comes first in the list; comparable where neither is in it, or both are the same."""

    def choose(trial: Trial, question: str, left: str, right: str) -> str:
        ranks = [order.index(model) if model in order else len(order) for model in (left, right)]
        return "comparable" if ranks[0] == ranks[1] else "left" if ranks[0] < ranks[1] else "right"

    return choose


@pytest.fixture(scope="session", name="likes")
def likes_fixture() -> Callable[..., Choose]:
    return likes


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Writes a file of answers; text as it is."""

    def save(name: str, data: Any) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    return save


@pytest.fixture(scope="session")
def bare_key() -> Callable[[Sequence[str], Sequence[str]], StudyKey]:
    """A key without files, for votes that are made up: (models, questions) -> key."""

    def make(models: Sequence[str], questions: Sequence[str]) -> StudyKey:
        pairs = tuple((a, b) for number, a in enumerate(models) for b in models[number + 1 :])
        matchup = Matchup("m", "", ("x.mp4", "y.mp4"), "m")
        titles = {question: question for question in questions}
        return StudyKey(
            "0" * 64, tuple(models), pairs, tuple(questions), titles, (matchup,), {"m": "0"}, {"m": pairs[0]}, {}
        )

    return make
