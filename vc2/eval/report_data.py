"""What there is to show in a report, in plain values; whoever knows the artifacts fills it in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vc2.eval.scorecard import Summary

__all__ = [
    "BeforeAfter",
    "Judged",
    "LineageNode",
    "LossCurve",
    "ReportData",
    "SampleRow",
    "ScoreRow",
    "ShardSheet",
    "SheetItem",
    "Timing",
]


@dataclass(frozen=True)
class SampleRow:
    """A prompt with what the model made of it and a real clip of the same thing. Videos are H.264 mp4 files."""

    prompt: str
    sample: bytes | None  #: None: there is nothing to show, `missing` says why
    real: bytes | None = None  #: None: no real clip shows this
    scores: Mapping[str, float] = field(default_factory=dict)  #: of the sample, by judge
    real_scores: Mapping[str, float] = field(default_factory=dict)
    note: str = ""  #: for example that this combination is in no training caption
    id: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)  #: what the prompt asks for, in words: count -> 2 dog
    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  #: raw, by mode and metric
    #: Why there is no value, or what is strange about it, likewise.
    reasons: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    missing: str = ""
    sha256: str = ""  #: of the whole video, where `sample` is a preview of it
    size: tuple[int, int] | None = None  #: width and height of `sample`; None: those of the report


@dataclass(frozen=True)
class BeforeAfter:
    """The same prompt and seed from the checkpoint of stage 1 and of stage 2."""

    prompt: str
    before: bytes
    after: bytes
    before_scores: Mapping[str, float] = field(default_factory=dict)
    after_scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LossCurve:
    """Logged losses of a training stage; `trivial` is what predicting the mean would cost."""

    stage: str
    points: Sequence[tuple[float, float]]
    trivial: float | None = None
    note: str = ""


@dataclass(frozen=True)
class SheetItem:
    """A sample of a shard: one picture, or the frames of a clip at `fps`; JPEG or PNG files."""

    caption: str
    frames: Sequence[bytes]
    fps: float | None = None


@dataclass(frozen=True)
class ShardSheet:
    """What became of a source: rows = samples + duplicates + rejects."""

    source: str
    rows: int
    samples: int
    rejects: Mapping[str, int] = field(default_factory=dict)  #: rows by reason
    duplicates: int = 0
    shards: int = 0
    size: int = 0  #: bytes of the shards
    items: Sequence[SheetItem] = ()


@dataclass(frozen=True)
class Judged:
    """What a judge looks at. Figures of zeros and ones are shown as shares."""

    name: str
    label: str
    what: str = ""
    better: Literal["up", "down", ""] = "up"


@dataclass(frozen=True)
class ScoreRow:
    """A set of videos and what the judges say of it on average; the last that is no reference is the model's."""

    name: str
    scores: Mapping[str, Summary]
    is_reference: bool = False  #: real clips: what the judges say of the truth


@dataclass(frozen=True)
class LineageNode:
    """An artifact; `inputs` are names of other nodes."""

    name: str
    kind: str
    fingerprint: str
    content_digest: str = ""
    inputs: Sequence[str] = ()
    note: str = ""


@dataclass(frozen=True)
class Timing:
    """How long a stage took; `is_reused`: in an earlier run, not in this one."""

    stage: str
    seconds: float
    is_reused: bool = False


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows. Empty parts are said to be empty, not left out in silence; where nothing was trained,
    the parts about training are left out."""

    trained_minutes: float | None = None  #: None: nothing was trained for it, videos were given
    title: str = "vc2: from raw data to a video model"
    about: str = ""  #: whose videos these are, where no model was trained
    notes: Sequence[str] = ()  #: what is to be known of the videos as they are shown
    on: str = "your CPU"  #: completes "trained N minutes on ..."
    hardware: str = ""
    rows: Sequence[SampleRow] = ()
    fps: float = 8.0  #: at which the videos are shown
    size: tuple[int, int] = (80, 48)  #: width and height of the videos in pixels
    before_after: Sequence[BeforeAfter] = ()
    curves: Sequence[LossCurve] = ()
    judges: Sequence[Judged] = ()
    scores: Sequence[ScoreRow] = ()
    benchmark: Mapping[str, Any] = field(default_factory=dict)  #: as in a scorecard's summary
    compare: Sequence[str] = ()  #: published rows to lay beside it, see `leaderboard.rows_named`; empty: all
    shards: Sequence[ShardSheet] = ()
    lineage: Sequence[LineageNode] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    timings: Sequence[Timing] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)  #: words for the top, by label
    created_at: str = ""
    fingerprint: str = ""

    @property
    def sentence(self) -> str:
        """Whose videos these are, in words: of a model that was trained for so long, or given."""
        if self.trained_minutes is not None:
            return f"from a model trained {_minutes(self.trained_minutes)} on {self.on}"
        return f"of {self.about}" if self.about else ""

    @property
    def videos(self) -> str:
        """How many videos there are to show, in words."""
        count = sum(row.sample is not None for row in self.rows)
        return "One video" if count == 1 else f"{count or 'No'} videos"

    @property
    def all_judges(self) -> Sequence[Judged]:
        """The judges as described, then any other that gave a figure."""
        known = {judge.name for judge in self.judges}
        others = dict.fromkeys(name for row in self.scores for name in row.scores if name not in known)
        return (*self.judges, *(Judged(name, name.replace("_", " "), better="") for name in others))


def _minutes(minutes: float) -> str:
    if minutes >= 120:
        return f"{minutes / 60:.0f} hours"
    number = f"{minutes:.1f}".removesuffix(".0") if minutes < 3 else f"{minutes:.0f}"
    return f"{number} minute{'' if number == '1' else 's'}"
