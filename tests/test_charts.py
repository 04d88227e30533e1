"""Curves in charts: positions of points, and downsampling of long curves."""

import re

import numpy as np
from helpers_html import Page

from magnet_train.evaluation.charts import COLOURS, MAX_POINTS, draw_charts, draw_svg, thin_out

NO_INTERVAL = [(0, 1.0, None, None), (10, 0.5, None, None)]


def test_stages_and_baselines_share_the_chart_of_their_metric():
    names = ["val/ce", "val/ce/stage0", "val/ce/stage1", "val/fad/x", "val/fad/x/baseline_codec"]
    names.append("val/ce/stage0/rate0.5")
    page = Page(draw_charts(dict.fromkeys(names, NO_INTERVAL)))
    assert len(page.all("img")) == 3
    legend = [a for a in page.all("i") if "style" in a]
    assert len(legend) == 6 and [a["class"] for a in legend].count("baseline") == 1
    assert "val/fad/x/baseline_codec ends at 0.5" in page.all("img")[1]["alt"]


def drawn_points(svg: bytes, curve: int = 0) -> np.ndarray:
    """Positions `n 2` of a curve's points in its chart."""
    path = re.search(rf'id="curve-{curve}">\s*<path d="([^"]*)"', svg.decode())
    assert path is not None
    return np.array([[float(v) for v in p] for p in re.findall(r"[ML] (\S+) (\S+)", path[1])])


def test_points_lie_where_their_values_are():
    points = [(0, 0.0, -1.0, 1.0), (50, 5.0, 4.0, 6.0), (100, 10.0, 9.0, 11.0)]
    svg = draw_svg({"m": points, "n": NO_INTERVAL})
    steps = np.diff(drawn_points(svg), axis=0)
    assert np.allclose(steps[0], steps[1], atol=0.01) and steps[0, 0] > 0 > steps[0, 1]
    assert len(drawn_points(svg, 1)) == 2
    assert svg.count(COLOURS[0].encode()) > svg.count(COLOURS[1].encode()) > 0  # the band
    assert draw_svg({"m": points}) == draw_svg({"m": points})


def test_a_curve_of_one_point_is_marked():
    svg = draw_svg({"m": [(3, 2.0, 1.0, 3.0)]})
    assert b"<use" in svg.split(b'id="curve-0"')[1]


def test_a_long_curve_is_drawn_in_means():
    points = thin_out([(step, float(step % 2), 0.0, None) for step in range(4 * MAX_POINTS)])
    assert len(points) == MAX_POINTS
    assert {point[1:] for point in points} == {(0.5, 0.0, None)}
