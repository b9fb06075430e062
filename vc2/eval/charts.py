"""Charts as inline SVG, drawn with the page's own colours: loss curves with the trivial predictor's level, how a metric
is distributed over the videos, and models in the order of a score.

What is told by colour is told by form, too: filled or outlined, dot or diamond, solid or dashed. Coordinates are SVG's:
x to the right, y downwards. Every figure has a title and a description for those who do not see it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from vc2.eval.page import element

__all__ = ["Ranked", "histogram_svg", "loss_svg", "ranking_svg", "smoothed", "ticks"]

Point = tuple[float, float]

WIDTH, HEIGHT = 560, 310  # of a loss curve
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 16, 50
BINS, BARS_WIDTH, BARS_HEIGHT = 24, 300, 150  # of a histogram
NAMES_WIDTH, DOTS_WIDTH, ROW_HEIGHT = 180, 116, 21  # of a ranking


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` steps apart."""
    least = 1e-6 * max(abs(low), abs(high), 1e-3)  # below, floating-point numbers are as good as equal
    low, high = (low, high) if high - low > least else (low - least / 2, high + least / 2)
    span = high - low
    power = 10 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * count >= span * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def smoothed(points: Sequence[Point], share: float = 0.06) -> list[Point]:
    """A centred running mean over `share` of the points: reads the trend without lagging behind it."""
    reach = max(1, round(len(points) * share / 2))
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    means = []
    for i, (x, _) in enumerate(points):
        room = min(reach, i, len(points) - 1 - i)
        means.append((x, (sums[i + room + 1] - sums[i - room]) / (2 * room + 1)))
    return means


def loss_svg(name: str, points: Sequence[Point], trivial: float | None, *, what: str = "loss") -> str:
    """A loss curve: every logged loss faintly, the trend over it, and the level of the trivial predictor dashed. So any
    other figure is drawn, too; `what` it is stands beside the axis."""
    points = [(float(x), float(y)) for x, y in points if math.isfinite(y)]
    if not points:
        return f'<p class="empty">{escape(name)}: no losses were logged.</p>'
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    values = [y for _, y in points] + ([trivial] if trivial is not None else [])
    top = sorted(values)[
        min(len(values) - 1, round(len(values) * 0.995))
    ]  # a single wild loss must not flatten the curve
    ys = ticks(0.0, max(top, trivial or 0.0) * 1.04)
    xs = [x for x in ticks(first, last) if first <= x <= last]

    def at(x: float, y: float) -> str:
        px = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        py = TOP + (1 - min(y, ys[-1]) / ys[-1]) * (HEIGHT - TOP - BOTTOM)
        return f"{px:.1f},{py:.1f}"

    def level(y: float) -> str:
        return at(first, y).split(",")[1]

    end = smoothed(points)[-1][1]
    words = f"{len(points)} losses from step {first:g} to {last:g}; the last, smoothed, is {end:.3f}"
    if trivial is not None:
        words += f"; predicting zero noise would cost {trivial:.3f}"
    across = {"x1": LEFT, "x2": WIDTH - RIGHT}
    parts = [element("title", escape(name)), element("desc", escape(words))]
    for y in ys:
        parts.append(element("line", class_="grid", y1=level(y), y2=level(y), **across))
        parts.append(element("text", f"{y:g}", x=LEFT - 8, y=level(y), dy=".35em", text_anchor="end"))
    for x in xs:
        px = at(x, 0).split(",")[0]
        parts.append(element("text", f"{x:g}", x=px, y=HEIGHT - BOTTOM + 20, text_anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    upright = f"translate(15 {middle[1]}) rotate(-90)"
    parts.append(element("text", "training step", class_="axis", x=middle[0], y=HEIGHT - 6, text_anchor="middle"))
    parts.append(element("text", what, class_="axis", transform=upright, text_anchor="middle"))
    parts.append(element("polyline", class_="raw", points=" ".join(at(*point) for point in _thinned(points))))
    parts.append(
        element("polyline", class_="trend", points=" ".join(at(*point) for point in _thinned(smoothed(points))))
    )
    if trivial is not None:
        note = f"trivial predictor {trivial:.2f}"
        place = {"x": WIDTH - RIGHT - 4, "y": level(trivial), "dy": "1.25em", "text_anchor": "end"}
        parts.append(element("line", class_="trivial", y1=level(trivial), y2=level(trivial), **across))
        parts.append(element("text", note, class_="note", **place))
    parts.append(element("line", class_="cursor", y1=TOP, y2=HEIGHT - BOTTOM))
    sizes = {"data_left": LEFT, "data_right": RIGHT, "data_width": WIDTH}
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="loss", **sizes)


def _thinned(points: Sequence[Point], most: int = 600) -> Sequence[Point]:
    stride = math.ceil(len(points) / most)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def histogram_svg(name: str, series: Mapping[str, Sequence[float]]) -> str:
    """How many videos have which value. The first series is filled, the second an outline; their means are marked.

    Args:
        name: Of the figure.
        series: Values by name of the series, in one unit; empty ones are left out.
    """
    drawn = {label: found for label, values in series.items() if (found := [v for v in values if math.isfinite(v)])}
    if not drawn:
        return f'<p class="empty">{escape(name)}: no values.</p>'
    everything = [value for values in drawn.values() for value in values]
    marks = ticks(min(everything), max(everything), 4)
    if math.isclose(min(everything), max(everything), rel_tol=1e-6, abs_tol=1e-9):
        middle = float(f"{everything[0]:.4g}")
        marks = [middle - 0.5, middle, middle + 0.5]
    low, high, left, bottom, top = marks[0], marks[-1], 8, BARS_HEIGHT - 24, 10
    step = (BARS_WIDTH - 2 * left) / BINS

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (BARS_WIDTH - 2 * left)

    counts = {label: _counted(values, low, high) for label, values in drawn.items()}
    most = max(max(count) for count in counts.values())
    means = {label: math.fsum(values) / len(values) for label, values in drawn.items()}
    words = "; ".join(
        f"{label}: {len(values)} videos, mean {means[label]:.4g}, {min(values):.4g} to {max(values):.4g}"
        for label, values in drawn.items()
    )
    parts = [element("title", escape(name)), element("desc", escape(words))]
    for number, (label, count) in enumerate(counts.items()):
        heights = [found / most * (bottom - top) for found in count]
        style = ("first", "second")[min(number, 1)]
        if style == "first":
            bars = "".join(
                f"M{left + place * step + 0.5:.1f} {bottom}v{-height:.1f}h{step - 1:.1f}v{height:.1f}z"
                for place, height in enumerate(heights)
                if height
            )
            parts.append(element("path", class_=style, d=bars))
        else:
            outline = "".join(f"V{bottom - height:.1f}h{step:.1f}" for height in heights)
            parts.append(element("path", class_=style, d=f"M{left} {bottom}{outline}V{bottom}"))
        middle = f"{across(means[label]):.1f}"
        parts.append(element("line", class_=f"mean {style}", x1=middle, x2=middle, y1=top - 6, y2=bottom))
    parts.append(element("line", class_="grid", x1=left, x2=BARS_WIDTH - left, y1=bottom, y2=bottom))
    for mark in marks:
        anchor = "start" if mark == low else "end" if mark == high else "middle"
        parts.append(
            element("text", f"{mark:g}", x=f"{across(mark):.1f}", y=bottom + 17, text_anchor=anchor, class_="tick")
        )
    return element("svg", *parts, viewBox=f"0 0 {BARS_WIDTH} {BARS_HEIGHT}", role="img", class_="histogram")


def _counted(values: Sequence[float], low: float, high: float) -> list[int]:
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, int((value - low) / (high - low) * BINS))] += 1
    return counts


@dataclass(frozen=True, slots=True)
class Ranked:
    """A model in a ranking."""

    name: str
    value: float
    is_ours: bool = False


def ranking_svg(name: str, rows: Sequence[Ranked], digits: int = 2) -> str:
    """Models by a score, the highest on top: a dot each, ours a diamond in bold."""
    if not rows:
        return f'<p class="empty">{escape(name)}: no values.</p>'
    rows = sorted(rows, key=lambda row: -row.value)
    marks = ticks(rows[-1].value, rows[0].value, 4)
    low, high = marks[0], marks[-1] if len(marks) > 1 else marks[0] + 1
    height = len(rows) * ROW_HEIGHT + 8
    place = next((number for number, row in enumerate(rows, 1) if row.is_ours), None)
    words = f"{rows[0].name} {rows[0].value:.{digits}f} to {rows[-1].name} {rows[-1].value:.{digits}f}"
    if place is not None:
        words += f"; {rows[place - 1].name} is number {place} of {len(rows)}"
    parts = [element("title", escape(name)), element("desc", escape(words))]
    for number, row in enumerate(rows):
        y = 4 + (number + 0.5) * ROW_HEIGHT
        x = NAMES_WIDTH + 10 + (row.value - low) / (high - low) * (DOTS_WIDTH - 20)
        style = "ours" if row.is_ours else None
        mark = (
            element("path", d=f"M{x:.1f} {y - 7}l7 7l-7 7l-7-7z", class_="ours")
            if row.is_ours
            else element("circle", cx=f"{x:.1f}", cy=y, r=4.5)
        )
        parts += [
            element("line", class_="grid", x1=NAMES_WIDTH, x2=NAMES_WIDTH + DOTS_WIDTH, y1=y, y2=y),
            mark,
            element("text", escape(row.name), x=NAMES_WIDTH - 8, y=y, dy=".35em", text_anchor="end", class_=style),
            element("text", f"{row.value:.{digits}f}", x=NAMES_WIDTH + DOTS_WIDTH + 8, y=y, dy=".35em", class_=style),
        ]
    width = NAMES_WIDTH + DOTS_WIDTH + 52
    return element("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", class_="ranking")
