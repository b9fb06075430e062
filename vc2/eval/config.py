"""What is asked of an evaluation: the prompts, how videos are sampled from them, and which scores are wanted.

A *prompt file* is a knob, the digest of the prompts in it is the identity: the same prompts from another place name the
same videos.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from vc2.config import Config, knob
from vc2.errors import ConfigError
from vc2.eval.prompts import Prompt, check_ids, load_prompts, prompts_digest
from vc2.model.config import SamplerConfig

__all__ = ["EvaluateStage", "Prompt", "SampleStage", "load_prompts", "prompts_digest"]


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
        check_ids(self.prompts)
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
