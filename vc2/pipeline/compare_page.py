"""A comparison as a page and as text: table beside the paper's figures, verdicts, videos, curves, judges."""

from collections.abc import Mapping
from html import escape
from typing import Any

from vc2.eval.page import column, data_uri, element, empty, number, page, row_head, section, table

__all__ = ["render_markdown", "render_page"]

Figures = Mapping[str, tuple[str, bool | None]]  # of the table: what it is, whether more is better
WORDS = {"holds": "holds", "fails": "does not hold", "undecided": "undecided", "not run": "not run"}
PAPER = ("aesthetic", "technical")  # DOVER's scores
ARROWS = {True: "↑", False: "↓", None: ""}


def render_page(
    data: Mapping[str, Any],
    figures: Figures,
    videos: Mapping[str, Mapping[str, bytes | None]],
    shown: Mapping[str, str],
) -> str:
    """The page as one HTML document that needs nothing else.

    Args:
        data: As in table.json.
        figures: Columns of the table.
        videos: Of each row by prompt id, mp4.
        shown: Prompts of these videos by id.
    """
    seeds = len(data["seeds"])
    title = f"Table 3 in a small world: {len(data['rows'])} rows, {seeds} {'seed' if seeds == 1 else 'seeds'}"
    parts = {"table": "Table", "claims": "Claims", "videos": "Videos", "curves": "Curves", "judges": "Judges"}
    links = [element("a", name, href=f"#{anchor}") for anchor, name in parts.items()]
    body = (
        element("h1", title),
        section(
            "table",
            "The rows",
            "Mean over clips, and the interval of 95 % by a bootstrap over seeds and prompts. DOVER's scores are the "
            f"paper's own. {_one_seed(data)}",
            _table(data, figures),
            _correlation(data),
        ),
        section(
            "claims",
            "The paper's claims",
            f"A claim holds if all intervals are on its side; what stands beside decides nothing. {_one_seed(data)}",
            _claims(data),
        ),
        section(
            "videos", "Videos", f"Seed {data['seeds'][0]}; all rows start from the same noise.", _videos(videos, shown)
        ),
        section(
            "curves",
            "Over the steps of tuning",
            "Means over seeds, by the first prompts. Step 0 is the base.",
            _curves(data),
        ),
        section("judges", "The judges", "Tried out on drawn clips before they judged.", _judges(data)),
        *(element("p", escape(note), class_="muted small") for note in data["notes"]),
    )
    bar = element("header", element("div", element("nav", *links, aria_label="Parts of the page")))
    return page(title, bar + element("main", *body))


def _one_seed(data: Mapping[str, Any]) -> str:
    return ONE_SEED if len(data["seeds"]) == 1 else ""


ONE_SEED = "One seed was trained, so intervals and verdicts are of this training and say nothing of another."


def _table(data: Mapping[str, Any], figures: Figures) -> str:
    head = [column("row", is_number=False), *(column(f"{name} (paper)") for name in PAPER)]
    head += [column(f"{name} {ARROWS[better]}".strip(), title=what) for name, (what, better) in figures.items()]
    rows = []
    for row, found in data["rows"].items():
        cells = [element("td", number(data["paper"][row][name]), class_="num") for name in PAPER]
        cells += [_interval_cell(found.get(name)) for name in figures]
        rows.append(element("tr", row_head(row), *cells))
    return table("Rows of Table 3", head, rows)


def _interval_cell(found: Mapping[str, float] | None) -> str:
    if found is None:
        return element("td", "none", class_="num")
    small = element("small", f"{number(found['low'])} to {number(found['high'])}")
    return element("td", number(found["mean"]), element("br"), small, class_="num")


def _correlation(data: Mapping[str, Any]) -> str:
    found = data["rank_correlation_of_quality"]
    if not found:
        return ""
    words = ", ".join(f"{value:.2f} ({name})" for name, value in found.items())
    return element("p", f"Rank correlation of quality with the paper's two scores: {words}.")


def _claims(data: Mapping[str, Any]) -> str:
    head = [column(name, is_number=False) for name in ("claim", "verdict", "measured", "in the paper")]
    rows = []
    for claim in data["claims"]:
        lines = [part for words in _measured(claim) for part in (escape(words), element("br"))]
        cells = (
            element("td", escape(WORDS[claim["verdict"]])),
            element("td", *lines),
            element("td", escape(claim["paper"])),
        )
        rows.append(element("tr", row_head(f"({claim['key']}) {claim['says']}"), *cells))
    return table("Claims", head, rows)


def _measured(claim: Mapping[str, Any]) -> list[str]:
    decides = [_said(says, found) for says, found in claim["contrasts"]]
    return decides + [f"beside: {_said(says, found)}" for says, found in claim["beside"]]


def _said(says: str, found: Mapping[str, float] | None) -> str:
    return f"{says}: not run" if found is None else f"{says}: {_plain(found)}"


def _plain(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.3g} [{found['low']:.3g}, {found['high']:.3g}]"


def _videos(videos: Mapping[str, Mapping[str, bytes | None]], shown: Mapping[str, str]) -> str:
    head = [column("row", is_number=False), *(column(words, is_number=False) for words in shown.values())]
    rows = []
    for row, found in videos.items():
        cells = [element("td", _video(found.get(name), f"{row}: {words}")) for name, words in shown.items()]
        rows.append(element("tr", row_head(row), *cells))
    return table("Videos", head, rows)


def _video(data: bytes | None, words: str) -> str:
    if data is None:
        return empty("none")
    return element(
        "video", src=data_uri("video/mp4", data), width=160, autoplay=True, loop=True, muted=True, playsinline=True,
        aria_label=words,
    )  # fmt: skip


def _curves(data: Mapping[str, Any]) -> str:
    if not data["curves"]:
        return empty("No row has checkpoints on the way.")
    steps = sorted({int(step) for found in data["curves"].values() for step in found["motion"]})
    tables = []
    for figure in next(iter(data["curves"].values())):
        head = [column("row", is_number=False), *(column(f"step {step}") for step in steps)]
        rows = []
        for row, found in data["curves"].items():
            points = {int(step): value for step, value in found[figure].items()}
            cells = [element("td", number(points[step]) if step in points else "", class_="num") for step in steps]
            rows.append(element("tr", row_head(row), *cells))
        tables += [element("h3", figure), table(f"{figure} over the steps", head, rows)]
    return "".join(tables)


def _judges(data: Mapping[str, Any]) -> str:
    head = [
        column("figure", is_number=False),
        column("told from", is_number=False),
        column("things"),
        column("accuracy"),
        column("through the autoencoder"),
        column("clips"),
    ]
    rows = [
        element(
            "tr", row_head(one["figure"]), element("td", escape(one["damage"])),
            *(
                element("td", cell, class_="num")
                for cell in (str(one["things"]), f"{one['accuracy']:.0%}", f"{one['through']:.0%}", str(one["clips"]))
            ),
        )
        for one in data["separation"]
    ]  # fmt: skip
    ends = data["yardstick"]
    seen = ends["watermarked"]
    names = list(ends["video_set"])
    lines = [
        element(
            "tr",
            row_head(end.replace("_", " ")),
            *(element("td", number(value), class_="num") for value in (*(ends[end][n] for n in names), seen[end])),
        )
        for end in seen
    ]
    names.append("said to have a watermark")
    yardstick = table("Ends of the indices", [column("end", is_number=False), *map(column, names)], lines)
    return table("Judges", head, rows) + element("h3", "Ends of the indices, through the autoencoder") + yardstick


def render_markdown(data: Mapping[str, Any], figures: Figures) -> str:
    """Table and verdicts as text."""
    lines = [_line("row", *(f"{name} (paper)" for name in PAPER), *figures)]
    lines.append(_line("---", *("---:" for _ in (*PAPER, *figures))))
    for row, found in data["rows"].items():
        cells = [_plain(found[name]) if name in found else "" for name in figures]
        lines.append(_line(row, *(f"{data['paper'][row][name]:g}" for name in PAPER), *cells))
    if found := data["rank_correlation_of_quality"]:
        words = ", ".join(f"{value:.2f} ({name})" for name, value in found.items())
        lines += ["", f"Rank correlation of quality with the paper's two scores: {words}."]
    lines += ["", ONE_SEED] if len(data["seeds"]) == 1 else []
    lines += ["", _line("claim", "verdict", "measured", "in the paper"), _line("---", "---", "---", "---")]
    for claim in data["claims"]:
        measured = "; ".join(_measured(claim))
        lines.append(_line(f"({claim['key']}) {claim['says']}", WORDS[claim["verdict"]], measured, claim["paper"]))
    return "\n".join(lines) + "\n"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
