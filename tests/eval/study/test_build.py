"""A study from folders of videos."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vc2.data.video_files import encode_mp4, read_video
from vc2.errors import ConfigError
from vc2.eval.study.answers import StudyKey
from vc2.eval.study.build import BuiltStudy, build
from vc2.eval.study.config import StudyConfig, parse_folders, parse_pairs, parse_questions
from vc2.eval.study.containers import read_container

MODELS = ("Sunrise", "Moonlit", "Noonday")


def whole(folder: Path) -> dict[str, tuple[bytes, float]]:
    """Every file with its bytes and time."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime) for path in files}


@pytest.fixture
def two(folders: dict[str, Path]) -> dict[str, Path]:
    return {model: folders[model] for model in MODELS[:2]}


@pytest.fixture
def copies(two: dict[str, Path], tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Folders of three videos that a test may spoil."""
    for model, folder in two.items():
        (tmp_path / model).mkdir()
        for name in ("0000.mp4", "0001.mp4", "0002.mp4"):
            shutil.copy(folder / name, tmp_path / model / name)
    yield {model: tmp_path / model for model in two}


def test_nothing_in_the_folder_says_whose_a_video_is(study: BuiltStudy, folders: dict[str, Path]) -> None:
    """Neither names nor bytes nor times: no model, no id, no comment of the file, no key."""
    files = whole(study.folder)
    assert len(files) == study.videos + 1 == 28
    for name, (data, time) in files.items():
        assert not re.search(rb"sunrise|moonlit|noonday|made-by-nobody-else", data.lower() + name.lower().encode())
        assert not re.search(r"\d{4}\.mp4", name) or len(name) > 20
        assert time == 315619200
    assert study.key.parent == study.folder.parent
    assert all(model in study.key.read_text() for model in folders)


def test_same_folders_and_seed_make_the_same_bytes(two: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    """Whatever the place; again into the same folder is no offence; another seed makes other names."""
    config = StudyConfig(seed=3, max_prompts=4)
    first = build(two, tmp_path / "a", config, prompts=prompts)
    again = build(two, tmp_path / "a", config, prompts=prompts)
    other = build(two, tmp_path / "b" / "c", config, prompts=prompts)
    assert first == again
    assert whole(first.folder) == whole(other.folder) and first.key.read_bytes() == other.key.read_bytes()
    third = build(two, tmp_path / "d", config.evolve(seed=4), prompts=prompts)
    assert not set(whole(third.folder)) & {name for name in whole(first.folder) if name != "index.html"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a-key.json", "b", "d", "d-key.json"]


def test_models_stand_as_often_first_as_second(key: StudyKey) -> None:
    """Of each pair, up to the odd one, and in each two the other way round."""
    for pair in key.pairs:
        own = [matchup for matchup in key.matchups if set(key.owners[matchup.id]) == set(pair)]
        assert len(own) == 9
        assert abs(sum(key.owners[matchup.id] == pair for matchup in own) * 2 - 9) == 1
        for twos in {matchup.twos for matchup in own}:
            firsts = [key.owners[matchup.id][0] for matchup in own if matchup.twos == twos]
            assert len(set(firsts)) == len(firsts) <= 2


def test_a_study_is_never_written_over_something_else(two: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    """Neither over other things (by no force), nor over another study or its key, unless forced."""
    config = StudyConfig(max_prompts=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="other things than a study"):
        build(two, tmp_path / "mine", config, prompts=prompts, force=True)
    built = build(two, tmp_path / "a", config, prompts=prompts)
    before, key = whole(built.folder), built.key.read_bytes()
    with pytest.raises(ConfigError, match="another study"):
        build(two, tmp_path / "a", config.evolve(seed=9), prompts=prompts)
    shutil.rmtree(built.folder)
    with pytest.raises(ConfigError, match="key of another study"):
        build(two, tmp_path / "a", config.evolve(seed=9), prompts=prompts)
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(ConfigError, match="no key of a study"):
        build(two, tmp_path / "b", config, prompts=prompts, key=tmp_path / "notes.json", force=True)
    (tmp_path / "notes.json").unlink()
    assert build(two, tmp_path / "a", config.evolve(seed=9), prompts=prompts, force=True).study != built.study
    assert build(two, tmp_path / "a", config, prompts=prompts, force=True) == built
    assert whole(built.folder) == before and built.key.read_bytes() == key


def test_the_key_stays_outside(two: dict[str, Path], tmp_path: Path) -> None:
    """It is not written into the folder that raters get, nor the study among the videos."""
    with pytest.raises(ConfigError, match="keep it outside"):
        build(two, tmp_path / "a", key=tmp_path / "a" / "videos" / "key.json")
    with pytest.raises(ConfigError, match="must not lie in each other"):
        build(two, two["Sunrise"] / "study")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_used_is_left_out_with_a_reason(copies: dict[str, Path], tmp_path: Path) -> None:
    """A video that is missing, damaged, the same as the other's, or of no prompt; the rest is a study."""
    (copies["Sunrise"] / "0000.mp4").unlink()
    whole_video = (copies["Moonlit"] / "0001.mp4").read_bytes()
    (copies["Moonlit"] / "0001.mp4").write_bytes(whole_video[: len(whole_video) // 2])
    for name in ("0003.mp4", "0009.mp4"):
        shutil.copy(copies["Sunrise"] / "0002.mp4", copies["Sunrise"] / name)
    shutil.copy(copies["Sunrise"] / "0002.mp4", copies["Moonlit"] / "0003.mp4")
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\n")
    built = build(copies, tmp_path / "study", prompts=tmp_path / "prompts.txt")
    found = {(left.prompt, left.model): left.reason for left in built.left_out}
    assert built.matchups == built.prompts == 1
    assert found.pop(("0000", "Sunrise")) == "no video"
    assert found.pop(("0001", "Moonlit")).startswith("cannot be used: ")
    assert found.pop(("0003", "Sunrise:Moonlit")) == "the two videos are the same"
    assert found.pop(("0009", "Sunrise")) == "not in the prompt file"
    assert not found
    assert len(list((built.folder / "videos").iterdir())) == 2  # nothing lies about unused


def test_videos_that_browsers_do_not_play_are_coded_anew(copies: dict[str, Path], tmp_path: Path) -> None:
    """MPEG-4 of OpenCV's default, in mp4 or AVI, becomes H.264 of the same frames, times and size."""
    frames = np.stack([np.full((48, 64, 3), 30 + 20 * number, np.uint8) for number in range(8)])
    for name, rate in (("0000.mp4", 8), ("0001.avi", 30000 / 1001), ("0002.mp4", 7.5)):
        for folder in copies.values():
            (folder / name).with_suffix(".mp4").unlink(missing_ok=True)
        with av.open(str(copies["Sunrise"] / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=Fraction(rate).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        (copies["Moonlit"] / name).with_suffix(".mp4").write_bytes(encode_mp4(frames[::-1], rate))
    built = build(copies, tmp_path / "study")
    assert built.recoded == 3 and not built.left_out
    sources = json.loads(built.key.read_text())["sources"]
    for source in sources:
        data = (built.folder / "videos" / source["video"]).read_bytes()
        container = read_container(data)
        assert container is not None and container.is_played
        if source["model"] == "Sunrise":
            seen, rate = read_video(data)
            seconds = 8 / {"0000": 8, "0001": 30000 / 1001, "0002": 7.5}[source["prompt"]]
            assert abs(len(seen) / float(rate) - seconds) < 0.02
            assert seen.shape[1:] == (48, 64, 3)
            steps = [seen[int((number + 0.5) / 8 * len(seen))].mean() for number in range(8)]
            assert np.abs(np.array(steps) - frames.mean((1, 2, 3))).max() < 4


def test_what_could_give_models_away_is_said(two: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    """Videos of other size or length, and texts that are missing."""
    built = build(two, tmp_path / "a")
    assert any("differ in duration (Sunrise 0.6 s, Moonlit 0.7 s)" in warning for warning in built.warnings)
    assert any("no prompts given" in warning for warning in built.warnings)


def test_many_prompts_are_drawn_by_the_seed_and_complete_ones_first(
    two: dict[str, Path], folders: dict[str, Path], copies: dict[str, Path], tmp_path: Path
) -> None:
    """So many as were asked for; the same for the same seed."""
    mixed = {"Sunrise": two["Sunrise"], "Moonlit": copies["Moonlit"]}
    built = build(mixed, tmp_path / "a", StudyConfig(max_prompts=3))
    assert built.prompts == 3 and not built.left_out
    chosen = {
        seed: frozenset(
            matchup["prompt"]
            for matchup in json.loads(
                build(two, tmp_path / f"s{seed}", StudyConfig(max_prompts=4, seed=seed)).key.read_text()
            )["matchups"].values()
        )
        for seed in range(3)
    }
    assert all(len(names) == 4 for names in chosen.values()) and len(set(chosen.values())) > 1


@pytest.mark.parametrize(("pairs", "count"), [("all", 3), ("first", 2), ((("Moonlit", "Noonday"),), 1)])
def test_pairs_are_all_or_ours_against_each_or_named(
    folders: dict[str, Path], tmp_path: Path, pairs: str, count: int
) -> None:
    built = build(folders, tmp_path / "a", StudyConfig(pairs=pairs, max_prompts=2))  # type: ignore[arg-type]
    assert built.matchups == 2 * count
    assert len(built.models) == (2 if count == 1 else 3)  # no video of a model that nobody compares


def test_errors_say_what_to_do(two: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    """One folder, no videos, names that meet no prompt, unknown pairs, questions that cannot be judged."""
    (tmp_path / "empty").mkdir()
    for folders, options, words in (
        ({"A": two["Sunrise"]}, {}, "expected two folders"),
        ({"A": two["Sunrise"], "B": tmp_path / "empty"}, {}, "no videos; expected 0000.mp4"),
        ({"A": two["Sunrise"], "B": tmp_path / "none"}, {}, "no such folder"),
        ({"A": two["Sunrise"], "B:C": two["Moonlit"]}, {}, "no colon"),
        (two, {"config": StudyConfig(pairs=(("Sunrise", "Dusk"),))}, "no model 'Dusk'"),
        (two, {"config": StudyConfig(pairs=(("Sunrise", "Sunrise"),))}, "two different models"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(folders, tmp_path / "study", **options)
    (tmp_path / "other.jsonl").write_text('{"id": "cat", "prompt": "a cat"}\n')
    with pytest.raises(ConfigError, match="files are called like '0000', prompts have ids like 'cat'"):
        build(two, tmp_path / "study", prompts=tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="cannot be judged without captions"):
        StudyConfig(captions=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "other.jsonl"]


def test_words_of_the_command_line_become_settings() -> None:
    """Folders with or without names, questions known or own, pairs."""
    assert parse_folders(["runs/a/", "B=runs/b"]) == {"a": Path("runs/a/"), "B": Path("runs/b")}
    with pytest.raises(ConfigError, match="two folders are called 'a'"):
        parse_folders(["x/a", "y/a"])
    motion, own = parse_questions(["motion_quality", "cuteness=Which is cuter?|The whole video."])
    assert motion.id == "motion_quality" and (own.title, own.hint) == ("Which is cuter?", "The whole video.")
    with pytest.raises(ConfigError, match=r"'beauty'.*visual_quality"):
        parse_questions(["beauty"])
    assert len(parse_questions([])) == 3
    assert parse_pairs(["A:B", "A:C"]) == (("A", "B"), ("A", "C"))
    assert (parse_pairs([]), parse_pairs(["first"])) == ("all", "first")
    with pytest.raises(ConfigError, match="expected A:B"):
        parse_pairs(["A"])


def test_no_engine_is_loaded_for_a_study() -> None:
    """Building and analysing need neither torch nor a browser."""
    code = "import sys, vc2.eval.study.build, vc2.eval.study.tables; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "diffusers", "decord", "playwright"} & set(done.stdout.split())
