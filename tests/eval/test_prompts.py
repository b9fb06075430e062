"""The benchmark's prompts are known by their hashes; any list of prompts can be read."""

import json
from pathlib import Path

import pytest

from vc2.errors import ConfigError
from vc2.eval.prompts import (
    COCO_CLASSES,
    Prompt,
    attributes_digest,
    detection_classes,
    load_prompts,
    num_of_benchmark,
    prompts_digest,
    scoring_text,
)

GOLDEN = Path(__file__).parent.parent / "reference" / "evalcrafter" / "golden"
THREE = ("2 Dog and a whale, ocean adventure", "Teddy bear and 3 real bear", "goldfish in glass")  # 0000 to 0002


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_benchmarks_prompts_are_recognised_and_their_attributes_known(tmp_path: Path) -> None:
    """From a plain list without a word about attributes; a prompt of one's own stands beside them under its own id."""
    prompts = load_prompts(write(tmp_path / "list.txt", "\n".join(THREE)))
    assert num_of_benchmark(prompts) == 3
    own = {"id": "own", "prompt": "a prompt of my own", "attributes": {"text": "HALT"}}
    lines = [json.dumps({"id": prompt.id, "prompt": prompt.text}) for prompt in prompts]
    mixed = load_prompts(write(tmp_path / "list.jsonl", "\n".join((*lines, json.dumps(own)))))
    assert mixed[:3] == prompts and mixed[3].attributes == {"text": "HALT"} and num_of_benchmark(mixed) == 3
    assert prompts[0].attributes == {"count": {"n": 2, "object": "dog"}}
    assert prompts[2].attributes == {}


def test_a_list_that_differs_from_the_benchmarks_names_the_prompts(tmp_path: Path) -> None:
    changed = write(tmp_path / "list.txt", "\n".join((THREE[0], THREE[1], "a goldfish")))
    with pytest.raises(ConfigError, match="1 of 3 prompts differ from it: 0002; take the list as published"):
        load_prompts(changed)
    swapped = write(tmp_path / "list.txt", "\n".join((THREE[0], THREE[1], "in goldfish glass")))
    with pytest.raises(ConfigError, match="1 of them are the texts that scorers read"):
        load_prompts(swapped)


def test_the_benchmarks_own_files_say_the_same_as_ours(tmp_path: Path) -> None:
    """Its metadata has attributes as words; texts for scoring lie beside it; its folder means its metadata."""
    rows = {
        "0000": {"prompt": THREE[0], "attributes": {"count": "2 dog", "color": "", "face": ""}},
        "0001": {"prompt": THREE[1], "attributes": {}},
        "0002": {"prompt": THREE[2], "attributes": {"face": "Some Body", "amp": "slow", "color": "red car"}},
    }
    write(tmp_path / "metadata.json", json.dumps(rows))
    (tmp_path / "prompts").mkdir()
    write(tmp_path / "prompts" / "0002.txt", "in goldfish glass\n")
    write(tmp_path / "prompts" / "0001.txt", THREE[1])
    prompts = load_prompts(tmp_path)
    assert prompts == load_prompts(tmp_path / "metadata.json")
    assert prompts[0].attributes == {"count": {"n": 2, "object": "dog"}}
    assert prompts[2].attributes == {
        "celebrity": "Some Body",
        "amplitude": "slow",
        "color": {"color": "red", "object": "car"},
        "scoring_text": "in goldfish glass",
    }
    assert scoring_text(prompts[2], "compat") == "in goldfish glass" and scoring_text(prompts[2], "fixed") == THREE[2]
    assert scoring_text(prompts[1], "compat") == THREE[1]


def test_what_is_known_of_prompts_changes_scores_and_not_videos() -> None:
    plain, known = Prompt(id="a", text="a cat"), Prompt(id="a", text="a cat", attributes={"text": "STOP"})
    assert prompts_digest([plain]) == prompts_digest([known]) != prompts_digest([plain.evolve(text="a dog")])
    assert attributes_digest([plain]) != attributes_digest([known])


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("metadata.json", "[1, 2]", "not the benchmark's metadata"),
        ("metadata.json", '{"0000": {"prompt": "a"}}', "'attributes'"),
        ("metadata.json", '{"../x": {"prompt": "a", "attributes": {}}}', "expected 1 to 64 letters"),
        ("metadata.json", '{"0000": {"prompt": "a", "attributes": {"count": "many cats"}}}', "count is"),
        ("prompts.jsonl", '{"id": "0000"}', "'prompt'"),
        ("prompts.txt", "\n\n", "holds no prompts"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, name: str, text: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error) as told:
        load_prompts(write(tmp_path / name, text))
    assert "\n" not in str(told.value)


def test_a_folder_without_the_benchmarks_files_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"without metadata.json and prompt700.txt"):
        load_prompts(tmp_path)


def test_named_classes_are_those_recorded() -> None:
    """Whole words, any case, with s or es: the recorded prompts name the recorded classes."""
    recorded = json.loads((GOLDEN / "detection.json").read_text())
    found = {(name, word) for name, text in recorded["prompts"].items() for word in detection_classes(text, "compat")}
    assert found == {(query["id"], query["keyword"]) for query in recorded["queries"]}
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80


@pytest.mark.parametrize(
    ("text", "compat", "fixed"),
    [
        ("two teddy bears", {"bear", "teddy bear"}, {"teddy bear"}),
        ("a bear hugs a teddy bear", {"bear", "teddy bear"}, {"bear", "teddy bear"}),
        ("a hot dog on a bench", {"dog", "hot dog", "bench"}, {"hot dog", "bench"}),
        ("an orange frisbee", {"orange", "frisbee"}, {"frisbee"}),
        ("oranges, and an orange.", {"orange"}, {"orange"}),
        ("a carpet in a carriage", set(), set()),
    ],
)
def test_a_class_inside_another_and_a_colour_are_not_meant(text: str, compat: set[str], fixed: set[str]) -> None:
    assert set(detection_classes(text, "compat")) == compat
    assert set(detection_classes(text, "fixed")) == fixed
