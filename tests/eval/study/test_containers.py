"""Files without the words that would tell whose they are."""

import io

import av
import numpy as np
import pytest

from vc2.data.video_files import encode_mp4, open_media, read_video
from vc2.eval.study.containers import read_container

SECRET = "SecretModel"
FRAMES = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), np.uint8)


def encode(form: str, codec: str, pixels: str = "yuv420p") -> bytes:
    """A video whose file and track carry a title."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        container.metadata.update(title=SECRET, comment=f"{SECRET} seed 3")
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, pixels
        stream.metadata["title"] = SECRET
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("form", "codec", "name"),
    [("mp4", "libx264", "H.264"), ("webm", "libvpx", "VP8"), ("webm", "libvpx-vp9", "VP9"), ("mp4", "mpeg4", "mp4v")],
)
def test_words_go_and_pixels_stay(form: str, codec: str, name: str) -> None:
    """No byte moves, every frame decodes as before, and neither titles nor comments nor tools are left."""
    data = encode(form, codec)
    container = read_container(data)
    assert container is not None and (container.ending, container.codec) == (form, name)
    assert SECRET.encode() in data
    assert SECRET.encode() not in container.anonymous and b"Lavf" not in container.anonymous
    assert len(container.anonymous) == len(data)
    assert np.array_equal(read_video(container.anonymous)[0], read_video(data)[0])
    with open_media(io.BytesIO(container.anonymous)) as media:
        assert not any(media.metadata.get(word) for word in ("title", "comment", "encoder"))


def test_our_own_comments_go_too() -> None:
    """`vc2 sample` writes into a video how it was made."""
    container = read_container(encode_mp4(FRAMES, 8, comment=SECRET))
    assert container is not None and container.is_played and SECRET.encode() not in container.anonymous


@pytest.mark.parametrize(
    ("form", "codec", "pixels", "is_played"),
    [
        ("mp4", "libx264", "yuv420p", True),
        ("mp4", "libx264", "yuv444p", False),
        ("mp4", "mpeg4", "yuv420p", False),
        ("webm", "libvpx-vp9", "yuv420p", True),
        ("matroska", "libx264", "yuv420p", False),
    ],
)
def test_what_browsers_play_is_known(form: str, codec: str, pixels: str, is_played: bool) -> None:
    """H.264 of 8 bits with halved chroma in mp4, VP8, VP9 and AV1; nothing else."""
    container = read_container(encode(form, codec, pixels))
    assert container is not None and container.is_played == is_played


def test_damaged_files_are_no_containers_and_never_an_error() -> None:
    """Cut anywhere, or with bytes changed, a file is read as something or as nothing."""
    chance = np.random.default_rng(1)
    for data in (encode("mp4", "libx264"), encode("webm", "libvpx")):
        for _ in range(300):
            broken = bytearray(data[: chance.integers(0, len(data))] if chance.random() < 0.5 else data)
            for place in chance.integers(0, max(1, min(len(broken), 900)), 3):
                if broken:
                    broken[place] = chance.integers(0, 256)
            found = read_container(bytes(broken))
            assert found is None or len(found.anonymous) == len(broken)
    assert read_container(b"") is None
    assert read_container(b"\0\0\0\x08ftyp" + b"\0\0\0\0moov" * 5000) is None
    assert read_container(b"\x1aE\xdf\xa3") is None
