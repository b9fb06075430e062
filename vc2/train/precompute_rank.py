"""Entry of a rank that makes latents: `python -m vc2.train.precompute_rank REQUEST`. Ranks do not talk to each other.

Samples are read ahead in threads and encoded one by one, so that their numbers are those of training on the fly.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from vc2.artifacts import load_manifest, put_object
from vc2.data.build import lines_of
from vc2.data.cache import read_range
from vc2.data.ledger import parquet_bytes
from vc2.data.media import Encoded
from vc2.data.shards import SLOTS, ShardSample, decode_frames, shard_name, write_shard
from vc2.errors import ShardCorrupted
from vc2.launch import report, run_rank, this_rank
from vc2.storage import Store, open_store
from vc2.train.encode import Encoders
from vc2.train.engine import device_of
from vc2.train.latents import pack
from vc2.train.parts import build_autoencoder, build_text_encoder
from vc2.train.precompute import PrecomputeRequest, part_key, shard_numbers

__all__ = ["main"]

AT_ONCE = 16  # samples that are read ahead
CHANGED = ("json_offset", "json_length", "json_sha256", "offset", "length", "media_sha256", "ending", "frame_bytes")


def main(request_uri: str) -> None:
    """Make this rank's share of the shards that are not there yet."""
    request = PrecomputeRequest.load(request_uri)
    store, rank, work = open_store(request.store), this_rank(), Path(request.work)
    source = load_manifest(store, request.source.prefix)
    torch.set_num_threads(request.layout.threads)
    torch.use_deterministic_algorithms(request.stage.deterministic)
    autoencoder = build_autoencoder(request.stage, request.autoencoder, store, work)
    device = device_of(request.stage, rank.local_rank)
    encoders = Encoders(autoencoder, build_text_encoder(request, store, work), device, memory_bytes=0)

    numbers, name = shard_numbers(source), f"precompute/{source.facts.get('source', source.fingerprint[:12])}"
    index = source.file("index.parquet").key
    for number in numbers[rank.rank :: rank.world_size]:
        if store.entry(part_key(request.prefix, number)) is not None:
            continue
        began = time.monotonic()
        tar = source.file(shard_name(number)).key
        lines = [line for line in lines_of(store, index, number) if line["duplicate_of"] is None]
        made = _make_shard(request, store, encoders, number, tar, lines)
        done = sum(1 for _ in store.list(f"{request.prefix}/parts/"))
        rate = made / max(1e-3, time.monotonic() - began)
        report(name, done, len(numbers), **{"samples/s per rank": round(rate, 2)})


def _make_shard(
    request: PrecomputeRequest, store: Store, encoders: Encoders, number: int, tar: str, lines: list[dict[str, Any]]
) -> int:
    """A shard of latents: its tar, then its lines. Returns how many samples it has."""
    damaged: dict[str, str] = {}

    def samples() -> Iterator[ShardSample]:
        for line, facts, frames in _read_ahead(store, tar, lines):
            if isinstance(frames, ShardCorrupted):
                damaged[line["key"]] = str(frames)[:200]
                continue
            text = encoders.text(line["caption"])
            data = pack(encoders.moments(line["key"], frames), text, request.dtype)
            yield ShardSample(line["key"], Encoded("safetensors", (data,), (), None, 0), facts)

    with tempfile.TemporaryDirectory(dir=_scratch(request)) as folder:
        path = Path(folder) / "shard.tar"
        placed = {place["key"]: place for place in write_shard(path, samples())}
        entry = put_object(store, path, shard_name(number))
    nothing = dict.fromkeys(CHANGED)
    rows = [line | placed.get(line["key"], nothing | {"detail": damaged.get(line["key"])}) for line in lines]
    table = pa.Table.from_pylist([{name: row.get(name) for name in SLOTS.names} for row in rows], SLOTS)
    said = json.dumps(entry.model_dump(mode="json"), sort_keys=True)
    store.write(part_key(request.prefix, number), parquet_bytes(table.replace_schema_metadata({"tar": said})))
    return len(placed)


def _scratch(request: PrecomputeRequest) -> Path:
    folder = Path(request.work) / "precompute"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


Read = tuple[dict[str, Any], dict[str, Any], np.ndarray | ShardCorrupted]


def _read_ahead(store: Store, tar: str, lines: list[dict[str, Any]]) -> Iterator[Read]:
    """Lines with what stands beside their media, and their frames, in order."""
    waiting, coming = [], iter(lines)
    with ThreadPoolExecutor(2, thread_name_prefix="frames") as readers:
        while True:
            for line in islice(coming, AT_ONCE - len(waiting)):
                waiting.append(readers.submit(partial(_read, store, tar, line)))
            if not waiting:
                return
            yield waiting.pop(0).result()


def _read(store: Store, tar: str, line: dict[str, Any]) -> Read:
    facts: dict[str, Any] = {}
    try:
        facts = json.loads(read_range(store, tar, line["json_offset"], line["json_length"]))
        data = read_range(store, tar, line["offset"], line["length"])
        if line["media_sha256"] not in (None, hashlib.sha256(data).hexdigest()):
            raise ShardCorrupted("bytes differ from those that the index names")
        return line, facts, decode_frames(data, line["frame_bytes"], line["ending"])
    except ShardCorrupted as error:
        return line, facts, error
    except ValueError as error:
        return line, facts, ShardCorrupted(f"its json is damaged ({error})")


if __name__ == "__main__":
    run_rank(main)
