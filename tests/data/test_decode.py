import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from vc2.data.decode import Decoder, MediaError, cover, encode_mp4, read_video, sniff
from vc2.data.rejects import RejectReason


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(60, max_pixels=2_000_000) as decoder:
        yield decoder


def frames_by_av(source: Path | bytes) -> np.ndarray:
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def turned(mp4: bytes) -> bytes:
    """The mp4 with the note to players to turn it by a quarter."""
    one = 1 << 16
    upright = b"".join(number.to_bytes(4, "big", signed=True) for number in (one, 0, 0, 0, one, 0, 0, 0, 1 << 30))
    quarter = b"".join(number.to_bytes(4, "big", signed=True) for number in (0, one, 0, -one, 0, 0, 0, 0, 1 << 30))
    track = mp4.index(b"tkhd")
    place = mp4.index(upright, track)
    return mp4[:place] + quarter + mp4[place + len(quarter) :]


def uneven_mp4(media: Any, stamps: list[int]) -> bytes:
    """Frames shown at the given milliseconds."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for stamp, frame in zip(stamps, media.frames(len(stamps)), strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["decord", "pyav"])
def test_frames_are_those_that_an_independent_decode_finds(decoder: Decoder, bikes: Path, name: str) -> None:
    """Frames are exact by number, in a natural clip with several shots, whichever decoder and however far apart."""
    facts = decoder.probe("video", bikes)
    assert (facts.width, facts.height, facts.frames, facts.rate, facts.times) == (640, 272, 250, "25", None)
    truth = frames_by_av(bikes)
    clips = [[0, 1, 2], [40, 101, 249]]
    found = decoder.clips(bikes, clips, facts.as_dict(), width=640, height=272, decoder=name)
    for clip, frames in zip(clips, found, strict=True):
        assert np.abs(frames.astype(int) - truth[clip]).mean() < 1


def test_bytes_and_files_are_the_same_to_the_decoder(decoder: Decoder, media: Any, tmp_path: Path) -> None:
    """A video in memory gives the facts and frames of the same video on disk."""
    mp4 = media.mp4(20, Fraction(30000, 1001))
    (tmp_path / "v.mp4").write_bytes(mp4)
    facts = decoder.probe("video", mp4)
    assert facts == decoder.probe("video", tmp_path / "v.mp4")
    assert facts.rate == "30000/1001"
    form = {"width": 32, "height": 24, "decoder": "decord"}
    a = decoder.clips(mp4, [[3, 9]], facts.as_dict(), **form)[0]
    b = decoder.clips(tmp_path / "v.mp4", [[3, 9]], facts.as_dict(), **form)[0]
    assert np.array_equal(a, b)
    assert round((a[1].mean() - a[0].mean()) / media.step) == 6


def test_a_turned_video_is_turned_back(decoder: Decoder, media: Any) -> None:
    """Rotation in the container is honoured: sizes are those shown, and so are the pixels."""
    mp4 = turned(media.mp4(4, 10))
    facts = decoder.probe("video", mp4)
    assert (facts.width, facts.height) == (48, 64)
    frame = decoder.clips(mp4, [[1]], facts.as_dict(), width=48, height=64, decoder="decord")[0][0]
    assert facts.rotation in (90, 270)
    plain = frames_by_av(mp4)[1]
    assert np.array_equal(frame, np.rot90(plain, facts.rotation // 90))
    # A clockwise quarter takes the dark left edge to the top.
    assert frame[:8].mean() < frame[-8:].mean()


def test_times_of_an_uneven_video_are_kept(decoder: Decoder, media: Any) -> None:
    """A variable rate is told by the times of all frames; jitter of the clock is not a variable rate."""
    stamps = [0, 40, 80, 120, 320, 520, 720, 760]
    facts = decoder.probe("video", uneven_mp4(media, stamps))
    assert facts.times is not None
    assert np.allclose(np.array(facts.times) * 1000, stamps, atol=0.1)
    assert decoder.probe("video", uneven_mp4(media, [0, 33, 67, 100, 133, 167])).times is None


@pytest.mark.parametrize(
    ("kind", "data", "reason"),
    [
        ("video", lambda _: b"<html>" + b" " * 900, RejectReason.NOT_MEDIA),
        ("video", lambda media: media.jpeg(0), RejectReason.NOT_MEDIA),
        ("image", lambda media: media.mp4(4, 10), RejectReason.NOT_MEDIA),
        ("image", lambda _: b"", RejectReason.NOT_MEDIA),
        ("image", lambda media: media.jpeg(0)[:700], RejectReason.UNDECODABLE),
        ("video", lambda media: media.mp4(40, 10)[:-400], RejectReason.TRUNCATED),
        ("video", lambda media: uneven_mp4(media, [0, 40, 80])[:-300], RejectReason.UNDECODABLE),
        ("image", lambda media: media.jpeg(0, 2000, 1600), RejectReason.TOO_LARGE),
    ],
)
def test_every_defect_has_its_reason(
    decoder: Decoder, media: Any, kind: Any, data: Callable[[Any], bytes], reason: RejectReason
) -> None:
    """What a file is, is judged by its content, and a damaged one is never taken."""
    with pytest.raises(MediaError) as caught:
        decoder.probe(kind, data(media))
    assert caught.value.reason is reason


def test_pictures_are_shown_as_a_viewer_would(decoder: Decoder) -> None:
    """EXIF turns are applied, transparency lies on white."""
    image = Image.new("RGB", (60, 40), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    facts = decoder.probe("image", buffer.getvalue())
    assert (facts.width, facts.height) == (40, 60)
    clear = io.BytesIO()
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(clear, "PNG")
    assert decoder.picture(clear.getvalue(), width=8, height=8).min() == 255


def test_cover_keeps_the_middle_undistorted() -> None:
    """A wide picture loses its sides, a tall one top and bottom; pixels that are not square are made so."""
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255
    assert np.asarray(cover(Image.fromarray(wide), 10, 10)).min() == 255
    tall = wide.transpose(1, 0, 2)
    assert np.asarray(cover(Image.fromarray(tall), 10, 10)).min() == 255
    assert np.asarray(cover(Image.fromarray(wide[:, 10:30]), 10, 10, aspect=0.5)).mean() == pytest.approx(127.5, abs=13)


def test_a_deadline_is_a_reason_and_the_next_file_gets_a_fresh_child(bikes: Path) -> None:
    """A decode that does not end in time is killed and told; the decoder goes on."""
    with Decoder(60) as decoder:
        facts = decoder.probe("video", bikes)
        decoder.seconds = 0.01
        with pytest.raises(MediaError) as caught:
            decoder.clips(bikes, [range(250)], facts.as_dict(), width=640, height=272, decoder="pyav")
        assert caught.value.reason is RejectReason.DECODE_TIMEOUT
        decoder.seconds = 60
        assert decoder.probe("video", bikes) == facts


def test_a_child_that_dies_between_files_is_replaced(media: Any) -> None:
    """Losing the child costs no sample."""
    with Decoder(60) as decoder:
        decoder.probe("image", media.jpeg(1))
        assert decoder._child is not None
        os.kill(decoder._child.pid, signal.SIGKILL)
        decoder._child.wait()
        assert decoder.probe("image", media.jpeg(1)).width == 96


@pytest.mark.skipif(sys.platform != "linux", reason="ties to the parent are told by /proc here")
def test_no_decoder_outlives_its_parent() -> None:
    """A parent that is killed takes its decoder along."""
    code = (
        "import time; from vc2.data.decode import Decoder; d = Decoder(9); d._running(); "
        "print(d._child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the decoder is still there")


def test_what_is_encoded_is_what_is_read(media: Any) -> None:
    """Frames survive H.264 nearly unchanged, the rate exactly; the index comes first; same frames, same bytes."""
    frames = media.frames(12)
    for rate in (Fraction(8), Fraction(24000, 1001)):
        mp4 = encode_mp4(frames, rate, crf=10)
        read, fps = read_video(mp4)
        assert fps == rate
        assert np.abs(read.astype(int) - frames).mean() < 2
        assert 0 < mp4.index(b"moov") < mp4.index(b"mdat")
        assert mp4 == encode_mp4(frames, float(rate), crf=10)
    with pytest.raises(ValueError, match="even"):
        encode_mp4(frames[:, :47], 8)


def test_sniffing_needs_no_name(media: Any) -> None:
    """First bytes tell images from videos from the rest."""
    assert sniff(media.jpeg(0)[:32]) == "image"
    assert sniff(media.mp4(2, 5)[:32]) == "video"
    assert sniff(b"\x1aE\xdf\xa3" + b"\0" * 28) == "video"
    assert sniff(b"<!DOCTYPE html><html>") is None
    assert sniff(b"") is None
