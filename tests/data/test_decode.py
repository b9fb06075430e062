import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from vc2.data import decode
from vc2.data.config import SampleForm
from vc2.data.decode import ClipJob, Decoder, Encoded, MediaError, sniff
from vc2.data.media import clips, count_cuts, fit_frame, fit_pixels, perceptual_hash, probe
from vc2.data.rejects import RejectReason
from vc2.data.shards import decode_frames
from vc2.data.video_files import encode_mp4, read_video


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(60, max_pixels=2_000_000) as decoder:
        yield decoder


def frames_by_av(source: Path | bytes) -> np.ndarray:
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def form(width: int, height: int, **kwargs: Any) -> SampleForm:
    return SampleForm(width=width, height=height, jpeg_quality=100, **kwargs)


def shown(sample: Encoded) -> np.ndarray:
    return decode_frames(b"".join(sample.parts), [len(part) for part in sample.parts], sample.ending).astype(int)


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
@pytest.mark.parametrize("codec", ["jpeg", "x264"])
def test_frames_are_those_that_an_independent_decode_finds(
    decoder: Decoder, bikes: Path, name: str, codec: Any
) -> None:
    """Frames are exact by number, in a natural clip with several shots, whichever decoder and however far apart."""
    facts = decoder.probe("video", bikes)
    assert (facts.width, facts.height, facts.frames, facts.rate, facts.times) == (640, 272, 250, "25", None)
    truth = frames_by_av(bikes)
    clips = [ClipJob([0, 1, 2], 8), ClipJob([40, 101, 249, 249], 8)]
    found = decoder.clips(bikes, clips, facts.as_dict(), form(640, 272, codec=codec, x264_crf=1), decoder=name)
    for clip, sample in zip(clips, found, strict=True):
        assert (sample.ending, len(sample.parts)) == (("mjpeg", len(clip.indices)) if codec == "jpeg" else ("mp4", 1))
        frames = shown(sample)
        near = [np.abs(frames - truth[number]).mean((1, 2, 3)).argmin() for number in clip.indices]
        assert near == [list(clip.indices).index(number) for number in clip.indices]
        assert np.abs(frames - truth[list(clip.indices)]).mean() < 2


@pytest.mark.parametrize(
    "options",
    [
        {"g": "12", "bf": "3", "x264-params": "open-gop=1:b-pyramid=none"},  # here decord alone is three frames ahead
        {"g": "5", "bf": "3", "x264-params": "open-gop=1"},
        {"g": "250", "bf": "2"},
    ],
)
@pytest.mark.parametrize("name", ["decord", "pyav"])
def test_every_single_frame_is_the_right_one(decoder: Decoder, media: Any, options: dict[str, str], name: str) -> None:
    """Each frame is found alone, with reordered frames, open groups of pictures and frames that nothing refers to."""
    frames = media.frames(30)
    mp4 = encode_mp4(frames, 25, crf=1, options=options)
    facts = decoder.probe("video", mp4).as_dict()
    for number in (*range(30), range(3, 30, 2), range(10, 30, 4)):
        indices = [number] if isinstance(number, int) else list(number)
        (sample,) = decoder.clips(mp4, [ClipJob(indices, 8)], facts, form(64, 48), decoder=name)
        steps = (shown(sample).mean((1, 2, 3)) - frames[0].mean()) / media.step
        assert steps.round().astype(int).tolist() == indices


def test_a_container_without_time_stamps_is_counted(decoder: Decoder, media: Any) -> None:
    """AVI has no presentation times: frames are numbered as they come out."""
    buffer, frames = io.BytesIO(), media.frames(12)
    with av.open(buffer, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.max_b_frames = 2
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    facts = decoder.probe("video", buffer.getvalue())
    job = ClipJob([2, 7, 11], 8)
    found = shown(decoder.clips(buffer.getvalue(), [job], facts.as_dict(), form(64, 48), decoder="pyav")[0])
    assert [round((frame.mean() - frames[0].mean()) / media.step) for frame in found] == [2, 7, 11]


def test_bytes_and_files_are_the_same_to_the_decoder(decoder: Decoder, media: Any, tmp_path: Path) -> None:
    """A video in memory gives the facts and frames of the same video on disk."""
    mp4 = media.mp4(20, Fraction(30000, 1001))
    (tmp_path / "v.mp4").write_bytes(mp4)
    facts = decoder.probe("video", mp4)
    assert facts == decoder.probe("video", tmp_path / "v.mp4")
    assert facts.rate == "30000/1001"
    job = [ClipJob([3, 9], 8)]
    a = decoder.clips(mp4, job, facts.as_dict(), form(32, 24), decoder="decord")[0]
    b = decoder.clips(tmp_path / "v.mp4", job, facts.as_dict(), form(32, 24), decoder="decord")[0]
    assert a == b
    frames = shown(a)
    assert round((frames[1].mean() - frames[0].mean()) / media.step) == 6


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m"])
def test_colours_are_those_of_the_source(decoder: Decoder, matrix: str) -> None:
    """The matrix that a video names is honoured: a JPEG of ours has the colours that were filmed."""
    colours = np.array([[200, 30, 40], [20, 180, 60], [30, 50, 210], [220, 220, 30]], np.uint8)
    frames = np.repeat(np.repeat(colours.reshape(1, 2, 2, 3), 48, 1), 64, 2)
    names = {"bt709": "ITU709", "smpte170m": "ITU601"}
    picture = av.VideoFrame.from_ndarray(frames[0], format="rgb24").reformat(
        format="yuv420p", dst_colorspace=names[matrix], dst_color_range="MPEG"
    )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.options = {"crf": "1", "x264-params": f"colormatrix={matrix}"}
        for number in range(2):
            picture.pts = number
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    facts = decoder.probe("video", buffer.getvalue())
    (sample,) = decoder.clips(buffer.getvalue(), [ClipJob([0], 5)], facts.as_dict(), form(128, 96), decoder="pyav")
    found = shown(sample)[0]
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert np.abs(found[48 * y + 24, 64 * x + 32] - frames[0, 48 * y + 24, 64 * x + 32]).max() <= 4


def test_a_turned_video_is_turned_back(decoder: Decoder, media: Any) -> None:
    """Rotation in the container is honoured: sizes are those shown, and so are the pixels."""
    mp4 = turned(media.mp4(4, 10))
    facts = decoder.probe("video", mp4)
    assert (facts.width, facts.height) == (48, 64)
    (sample,) = decoder.clips(mp4, [ClipJob([1], 8)], facts.as_dict(), form(48, 64), decoder="decord")
    frame = shown(sample)[0]
    assert facts.rotation in (90, 270)
    plain = frames_by_av(mp4)[1]
    assert np.abs(frame - np.rot90(plain, facts.rotation // 90)).mean() < 2
    # A clockwise quarter takes the dark left edge to the top.
    assert frame[:8].mean() < frame[-8:].mean()


def test_times_of_an_uneven_video_are_kept(decoder: Decoder, media: Any) -> None:
    """A variable rate is told by the times of all frames; jitter of the clock is not a variable rate."""
    stamps = [0, 40, 80, 120, 320, 520, 720, 760]
    facts = decoder.probe("video", uneven_mp4(media, stamps))
    assert facts.times is not None
    assert np.allclose(np.array(facts.times) * 1000, stamps, atol=0.1)
    assert decoder.probe("video", uneven_mp4(media, [0, 33, 67, 100, 133, 167])).times is None


def luma(planes: np.ndarray) -> np.ndarray:
    assert planes.dtype == np.uint8 and planes[1:].min() >= 127 and planes[1:].max() <= 129
    return planes[0]


def test_what_is_kept_is_the_middle_undistorted() -> None:
    """A wide picture loses its sides, a tall one top and bottom; pixels that are not square are made so. A frame of a
    decoder and an array of pixels are fitted alike."""
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255
    slim = wide[:, 10:30]
    for fit in (fit_pixels, lambda rgb, *args: fit_frame(av.VideoFrame.from_ndarray(rgb.copy(), "rgb24"), *args)):
        assert luma(fit(wide, 10, 10))[:, 2:8].min() > 250
        assert luma(fit(wide.transpose(1, 0, 2), 10, 10))[2:8].min() > 250
        assert luma(fit(slim, 10, 10, Fraction(1, 2))).mean() == pytest.approx(127.5, abs=13)
        assert luma(fit(wide, 5, 5))[2, 2] > 250  # smaller
        assert luma(fit(wide, 33, 17)).shape == (17, 33)  # odd, enlarged


def test_a_picture_that_shrinks_has_no_false_patterns() -> None:
    """A checkerboard of single pixels becomes grey, not another checkerboard."""
    board = (np.indices((200, 200)).sum(0) % 2 * 255).astype(np.uint8)
    small = luma(fit_pixels(np.stack([board] * 3, axis=-1), 64, 64))
    assert small[8:-8, 8:-8].std() < 12 and small.mean() == pytest.approx(127.5, abs=3)


def test_hashes_tell_pictures_apart_and_see_through_compression(photographs: list[Path]) -> None:
    """Scaled and compressed, a picture keeps its hash but for a few bits; another has another."""
    hashes = []
    for path in photographs:
        image = Image.open(path).convert("L")
        small = image.resize((300, 200))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=40)
        one = perceptual_hash(np.asarray(image))
        other = perceptual_hash(np.asarray(Image.open(buffer)))
        assert (one ^ other).bit_count() <= 3 and 0 <= one < 2**63
        hashes.append(one)
    assert (hashes[0] ^ hashes[1]).bit_count() > 16


def test_cuts_are_counted_and_fast_motion_is_none(decoder: Decoder, bikes: Path, photographs: list[Path]) -> None:
    """The five cuts of a natural film are found by clips of any stride; a clip without cuts has none, nor has a fast
    pan."""
    facts = decoder.probe("video", bikes).as_dict()

    def cuts(first: int, stride: int) -> int:
        job = ClipJob(range(first, first + 16 * stride, stride), 8)
        return decoder.clips(bikes, [job], facts, SampleForm(), decoder="pyav")[0].cuts

    assert [cuts(first, stride) for first, stride in ((0, 1), (0, 3), (20, 1), (18, 6), (60, 6), (230, 1))] == [
        0, 1, 1, 2, 2, 1,
    ]  # fmt: skip
    picture = np.asarray(Image.open(photographs[0]).convert("RGB").resize((1280, 853)))
    pan = [fit_pixels(picture[200:520, x : x + 512], 64, 40) for x in range(0, 768, 48)]
    assert count_cuts(np.stack(pan)) == 0


def test_motion_is_the_difference_of_neighbours(decoder: Decoder, media: Any) -> None:
    """Frames that grow lighter by a step differ by that; a held frame does not move."""
    mp4 = media.mp4(20, 10)
    facts = decoder.probe("video", mp4).as_dict()
    moving, still = decoder.clips(
        mp4, [ClipJob([2, 4, 6], 8), ClipJob([3, 3, 3], 8)], facts, form(64, 40), decoder="decord"
    )
    assert moving.motion == pytest.approx(2 * media.step, abs=1) and still.motion == 0
    assert still.parts[0] == still.parts[1] and len(set(still.phash)) == 1 and len(moving.phash) == 3


def test_a_deadline_is_a_reason_and_the_next_file_gets_a_fresh_child(bikes: Path, tmp_path: Path) -> None:
    """A file that the child opens and never comes back from costs its deadline and no more."""
    os.mkfifo(tmp_path / "endless.mp4")
    with Decoder(60) as decoder:
        facts = decoder.probe("video", bikes)
        assert decoder._child is not None
        stuck = decoder._child.pid
        decoder.seconds = 0.2
        with pytest.raises(MediaError) as caught:
            decoder.probe("video", tmp_path / "endless.mp4")
        assert caught.value.reason is RejectReason.DECODE_TIMEOUT
        assert not psutil.pid_exists(stuck)
        decoder.seconds = 60
        assert decoder.probe("video", bikes) == facts


def test_a_child_that_is_stopped_is_killed(bikes: Path) -> None:
    """Not even a process that no longer runs, as one that spins with the interpreter locked, outlives its deadline."""
    with Decoder(60) as decoder:
        decoder.probe("video", bikes)
        assert decoder._child is not None
        stuck = decoder._child.pid
        os.kill(stuck, signal.SIGSTOP)
        decoder.seconds = 0.2
        with pytest.raises(MediaError, match="decode_timeout"):
            decoder.probe("video", bikes)
        assert not psutil.pid_exists(stuck)


def test_answers_do_not_depend_on_the_files_before(bikes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that has grown is replaced, which nobody notices: a fresh one gives the same bytes."""
    job, children = [ClipJob(range(20, 52, 2), 12)], set()
    with Decoder(60) as decoder:
        facts = decoder.probe("video", bikes).as_dict()
        for limit in (2**40, 2**40, 0, 0):
            monkeypatch.setattr(decode, "MOST_RESIDENT", limit)
            children.add(decoder.start()._child)
            sample = decoder.clips(bikes, job, facts, SampleForm(), decoder="pyav")[0]
            assert sample == decoder.clips(bikes, job, facts, SampleForm(), decoder="pyav")[0]
    assert len(children) == 2


def test_what_decord_fails_at_is_asked_of_a_fresh_child(media: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its failure may be the fault of earlier files, and PyAV's frames are not the same: only a process at its first
    file may turn to PyAV."""

    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError

    data = media.mp4(8, 24)
    facts, asked = probe("video", data, 10**6).as_dict(), SampleForm(width=64, height=48).model_dump()
    cut = partial(clips, data, [ClipJob([0, 3], 8)], facts, asked)
    with monkeypatch.context() as patched:
        patched.setattr("decord.VideoReader", fails)
        with pytest.raises(MemoryError):
            cut("decord", lambda: False, is_first=False)
        assert cut("decord", lambda: False, is_first=True) == cut("pyav", lambda: False, is_first=False)
    with pytest.raises(MemoryError):
        cut("decord", lambda: True, is_first=False)


def test_a_film_that_decord_complains_about_is_the_same_in_any_child(bikes: Path) -> None:
    """As the first file of a child, and after others."""
    data, job = bytearray(bikes.read_bytes()), [ClipJob(range(4, 36, 2), 12)]
    with Decoder(60) as decoder:
        facts = decoder.probe("video", bikes).as_dict()
        for place in range(len(data) // 30, len(data) // 30 + 4):
            data[place] ^= 255
        answers, children = [], [decoder._child]
        for _ in range(2):
            try:
                answers.append(decoder.clips(bytes(data), job, facts, SampleForm(), decoder="decord"))
            except MediaError as error:
                answers.append(error.reason)
            children.append(decoder._child)
    assert answers[0] == answers[1] and len(set(children)) == 3


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
