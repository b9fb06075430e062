"""What is asked of an evaluation: the prompts, how videos are sampled from them, and which scores are wanted.

A *prompt file* is a knob, the digest of the prompts in it is the identity: the same prompts from another place name the
same videos.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from vc2.config import Config, knob
from vc2.errors import ConfigError
from vc2.eval.formulas import Mode
from vc2.eval.metrics import EVALCRAFTER, METRICS, MODES, Given, MetricName, modes_of, what_it_takes
from vc2.eval.prompts import Prompt, attributes_digest, check_ids, load_prompts, prompts_digest
from vc2.model.config import SamplerConfig
from vc2.pretrained import WEIGHTS

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
    frames: int = Field(16, ge=1)  # per video
    width: int = Field(512, ge=8)  # pixels
    height: int = Field(320, ge=8)  # pixels
    play_fps: int = Field(
        10, ge=1, description="rate written into the mp4 files; `sampler.fps` is what the network is told"
    )
    weights: Literal["ema", "raw"] = "ema"  # which weights of the checkpoint
    seed: int = Field(123, ge=0)  # of the noise that videos start from
    group_size: int = Field(4, ge=1, description="prompts sampled together; a group is redone whole")
    precision: Literal["float32", "bfloat16"] = "float32"  # of the arithmetic
    world_size: int = knob(1, ge=1, description="ranks that share the groups")
    device: Literal["cpu", "cuda"] = knob("cpu")  # of the ranks
    launcher: Literal["local", "ray"] = knob("local", description="who starts the ranks: torchrun here, or a Ray Job")

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
        return self._bound(file, self._from_file(file))

    def _bound(self, file: str, prompts: tuple[Prompt, ...]) -> Self:
        return self.evolve(prompts_file=file, prompts_digest=prompts_digest(prompts))

    def all_prompts(self) -> tuple[Prompt, ...]:
        """The prompts, in order; a file's are checked against `prompts_digest` where that is filled in."""
        if self.prompts:
            return self.prompts[: self.num_prompts]
        return self._from_file(self.prompts_file)

    def _from_file(self, file: str) -> tuple[Prompt, ...]:
        if not file:
            raise ConfigError("no prompts: give `prompts` or a `prompts_file`")
        prompts = load_prompts(Path(file))[: self.num_prompts]
        if self.prompts_digest not in ("", found := prompts_digest(prompts)):
            raise ConfigError(f"{file}: prompts {found[:12]}, expected {self.prompts_digest[:12]}; was it edited?")
        return prompts


class EvaluateStage(SampleStage):
    """Videos from a checkpoint, and their scores."""

    benchmark: Literal["evalcrafter", "none"] = "evalcrafter"  # whose prompts and metrics
    metrics: tuple[MetricName, ...] = Field(
        (), description="names of metrics, of VBench's quality half too; empty: EvalCrafter's 17"
    )
    mode: Literal["compat", "fixed", "both"] = Field(
        "both", description="compat: the published formulas with their flaws; fixed: mended"
    )
    flow: Literal["raft", "dis"] = Field(
        "raft", description="what estimates optical flow; dis needs no weights and gives other numbers"
    )
    dover_first: Literal["aesthetic", "technical"] = Field(
        "aesthetic", description="DOVER's branch that VQA_A is made from; which one the leaderboard took is not known"
    )
    dover_seed: int = Field(0, ge=0, description="of the places that DOVER looks at; drawn without one upstream")
    references: str = knob("", description="folder of images that SDXL painted of the prompts; for SD_Score")
    photos: str = knob("", description="folder of photographs, a folder for each person; for Celebrity_ID_Score")
    files: dict[str, str] = knob({}, description="files of foreign weights, by the names that `vc2 doctor` has")
    batch: int = knob(16, ge=1, description="frames, or pairs of them, in a network at once")
    unmeasured: Literal["refuse", "allow"] = knob(
        "refuse", description="refuse: a run stops before training if a metric could not be measured afterwards"
    )
    compare: tuple[str, ...] = Field((), description="published rows to lay beside ours in the report; empty: all")
    attributes_digest: str = Field("", description="digest of what is known of a file's prompts: filled in when bound")
    measured_with: dict[str, str] = Field(
        {}, description="metric/mode -> digest of weights and data: filled in when bound, so that others score anew"
    )
    not_measured: dict[str, str] = Field(
        {}, description="metric/mode -> what it lacks: filled in when bound, so that what arrives is measured"
    )

    @field_validator("files")
    @classmethod
    def _are_known(cls, files: dict[str, str]) -> dict[str, str]:
        if strange := [name for name in files if name not in WEIGHTS]:
            raise ValueError(f"no weights are called {strange[0]!r}; `vc2 doctor` lists those that are")
        return files

    def sampling(self) -> SampleStage:
        """The part that decides the videos: two evaluations that differ in scores alone share them."""
        return SampleStage.model_validate({name: getattr(self, name) for name in SampleStage.model_fields})

    def _bound(self, file: str, prompts: tuple[Prompt, ...]) -> Self:
        return super()._bound(file, prompts).evolve(attributes_digest=attributes_digest(prompts))

    def with_metrics(self) -> Self:
        """A copy that names what each metric is measured with, or what it lacks. One that does so already is kept, so
        that all who work on a run agree. Asks no network, reads no weights but those given by path."""
        asked: list[tuple[str, Mode]] = [
            (name, mode) for name in self.metric_names() for mode in modes_of(METRICS[name], self.modes)
        ]
        if {*self.measured_with, *self.not_measured} == {f"{name}/{mode}" for name, mode in asked}:
            return self
        given = Given(self.flow, self.references, self.photos, self.files)
        measured_with, not_measured = {}, {}
        for name, mode in asked:
            lacks, found = what_it_takes(METRICS[name], mode, given)
            (not_measured if lacks else measured_with)[f"{name}/{mode}"] = lacks or found
        return self.evolve(measured_with=measured_with, not_measured=not_measured)

    @property
    def modes(self) -> tuple[Mode, ...]:
        return MODES if self.mode == "both" else (self.mode,)

    def metric_names(self) -> tuple[str, ...]:
        """The metrics asked for, in their table's order."""
        if self.benchmark == "none":
            return ()
        asked = self.metrics or EVALCRAFTER
        return tuple(name for name in METRICS if name in asked)

    def missing(self) -> dict[str, str]:
        """`metric/mode` -> why it cannot be measured."""
        return self.with_metrics().not_measured
