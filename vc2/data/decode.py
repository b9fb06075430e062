"""Pixels from files and files from pixels: the only place that knows decord, PyAV and Pillow's decoders.

Decoders meet hostile input. They crash, and decord can spin for ever in native code that no Python timeout
interrupts. So files are opened in a child process (`Decoder`) that is given a deadline, killed when it misses it, and
dies with its parent. The child is reused for many files; a request is one JSON header (and the bytes, where there is
no path), an answer one JSON header and raw frames.

Which decoder makes a clip is a function of the file and the configuration: decord, unless the file is rotated or
decord counts other frames than its container has, then PyAV (decord may disagree with the container's order there).
Frames are found by their number in presentation order, never by time stamps.

Shapes: T frames, H x W pixels, 3 channels red green blue, uint8.
"""

import atexit
import importlib.util
import io
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self, cast

import numpy as np

from vc2.data.rejects import RejectReason
from vc2.errors import Vc2Error
from vc2.launch import die_with_parent

if TYPE_CHECKING:
    from av.container import InputContainer

__all__ = [
    "Decoder",
    "Facts",
    "MediaError",
    "cover",
    "decode_jpeg",
    "encode_gif",
    "encode_jpeg",
    "encode_mp4",
    "encode_video",
    "encode_webp",
    "read_comment",
    "read_video",
    "shared_decoder",
    "sniff",
    "write_mp4",
    "write_whole",
]

Media = Literal["video", "image"]
Container = Literal["mp4", "gif", "webp"]
START_SECONDS = 120.0  # for the imports of the child, on a busy machine
HEADER = struct.Struct(">I")


class MediaError(Exception):
    """A file that cannot be used, and why."""

    def __init__(self, reason: RejectReason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Facts:
    """What a probe finds out."""

    width: int  #: as shown: rotation applied, before the sample aspect ratio
    height: int
    frames: int
    rate: str  #: frames per second as a fraction; of a variable rate the mean
    duration: float  #: seconds
    rotation: int  #: degrees counterclockwise that a player turns the picture by
    aspect: str  #: width over height of one pixel, as a fraction
    times: list[float] | None  #: seconds of every frame where the rate varies, else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def sniff(head: bytes) -> Media | None:
    """What the first bytes of a file (32 are enough) say it is."""
    if head[:3] == b"\xff\xd8\xff" or head[:8] == b"\x89PNG\r\n\x1a\n" or head[:6] in (b"GIF87a", b"GIF89a"):
        return "image"
    if (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[:2] == b"BM" or head[:4] in (b"II*\x00", b"MM\x00*"):
        return "image"
    if head[4:8] == b"ftyp":
        return "image" if head[8:12] in (b"avif", b"avis", b"heic", b"mif1") else "video"
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip") or head[:4] in (
        b"\x1aE\xdf\xa3",
        b"OggS",
        b"FLV\x01",
    ):
        return "video"
    if (head[:4] == b"RIFF" and head[8:12] == b"AVI ") or head[:4] in (
        b"\x00\x00\x01\xba",
        b"\x00\x00\x01\xb3",
        b"0&\xb2u",
    ):
        return "video"
    return "video" if head[:1] == b"G" and len(head) > 3 and head[3] & 0x10 else None  # MPEG transport stream


# ---- the side of the caller ----


class Decoder:
    """A child process that opens files, with a deadline for each request. Not for several threads at once.

    On Linux the child also ends with the *thread* that started it (so the kernel defines it); the next request starts
    another.
    """

    def __init__(self, seconds: float, *, max_pixels: int = 100_000_000) -> None:
        self.seconds = seconds
        self.max_pixels = max_pixels
        self._child: subprocess.Popen[bytes] | None = None

    def probe(self, media: Media, source: Path | bytes) -> Facts:
        """Facts of a file; an image is decoded as a whole, a video is demuxed to its end and its first frame decoded.

        Raises:
            MediaError: If it is not what `media` says, damaged, too large, or misses the deadline.
        """
        answer, _ = self._ask({"op": "probe", "media": media}, source)
        return Facts(**answer)

    def clips(
        self,
        source: Path | bytes,
        indices: Sequence[Sequence[int]],
        facts: Mapping[str, Any],
        *,
        width: int,
        height: int,
        decoder: str,
    ) -> list[np.ndarray]:
        """Exactly the frames of `indices` (numbers in presentation order), scaled to cover (width, height) and
        cropped to the centre.

        Args:
            source: The video.
            indices: For each clip its frame numbers, ascending.
            facts: `frames`, `rotation` and `aspect` as the probe found them.

        Returns:
            A (T, H, W, 3) array per clip.

        Raises:
            MediaError: If a frame cannot be decoded or the deadline is missed.
        """
        wanted = {name: facts[name] for name in ("frames", "rotation", "aspect")}
        form = {"width": width, "height": height, "decoder": decoder}
        _, data = self._ask(
            {"op": "clips", "indices": [list(map(int, one)) for one in indices], **wanted, **form}, source
        )
        frames = np.frombuffer(data, np.uint8).reshape(-1, height, width, 3)
        ends = np.cumsum([len(one) for one in indices])
        return [frames[end - len(one) : end] for one, end in zip(indices, ends, strict=True)]

    def picture(self, source: Path | bytes, *, width: int, height: int) -> np.ndarray:
        """An image as a clip of one frame, (1, H, W, 3), scaled to cover (width, height) and cropped to the centre."""
        _, data = self._ask({"op": "picture", "width": width, "height": height}, source)
        return np.frombuffer(data, np.uint8).reshape(1, height, width, 3)

    def start(self) -> Self:
        """Start the child now, from this thread."""
        self._running()
        return self

    def close(self) -> None:
        """End the child; a later request starts another."""
        if (child := self._child) is not None:
            self._child = None
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: dict[str, Any], source: Path | bytes) -> tuple[dict[str, Any], bytearray]:
        payload = source if isinstance(source, bytes) else b""
        where = {"path": str(source)} if isinstance(source, Path) else {}
        header = {**request, **where, "bytes": len(payload), "max_pixels": self.max_pixels}
        try:
            answer, data = self._once(header, payload)
        except EOFError:  # a child may also end for a reason that is not the file: one more try
            try:
                answer, data = self._once(header, payload)
            except EOFError:
                raise MediaError(RejectReason.DECODER_CRASHED, "the decoder process died, twice") from None
        if "reason" in answer:
            raise MediaError(RejectReason(answer["reason"]), answer["detail"])
        return answer, data

    def _once(self, header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytearray]:
        child = self._running()
        until = time.monotonic() + self.seconds
        try:
            _send(cast(BinaryIO, child.stdin), header, payload)
            return self._receive(until)
        except TimeoutError:
            self.close()
            raise MediaError(RejectReason.DECODE_TIMEOUT, f"no result within {self.seconds:g} s") from None
        except (EOFError, BrokenPipeError):
            self.close()
            raise EOFError from None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is not None:
            self.close()
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "vc2.data.decode"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # codecs chatter about every damaged frame
            )
            try:
                self._receive(time.monotonic() + START_SECONDS)
            except (TimeoutError, EOFError):
                self.close()
                raise Vc2Error(
                    f"`{sys.executable} -m vc2.data.decode` does not start; run it by hand to see why"
                ) from None
        return self._child

    def _receive(self, until: float) -> tuple[dict[str, Any], bytearray]:
        (size,) = HEADER.unpack(self._read(HEADER.size, until))
        answer = json.loads(self._read(size, until))
        return answer, self._read(answer.pop("bytes", 0), until)

    def _read(self, size: int, until: float) -> bytearray:
        handle = self._child.stdout.fileno()  # type: ignore[union-attr]
        poll = select.poll()
        poll.register(handle, select.POLLIN | select.POLLHUP)
        buffer = bytearray(size)
        rest = memoryview(buffer)
        while rest:
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                raise TimeoutError
            count = os.readv(handle, [rest])
            if count == 0:
                raise EOFError
            rest = rest[count:]
        return buffer


_shared: Decoder | None = None


def shared_decoder(seconds: float, max_pixels: int) -> Decoder:
    """The one decoder of this process, with these limits from now on: a worker keeps its child as long as it lives."""
    global _shared
    if _shared is None:
        _shared = Decoder(seconds)
        atexit.register(_shared.close)
    _shared.seconds, _shared.max_pixels = seconds, max_pixels
    return _shared.start()


def _send(pipe: BinaryIO, header: dict[str, Any], payload: bytes | memoryview) -> None:
    text = json.dumps(header).encode()
    pipe.write(HEADER.pack(len(text)) + text)
    pipe.write(payload)
    pipe.flush()


# ---- the side of the child ----


def _serve() -> None:
    die_with_parent()
    # Codecs may print: what they say must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = sys.stdin.buffer
    import av.logging
    from PIL import Image

    av.logging.set_level(None)
    Image.init()
    _send(answers, {}, b"")
    while header := requests.read(HEADER.size):
        request = json.loads(requests.read(HEADER.unpack(header)[0]))
        payload = requests.read(request["bytes"])
        try:
            answer, frames = _answer(request, payload)
            _send(answers, {**answer, "bytes": frames.nbytes}, np.ascontiguousarray(frames).data)
        except MediaError as error:
            _send(answers, {"reason": str(error.reason), "detail": error.detail}, b"")
        except Exception as error:  # whatever a codec makes of a damaged file
            _send(answers, {"reason": str(RejectReason.UNDECODABLE), "detail": type(error).__name__}, b"")


NOTHING = np.zeros(0, np.uint8)


def _answer(request: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], np.ndarray]:
    def source() -> Any:
        return request["path"] if "path" in request else io.BytesIO(payload)

    if request["op"] == "probe":
        head = payload[:32]
        if "path" in request:
            with open(request["path"], "rb") as file:
                head = file.read(32)
        found = sniff(head)
        if found != request["media"]:
            raise MediaError(RejectReason.NOT_MEDIA, f"{found or 'no known medium'}, expected {request['media']}")
        probe = _probe_image if found == "image" else _probe_video
        return probe(source(), request["max_pixels"]).as_dict(), NOTHING
    if request["op"] == "picture":
        image = cover(_open_image(source(), request["max_pixels"]), request["width"], request["height"])
        return {}, np.asarray(image)
    wanted = sorted({number for clip in request["indices"] for number in clip})
    frames = _frames_at(source, wanted, request)
    place = {number: position for position, number in enumerate(wanted)}
    return {}, frames[[place[number] for clip in request["indices"] for number in clip]]


def _open_image(source: Any, max_pixels: int) -> Any:
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # our own limit, which is checked before pixels are decoded
    try:
        image = Image.open(source)
        if image.width * image.height > max_pixels:
            raise MediaError(RejectReason.TOO_LARGE, f"{image.width} x {image.height} pixels")
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise MediaError(RejectReason.UNDECODABLE, type(error).__name__) from None
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _opened(source: Any) -> "InputContainer":
    import av

    return cast("InputContainer", av.open(source, metadata_errors="ignore"))


def _probe_image(source: Any, max_pixels: int) -> Facts:
    image = _open_image(source, max_pixels)
    return Facts(image.width, image.height, 1, "0", 0.0, 0, "1", None)


def _probe_video(source: Any, max_pixels: int) -> Facts:
    with _opened(source) as container:
        if not container.streams.video:
            raise MediaError(RejectReason.NOT_MEDIA, "no video stream")
        stream = container.streams.video[0]
        if stream.width * stream.height > max_pixels:
            raise MediaError(RejectReason.TOO_LARGE, f"{stream.width} x {stream.height} pixels")
        stream.thread_type = "NONE"
        packets = [packet for packet in container.demux(stream) if packet.size]
        stamps = (packet.dts if packet.pts is None else packet.pts for packet in packets if not packet.is_discard)
        ticks = sorted(stamp for stamp in stamps if stamp is not None)
        declared, base, mean = stream.frames, stream.time_base, stream.average_rate
        aspect = stream.sample_aspect_ratio or Fraction(1)
        if not ticks or len(packets) < declared:
            raise MediaError(RejectReason.TRUNCATED, f"{len(packets)} of {declared} frames")
        container.seek(0)
        first = next(iter(container.decode(stream)), None)
        if first is None or first.is_corrupt:
            raise MediaError(RejectReason.UNDECODABLE, "the first frame")
    rate, times = _rate_of(np.asarray(ticks, np.int64), Fraction(base or 1), mean)
    rotation = round(first.rotation) % 360
    width, height = (first.height, first.width) if rotation % 180 else (first.width, first.height)
    duration = float(len(ticks) / rate) if times is None else times[-1] + float(1 / rate)
    shown = 1 / aspect if rotation % 180 else aspect
    return Facts(width, height, len(ticks), str(rate), round(duration, 6), rotation, str(Fraction(shown)), times)


def _rate_of(ticks: np.ndarray, base: Fraction, declared: Fraction | None) -> tuple[Fraction, list[float] | None]:
    """Rate of a video, and the time of each frame where the rate varies.

    It is constant if no frame is farther than a quarter of a frame from an even grid; coarse clocks jitter by less.
    """
    if len(ticks) < 2 or ticks[-1] == ticks[0]:
        return Fraction(declared or 1), None
    mean = Fraction(len(ticks) - 1) / (int(ticks[-1] - ticks[0]) * base)
    even = np.linspace(ticks[0], ticks[-1], len(ticks))
    if np.abs(ticks - even).max() <= 0.25 * (ticks[-1] - ticks[0]) / (len(ticks) - 1):
        return (Fraction(declared) if declared and abs(declared - mean) <= mean / 100 else mean), None
    return mean.limit_denominator(1001), [round(float((int(tick) - int(ticks[0])) * base), 6) for tick in ticks]


def _frames_at(source: Any, wanted: list[int], request: dict[str, Any]) -> np.ndarray:
    size = request["width"], request["height"], float(Fraction(request["aspect"]))
    if request["decoder"] == "decord" and request["rotation"] == 0 and importlib.util.find_spec("decord") is not None:
        from decord import VideoReader, cpu

        reader = VideoReader(source(), ctx=cpu(0), num_threads=1)
        if len(reader) == request["frames"]:
            return _covered(reader.get_batch(wanted).asnumpy(), *size)
        del reader
    return _covered(_frames_by_pyav(source(), wanted, request["rotation"]), *size)


def _frames_by_pyav(source: Any, wanted: Sequence[int], rotation: int) -> np.ndarray:
    missing, found = set(wanted), []
    with _opened(source) as container:
        container.streams.video[0].thread_type = "NONE"
        for number, frame in enumerate(container.decode(video=0)):
            if number in missing:
                missing.discard(number)
                found.append(np.rot90(frame.to_ndarray(format="rgb24"), rotation // 90))
            if not missing:
                return np.stack(found)
    raise MediaError(RejectReason.UNDECODABLE, f"{len(missing)} of {len(wanted)} frames missing")


def _covered(frames: np.ndarray, width: int, height: int, aspect: float) -> np.ndarray:
    from PIL import Image

    if frames.shape[1:3] == (height, width) and aspect == 1:
        return frames
    return np.stack([np.asarray(cover(Image.fromarray(frame), width, height, aspect)) for frame in frames])


# ---- pixels ----


def cover(image: Any, width: int, height: int, aspect: float = 1.0) -> Any:
    """A Pillow image scaled to cover (width, height), the rest cropped evenly: one bicubic resampling of the window
    that is kept.

    Args:
        image: Pillow image.
        width: Of the result, pixels.
        height: Of the result, pixels.
        aspect: Width over height of one source pixel.
    """
    from PIL import Image

    scale = max(width / (image.width * aspect), height / image.height)
    across, down = min(image.width, width / scale / aspect), min(image.height, height / scale)
    left, top = (image.width - across) / 2, (image.height - down) / 2
    if (image.width, image.height) == (width, height) and aspect == 1:
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + across, top + down))


def encode_jpeg(frame: np.ndarray, quality: int = 95) -> bytes:
    """A frame (H, W, 3) as JPEG with full colour resolution."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def decode_jpeg(data: bytes) -> np.ndarray:
    """The frame (H, W, 3) in a JPEG of ours.

    Raises:
        OSError: If it is damaged.
    """
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return np.asarray(image.convert("RGB"))


# ---- whole videos ----


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
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"frames are {frames.shape[2]} x {frames.shape[1]}; H.264 with yuv420p needs even sides")
    rate = _rate(fps)
    buffer = io.BytesIO()
    buffer.name = "video.mp4"  # moving the index to the front, the muxer opens its own output by name
    muxing = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(
        buffer, "w", format="mp4", options=muxing, io_open=lambda *_: io.BytesIO(buffer.getvalue())
    ) as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": str(crf), "preset": preset, "flags": "+bitexact", **(options or {})}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _check_frames(frames: np.ndarray) -> None:
    if frames.ndim != 4 or frames.shape[0] == 0 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 (T, H, W, 3)")


def _rate(fps: Fraction | float) -> Fraction:
    rate = fps if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(1001)
    if rate <= 0:
        raise ValueError(f"fps is {fps}; expected a number above 0")
    return rate


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
        with _opened(str(path)) as container:
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
    with _opened(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        if not frames:
            raise ValueError(f"{source!r:.200}: a video without frames")
        return np.stack(frames), Fraction(stream.average_rate or 1)


if __name__ == "__main__":
    _serve()
