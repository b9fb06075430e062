"""EvalCrafter's aspects fitted again to people's opinions, with weights that are not negative.

The published weights (`vc2.eval.scorecard.ASPECTS`) come from least squares without constraints, so flow lowers the
motion score and a still video wins it. Here every metric may only help: with errors and distances turned into 1 - x,

    opinion of a video = b + sum_m c_m (w_m x_m + d_m),    w >= 0, b and d free

where x is the printed metric in the published form's unit and c_m says how often the printed mean counts the video: 0
if the metric does not look at its prompt, 1 if it does, the number of classes for Detection_Score. So nothing stands in
for what is not there: the metric of a few prompts enters on these alone, beside an offset d of theirs, without which
its weight would tell what people think of such prompts. The mean over a set's videos has the published form,

    aspect = 100 (W . X + B),    W_m = share_m w_m,    B = b + sum_m share_m d_m,    share_m = mean of c_m

with X the set's printed metrics, and that is what is written. At which level the published fit was made is not known.

IS is one number a set, so it is fitted with as many points as there are sets, and left out below `LEAST_SETS`. Opinions
of 1..5 are averaged over raters and brought to 0..1 as (x - 1) / 4. Prompts are held out whole, the same ones for all
aspects, drawn from a seed; on their videos the fit is compared with the published weights and with the plain average.
To these two, a metric that does not look at a video counts as its mean over the fitted videos, so that a video gains
nothing by its prompt.

A feedback file is CSV or JSON lines: a prompt id, a model, and either a column for each aspect or `aspect` and
`opinion`; `rater` is optional. How the columns of the benchmark's own feedback file are called is not documented; other
names than those in `COLUMNS` have to be changed by hand. Rows in = used + rejected, always.

Solved by scipy's `nnls` (Lawson and Hanson 1974) on what is left of metrics and opinions when the free part has been
projected out (Frisch, Waugh and Lovell). Shapes: V videos, M metrics with weights, F free numbers.
"""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from scipy.optimize import nnls
from scipy.stats import kendalltau, spearmanr

from vc2.artifacts import Scorecard, load_manifest
from vc2.errors import ConfigError, StoreError
from vc2.eval.formulas import Mode
from vc2.eval.measure import UNREADABLE, Line
from vc2.eval.metrics import ASPECT_NAMES, METRICS
from vc2.eval.scorecard import ASPECTS, Aspect, Term, plain_averages
from vc2.seeding import derive_seed
from vc2.storage import Store

__all__ = [
    "LEAST_SETS",
    "Agreement",
    "AspectFit",
    "Feedback",
    "Opinion",
    "Refit",
    "Rejected",
    "SetScores",
    "load_coefficients",
    "read_feedback",
    "read_scores",
    "refit",
]

LEAST_SETS = 5  # for a weight of what has one number a set
LEAST_RANKED = 3  # videos for a rank correlation

#: Names of columns, with small letters and `_` for whatever is neither letter nor digit.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt_id", "id", "prompt", "video_id", "video"),
    "model": ("model", "model_name", "method"),
    "rater": ("rater", "rater_id", "annotator", "annotator_id", "user", "user_id"),
    "aspect": ("aspect",),
    "opinion": ("opinion", "rating", "score"),
    "visual_quality": ("visual_quality", "video_quality", "visual", "quality"),
    "text_video_alignment": (
        "text_video_alignment", "text_and_video_alignment", "text_to_video_alignment", "t2v_alignment", "alignment",
    ),
    "motion_quality": ("motion_quality", "motion"),
    "temporal_consistency": ("temporal_consistency", "temporal", "consistency"),
}  # fmt: skip

Video = tuple[str, str]  # model, prompt id


# ---- the feedback file ----


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a row says: opinions of 1..5 of one video by aspect."""

    row: int
    model: str
    prompt: str
    rater: str
    aspects: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that does not count, and why; `found` says what was in it."""

    row: int
    reason: str
    found: str = ""


@dataclass(frozen=True, slots=True)
class Feedback:
    """A feedback file. Rows are numbered from 1, without the head."""

    rows: int
    opinions: tuple[Opinion, ...]
    rejected: tuple[Rejected, ...]
    ignored: tuple[str, ...] = ()  #: columns that say nothing of an aspect


def read_feedback(path: Path) -> Feedback:
    """People's opinions of videos.

    Raises:
        ConfigError: If the file cannot be read, or has no columns for prompt, model and an aspect.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: no feedback ({error}); expected CSV (save a spreadsheet as that) or JSON lines, in UTF-8"
        ) from None
    rows = list(_json_rows(text) if text.lstrip().startswith("{") else _csv_rows(path, text))
    given = dict.fromkeys(name for row in rows if row for name in row)
    columns = _columns(path, list(given))
    opinions: list[Opinion] = []
    rejected: list[Rejected] = []
    for number, row in enumerate(rows, 1):
        said = _opinion(number, row, columns)
        opinions.append(said) if isinstance(said, Opinion) else rejected.append(said)
    ignored = tuple(name for name in given if name not in columns.values())
    return Feedback(len(rows), tuple(opinions), tuple(rejected), ignored)


def _json_rows(text: str) -> Iterator[Mapping[str, Any] | None]:
    """None for a line that is no JSON object."""
    for line in filter(str.strip, text.splitlines()):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        yield row if isinstance(row, dict) else None


def _csv_rows(path: Path, text: str) -> Iterator[Mapping[str, Any] | None]:
    head = text.lstrip().partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
    try:
        for row in reader:
            yield None if None in row else row  # more cells than columns
    except csv.Error as error:
        raise ConfigError(f"{path}: line {reader.line_num}: not CSV ({error})") from None


def _columns(path: Path, given: Sequence[str]) -> dict[str, str]:
    """What the file calls the columns that are needed, by our names."""
    plain = {re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"): name for name in reversed(given)}
    found = {
        ours: plain[next(alias for alias in aliases if alias in plain)]
        for ours, aliases in COLUMNS.items()
        if any(alias in plain for alias in aliases)
    }
    missing = [name for name in ("prompt", "model") if name not in found]
    if not found.keys() & set(ASPECT_NAMES) and not {"aspect", "opinion"} <= found.keys():
        missing.append("aspect")
    if missing:
        wanted = {name: " or ".join(COLUMNS[name]) for name in ("prompt", "model")}
        wanted["aspect"] = f"a column of {', '.join(ASPECT_NAMES)}, or the columns aspect and opinion"
        raise ConfigError(
            f"{path}: no column for {', '.join(missing)}; found {', '.join(given) or 'none'}; expected "
            + "; ".join(f"{name}: {wanted[name]}" for name in missing)
        )
    return found


def _opinion(number: int, row: Mapping[str, Any] | None, columns: Mapping[str, str]) -> Opinion | Rejected:
    if row is None:
        return Rejected(number, "damaged row")
    said = {ours: _cell(row.get(theirs)) for ours, theirs in columns.items()}
    if not said["prompt"] or not said["model"]:
        return Rejected(number, "no prompt id or no model")
    cells = {aspect: said.get(aspect, "") for aspect in ASPECT_NAMES}
    if said.get("aspect"):
        name = next((ours for ours in ASPECT_NAMES if _folded(said["aspect"]) in COLUMNS[ours]), None)
        if name is None:
            return Rejected(number, "unknown aspect", said["aspect"])
        cells[name] = said.get("opinion", "")
    opinions = {}
    for aspect, cell in cells.items():
        if not cell:
            continue
        try:
            opinions[aspect] = float(cell)
        except ValueError:
            return Rejected(number, "not a number", f"{aspect} {cell}")
        if not 1 <= opinions[aspect] <= 5:
            return Rejected(number, "out of 1..5", f"{aspect} {cell}")
    if not opinions:
        return Rejected(number, "no opinion")
    return Opinion(number, said["model"], said["prompt"], said.get("rater", ""), opinions)


def _folded(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _cell(value: Any) -> str:
    return "" if value is None else str(value).strip()


# ---- the scores of a set ----


@dataclass(frozen=True, slots=True)
class SetScores:
    """What was measured of a model's videos."""

    lines: tuple[Line, ...]
    inception: float | None = None  #: IS of the whole set
    source: str = ""  #: where the scores are from


def read_scores(store: Store, card: Scorecard, mode: Mode = "compat") -> SetScores:
    """The scores of a scorecard.

    Raises:
        StoreError: If the scorecard holds no metrics.
    """
    manifest = load_manifest(store, card.prefix)
    try:
        text = store.read(manifest.file("metrics.jsonl").key).decode()
        summary = json.loads(store.read(manifest.file("summary.json").key))
        lines = tuple(Line.model_validate_json(line) for line in text.splitlines())
    except (KeyError, ValueError) as error:
        raise StoreError(f"{card.uri}: no metrics of videos in it ({error}); score the videos again") from None
    measured = summary.get("benchmark", {}).get("modes", {}).get(mode, {}).get("metrics", {})
    return SetScores(lines, measured.get("IS", {}).get("value"), card.uri)


# ---- the fit ----


@dataclass(frozen=True, slots=True)
class Agreement:
    """Rank correlations with people's opinions, and over how many videos; None: there is none, for the reason given."""

    spearman: float | None
    kendall: float | None
    videos: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class AspectFit:
    """An aspect fitted again, or the reason why it was not."""

    aspect: Aspect | None
    withheld: str = ""
    fitted: int = 0  #: videos
    held_out: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)  #: videos with opinions that did not count, by reason
    zero: tuple[str, ...] = ()  #: metrics whose weight is held at zero
    left_out: Mapping[str, str] = field(default_factory=dict)  #: metrics that have no weight, and why
    agreement: Mapping[str, Agreement] = field(default_factory=dict)  #: of refit, published, average, when held out


@dataclass(frozen=True, slots=True)
class Refit:
    """All four aspects, and what became of the rows."""

    fits: Mapping[str, AspectFit]
    rows: int
    rejected: Mapping[str, int]
    examples: Mapping[str, str]  #: a rejected row for each reason
    prompts: tuple[str, ...]  #: those fitted
    held_out: tuple[str, ...]
    seed: int
    mode: Mode
    sources: Mapping[str, str]
    ignored: tuple[str, ...] = ()

    @property
    def used(self) -> int:
        return self.rows - sum(self.rejected.values())

    @property
    def aspects(self) -> dict[str, Aspect]:
        """What `load_coefficients` reads back."""
        return {name: fit.aspect for name, fit in self.fits.items() if fit.aspect}

    def as_json(self) -> dict[str, Any]:
        """In the form in which the published coefficients are kept, with all that is known of the fit beside them."""
        fits = {name: asdict(fit) for name, fit in self.fits.items()}
        return {
            "form": "aspect = 100 * (sum(weight_i * x_i) + intercept)",
            "label_scale": "the label is the mean 1..5 opinion, brought to 0..1 as (opinion - 1) / 4",
            "aspects": {
                name: {
                    "x": [_written(term) for term in aspect.terms],
                    "weight": [term.weight for term in aspect.terms],
                    "intercept": aspect.intercept,
                }
                for name, aspect in self.aspects.items()
            },
            "total": "sum of the four aspects",
            "units": "fractions 0..1 unless divided explicitly; IS plain; Flow_Score mean pixels per frame pair; "
            "OCR_Score is an error; Celebrity_ID_Score is a cosine distance",
            "fit": {
                "method": "least squares, weights not negative; metrics of some prompts beside an offset of theirs",
                "mode": self.mode,
                "seed": self.seed,
                "rows": {"in": self.rows, "used": self.used, "rejected": dict(self.rejected)},
                "prompts": len(self.prompts),
                "held_out_prompts": list(self.held_out),
                "scores": dict(self.sources),
                "aspects": {name: {k: v for k, v in fit.items() if k != "aspect"} for name, fit in fits.items()},
            },
        }

    def text_lines(self) -> Iterator[str]:
        """The fit for a terminal."""
        rejected = sum(self.rejected.values())
        yield f"{self.rows} rows = {self.used} used + {rejected} rejected"
        for reason, count in sorted(self.rejected.items(), key=lambda one: (-one[1], one[0])):
            yield f"  {count} {reason} ({self.examples[reason]})"
        if self.ignored:
            yield f"columns not read: {', '.join(self.ignored)}"
        yield (
            f"{len(self.prompts)} prompts fitted, {len(self.held_out)} held out (seed {self.seed}); {self.mode} scores "
            f"of {', '.join(self.sources)}"
        )
        for name, fit in self.fits.items():
            yield ""
            yield from _text(name, fit)


def refit(
    feedback: Feedback,
    scores: Mapping[str, SetScores],
    *,
    mode: Mode = "compat",
    seed: int = 0,
    held_out: float = 0.2,
) -> Refit:
    """Fit the aspects to people's opinions. The order of rows and of models changes nothing.

    Args:
        feedback: The opinions.
        scores: What was measured, by the models' names in the feedback.
        mode: Whose values are the metrics; only those of compat can be compared with the published weights.
        seed: Decides which prompts are held out.
        held_out: Their share, between 0 and 1; at least one prompt is held out, and one is not.

    Raises:
        ConfigError: If `held_out` is out of reach, or no row is about a video that has scores.
    """
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out is {held_out}; expected a share between 0 and 1")
    table = {model: _by_video(scores[model], mode) for model in sorted(scores)}
    rejected = list(feedback.rejected)
    of_video: dict[Video, list[Opinion]] = {}
    for row in feedback.opinions:
        prompt = _prompt_in(table.get(row.model, {}), row.prompt)
        if row.model not in table:
            rejected.append(Rejected(row.row, "no scores of that model", row.model))
        elif prompt is None:
            rejected.append(Rejected(row.row, "no scores of that video", f"{row.model} {row.prompt}"))
        else:
            of_video.setdefault((row.model, prompt), []).append(row)
    if not of_video:
        raise ConfigError(
            f"none of {feedback.rows} rows can be used: {_counted(rejected) or 'there are none'}; scores are of "
            f"{', '.join(table) or 'no model'}"
        )
    table = {model: table[model] for model in sorted({model for model, _ in of_video})}
    prompts = sorted({prompt for _, prompt in of_video}, key=lambda prompt: derive_seed(seed, "held out", prompt))
    number = min(max(1, round(held_out * len(prompts))), len(prompts) - 1)
    held = frozenset(prompts[:number])
    fits, fates = {}, {}
    for name in ASPECT_NAMES:
        data = _Data(name, table, {model: scores[model].inception for model in table}, of_video)
        fits[name], fates[name] = data.fit(held, mode), data.dropped
    for video, rows in of_video.items():
        for row in rows:
            whys = ["its aspect is withheld" if fits[name].withheld else fates[name].get(video) for name in row.aspects]
            if all(whys):
                rejected.append(Rejected(row.row, str(whys[0]), " ".join(video)))
    rejected.sort(key=lambda one: one.row)
    examples = {one.reason: f"row {one.row}: {one.found}".rstrip(": ") for one in reversed(rejected)}
    return Refit(
        fits=fits,
        rows=feedback.rows,
        rejected=dict(sorted(Counter(one.reason for one in rejected).items())),
        examples=examples,
        prompts=tuple(sorted(set(prompts) - held)),
        held_out=tuple(sorted(held)),
        seed=seed,
        mode=mode,
        sources={model: scores[model].source for model in table},
        ignored=feedback.ignored,
    )


def _by_video(scores: SetScores, mode: Mode) -> dict[str, dict[str, Line]]:
    """Lines by prompt and metric; IS is of the set and left out, but a video with that line alone is there."""
    found: dict[str, dict[str, Line]] = {}
    for line in scores.lines:
        if line.metric in METRICS and line.mode == ("compat" if METRICS[line.metric].one_mode else mode):
            found.setdefault(line.id, {})[line.metric] = line
    return found


def _prompt_in(known: Mapping[str, Any], given: str) -> str | None:
    """The id that a row means: as it stands, without the video's ending, or with zeros that a spreadsheet cut off."""
    stem = given.rsplit(".", 1)[0]
    return next((name for name in (given, stem, stem.zfill(4)) if name in known), None)


def _counted(rejected: Sequence[Rejected]) -> str:
    counts = Counter(one.reason for one in rejected)
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


class _Data:
    """The opinions of one aspect beside the metrics it is made of."""

    def __init__(
        self,
        name: str,
        table: Mapping[str, Mapping[str, Mapping[str, Line]]],
        inception: Mapping[str, float | None],
        of_video: Mapping[Video, Sequence[Opinion]],
    ) -> None:
        self.name, self.table, self.inception = name, table, inception
        self.labels = {
            video: (math.fsum(said) / len(said) - 1) / 4
            for video in sorted(of_video)
            if (said := [row.aspects[name] for row in of_video[video] if name in row.aspects])
        }
        self.left_out: dict[str, str] = {}
        self.terms = [term for term in ASPECTS[name].terms if self._is_measured(term.metric)]
        self.dropped = {video: reason for video in self.labels if (reason := self._reason(video))}

    def _is_measured(self, metric: str) -> bool:
        """Whether all sets have the metric."""
        if metric == "IS":
            without = [model for model, value in self.inception.items() if value is None]
        else:
            without = [model for model, videos in self.table.items() if not any(metric in of for of in videos.values())]
        if without:
            self.left_out[metric] = f"not measured of {', '.join(without)}"
        return not without

    def _reason(self, video: Video) -> str:
        """Why a video does not count; empty if it does."""
        lines = self.table[video[0]][video[1]]
        for term in self.terms:
            line = lines.get(term.metric)
            if term.metric == "IS" or line is None:
                continue
            if line.value is None or line.reason.startswith(UNREADABLE):  # DOVER's compat counts these as 0
                return f"{term.metric} has no value"
        return ""

    def printed(self, term: Term, video: Video) -> float:
        """The metric of a video in its printed unit, of its set if it is IS; NaN: it does not look at it."""
        if term.metric == "IS":
            return self.inception[video[0]] or 0.0
        line = self.table[video[0]][video[1]].get(term.metric)
        return math.nan if line is None or line.value is None else METRICS[term.metric].scale * line.value

    def times(self, term: Term, video: Video) -> float:
        """How often the printed mean counts a video."""
        line = self.table[video[0]][video[1]].get(term.metric)
        return 1.0 if term.metric == "IS" else line.weight if line is not None else 0.0

    def share(self, term: Term) -> float:
        """The same, averaged over all videos of the sets."""
        videos = [(model, prompt) for model, of in self.table.items() for prompt in of]
        return math.fsum(self.times(term, video) for video in videos) / len(videos)

    def columns(self, terms: Sequence[Term], videos: Sequence[Video]) -> tuple[np.ndarray, np.ndarray]:
        """c x and c of each video and term, both (V, M)."""
        times = np.array([[self.times(term, video) for term in terms] for video in videos]).reshape(
            len(videos), len(terms)
        )
        x = np.array([[_x(term, self.printed(term, video)) for term in terms] for video in videos])
        return np.where(times > 0, times * x.reshape(times.shape), 0.0), times

    def fit(self, held: frozenset[str], mode: Mode) -> AspectFit:
        counted = [video for video in self.labels if video not in self.dropped]
        fitted = [video for video in counted if video[1] not in held]
        ranked = [video for video in counted if video[1] in held]
        known = {
            "fitted": len(fitted),
            "held_out": len(ranked),
            "dropped": dict(sorted(Counter(self.dropped.values()).items())),
        }
        terms = self._varying(fitted)
        if not terms:
            return AspectFit(None, "no metric to fit", left_out=self.left_out, **known)
        products, times = self.columns(terms, fitted)
        free = [m for m in range(len(terms)) if not (times[:, m] == 1).all()]
        if len(fitted) <= len(terms) + 1 + len(free):
            reason = f"{len(fitted)} videos for {len(terms) + 1 + len(free)} numbers; needs more opinions"
            return AspectFit(None, reason, left_out=self.left_out, **known)
        labels = np.array([self.labels[video] for video in fitted])
        offsets = np.column_stack([np.ones(len(fitted)), times[:, free]])
        weights, offset = _least_squares(products, offsets, labels)
        shares = [self.share(term) if m in free else 1.0 for m, term in enumerate(terms)]
        aspect = Aspect(
            math.fsum([offset[0], *(d * shares[m] for d, m in zip(offset[1:], free, strict=True))]),
            tuple(
                Term(term.metric, float(w) * share, term.unit, term.from_one)
                for term, w, share in zip(terms, weights, shares, strict=True)
            ),
        )
        products, times = self.columns(terms, ranked)
        said = products @ weights + np.column_stack([np.ones(len(ranked)), times[:, free]]) @ offset
        return AspectFit(
            aspect,
            zero=tuple(term.metric for term, weight in zip(terms, weights, strict=True) if weight == 0),
            left_out=self.left_out,
            agreement={"refit": self._agreement(ranked, said), **self._others(fitted, ranked, mode)},
            **known,
        )

    def _varying(self, videos: Sequence[Video]) -> list[Term]:
        """The terms that can have a weight; why the others cannot is noted."""
        kept = []
        for term in self.terms:
            looked_at = [video for video in videos if self.times(term, video)]
            values = {self.printed(term, video) for video in looked_at}
            if term.metric == "IS" and len(self.inception) < LEAST_SETS:
                reason = f"one number a set, and there are {len(self.inception)} sets; needs {LEAST_SETS}"
            elif not looked_at:
                reason = "looks at none of the fitted videos"
            elif len(values) < 2:
                reason = "the same for all fitted videos"
            else:
                kept.append(term)
                continue
            self.left_out[term.metric] = reason
        return kept

    def _others(self, fitted: Sequence[Video], ranked: Sequence[Video], mode: Mode) -> dict[str, Agreement]:
        """How well the published weights and the plain average do."""
        means = {}
        for term in self.terms:
            values = [value for video in fitted if not math.isnan(value := self.printed(term, video))]
            means[term.metric] = math.fsum(values) / len(values) if values else math.nan
        raws = []
        for video in ranked:
            values = {term.metric: self.printed(term, video) for term in self.terms}
            raws.append({name: means[name] if math.isnan(value) else value for name, value in values.items()})
        published = ASPECTS[self.name]
        missing = published.missing(means)
        if mode != "compat":
            of_published = Agreement(None, None, 0, "made for compat values")
        elif missing:
            of_published = Agreement(None, None, 0, f"needs {', '.join(missing)}")
        else:
            of_published = self._agreement(ranked, [published(raw) for raw in raws])
        averages = [plain_averages(raw).get(self.name, math.nan) for raw in raws]
        return {"published": of_published, "average": self._agreement(ranked, averages)}

    def _agreement(self, videos: Sequence[Video], said: Sequence[float] | np.ndarray) -> Agreement:
        labels, count = [self.labels[video] for video in videos], len(videos)
        if count < LEAST_RANKED:
            return Agreement(None, None, count, f"{count} videos; needs {LEAST_RANKED}")
        if not np.isfinite(said).all():
            return Agreement(None, None, count, "needs all metrics that it averages")
        if len(set(labels)) < 2 or np.ptp(said) == 0:
            return Agreement(None, None, count, f"the same {'opinion' if len(set(labels)) < 2 else 'score'} for all")
        spearman: Any = spearmanr(said, labels)
        kendall: Any = kendalltau(said, labels)
        return Agreement(float(spearman.statistic), float(kendall.statistic), count)


def _x(term: Term, printed: float) -> float:
    return 1 - printed / term.unit if term.from_one else printed / term.unit


def _least_squares(products: np.ndarray, offsets: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """min |products w + offsets d - labels| over w >= 0 and any d: (V, M), (V, F), (V,) in, (M,) and (F,) out."""
    inverse = np.linalg.pinv(offsets)
    left = products - offsets @ (inverse @ products)
    sizes = np.linalg.norm(left, axis=0)  # metrics vary by anything from 1e-4 to 1: nnls has one tolerance for all
    sizes[sizes <= 1e-10 * np.linalg.norm(products, axis=0)] = np.inf  # wholly told by the offsets: no weight
    scaled, _ = nnls(left / sizes, labels - offsets @ (inverse @ labels))
    weights = scaled / sizes
    return weights, inverse @ (labels - products @ weights)


# ---- files and words ----


def _written(term: Term) -> str:
    """A term's metric as the coefficient files write it: percentages as fractions, DOVER's scores divided."""
    if METRICS[term.metric].scale == term.unit and not term.metric.startswith("VQA"):
        name = term.metric
    else:
        name = f"{term.metric}/{term.unit:g}"
    return f"1 - {name}" if term.from_one else name


_TERMS = {_written(term): term for aspect in ASPECTS.values() for term in aspect.terms}


def load_coefficients(path: Path) -> Mapping[str, Aspect]:
    """Aspects from a file that `vc2 refit` wrote, or from one of the same form, as the published ones are kept.

    Raises:
        ConfigError: If it cannot be read, or an aspect or a metric in it is not known.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))["aspects"]
        return {name: _aspect(path, name, form) for name, form in said.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ValidationError) as error:
        raise ConfigError(
            f"{path}: no coefficients ({error!r}); expected JSON with `aspects`, of each x, weight and intercept, as "
            "`vc2 refit` writes it"
        ) from None


def _aspect(path: Path, name: str, form: Mapping[str, Any]) -> Aspect:
    if name not in ASPECTS:
        raise ConfigError(f"{path}: aspect {name!r} is not known; expected {', '.join(ASPECTS)}")
    if unknown := [x for x in form["x"] if x not in _TERMS]:
        raise ConfigError(f"{path}: {name}: {', '.join(unknown)} not known; expected some of {', '.join(_TERMS)}")
    numbers = [float(number) for number in (form["intercept"], *form["weight"])]
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"{path}: {name}: a number is not finite")
    terms = zip(form["x"], numbers[1:], strict=True)
    return Aspect(numbers[0], tuple(_with_weight(_TERMS[x], weight) for x, weight in terms))


def _with_weight(term: Term, weight: float) -> Term:
    return Term(term.metric, weight, term.unit, term.from_one)


def _text(name: str, fit: AspectFit) -> Iterator[str]:
    dropped = "".join(f", {count} dropped: {reason}" for reason, count in fit.dropped.items())
    yield f"{name}: {fit.fitted} videos fitted, {fit.held_out} held out{dropped}"
    if fit.aspect is None:
        yield f"  withheld: {fit.withheld}"
    else:
        weights = [
            f"{term.weight:.4g} ({_written(term)})" if term.from_one else f"{term.weight:.4g} {_written(term)}"
            for term in fit.aspect.terms
        ]
        yield f"  {' + '.join(weights)} {'-' if fit.aspect.intercept < 0 else '+'} {abs(fit.aspect.intercept):.4g}"
    if fit.zero:
        yield f"  held at zero: {', '.join(fit.zero)}"
    for metric, reason in fit.left_out.items():
        yield f"  no weight for {metric}: {reason}"
    if fit.agreement:
        yield f"  {'on held-out prompts':20} Spearman  Kendall"
    for way, found in fit.agreement.items():
        if found.spearman is None or found.kendall is None:
            yield f"  {way:20} {found.reason}"
        else:
            yield f"  {way:20} {found.spearman:8.3f} {found.kendall:8.3f}"
    refitted, average = (fit.agreement.get(way) for way in ("refit", "average"))
    if refitted and average and (refitted.spearman or 0) <= (average.spearman or -1):
        yield "  the plain average agrees with people no worse: prefer it"
