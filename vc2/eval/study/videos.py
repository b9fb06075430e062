"""The videos of a study: found in the folders of models, put into the study's own without a trace of whose they are.

Files that browsers play are copied without their comments, titles and times (`containers`); others are coded anew as
H.264. All are opened in a process that is watched, for they are files of strangers.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import fmean

from vc2.data.config import SampleForm
from vc2.data.decode import ClipJob, Decoder, Facts, MediaError
from vc2.errors import ConfigError
from vc2.eval.study.containers import read_container
from vc2.progress import Progress, counted

__all__ = ["Gathered", "LeftOut", "Video", "gather", "short_hash", "videos_in", "write_timeless"]

ENDINGS = (".mp4", ".webm", ".m4v", ".mov", ".mkv", ".avi")
DECODE_SECONDS = 120.0  # for one file
RECODED_CRF = 10  # hardly to be told from the original
NO_TIME = 315619200  # 2 January 1980: times of files would tell which were copied together


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A video, or the two of a matchup, that raters will not see."""

    prompt: str
    model: str  # or A:B
    reason: str


@dataclass(frozen=True, slots=True)
class Video:
    """A video in the study."""

    name: str  # in the study
    sha256: str  # of the file it came from
    facts: Facts
    is_recoded: bool


@dataclass(slots=True)
class Gathered:
    """All videos that can be used, and those that cannot."""

    videos: dict[tuple[str, str], Video] = field(default_factory=dict)  # by model and prompt
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def mean_duration(self) -> float:
        """Seconds."""
        return fmean(video.facts.duration for video in self.videos.values())


def videos_in(folder: Path) -> dict[str, Path]:
    """Files by id.

    Raises:
        ConfigError: If there are none, or two of one id.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected one with 0000.mp4 and so on")
    for place in (folder, folder / "videos"):
        files = sorted(path for path in place.glob("*") if path.suffix.lower() in ENDINGS and path.name[0] != ".")
        videos: dict[str, Path] = {}
        for path in files:
            if path.stem in videos:
                raise ConfigError(f"{path} and {videos[path.stem].name} are videos of one id; leave one")
            videos[path.stem] = path
        if videos:
            return videos
    raise ConfigError(f"{folder}: no videos; expected 0000.mp4 and so on ({', '.join(ENDINGS)})")


def gather(
    seed: int,
    found: Mapping[str, Mapping[str, Path]],
    chosen: Mapping[str, str],
    folder: Path,
    progress: Progress,
) -> Gathered:
    """Put the videos of the chosen prompts into a folder, under names that are hashes of seed and content.

    Args:
        seed: Of the study.
        found: Files by model and id.
        chosen: Texts of the prompts by id.
        folder: Of the study's videos.
        progress: Told about each video.

    Raises:
        ConfigError: If a model is left without any.
    """
    gathered, done, total = Gathered(), 0, len(found) * len(chosen)
    with Decoder(DECODE_SECONDS) as decoder:
        for prompt in chosen:
            for model, videos in found.items():
                progress("videos", done, total)
                done += 1
                if prompt not in videos:
                    gathered.left_out.append(LeftOut(prompt, model, "no video"))
                    continue
                try:
                    gathered.videos[model, prompt] = _take(seed, decoder, videos[prompt], folder)
                except MediaError as error:
                    gathered.left_out.append(LeftOut(prompt, model, f"cannot be used: {error}"))
    progress("videos", done, total)
    for model, videos in found.items():
        if not any(name == model for name, _ in gathered.videos):
            reasons = sorted({left.reason for left in gathered.left_out if left.model == model})
            raise ConfigError(
                f"{model}: none of {counted(len(videos), 'video')} can be used ({'; '.join(reasons):.300})"
            )
    return gathered


def _take(seed: int, decoder: Decoder, path: Path, folder: Path) -> Video:
    """Put a video into the study, as it is where browsers play it.

    Raises:
        MediaError: If it cannot be decoded.
    """
    data = path.read_bytes()
    facts = decoder.probe("video", data)
    container = read_container(data)
    if container and container.is_played:
        content, ending = container.anonymous, container.ending
    else:
        content, ending = _recoded(decoder, data, facts), "mp4"
    name = f"{short_hash(seed, hashlib.sha256(content).hexdigest(), size=20)}.{ending}"
    write_timeless(folder / name, content)
    return Video(name, hashlib.sha256(data).hexdigest(), facts, not (container and container.is_played))


def _recoded(decoder: Decoder, data: bytes, facts: Facts) -> bytes:
    """The same video as H.264: every frame at its time, of square pixels, an odd row or column less."""
    width = max(8, round(facts.width * Fraction(facts.aspect)) // 2 * 2)
    form = SampleForm(width=width, height=max(8, facts.height // 2 * 2), codec="x264", x264_crf=RECODED_CRF)
    job = ClipJob(*_frames_at_a_whole_rate(facts))
    return decoder.clips(data, [job], facts.as_dict(), form, decoder="pyav")[0].parts[0]


def _frames_at_a_whole_rate(facts: Facts) -> tuple[list[int], int]:
    """Which frame is seen at each tick of a clock, and the ticks per second: the rate of the video where that is whole
    within a hundredth, else 60."""
    rate = Fraction(facts.rate)
    if facts.times is None and round(rate) > 0 and abs(rate - round(rate)) <= rate / 100:
        return list(range(facts.frames)), round(rate)
    starts = facts.times or [float(number / rate) for number in range(facts.frames)]
    frames, shown = [], 0
    for tick in range(max(1, round(facts.duration * 60))):
        while shown + 1 < len(starts) and starts[shown + 1] <= tick / 60 + 1e-6:
            shown += 1
        frames.append(shown)
    return frames, 60


def write_timeless(path: Path, data: bytes) -> None:
    """A file whose time says nothing."""
    path.write_bytes(data)
    os.utime(path, (NO_TIME, NO_TIME))


def short_hash(*names: int | str, size: int = 12) -> str:
    """A name that says nothing: hex digits of a sha256."""
    return hashlib.sha256("/".join(map(str, names)).encode()).hexdigest()[:size]
