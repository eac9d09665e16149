"""Geometry of the report's charts: nothing leaves the frame, nothing that matters is thinned away."""

from __future__ import annotations

import math

import pytest

from causvid.eval import charts


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.002, "0.002"), (350.0, "350"), (12000, "12000"), (1e-4, "10⁻⁴"), (3e-5, "3×10⁻⁵"), (2e6, "2×10⁶")],
)
def test_axis_numbers(value, text):
    assert charts.number(value) == text


def test_ticks():
    assert charts.nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert charts.nice_ticks(0, 13999) == [0, 5000, 10000]
    assert charts.log_ticks(0.004, 0.2) == pytest.approx([0.005, 0.01, 0.02, 0.05, 0.1, 0.2])
    assert charts.log_ticks(1e-5, 1.0) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1])


def test_running_median_ignores_spikes_and_keeps_both_ends():
    points = [(float(i), 100.0 if i == 50 else i / 100) for i in range(1000)]
    medians = charts.running_median(points, 11, count=100)
    assert medians[0][0] == 0 and medians[-1][0] == 999
    for x, y in medians[1:-1]:
        assert y == pytest.approx(x / 100, abs=0.03)


def test_thinned_curves_keep_their_extremes():
    points = [(float(i), math.sin(i * 1.7) + (5.0 if i == 4321 else 0)) for i in range(10000)]
    thin = charts.extremes(points)
    assert len(thin) <= 2 * charts.BINS
    assert thin == sorted(thin)
    assert max(y for _, y in thin) == max(y for _, y in points)
    assert min(y for _, y in thin) == min(y for _, y in points)


def coordinates(path):
    return [tuple(map(float, pair.split())) for pair in path[1:].split("L")]


def test_curves_stay_in_the_frame_and_choose_their_scale():
    falling = [(float(i), 10 ** (-i / 100) * (1000.0 if i == 150 else 1.0)) for i in range(300)]
    chart = charts.curves("loss", "loss", "step", {"loss": falling})
    assert chart is not None and chart.log and chart.cut >= 1
    for x, y in [p for line in chart.lines for p in coordinates(line.smooth) + coordinates(line.raw)]:
        assert charts.LEFT <= x <= charts.WIDTH - charts.RIGHT
        assert charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM
    heights = [y for _, y in coordinates(chart.lines[0].smooth)]
    assert heights[-1] - heights[0] > 120  # one spike does not flatten the curve; down is larger in SVG
    plain = charts.curves("share", "", "step", {"ok": [(0.0, 0.02), (1.0, 0.9)]}, may_log=False)
    assert plain is not None and not plain.log
    signed = charts.curves("d", "d", "step", {"d": [(0.0, -1.0), (1.0, 3.0)]})
    assert signed is not None and not signed.log and len(signed.lines[0].dots) == 2
    flat = charts.curves("c", "c", "step", {"c": [(0.0, 2.0), (1.0, 2.0)]}, total=50)
    assert flat is not None and "nan" not in flat.lines[0].smooth and flat.lines[0].dots[1][0] < charts.LEFT + 20
    share = charts.curves("s", "share", "step", {"s": [(0.0, 1.0), (1.0, 1.0)]}, bounds=(0.0, 1.0))
    assert share is not None and share.lines[0].dots[0][1] == charts.TOP == min(tick.at for tick in share.y_ticks)
    assert charts.curves("none", "", "", {"none": []}) is None


def test_graph_draws_each_edge_once():
    stages = [(name, "id", "1 s", "", 1.0) for name in ("a", "b", "c")] + [("d", "id", "unknown", "", None)]
    graph = charts.graph(stages, {"b": ["a"], "c": ["a", "b"], "d": ["elsewhere"]})
    assert len(graph.arcs) == 3
    assert [row.bar for row in graph.rows] == [1, 1, 1, 0]
