"""Whole videos for people to look at, and back: mp4, GIF and WebP with a text inside.

Written by us and read by us: files of strangers are opened by `decode.Decoder` alone, in a process of its own.

Shapes: T frames, H x W pixels, 3 channels red green blue, uint8.
"""

import io
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

__all__ = [
    "Container",
    "encode_gif",
    "encode_mp4",
    "encode_planes",
    "encode_video",
    "encode_webp",
    "open_media",
    "read_comment",
    "read_video",
    "write_mp4",
    "write_whole",
]

Container = Literal["mp4", "gif", "webp"]
FULL_RANGE = 2  # AVCOL_RANGE_JPEG


def encode_mp4(
    frames: np.ndarray,
    fps: Fraction | float,
    *,
    crf: int = 18,
    preset: str = "veryfast",
    options: Mapping[str, str] | None = None,
    comment: str = "",
) -> bytes:
    """Frames as an H.264 mp4 that plays everywhere (yuv420p, index first). Same frames, same bytes: one thread, no
    times inside.

    Args:
        frames: (T, H, W, 3) uint8, H and W even.
        fps: Frames per second, above 0.
        crf: Quality of x264; 0 is lossless in YUV, 18 hardly visible.
        preset: Speed of x264.
        options: More options of x264.
        comment: Text to keep in the file, for `read_comment`.
    """
    import av

    _check_frames(frames)
    pictures = (av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in frames)
    options = {"crf": str(crf), "preset": preset, **(options or {})}
    return _mp4(pictures, frames.shape[2], frames.shape[1], _rate(fps), options, comment=comment)


def encode_planes(planes: Iterable[Sequence[np.ndarray]], fps: Fraction | float, *, crf: int) -> bytes:
    """As `encode_mp4`, of frames that are luma (H, W) and two chroma of half that size, in full range."""
    import av

    pictures, width, height = [], 0, 0
    for luma, blue, red in planes:
        height, width = luma.shape
        packed = np.concatenate([luma.ravel(), blue.ravel(), red.ravel()]).reshape(-1, width)
        picture = av.VideoFrame.from_ndarray(packed, format="yuv420p")
        picture.color_range = FULL_RANGE
        pictures.append(picture)
    options = {"crf": str(crf), "preset": "veryfast"}
    return _mp4(pictures, width, height, _rate(fps), options, color_range=FULL_RANGE)


def _mp4(
    pictures: "Iterable[VideoFrame]",
    width: int,
    height: int,
    rate: Fraction,
    options: Mapping[str, str],
    *,
    comment: str = "",
    color_range: int | None = None,
) -> bytes:
    import av

    if width % 2 or height % 2:
        raise ValueError(f"frames are {width} x {height}; H.264 with yuv420p needs even sides")
    buffer = io.BytesIO()
    buffer.name = "video.mp4"  # moving the index to the front, the muxer opens its own output by name
    muxing = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(
        buffer, "w", format="mp4", options=muxing, io_open=lambda *_: io.BytesIO(buffer.getvalue())
    ) as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        if color_range is not None:
            stream.codec_context.color_range = color_range
        stream.options = {"flags": "+bitexact", **_same_bytes(), **options}
        for picture in pictures:
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


@cache
def _same_bytes() -> Mapping[str, str]:
    """Options of x264 without which the same frames give other bytes from call to call.

    Its macroblock trees read past the ends of their rows where AVX-512 is used and a frame is not a multiple of eight
    macroblocks wide (128 pixels). AVX2, which every processor with AVX-512 has, is as fast.
    """
    try:
        has_avx512 = "avx512" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux: the trees are left out
        return {} if platform.machine() in ("arm64", "aarch64") else {"mbtree": "0"}
    return {"x264-params": "asm=avx2"} if has_avx512 else {}


def _check_frames(frames: np.ndarray) -> None:
    if frames.ndim != 4 or frames.shape[0] == 0 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 (T, H, W, 3)")


def _rate(fps: Fraction | float) -> Fraction:
    rate = fps if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(1001)
    if rate <= 0:
        raise ValueError(f"fps is {fps}; expected a number above 0")
    return rate


MOST_STREAMS = 8  # of a file, for which options are given
USER_COMMENT, EXIF_FOLDER, ASCII = 0x9286, 0x8769, b"ASCII\0\0\0"  # of EXIF: where a picture keeps free text


def encode_gif(frames: np.ndarray, fps: Fraction | float, *, comment: str = "") -> bytes:
    """Frames (T, H, W, 3) as a GIF without end: 256 colours a frame, times in hundredths of a second."""
    return _animated(frames, fps, "GIF", unit=10, comment=comment.encode())


def encode_webp(frames: np.ndarray, fps: Fraction | float, *, quality: int = 90, comment: str = "") -> bytes:
    """Frames (T, H, W, 3) as an animated WebP without end; a comment of ASCII characters goes into its EXIF part."""
    from PIL import Image

    exif = Image.Exif()
    if comment:
        exif.get_ifd(EXIF_FOLDER)[USER_COMMENT] = ASCII + comment.encode("ascii")
    return _animated(frames, fps, "WEBP", unit=1, quality=quality, exif=exif)


def _animated(frames: np.ndarray, fps: Fraction | float, form: str, *, unit: int, **options: Any) -> bytes:
    from PIL import Image

    _check_frames(frames)
    rate = _rate(fps)
    # Ends are rounded, not durations: the whole lasts as long as it should.
    ends = [round(1000 * number / rate / unit) * unit for number in range(len(frames) + 1)]
    durations = [max(unit, end - start) for start, end in pairwise(ends)]
    first, *others = (Image.fromarray(frame) for frame in frames)
    buffer = io.BytesIO()
    first.save(buffer, form, save_all=True, append_images=others, duration=durations, loop=0, **options)
    return buffer.getvalue()


def encode_video(frames: np.ndarray, fps: Fraction | float, container: Container, *, comment: str = "") -> bytes:
    """Frames (T, H, W, 3) for looking at, of high quality, with a text kept inside."""
    if container == "mp4":
        return encode_mp4(frames, fps, crf=10, comment=comment)
    return (encode_gif if container == "gif" else encode_webp)(frames, fps, comment=comment)


def read_comment(path: Path) -> str | None:
    """The text kept in an mp4, GIF or WebP file; None where there is none.

    Raises:
        OSError, ValueError: If it cannot be read, or is none of these.
    """
    if path.suffix.lower() == ".mp4":
        with open_media(str(path)) as container:
            return container.metadata.get("comment")
    from PIL import Image

    with Image.open(path, formats=("GIF", "WEBP")) as image:
        if image.format == "GIF":
            found = image.info.get("comment", b"")
        else:
            found = image.getexif().get_ifd(EXIF_FOLDER).get(USER_COMMENT, b"")
    return bytes(found).removeprefix(ASCII).decode("utf-8", "replace") or None


def write_mp4(
    path: Path, frames: np.ndarray, fps: Fraction | float, *, crf: int = 18, preset: str = "veryfast"
) -> None:
    """`encode_mp4` into a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, encode_mp4(frames, fps, crf=crf, preset=preset))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_video(source: Path | str | bytes) -> tuple[np.ndarray, Fraction]:
    """All frames (T, H, W, 3) of a video of ours and its frames per second. In this process: not for files of
    strangers.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it has no frames.
    """
    with open_media(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        if not frames:
            raise ValueError(f"{source!r:.200}: a video without frames")
        return np.stack(frames), Fraction(stream.average_rate or 1)


def open_media(source: Any, *, by_header: bool = False) -> "InputContainer":
    """A container of PyAV, from a path or a file object.

    Args:
        source: The file.
        by_header: Decode nothing in order to find out about its streams where the header tells their size: several
            times faster.
    """
    import av

    if by_header:
        options: Any = [{"threads": "1", "skip_frame": "all"}] * MOST_STREAMS
        try:
            container = cast("InputContainer", av.open(source, metadata_errors="ignore", stream_options=options))
            if all(stream.width for stream in container.streams.video):
                return container
            container.close()
        except ValueError:  # formats without a header take no such options
            pass
        if not isinstance(source, str):
            source.seek(0)
    return cast("InputContainer", av.open(source, metadata_errors="ignore"))
