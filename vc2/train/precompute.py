"""Encode once, train many times: a shard set of frames made into one of latents and text features.

    shards/<source>/<fingerprint>/parts/shard-000123.parquet    lines of a finished shard, written after its tar
    objects/<sha256>                                            the tar: <key>.safetensors and <key>.json a sample
    shards/<source>/<fingerprint>/manifest.json                 last

Ranks share the shards and each is made whole by one of them; what is finished is found again after a kill. The set has
the rows of the one it was made from, in their order, less near duplicates, which the loader would skip: so training
draws the same samples at the same positions. A sample that cannot be read keeps its row, is counted among the rejects,
and is replaced in training like any damaged one.

Such a set belongs to one autoencoder and one text tower. Their digests are part of its name, and a run that would use
others refuses it.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from vc2.artifacts import (
    Checkpoint,
    FileEntry,
    Manifest,
    ShardSet,
    commit,
    find,
    fingerprint,
    load_manifest,
    put_file,
    shard_set_prefix,
)
from vc2.config import digest
from vc2.data.accounts import REJECTS
from vc2.data.build import read_shard
from vc2.data.foreign import FOREIGN
from vc2.data.ledger import parquet_bytes
from vc2.data.shards import SLOTS, shard_name
from vc2.errors import ConfigError, LaunchFailed, StoreError
from vc2.failures import Retries
from vc2.launch import cpu_count, start, watch
from vc2.pretrained import resolve
from vc2.progress import Progress, silent
from vc2.storage import Store, file_digest, join_uri
from vc2.train.config import Layout, TrainStage
from vc2.train.request import TEXT_WEIGHTS, RankRequest
from vc2.train.run import frozen_autoencoder, gpu_count

__all__ = ["LATENTS", "PRECOMPUTE", "Dtype", "PrecomputeRequest", "check_latents", "part_key", "precompute"]

PRECOMPUTE = "precompute"  # stage of such sets
VERSION = 1  # raised by hand whenever the same set gives other bytes
LATENTS = "latents"  # fact of a manifest: what the samples were made with
ROWS_PER_GROUP = 65536

Dtype = Literal["float16", "float32"]


class PrecomputeRequest(RankRequest):
    """What ranks are asked for: the sets, model and folders of a training request, and what is made of one of them."""

    source: ShardSet
    prefix: str  # of the set that is made
    dtype: Dtype


def precompute(
    stage: TrainStage,
    store: Store,
    work: Path,
    shards: ShardSet,
    *,
    start_from: Checkpoint | None = None,
    dtype: Dtype = "float16",
    progress: Progress = silent,
) -> ShardSet:
    """The set of latents of a shard set, by the autoencoder and text tower of a training stage.

    Args:
        stage: Whose encoders, device and number of ranks.
        store: Where the sets are.
        work: Folder of this machine for logs and files on their way.
        shards: The set of frames.
        start_from: What training will start from: it may bring the encoders that the stage does not name.
        dtype: Of the numbers that are kept; see `vc2.train.latents`.
        progress: Told about shards.

    Raises:
        ConfigError: If the set holds latents already, or clips that are drawn anew at every reading.
        LaunchFailed: If a rank failed.
    """
    started = time.monotonic()
    source = load_manifest(store, shards.prefix)
    if LATENTS in source.facts:
        raise ConfigError(f"{shards.uri} holds latents already; give the set that it was made from")
    if source.stage == FOREIGN:
        raise ConfigError(
            f"{shards.uri} points into tars of others, whose clips are drawn at every reading; make a set with "
            "`vc2 shard` first"
        )
    autoencoder = frozen_autoencoder(stage, store, work, start_from)
    text = text_digest(stage, store, work, start_from)
    made_with = {"autoencoder": autoencoder.sha256, "text": text, "dtype": dtype}
    name = fingerprint(PRECOMPUTE, VERSION, made_with, {"shards": source.fingerprint})
    prefix = shard_set_prefix(shards.prefix.split("/")[1], name)
    if done := find(store, prefix, ShardSet):
        return done
    world_size = stage.world_size or gpu_count(stage) or 1
    request = PrecomputeRequest(
        stage=stage,
        store=store.uri,
        work=str(work.resolve()),
        fingerprint=name,
        attempt=1,
        start=None,
        layout=Layout(world_size=world_size, micro_batch=1, threads=stage.threads or max(1, cpu_count() // world_size)),
        videos=(),
        images=(),
        autoencoder=autoencoder,
        start_from=start_from,
        inputs={"shards": shards},
        source=shards,
        prefix=prefix,
        dtype=dtype,
    )
    store.write(f"{prefix}/request.json", request.model_dump_json(indent=1).encode())
    _run(request, store, work, progress)
    return _commit(request, source, made_with, store, started)


def _run(request: PrecomputeRequest, store: Store, work: Path, progress: Progress) -> None:
    retries = Retries(request.stage.retries)
    while True:
        try:
            job = start(
                "vc2.train.precompute_rank",
                join_uri(store.uri, f"{request.prefix}/request.json"),
                world_size=request.layout.world_size,
                work=work,
                name="precompute",
                environment={"VC2_WORK": str(work.resolve())},
            )
            return watch(job, progress)
        except LaunchFailed as failure:
            pause = retries.pause(failure, sum(1 for _ in store.list(f"{request.prefix}/parts/")))
            if pause is None:
                raise
            progress("precompute", 0, None, failed=f"{failure.kind}: {failure}", next_attempt_in=f"{pause:.0f} s")
            time.sleep(pause)


def part_key(prefix: str, shard: int) -> str:
    """Where the lines of a finished shard lie."""
    return f"{prefix}/parts/{shard_name(shard).removesuffix('.tar')}.parquet"


def text_digest(stage: TrainStage, store: Store, work: Path, start_from: Checkpoint | None) -> str:
    """What tells one text tower from another: its shape and seed, or its shape and the sha256 of its weights.

    Whose weights they are is as in `vc2.train.parts.build_text_encoder`.
    """
    model = stage.model
    weights = ""
    if model.text.seed is None and not model.text_path and start_from is not None:
        files = {file.name: file for file in load_manifest(store, start_from.prefix).files}
        weights = files[TEXT_WEIGHTS].sha256 if TEXT_WEIGHTS in files else ""
    if model.text.seed is None and not weights:
        path = Path(model.text_path) if model.text_path else None
        path = resolve(model.text_weights, path=path, cache=work / "pretrained")
        if path.is_file():
            weights = file_digest(path).sha256
        else:
            weights = digest({p.name: file_digest(p).sha256 for p in sorted(path.rglob("*")) if p.is_file()})
    return digest({"text": model.text.identity(), "weights": weights})


def check_latents(
    stage: TrainStage,
    store: Store,
    work: Path,
    sets: Sequence[ShardSet],
    autoencoder: str,
    start_from: Checkpoint | None = None,
) -> None:
    """Refuse sets of latents that a stage cannot be trained on.

    Args:
        stage: The stage.
        store: Where the sets are.
        work: Folder of this machine.
        sets: Those of frames pass.
        autoencoder: sha256 of the stage's own.
        start_from: What training starts from.

    Raises:
        ConfigError: If they were made by other encoders, or a phase asks for another size.
    """
    manifests = {shards.uri: load_manifest(store, shards.prefix) for shards in sets}
    found = {uri: manifest for uri, manifest in manifests.items() if LATENTS in manifest.facts}
    text = text_digest(stage, store, work, start_from) if found else ""
    again = f"make it anew (vc2 precompute {stage.name}), or train on the set of frames"
    for uri, manifest in found.items():
        made_with, form = manifest.facts[LATENTS], manifest.facts["form"]
        if made_with["autoencoder"] != autoencoder:
            raise ConfigError(
                f"{uri} holds latents of autoencoder {made_with['autoencoder'][:12]}, this stage has "
                f"{autoencoder[:12]}; {again}"
            )
        if made_with["text"] != text:
            raise ConfigError(f"{uri} holds captions as another text tower reads them; {again}")
        for number, phase in enumerate(stage.phases):
            frames = None if manifest.facts["media"] == "image" else phase.num_frames
            asked = {"num_frames": frames, "width": phase.width, "height": phase.height}
            if other := {key: value for key, value in asked.items() if value not in (None, form[key])}:
                raise ConfigError(
                    f"phases[{number}] asks for {other}, but {uri} holds latents of {form}, which cannot be fitted; "
                    "train on the set of frames"
                )


def _commit(
    request: PrecomputeRequest, source: Manifest, made_with: Mapping[str, str], store: Store, started: float
) -> ShardSet:
    numbers = shard_numbers(source)
    tars: list[FileEntry] = []
    rejects: list[dict[str, Any]] = []
    samples, size, form = 0, 0, {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.parquet"
        with pq.ParquetWriter(path, SLOTS, compression="zstd") as writer:
            for number in numbers:
                try:
                    lines, tar = read_shard(store, part_key(request.prefix, number))
                except KeyError:
                    raise StoreError(f"{request.prefix}: shard {number} is not there; run the same again") from None
                tars.append(tar)
                writer.write_table(lines, ROWS_PER_GROUP)
                for line in lines.to_pylist():
                    form = form or {key: line[key] for key in ("num_frames", "width", "height")}
                    if line["offset"] is None:
                        rejects.append(_reject(line))
                    else:
                        samples, size = samples + 1, size + line["length"]
        key = f"{request.prefix}/index.parquet"
        found = store.upload(path, key)
    facts = {name: source.facts[name] for name in ("source", "media", "fps_histogram") if name in source.facts}
    manifest = Manifest(
        kind="shard_set",
        stage=PRECOMPUTE,
        stage_version=VERSION,
        fingerprint=request.fingerprint,
        config={"model": request.stage.model.model_dump(mode="json"), "dtype": request.dtype},
        inputs={"shards": request.source},
        files=(
            *tars,
            FileEntry(name="index.parquet", key=key, size=found.size, sha256=found.sha256),
            put_file(store, request.prefix, "rejects.parquet", parquet_bytes(pa.Table.from_pylist(rejects, REJECTS))),
        ),
        counts={
            "rows": samples + len(rejects),
            "rows_with_samples": samples,
            "rows_rejected": len(rejects),
            "rows_duplicate": 0,
            "samples": samples,
            "shards": len(tars),
            "media_bytes": size,
        },
        facts=facts | {"reasons": {"damaged": len(rejects)} if rejects else {}, "form": form, LATENTS: dict(made_with)},
        licenses=source.licenses,
        seconds=round(time.monotonic() - started, 2),
    )
    return cast(ShardSet, commit(store, request.prefix, manifest))


def shard_numbers(manifest: Manifest) -> list[int]:
    """Numbers of the tars of a set, in order."""
    names = (file.name for file in manifest.files if file.name.endswith(".tar"))
    return sorted(int(name.removeprefix("shard-").removesuffix(".tar")) for name in names)


def _reject(line: Mapping[str, Any]) -> dict[str, Any]:
    same = {name: line[name] for name in ("row", "clip", "locator")}
    return same | {
        "what": "row",
        "key": line["source_key"] or line["key"],
        "reason": "damaged",
        "detail": line["detail"],
        "duplicate_of": None,
    }
