"""Curves of a training run as SVG charts, drawn by matplotlib."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from magnet_train.evaluation.page import data_uri, text

Point = tuple[float, float, float | None, float | None]
"""(step, value, low, high) of a curve; low and high are the ends of its interval, or None."""
Curves = Mapping[str, Sequence[Point]]

MAX_POINTS = 400
"""Maximum number of points per curve; longer curves are averaged."""
MAX_MARKED = 12
"""Maximum number of points that are drawn with markers."""
NUM_OPEN_CHARTS = 6
"""Number of charts shown; the others are collapsed."""
COLOURS = ("#3d7fd6", "#d0662b", "#2f9556", "#a55bbd", "#8f8a1c", "#7c8893")
"""Readable on a light and on a dark page."""
GREY = "#888888"


def draw_charts(curves: Curves) -> str:
    """HTML with one chart per metric; `…/stage0`, `…/rate0.5` and `…/baseline_codec` share a chart.
    All numbers are finite."""
    charts: dict[str, dict[str, Sequence[Point]]] = {}
    for name, points in curves.items():
        if points:
            title = re.sub(r"/(stage|rate|baseline_)[^/]*$", "", name)
            charts.setdefault(title, {})[name] = points
    drawn = [_chart(title, lines) for title, lines in charts.items()]
    if not drawn:
        return ""
    html = f'<div class="charts">{"".join(drawn[:NUM_OPEN_CHARTS])}</div>'
    hidden = drawn[NUM_OPEN_CHARTS:]
    if hidden:
        summary = f"{len(hidden)} more chart" if len(hidden) == 1 else f"{len(hidden)} more charts"
        html += (
            f"<details><summary>{summary}</summary>"
            f'<div class="charts">{"".join(hidden)}</div></details>'
        )
    return html


def _chart(title: str, lines: Curves) -> str:
    """A figure with its title, the SVG, and a legend with the last value of each curve."""
    lines = {name: thin_out(points) for name, points in lines.items()}
    legend = []
    endings = []
    for i, (name, points) in enumerate(lines.items()):
        last = f"{points[-1][1]:.4g}"
        kind = "baseline" if _is_baseline(name) else ""
        short = text(_short(name))
        legend.append(
            f'<li><i class="{kind}" style="border-color:{_colour(i)}"></i>{short} {last}</li>'
        )
        endings.append(f"{name} ends at {last}")
    source = data_uri("image/svg+xml", draw_svg(lines))
    stage = re.search(r"/stage(\d+)", title)
    title += f" (codebook {int(stage[1]) + 1})" if stage else ""
    return (
        f'<figure class="chart"><figcaption><h4>{text(title)}</h4></figcaption>'
        f'<img alt="{text("; ".join(endings))}" src="{source}">'
        f'<ul class="legend">{"".join(legend)}</ul></figure>'
    )


def draw_svg(lines: Curves) -> bytes:
    """One chart: curves as lines, intervals as bands, baselines dashed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2, 1.7), layout="constrained")
    axis = figure.subplots()
    for i, (name, points) in enumerate(lines.items()):
        _draw_curve(axis, i, points, _is_baseline(name))
    _style(axis)
    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "magnet_train"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _draw_curve(axis: Any, i: int, points: Sequence[Point], is_baseline: bool) -> None:
    """Draw curve i, with its intervals as a band or, for a single one, as a line."""
    steps = [point[0] for point in points]
    axis.plot(
        steps,
        [point[1] for point in points],
        color=_colour(i),
        linewidth=1.4,
        linestyle="--" if is_baseline else "-",
        marker="o" if len(points) <= MAX_MARKED and not is_baseline else None,
        markersize=3,
        gid=f"curve-{i}",
    )
    banded = [(step, low, high) for step, _, low, high in points if low is not None]
    if not banded:
        return
    steps, lows, highs = (list(column) for column in zip(*banded, strict=True))
    if len(banded) > 1:
        axis.fill_between(steps, lows, highs, color=_colour(i), alpha=0.2, linewidth=0)
    else:
        axis.vlines(steps, lows, highs, color=_colour(i))


def _style(axis: Any) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(GREY)
    axis.tick_params(colors=GREY, labelsize=7, length=2)
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.5)


def thin_out(points: Sequence[Point]) -> list[Point]:
    """The points sorted by step, averaged down to at most MAX_POINTS."""
    points = sorted(points, key=lambda point: point[0])
    group = math.ceil(len(points) / MAX_POINTS)
    if group == 1:
        return points
    means: list[Point] = []
    for first in range(0, len(points), group):
        neighbours = points[first : first + group]
        step, value, low, high = (_mean(column) for column in zip(*neighbours, strict=True))
        assert step is not None and value is not None
        means.append((step, value, low, high))
    return means


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _short(name: str) -> str:
    """Name of a metric of a stage or baseline, for readers.

    >>> _short("val/ce/stage0"), _short("val/fad/vggish/baseline_codec")
    ('codebook 1', 'codec (ceiling)')
    """
    last = name.rpartition("/")[2].replace("baseline_codec", "codec (ceiling)")
    stage = re.fullmatch(r"stage(\d+)", last)
    return f"codebook {int(stage[1]) + 1}" if stage else last.replace("_", " ")


def _is_baseline(name: str) -> bool:
    return "/baseline_" in name


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]
