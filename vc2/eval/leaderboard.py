"""Published results, as data, and ours laid below them.

Rows come in sets, and only some of them can be compared with a run of ours in mode `compat`:

    2024         EvalCrafter's leaderboard of January to April 2024: 700 prompts; its coefficients are those of
                 `vc2.eval.scorecard`, so the aspects follow from the raw metrics
    third party  raw metrics by the same program, as other papers print them
    2023         the release of October 2023: about 500 prompts of an earlier list, other statistics in DOVER, other
                 coefficients, which were never published: rows for history
    table 1      of VideoCrafter2's paper (arXiv 2401.09047): mixes scores of 2023, of 2024 and unknown ones
    table 3      of the same paper: DOVER's aesthetic and technical score of its eleven ways to train
    vbench       VBench's quality half, of its own 946 prompts

Tables 2 and 4 of the paper are votes of people (`read_table`). VideoCrafter2's own raw metrics were never published.

Units are those of the leaderboard of 2024: percent, except IS and Warping_Error (plain) and Flow_Score (mean pixels per
frame pair). The release of 2023 prints fractions; they are scaled here. The files in `published/` are as printed.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any, Literal

from vc2.errors import ConfigError
from vc2.eval.metrics import EVALCRAFTER, VBENCH_QUALITY
from vc2.eval.scorecard import ASPECTS as FORMULAS
from vc2.eval.scorecard import partial_aspect_scores

__all__ = [
    "ASPECT_LABELS",
    "ASPECT_NAMES",
    "ROWS",
    "Column",
    "Line",
    "PublishedRow",
    "Table",
    "as_json",
    "as_markdown",
    "comparison",
    "read_table",
    "results_by_mode",
    "rows_named",
    "shown",
]

ScoreSet = Literal["2024", "third party", "2023", "table 1", "table 3", "vbench"]

ASPECT_NAMES = (*FORMULAS, "total")


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """What somebody printed about a model."""

    name: str  #: its own among all rows
    model: str
    score_set: ScoreSet
    source: str
    is_comparable: bool  #: with ours in `compat`: the same list of prompts, formulas and coefficients
    num_prompts: int | None = None  #: None: not stated
    raw: Mapping[str, float] = field(default_factory=dict)  #: the metrics that are printed
    aspects: Mapping[str, float] = field(default_factory=dict)  #: and the total, where printed
    form: str = ""  #: size, rate and length of its videos, where known
    note: str = ""  #: in what it differs


# ---- the files ----


def read_table(name: str) -> list[dict[str, str]]:
    """The lines of a published table, as printed: `vbench_rows`, `human_correlation`, `raw_metrics_2024` ...

    Raises:
        ConfigError: If there is no such table.
    """
    folder = files("vc2.eval") / "published"
    try:
        text = (folder / f"{name}.csv").read_text(encoding="utf-8")
    except FileNotFoundError:
        there = sorted(file.name.removesuffix(".csv") for file in folder.iterdir() if file.name.endswith(".csv"))
        raise ConfigError(f"no published table {name!r}; there are {', '.join(there)}") from None
    return list(csv.DictReader(text.splitlines()))


_PAPER = "VideoCrafter2 paper (arXiv 2401.09047)"
_OF_2023 = "about 500 prompts of an earlier list, other DOVER statistics, other coefficients (unpublished)"


def _read_rows() -> Iterator[PublishedRow]:
    yield from _leaderboard_2024()
    yield from _third_party()
    yield from _release_2023()
    yield from _table_1()
    for line in read_table("videocrafter2_paper_table3"):
        yield PublishedRow(
            name=line["variant"],
            model=line["variant"],
            score_set="table 3",
            source=f"{_PAPER}, table 3",
            is_comparable=False,
            raw={"VQA_A": float(line["aesthetic"]), "VQA_T": float(line["technical"])},
            note="prompts, size and normalisation not stated",
        )
    for line in read_table("vbench_rows"):
        yield PublishedRow(
            name=f"{line['model']} (VBench)",
            model=line["model"],
            score_set="vbench",
            source="VBench leaderboard",
            is_comparable=False,
            num_prompts=946,
            raw={name: float(line[name.replace("_", " ")]) for name in ("quality", *VBENCH_QUALITY)},
            note="its own prompts, five videos each",
        )


def _leaderboard_2024() -> Iterator[PublishedRow]:
    raw = {(line["model"], line["version"]): line for line in read_table("raw_metrics_2024")}
    forms = {
        (line["model"], line["version"]): f"{line['resolution_wxh']}, {line['fps']} fps, {line['length']}"
        for line in read_table("model_info")
    }
    lines = sorted(read_table("aspect_scores_2024"), key=lambda line: -float(line["final_sum"]))
    for line in lines:
        model, version = key = line["model"], line["version"]
        # VideoCrafter2 is not in the benchmark's list of forms; how its row was made was said elsewhere.
        own = model == "VideoCrafter2"
        yield PublishedRow(
            name=f"{model[:-1]}, {version})" if model.endswith(")") else f"{model} ({version})",
            model=model,
            score_set="2024",
            source="EvalCrafter leaderboard, January to April 2024",
            is_comparable=True,
            num_prompts=700,
            raw=_metrics(raw[key]) if key in raw else {},
            aspects=_aspects(line),
            form="1024x640" if own else forms.get(key, ""),
            note="run at 1024 x 640; its raw metrics were not published" if own else "",
        )


def _third_party() -> Iterator[PublishedRow]:
    aspects = {line["model"]: line for line in read_table("aspect_scores_third_party")}
    for line in read_table("raw_metrics_third_party"):
        yield PublishedRow(
            name=line["model"],
            model=line["model"],
            score_set="third party",
            source=line["source"],
            is_comparable=True,
            raw=_metrics(line),
            aspects=_aspects(aspects.get(line["model"], {})),
            note=f"as printed in the {line['source']}",
        )


def _release_2023() -> Iterator[PublishedRow]:
    raw = {line["model"]: line for line in read_table("raw_metrics_2023")}
    for line in read_table("aspect_scores_2023"):
        fractions = _metrics(raw[line["model"]])
        yield PublishedRow(
            name=f"{line['model']} (scores of 2023)",
            model=line["model"],
            score_set="2023",
            source="EvalCrafter release, October 2023",
            is_comparable=False,
            num_prompts=500,
            raw={name: value if name == "Warping_Error" else 100 * value for name, value in fractions.items()},
            aspects=_aspects(line),
            note=_OF_2023,
        )


def _table_1() -> Iterator[PublishedRow]:
    for line in read_table("videocrafter2_paper_table1"):
        of = line["score_set"].partition(" ")[0]
        yield PublishedRow(
            name=f"{line['model']} (paper)",
            model=line["model"],
            score_set="table 1",
            source=f"{_PAPER}, table 1",
            is_comparable=of == "2024",
            num_prompts={"2023": 500, "2024": 700}.get(of, 512),
            aspects=_aspects(line),
            note={"2023": f"scores of 2023: {_OF_2023}", "2024": "scores of 2024"}.get(
                of, f"which scores is not stated: {line['score_set'].removeprefix('unknown').strip(' ()')}".rstrip(": ")
            ),
        )


def _metrics(line: Mapping[str, str]) -> dict[str, float]:
    return {name: float(line[name]) for name in EVALCRAFTER if line.get(name)}


def _aspects(line: Mapping[str, str]) -> dict[str, float]:
    columns = {name: "final_sum" if name == "total" else name for name in ASPECT_NAMES}
    return {name: float(line[column]) for name, column in columns.items() if line.get(column)}


ROWS: tuple[PublishedRow, ...] = tuple(_read_rows())


# ---- finding rows ----


def rows_named(names: Sequence[str]) -> tuple[PublishedRow, ...]:
    """Rows by name, each once, in the order asked for.

    Args:
        names: Of a row (`Gen2 (2023.09)`), of a model (`gen-2`: all its rows) or of a set (`2024`, `third-party`,
            `2023`, `table-1`, `table-3`, `vbench`, `all`); case, spaces and punctuation do not matter.

    Raises:
        ConfigError: If nothing has such a name; lists those there are.
    """
    found: dict[str, PublishedRow] = {}
    for name in names:
        asked = _folded(name)
        rows = [row for row in ROWS if asked in ("all", *map(_folded, (row.name, row.model, row.score_set)))]
        if not rows:
            models = dict.fromkeys(row.model for row in ROWS if row.score_set != "table 3")
            variants = dict.fromkeys(row.model for row in ROWS if row.score_set == "table 3")
            raise ConfigError(
                f"no published row {name!r}; there are the models {', '.join(models)}; of table 3 "
                f"{', '.join(variants)}; and the sets {', '.join(_sets())}, all"
            )
        found |= {row.name: row for row in rows}
    return tuple(found.values())


def _folded(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _sets() -> list[str]:
    return list(dict.fromkeys(row.score_set.replace(" ", "-") for row in ROWS))


# ---- ours below theirs ----


@dataclass(frozen=True, slots=True)
class Column:
    """A figure that the rows of a table have."""

    name: str
    label: str
    digits: int = 2


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a table: numbers by column, None where there is none."""

    name: str
    values: Mapping[str, float | None]
    model: str = ""
    note: str = ""
    is_comparable: bool = True  #: with ours
    is_ours: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)  #: of ours: why a number is missing, by column


@dataclass(frozen=True, slots=True)
class Table:
    """Published rows with ours at the end, and what has to be known to read them."""

    name: str
    title: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]


ASPECT_LABELS: Mapping[str, str] = {
    "visual_quality": "Visual quality",
    "text_video_alignment": "Text-video alignment",
    "motion_quality": "Motion quality",
    "temporal_consistency": "Temporal consistency",
    "total": "Total",
}
_ASPECT_COLUMNS = tuple(Column(name, label) for name, label in ASPECT_LABELS.items())
_RAW = tuple(Column(name, name, 4 if name == "Warping_Error" else 2) for name in EVALCRAFTER)
_VBENCH = tuple(Column(name, name.replace("_", " ")) for name in ("quality", *VBENCH_QUALITY))
_DOVER = (Column("VQA_A", "Aesthetic (VQA_A)"), Column("VQA_T", "Technical (VQA_T)"))

_RANGE_2024 = "Published rows of 2024 are averages over 700 prompts, each model at its own size, rate and length."
_ALIKE: tuple[ScoreSet, ...] = ("2023", "table 3", "vbench")  # what their rows differ in is said once, by the table
_COMPUTED = "aspects computed here from its raw metrics"


def comparison(benchmark: Mapping[str, Any], names: Sequence[str] = (), *, ours: str = "this run") -> tuple[Table, ...]:
    """Published rows, table by table, with ours in the row below.

    Ours is what was measured in `compat`, the published arithmetic; other modes are never laid beside published rows.

    Args:
        benchmark: As in a scorecard's summary; empty: published rows alone.
        names: Rows to show, as in `rows_named`; none: all.
        ours: Name of our row.

    Raises:
        ConfigError: If a name is not known.
    """
    rows = rows_named(names or ["all"])
    results = results_by_mode(benchmark).get("compat")
    words = _about_ours(benchmark, results)

    def table(name: str, title: str, columns: Sequence[Column], sets: Sequence[ScoreSet], *notes: str) -> Table | None:
        lines = [
            line
            for row in rows
            if row.score_set in sets and (line := _line(row, columns, is_aspects=columns is _ASPECT_COLUMNS))
        ]
        if not lines:
            return None
        if sets[0] in _ALIKE:
            lines = [replace(line, note="") for line in lines]
        if results is not None:
            lines.append(_our_line(results, columns, ours))
        return Table(name, title, tuple(columns), tuple(lines), (*notes, *words))

    now: tuple[ScoreSet, ...] = ("2024", "third party")
    tables = (
        table("aspects", "Aspects: leaderboard of 2024", _ASPECT_COLUMNS, now, _RANGE_2024),
        table(
            "metrics", "Raw metrics: leaderboard of 2024", _RAW, now, _RANGE_2024,
            "Percent, except IS and Warping_Error (plain) and Flow_Score (pixels per frame pair). OCR_Score is an "
            "error and Celebrity_ID_Score a distance: of both, and of Warping_Error, less is better.",
        ),
        table(
            "table1", "VideoCrafter2 paper, Table 1", _ASPECT_COLUMNS, ("table 1",),
            "This table mixes score sets: PikaLab, Gen2 and VideoCrafter1 carry scores of October 2023, Show-1 those "
            "of 2024, and the sets of the others are not known. Do not rank by it.",
            "About 500 to 512 prompts then, 700 now.",
        ),
        table(
            "table3", "VideoCrafter2 paper, Table 3: DOVER", _DOVER, ("table 3",),
            "F and P: all modules, or the temporal ones alone, learn in stage 1; Spa, Temp: what is tuned in stage 2, "
            "DIR directly, LORA by low-rank updates.",
            "The paper says neither which prompts and size it scored nor how DOVER's outputs were normalised; ours are "
            "VQA_A and VQA_T of the benchmark, whose two branches may be exchanged (an open question of DOVER).",
        ),
        table(
            "aspects2023", "Aspects: release of October 2023", _ASPECT_COLUMNS, ("2023",),
            f"For history, not to be compared: {_OF_2023}.",
        ),
        table(
            "metrics2023", "Raw metrics: release of October 2023", _RAW, ("2023",),
            f"For history, not to be compared: {_OF_2023}; its warping error is another figure, too.",
        ),
        table(
            "vbench", "VBench, quality half", _VBENCH, ("vbench",),
            "VBench scores five videos of each of its own 946 prompts, each dimension on a part of them; ours are "
            "of other prompts.",
        )
        if names or results is None or any(name in results.get("metrics", {}) for name in VBENCH_QUALITY)
        else None,
    )  # fmt: skip
    return tuple(found for found in tables if found is not None)


def _line(row: PublishedRow, columns: Sequence[Column], *, is_aspects: bool) -> Line | None:
    """None: the row has none of these columns."""
    values: Mapping[str, float] = row.aspects if is_aspects else row.raw
    notes = [row.form, row.note]
    if is_aspects and not values:
        # `_RAW` has all that the formulas of 2024 need.
        values = partial_aspect_scores(row.raw)[0] if row.is_comparable else {}
        notes.append(_COMPUTED)
    found = {column.name: values.get(column.name) for column in columns}
    if all(value is None for value in found.values()):
        return None
    return Line(row.name, found, row.model, "; ".join(note for note in notes if note), row.is_comparable)


def _our_line(results: Mapping[str, Any], columns: Sequence[Column], name: str) -> Line:
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    metrics, withheld = results.get("metrics", {}), results.get("withheld", {})
    scores = {**results.get("aspects", {}), **results.get("vbench", {})}
    substitutes = []
    for column in columns:
        if column.name in ASPECT_LABELS or column.name == "quality":
            value, why = scores.get(column.name), withheld.get(column.name)
        else:
            result = metrics.get(column.name, {})
            value, why = result.get("value"), result.get("not_measured")
            if value is not None and result.get("note"):
                substitutes.append(f"{column.name}: {result['note']}")
        if value is not None and math.isfinite(value):
            values[column.name] = float(value)
        else:
            values[column.name], reasons[column.name] = None, str(why or "not asked for")
    return Line(name, values, name, "; ".join(("mode compat", *substitutes)), is_ours=True, reasons=reasons)


def _about_ours(benchmark: Mapping[str, Any], results: Mapping[str, Any] | None) -> list[str]:
    """What has to be known of our row; or why there is none."""
    if results is None:
        if not results_by_mode(benchmark):
            return []
        modes = ", ".join(results_by_mode(benchmark))
        return [f"No row of ours: it was measured in mode {modes} alone, and published rows are only met in compat."]
    words = []
    prompts, videos = benchmark.get("prompts", {}), benchmark.get("videos", {})
    if videos:
        words.append(f"Ours: {videos.get('scored')} videos scored of {videos.get('expected')}.")
    if prompts and not prompts.get("whole_list", False):
        words.append(
            f"Ours does not cover the benchmark's list: {prompts.get('of_benchmark', 0)} of its 700 prompts. Averages "
            "over other prompts are not comparable with published ones."
        )
    return words


def results_by_mode(benchmark: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Metrics, aspects, what is withheld and averages of a scorecard's benchmark, by mode; also from scorecards of
    before there were several modes in one."""
    if "modes" in benchmark:
        return dict(benchmark["modes"])
    if not benchmark.get("metrics"):
        return {}
    metrics = {
        name: {"value": result["value"], "n": len(result.get("per_video", ()))} if "value" in result else result
        for name, result in benchmark["metrics"].items()
    }
    rest = {part: benchmark.get(part, {}) for part in ("aspects", "withheld", "averages")}
    return {benchmark.get("mode", "compat"): {"metrics": metrics, **rest}}


def as_json(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Tables in plain values."""
    return [
        {
            "name": table.name,
            "title": table.title,
            "columns": [column.name for column in table.columns],
            "rows": [
                {
                    "name": line.name,
                    "values": dict(line.values),
                    "ours": line.is_ours,
                    "comparable": line.is_comparable,
                    "note": line.note,
                    **({"reasons": dict(line.reasons)} if line.reasons else {}),
                }
                for line in table.lines
            ],
            "notes": list(table.notes),
        }
        for table in tables
    ]


def as_markdown(tables: Sequence[Table]) -> str:
    """Tables in Markdown: ours in bold, rows that cannot be compared with a dagger."""
    parts = []
    for table in tables:
        head = ["model", *(column.label for column in table.columns)]
        lines = [f"### {table.title}", "", f"| {' | '.join(head)} |", f"|---|{'---:|' * len(table.columns)}"]
        for line in table.lines:
            mark = "" if line.is_comparable else " †"
            name = f"**{_cell(line.name)}**" if line.is_ours else f"{_cell(line.name)}{mark}"
            cells = [shown(line, column) or ("not given" if line.is_ours else "") for column in table.columns]
            lines.append(f"| {' | '.join((name, *cells))} |")
        lines.append("")
        lines += [_plain(f"- {note}") for note in table.notes]
        lines += [_plain(f"- {line.name}: {line.note}") for line in table.lines if line.note]
        for line in table.lines:
            lines += [_plain(f"- {line.name}, {name}: not given: {reason}") for name, reason in line.reasons.items()]
        if not all(line.is_comparable for line in table.lines):
            lines.append("- † not comparable with ours")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n" if parts else ""


def shown(line: Line, column: Column) -> str:
    """A number as printed; empty where there is none. Published totals are whole."""
    value = line.values[column.name]
    if value is None:
        return ""
    digits = 0 if column.name == "total" and not line.is_ours and value.is_integer() else column.digits
    return f"{value:.{digits}f}"


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """Text that came from elsewhere cannot begin a line of its own."""
    return " ".join(text.split())
