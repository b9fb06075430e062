"""Pixels out of files of strangers, fitted and encoded for a shard. Runs inside the child process of `decode.Decoder`.

Frames are found by their number in presentation order. Every picture goes through swscale once: to the size of the
sample, by cubic interpolation whose kernel widens where the picture shrinks (so nothing aliases, in one rule for both
directions), and into the colours of JPEG, which frames of PyAV reach without becoming red, green and blue on the way.
Chroma is stored at half resolution, as nearly all sources have it.

What is damaged is rejected, as far as a decoder can tell: PyAV stops at the first error in the frames that are used or
referred to; decord decodes over errors and only logs them, so where it has anything to say PyAV is asked in its
place. So it is where the file is turned, or where decord would lose count.

Shapes: T frames, H x W pixels. Planes are (3, H, W) uint8: luma and two chroma, BT.601 and full range.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vc2.data.rejects import RejectReason
from vc2.data.video_files import encode_planes, open_media

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.video.codeccontext import VideoCodecContext
    from av.video.reformatter import VideoReformatter
    from av.video.stream import VideoStream
    from PIL import Image

__all__ = [
    "ClipJob",
    "Encoded",
    "Facts",
    "Media",
    "MediaError",
    "clips",
    "count_cuts",
    "encode_jpeg",
    "fit_frame",
    "fit_pixels",
    "frames",
    "perceptual_hash",
    "picture",
    "probe",
    "sniff",
]

Media = Literal["video", "image", "film"]  #: a film is a video, or a GIF
Source = str | bytes  #: a path, or the file itself

IMAGES = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # what Pillow may take a file for
ORIENTATION = 0x112  # of EXIF
IDR = 5  # kind of unit in H.264
PADDING = 64  # bytes that FFmpeg may read beyond a picture
SMALL = 64, 40  # pixels across and down: enough to tell motion and cuts
CUT_COLOURS, CUT_CHANGE = 0.3, 12  # of natural shots: all cuts are above both


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


@dataclass(frozen=True, slots=True)
class ClipJob:
    """One clip to cut out of a video."""

    indices: Sequence[int]  #: numbers of its frames, ascending; the last may repeat, which holds it
    fps: int  #: the label of the clip, and the rate at which an mp4 of it plays


@dataclass(frozen=True, slots=True)
class Encoded:
    """The media of one sample, ready for a tar."""

    ending: str  #: jpg (an image), mjpeg (a clip of JPEGs), mp4
    parts: tuple[bytes, ...]  #: one per frame for jpg and mjpeg, one for mp4
    phash: tuple[int, ...]  #: perceptual hashes of 64 bits: of an image; of a clip's first, middle and last frame
    motion: float | None  #: mean absolute luma difference of neighbouring frames, 0 to 255; None: an image
    cuts: int  #: cuts inside the clip


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


def probe(media: Media, source: Source, max_pixels: int) -> Facts:
    """Facts of a file. An image is decoded as a whole (a JPEG at an eighth of its size, which reads all of its bytes),
    a video is demuxed to its end and its first frame decoded.

    Raises:
        MediaError: If it is not what `media` says, damaged or too large.
    """
    head = source[:32] if isinstance(source, bytes) else _read(source, 32)
    found = sniff(head)
    if media == "film" and (found == "video" or head[:3] == b"GIF"):
        return _probe_video(source, max_pixels)
    if found != media:
        raise MediaError(
            RejectReason.NOT_MEDIA, f"{found or 'no known medium'}, expected {'video' if media == 'film' else media}"
        )
    return _probe_image(source, max_pixels) if found == "image" else _probe_video(source, max_pixels)


def _read(path: str, size: int = -1) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


def _file(source: Source) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else source


# ---- images ----


def picture(source: Source, form: Mapping[str, Any], max_pixels: int) -> Encoded:
    """An image fitted to `form` (width, height, jpeg_quality)."""
    data = source if isinstance(source, bytes) else _read(source)
    image = _opened(data, max_pixels)
    planes = fit_pixels(_pixels(image, data), form["width"], form["height"])
    return Encoded("jpg", (_jpeg(planes, form["jpeg_quality"]),), (perceptual_hash(planes[0]),), None, 0)


def _probe_image(source: Source, max_pixels: int) -> Facts:
    data = source if isinstance(source, bytes) else _read(source)
    image = _opened(data, max_pixels)
    if _is_plain(image):
        _decode_jpeg(data, least_factor=8)
        width, height = image.size
    else:
        height, width = _pixels(image, data).shape[:2]
    return Facts(width, height, 1, "0", 0.0, 0, "1", None)


def _opened(data: bytes, max_pixels: int) -> "Image.Image":
    """The image with its header read, its pixels not."""
    from PIL import Image

    Image.init()
    Image.MAX_IMAGE_PIXELS = None  # our own limit holds
    try:
        image = Image.open(io.BytesIO(data), formats=[name for name in IMAGES if name in Image.OPEN])
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise MediaError(RejectReason.UNDECODABLE, type(error).__name__) from None
    if image.width * image.height > max_pixels:
        raise MediaError(RejectReason.TOO_LARGE, f"{image.width} x {image.height} pixels")
    return image


def _is_plain(image: "Image.Image") -> bool:
    """Whether libjpeg-turbo alone gives what a viewer shows: two thirds of Pillow's time."""
    return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and image.getexif().get(ORIENTATION, 1) == 1


def _decode_jpeg(data: bytes, least_factor: int = 1) -> np.ndarray:
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(data, min_factor=least_factor)
    except ValueError as error:  # also where the decoder only warns: bytes are missing, or wrong
        if "nsufficient memory" in str(error):
            raise MemoryError from None
        raise MediaError(RejectReason.UNDECODABLE, str(error)[:80]) from None


def _pixels(image: "Image.Image", data: bytes) -> np.ndarray:
    """(H, W, 3) red, green, blue as a viewer shows them: the first picture, turned by EXIF, transparency on white."""
    from PIL import Image, ImageOps

    if _is_plain(image):
        return _decode_jpeg(data)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, EOFError, IndexError) as error:
        raise MediaError(RejectReason.UNDECODABLE, type(error).__name__) from None
    if image.mode.startswith("I"):  # 16 bits of grey
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


# ---- videos ----


def clips(
    source: Source,
    jobs: Sequence[ClipJob],
    facts: Mapping[str, Any],
    form: Mapping[str, Any],
    decoder: str,
    complaints: Callable[[], bool],
    is_first: bool,
) -> list[Encoded]:
    """Clips of one video, fitted to `form` (width, height, codec, jpeg_quality, x264_crf).

    Args:
        source: The video.
        jobs: What to cut out of it.
        facts: `frames`, `rotation` and `aspect` as the probe found them.
        form: See `config.SampleForm`.
        decoder: decord or pyav.
        complaints: Whether anything was written to the standard error since it was last asked.
        is_first: Whether this process has opened no other file.

    Raises:
        MediaError: If one of the frames is missing or damaged.
        MemoryError: If there is too little. Also if decord fails in a process that is not at its first file: what the
            others have left may be why, and PyAV's frames would not be the same.
    """
    wanted = sorted({number for job in jobs for number in job.indices})
    size, aspect = (form["width"], form["height"]), Fraction(facts["aspect"])
    found = None
    if decoder == "decord" and facts["rotation"] == 0 and _is_in_order(source, facts["frames"]):
        complaints()
        found = _decord_frames(source, wanted, facts["frames"], lambda pixels: fit_pixels(pixels, *size, aspect))
        found = None if complaints() else found
        if found is None and not is_first:
            raise MemoryError
    if found is None:
        found = _pyav_frames(source, wanted, lambda frame: fit_frame(frame, *size, aspect, facts["rotation"]))
    jpegs = {}
    if form["codec"] == "jpeg":
        jpegs = {number: _jpeg(planes, form["jpeg_quality"]) for number, planes in found.items()}
    return [_encoded(job, found, jpegs, form["x264_crf"]) for job in jobs]


def frames(source: Source, start: int, stop: int, rotation: int) -> np.ndarray:
    """Frames `start` to `stop` of a video as they are, (stop - start, H, W, 3) uint8 RGB, turned as a player would.

    Raises:
        MediaError: If one of them is missing or damaged.
    """
    wanted = range(start, stop)
    found = _pyav_frames(source, wanted, lambda frame: frame.to_ndarray(format="rgb24"))
    first = np.rot90(found[start], rotation // 90)
    whole = np.empty((len(wanted), *first.shape), np.uint8)
    for place, number in enumerate(wanted):
        whole[place] = np.rot90(found.pop(number), rotation // 90)
    return whole


def _encoded(job: ClipJob, found: Mapping[int, np.ndarray], jpegs: Mapping[int, bytes], crf: int) -> Encoded:
    frames = [found[number] for number in job.indices]
    hashes = [perceptual_hash(frames[place][0]) for place in (0, len(frames) // 2, -1)]
    small = np.stack([_small(planes) for planes in frames]).astype(np.int16)
    motion = round(float(np.abs(np.diff(small[:, 0], axis=0)).mean()), 4) if len(frames) > 1 else 0.0
    if jpegs:
        ending, parts = "mjpeg", tuple(jpegs[number] for number in job.indices)
    else:
        ending, parts = "mp4", (encode_planes(map(_subsampled, frames), max(1, job.fps), crf=crf),)
    return Encoded(ending, parts, tuple(hashes), motion, count_cuts(small))


def _decord_frames(
    source: Source, wanted: Sequence[int], count: int, take: Callable[[np.ndarray], np.ndarray]
) -> dict[int, np.ndarray] | None:
    """What `take` makes of each frame, by number; None where decord fails or finds another number of them."""
    import decord

    decord.logging.set_level(decord.logging.ERROR)
    try:
        reader = decord.VideoReader(_file(source), ctx=decord.cpu(0), num_threads=1)
        if len(reader) == count:
            return {number: take(reader[number].asnumpy()) for number in wanted}
    except (decord.DECORDError, RuntimeError, MemoryError):
        pass
    return None


def _is_in_order(source: Source, count: int) -> bool:
    """Whether every keyframe of the file is a fresh start. Where one is not (open groups of pictures) decord, which
    jumps there and drops what it cannot decode, ends up frames ahead without saying so."""
    with open_media(_file(source), by_header=True) as container:
        stream = container.streams.video[0]
        codec, setup = stream.codec_context.name, stream.codec_context.extradata or b""
        found, keyframe = 0, None
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.pts is None or packet.is_discard or codec == "hevc":
                return False
            if packet.is_keyframe:
                if codec == "h264" and not _has_idr(memoryview(packet), setup):
                    return False
                keyframe = packet.pts
            if keyframe is None or packet.pts < keyframe:
                return False
            found += 1
    return found == count


def _has_idr(packet: memoryview, setup: bytes) -> bool:
    """Whether an H.264 packet in mp4 form (units behind their lengths) has the unit that forgets all before it."""
    width, place = (setup[4] & 3) + 1 if setup[:1] == b"\x01" and len(setup) > 4 else 0, 0
    while width and place + width < len(packet):
        if packet[place + width] & 31 == IDR:
            return True
        place += width + int.from_bytes(packet[place : place + width], "big")
    return False


def _pyav_frames(
    source: Source, wanted: Sequence[int], take: Callable[["VideoFrame"], np.ndarray]
) -> dict[int, np.ndarray]:
    """What `take` makes of each frame, by number: from the keyframe before the first; should that fail (streams can
    refer back beyond a keyframe) from the start."""
    from av.error import FFmpegError

    failure: Exception | None = None
    for seek in (True, False):
        try:
            return _pyav_pass(source, wanted, take, seek=seek)
        except MemoryError:
            raise
        except (FFmpegError, LookupError) as error:
            failure = error
    raise MediaError(RejectReason.UNDECODABLE, str(failure)[:80])


def _pyav_pass(
    source: Source, wanted: Sequence[int], take: Callable[["VideoFrame"], np.ndarray], *, seek: bool
) -> dict[int, np.ndarray]:
    """Frames are told by their time stamps, which are numbered in order; in containers without them (AVI) by counting
    what comes out of the decoder.

    Raises:
        FFmpegError, LookupError: At the first error, or if a frame does not come out.
    """
    found: dict[int, np.ndarray] = {}
    with open_media(_file(source), by_header=True) as container:
        stream = container.streams.video[0]
        context = _strict(stream)
        packets = [packet for packet in container.demux(stream) if packet.size]
        ticks = sorted(_stamp(packet) for packet in packets if not packet.is_discard)
        stamped = all(packet.pts is not None for packet in packets) and len(set(ticks)) == len(ticks)
        numbers: dict[int | None, int] = {ticks[number]: number for number in wanted} if stamped else {}
        if seek and stamped:
            packets = _from_keyframe(packets, ticks[wanted[0]])
        count = 0
        for packet in (*packets, None):
            if stamped and packet is not None:  # what nothing refers to and nobody wants need not be decoded
                context.skip_frame = "DEFAULT" if packet.pts in numbers else "NONREF"
            for frame in context.decode(packet):
                number = numbers.get(frame.pts) if stamped else count
                count += 1
                if number is None or number not in wanted:
                    continue
                if frame.is_corrupt:
                    raise LookupError(f"frame {number} is damaged")
                found[number] = take(frame)
                if len(found) == len(wanted):
                    return found
    raise LookupError(f"{len(wanted) - len(found)} of {len(wanted)} frames missing")


def _stamp(packet: "Packet") -> int:
    stamp = packet.dts if packet.pts is None else packet.pts
    return 0 if stamp is None else stamp


def _from_keyframe(packets: "list[Packet]", first: int) -> "list[Packet]":
    """The packets that the frame at time `first` and the later ones need, if all is as it should be. Those shown
    before the keyframe that comes first may refer to what is left out, and are left out too."""
    start = max(place for place, packet in enumerate(packets) if packet.is_keyframe and _stamp(packet) <= first)
    return [packet for packet in packets[start:] if _stamp(packet) >= _stamp(packets[start])]


def _strict(stream: "VideoStream") -> "VideoCodecContext":
    """A decoder of one thread that stops at errors instead of painting over them."""
    context = stream.codec_context
    context.thread_type, context.thread_count = "NONE", 1
    context.options = {"err_detect": "explode"}
    return context


def _probe_video(source: Source, max_pixels: int) -> Facts:
    with open_media(_file(source), by_header=True) as container:
        if not container.streams.video:
            raise MediaError(RejectReason.NOT_MEDIA, "no video stream")
        stream = container.streams.video[0]
        if stream.width * stream.height > max_pixels:
            raise MediaError(RejectReason.TOO_LARGE, f"{stream.width} x {stream.height} pixels")
        count, stamps, entry = 0, [], None
        for packet in container.demux(stream):
            count += bool(packet.size)
            if entry is None and packet.size and packet.is_keyframe:
                entry = packet
            if packet.size and not packet.is_discard:
                stamps.append(packet.dts if packet.pts is None else packet.pts)
        ticks = sorted(stamp for stamp in stamps if stamp is not None)
        declared, base, mean = stream.frames, stream.time_base, stream.average_rate
        aspect = stream.sample_aspect_ratio or Fraction(1)
        if not ticks or count < declared:
            raise MediaError(RejectReason.TRUNCATED, f"{count} of {declared} frames")
        context = _strict(stream)
        frames = [*context.decode(entry), *context.decode(None)] if entry else []
        if not frames or frames[0].is_corrupt:
            raise MediaError(RejectReason.UNDECODABLE, "the first frame")
        first = frames[0]
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


# ---- pixels ----


def fit_frame(
    frame: "VideoFrame", width: int, height: int, aspect: Fraction = Fraction(1), rotation: int = 0
) -> np.ndarray:
    """A frame of PyAV as planes (3, height, width): scaled to cover that size, the rest cropped evenly.

    Args:
        frame: As decoded.
        width: Of the result, pixels.
        height: Of the result, pixels.
        aspect: Width over height of one source pixel, as shown.
        rotation: Degrees counterclockwise to turn it by, a multiple of 90.
    """
    across, down, aspect = (height, width, 1 / aspect) if rotation % 180 else (width, height, aspect)
    scale = max(across / (frame.width * aspect), down / frame.height)
    wide, tall = max(across, round(frame.width * aspect * scale)), max(down, round(frame.height * scale))
    if wide * tall > 4 * across * down:  # a sliver is kept: crop before scaling
        planes = fit_pixels(frame.to_ndarray(format="rgb24"), across, down, aspect)
    else:
        left, top = (wide - across) // 2, (tall - down) // 2
        planes = _rescaled(frame, wide, tall)[:, top : top + down, left : left + across]
    return np.ascontiguousarray(np.rot90(planes, rotation // 90, axes=(1, 2)))


def fit_pixels(pixels: np.ndarray, width: int, height: int, aspect: Fraction = Fraction(1)) -> np.ndarray:
    """As `fit_frame`, of (H, W, 3) red, green, blue."""
    import av

    tall, wide = pixels.shape[:2]
    scale = max(width / (wide * aspect), height / tall)
    across = min(wide, max(1, round(width / scale / aspect)))
    down = min(tall, max(1, round(height / scale)))
    left, top = (wide - across) // 2, (tall - down) // 2
    room = np.empty(down * across * 3 + PADDING, np.uint8)
    window = room[:-PADDING].reshape(down, across, 3)
    window[:] = pixels[top : top + down, left : left + across]
    return _rescaled(av.VideoFrame.from_numpy_buffer(window, format="rgb24"), width, height)


def _rescaled(frame: "VideoFrame", width: int, height: int) -> np.ndarray:
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    scaled = _reformatter().reformat(
        frame, width, height, "yuv444p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.JPEG,
        interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT, threads=1,
    )  # fmt: skip
    planes = np.empty((3, height, width), np.uint8)
    for plane, own in zip(planes, scaled.planes, strict=True):
        plane[:] = np.frombuffer(memoryview(own), np.uint8).reshape(-1, own.line_size)[:height, :width]
    return planes


@cache
def _reformatter() -> "VideoReformatter":
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """Pixels (H, W, 3) of red, green and blue as JPEG."""
    import simplejpeg

    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, colorsubsampling="420")


def _jpeg(planes: np.ndarray, quality: int) -> bytes:
    import simplejpeg

    return simplejpeg.encode_jpeg_yuv_planes(*_subsampled(planes), quality)


def _subsampled(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The planes with chroma at half resolution."""
    import cv2

    half = -(-planes.shape[2] // 2), -(-planes.shape[1] // 2)
    blue, red = (cv2.resize(plane, half, interpolation=cv2.INTER_AREA) for plane in planes[1:])
    return planes[0], blue, red


def perceptual_hash(luma: np.ndarray) -> int:
    """64 bits that hardly change when a picture (H, W) is scaled or compressed: which of the 8 x 8 lowest frequencies
    of its 32 x 32 luma lie above their median. The first, the mean, says nothing of its own and is 0."""
    import cv2

    low = cv2.dct(cv2.resize(luma, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32))[:8, :8].ravel()
    bits = low > np.median(low[1:])
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _small(planes: np.ndarray) -> np.ndarray:
    """The planes at 64 x 40, by halves: several times faster than at once."""
    import cv2

    width, height = planes.shape[2], planes.shape[1]
    small = list(planes)
    while (width, height) != SMALL:
        halves = width >= 2 * SMALL[0] and height >= 2 * SMALL[1]
        width, height = (width // 2, height // 2) if halves else SMALL
        small = [cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA) for plane in small]
    return np.stack(small)


def count_cuts(frames: np.ndarray) -> int:
    """Cuts between neighbouring frames of small planes, (T, 3, H, W).

    At a cut the colours change at once (a third of the pixels at least changes its place in a histogram of 512
    colours), the picture does too, and both more than elsewhere in the clip, where things merely move fast. A picture
    that something large crosses between two frames far apart may still pass for a cut.
    """
    if len(frames) < 2:
        return 0
    luma, blue, red = (frames[:, plane].reshape(len(frames), -1).astype(np.int64) for plane in range(3))
    colours = (luma >> 5) * 64 + ((blue - 64) >> 4).clip(0, 7) * 8 + ((red - 64) >> 4).clip(0, 7)
    shares = np.stack([np.bincount(one, minlength=512) for one in colours]) / colours.shape[1]
    moved = np.abs(np.diff(shares, axis=0)).sum(1) / 2
    changed = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean((1, 2, 3))
    return int(((moved > CUT_COLOURS) & (moved > 2 * np.median(moved)) & (changed > CUT_CHANGE)).sum())
