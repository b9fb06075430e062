"""Checkpoint -> SampleSet: a video for every prompt, spread over ranks by fixed groups.

The prompts are cut into groups of `group_size` in their order, whatever the number of ranks; pending group i goes to
rank i mod world_size. A group is sampled as one batch, encoded, stored, and exists when its record does; one that was
interrupted is redone whole. Noise is drawn per prompt from (seed, prompt id) and every rank computes with one CPU
thread, so neither the number of ranks nor an interruption changes a bit. Parallelism on a CPU is therefore
`world_size`.

    samples/<fingerprint>/<prompt id>.mp4        the videos
    samples/<fingerprint>/groups/<number>.json   records of finished groups: what resuming looks at
    samples/<fingerprint>/prompts.jsonl          what they were made from, with seeds
    samples/<fingerprint>/manifest.json          last
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vc2.artifacts import Artifact, Checkpoint, FileEntry, Manifest, SampleSet, commit, find, put_file
from vc2.artifacts import fingerprint as name_of
from vc2.config import Config, digest
from vc2.errors import LaunchFailed
from vc2.eval.config import Prompt, SampleStage
from vc2.eval.ranks import Launch, launch_of
from vc2.progress import Progress, silent
from vc2.seeding import derive_seed
from vc2.storage import Store

__all__ = [
    "STAGE_VERSION",
    "Group",
    "GroupRecord",
    "SampleJob",
    "cut_into_groups",
    "finished_record",
    "generate",
    "prompt_seed",
    "record_key",
    "sample_set_name",
    "samples_prefix",
]

STAGE_VERSION = 3


class Group(Config):
    """Prompts that are sampled together; `asked` is the digest of all that decides their videos."""

    number: int
    prompts: tuple[Prompt, ...]
    asked: str


class GroupRecord(Config):
    """The videos of a finished group."""

    asked: str
    files: tuple[FileEntry, ...]


class SampleJob(Config):
    """What the ranks read."""

    store: str
    fingerprint: str
    checkpoint: str  #: prefix of the checkpoint in the store
    config: SampleStage  #: with the prompts in it: a file of them need not be on every machine
    groups: tuple[Group, ...]  #: those to do
    num_groups: int
    work: str  #: folder for weights; on a machine where VC2_WORK is set, that one


def sample_set_name(config: SampleStage, checkpoint: Checkpoint, repeat: int = 0) -> str:
    """Fingerprint of the videos that `config` asks of a checkpoint."""
    weights = {"checkpoint": f"{checkpoint.fingerprint}@{checkpoint.step}"}
    return name_of("sample", STAGE_VERSION, config, weights, repeat)


def samples_prefix(fingerprint: str) -> str:
    return f"samples/{fingerprint}"


def prompt_seed(seed: int, prompt: Prompt) -> int:
    """Seed of all noise of a prompt's video."""
    return derive_seed(seed, "sample", prompt.id)


def cut_into_groups(config: SampleStage, prompts: tuple[Prompt, ...], checkpoint: Checkpoint) -> list[Group]:
    """The groups of prompts, the same for any number of ranks."""
    settings = {
        name: value for name, value in config.identity().items() if not name.startswith(("prompts", "num_prompts"))
    }
    groups = []
    for number, start in enumerate(range(0, len(prompts), config.group_size)):
        members = prompts[start : start + config.group_size]
        asked = digest([checkpoint.content_digest, settings, [[prompt.id, prompt.text] for prompt in members]])
        groups.append(Group(number=number, prompts=members, asked=asked))
    return groups


def generate(
    config: SampleStage,
    store: Store,
    work: Path,
    *,
    fingerprint: str,
    checkpoint: Checkpoint,
    inputs: Mapping[str, Artifact] | None = None,
    progress: Progress = silent,
    repeat: int = 0,
    launch: Launch | None = None,
) -> SampleSet:
    """Sample a video for every prompt, on `config.world_size` ranks. Safe to repeat: finished groups are not redone.

    Args:
        config: What to sample; a file's prompts are read here.
        store, work: Where artifacts are kept; a folder for the job, its logs and fetched weights.
        fingerprint: Name of the sample set.
        checkpoint: The weights.
        inputs: Recorded in the manifest beside the checkpoint.
        progress: Told as groups finish, in videos.
        repeat: As in the fingerprint.
        launch: Starts the ranks and waits for them; None: the launcher that `config` asks for.

    Raises:
        ConfigError: If there are no prompts, or the file's are not those that `config` was bound to.
        LaunchFailed: If a rank ends with an error.
    """
    prefix = samples_prefix(fingerprint)
    if done := find(store, prefix, SampleSet):
        return done
    started = time.monotonic()
    prompts = config.all_prompts()
    groups = cut_into_groups(config, prompts, checkpoint)
    pending = _pending(store, prefix, groups)
    done_before = len(groups) - len(pending)
    launch = launch or launch_of(config, store, f"{prefix}/jobs")
    progress("samples", len(prompts) - sum(len(group.prompts) for group in pending), len(prompts))
    while pending:
        job = SampleJob(
            store=store.uri,
            fingerprint=fingerprint,
            checkpoint=checkpoint.prefix,
            config=config.evolve(prompts=prompts),
            groups=tuple(pending),
            num_groups=len(groups),
            work=str(work.absolute()),
        )
        path = work / "jobs" / f"sample-{fingerprint[:16]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(job.model_dump_json())
        ranks = min(config.world_size, len(pending))
        name = f"sample-{fingerprint[:12]}"
        launch("vc2.eval.generate_rank", str(path), world_size=ranks, work=work, name=name, progress=progress)
        before, pending = pending, _pending(store, prefix, groups)  # a job that was attached to had others to do
        if len(pending) == len(before):
            raise LaunchFailed(
                f"{store.uri}/{prefix}: the ranks ended well, yet group {pending[0].number} is not there"
            )

    files: list[FileEntry] = []
    for group in groups:
        record = finished_record(store, prefix, group)
        assert record is not None, f"group {group.number} was there a moment ago"
        files += record.files
    lines = [_line(config, prompt) for prompt in prompts]
    files.append(put_file(store, prefix, "prompts.jsonl", "".join(lines).encode()))
    manifest = Manifest(
        kind="sample_set",
        stage="sample",
        stage_version=STAGE_VERSION,
        fingerprint=fingerprint,
        repeat=repeat,
        config=config.model_dump(mode="json"),
        inputs={"checkpoint": checkpoint, **(inputs or {})},
        files=tuple(files),
        counts={"videos": len(prompts), "groups": len(groups)},
        facts={"checkpoint_content": checkpoint.content_digest, "resumed_groups": done_before},
        seconds=round(time.monotonic() - started, 3),
    )
    samples = commit(store, prefix, manifest)
    assert isinstance(samples, SampleSet)
    return samples


def _pending(store: Store, prefix: str, groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if finished_record(store, prefix, group) is None]


def record_key(prefix: str, number: int) -> str:
    """Where the record of a group is."""
    return f"{prefix}/groups/{number:05d}.json"


def finished_record(store: Store, prefix: str, group: Group) -> GroupRecord | None:
    """The record of a finished group; None where there is none, or it answers another question."""
    try:
        record = GroupRecord.model_validate_json(store.read(record_key(prefix, group.number)))
    except (KeyError, ValidationError):
        return None
    return record if record.asked == group.asked else None


def _line(config: SampleStage, prompt: Prompt) -> str:
    row: dict[str, Any] = {"id": prompt.id, "prompt": prompt.text, "attributes": prompt.attributes}
    row |= {"seed": prompt_seed(config.seed, prompt), "file": f"{prompt.id}.mp4"}
    return json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n"
