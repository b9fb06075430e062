"""What the UI's tables say of an artifact: rows of words, without Prefect.

The UI reads every cell and every description as Markdown, and Markdown holds HTML. Captions, reasons and messages are
words of strangers: whatever is not ours passes through `plain`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vc2.artifacts import Manifest
from vc2.progress import counted, duration_text, size_text
from vc2.storage import Store

__all__ = [
    "Row",
    "brief",
    "distribution_rows",
    "facts",
    "linked",
    "markdown_table",
    "plain",
    "reject_rows",
    "score_rows",
    "spoken",
    "training_facts",
]

Row = dict[str, str]

MOST = 300  # characters of a cell
THEIRS = "VideoCrafter2"
# What Markdown or HTML would act on, wherever it stands; an underscore inside a word does nothing.
POWERFUL = re.compile(r"[\\`*\[\]{}<>|~!#&$^]|(?<![^\W_])_|_(?![^\W_])|^[-+=]|(?<=://)|(?<=\bwww)\.|@")


def plain(text: object, most: int = MOST) -> str:
    """Words that Markdown shows as they are, in one line: no links, no markup, no HTML, no more cells of a table.

    Args:
        most: Characters that are kept.
    """
    line = " ".join(str(text).split())
    line = line if len(line) <= most else f"{line[: most - 1]}…"
    line = re.sub(r"[\x00-\x1f\x7f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", "", line)  # incl. turners of direction
    return POWERFUL.sub(lambda found: f"\\{found[0]}" if found[0] else "\u2060", line)


def spoken(text: str) -> str:
    """What `plain` was given, for places that know no Markdown."""
    return re.sub(r"\\(.)", r"\1", text).replace("\u2060", "")


def linked(text: str, link: str) -> str:
    """A link in Markdown."""
    target = "".join(f"%{ord(letter):02X}" if letter in ' ()<>"\\|' else letter for letter in link)
    return f"[{plain(text)}]({target})"


def markdown_table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of a table of two columns; cells are Markdown."""
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def brief(value: Any) -> str:
    """A value in a few words, safe to show."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{plain(name)} {brief(part)}" for name, part in list(value.items())[:8])
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{len(value):,}" if len(value) > 8 else ", ".join(map(brief, value))
    return plain(value)


def facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What there is to say of any artifact: counts, then where it comes from."""
    is_set = manifest.kind == "shard_set"
    yield from (_accounts if is_set else _counts)(manifest.counts)
    if manifest.kind == "checkpoint":
        layout = manifest.facts.get("layout", {})
        for name in ("final_loss", "trivial_loss"):
            if name in manifest.facts:
                yield name.replace("_", " "), brief(manifest.facts[name])
        if layout:
            yield "trained on", f"{layout.get('world_size')} ranks, {plain(manifest.facts.get('device', ''))}"
    for name, text in manifest.licenses.items():
        yield "licence", f"{plain(name)}: {plain(text)}"
    for role, source in manifest.inputs.items():
        yield f"made from: {plain(role)}", plain(source.uri, 600)
    yield "files", f"{len(manifest.files):,}, {size_text(sum(entry.size for entry in manifest.files))}"
    yield "made", f"{plain(manifest.created_at[:19].replace('T', ' '))} UTC in {duration_text(manifest.seconds)}"
    yield "fingerprint", plain(manifest.fingerprint)
    yield "content digest", plain(manifest.content_digest)


def _counts(counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    return ((plain(name.replace("_", " ")), brief(value)) for name, value in counts.items())


def _accounts(counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    left = dict(counts)
    rows, good, rejected, same, samples, shards, size = (
        left.pop(name, 0)
        for name in (
            "rows", "rows_with_samples", "rows_rejected", "rows_duplicate", "samples", "shards", "media_bytes",
        )
    )  # fmt: skip
    copies = counted(same, "exact duplicate")
    yield "rows", f"{rows:,} = {good:,} with samples + {rejected:,} rejected + {copies}"
    yield "samples", f"{samples:,} in {counted(shards, 'shard')}, {size_text(size)}"
    yield from _counts({name: number for name, number in left.items() if number})


def reject_rows(manifest: Manifest) -> list[Row]:
    """Of a shard set: how many were rejected by reason, most first, and which share of all rows that is."""
    reasons = manifest.facts.get("reasons", {})
    rows = max(1, manifest.counts.get("rows", 0))
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return [
        {"reason": plain(name), "rejected": f"{count:,}", "share of rows": f"{100 * count / rows:.2g} %"}
        for name, count in ordered
    ]


def distribution_rows(manifest: Manifest) -> list[Row]:
    """Of a shard set of videos: how many samples there are at which rate, as a bar too."""
    rates = {int(rate): count for rate, count in manifest.facts.get("fps_histogram", {}).items()}
    total, most = max(1, sum(rates.values())), max(rates.values(), default=1)
    return [
        {
            "fps": str(rate),
            "samples": f"{count:,}",
            "share": f"{100 * count / total:.2g} %",
            "": "█" * max(1, round(24 * count / most)),
        }
        for rate, count in sorted(rates.items())
    ]


def training_facts(lines: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The training curve in figures: its newest line beside its first, and the newest validation."""
    rows = []
    if lines:
        first, last = lines[0], lines[-1]
        for name, label in (
            ("step", "step"), ("loss", "loss"), ("loss_video", "loss, videos"), ("loss_image", "loss, images"),
            ("grad_norm", "gradient norm"), ("lr", "learning rate"), ("samples_per_s", "samples/s"),
            ("goodput", "goodput"), ("data_wait", "share of time waiting for data"), ("mfu", "MFU"),
            ("memory_gib", "memory, GiB"),
        ):  # fmt: skip
            if last.get(name) is not None:
                rows.append({"figure": label, "first": brief(first.get(name)), "last": brief(last[name])})
        skipped = sum(line.get("skipped") or 0 for line in lines)
        rows.append({"figure": "skipped steps", "first": "", "last": f"{skipped:,}"})
    for name, label in (("val_loss_raw", "validation loss"), ("val_loss_ema", "validation loss, EMA")):
        if validations and validations[-1].get(name) is not None:
            first = validations[0].get(name)
            rows.append({"figure": label, "first": brief(first), "last": brief(validations[-1][name])})
    return rows


def score_rows(store: Store, scorecard: Manifest) -> tuple[list[Row], list[Row], list[str]]:
    """Scores of a scorecard.

    Returns:
        What the judges of the small world say, by set of videos; the benchmark's figures beside the published rows of
        VideoCrafter2; and what has to be known to read them, safe to show.
    """
    summary = json.loads(store.read(scorecard.file("summary.json").key))
    by_set: Mapping[str, Mapping[str, Any]] = summary.get("judges", {})
    names = list(dict.fromkeys(name for figures in by_set.values() for name in figures))
    judged = [
        {"judge": plain(name), **{plain(which): _mean(figures.get(name)) for which, figures in by_set.items()}}
        for name in names
    ]
    measured, notes = _beside_published(summary.get("benchmark") or {})
    return judged, measured, notes


def _mean(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return ""
    mean = f"{100 * summary['mean']:.0f} %" if summary.get("is_share") else brief(float(summary["mean"]))
    return f"{mean} (n {summary['n']})"


def _beside_published(benchmark: Mapping[str, Any]) -> tuple[list[Row], list[str]]:
    from vc2.eval.leaderboard import comparison, results_by_mode, shown

    results = results_by_mode(benchmark).get("compat")
    if results is None:
        return [], []
    rows: dict[str, Row] = {}
    notes: list[str] = list(benchmark.get("warnings", ()))
    for table in comparison(benchmark, [THEIRS], ours="ours"):
        for line in table.lines:
            name = line.name if line.is_comparable or line.is_ours else f"{line.name} †"
            if line.note and not line.is_ours:
                notes.append(f"{name}: {line.note}")
            for column in table.columns:
                row = rows.setdefault(column.label, {"measure": plain(column.label)})
                reason = line.reasons.get(column.name, "")
                row[plain(name)] = plain(shown(line, column) or (f"not given: {reason}" if reason else ""))
        notes += table.notes
    for name, result in results.get("metrics", {}).items():
        value = result.get("value")
        told = f"not measured: {result.get('not_measured', '')}" if value is None else f"{value:.4g}"
        rows.setdefault(name, {"measure": plain(name), "ours": plain(told)})
    columns = list(dict.fromkeys(["measure", "ours", *(name for row in rows.values() for name in row)]))
    if any(name.endswith("†") for name in columns):
        notes.append("†: not comparable with ours")
    return (
        [{name: row.get(name, "") for name in columns} for row in rows.values()],
        [plain(note) for note in dict.fromkeys(notes)],
    )
