import re

import pytest

from vc2.eval.graphs import BOX_HEIGHT, BOX_WIDTH, Box, graph_layers, graph_svg

INPUTS = {
    "report": ["scores", "spatial", "web"],
    "scores": ["spatial"],
    "spatial": ["full", "jdb"],
    "full": ["web"],
    "jdb": [],
    "web": [],
}
BOXES = {name: Box((name, "12", "note")) for name in INPUTS}
ARROWS = {name: [(f"as {parent}", parent) for parent in parents] for name, parents in INPUTS.items()}


def test_every_arrow_points_down() -> None:
    """An artifact lies below all it was made from, a source right above its first use; what lies elsewhere is left out;
    circles are refused."""
    layers = graph_layers(INPUTS)
    depth = {name: level for level, layer in enumerate(layers) for name in layer}
    assert all(depth[name] > depth[parent] for name, parents in INPUTS.items() for parent in parents)
    assert depth["jdb"] == depth["spatial"] - 1 and depth["web"] == 0
    assert graph_layers({"a": ["elsewhere"]}) == [["a"]]
    with pytest.raises(ValueError, match="circle"):
        graph_layers({"a": ["b"], "b": ["a"]})


def test_there_is_a_box_for_every_name_and_an_arrow_for_every_input() -> None:
    """Also where an arrow passes several layers; names of no box are left out; nothing makes no picture."""
    svg = graph_svg("all", ARROWS, BOXES)
    assert svg.count("<rect") == 6 and svg.count('class="edge"') == 7
    assert svg == graph_svg("all", ARROWS, BOXES)
    assert 'class="edge"' not in graph_svg("one", {"a": [("role", "elsewhere")]}, {"a": Box(("a",))})
    assert graph_svg("none", {}, {}) == ""


@pytest.mark.parametrize("extra", range(5))
def test_no_arrow_runs_behind_a_box_and_no_box_over_another(extra: int) -> None:
    """However many sources there are, boxes of a layer stand apart, and arrows pass a layer between them."""
    inputs = INPUTS | {f"more{number}": [] for number in range(extra)}
    inputs["full"] = [*INPUTS["full"], *(f"more{number}" for number in range(extra))]
    inputs["report"] = [*INPUTS["report"], *(f"more{number}" for number in range(extra))]
    arrows = {name: [("", parent) for parent in parents] for name, parents in inputs.items()}
    svg = graph_svg("all", arrows, {name: Box((name,)) for name in inputs})
    boxes = [(int(x), int(y)) for x, y in re.findall(r"translate\((-?\d+) (\d+)\)", svg)]
    assert len(boxes) == len(inputs)
    for number, (x, y) in enumerate(boxes):
        assert all(abs(x - other) >= BOX_WIDTH for other, level in boxes[:number] if level == y)
    passing = 0
    for drawn in re.findall(r' d="(M[^"]+)" marker', svg):
        for x, top, bottom in re.findall(r"(-?\d+) (\d+)V(\d+)", drawn):
            passing += 1
            assert int(bottom) - int(top) == BOX_HEIGHT
            assert not any(left <= int(x) <= left + BOX_WIDTH for left, level in boxes if level == int(top))
    assert passing >= 3


def test_words_in_a_picture_stay_words() -> None:
    """Names, remarks, roles and labels are text, whatever they hold; a link is where a box leads."""
    words = "<script>alert(1)</script>\"'&"
    boxes = {"<a>": Box((words, words, words), link=words, label=words), words: Box((words,))}
    svg = graph_svg(words, {"<a>": [(words, words)]}, boxes)
    assert "<script" not in svg and "<a>" not in svg.replace("<a href", "")
    assert 'href="&lt;script&gt;' in svg and 'role="group"' in svg
