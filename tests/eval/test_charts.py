from itertools import pairwise

import pytest

from vc2.eval.charts import (
    BINS,
    Ranked,
    histogram_svg,
    loss_svg,
    ranking_svg,
    smoothed,
    ticks,
)


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


def test_a_histogram_loses_no_value() -> None:
    """Every value lies in one bin, those at the ends included; both series are described in words."""
    svg = histogram_svg("flow", {"compat": [0.0, 1.0, 1.0, 10.0], "fixed": [float("nan"), 5.0]})
    assert "compat: 4 videos, mean 3, 0 to 10; fixed: 1 videos, mean 5" in svg
    assert svg.count('class="first"') == 1 and svg.count('class="second"') == 1 and svg.count('class="mean ') == 2
    bars = svg.partition('class="first" d="')[2].partition('"')[0]
    heights = [float(bar.partition("v-")[2].partition("h")[0]) for bar in bars.split("M")[1:]]
    assert len(heights) <= BINS and sum(heights) == pytest.approx(2 * max(heights))


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-1e-9, 1e9]])
def test_a_histogram_of_any_range_is_drawn(values: list[float]) -> None:
    """One value, equal values and wild ones make a figure without anything that is no number."""
    svg = histogram_svg("x", {"compat": values})
    assert "<svg" in svg and "nan" not in svg and "inf" not in svg
    assert "no values" in histogram_svg("x", {"compat": []})


def test_a_ranking_puts_the_highest_on_top_and_marks_ours() -> None:
    """Rows stand in the order of the score; ours has another form, and its place is told in words."""
    svg = ranking_svg("total", [Ranked("a", 1.0), Ranked("ours", 2.0, True), Ranked("b", 3.0)])
    assert svg.index(">b<") < svg.index(">ours<") < svg.index(">a<")
    assert svg.count("<circle") == 2 and svg.count('class="ours"') == 3 and "ours is number 2 of 3" in svg
    assert "<svg" in ranking_svg("total", [Ranked("a", 1.0)]) and "no values" in ranking_svg("total", [])
