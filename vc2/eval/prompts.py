"""Prompts: what videos are made of and scored against, and what is known of EvalCrafter's 700.

The text of EvalCrafter's list is not shipped, since nobody granted the right to hand it on; the user supplies it, and
it is recognised by the sha256 of every prompt. The attributes (how many, which colour, which action...) are facts and
are shipped beside the hashes. 100 of the 700 prompts have two texts upstream: the one people generate from
and the one the scorers read (`scoring_text`); comparing with published rows takes the latter.

A file of prompts is JSON lines (`prompt`; optional `id`, `attributes` and whatever else is known), plain text with one
prompt a line, the benchmark's `metadata.json`, or the folder that holds it. Beside the last two a folder `prompts/`
with `NNNN.txt` holds the texts for scoring.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError, field_validator

from vc2.config import Config, digest
from vc2.errors import ConfigError
from vc2.eval.formulas import Mode

__all__ = [
    "COCO_CLASSES",
    "NUM_BENCHMARK_PROMPTS",
    "Prompt",
    "attributes_digest",
    "check_ids",
    "detection_classes",
    "load_prompts",
    "num_of_benchmark",
    "num_without_scoring_text",
    "prompts_digest",
    "recognised",
    "scoring_text",
]

NUM_BENCHMARK_PROMPTS = 700

#: The classes of COCO, in the benchmark's order.
COCO_CLASSES: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


class Prompt(Config):
    """A text to make a video of, with what is known about it (a benchmark's attributes, or a small world's truth)."""

    id: str  # names the file: <id>.mp4
    text: str  # what a video is made of
    attributes: dict[str, Any] = {}  # what the prompt asks for, by kind

    @field_validator("id")
    @classmethod
    def _is_a_file_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", value):
            raise ValueError("expected 1 to 64 letters, digits, '-' or '_'")
        return value


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """sha256 over ids and texts in order: all that decides the videos."""
    return digest([[prompt.id, prompt.text] for prompt in prompts])


def attributes_digest(prompts: Sequence[Prompt]) -> str:
    """sha256 over what else is known of the prompts, which decides scores."""
    return digest([[prompt.id, prompt.attributes] for prompt in prompts])


def check_ids(prompts: Sequence[Prompt]) -> None:
    """Raise ValueError if two prompts have the same id."""
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"prompt id {prompt.id!r} is given twice; ids name the videos and must differ")
        seen.add(prompt.id)


# ---- reading ----


def load_prompts(path: Path) -> tuple[Prompt, ...]:
    """Prompts of a file or of the benchmark's folder; where they are EvalCrafter's, with the attributes known of them.

    Raises:
        ConfigError: If there is none or it is empty, a line is no prompt (it is named), or the list is EvalCrafter's
            but for some prompts (they are named).
    """
    if path.is_dir():
        found = next((path / name for name in ("metadata.json", "prompt700.txt") if (path / name).is_file()), None)
        if found is None:
            raise ConfigError(f"{path}: a folder without metadata.json and prompt700.txt; give a .jsonl or .txt file")
        path = found
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: prompts cannot be read ({error}); give a .jsonl or .txt file") from None
    prompts = _of_metadata(path, text) if path.suffix == ".json" else _of_lines(path, text.split("\n"))
    if not prompts:
        raise ConfigError(f"{path}: holds no prompts")
    try:
        check_ids(prompts)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if path.suffix in (".json", ".txt"):
        prompts = [_with_scoring_text(prompt, path.parent / "prompts" / f"{prompt.id}.txt") for prompt in prompts]
    return recognised(prompts, str(path))


def _of_lines(path: Path, lines: Sequence[str]) -> list[Prompt]:
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        default_id = f"{len(prompts):04d}"
        try:
            prompts.append(
                _from_json(line, default_id) if path.suffix == ".jsonl" else Prompt(id=default_id, text=line.strip())
            )
        except (ValueError, KeyError, TypeError) as error:
            problem = _problem(error)
            raise ConfigError(
                f'{path}:{number}: no prompt ({problem}); expected {{"id": "0000", "prompt": "..."}}'
            ) from None
    return prompts


def _problem(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {error}"
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    said = first["msg"].removeprefix("Value error, ")
    return f"{'.'.join(map(str, first['loc']))} {first['input']!r:.80}: {said[:1].lower()}{said[1:]}"


def _from_json(line: str, default_id: str) -> Prompt:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"{line.strip()!r:.60} is no object")
    text, name, attributes = row.pop("prompt"), row.pop("id", default_id), row.pop("attributes", None)
    known = {key: value for key, value in row.items() if value is not None} | (attributes or {})
    return Prompt(id=name, text=text, attributes=_attributes(known))


def _of_metadata(path: Path, text: str) -> list[Prompt]:
    """The benchmark's own file: id -> prompt and attributes as words, such as `"count": "3 person"`."""
    prompts = []
    try:
        rows = json.loads(text)
        if not isinstance(rows, dict):
            raise ValueError("not an object")
        for name, row in sorted(rows.items()):
            prompts.append(Prompt(id=name, text=str(row["prompt"]).strip(), attributes=_attributes(row["attributes"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = _problem(error)
        raise ConfigError(
            f"{path}: not the benchmark's metadata ({problem}); expected "
            '{"0000": {"prompt": ..., "attributes": ...}}'
        ) from None
    return prompts


def _attributes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as metrics expect them, also from the benchmark's words: `"count": "3 person"`.

    Raises:
        ValueError: If one that a metric looks at says something else.
    """
    known: dict[str, Any] = {}
    for foreign, said in given.items():
        name = {"face": "celebrity", "amp": "amplitude"}.get(foreign, foreign)
        if said == "" and foreign != "celebrity":
            continue
        if name == "count":
            known[name] = _pair(name, said, "n", int)
        elif name == "color":
            known[name] = _pair(name, said, "color", str)
        elif name in ("text", "action", "celebrity", "scoring_text") and not isinstance(said, str):
            raise ValueError(f"{name} is {said!r}, expected words")
        elif name == "amplitude" and said not in ("large", "slow"):
            raise ValueError(f"amplitude is {said!r}, expected large or slow")
        else:
            known[name] = said
    return known


def _pair(name: str, said: Any, first: str, kind: type) -> dict[str, Any]:
    """{first: ..., "object": ...} from itself or from two words or more."""
    if isinstance(said, str):
        head, _, thing = said.partition(" ")
        said = {first: head, "object": thing}
    try:
        found = {first: kind(said[first]), "object": str(said["object"])}
    except (KeyError, TypeError, ValueError):
        found = {}
    if not found or not found["object"] or (kind is int and found[first] < 1):
        raise ValueError(f'{name} is {said!r}, expected {{"{first}": ..., "object": ...}}')
    return found


def _with_scoring_text(prompt: Prompt, path: Path) -> Prompt:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return prompt
    if not text or text == prompt.text:
        return prompt
    return prompt.evolve(attributes=prompt.attributes | {"scoring_text": text})


def scoring_text(prompt: Prompt, mode: Mode) -> str:
    """What a video is scored against: in compat the text that the benchmark's scorers read, where it is known."""
    return str(prompt.attributes.get("scoring_text") or prompt.text) if mode == "compat" else prompt.text


# ---- EvalCrafter's list ----


@cache
def _benchmark() -> Mapping[str, Mapping[str, Any]]:
    lines = (files("vc2.eval") / "published" / "evalcrafter_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_of_benchmark(prompt: Prompt) -> bool:
    known = _benchmark().get(prompt.id)
    return known is not None and known["prompt_sha256"] == _sha256(prompt.text)


def num_of_benchmark(prompts: Sequence[Prompt]) -> int:
    """How many of the prompts are EvalCrafter's, by id and sha256."""
    return sum(map(_is_of_benchmark, prompts))


def num_without_scoring_text(prompts: Sequence[Prompt]) -> int:
    """How many of the benchmark's prompts are scored by another text, which is not at hand."""
    return sum(
        "scoring_sha256" in _benchmark()[prompt.id] and "scoring_text" not in prompt.attributes
        for prompt in prompts
        if _is_of_benchmark(prompt)
    )


def recognised(prompts: Sequence[Prompt], place: str = "prompts") -> tuple[Prompt, ...]:
    """The prompts, those of EvalCrafter with the attributes known of them; what a file says itself stands.

    Raises:
        ConfigError: If most are EvalCrafter's and others have its ids but another text.
    """
    strange = [prompt for prompt in prompts if not _is_of_benchmark(prompt)]
    if len(strange) * 2 >= len(prompts):
        return tuple(prompts)
    if differing := [prompt for prompt in strange if prompt.id in _benchmark()]:
        swapped = [p.id for p in differing if _benchmark()[p.id].get("scoring_sha256") == _sha256(p.text)]
        why = (
            f"; {len(swapped)} of them are the texts that scorers read (prompts/NNNN.txt), not those to generate from"
            if swapped
            else ""
        )
        raise ConfigError(
            f"{place}: EvalCrafter's list, but {len(differing)} of {len(prompts)} prompts differ from it: "
            f"{', '.join(prompt.id for prompt in differing[:8])}{why}; take the list as published, or give own prompts "
            "other ids"
        )
    for prompt in prompts:
        text = prompt.attributes.get("scoring_text")
        if text and _is_of_benchmark(prompt) and _benchmark()[prompt.id].get("scoring_sha256") != _sha256(text):
            raise ConfigError(
                f"{place}: the text for scoring {prompt.id} is {text!r:.60}, not the published one; take prompts/ as "
                "published, or none"
            )
    return tuple(
        prompt.evolve(attributes=_benchmark()[prompt.id]["attributes"] | prompt.attributes)
        if _is_of_benchmark(prompt)
        else prompt
        for prompt in prompts
    )


#: An orange is a fruit and not a colour in the plural, at the end of a clause, and before these words.
_ORANGE = r"\borange(?:s\b|\b(?=\s*(?:[.,;:!?]|$)|\s+(?:is|are|on|in|with)\b))"


def detection_classes(text: str, mode: Mode) -> tuple[str, ...]:
    """The COCO classes that a text names, in COCO's order: whole words, any case, with s or es.

    fixed: a class inside the name of another (the bear of a teddy bear, the dog of a hot dog) is not meant, nor is an
    orange that is a colour.
    """
    if mode == "compat":
        return tuple(name for name in COCO_CLASSES if _named(name).search(text))
    found = {"orange"} if re.search(_ORANGE, text, re.IGNORECASE) else set()
    for name in sorted(COCO_CLASSES, key=lambda name: -len(name.split())):
        text, count = _named(name).subn(" ", text)
        if count and name != "orange":
            found.add(name)
    return tuple(name for name in COCO_CLASSES if name in found)


@cache
def _named(name: str) -> re.Pattern[str]:
    return re.compile(rf"\b{re.escape(name)}(?:s|es)?\b", re.IGNORECASE)
