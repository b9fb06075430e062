"""Shards: plain tars that any webdataset reader opens, and single samples out of them by ranged reads.

    <key>.json     captions, fps, source, licence, where every frame came from
    <key>.jpg      an image
    <key>.mjpeg    a clip: its frames as JPEGs one after the other, which is a Motion JPEG stream that players open;
                   `frame_bytes` in the json has the length of each, so that a frame can be taken alone

JPEG frames rather than an H.264 file: encoded and decoded ten times faster, every frame exact and on its own, and no
loss by prediction. Owner, mode and time of the members are fixed, keys of the json sorted: same samples, same bytes.

The index has one row per sample with the place of the media bytes, so that reading one is a ranged read: no shell, no
pickle, no unpacking of tars.
"""

import contextlib
import io
import json
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vc2.artifacts import Manifest
from vc2.data.decode import decode_jpeg, encode_jpeg
from vc2.errors import ShardCorrupted, StoreError
from vc2.storage import Store

__all__ = ["SLOTS", "ShardSample", "decode_frames", "find_sample", "read_frames", "shard_name", "write_shard"]

OWNER = "vc2"
MODE = 0o444

SLOTS = pa.schema(
    [
        ("shard", pa.int32()),
        ("slot", pa.int32()),
        ("row", pa.int64()),  # of the source
        ("clip", pa.int32()),
        ("key", pa.string()),  # of the sample, unique in the set
        ("source_key", pa.string()),
        ("locator", pa.string()),
        ("offset", pa.int64()),  # of the media bytes in the tar
        ("length", pa.int64()),
        ("frame_bytes", pa.list_(pa.int32())),
        ("caption", pa.string()),
        ("fps", pa.int32()),  # 0: an image
        ("num_frames", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),  # of the source file
        ("duplicate_of", pa.string()),  # a near duplicate of that sample; the loader leaves it out
        ("reason", pa.string()),  # of a slot that stayed empty; null in the index
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class ShardSample:
    """What goes into a shard."""

    key: str
    frames: Sequence[bytes]  #: JPEGs
    facts: Mapping[str, Any]  #: becomes the json

    @classmethod
    def of(cls, key: str, frames: np.ndarray, facts: Mapping[str, Any], *, quality: int) -> "ShardSample":
        """A sample of decoded frames, (T, H, W, 3) uint8."""
        return cls(key, [encode_jpeg(frame, quality) for frame in frames], facts)


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[ShardSample]) -> Iterator[dict[str, Any]]:
    """Write a tar; yields for each sample, once all are written, where its media bytes are (columns of `SLOTS`)."""
    written: dict[str, list[int]] = {}
    with open(path, "wb") as file, _tar_writer(file) as tar:
        for sample in samples:
            sizes = [len(frame) for frame in sample.frames]
            facts = {**sample.facts, "key": sample.key, "frame_bytes": sizes}
            ending = "jpg" if len(sizes) == 1 else "mjpeg"
            tar.write({"__key__": sample.key, "json": _json(facts), ending: b"".join(sample.frames)})
            written[sample.key] = sizes
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, ending = member.name.rpartition(".")
            if ending != "json":
                yield {"key": key, "offset": member.offset_data, "length": member.size, "frame_bytes": written[key]}


def _tar_writer(file: Any) -> Any:
    with _without_torch():
        from webdataset.writer import TarWriter
    return TarWriter(file, user=OWNER, group=OWNER, mode=MODE, mtime=0, encoder=False)


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """webdataset imports torch where there is one, for its readers: seconds and memory that a worker which only
    writes can save.

    It is made to work without; a process that has either already is left as it is.
    """
    if "torch" in sys.modules or "webdataset" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def decode_frames(data: bytes, frame_bytes: Sequence[int]) -> np.ndarray:
    """Frames (T, H, W, 3) of a media member.

    Raises:
        ShardCorrupted: If it is not what the index says.
    """
    if sum(frame_bytes) != len(data):
        raise ShardCorrupted(
            f"a sample of {len(data)} bytes, its index says {sum(frame_bytes)}; run `vc2 verify` on the set"
        )
    frames, place = [], 0
    for size in frame_bytes:
        try:
            frames.append(decode_jpeg(data[place : place + size]))
        except OSError as error:
            raise ShardCorrupted(
                f"frame {len(frames)} of a sample is no JPEG ({error}); run `vc2 verify` on the set"
            ) from None
        place += size
    return np.stack(frames)


def read_frames(store: Store, key: str, offset: int, length: int, frame_bytes: Sequence[int]) -> np.ndarray:
    """Frames (T, H, W, 3) of one sample by one ranged read.

    Args:
        store: Where the shard is.
        key: Of the shard in the store.
        offset: Of the media bytes in the shard.
        length: Of the media bytes.
        frame_bytes: Bytes of each frame.

    Raises:
        ShardCorrupted: If the bytes there are not the sample.
        KeyError: If there is no such shard.
    """
    return decode_frames(store.read_range(key, offset, length), frame_bytes)


def find_sample(store: Store, manifest: Manifest, key: str) -> dict[str, Any]:
    """All that is known of one sample: its line of the index and the json beside its media.

    Raises:
        StoreError: If the set has no sample of that key.
    """
    data = store.read(manifest.file("index.parquet").key)
    index = pq.read_table(io.BytesIO(data), use_threads=False)
    found = index.filter(pc.equal(index["key"], key)).to_pylist()  # type: ignore[attr-defined]
    if not found:
        example = index["key"][0].as_py() if len(index) else "none, the set is empty"
        raise StoreError(f"no sample {key!r} in this set; its keys look like {example!r} (see index.parquet)")
    row = found[0]
    tar = manifest.file(shard_name(row["shard"])).key
    before = [
        end.as_py()
        for end in pc.add(index["offset"], index["length"]).filter(pc.equal(index["shard"], row["shard"]))  # type: ignore[attr-defined]
        if end.as_py() <= row["offset"]
    ]
    start = -(-max(before, default=0) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE  # members begin at whole blocks
    header = tarfile.TarInfo.frombuf(store.read_range(tar, start, tarfile.BLOCKSIZE), "utf-8", "strict")
    facts = json.loads(store.read_range(tar, start + tarfile.BLOCKSIZE, header.size))
    return {"index": row, "tar": tar, "json": facts}


def _json(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
