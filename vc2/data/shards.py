"""Shards: plain tars that any webdataset reader opens, and single samples out of them by ranged reads.

    <key>.json     captions, fps, source, licence, where every frame came from
    <key>.jpg      an image
    <key>.mjpeg    a clip: its frames as JPEGs one after the other, which is a Motion JPEG stream that players open;
                   `frame_bytes` in the json has the length of each, so that a frame can be taken alone

    <key>.mp4      a clip as H.264, where a set was made so: a third of the bytes, decoded as a whole

Owner, mode and time of the members are fixed, keys of the json sorted: same samples, same bytes.

The index has one row per sample with the place of the media bytes, so that reading one is a ranged read: no shell, no
pickle, no unpacking of tars.
"""

import contextlib
import hashlib
import json
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vc2.data.media import Encoded
from vc2.data.video_files import read_video
from vc2.errors import ShardCorrupted
from vc2.storage import Store

__all__ = ["SLOTS", "ShardSample", "decode_frames", "read_frames", "shard_name", "write_shard"]

OWNER = "vc2"
MODE = 0o444

SLOTS = pa.schema(
    [
        ("generation", pa.int32()),  # of the set: 0, and one more for each growth or retry
        ("shard", pa.int32()),
        ("slot", pa.int32()),
        ("row", pa.int64()),  # of the source, as it was for that generation
        ("clip", pa.int32()),
        ("key", pa.string()),  # of the sample, unique in the set
        ("source_key", pa.string()),
        ("locator", pa.string()),
        ("url", pa.string()),  # by which the source names the medium, if it does
        ("json_offset", pa.int64()),  # of the json in the tar
        ("json_length", pa.int64()),
        ("json_sha256", pa.string()),
        ("offset", pa.int64()),  # of the media bytes in the tar
        ("length", pa.int64()),
        ("media_sha256", pa.string()),
        ("ending", pa.string()),  # of the media member: jpg, mjpeg, mp4
        ("frame_bytes", pa.list_(pa.int32())),  # of each JPEG; one number for an mp4
        ("caption", pa.string()),
        ("fps", pa.int32()),  # 0: an image
        ("num_frames", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),  # of the source file
        ("phash", pa.list_(pa.uint64())),  # perceptual hashes: of an image; of a clip's first, middle and last frame
        ("motion", pa.float32()),  # mean absolute luma difference of neighbouring frames, 0 to 255; null: an image
        ("cuts", pa.int32()),
        ("duplicate_of", pa.string()),  # a near duplicate of that sample; the loader leaves it out
        ("reason", pa.string()),  # of a slot that stayed empty; null in the index
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class ShardSample:
    """What goes into a shard."""

    key: str
    encoded: Encoded
    facts: Mapping[str, Any]  #: becomes the json


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[ShardSample]) -> Iterator[dict[str, Any]]:
    """Write a tar; yields for each sample, once all are written, where its bytes are and their sha256 (the columns of
    `SLOTS` from `json_offset` to `frame_bytes`, and `key`)."""
    written: dict[str, dict[str, Any]] = {}
    with open(path, "wb") as file, _tar_writer(file) as tar:
        for sample in samples:
            sizes, ending = [len(part) for part in sample.encoded.parts], sample.encoded.ending
            text = _json({**sample.facts, "key": sample.key, "frame_bytes": sizes})
            media = b"".join(sample.encoded.parts)
            tar.write({"__key__": sample.key, "json": text, ending: media})
            written[sample.key] = {
                "key": sample.key,
                "json_sha256": hashlib.sha256(text).hexdigest(),
                "media_sha256": hashlib.sha256(media).hexdigest(),
                "ending": ending,
                "frame_bytes": sizes,
            }
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, ending = member.name.rpartition(".")
            if ending == "json":
                written[key] |= {"json_offset": member.offset_data, "json_length": member.size}
            else:
                written[key] |= {"offset": member.offset_data, "length": member.size}
    yield from written.values()


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


def decode_frames(data: bytes, frame_bytes: Sequence[int], ending: str) -> np.ndarray:
    """Frames (T, H, W, 3) of a media member.

    Args:
        data: The member.
        frame_bytes: Bytes of each JPEG; of an mp4 one number.
        ending: jpg, mjpeg or mp4.

    Raises:
        ShardCorrupted: If it is not what the index says.
    """
    if sum(frame_bytes) != len(data):
        raise ShardCorrupted(
            f"a sample of {len(data)} bytes, its index says {sum(frame_bytes)}; run `vc2 verify` on the set"
        )
    try:
        return read_video(data)[0] if ending == "mp4" else _decode_jpegs(data, frame_bytes)
    except (OSError, ValueError) as error:
        raise ShardCorrupted(f"a sample is no {ending} of ours ({error}); run `vc2 verify` on the set") from None


def _decode_jpegs(data: bytes, frame_bytes: Sequence[int]) -> np.ndarray:
    import simplejpeg

    ends = list(accumulate(frame_bytes, initial=0))
    first, *others = (memoryview(data)[start:end] for start, end in pairwise(ends))
    frame = simplejpeg.decode_jpeg(first)
    if not others:
        return frame[None]
    frames = np.empty((len(frame_bytes), *frame.shape), np.uint8)
    frames[0] = frame
    for number, jpeg in enumerate(others, 1):  # in place: memory that is new costs half as much as the decoding
        if simplejpeg.decode_jpeg(jpeg, buffer=frames[number]).shape != frame.shape:
            raise ValueError("frames of several sizes")
    return frames


def read_frames(
    store: Store, key: str, offset: int, length: int, frame_bytes: Sequence[int], ending: str
) -> np.ndarray:
    """Frames (T, H, W, 3) of one sample by one ranged read.

    Args:
        store: Where the shard is.
        key: Of the shard in the store.
        offset: Of the media bytes in the shard.
        length: Of the media bytes.
        frame_bytes: Bytes of each frame.
        ending: Of the media member.

    Raises:
        ShardCorrupted: If the bytes there are not the sample.
        KeyError: If there is no such shard.
    """
    return decode_frames(store.read_range(key, offset, length), frame_bytes, ending)


def _json(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
