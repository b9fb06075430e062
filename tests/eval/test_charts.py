from itertools import pairwise

import pytest

from vc2.eval.charts import lineage_layers, lineage_svg, loss_svg, smoothed, ticks


@pytest.mark.parametrize(("low", "high"), [(0, 1.04), (0, 0.013), (0, 1200), (100, 104), (3, 3)])
def test_ticks_cover_the_range_evenly(low: float, high: float) -> None:
    """Ticks are evenly spaced, few, and hold the whole range."""
    found = ticks(low, high)
    steps = {round(b - a, 9) for a, b in pairwise(found)}
    assert len(steps) <= 1 and 1 <= len(found) <= 8
    assert found[0] <= low and found[-1] >= high * 0.999


def test_smoothing_keeps_a_line_and_the_ends() -> None:
    """The trend of a straight line is that line, without lag."""
    line = [(float(x), 3 - 0.01 * x) for x in range(200)]
    assert smoothed(line) == [pytest.approx(point) for point in line]


def test_a_loss_curve_shows_the_trivial_level_and_leaves_out_what_is_no_number() -> None:
    """Losses that are not finite do not spoil the axis; one point, or none, still makes a figure."""
    svg = loss_svg("full", [(0, 1.0), (1, float("nan")), (2, 0.5)], 1.0)
    assert "trivial predictor 1.00" in svg and "nan" not in svg
    assert "<svg" in loss_svg("full", [(5, 0.5)], None)
    assert "no losses" in loss_svg("full", [], 1.0)


def test_every_arrow_of_a_lineage_points_down() -> None:
    """An artifact lies below all it was made from; what lies elsewhere is left out; circles are refused."""
    inputs = {
        "report": ["scores", "spatial"],
        "scores": ["spatial"],
        "spatial": ["full", "jdb"],
        "full": ["web"],
        "jdb": [],
        "web": [],
    }
    layers = lineage_layers(inputs)
    depth = {name: level for level, layer in enumerate(layers) for name in layer}
    assert all(depth[name] > depth[parent] for name, parents in inputs.items() for parent in parents)
    svg = lineage_svg(inputs, {name: (name, "12", "note") for name in inputs})
    assert svg.count("<rect") == 6 and svg.count('class="edge"') == 6
    assert lineage_layers({"a": ["elsewhere"]}) == [["a"]]
    with pytest.raises(ValueError, match="circle"):
        lineage_layers({"a": ["b"], "b": ["a"]})
