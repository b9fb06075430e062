"""What was made from what, as a picture: boxes in layers, sources on top, an arrow for everything that went into one.

A box lies a layer below the lowest of what it was made from; one that was made from nothing is pulled down to right
above the first that it went into. An arrow that passes a layer gets a place of its own there (a *bend*), so that no
arrow runs behind a box it has nothing to do with. Within the layers, the order is improved by sorting each by the mean
place of its neighbours above, then below, a few times (Sugiyama, Tagawa and Toda 1981); places across are the mean of
the neighbours' as far as there is room. All of it is a pure function of what is drawn: same graph, same picture.

Coordinates are SVG's: x to the right, y downwards.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from vc2.eval.page import element

__all__ = ["Box", "graph_layers", "graph_svg"]

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 216, 72, 22, 62
BEND_WIDTH = 26  # of the place that a passing arrow takes in a layer
SWEEPS = 8
MOST_ROLES = 4  # arrows from a box, beyond which there is no room to name them


@dataclass(frozen=True, slots=True)
class Box:
    """What is written in a box, and what else is known of it."""

    lines: Sequence[str]  #: name, digest, remark
    style: str = ""  #: class of the box
    link: str = ""  #: where it leads; empty: nowhere
    label: str = ""  #: for those who do not see it; empty: the lines


@dataclass(frozen=True, slots=True)
class _Cell:
    """A box, or the bend of an arrow that passes its layer."""

    name: str
    bend: int = -1  # number of the arrow; -1: a box
    level: int = -1  # of a bend

    @property
    def width(self) -> int:
        return BOX_WIDTH if self.bend < 0 else BEND_WIDTH


def graph_layers(inputs: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Names by their longest way from a source, so that every arrow points downwards; what is in no layer, since
    `inputs` has it as a value alone, lies elsewhere.

    Raises:
        ValueError: If the graph goes in a circle.
    """
    depth: dict[str, int] = {}
    waiting = {name: {parent for parent in parents if parent in inputs} for name, parents in inputs.items()}
    while waiting:
        ready = [name for name, parents in waiting.items() if parents <= depth.keys()]
        if not ready:
            raise ValueError(f"lineage goes in a circle: {' <- '.join(waiting)}")
        for name in ready:
            depth[name] = 1 + max((depth[parent] for parent in waiting.pop(name)), default=-1)
    for name in inputs:
        below = [depth[child] for child, parents in inputs.items() if name in parents]
        if below and not any(parent in inputs for parent in inputs[name]):
            depth[name] = min(below) - 1
    return [[name for name in inputs if depth[name] == level] for level in range(max(depth.values(), default=-1) + 1)]


def graph_svg(title: str, arrows: Mapping[str, Sequence[tuple[str, str]]], boxes: Mapping[str, Box]) -> str:
    """The picture.

    Args:
        title: What it shows, for those who do not see it.
        arrows: For every box what it was made from: (role, name of a box); an empty role is not written. Names of no
            box are left out.
        boxes: By name.

    Raises:
        ValueError: If the graph goes in a circle.
    """
    known = {name: [(role, parent) for role, parent in arrows.get(name, ()) if parent in boxes] for name in boxes}
    if not known:
        return ""
    lines = [(role, parent, child) for child, made_from in known.items() for role, parent in made_from]
    layers, ways = _with_bends(graph_layers({child: [p for _, p in found] for child, found in known.items()}), lines)
    above, below = _neighbours(ways)
    layers = _ordered(layers, above, below)
    centres = _centres(layers, above, below)
    left = min(centres[cell] - cell.width / 2 for cell in centres) - 2
    width = max(centres[cell] + cell.width / 2 for cell in centres) + 2 - left
    centres = {cell: x - left for cell, x in centres.items()}
    tops = {cell: 2 + row * (BOX_HEIGHT + GAP_Y) for row, layer in enumerate(layers) for cell in layer}
    height = len(layers) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 4
    tip = element("path", class_="tip", d="M0 0 8 4 0 8Z")
    arrow = {"viewBox": "0 0 8 8", "refX": 7, "refY": 4, "markerWidth": 7, "markerHeight": 7, "orient": "auto"}
    parts = [
        element("title", escape(title)),
        element("desc", "What each artifact was made from; the same as the list."),
        element("defs", element("marker", tip, id="tip", **arrow)),
    ]
    starts = _ports([(way[0], way[1]) for way in ways], centres)
    ends = _ports([(way[-1], way[-2]) for way in ways], centres)
    arrows_from = Counter(way[0] for way in ways)
    for way, (role, parent, child), start, end in zip(ways, lines, starts, ends, strict=True):
        drawn = element("path", class_="edge", d=_curve(way, start, end, centres, tops), marker_end="url(#tip)")
        hint = element("title", escape(f"{parent} went into {child}{f' as {role}' if role else ''}"))
        name = ""
        if role and arrows_from[way[0]] <= MOST_ROLES:
            place = {"x": f"{start + 5:.0f}", "y": tops[way[0]] + BOX_HEIGHT + 14}
            name = element("text", escape(role), class_="role", **place)
        parts.append(element("g", hint, drawn, name))
    parts += [_box(boxes[cell.name], centres[cell], tops[cell]) for cell in tops if cell.bend < 0]
    size = {"viewBox": f"0 0 {width:.0f} {height}", "width": f"{width:.0f}", "height": height}
    is_linked = any(box.link for box in boxes.values())  # an image has no links in it
    return element("svg", *parts, role="group" if is_linked else "img", class_="lineage", aria_label=title, **size)


def _box(box: Box, centre: float, top: int) -> str:
    words = [
        element("text", escape(_fitting(line, most)), class_=style, x=14, y=23 + 19 * row)
        for row, (style, most, line) in enumerate(zip(("name", "hash", "note"), (24, 24, 31), box.lines, strict=False))
        if line
    ]
    shape = element("rect", width=BOX_WIDTH, height=BOX_HEIGHT, rx=9)
    whole = element("title", escape(", ".join(filter(None, box.lines))))
    place = f"translate({centre - BOX_WIDTH / 2:.0f} {top})"
    group = element("g", whole, shape, *words, transform=place, class_=box.style or None)
    if not box.link:
        return group
    return element("a", group, href=box.link, aria_label=box.label or ", ".join(filter(None, box.lines)))


def _fitting(line: str, most: int) -> str:
    return line if len(line) <= most else f"{line[: most - 1]}…"


# ---- layout ----


def _with_bends(
    layers: Sequence[Sequence[str]], lines: Sequence[tuple[str, str, str]]
) -> tuple[list[list[_Cell]], list[list[_Cell]]]:
    """Layers with a place for every arrow that passes; and the way of each arrow, from parent to child."""
    depth = {name: level for level, layer in enumerate(layers) for name in layer}
    cells = [[_Cell(name) for name in layer] for layer in layers]
    ways = []
    for number, (_, parent, child) in enumerate(lines):
        bends = [_Cell(parent, number, level) for level in range(depth[parent] + 1, depth[child])]
        for bend in bends:
            cells[bend.level].append(bend)
        ways.append([_Cell(parent), *bends, _Cell(child)])
    return cells, ways


Neighbours = Mapping[_Cell, Sequence[_Cell]]


def _neighbours(ways: Sequence[Sequence[_Cell]]) -> tuple[Neighbours, Neighbours]:
    """What lies above and below each cell on some arrow."""
    above: dict[_Cell, list[_Cell]] = {}
    below: dict[_Cell, list[_Cell]] = {}
    for way in ways:
        for upper, lower in pairwise(way):
            above.setdefault(lower, []).append(upper)
            below.setdefault(upper, []).append(lower)
    return above, below


def _ordered(layers: list[list[_Cell]], above: Neighbours, below: Neighbours) -> list[list[_Cell]]:
    """Each layer in the order of its neighbours' mean places; of the orders seen, that with the fewest crossings."""
    best, fewest = layers, _crossings(layers, below)
    for sweep in range(SWEEPS):
        near = above if sweep % 2 == 0 else below
        place = {cell: number / len(layer) for layer in layers for number, cell in enumerate(layer)}
        layers = list(layers)
        for level in range(len(layers)) if near is above else reversed(range(len(layers))):
            wanted = {
                cell: _mean([place[other] for other in near.get(cell, ())], place[cell]) for cell in layers[level]
            }
            layers[level] = sorted(layers[level], key=wanted.__getitem__)
            place |= {cell: number / len(layers[level]) for number, cell in enumerate(layers[level])}
        if (found := _crossings(layers, below)) < fewest:
            best, fewest = layers, found
    return best


def _crossings(layers: Sequence[Sequence[_Cell]], below: Neighbours) -> int:
    place = {cell: number for layer in layers for number, cell in enumerate(layer)}
    count = 0
    for layer in layers:
        steps = [(place[cell], place[other]) for cell in layer for other in below.get(cell, ())]
        count += sum((a - c) * (b - d) < 0 for n, (a, b) in enumerate(steps) for c, d in steps[:n])
    return count


def _centres(layers: Sequence[Sequence[_Cell]], above: Neighbours, below: Neighbours) -> dict[_Cell, float]:
    """Where the middle of each cell is: at the mean of its neighbours, as far as those beside it leave room."""
    centres: dict[_Cell, float] = {}
    for layer in layers:
        x = 0.0
        for cell in layer:
            centres[cell] = x + cell.width / 2
            x += cell.width + GAP_X
        middle = (x - GAP_X) / 2
        centres |= {cell: centres[cell] - middle for cell in layer}
    for sweep in range(SWEEPS):
        near = below if sweep % 2 == 0 else above
        for layer in reversed(layers) if near is below else layers:
            wanted = [_mean([centres[other] for other in near.get(cell, ())], centres[cell]) for cell in layer]
            centres |= dict(zip(layer, _with_room(layer, wanted), strict=True))
    return centres


def _with_room(layer: Sequence[_Cell], wanted: Sequence[float]) -> list[float]:
    """Places near those wanted that do not overlap: the mean of pushing to the right and pushing to the left."""
    apart = [(one.width + other.width) / 2 + GAP_X for one, other in pairwise(layer)]
    right, left = list(wanted), list(wanted)
    for number in range(1, len(layer)):
        right[number] = max(right[number], right[number - 1] + apart[number - 1])
    for number in reversed(range(len(layer) - 1)):
        left[number] = min(left[number], left[number + 1] - apart[number])
    return [(one + other) / 2 for one, other in zip(right, left, strict=True)]


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _ports(ends: Sequence[tuple[_Cell, _Cell]], centres: Mapping[_Cell, float]) -> list[float]:
    """Where arrows touch their boxes: side by side, in the order of where they come from or go to."""
    places = [0.0] * len(ends)
    for box in dict.fromkeys(box for box, _ in ends):
        touching = sorted(
            (number for number, (other, _) in enumerate(ends) if other == box),
            key=lambda number: centres[ends[number][1]],
        )
        for rank, number in enumerate(touching):
            places[number] = centres[box] + BOX_WIDTH * ((rank + 1) / (len(touching) + 1) - 0.5)
    return places


def _curve(
    way: Sequence[_Cell],
    start: float,
    end: float,
    centres: Mapping[_Cell, float],
    tops: Mapping[_Cell, int],
) -> str:
    """From the lower edge of the first box to the upper edge of the last, straight through the bends between."""
    x, y = start, tops[way[0]] + BOX_HEIGHT
    drawn = [f"M{x:.0f} {y}"]
    for cell in way[1:]:
        to_x, to_y = (end if cell is way[-1] else centres[cell]), tops[cell]
        half = (to_y - y) / 2
        drawn.append(f"C{x:.0f} {y + half:.0f} {to_x:.0f} {to_y - half:.0f} {to_x:.0f} {to_y}")
        x, y = to_x, to_y
        if cell is not way[-1]:
            y += BOX_HEIGHT
            drawn.append(f"V{y}")
    return "".join(drawn)
