import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vc2.data.video_files import (
    encode_gif,
    encode_mp4,
    encode_video,
    encode_webp,
    read_comment,
    read_video,
    write_whole,
)
from vc2.seeding import generator

TEXT = json.dumps({"prompt": 'a "red" ball <moves> & \u4f60' * 30, "seed": 7})


@pytest.fixture
def frames() -> np.ndarray:
    """A ramp that moves, so that no two frames are alike."""
    ramp = np.add.outer(np.arange(16), np.arange(32)) * 5
    return np.stack([np.stack([ramp + 9 * t, 255 - ramp, 0 * ramp + 20 * t], axis=-1) for t in range(6)]).astype(
        np.uint8
    )


@pytest.mark.parametrize("container", ["mp4", "gif", "webp"])
def test_what_is_written_into_a_video_can_be_read_back(container, frames: np.ndarray, tmp_path: Path) -> None:
    for text in (TEXT, ""):
        path = tmp_path / f"video.{container}"
        write_whole(path, encode_video(frames, 8, container, comment=text))
        assert read_comment(path) == (text or None)
    assert [file.name for file in tmp_path.iterdir()] == [f"video.{container}"]


def test_a_comment_changes_no_frame_and_none_changes_no_byte(frames: np.ndarray) -> None:
    plain = encode_mp4(frames, 8, crf=10)
    assert encode_video(frames, 8, "mp4") == plain == encode_mp4(frames, 8, crf=10, comment="")
    shown, rate = read_video(encode_video(frames, 8, "mp4", comment=TEXT))
    assert np.array_equal(shown, read_video(plain)[0]) and rate == 8


@pytest.mark.parametrize(("encode", "limit"), [(encode_gif, 12), (encode_webp, 12)])
def test_pictures_that_move_hold_every_frame_and_last_as_long(encode, limit: int, frames: np.ndarray) -> None:
    """12 frames a second do not fit into hundredths of a second: their sum does."""
    image = Image.open(io.BytesIO(encode(frames, 12)))
    assert image.n_frames == 6 and image.info["loop"] == 0
    total, error = 0, 0.0
    for number, frame in enumerate(frames):
        image.seek(number)
        image.load()
        total += image.info["duration"]
        error = max(error, abs(np.asarray(image.convert("RGB")).astype(float) - frame).mean())
    assert total == 500 and error < limit


def test_frames_of_another_kind_are_refused() -> None:
    noise = generator(1, "frames").random((2, 4, 4, 3))
    for encode in (encode_gif, encode_webp, encode_mp4):
        with pytest.raises(ValueError, match=r"float64 .* expected uint8 \(T, H, W, 3\)"):
            encode(noise, 8)
        with pytest.raises(ValueError, match="fps is 0"):
            encode((noise * 255).astype(np.uint8), 0)


def test_a_file_that_is_none_of_these_is_not_read(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.gif", "a.webp"):
        (tmp_path / name).write_bytes(b"no video" + bytes(100))
        with pytest.raises((OSError, ValueError)):
            read_comment(tmp_path / name)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "v.mp4", b"x")
    assert [file.name for file in tmp_path.iterdir()] == ["v.mp4"]


@pytest.mark.parametrize("size", [(64, 64), (80, 48), (160, 96), (320, 192)])
def test_the_same_frames_are_the_same_bytes(size: tuple[int, int]) -> None:
    """Wherever in memory they are encoded. Frames that move over one another, since x264 looks for that."""
    rng = np.random.default_rng(0)
    width, height = size
    texture = rng.integers(0, 256, (height + 32, width + 32, 3)).astype(np.float32)
    for axis in (0, 1):
        texture = sum(np.roll(texture, shift, axis) for shift in range(-3, 4)) / 7
    steps = [(0, 0), (3, 1), (5, 4), (9, 4), (12, 9), (13, 13), (18, 14), (20, 19)]
    frames = np.stack([texture[y : y + height, x : x + width] for y, x in steps]).clip(0, 255).astype(np.uint8)
    found, elsewhere = set(), []
    for _ in range(40):
        elsewhere = [*elsewhere[-20:], np.zeros(int(rng.integers(1, 100_000)), np.uint8)]  # memory in another order
        found.add(encode_mp4(frames, 8, crf=10))
    assert len(found) == 1
