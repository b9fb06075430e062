import gc
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vc2.data.media import Encoded, encode_jpeg
from vc2.data.shards import ShardSample, decode_frames, read_frames, write_shard
from vc2.data.video_files import encode_mp4
from vc2.errors import ShardCorrupted
from vc2.storage import LocalStore


def encoded(frames: np.ndarray, ending: str) -> Encoded:
    parts = [encode_jpeg(frame, 95) for frame in frames] if ending != "mp4" else [encode_mp4(frames, 8, crf=4)]
    return Encoded(ending, tuple(parts), (1, 2, 3), 1.5, 0)


@pytest.fixture
def samples(media: Any) -> list[ShardSample]:
    clip = ShardSample("000001_000050/12", encoded(media.frames(5), "mjpeg"), {"caption": "a dög", "fps": 8})
    image = ShardSample("0a1b", encoded(media.frames(1), "jpg"), {"caption": "a cat"})
    film = ShardSample("000001_000050/13", encoded(media.frames(5), "mp4"), {"caption": "a bird", "fps": 8})
    return [clip, image, film]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its reader leaves files open
def test_a_webdataset_reader_opens_our_tars(samples: list[ShardSample], tmp_path: Path, media: Any) -> None:
    """Samples come whole and in order from webdataset's own reader: json beside the image or the frames of the clip."""
    import webdataset

    path = tmp_path / "shard.tar"
    placed = list(write_shard(path, samples))
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [sample.key for sample in samples]
    clip, image, film = read
    facts = json.loads(clip["json"])
    assert (facts["caption"], facts["fps"]) == ("a dög", 8)
    assert facts["frame_bytes"] == placed[0]["frame_bytes"]
    frames = decode_frames(clip["mjpeg"], facts["frame_bytes"], "mjpeg")
    assert np.abs(frames.astype(int) - media.frames(5)).mean() < 2
    assert image["jpg"] == samples[1].encoded.parts[0]
    assert film["mp4"] == samples[2].encoded.parts[0]
    gc.collect()


def test_a_clip_is_a_motion_jpeg_stream(samples: list[ShardSample], tmp_path: Path) -> None:
    """The member of a clip plays as it is."""
    with av.open(io.BytesIO(b"".join(samples[0].encoded.parts)), format="mjpeg") as container:
        assert sum(1 for _ in container.decode(video=0)) == 5


def test_one_sample_is_one_ranged_read(samples: list[ShardSample], tmp_path: Path, media: Any) -> None:
    """What the index says is where the bytes are."""
    placed = list(write_shard(tmp_path / "shard.tar", samples))
    store = LocalStore(tmp_path)
    for sample, place in zip(samples, placed, strict=True):
        assert place["key"] == sample.key and place["ending"] == sample.encoded.ending
        where = [place[name] for name in ("offset", "length", "frame_bytes", "ending")]
        frames = read_frames(store, "shard.tar", *where)
        data = b"".join(sample.encoded.parts)
        assert hashlib.sha256(data).hexdigest() == place["media_sha256"]
        assert np.array_equal(frames, decode_frames(data, place["frame_bytes"], sample.encoded.ending))
        assert np.abs(frames.astype(int) - media.frames(len(frames))).mean() < 2
        text = store.read_range("shard.tar", place["json_offset"], place["json_length"])
        assert hashlib.sha256(text).hexdigest() == place["json_sha256"]
        assert json.loads(text) == {**sample.facts, "key": sample.key, "frame_bytes": place["frame_bytes"]}


def test_same_samples_same_bytes(samples: list[ShardSample], tmp_path: Path) -> None:
    """Nothing of the moment or the machine gets into a tar."""
    digests = set()
    for name in ("a.tar", "b.tar"):
        list(write_shard(tmp_path / name, samples))
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {(member.mtime, member.uname, member.mode) for member in tar} == {(0, "vc2", 0o444)}


def test_damage_is_told(samples: list[ShardSample]) -> None:
    """Bytes that are not the sample raise, whatever is wrong with them."""
    data, sizes = b"".join(samples[0].encoded.parts), [len(part) for part in samples[0].encoded.parts]
    with pytest.raises(ShardCorrupted, match="index says"):
        decode_frames(data[:-1], sizes, "mjpeg")
    with pytest.raises(ShardCorrupted, match="no mjpeg of ours"):
        decode_frames(bytes(len(data)), sizes, "mjpeg")
    film = samples[2].encoded.parts[0]
    with pytest.raises(ShardCorrupted, match="no mp4 of ours"):
        decode_frames(bytes(len(film)), [len(film)], "mp4")


def test_writing_needs_no_torch(tmp_path: Path) -> None:
    """A process that writes a shard has not loaded torch, and can still do so afterwards."""
    code = (
        "import sys; from pathlib import Path; from vc2.data.shards import ShardSample, write_shard; "
        "from vc2.data.media import Encoded; sample = ShardSample('a', Encoded('jpg', (b'x',), (), None, 0), {}); "
        "list(write_shard(Path(sys.argv[1]), [sample])); "
        "assert 'torch' not in sys.modules; import importlib.util as u; assert u.find_spec('torch')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.tar")], check=True)
