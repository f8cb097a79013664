"""Axes with a legend below, error bars, and labels beside points."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure as Canvas

from mixpo.algorithms.intervals import Interval
from mixpo.report.figures.data import Point
from mixpo.report.figures.style import get_colour, shorten_label

LEGEND_ROW = 0.17
"""Height of a row of the legend below a figure, in inches."""


def make_axes(width: float, height: float, legend_labels: Sequence[str] = ()) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, of this size in inches plus the height of a legend below."""
    rows = -(-len(legend_labels) // _count_legend_columns(width, legend_labels))
    canvas = Canvas(figsize=(width, height + rows * LEGEND_ROW), layout="constrained", dpi=72)
    return canvas, canvas.add_subplot()


def add_legend_below(canvas: Any, artists: Sequence[Any], labels: Sequence[str]) -> None:
    """Add a legend of shortened labels below the axes; nothing without artists."""
    if artists:
        canvas.legend(
            [getattr(artist, "lines", [artist])[0] for artist in artists],  # error bars hold their line
            [shorten_label(label) for label in labels],
            loc="outside lower center",
            ncols=_count_legend_columns(canvas.get_figwidth(), labels),
        )


def _count_legend_columns(width: float, labels: Sequence[str]) -> int:
    """Number of legend columns, 1 to 5, that fit below a figure `width` inches wide."""
    longest = max((len(shorten_label(label)) for label in labels), default=0)
    columns = max(1, min(5, len(labels), int(width * 72 / (5.2 * longest + 32))))
    rows = max(1, -(-len(labels) // columns))
    return max(1, -(-len(labels) // rows))


def draw_error_bars(axes: Any, points: Sequence[Point], **style: Any) -> Any:
    """Draw points with an error bar in each direction that has bounds; returns matplotlib's container of them."""
    x, y = [point.x for point in points], [point.y for point in points]
    means = [interval.mean for interval in x], [interval.mean for interval in y]
    return axes.errorbar(*means, xerr=_size_error_bars(x), yerr=_size_error_bars(y), **{"linestyle": "", **style})


def _size_error_bars(intervals: Sequence[Interval]) -> list[list[float]] | None:
    """[lengths down, lengths up] of error bars; nan where there are no bounds, None where no point has any."""
    down = [max(0.0, i.mean - i.low) if math.isfinite(i.low) else math.nan for i in intervals]
    up = [max(0.0, i.high - i.mean) if math.isfinite(i.high) else math.nan for i in intervals]
    return None if all(map(math.isnan, down + up)) else [down, up]


def draw_thin_line(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """Draw a thin line through (x, y) points, such as one seed's behind the mean."""
    axes.plot([x for x, _ in points], [y for _, y in points], color=get_colour(0), linewidth=0.8, alpha=0.55)


def annotate_point(axes: Any, point: Point, colour: str, *, left: bool, below: bool) -> None:
    """Write a point's name beside it, to its left or right, below or above; nothing if its mean is nan."""
    if point.name and math.isfinite(point.x.mean) and math.isfinite(point.y.mean):
        axes.annotate(
            shorten_label(point.name),
            (point.x.mean, point.y.mean),
            xytext=(-4 if left else 4, -4 if below else 4),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top" if below else "bottom",
            color=colour,
            fontsize=7.5,
        )
