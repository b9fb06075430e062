"""Why a stage is not done: what differs between what is asked for and the nearest thing that was ever finished.

Artifacts are named by (stage, version, config without knobs, inputs, repeat), so a stage is to do exactly if one of
these differs from all that is in the store. The newest artifacts of the same stage are looked at, by the catalogue; of
these the one with the fewest differences is the *nearest*, and they are the reason. Where an input differs, its own
reason is looked for in the same way, down to the settings that were changed.

What raw data a shard set was made from is not in its manifest in plain words, but in its fingerprint: taken anew from
the set's own settings and the raw data of today it is the same, or the raw data has changed.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from pydantic import ValidationError

from vc2.artifacts import (
    Artifact,
    Checkpoint,
    Manifest,
    Note,
    Report,
    ShardSet,
    fingerprint,
    folder_of,
    is_there,
    load_manifest,
    newest_notes,
    notes_of,
)
from vc2.config import Config, digest
from vc2.data.config import STAGE as SHARD
from vc2.data.config import ShardStage, removal_lists
from vc2.errors import ConfigError, StoreError
from vc2.pipeline.driver import DAG, GIVEN, NODES, Node, PlannedStage, artifact_at, raw_digest
from vc2.pipeline.recipes import PipelineConfig
from vc2.storage import Store

__all__ = ["Difference", "Past", "Reason", "reasons"]

SHOWN = 3  # differences that are told in a line
LOOKED_AT = 30  # newest artifacts of a stage among which the nearest is chosen
KINDS = {ShardSet: "shard set", Checkpoint: "checkpoint", Report: "report"}


class Difference(Config):
    """One thing that is not as it was."""

    key: str  #: as `--set` has it; or `input <role>`, `version of <stage>`, `repeat of <stage>`, `<source>.removals`
    before: Any = None
    now: Any = None
    words: str = ""  #: in place of both
    causes: "tuple[Difference, ...]" = ()  #: of an input: why it is another

    def __str__(self) -> str:
        return f"{self.key}: {self.words}" if self.words else f"{self.key} {_shown(self.before)} -> {_shown(self.now)}"


class Reason(Config):
    """What a stage differs in from an artifact."""

    prefix: str = ""  #: of the artifact it is compared with; empty: there is none
    differences: tuple[Difference, ...] = ()
    unlike: str = ""  #: why there is nothing to compare with

    @property
    def line(self) -> str:
        """The reason in a line: the first differences, the rest counted."""
        return self.unlike or _listed(self.differences) or "the same"


class Past:
    """The newest artifacts of each folder of a store, and what else reasons need; read once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._notes: dict[tuple[str, str], list[Note]] = {}
        self._others: dict[str, Note | None] = {}
        self._removals: dict[str, list[str]] = {}
        self._raw: dict[str, str] = {}

    def notes(self, folder: str, stage: str = "") -> list[Note]:
        """See `vc2.artifacts.newest_notes`."""
        asked = (folder, stage)
        if asked not in self._notes:
            self._notes[asked] = newest_notes(self.store, folder, LOOKED_AT, stage=stage)
        return self._notes[asked]

    def newest(self, folder: str, is_wanted: Callable[[Note], bool]) -> Note | None:
        """The newest artifact of a folder that is wanted, as far back as `vc2.artifacts.notes_of` goes."""
        return next(filter(is_wanted, notes_of(self.store, folder)), None)

    def of(self, artifact: Artifact) -> Note | None:
        """The note of an artifact, or what its manifest says; None if it is gone."""
        prefix = artifact.prefix
        folder = folder_of(prefix)
        read = [notes for (name, _), notes in self._notes.items() if name == folder] or [self.notes(folder)]
        for note in chain(*read):
            if note.prefix == prefix:
                return note
        if prefix not in self._others:
            try:
                self._others[prefix] = Note.of(prefix, load_manifest(self.store, prefix))
            except StoreError:
                self._others[prefix] = None
        return self._others[prefix]

    def removals(self, source: str) -> list[str]:
        """The removal lists of a source."""
        if source not in self._removals:
            self._removals[source] = sorted(removal_lists(self.store, source))
        return self._removals[source]

    def raw(self, config: PipelineConfig, stage: ShardStage) -> str:
        """What stands for the raw data of a source."""
        name = digest([stage.model_dump(mode="json")["source"], config.world and config.world.identity()])
        if name not in self._raw:
            self._raw[name] = raw_digest(config, stage)
        return self._raw[name]


def reasons(
    planned: Sequence[PlannedStage],
    config: PipelineConfig,
    past: Past,
    *,
    against: str = "",
    only: Mapping[str, Note] | None = None,
) -> dict[str, Reason]:
    """Why each stage that is not done is not, by its name.

    Args:
        planned: The stages, of `config`.
        past: What was finished.
        against: URI of an artifact: every stage, done or not, is compared with the one that this was made by, not with
            the nearest. Stages that are not in its lineage are left out.
        only: Compare these stages with these artifacts, and no others.

    Raises:
        ConfigError: If `against` names nothing in this store that a stage of the DAG makes.
    """
    named = {stage.name for stage in planned if stage.fingerprint}
    looking = _Looking(planned, config, past)
    if only is not None:
        return {name: looking.reason(name, note) for name, note in only.items()}
    if against:
        return {name: looking.reason(name, note) for name, note in _lineage(past, against).items() if name in named}
    return {stage.name: looking.nearest(stage.name) for stage in planned if stage.state != "done" and stage.fingerprint}


class _Looking:
    """One comparison of a plan with the past."""

    def __init__(self, planned: Sequence[PlannedStage], config: PipelineConfig, past: Past) -> None:
        self.planned = {stage.name: stage for stage in planned}
        self.config, self.past, self.store = config, past, past.store

    def nearest(self, name: str) -> Reason:
        node = NODES[name]
        alike = [note for note in self.past.notes(*self._folder(node)) if _is_of(node, note)]
        order = sorted(alike, key=lambda note: sum(1 for _ in self._differences(node, note)))  # ties: the newest first
        for note in order:
            if is_there(self.store, note.prefix):
                return self.reason(name, note)
        return Reason(unlike="nothing like it was ever finished in this store")

    def reason(self, name: str, note: Note) -> Reason:
        """What a stage differs in from an artifact; its inputs' reasons included."""
        node, stage = NODES[name], self.planned[name]
        if stage.why == GIVEN:
            same = stage.prefix == note.prefix
            return Reason(prefix=note.prefix, unlike="" if same else f"{stage.fingerprint[:12]} is {GIVEN}")
        found = [
            difference.evolve(causes=self._causes(node, difference, note)) if difference.words else difference
            for difference in self._differences(node, note)
        ]
        if not found and stage.prefix != note.prefix:
            found = [Difference(key="vc2", words="made by another version, whose settings had other names")]
        return Reason(prefix=note.prefix, differences=tuple(found))

    def _causes(self, node: Node, difference: Difference, note: Note) -> tuple[Difference, ...]:
        role = difference.key.removeprefix("input ")
        before = note.manifest.inputs.get(role)
        if difference.key == role or before is None or (old := self.past.of(before)) is None:
            return ()
        source = node.inputs[role]
        return self.reason(source, old).differences if _is_of(NODES[source], old) else ()

    def _differences(self, node: Node, note: Note) -> Iterator[Difference]:
        """What differs, inputs by their names alone."""
        asked, manifest, stage = getattr(self.config, node.field), note.manifest, self.planned[node.name]
        before, now = _identities(manifest, asked)
        yield from _compared(before, now, node.field)
        if node.kind is Checkpoint and (step := int(note.prefix.rsplit("/", 1)[1])) != asked.num_steps:
            yield Difference(key=f"{node.field}.num_steps", before=step, now=asked.num_steps)
        for role, source in node.inputs.items():
            used, wanted = manifest.inputs.get(role), self.planned[source]
            if used is None or used.prefix != wanted.prefix:
                kind = KINDS[NODES[source].kind]
                words = f"another {kind}" if wanted.state == "done" else f"{source} is to be made"
                yield Difference(
                    key=f"input {role}", before=used and used.fingerprint, now=wanted.fingerprint, words=words
                )
        if node.kind is ShardSet:
            yield from self._raw_differences(node, stage, manifest)
        if manifest.stage_version != node.version:
            yield Difference(key=f"version of {node.name}", before=manifest.stage_version, now=node.version)
        if manifest.repeat != stage.repeat:
            yield Difference(key=f"repeat of {node.name}", before=manifest.repeat, now=stage.repeat)

    def _raw_differences(self, node: Node, stage: PlannedStage, manifest: Manifest) -> Iterator[Difference]:
        asked, facts = getattr(self.config, node.field), manifest.facts
        change = (facts.get("generations") or [{}])[-1].get("change")
        if change:
            yield Difference(key=f"{node.field}.generation", before=change.get("kind"), now="from scratch")
            return
        heeded, listed = sorted(facts.get("removals", ())), self.past.removals(asked.source.name)
        if heeded != listed:
            yield Difference(key=f"{node.field}.removals", before=heeded, now=listed)
        inputs = {"source": self.past.raw(self.config, asked)} | ({"removals": digest(heeded)} if heeded else {})
        identity, _ = _identities(manifest, asked)
        made = fingerprint(node.name, manifest.stage_version, identity, inputs, manifest.repeat)
        if made != manifest.fingerprint:
            yield Difference(key=f"{node.field}.source", words="table or files changed")

    def _folder(self, node: Node) -> tuple[str, str]:
        """Where artifacts of a stage are, and by which stage's name."""
        if node.kind is ShardSet:
            return f"shards/{getattr(self.config, node.field).source.name}", SHARD
        return (f"runs/{node.field}", node.field) if node.kind is Checkpoint else ("reports", node.name)


def _lineage(past: Past, uri: str) -> dict[str, Note]:
    """The stages of the DAG that an artifact was made by, each with its artifact."""
    manifest, artifact = artifact_at(past.store, uri)
    root = next((node for node in DAG if _is_of(node, Note.of(artifact.prefix, manifest))), None)
    if root is None:
        raise ConfigError(f"{uri} was made by {manifest.stage}, which is no stage of this DAG; name another artifact")
    found, todo = {}, [(root, artifact)]
    while todo:
        node, artifact = todo.pop()
        if node.name in found or (note := past.of(artifact)) is None or not _is_of(node, note):
            continue
        found[node.name] = note
        todo += [(NODES[name], note.manifest.inputs[role]) for role, name in node.inputs.items()
                 if role in note.manifest.inputs]  # fmt: skip
    return found


def _is_of(node: Node, note: Note) -> bool:
    """Whether a stage of the DAG could have made an artifact."""
    manifest = note.manifest
    if node.kind is ShardSet:
        return manifest.kind == "shard_set" and manifest.stage == SHARD and note.prefix.startswith("shards/")
    if node.kind is Checkpoint:
        return manifest.kind == "checkpoint" and manifest.stage == node.field
    return manifest.kind == "report" and manifest.stage == node.name


def _identities(manifest: Manifest, asked: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of an artifact without its knobs, and the one that is asked for."""
    now = asked.identity()
    try:
        return type(asked).model_validate(manifest.config).identity(), now
    except ValidationError:  # of a version with other fields
        return _without_knobs(manifest.config, now, asked.model_dump(mode="json")), now


def _without_knobs(old: Mapping[str, Any], identity: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in old.items():
        known, full = identity.get(name), whole.get(name)
        if name in whole and name not in identity:
            continue
        is_deep = all(isinstance(part, Mapping) for part in (value, known, full))
        kept[name] = _without_knobs(value, known, full) if is_deep else value  # type: ignore[arg-type]
    return kept


MISSING = object()


def _compared(before: Any, now: Any, path: str) -> Iterator[Difference]:
    """Differences of two plain values, by the path of each."""
    pairs = _pairs(before, now)
    if pairs is None:
        if before != now:
            yield Difference(key=path, before=_or_none(before), now=_or_none(now))
        return
    if isinstance(now, list | tuple) and (many := sum(old != new for _, old, new in pairs)) > SHOWN:  # other prompts
        yield Difference(key=path, before=len(before), now=len(now), words=f"{many} of {len(pairs)} are others")
        return
    for name, old, new in pairs:
        yield from _compared(old, new, f"{path}.{name}")


def _pairs(before: Any, now: Any) -> list[tuple[str, Any, Any]] | None:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [(name, before.get(name, MISSING), now.get(name, MISSING)) for name in {**now, **before}]
    both = [value for value in (before, now) if isinstance(value, list | tuple)]
    if len(both) == 2 and any(isinstance(item, Mapping) for value in both for item in value):
        return [
            (str(at), *(value[at] if at < len(value) else MISSING for value in both))
            for at in range(max(map(len, both)))
        ]  # type: ignore[return-value]
    return None


def _or_none(value: Any) -> Any:
    return None if value is MISSING else value


def _roots(differences: Sequence[Difference]) -> Iterator[Difference]:
    """What is behind differences: of an input with causes these, each once."""
    seen = []
    for difference in differences:
        for root in _roots(difference.causes) if difference.causes else [difference]:
            if root not in seen:
                seen.append(root)
                yield root


def _listed(differences: Sequence[Difference]) -> str:
    """At most a few in words, the rest counted; inputs that are others for the same reason together."""
    own = [difference for difference in differences if not difference.causes]
    behind: dict[str, list[Difference]] = {}
    for difference in differences:
        if difference.causes:
            behind.setdefault(_listed(list(_roots(difference.causes))), []).append(difference)
    rest = len(own) - SHOWN
    said = [", ".join(map(str, own[:SHOWN])) + (f" and {rest} more" if rest > 0 else "")] if own else []
    for why, inputs in behind.items():
        roles = ", ".join(difference.key.removeprefix("input ") for difference in inputs)
        words = inputs[0].words if len(inputs) == 1 else "others"
        said.append(f"input{'s' if len(inputs) > 1 else ''} {roles}: {words} ({why})")
    return ", ".join(said)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        is_digest = len(value) == 64 and set(value) <= set("0123456789abcdef")
        return value[:12] if is_digest else _short(value) or '""'
    if isinstance(value, float) or not isinstance(value, Mapping | list | tuple):
        return (
            f"{value}".lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        )
    return _short(json.dumps(value, ensure_ascii=False))


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:36]} ..."
