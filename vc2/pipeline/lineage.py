"""Everything that an artifact was made of, from the manifests alone.

The chain of manifests is the lineage: each names its inputs, and this follows them to the sources. A node stands for an
artifact, or for something that no stage here has made: raw data, foreign weights, a list of prompts, each with the
digest that the manifests record of it. Only what the chain names is read: some ten small objects, however large the
store, and of runs what their attempts ended by, as far as that is still there.

A manifest that is missing, or none of this version, is a node that says so. A store that does not answer is an error:
half a lineage would look like a whole one.

The page (`publish_lineage`) is derived from the store and may be written again at will: equal store, equal bytes. No
manifest names it, so nothing depends on it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import ValidationError

from vc2.artifacts import Artifact, FileEntry, Kind, Manifest
from vc2.config import Config, digest
from vc2.data.config import ShardStage
from vc2.eval.config import EvaluateStage, Prompt, SampleStage
from vc2.eval.page import flat
from vc2.eval.prompts import prompts_digest
from vc2.pipeline.driver import IMPORTED
from vc2.progress import counted
from vc2.storage import Store, join_uri
from vc2.train.config import TrainStage
from vc2.train.request import AUTOENCODER, TEXT_WEIGHTS

__all__ = [
    "AttemptTold",
    "Difference",
    "Edge",
    "Lineage",
    "Node",
    "brief",
    "graph",
    "page",
    "page_key",
    "publish_lineage",
]

Leaf = Literal["source", "weights", "prompts"]

LEAVES: dict[str, str] = {"source": "raw data", "weights": "foreign weights", "prompts": "prompts"}
STAGES: tuple[type[Config], ...] = (ShardStage, TrainStage, SampleStage, EvaluateStage)  # each after its own part
LONGEST_NAME = 200  # of a folder or file in any store


class Edge(Config):
    """Something that went into a node."""

    role: str
    node: str  #: key of what it is
    content_digest: str = ""  #: as the consumer recorded it


class AttemptTold(Config):
    """One try at a training run."""

    number: int
    started_at: int  #: step
    kind: str = ""  #: of the failure that ended it; empty: none was recorded
    message: str = ""
    made_it: bool = False  #: the checkpoint is of its making


class Difference(Config):
    """A setting that two nodes do not share."""

    name: str
    here: str  #: empty: it has no such setting
    there: str


class Node(Config):
    """An artifact, or a leaf: what no stage here has made."""

    key: str  #: prefix of an artifact; kind and digest of a leaf
    kind: Kind | Leaf
    name: str
    note: str = ""  #: the most telling count
    stage: str = ""
    version: int = 0
    repeat: int = 0
    fingerprint: str = ""
    content_digest: str = ""  #: of a leaf: what the manifests record of it; empty: nothing
    uri: str = ""
    made_at: str = ""
    seconds: float = 0.0
    inputs: tuple[Edge, ...] = ()
    asked: dict[str, Any] = {}  #: what was asked for, as far as it decides what comes out
    knobs: dict[str, Any] = {}  #: how the work was done, which changes nothing of what was asked for
    files: tuple[FileEntry, ...] = ()
    counts: dict[str, int] = {}
    facts: dict[str, Any] = {}
    licenses: dict[str, str] = {}
    environment: dict[str, str] = {}
    attempts: tuple[AttemptTold, ...] = ()
    sibling: str = ""  #: key of the node before it that the same kind of work has made
    differences: tuple[Difference, ...] = ()  #: from the sibling, in what was asked for and what it ran with
    troubles: tuple[str, ...] = ()

    @property
    def is_leaf(self) -> bool:
        return self.kind in LEAVES


class Lineage(Config):
    """Everything that an artifact was made of, sources first."""

    store: str
    root: str  #: key of the artifact
    nodes: tuple[Node, ...]

    def node(self, key: str) -> Node:
        """A node by its key."""
        return next(node for node in self.nodes if node.key == key)


def graph(store: Store, artifact: Artifact) -> Lineage:
    """What `artifact` was made of, down to sources, foreign weights and prompts.

    Args:
        store: Where the manifests are.
        artifact: A reference to it; its manifest need not be there.

    Raises:
        StoreError: If the store does not answer.
    """
    nodes: dict[str, Node] = {}
    waiting = [artifact]
    while waiting:
        reference = waiting.pop()
        if reference.prefix in nodes:
            continue
        manifest, trouble = _read(store, reference.prefix)
        if manifest is None:
            nodes[reference.prefix] = _unknown(reference, trouble)
            continue
        node, leaves = _node(store, reference, manifest)
        nodes[node.key] = node
        nodes |= {leaf.key: leaf for leaf in leaves}
        waiting += manifest.inputs.values()
    ordered = _in_order(_checked(nodes), artifact.prefix)
    return Lineage(store=store.uri, root=artifact.prefix, nodes=tuple(_compared(ordered)))


def page(lineage: Lineage) -> str:
    """The lineage as one HTML document that needs nothing else."""
    from vc2.pipeline.lineage_page import render_lineage

    return render_lineage(lineage)


def page_key(artifact: Artifact) -> str:
    """Where `publish_lineage` puts the page."""
    step = f"-{artifact.prefix.rsplit('/', 1)[-1]}" if artifact.kind == "checkpoint" else ""
    return f"pages/lineage/{artifact.fingerprint}{step}.html"


def publish_lineage(store: Store, artifact: Artifact) -> str:
    """Write the page of an artifact's lineage into the store, in place of an earlier one; returns its key."""
    key = page_key(artifact)
    store.write(key, page(graph(store, artifact)).encode())
    return key


# ---- reading ----


def _read(store: Store, prefix: str) -> tuple[Manifest | None, str]:
    """The manifest in a folder of the store, or why there is none."""
    key = f"{prefix}/manifest.json"
    parts = prefix.split("/")
    if not prefix.isprintable() or not {"", "..", "."}.isdisjoint(parts) or max(map(len, parts)) > LONGEST_NAME:
        return None, f"{prefix!r} is no place in a store"
    try:
        return Manifest.model_validate_json(store.read(key)), ""
    except KeyError:
        return None, f"no manifest at {join_uri(store.uri, key)}: it was deleted, or is in another store"
    except ValidationError as error:
        return None, f"{join_uri(store.uri, key)} is no manifest of this version ({str(error).splitlines()[0]})"


def _unknown(reference: Artifact, trouble: str) -> Node:
    return Node(
        key=reference.prefix,
        kind=reference.kind,
        name=_name(reference.kind, reference.prefix.split("/")[1] if "/" in reference.prefix else ""),
        note="manifest missing",
        fingerprint=reference.fingerprint,
        content_digest=reference.content_digest,
        uri=reference.uri,
        counts=reference.counts,
        troubles=(trouble,),
    )


def _node(store: Store, reference: Artifact, manifest: Manifest) -> tuple[Node, list[Node]]:
    """The node of an artifact, and the leaves that it names."""
    leaves = list(_leaves(manifest))
    asked, knobs = _asked(manifest)
    of_stage = str(manifest.facts.get("source", "")) if manifest.kind == "shard_set" else manifest.stage
    made = [
        Edge(role=role, node=one.prefix, content_digest=one.content_digest) for role, one in manifest.inputs.items()
    ]
    node = Node(
        key=reference.prefix,
        kind=manifest.kind,
        name=_name(manifest.kind, of_stage),
        note=brief(manifest),
        stage=manifest.stage,
        version=manifest.stage_version,
        repeat=manifest.repeat,
        fingerprint=manifest.fingerprint,
        content_digest=manifest.content_digest,
        uri=join_uri(store.uri, reference.prefix),
        made_at=manifest.created_at,
        seconds=manifest.seconds,
        inputs=(*made, *(Edge(role=role, node=leaf.key, content_digest=leaf.content_digest) for role, leaf in leaves)),
        asked=asked,
        knobs=knobs,
        files=manifest.files,
        counts=manifest.counts,
        facts=manifest.facts,
        licenses=manifest.licenses,
        environment=manifest.environment,
        attempts=tuple(_attempts(store, reference.prefix, manifest)),
    )
    return node, [leaf for _, leaf in leaves]


def _name(kind: str, of: str) -> str:
    if kind in ("shard_set", "checkpoint"):
        return f"{'shard' if kind == 'shard_set' else 'train'}/{of}" if of != IMPORTED else IMPORTED
    return of if kind == "report" and of else {"sample_set": "samples", "scorecard": "scores"}.get(kind, kind)


def brief(manifest: Manifest) -> str:
    """The most telling count of an artifact, in words."""
    counts = manifest.counts
    if manifest.kind == "shard_set":
        return f"{counts.get('samples', 0):,} samples in {counted(counts.get('shards', 0), 'shard')}"
    if manifest.kind == "checkpoint":
        return f"step {counts.get('steps', 0):,}"
    if manifest.kind == "scorecard":
        return f"{counted(counts.get('metrics_measured', 0), 'metric')} of {counted(counts.get('videos', 0), 'video')}"
    return counted(counts.get("videos", 0), "video")


def _asked(manifest: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a manifest's config says of what was asked for, and of how the work was done.

    A manifest keeps both together. The stage's own type tells them apart; what no type of today fits is taken to have
    been asked for.
    """
    config = manifest.config
    for type_ in STAGES:
        if not config or not set(config) <= set(type_.model_fields):
            continue
        try:
            knobs = _without(config, type_.model_validate(config).identity())
        except ValidationError:
            continue
        return _without(config, knobs), knobs
    return config, {}


def _without(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What is in `config` and not in `other`, at any depth."""
    left: dict[str, Any] = {}
    for name, value in config.items():
        if name not in other:
            left[name] = value
        elif (
            isinstance(value, Mapping)
            and isinstance(beside := other[name], Mapping)
            and (more := _without(value, beside))
        ):
            left[name] = more
    return left


# ---- leaves ----


def _leaves(manifest: Manifest) -> Iterator[tuple[str, Node]]:
    """What went in that no stage here has made: (role, leaf)."""
    config, facts = manifest.config, manifest.facts
    if manifest.kind == "shard_set" and not manifest.inputs:
        source = config.get("source")
        told = dict(source) if isinstance(source, Mapping) else {"uri": config.get("uri", "")}
        more = {name: facts[name] for name in ("archives", "removals") if facts.get(name)}
        name = str(facts.get("source") or told.get("name") or "source")
        yield "source", _leaf("source", name, str(facts.get("source_digest", "")), told | more, manifest)
    elif manifest.kind == "checkpoint" and (manifest.stage == IMPORTED or "source" in facts):
        name = str(facts.get("source", "a model"))
        yield (
            "source",
            _leaf("weights", name, "", {"form": facts.get("form"), "is": facts.get("recognised_as")}, manifest),
        )
    elif manifest.kind == "checkpoint" and "start_from" not in manifest.inputs:
        yield from _weights(manifest)
    elif manifest.kind == "sample_set" and "checkpoint" not in manifest.inputs:
        name = str(facts.get("origin", "videos"))
        yield "videos", _leaf("source", name, "", {}, manifest)
    elif manifest.kind == "scorecard" and (used := config.get("measured_with")):
        yield "metrics", _leaf("weights", "weights of metrics", digest(used), used, manifest)
    if manifest.kind == "sample_set":
        yield from _prompts(manifest)


def _leaf(kind: Leaf, name: str, content: str, facts: Mapping[str, Any], manifest: Manifest) -> Node:
    """A leaf; two manifests that name the same thing by the same digest share it."""
    told = {key: value for key, value in facts.items() if value not in (None, "", [], {})}
    own = content or digest([name, told, manifest.content_digest])
    return Node(key=f"{kind}:{name}:{own}", kind=kind, name=name, note=LEAVES[kind], content_digest=content, facts=told)


def _weights(manifest: Manifest) -> Iterator[tuple[str, Node]]:
    """Foreign weights that training began with. A digest that was asked for is recorded; of the autoencoder and of a
    text tower that came along the file is there."""
    config = manifest.config
    model = config.get("model") if isinstance(config.get("model"), Mapping) else {}
    assert isinstance(model, Mapping)
    files = {entry.name: entry.sha256 for entry in manifest.files}
    if name := config.get("sd_init"):
        yield (
            "sd_init",
            _leaf("weights", str(name), str(config.get("sd_sha256", "")), {"file": config.get("sd_path")}, manifest),
        )
    sha256 = files.get(AUTOENCODER) or str(model.get("autoencoder_sha256", ""))
    if sha256:
        yield "autoencoder", _leaf("weights", "autoencoder", sha256, {"file": model.get("autoencoder_path")}, manifest)
    text = model.get("text")
    if model.get("text_weights") and not (isinstance(text, Mapping) and text.get("seed") is not None):
        told = {"file": model.get("text_path")}
        yield "text", _leaf("weights", str(model["text_weights"]), files.get(TEXT_WEIGHTS, ""), told, manifest)


def _prompts(manifest: Manifest) -> Iterator[tuple[str, Node]]:
    config = manifest.config
    content = str(config.get("prompts_digest", ""))
    if given := config.get("prompts"):
        try:
            content = prompts_digest([Prompt.model_validate(prompt) for prompt in given][: config.get("num_prompts")])
        except (ValidationError, TypeError):
            return
    if content:
        count = counted(manifest.counts.get("videos", 0), "prompt")
        leaf = _leaf("prompts", "prompts", content, {"file": config.get("prompts_file")}, manifest)
        yield "prompts", leaf.evolve(note=count)


# ---- attempts ----


def _attempts(store: Store, prefix: str, manifest: Manifest) -> Iterator[AttemptTold]:
    """Tries at the run that a checkpoint is of, as far as the store still has them."""
    parts = prefix.split("/")
    if manifest.kind != "checkpoint" or len(parts) != 5 or parts[0] != "runs":
        return
    tries: dict[int, Mapping[str, Any]] = {}
    ends: dict[int, Mapping[str, Any]] = {}
    for entry in store.list(f"{'/'.join(parts[:3])}/attempts/"):
        name, _, ending = entry.key.rsplit("/", 1)[1].partition(".")
        if name.isdigit() and ending in ("json", "ended"):
            (tries if ending == "json" else ends)[int(name)] = _said(store, entry.key)
    for number, said in sorted(tries.items()):
        start, end = said.get("start"), ends.get(number, {})
        yield AttemptTold(
            number=number,
            started_at=int(start["step"]) if isinstance(start, Mapping) and "step" in start else 0,
            kind=str(end.get("kind", "")),
            message=str(end.get("message", "")),
            made_it=number == manifest.facts.get("attempt"),
        )


def _said(store: Store, key: str) -> Mapping[str, Any]:
    try:
        said = json.loads(store.read(key))
    except (KeyError, ValueError):
        return {}
    return said if isinstance(said, Mapping) else {}


# ---- the whole ----


def _checked(nodes: Mapping[str, Node]) -> dict[str, Node]:
    """Nodes that say where what was read is no longer what it was."""
    checked = {}
    for node in nodes.values():
        troubles = [
            f"{edge.role} was read as content {edge.content_digest[:12]}, and is now {found.content_digest[:12]}"
            for edge in node.inputs
            if (found := nodes[edge.node]).content_digest and edge.content_digest not in ("", found.content_digest)
        ]
        checked[node.key] = node.evolve(troubles=(*node.troubles, *troubles)) if troubles else node
    return checked


def _in_order(nodes: Mapping[str, Node], root: str) -> list[Node]:
    """Sources first. An arrow that would close a circle is left out, and told."""
    done: dict[str, Node] = {}
    path: dict[str, Iterator[Edge]] = {root: iter(nodes[root].inputs)}
    cut: dict[str, list[Edge]] = {}
    while path:
        key, edges = next(reversed(path.items()))
        edge = next(edges, None)
        if edge is None:
            del path[key]
            done[key] = _opened(nodes[key], cut.get(key, ()))
        elif edge.node in path:
            cut.setdefault(key, []).append(edge)
        elif edge.node not in done:
            path[edge.node] = iter(nodes[edge.node].inputs)
    return list(done.values())


def _opened(node: Node, cut: Sequence[Edge]) -> Node:
    if not cut:
        return node
    troubles = [f"{edge.role} ({edge.node}) was made from this very artifact; that arrow is left out" for edge in cut]
    return node.evolve(
        inputs=tuple(edge for edge in node.inputs if edge not in cut), troubles=(*node.troubles, *troubles)
    )


def _compared(nodes: Sequence[Node]) -> Iterator[Node]:
    """Nodes with what sets them apart from the one before of their kind."""
    last: dict[tuple[str, str], Node] = {}
    for node in nodes:
        if node.is_leaf or not node.stage:
            yield node
            continue
        # Checkpoints of both stages are made in one way; what was imported was not made here.
        way = (node.kind, "" if node.kind == "checkpoint" and node.stage != IMPORTED else node.stage)
        if sibling := last.get(way):
            found = tuple(_differences(_settings(node), _settings(sibling)))
            node = node.evolve(sibling=sibling.key, differences=found)
        last[way] = node
        yield node


def _settings(node: Node) -> dict[str, str]:
    made_from = {f"input {edge.role}": edge.content_digest[:12] or edge.node for edge in node.inputs}
    ran_with = {f"version of {name}": version for name, version in node.environment.items()}
    return flat(node.asked) | {"repeat": str(node.repeat)} | made_from | ran_with


def _differences(here: Mapping[str, str], there: Mapping[str, str]) -> Iterator[Difference]:
    for name in dict.fromkeys((*here, *there)):
        if here.get(name) != there.get(name):
            yield Difference(name=name, here=here.get(name, ""), there=there.get(name, ""))
