"""Files that nobody meant well with, and what the guarded decoder says of each: one reason, no hang, nothing left."""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from vc2.data.config import SampleForm
from vc2.data.decode import MOST_MEMORY, ClipJob, Decoder, Encoded, MediaError
from vc2.data.rejects import RejectReason
from vc2.data.shards import decode_frames
from vc2.data.video_files import encode_mp4

FORM = SampleForm(num_frames=1, width=64, height=64)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(60) as decoder:
        yield decoder
        child = decoder.start()._child
        assert child is not None
        process = psutil.Process(child.pid)
    assert not process.is_running()


@pytest.fixture(scope="module")
def film() -> bytes:
    """Three seconds of moving noise: every byte of it matters."""
    noise = np.random.default_rng(5).integers(0, 255, (12, 16, 3), np.uint8)
    still = np.asarray(Image.fromarray(noise).resize((256, 192), Image.Resampling.BICUBIC))
    return encode_mp4(np.stack([np.roll(still, 3 * n, axis=1) for n in range(75)]), 25, crf=18)


def flipped(data: bytes, count: int, seed: int) -> bytes:
    """Bits of the media part turned over."""
    draws, damaged = np.random.default_rng(seed), bytearray(data)
    first = data.index(b"mdat") + 700  # behind the headers, which the probe already reads
    for place in draws.integers(first, len(data), count):
        damaged[place] ^= 1 << int(draws.integers(8))
    return bytes(damaged)


def png(width: int, height: int) -> bytes:
    """A black PNG of two colours and any size, in a few kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer, row = zlib.compressobj(9), bytes(1 + -(-width // 8))
    packed = b"".join(packer.compress(row * 64) for _ in range(height // 64)) + packer.compress(row * (height % 64))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed + packer.flush()) + chunk(b"IEND", b"")


def saved(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def huge_gif() -> bytes:
    return b"GIF89a" + struct.pack("<HH", 65535, 65535) + saved(Image.new("P", (8, 8)), "GIF")[10:]


def huge_webp() -> bytes:
    small = bytearray(saved(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
    place = small.index(b"VP8L") + 9
    struct.pack_into("<I", small, place, struct.unpack_from("<I", small, place)[0] | 2**28 - 1)
    return bytes(small)


def huge_tiff() -> bytes:
    small = bytearray(saved(Image.new("L", (8, 8)), "TIFF"))
    (place,) = struct.unpack_from("<I", small, 4)
    for entry in range(struct.unpack_from("<H", small, place)[0]):
        if struct.unpack_from("<H", small, place + 2 + 12 * entry)[0] in (256, 257):
            struct.pack_into("<HII", small, place + 4 + 12 * entry, 4, 1, 40_000)
    return bytes(small)


def sound_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return buffer.getvalue()


IMAGE_DEFECTS: dict[str, tuple[Callable[[Any], bytes], RejectReason]] = {
    "empty": (lambda _: b"", RejectReason.NOT_MEDIA),
    "a web page": (lambda _: b"<!DOCTYPE html><html>" + b" " * 900, RejectReason.NOT_MEDIA),
    "a video": (lambda media: media.mp4(4, 10), RejectReason.NOT_MEDIA),
    "a pickle": (lambda _: b"\x80\x04\x95" + bytes(60), RejectReason.NOT_MEDIA),
    "truncated": (lambda media: media.jpeg(0)[:700], RejectReason.UNDECODABLE),
    "truncated at its end": (lambda media: media.jpeg(0, 640, 480)[:-300], RejectReason.UNDECODABLE),
    "truncated, progressive": (
        lambda _: saved(Image.effect_noise((200, 200), 90), "JPEG", progressive=True)[:-400],
        RejectReason.UNDECODABLE,
    ),
    "truncated PNG": (lambda _: saved(Image.effect_noise((64, 64), 9), "PNG")[:-90], RejectReason.UNDECODABLE),
    "a head alone": (lambda media: media.jpeg(0)[:64], RejectReason.UNDECODABLE),
    "JPEG bomb": (
        lambda media: media.jpeg(0)[:-2].replace(b"\0\x40\0\x60", b"\xff\xff\xff\xff"),
        RejectReason.TOO_LARGE,
    ),
    "PNG bomb": (lambda _: png(30_000, 30_000), RejectReason.TOO_LARGE),
    "GIF bomb": (lambda _: huge_gif(), RejectReason.TOO_LARGE),
    "WebP bomb": (lambda _: huge_webp(), RejectReason.UNDECODABLE),
    "TIFF bomb": (lambda _: huge_tiff(), RejectReason.TOO_LARGE),
}


@pytest.mark.parametrize("name", IMAGE_DEFECTS)
def test_every_hostile_image_has_its_reason(decoder: Decoder, media: Any, name: str) -> None:
    """What a file is, is judged by its content; sizes are refused before there are pixels."""
    make, reason = IMAGE_DEFECTS[name]
    data = make(media)
    with pytest.raises(MediaError) as caught:
        decoder.probe("image", data)
    assert caught.value.reason is reason
    with pytest.raises(MediaError) as caught:  # the build, which takes only what was probed, is as careful
        decoder.picture(data, FORM)
    if reason is not RejectReason.NOT_MEDIA:
        assert caught.value.reason is reason


def test_flipped_bits_of_a_jpeg_are_noticed(decoder: Decoder, photographs: list[Path]) -> None:
    """What libjpeg would paint over with a warning is rejected, by the probe and by the build alike."""
    data, noticed = photographs[0].read_bytes(), 0
    for seed in range(12):
        damaged = bytearray(data)
        for place in np.random.default_rng(seed).integers(2000, len(data), 8):
            damaged[place] ^= 0xFF
        answers = [answer(decoder.probe, "image", bytes(damaged)), answer(decoder.picture, bytes(damaged), FORM)]
        assert answers[0] == answers[1]
        noticed += answers[0] is RejectReason.UNDECODABLE
    assert noticed >= 10


def answer(ask: Callable[..., Any], *args: Any) -> RejectReason | None:
    try:
        ask(*args)
    except MediaError as error:
        return error.reason
    return None


VIDEO_DEFECTS: dict[str, tuple[Callable[[Any], bytes], RejectReason]] = {
    "empty": (lambda _: b"", RejectReason.NOT_MEDIA),
    "a web page": (lambda _: b"<html>" + b" " * 900, RejectReason.NOT_MEDIA),
    "an image": (lambda media: media.jpeg(0), RejectReason.NOT_MEDIA),
    "sound alone": (lambda _: sound_only(), RejectReason.NOT_MEDIA),
    "a head alone": (lambda media: media.mp4(9, 10)[:40], RejectReason.NOT_MEDIA),
    "truncated": (lambda media: media.mp4(40, 10)[:-400], RejectReason.TRUNCATED),
    "noise behind a true head": (
        lambda media: media.mp4(9, 10)[:40] + np.random.default_rng(1).bytes(9000),
        RejectReason.NOT_MEDIA,
    ),
}


@pytest.mark.parametrize("name", VIDEO_DEFECTS)
def test_every_hostile_video_has_its_reason(decoder: Decoder, media: Any, name: str) -> None:
    make, reason = VIDEO_DEFECTS[name]
    with pytest.raises(MediaError) as caught:
        decoder.probe("video", make(media))
    assert caught.value.reason is reason


@pytest.mark.parametrize("name", ["decord", "pyav"])
def test_flipped_bits_of_a_video_are_noticed(decoder: Decoder, film: bytes, name: str) -> None:
    """Damage in the frames that a clip needs is rejected, though decoders paint over it; the sound film passes."""
    form = SampleForm(width=64, height=48)
    facts = decoder.probe("video", film).as_dict()
    job = [ClipJob(range(10, 58, 3), 8)]
    assert len(decoder.clips(film, job, facts, form, decoder=name)[0].parts) == 16
    for seed in range(4):
        with pytest.raises(MediaError) as caught:
            decoder.clips(flipped(film, 40, seed), job, facts, form, decoder=name)
        assert caught.value.reason is RejectReason.UNDECODABLE


def test_names_say_nothing(decoder: Decoder, media: Any, tmp_path: Path) -> None:
    """A JPEG named .mp4 is a JPEG, a film without an ending a film."""
    (tmp_path / "a.mp4").write_bytes(media.jpeg(1))
    (tmp_path / "film").write_bytes(media.mp4(4, 10))
    assert decoder.probe("image", tmp_path / "a.mp4").width == 96
    assert decoder.probe("video", tmp_path / "film").frames == 4
    with pytest.raises(MediaError, match="not_media"):
        decoder.probe("video", tmp_path / "a.mp4")


def test_the_smallest_things_are_things(decoder: Decoder, media: Any) -> None:
    """One frame, one pixel: facts to judge by, and pixels."""
    one = decoder.probe("video", media.mp4(1, 10))
    assert (one.frames, one.times) == (1, None)
    (sample,) = decoder.clips(media.mp4(1, 10), [ClipJob([0, 0, 0], 8)], one.as_dict(), FORM, decoder="decord")
    assert len(sample.parts) == 3 and sample.motion == 0
    dot = saved(Image.new("RGB", (1, 1), (200, 10, 10)), "PNG")
    assert (decoder.probe("image", dot).width, decoder.probe("image", dot).height) == (1, 1)
    assert np.abs(pixels(decoder.picture(dot, FORM)).mean((0, 1)) - (200, 10, 10)).max() < 6


def pixels(sample: Encoded) -> np.ndarray:
    return decode_frames(sample.parts[0], [len(sample.parts[0])], "jpg")[0].astype(int)


WAYS: dict[str, Callable[[Image.Image], bytes]] = {
    "progressive": lambda image: saved(image, "JPEG", progressive=True, quality=95),
    "CMYK": lambda image: saved(image.convert("CMYK"), "JPEG", quality=95),
    "palette": lambda image: saved(image.quantize(64), "PNG"),
    "PNG": lambda image: saved(image, "PNG"),
    "WebP": lambda image: saved(image, "WEBP", lossless=True),
    "TIFF": lambda image: saved(image, "TIFF"),
    "BMP": lambda image: saved(image, "BMP"),
    "animated WebP": lambda image: saved(image, "WEBP", save_all=True, append_images=[Image.new("RGB", image.size)]),
    "animated GIF": lambda image: saved(image, "GIF", save_all=True, append_images=[Image.new("RGB", image.size)]),
    "alpha": lambda image: saved(image.convert("RGBA"), "PNG"),
    "turned": lambda image: saved(
        image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif(orientation=6)
    ),
}


def exif(orientation: int) -> Image.Exif:
    note = Image.Exif()
    note[0x0112] = orientation
    return note


@pytest.mark.parametrize("name", WAYS)
def test_pictures_are_shown_as_a_viewer_would(decoder: Decoder, name: str) -> None:
    """However a picture is stored, the same pixels come out: of the first of several, upright."""
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    image = Image.fromarray(
        np.stack([np.tile(ramp, (32, 1)), np.full((32, 64), 90, np.uint8), 255 - ramp[None].repeat(32, 0)], -1)
    )
    data = WAYS[name](image)
    facts = decoder.probe("image", data)
    assert (facts.width, facts.height) == (64, 32)
    found = pixels(decoder.picture(data, SampleForm(num_frames=1, width=64, height=32)))
    assert np.abs(found - np.asarray(image)).mean() < 8


def test_what_is_clear_lies_on_white_and_grey_stays_grey(decoder: Decoder) -> None:
    """Transparency shows white; grey of 8 and of 16 bits is as light as it was."""
    clear = saved(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "PNG")
    assert pixels(decoder.picture(clear, FORM)).min() >= 254
    assert abs(pixels(decoder.picture(saved(Image.new("L", (20, 20), 130), "JPEG"), FORM)).mean() - 130) < 2
    deep = np.full((20, 20), 130 * 257, np.uint16)
    assert abs(pixels(decoder.picture(saved(Image.fromarray(deep), "PNG"), FORM)).mean() - 130) < 2


def test_a_small_file_of_a_huge_frame(decoder: Decoder) -> None:
    """8K decodes within the memory of a worker; where it is beyond the limit set, it is refused by its header."""
    frames = np.zeros((3, 4320, 7680, 3), np.uint8)
    data = encode_mp4(frames, 10, crf=40, preset="ultrafast")
    assert len(data) < 200_000
    facts = decoder.probe("video", data)
    assert (facts.width, facts.height) == (7680, 4320)
    for name in ("decord", "pyav"):
        (sample,) = decoder.clips(data, [ClipJob([0, 1, 2], 8)], facts.as_dict(), SampleForm(), decoder=name)
        assert len(sample.parts) == 3
    decoder.max_pixels = 8_000_000
    try:
        with pytest.raises(MediaError, match="too_large"):
            decoder.probe("video", data)
    finally:
        decoder.max_pixels = 100_000_000


def test_more_memory_than_a_worker_has_is_a_reason(media: Any) -> None:
    """A picture that would take gigabytes is too large, also where the limit of pixels lets it pass; the child, which
    never held more than its share, goes on."""
    with Decoder(60, max_pixels=10**10) as decoder:
        with pytest.raises(MediaError) as caught:
            decoder.probe("image", png(20_000, 20_000))
        assert caught.value.reason is RejectReason.TOO_LARGE and "MiB" in caught.value.detail
        assert decoder.probe("image", media.jpeg(1)).width == 96
        child = decoder._child
        assert child is not None and psutil.Process(child.pid).memory_info().rss < MOST_MEMORY


def test_a_long_film_is_probed_and_cut_within_seconds(decoder: Decoder) -> None:
    """An hour: the frames at its end are found as soon as those at its start."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.gop_size = 100
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24").reformat(format="yuv420p")
        for number in range(4 * 3600):
            picture.pts = number
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    facts = decoder.probe("video", buffer.getvalue())
    assert (facts.frames, facts.duration) == (14400, 3600)
    started = psutil.Process(decoder.start()._child.pid).cpu_times().user  # type: ignore[union-attr]
    for name in ("decord", "pyav"):
        job = ClipJob(range(14_300, 14_396, 6), 1)
        assert len(decoder.clips(buffer.getvalue(), [job], facts.as_dict(), FORM, decoder=name)[0].parts) == 16
    assert psutil.Process(decoder.start()._child.pid).cpu_times().user - started < 20  # type: ignore[union-attr]


def test_nothing_is_left_when_the_last_request_hung(tmp_path: Path) -> None:
    """A decoder that is closed, even after a hang, leaves no process."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    os.mkfifo(tmp_path / "endless")
    with Decoder(0.3) as decoder:
        with pytest.raises(MediaError, match="decode_timeout"):
            decoder.probe("image", tmp_path / "endless")
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
