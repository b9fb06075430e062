"""The scores of a report: judges, a benchmark's metrics and aspects in both modes, published rows, and what is missing.

Modes stand side by side and are never mixed: published rows are met by ours in `compat` alone. A figure that was not
measured, a score that is withheld and a video that gave no value each stand there with their reason.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vc2.eval.charts import Ranked, histogram_svg, ranking_svg
from vc2.eval.leaderboard import (
    ASPECT_LABELS,
    ROWS,
    Line,
    Table,
    comparison,
    read_table,
    results_by_mode,
    shown,
)
from vc2.eval.metrics import EVALCRAFTER, METRICS, Metric
from vc2.eval.page import column, element, empty, number, row_head, section, table
from vc2.eval.report_data import ReportData, SampleRow
from vc2.eval.report_videos import digits_of
from vc2.eval.scorecard import Summary

__all__ = ["comparisons", "count_words", "headline", "missing", "scores", "valueless", "withheld_words"]

HISTORY = ("aspects2023", "metrics2023")  # tables that are folded away
MANY = 12  # videos that are named where several have the same trouble


def headline(data: ReportData) -> dict[str, str]:
    """The scores in words, by label, for the top of the page."""
    modes = results_by_mode(data.benchmark)
    if not modes:
        return {}
    said: dict[str, str] = {}
    if results := modes.get("compat"):
        aspects = results.get("aspects", {})
        said = {
            f"{label}, compat": f"{aspects[name]:.2f}" if name in aspects else "not given"
            for name, label in ASPECT_LABELS.items()
        }
    for mode, results in modes.items():
        metrics = results.get("metrics", {})
        said[f"metrics measured, {mode}"] = f"{sum('value' in result for result in metrics.values())} of {len(metrics)}"
    if videos := data.benchmark.get("videos"):
        said["videos scored"] = f"{videos.get('scored')} of {videos.get('expected')}"
    return said


def scores(data: ReportData) -> str:
    """Judges, aspects, metrics and how they are distributed."""
    lead = (
        "Judges that know what each prompt promises look at every video. The real clips stand beside as the reference: "
        "what the judges say of the truth itself."
        if data.scores
        else "What was measured, by mode: compat, the published arithmetic with its flaws, which alone is laid beside "
        "published rows; fixed, with the flaws mended."
    )
    judged = _judge_table(data) if data.scores or not results_by_mode(data.benchmark) else ""
    return section("scores", "Scores", lead, judged, _benchmark(data))


# ---- judges ----


def _judge_table(data: ReportData) -> str:
    judges = [judge for judge in data.all_judges if any(judge.name in row.scores for row in data.scores)]
    if not judges:
        return empty("No judges were asked.")
    rows = []
    for judge in judges:
        arrow = {"up": "higher is better", "down": "lower is better", "": ""}[judge.better]
        cells = [_score_cell(row.scores.get(judge.name), row.is_reference) for row in data.scores]
        words = "; ".join(part for part in (judge.what, arrow) if part)
        rows.append(element("tr", row_head(judge.label, words), *cells))
    head = [column("judge", is_number=False), *(column(row.name) for row in data.scores)]
    return table("Scores", head, rows, "judges")


def _score_cell(summary: Summary | None, is_reference: bool) -> str:
    style = "num ref" if is_reference else "num"
    if summary is None:
        return element("td", "none", class_=f"{style} muted")
    if not summary.is_share:
        return element("td", number(summary.mean), element("small", f"n = {summary.n}"), class_=style)
    percent = f"{100 * summary.mean:.0f}"
    bar = element("span", element("i", style=f"width:{percent}%"), class_="bar")
    return element("td", f"{percent} %", element("small", count_words(summary)), bar, class_=style)


def count_words(summary: Summary) -> str:
    """Of a share: how many of how many."""
    return f"{round(summary.mean * summary.n)} of {summary.n}"


# ---- the benchmark ----


def _benchmark(data: ReportData) -> str:
    modes = results_by_mode(data.benchmark)
    if not modes:
        return ""
    name = str(data.benchmark.get("name", "evalcrafter"))
    counted = ", ".join(
        f"{_num_measured(results)} of {len(results['metrics'])} metrics measured in {escape(mode)}"
        for mode, results in modes.items()
    )
    words = (
        f"{counted}. A metric without its weights is not measured, and a score that needs it is not given. The aspects "
        "were fitted to people's opinions in 2024; the plain averages beside them use no weights and leave out what is "
        "missing."
    )
    return "".join(
        (
            element("h3", "EvalCrafter" if name == "evalcrafter" else escape(name), class_="apart", id="evalcrafter"),
            element("p", words, class_="muted"),
            _warnings(data),
            _aspect_table(modes),
            _rankings(data),
            _metric_table(modes),
            _distributions(data.rows),
            _trust(),
        )
    )


def _num_measured(results: Mapping[str, Any]) -> int:
    return sum("value" in result for result in results.get("metrics", {}).values())


def _warnings(data: ReportData) -> str:
    warnings = [element("li", escape(str(words))) for words in data.benchmark.get("warnings", ())]
    if not warnings:
        return ""
    return element("div", element("h4", "Read these numbers with care"), element("ul", *warnings), class_="warnings")


def _aspect_table(modes: Mapping[str, Mapping[str, Any]]) -> str:
    rows, said = [], []
    for mode, results in modes.items():
        for label, part in (("fitted", "aspects"), ("plain average", "averages")):
            values = results.get(part, {})
            if part == "averages" and not values:
                continue
            cells = [
                element("td", f"{values[name]:.2f}", class_="num")
                if name in values
                else element("td", "not given" if part == "aspects" else "", class_="num none")
                for name in ASPECT_LABELS
            ]
            style = "ours" if (mode, part) == ("compat", "aspects") else None
            rows.append(element("tr", row_head(f"{label}, {mode}"), *cells, class_=style))
        said += [element("li", escape(f"{mode}: {words}")) for words in withheld_words(results)]
        if quality := results.get("vbench", {}).get("quality"):
            said.append(element("li", escape(f"{mode}: VBench's quality half is {quality:.2f}")))
    head = [column("score", is_number=False), *(column(label) for label in ASPECT_LABELS.values())]
    reasons = element("ul", *said, class_="notes") if said else ""
    return table("Aspects", head, rows) + reasons


def withheld_words(results: Mapping[str, Any]) -> list[str]:
    """Why scores are not given: those with one reason together."""
    together: dict[str, list[str]] = {}
    for name, reason in results.get("withheld", {}).items():
        together.setdefault(str(reason), []).append(ASPECT_LABELS.get(name, name).lower())
    return [f"{', '.join(names)} not given: {reason}" for reason, names in together.items()]


def _rankings(data: ReportData) -> str:
    """Where we stand among the published rows that may be compared."""
    found = next((table for table in _tables(data) if table.name == "aspects"), None)
    if found is None or not any(
        line.is_ours and any(v is not None for v in line.values.values()) for line in found.lines
    ):
        return ""
    charts = []
    for wanted in found.columns:
        ranked = [
            Ranked(line.model, value, line.is_ours)
            for line in found.lines
            if line.is_comparable and (value := line.values[wanted.name]) is not None
        ]
        if any(row.is_ours for row in ranked):
            digits = 0 if wanted.name == "total" else 2
            chart = ranking_svg(wanted.label, ranked, digits)
            charts.append(element("div", element("h4", wanted.label), chart, class_="card plot"))
    words = "A dot for each published row that may be compared, a diamond for this run in mode compat."
    if not data.benchmark.get("prompts", {}).get("whole_list", True):
        words += " This run is of other prompts than theirs, so its places say little."
    return element("p", words, class_="muted apart") + element("div", *charts, class_="plots wide")


def _metric_table(modes: Mapping[str, Mapping[str, Any]]) -> str:
    names = dict.fromkeys(name for results in modes.values() for name in results.get("metrics", {}))
    groups = {
        label: [name for name in EVALCRAFTER if name in names and METRICS[name].aspect == aspect]
        for aspect, label in ASPECT_LABELS.items()
    }
    groups["Other metrics"] = [name for name in names if name not in EVALCRAFTER]
    rows = []
    for label, members in groups.items():
        if members:
            head = element("th", label, colspan=len(modes) + 3, scope="rowgroup")
            rows.append(element("tr", head, class_="group"))
        rows += [_metric_row(name, METRICS.get(name), modes) for name in members]
    head = [
        column("metric", is_number=False),
        *(column(mode, is_number=False) for mode in modes),
        column("published 2024"),
        column("unit", is_number=False),
    ]
    return element(
        "details",
        element("summary", f"The {len(names)} metrics"),
        table("Metrics", head, rows, "metrics"),
        class_="more",
        open=True,
    )


def _metric_row(name: str, metric: Metric | None, modes: Mapping[str, Mapping[str, Any]]) -> str:
    arrows = {"up": "↑ higher is better", "down": "↓ lower is better", "neutral": "neutral"}
    published = [row.raw[name] for row in ROWS if row.score_set == "2024" and name in row.raw]
    span = f"{min(published):g} – {max(published):g}" if published else ""
    cells = [
        element("td", _result(name, metric, results.get("metrics", {}).get(name)), class_="words")
        for results in modes.values()
    ]
    unit = (metric.unit or "plain") if metric else ""
    head = row_head(name, arrows[metric.direction] if metric else "")
    return element("tr", head, *cells, element("td", span, class_="num"), element("td", unit))


def _result(name: str, metric: Metric | None, result: Mapping[str, Any] | None) -> str:
    if result is None:
        words = "the same: nothing to mend" if metric and metric.one_mode else "not asked for"
        return element("span", words, class_="muted")
    if "value" not in result:
        return element(
            "span", f"not measured: {escape(str(result.get('not_measured', 'no reason given')))}", class_="none"
        )
    lines = [f"n = {result.get('n', 0)}"]
    if lost := sum(result.get("without_value", {}).values()):
        lines.append(f"{lost} without a value")
    if note := result.get("note"):
        lines.append(str(note))
    return f"{result['value']:.{digits_of(name)}f}" + element("small", escape("; ".join(lines)))


def _distributions(rows: Sequence[SampleRow]) -> str:
    names = dict.fromkeys(name for row in rows for values in row.values.values() for name in values)
    charts = []
    for name in (*(name for name in METRICS if name in names), *sorted(set(names) - set(METRICS))):
        scale = METRICS[name].scale if name in METRICS else 1.0
        series = {
            mode: [scale * row.values[mode][name] for row in rows if name in row.values.get(mode, {})]
            for mode in sorted({mode for row in rows for mode in row.values})
        }
        series = {mode: values for mode, values in series.items() if values}
        unit = METRICS[name].unit if name in METRICS else ""
        counts = ", ".join(f"{mode} n = {len(values)}" for mode, values in series.items())
        if len(series) > 1 and len({len(values) for values in series.values()}) == 1:
            counts = f"n = {len(next(iter(series.values())))}"
        head = element("h4", escape(name), element("small", escape(" · ".join(filter(None, (unit, counts))))))
        charts.append(element("div", head, histogram_svg(name, series), class_="card plot"))
    if not charts:
        return ""
    modes = sorted({mode for row in rows for mode in row.values})
    swatches = [
        element("span", element("span", class_=f"swatch {style}", aria_hidden="true"), f" {words}: {escape(mode)}; ")
        for style, words, mode in zip(("first", "second"), ("filled", "outlined"), modes, strict=False)
    ]
    key = element("p", *swatches, "upright lines are the means.", class_="muted small")
    return element(
        "details",
        element("summary", "How each metric is distributed over the videos"),
        key,
        element("div", *charts, class_="plots"),
        class_="more",
        open=True,
    )


def _trust() -> str:
    """What is published on how far the scores follow people's opinions."""
    found: dict[str, dict[str, str]] = {}
    for line in read_table("human_correlation"):
        if line["release"].startswith("2024"):
            found.setdefault(line["aspect"], {})[line["method"]] = line["spearman_x100"]
    rows = [
        element(
            "tr",
            row_head(aspect.replace("_", " ")),
            *(element("td", said.get(method, ""), class_="num") for method in ("fitted", "average")),
        )
        for aspect, said in found.items()
    ]
    head = [column("aspect", is_number=False), column("fitted"), column("plain average")]
    words = (
        "Rank correlation with people's opinions (Spearman, times 100) as published for 2024, quoted second hand. But "
        "for motion, fitting gains next to nothing over the plain average."
    )
    return element(
        "details",
        element("summary", "How far these scores follow people's opinions"),
        element("p", words, class_="muted small"),
        table("Correlation with opinions", head, rows, "narrow"),
        class_="more",
    )


# ---- published rows ----


def _tables(data: ReportData) -> tuple[Table, ...]:
    return comparison(data.benchmark, data.compare)


def comparisons(data: ReportData) -> str:
    """Published tables with ours in the row below."""
    tables = _tables(data) if results_by_mode(data.benchmark) else ()
    now = [_compared(found) for found in tables if found.name not in HISTORY]
    then = [_compared(found) for found in tables if found.name in HISTORY]
    folded = element("details", element("summary", "Scores of 2023"), *then, class_="more") if then else ""
    return section(
        "published",
        "Beside published results",
        "Tables as published, ours in the row below. A dagger marks rows that cannot be compared with ours; the notes "
        "say why, and how the others differ.",
        *now,
        folded,
    )


def _compared(found: Table) -> str:
    rows = [_compared_row(found, line) for line in found.lines]
    head = [column("model", is_number=False), *(column(wanted.label) for wanted in found.columns)]
    notes = [element("li", escape(words)) for words in found.notes]
    reasons: dict[str, list[str]] = {}
    for line in found.lines:
        for name, why in line.reasons.items():
            reasons.setdefault(why, []).append(ASPECT_LABELS.get(name, name))
    notes += [element("li", escape(f"Ours, not given: {', '.join(names)}: {why}")) for why, names in reasons.items()]
    return "".join(
        (
            element("h3", escape(found.title), class_="apart"),
            table(found.title, head, rows, "published"),
            element("ul", *notes, class_="notes"),
        )
    )


def _compared_row(found: Table, line: Line) -> str:
    cells = [
        element("td", shown(line, wanted), class_="num")
        if line.values[wanted.name] is not None
        else element("td", "not given" if line.is_ours else "", class_="num none")
        for wanted in found.columns
    ]
    mark = "" if line.is_comparable else " †"
    return element("tr", row_head(f"{line.name}{mark}", line.note), *cells, class_="ours" if line.is_ours else None)


# ---- what is missing ----


def valueless(rows: Sequence[SampleRow]) -> list[tuple[str, str, list[str]]]:
    """Why videos gave no value: what was not found (metric and modes), the reason, and the ids of the videos."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        for mode, reasons in row.reasons.items():
            for name, why in reasons.items():
                if name not in row.values.get(mode, {}):
                    found.setdefault((name, why), {}).setdefault(mode, []).append(row.id)
    told: list[tuple[str, str, list[str]]] = []
    for (name, why), modes in found.items():
        together: dict[tuple[str, ...], list[str]] = {}
        for mode, ids in modes.items():
            together.setdefault(tuple(ids), []).append(mode)
        told += [(f"{name} ({', '.join(same)})", why, list(ids)) for ids, same in together.items()]
    return told


def missing(data: ReportData) -> str:
    """What was not measured, what is withheld, and which videos gave nothing."""
    modes = results_by_mode(data.benchmark)
    absent: dict[str, dict[str, list[str]]] = {}
    for mode, results in modes.items():
        for name, result in results.get("metrics", {}).items():
            if "value" not in result:
                absent.setdefault(str(result.get("not_measured", "no reason given")), {}).setdefault(name, []).append(
                    mode
                )
    metrics = [
        element("li", element("b", escape(why)), element("br"), escape("; ".join(_in_modes(names, modes))))
        for why, names in absent.items()
    ]
    scores_withheld = [
        element("li", escape(f"{mode}: {words}"))
        for mode, results in modes.items()
        for words in withheld_words(results)
    ]
    rejected = data.benchmark.get("videos", {}).get("rejected", {})
    lost = [element("li", element("code", escape(name)), escape(f" {why}")) for name, why in sorted(rejected.items())]
    values = [
        element("tr", row_head(what), element("td", escape(why)), element("td", _ids_words(ids), class_="ids"))
        for what, why, ids in valueless(data.rows)
    ]
    columns = [column("metric", is_number=False), column("reason", is_number=False), column("videos", is_number=False)]
    return section(
        "missing",
        "What was not measured",
        "Nothing is imputed: what could not be measured stands here, with the reason.",
        _listed("Metrics", metrics, "Every metric that was asked for was measured."),
        _listed("Scores that are withheld", scores_withheld, "No score is withheld."),
        _listed("Videos that were not scored", lost, "Every video was scored."),
        element("h3", "Videos without a value", class_="apart"),
        table("Videos without a value", columns, values, "lost", "scroll tall")
        if values
        else empty("Every video that a metric looks at gave a value, as far as values of videos were recorded."),
    )


def _in_modes(names: Mapping[str, Sequence[str]], modes: Mapping[str, Any]) -> list[str]:
    return [name if len(found) == len(modes) else f"{name} ({', '.join(found)})" for name, found in names.items()]


def _listed(title: str, items: Sequence[str], otherwise: str) -> str:
    head = element("h3", title, class_="apart")
    return head + (element("ul", *items, class_="notes") if items else empty(otherwise))


def _ids_words(ids: Sequence[str]) -> str:
    first = ", ".join(escape(name) for name in ids[:MANY])
    if len(ids) <= MANY:
        return first
    more = element("details", element("summary", f"and {len(ids) - MANY} more"), ", ".join(map(escape, ids[MANY:])))
    return first + more
