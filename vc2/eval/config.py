"""What is asked of an evaluation: the prompts, how videos are sampled from them, and which scores are wanted.

A *prompt file* is a knob, the digest of the prompts in it is the identity: the same prompts from another place name the
same videos. Prompts come as JSON lines (`prompt`; optional `id`, `attributes` and whatever else is known) or as plain
text, one prompt a line.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from vc2.config import Config, digest, knob
from vc2.errors import ConfigError
from vc2.model.config import SamplerConfig

__all__ = ["EvaluateStage", "Prompt", "SampleStage", "load_prompts", "prompts_digest"]


class Prompt(Config):
    """A text to make a video of, with what is known about it (a benchmark's attributes, or a small world's truth)."""

    id: str  # names the file: <id>.mp4
    text: str
    attributes: dict[str, Any] = {}

    @field_validator("id")
    @classmethod
    def _is_a_file_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", value):
            raise ValueError("expected 1 to 64 letters, digits, '-' or '_'")
        return value


class SampleStage(Config):
    """Videos from a checkpoint. Defaults: the released text-to-video script."""

    prompts: tuple[Prompt, ...] = Field((), description="prompts given here; empty: those of the prompt file")
    prompts_file: str = knob("", description="JSON lines or plain text; used where `prompts` is empty")
    prompts_digest: str = Field(
        "", description="digest of the file's prompts: filled in by `with_prompts`, checked when read"
    )
    num_prompts: int | None = Field(None, ge=1, description="the first so many prompts; empty: all")
    sampler: SamplerConfig = SamplerConfig()
    frames: int = Field(16, ge=1)
    width: int = Field(512, ge=8)
    height: int = Field(320, ge=8)
    play_fps: int = Field(
        10, ge=1, description="rate written into the mp4 files; `sampler.fps` is what the network is told"
    )
    weights: Literal["ema", "raw"] = "ema"
    seed: int = 123
    group_size: int = Field(4, ge=1, description="prompts sampled together; a group is redone whole")
    precision: Literal["float32", "bfloat16"] = "float32"
    world_size: int = knob(1, ge=1, description="ranks that share the groups")
    device: Literal["cpu", "cuda"] = knob("cpu")

    @model_validator(mode="after")
    def _ids_differ(self) -> "SampleStage":
        _check_ids(self.prompts)
        return self

    def with_prompts(self, path: str | Path | None = None) -> Self:
        """A copy bound to the prompts that the file (or `path`) holds now: its identity names their content.

        Raises:
            ConfigError: If there are no prompts, or the file holds others than `prompts_digest` says.
        """
        if self.prompts:
            return self
        file = str(path or self.prompts_file)
        bound = self.evolve(prompts_file=file, prompts_digest=prompts_digest(self._from_file(file)))
        if self.prompts_digest not in ("", bound.prompts_digest):
            raise ConfigError(
                f"{file}: prompts {bound.prompts_digest[:12]}, expected {self.prompts_digest[:12]}; was it edited?"
            )
        return bound

    def all_prompts(self) -> tuple[Prompt, ...]:
        """The prompts, in order; a file's are checked against `prompts_digest` where that is filled in."""
        return self.prompts[: self.num_prompts] or self.with_prompts()._from_file(self.prompts_file)

    def _from_file(self, file: str) -> tuple[Prompt, ...]:
        if not file:
            raise ConfigError("no prompts: give `prompts` or a `prompts_file`")
        return load_prompts(Path(file))[: self.num_prompts]


class EvaluateStage(SampleStage):
    """Videos from a checkpoint, and their scores."""

    benchmark: Literal["evalcrafter", "none"] = "evalcrafter"
    metrics: tuple[str, ...] = Field((), description="names of `vc2.eval.metrics.METRICS`; empty: all")
    mode: Literal["compat", "fixed"] = Field(
        "compat", description="compat: the published formulas with their flaws; fixed: mended"
    )

    def sampling(self) -> SampleStage:
        """The part that decides the videos: two evaluations that differ in scores alone share them."""
        return SampleStage.model_validate({name: getattr(self, name) for name in SampleStage.model_fields})


def load_prompts(path: Path) -> tuple[Prompt, ...]:
    """Prompts of a file: JSON lines where its name ends in .jsonl, else one prompt a line, numbered from 0000.

    Raises:
        ConfigError: If the file is missing or empty, or a line is no prompt; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: prompts cannot be read ({error}); give a .jsonl or .txt file") from None
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
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise ConfigError(
                f'{path}:{number}: no prompt ({problem}); expected {{"id": "0000", "prompt": "..."}}'
            ) from None
    if not prompts:
        raise ConfigError(f"{path}: holds no prompts")
    try:
        _check_ids(prompts)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return tuple(prompts)


def _from_json(line: str, default_id: str) -> Prompt:
    row = dict(json.loads(line))
    text, name, attributes = row.pop("prompt"), row.pop("id", default_id), row.pop("attributes", None)
    return Prompt(id=name, text=text, attributes=row | (attributes or {}))


def _check_ids(prompts: tuple[Prompt, ...] | list[Prompt]) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"prompt id {prompt.id!r} is given twice; ids name the videos and must differ")
        seen.add(prompt.id)


def prompts_digest(prompts: tuple[Prompt, ...]) -> str:
    """sha256 over ids, texts and attributes in order."""
    return digest([prompt.model_dump(mode="json") for prompt in prompts])
