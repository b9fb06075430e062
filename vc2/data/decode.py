"""Files of strangers are opened in a child process that is watched.

Decoders meet hostile input. They crash, and decord can spin for ever in native code that no Python timeout
interrupts. So files are opened in a child process (`Decoder`) that is given a deadline, killed when it misses it, and
dies with its parent. The child is reused for many files; a request is one JSON header (and the bytes, where there is
no path), an answer one JSON header and the samples, encoded (pixels leave the child only where they are what is asked
for: `Decoder.frames`). It has a limit of memory,
and no answer depends on the files before: what fails, or may have failed, for want of memory is asked again of a fresh
child. What it does with a file is in `media`.
"""

import atexit
import contextlib
import fcntl
import json
import os
import resource
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, cast

import numpy as np

from vc2.children import exit_code, wait_for
from vc2.data import media as work
from vc2.data.media import ClipJob, Encoded, Facts, Media, MediaError, sniff
from vc2.data.rejects import RejectReason
from vc2.errors import Vc2Error
from vc2.launch import die_with_parent

if TYPE_CHECKING:
    from vc2.data.config import SampleForm

__all__ = ["ClipJob", "Decoder", "Encoded", "Facts", "MediaError", "shared_decoder", "sniff"]

START_SECONDS = 120.0  # for the imports of the child, on a busy machine
MOST_MEMORY = 2**30  # of the child, bytes that it may ask for: a file that needs more is too large
MOST_RESIDENT = 2**29  # of the child between two files: one that holds more (decord leaks) is replaced
PIPE_BYTES = 2**20
PART_BYTES = 2**27  # of raw frames in one answer
HEADER = struct.Struct(">I")


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
        self._is_new = False

    def probe(self, media: Media, source: Path | bytes) -> Facts:
        """Facts of a file (see `media.probe`).

        Raises:
            MediaError: If it is not what `media` says, damaged, too large, or misses the deadline.
        """
        answer, _ = self._ask({"op": "probe", "media": media}, source)
        return Facts(**answer)

    def clips(
        self,
        source: Path | bytes,
        clips: Sequence[ClipJob],
        facts: Mapping[str, Any],
        form: "SampleForm",
        *,
        decoder: str,
    ) -> list[Encoded]:
        """Clips of exactly the frames asked for, scaled to cover the size of `form`, cropped to the centre and encoded.

        Args:
            source: The video.
            clips: The frame numbers (in presentation order) and the rate of each.
            facts: `frames`, `rotation` and `aspect` as the probe found them.
            form: Size and coding.
            decoder: decord or pyav.

        Raises:
            MediaError: If a frame cannot be decoded or the deadline is missed.
        """
        jobs = [{"indices": [int(number) for number in clip.indices], "fps": clip.fps} for clip in clips]
        known = {name: facts[name] for name in ("frames", "rotation", "aspect")}
        request = {"op": "clips", "jobs": jobs, "facts": known, "form": _coding(form), "decoder": decoder}
        return _samples(*self._ask(request, source))

    def picture(self, source: Path | bytes, form: "SampleForm") -> Encoded:
        """An image scaled to cover the size of `form`, cropped to the centre and encoded.

        Raises:
            MediaError: If it cannot be decoded or the deadline is missed.
        """
        return _samples(*self._ask({"op": "picture", "form": _coding(form)}, source))[0]

    def frames(self, source: Path | bytes, *, most_bytes: int = 2**32) -> tuple[np.ndarray, Facts]:
        """Every frame of a video as it is, (T, H, W, 3) uint8 RGB, and its facts. Pixels come in parts, so that the
        child's memory is bounded.

        Raises:
            MediaError: If it is no video, damaged, of frames of several sizes, larger than `most_bytes`, or misses the
                deadline.
        """
        answer, _ = self._ask({"op": "probe", "media": "film"}, source)
        facts = Facts(**answer)
        shape = (facts.frames, facts.height, facts.width, 3)
        size = facts.width * facts.height * 3
        if facts.frames * size > most_bytes:
            raise MediaError(
                RejectReason.TOO_LARGE,
                f"{facts.frames} frames of {facts.width} x {facts.height}: more than {most_bytes >> 20} MiB",
            )
        whole, step = np.empty(shape, np.uint8), max(1, PART_BYTES // size)
        for start in range(0, facts.frames, step):
            stop = min(start + step, facts.frames)
            request = {"op": "frames", "start": start, "stop": stop, "rotation": facts.rotation}
            _, data = self._ask(request, source)
            if len(data) != (stop - start) * size:
                raise MediaError(RejectReason.UNDECODABLE, "its frames differ in size")
            whole[start:stop] = np.frombuffer(data, np.uint8).reshape(stop - start, *shape[1:])
        return whole, facts

    def start(self) -> Self:
        """Start the child now, from this thread, and do not wait for it."""
        self._running()
        return self

    def close(self) -> None:
        """End the child; a later request starts another."""
        if (child := self._child) is not None:
            self._child = None
            child.kill()
            wait_for(child)
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
        failure = MediaError(RejectReason.DECODER_CRASHED, "the decoder process died, twice")
        for _ in range(2):  # again in a fresh child: the first may have died, or be short of memory, of earlier files
            try:
                answer, data = self._once(header, payload)
            except EOFError:
                continue
            if answer.pop("resident") > MOST_RESIDENT:
                self.close()
            if "reason" not in answer:
                return answer, data
            failure = MediaError(RejectReason(answer["reason"]), answer["detail"])
            if failure.reason is not RejectReason.TOO_LARGE or not answer["memory"]:
                break
            self.close()
        raise failure

    def _once(self, header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytearray]:
        child = self._running()
        try:
            self._greet(child)
            until = time.monotonic() + self.seconds
            _send(cast(BinaryIO, child.stdin), header, payload)
            return self._receive(until)
        except TimeoutError:
            self.close()
            raise MediaError(RejectReason.DECODE_TIMEOUT, f"no result within {self.seconds:g} s") from None
        except (EOFError, BrokenPipeError):
            self.close()
            raise EOFError from None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and exit_code(self._child) is not None:
            self.close()
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "vc2.data.decode"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # codecs chatter about every damaged frame
            )
            for pipe in (self._child.stdin, self._child.stdout):
                _widen(cast(BinaryIO, pipe))
            self._is_new = True
        return self._child

    def _greet(self, child: subprocess.Popen[bytes]) -> None:
        """Wait until a new child says that it is ready. One that was killed is no reason to give up."""
        if not self._is_new:
            return
        try:
            self._receive(time.monotonic() + START_SECONDS)
        except (TimeoutError, EOFError) as error:
            if isinstance(error, EOFError) and (wait_for(child) or 0) < 0:
                raise
            self.close()
            raise Vc2Error(f"`{sys.executable} -m vc2.data.decode` does not start; run it by hand to see why") from None
        self._is_new = False

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


def _widen(pipe: BinaryIO) -> None:
    """Room in a pipe for a whole picture, so that the two ends need not take turns."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # beyond what this user may have
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _send(pipe: BinaryIO, header: dict[str, Any], payload: bytes | memoryview) -> None:
    text = json.dumps(header).encode()
    pipe.write(HEADER.pack(len(text)) + text)
    pipe.write(payload)
    pipe.flush()


def _coding(form: "SampleForm") -> dict[str, Any]:
    return form.model_dump(include={"width", "height", "codec", "jpeg_quality", "x264_crf"})


def _samples(answer: dict[str, Any], data: bytearray) -> list[Encoded]:
    samples, place = [], 0
    for said in answer["samples"]:
        ends = list(accumulate(said["sizes"], initial=place))
        parts = tuple(bytes(data[start:end]) for start, end in pairwise(ends))
        samples.append(Encoded(said["ending"], parts, tuple(said["phash"]), said["motion"], said["cuts"]))
        place = ends[-1]
    return samples


# ---- the side of the child ----


def _serve() -> None:
    die_with_parent()
    answers, heard = os.fdopen(os.dup(1), "wb"), _listen()
    requests = sys.stdin.buffer
    import av.logging
    import cv2
    from PIL import Image

    av.logging.set_level(None)
    cv2.setNumThreads(1)
    Image.init()
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    _send(answers, {}, b"")
    is_first = True
    while header := requests.read(HEADER.size):
        request = json.loads(requests.read(HEADER.unpack(header)[0]))
        data: bytes | memoryview = b""
        try:
            source = request["path"] if "path" in request else requests.read(request["bytes"])
            answer, data = _answer(request, source, lambda: _complaints(heard), is_first=is_first)
        except MediaError as error:
            answer = {"reason": str(error.reason), "detail": error.detail, "memory": False}
        except MemoryError:
            detail = f"needs more than {MOST_MEMORY >> 20} MiB to decode"
            answer = {"reason": str(RejectReason.TOO_LARGE), "detail": detail, "memory": True}
        except (ImportError, NameError):  # not the file's fault
            raise
        except Exception as error:  # whatever a codec makes of a damaged file
            answer = {"reason": str(RejectReason.UNDECODABLE), "detail": type(error).__name__, "memory": False}
        _send(answers, {**answer, "resident": _resident(), "bytes": len(data)}, data)
        source, data, is_first = b"", b"", False


def _listen() -> int:
    """Have all that is printed from now on go into a pipe that keeps the first of it; returns its other end."""
    heard, said = os.pipe()
    os.set_blocking(heard, False)
    os.set_blocking(said, False)
    os.dup2(said, 2)
    os.dup2(said, 1)
    return heard


def _complaints(heard: int) -> bool:
    found = False
    with contextlib.suppress(BlockingIOError):
        while os.read(heard, 2**16):
            found = True
    return found


def _resident() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux
        return 0


def _answer(
    request: dict[str, Any], source: str | bytes, complaints: Callable[[], bool], *, is_first: bool
) -> tuple[dict[str, Any], bytes | memoryview]:
    if request["op"] == "probe":
        return work.probe(request["media"], source, request["max_pixels"]).as_dict(), b""
    if request["op"] == "frames":
        return {}, work.frames(source, request["start"], request["stop"], request["rotation"]).data.cast("B")
    if request["op"] == "picture":
        samples = [work.picture(source, request["form"], request["max_pixels"])]
    else:
        jobs = [ClipJob(**job) for job in request["jobs"]]
        known, form, decoder = request["facts"], request["form"], request["decoder"]
        samples = work.clips(source, jobs, known, form, decoder, complaints, is_first)
    return {"samples": [_described(sample) for sample in samples]}, b"".join(
        part for sample in samples for part in sample.parts
    )


def _described(sample: Encoded) -> dict[str, Any]:
    said = {name: getattr(sample, name) for name in ("ending", "phash", "motion", "cuts")}
    return said | {"sizes": [len(part) for part in sample.parts]}


if __name__ == "__main__":
    _serve()
