"""The one DAG of this project, without a word of what runs it.

    shard/webvid ---+
                    +--> train/full ---> train/spatial ---> evaluate/evalcrafter
    shard/laion-coco+                   /
    shard/jdb -------------------------+

Every fingerprint can be computed before anything runs, so the driver knows what is done by asking the store, and nobody
else. How a stage is run is handed in as a callable: in this process (`vc2 run`) or as a deployment (the flows).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from vc2.artifacts import (
    Artifact,
    Checkpoint,
    Manifest,
    Report,
    ShardSet,
    checkpoint_prefix,
    find,
    fingerprint,
    load_manifest,
    shard_set_prefix,
)
from vc2.config import digest
from vc2.data.config import STAGE_VERSION as SHARD_VERSION
from vc2.data.config import ShardStage, ledger_prefix, removal_lists, shard_fingerprint, source_digest
from vc2.errors import ConfigError, LaunchFailed, SourceError, Vc2Error
from vc2.eval.generate import STAGE_VERSION as SAMPLE_VERSION
from vc2.eval.generate import samples_prefix
from vc2.pipeline.recipes import DEFAULT_WORK, PipelineConfig
from vc2.progress import counted
from vc2.storage import Store
from vc2.train.attempts import Run
from vc2.train.config import STAGE_VERSION as TRAIN_VERSION

__all__ = [
    "DAG",
    "FIELDS",
    "GIVEN",
    "IMPORTED",
    "NODES",
    "STAGES",
    "Begun",
    "Node",
    "PlannedStage",
    "RunStage",
    "artifact_at",
    "asked_of",
    "begun",
    "check_measurable",
    "drive",
    "given_artifacts",
    "next_repeat",
    "plan",
    "raw_digest",
    "reached",
    "span",
]


StageName = Literal[
    "shard/webvid", "shard/laion-coco", "shard/jdb", "train/full", "train/spatial", "evaluate/evalcrafter"
]
REPORT_VERSION = 2
Track = tuple[str, str]  # a thing, and what was done with it: shard, built


@dataclass(frozen=True, slots=True)
class Node:
    """A stage of the DAG."""

    name: StageName
    field: str  # of PipelineConfig
    version: int  # of the package that does the work: raised by hand when its results change
    kind: type[Artifact]
    inputs: Mapping[str, str]  # role -> name of the stage that makes it


DAG = (
    Node("shard/webvid", "webvid", SHARD_VERSION, ShardSet, {}),
    Node("shard/laion-coco", "laion_coco", SHARD_VERSION, ShardSet, {}),
    Node("shard/jdb", "jdb", SHARD_VERSION, ShardSet, {}),
    Node("train/full", "full", TRAIN_VERSION, Checkpoint, {"videos": "shard/webvid", "images": "shard/laion-coco"}),
    Node("train/spatial", "spatial", TRAIN_VERSION, Checkpoint, {"images": "shard/jdb", "start_from": "train/full"}),
    Node(
        "evaluate/evalcrafter",
        "evaluation",
        REPORT_VERSION,
        Report,
        {"checkpoint": "train/spatial", "base": "train/full", "videos": "shard/webvid"},
    ),
)
GIVEN = "given by URI"  # why such a stage is done
IMPORTED = "imported"  # the stage name of checkpoints that were made elsewhere
NODES: Mapping[str, Node] = {node.name: node for node in DAG}
STAGES: tuple[str, ...] = tuple(NODES)
FIELDS = {node.name: node.field for node in DAG}


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """What is known of a stage before it runs."""

    name: str
    version: int
    fingerprint: str  # empty where what goes into it is not there (`tolerant`)
    prefix: str  # of its artifact in the store
    repeat: int
    inputs: Mapping[str, str]  # role -> name of the stage that makes it
    state: Literal["done", "partial", "to do"]
    artifact: Artifact | None
    why: str
    tracks: Mapping[str, Track] = field(default_factory=dict)  # prefix of keys that tell how far it has come


class RunStage(Protocol):
    """Makes the artifact of one stage. Whether it did is asked of the store."""

    def __call__(self, planned: PlannedStage, inputs: Mapping[str, Artifact]) -> object: ...


def plan(
    config: PipelineConfig,
    store: Store,
    *,
    repeat: int = 0,
    start_at: str | None = None,
    given: Mapping[str, Artifact] | None = None,
    tolerant: bool = False,
) -> list[PlannedStage]:
    """Every stage with its fingerprint and whether it is done.

    Args:
        repeat: Makes everything once more under other fingerprints; with `start_at` that stage alone (and, since their
            inputs change, those after it).
        start_at: The stage that `repeat` is for.
        given: Artifacts to take in place of a stage's own, by stage name.
        tolerant: Raw data or prompts need not be there: stages that they go into have no fingerprint then.

    Raises:
        SourceError: If raw data is not there.
    """
    given = given or {}
    names: dict[str, str] = {}  # what stands for a stage in the fingerprints of those that use it
    planned: list[PlannedStage] = []
    for node in DAG:
        times = repeat if start_at in (None, node.name) else 0
        if artifact := given.get(node.name):
            names[node.name] = _input_name(artifact)
            planned.append(_taken(node, artifact))
            continue
        if tolerant and (lacking := _lacking(node, config, names)):
            planned.append(PlannedStage(node.name, node.version, "", "", times, node.inputs, "to do", None, lacking))
            continue
        inputs = {role: names[stage] for role, stage in node.inputs.items()}
        name = _fingerprint(node, config, store, inputs, times)
        prefix = _prefix(node, config, name)
        names[node.name] = f"{name}@{_steps(node, config)}" if node.kind is Checkpoint else name
        artifact = find(store, prefix, node.kind)
        stage = PlannedStage(
            node.name, node.version, name, prefix, times, node.inputs, "done", artifact, "found in the store",
            {} if artifact else _tracks(node, config, name, inputs, times),
        )  # fmt: skip
        planned.append(stage if artifact else _begun(stage, node, config, store))
    return planned


def reached(stage: PlannedStage, store: Store) -> int:
    """How far a stage that is not done has come, in a unit that grows as it goes on: of training the step of the newest
    whole state; of shards the parts that were fetched and the shards that were built; of an evaluation the groups of
    videos and the videos that were measured. 0: nothing is there yet."""
    if stage.name in TRAINED:
        return _step_reached(stage, store)
    return sum(_counts_of_tracks(stage, store).values())


class Begun(NamedTuple):
    """What is in the store of a stage that is not done, and will not be stored again."""

    state_bytes: int = 0  # of training: its train states
    raw_bytes: int = 0  # of shards: what was fetched
    built: float = 0.0  # of shards: the share that is built


def begun(stage: PlannedStage, store: Store) -> Begun:
    """What is there already of a stage's bytes, by listings of its own folders."""
    if stage.state != "partial":
        return Begun()
    if stage.name in TRAINED:
        run = Run(store, TRAINED[stage.name], stage.fingerprint)
        return Begun(state_bytes=sum(entry.size for entry in store.list(f"{run.prefix}/states/")))
    fetched = [track for track, (thing, _) in stage.tracks.items() if thing == "part"]
    raw_bytes = sum(entry.size for track in fetched for entry in store.list(track))
    built = _counts_of_tracks(stage, store).get(("shard", "built"), 0)
    return Begun(raw_bytes=raw_bytes, built=built / max(built, _planned_shards(stage, store)) if built else 0.0)


def _planned_shards(stage: PlannedStage, store: Store) -> int:
    try:
        return int(json.loads(store.read(f"{stage.prefix}/planned.json"))["shards"])
    except (KeyError, ValueError):
        return 0


def drive(
    config: PipelineConfig,
    store: Store,
    run_stage: RunStage,
    *,
    start_at: str | None = None,
    stop_after: str | None = None,
    repeat: int = 0,
    given: Mapping[str, Artifact] | None = None,
) -> Artifact:
    """Source to report: reuse what is done, run what is not, in order. Returns the last stage's artifact.

    Raises:
        ConfigError: If a stage before `start_at` is not done, or a stage is not in the DAG.
        LaunchFailed: If a stage says that it finished and its manifest is not in the store.
    """
    first, last = span(start_at, stop_after)
    stages = plan(config, store, repeat=repeat, start_at=start_at, given=given)[: last + 1]
    check_measurable(config, stages[first:])
    made: dict[str, Artifact] = {}
    for number, stage in enumerate(stages):
        if stage.artifact is not None:
            made[stage.name] = stage.artifact
            continue
        if number < first:
            if any(stage.name in later.inputs.values() for later in DAG[first : last + 1]):
                raise ConfigError(f"start_at={start_at} needs {stage.name}, which is {stage.state}; run it first")
            continue
        run_stage(stage, {role: made[name] for role, name in stage.inputs.items()})
        finished = find(store, stage.prefix, DAG[number].kind)
        if finished is None:
            raise LaunchFailed(
                f"{stage.name} ended well, yet {store.uri}/{stage.prefix} has no manifest; a new run makes it again"
            )
        made[stage.name] = finished
    return made[STAGES[last]]


def asked_of(
    stages: Sequence[PlannedStage], start_at: str | None = None, stop_after: str | None = None
) -> list[PlannedStage]:
    """The stages that are asked for, and of those before them what they need.

    Raises:
        ConfigError: If a stage is not in the DAG, or nothing would run.
    """
    first, last = span(start_at, stop_after)
    needed = {source for node in DAG[first : last + 1] for source in node.inputs.values()}
    return [stage for number, stage in enumerate(stages[: last + 1]) if number >= first or stage.name in needed]


def span(start_at: str | None, stop_after: str | None) -> tuple[int, int]:
    """Numbers of the first and the last stage that are asked for.

    Raises:
        ConfigError: If one is not in the DAG, or nothing would run.
    """
    for name in (start_at, stop_after):
        if name and name not in STAGES:
            raise ConfigError(f"no stage {name!r}; the stages are {', '.join(STAGES)}")
    first = STAGES.index(start_at) if start_at else 0
    last = STAGES.index(stop_after) if stop_after else len(STAGES) - 1
    if first > last:
        raise ConfigError(f"start_at={start_at} comes after stop_after={stop_after}; nothing would run")
    return first, last


def check_measurable(config: PipelineConfig, stages: Sequence[PlannedStage]) -> None:
    """Refuse to train, for one of these stages, what could not be measured afterwards, unless that is allowed.

    Raises:
        ConfigError: Names the metrics, why the first cannot be measured, and what to do.
    """
    todo = {stage.name for stage in stages if stage.artifact is None}
    missing = config.evaluation.missing()
    if config.evaluation.unmeasured == "allow" or not missing or "evaluate/evalcrafter" not in todo:
        return
    if any(name.startswith("train/") for name in todo):
        names = list(dict.fromkeys(name.split("/")[0] for name in missing))
        which, why = next(iter(missing.items()))
        raise ConfigError(
            f"{len(names)} metrics could not be measured after the training ({', '.join(names)}); {which}: {why}. Get "
            "what is missing, name the metrics that you want (evaluation.metrics), or set evaluation.unmeasured=allow"
        )


def given_artifacts(store: Store, shards: Sequence[str], checkpoint: str, *, stage: str = "") -> dict[str, Artifact]:
    """Artifacts named by URI, by the stage they stand for.

    Args:
        shards: URIs of shard sets. `webvid=URI` takes a set in place of that source; a bare URI stands for its own.
        checkpoint: URI of a checkpoint; it stands for the training stage that made it, an imported one for the first,
            and where it is to be evaluated for both. Empty: none.
        stage: The one stage that they are for, if it is one.

    Raises:
        ConfigError: If a URI is not in this store, names something else or no stage of the DAG.
    """
    given: dict[str, Artifact] = {}
    for text in shards:
        place, equals, uri = text.partition("=")
        manifest, artifact = _by_uri(store, uri if equals else text, ShardSet)
        given[f"shard/{place if equals else manifest.facts.get('source')}"] = artifact
    if checkpoint:
        manifest, artifact = _by_uri(store, checkpoint, Checkpoint)
        if manifest.stage == IMPORTED:
            given |= {"train/full": artifact} | ({"train/spatial": artifact} if stage.startswith("evaluate/") else {})
        else:
            given[f"train/{manifest.stage}"] = artifact
    for name in given:
        if name not in STAGES:
            raise ConfigError(f"{name} is no stage of this DAG; say for which source to take it: webvid=URI")
    return given


def artifact_at(store: Store, uri: str) -> tuple[Manifest, Artifact]:
    """The artifact of any kind that a URI names, and its manifest.

    Raises:
        ConfigError: If it is not in this store.
        StoreError: If it does not exist.
    """
    return _by_uri(store, uri, Artifact)


def _by_uri(store: Store, uri: str, kind: type[Artifact]) -> tuple[Manifest, Artifact]:
    if "://" not in uri:
        uri = str(Path(uri).absolute())
    if not uri.startswith(store.uri + "/"):
        raise ConfigError(
            f"{uri} is not in the store {store.uri}; artifacts are taken from the store that is written to"
        )
    prefix = uri.removeprefix(store.uri).strip("/").removesuffix("/manifest.json")
    manifest = load_manifest(store, prefix)
    artifact = manifest.reference(store, prefix)
    if not isinstance(artifact, kind):
        raise ConfigError(f"{uri} is a {artifact.kind}; expected a {kind.__name__}")
    return manifest, artifact


def next_repeat(config: PipelineConfig, store: Store, start_at: str | None, stop_after: str | None) -> int:
    """The smallest `repeat` under which the stages asked for are not all done."""
    last = STAGES.index(stop_after) if stop_after else len(STAGES) - 1
    repeat = 0
    while plan(config, store, repeat=repeat, start_at=start_at)[last].state == "done":
        repeat += 1
    return repeat


def _fingerprint(node: Node, config: PipelineConfig, store: Store, inputs: dict[str, str], repeat: int) -> str:
    stage = getattr(config, node.field)
    if node.kind is ShardSet:
        removals = removal_lists(store, stage.source.name)
        return shard_fingerprint(node.name, stage, raw_digest(config, stage), removals=removals, repeat=repeat)
    return fingerprint(node.name, node.version, stage, inputs, repeat)


def _lacking(node: Node, config: PipelineConfig, names: Mapping[str, str]) -> str:
    """What is not there and goes into the fingerprint of a stage; empty if it has one."""
    try:
        if node.kind is ShardSet:
            raw_digest(config, getattr(config, node.field))
        if node.kind is Report:
            config.evaluation.all_prompts()
    except Vc2Error as error:
        return str(error)
    unnamed = [stage for stage in node.inputs.values() if stage not in names]
    return f"{' and '.join(unnamed)} cannot be told yet" if unnamed else ""


def _prefix(node: Node, config: PipelineConfig, name: str) -> str:
    stage = getattr(config, node.field)
    if node.kind is ShardSet:
        return shard_set_prefix(stage.source.name, name)
    if node.kind is Checkpoint:
        return checkpoint_prefix(stage.name, name, stage.num_steps)
    return f"reports/{name}"


def _steps(node: Node, config: PipelineConfig) -> int:
    return getattr(config, node.field).num_steps if node.kind is Checkpoint else 0


def _input_name(artifact: Artifact) -> str:
    if isinstance(artifact, Checkpoint):
        return f"{artifact.fingerprint}@{artifact.step}"
    return artifact.fingerprint


def _taken(node: Node, artifact: Artifact) -> PlannedStage:
    if not isinstance(artifact, node.kind):
        raise ConfigError(f"{artifact.uri} is a {artifact.kind}; {node.name} makes a {node.kind.__name__}")
    return PlannedStage(
        node.name, node.version, artifact.fingerprint, artifact.prefix, 0, node.inputs, "done", artifact, GIVEN
    )


def raw_digest(config: PipelineConfig, stage: ShardStage) -> str:
    """What stands for the raw data of a source in a fingerprint: of a small world what it is made from, so that it need
    not be there yet."""
    if config.world is not None:
        return digest(config.world.identity())
    return source_digest(stage.source, DEFAULT_WORK / "digests")


# ---- how far a stage has come ----

TRAINED = {node.name: node.field for node in DAG if node.kind is Checkpoint}


def _tracks(node: Node, config: PipelineConfig, name: str, inputs: Mapping[str, str], repeat: int) -> dict[str, Track]:
    if node.kind is ShardSet:
        stage: ShardStage = getattr(config, node.field)
        try:
            tables = source_digest(stage.source, DEFAULT_WORK / "digests")
        except SourceError:  # a small world that is not made yet
            tables = ""
        fetched = {f"{ledger_prefix(stage, repeat, tables=tables)}/part-": ("part", "fetched")} if tables else {}
        return {**fetched, f"{_prefix(node, config, name)}/parts/shard-": ("shard", "built")}
    if node.kind is Report:
        tracks: dict[str, Track] = {}
        sampling = config.evaluation.sampling()
        for role in ("checkpoint", "base"):
            made = fingerprint("sample", SAMPLE_VERSION, sampling, {"checkpoint": inputs[role]}, repeat)
            tracks[f"{samples_prefix(made)}/groups/"] = ("group", "sampled")
            if role == "checkpoint":
                tracks[f"{samples_prefix(made)}/readings/"] = ("video", "measured")
        return tracks
    return {}


def _counts_of_tracks(stage: PlannedStage, store: Store) -> dict[Track, int]:
    found: dict[Track, int] = {}
    for track, thing in stage.tracks.items():
        kinds = (".parquet", ".json", ".jsonl")  # not the bytes that belong to them
        number = sum(1 for entry in store.list(track) if entry.key.endswith(kinds))
        found[thing] = found.get(thing, 0) + number
    return found


def _step_reached(stage: PlannedStage, store: Store) -> int:
    newest = next(Run(store, TRAINED[stage.name], stage.fingerprint).states(), None)
    return newest.step if newest else 0


def _begun(stage: PlannedStage, node: Node, config: PipelineConfig, store: Store) -> PlannedStage:
    """A stage that is not done, with what is there of it."""
    if stage.name in TRAINED:
        step = _step_reached(stage, store)
        words = f"step {step} of {_steps(node, config)}" if step else ""
    else:
        counts = _counts_of_tracks(stage, store)
        words = ", ".join(f"{counted(number, thing)} {verb}" for (thing, verb), number in counts.items() if number)
    return replace(stage, state="partial" if words else "to do", why=words or "not in the store")
