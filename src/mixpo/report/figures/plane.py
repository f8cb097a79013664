"""Arms as points in a plane, with intervals in both directions and their names beside them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.lines import Line2D

from mixpo.report.document import Figure
from mixpo.report.figures.axes import add_legend_below, draw_error_bars, make_axes
from mixpo.report.figures.data import Point, flatten_point, split_heading
from mixpo.report.figures.style import STYLE, get_colour, get_marker, shorten_label
from mixpo.report.figures.svg import render_svg
from mixpo.report.labels import Box, PlacedLabel, place_labels

LABEL_SIZE = 8.5
"""Font size of the names beside points, in points of 1/72 inch."""


@rc_context(STYLE)
def plot_points(points: Sequence[Point], *, name: str, xlabel: str, ylabel: str, sqrt_x: bool = False) -> Figure:
    """A figure of named points with intervals in x and y; numbers and a legend if not every name fits beside one."""
    names = [shorten_label(point.name) for point in points]
    canvas, complete = _draw_points(points, names, xlabel=xlabel, ylabel=ylabel, sqrt_x=sqrt_x)
    if not complete:
        numbers = [f"{number}" for number, _ in enumerate(names, 1)]
        legend = [f"{number} {label}" for number, label in zip(numbers, names, strict=True)]
        canvas, _ = _draw_points(points, numbers, legend, xlabel=xlabel, ylabel=ylabel, sqrt_x=sqrt_x)
    values = "; ".join(f"{point.name}: {point.x.mean:.2f}, {point.y.mean:.2f}" for point in points)
    svg = render_svg(canvas, name, f"{ylabel} against {xlabel}. {values}")
    return Figure(name, svg, ("name", *split_heading(xlabel), *split_heading(ylabel)), list(map(flatten_point, points)))


def _draw_points(
    points: Sequence[Point], texts: Sequence[str], legend: Sequence[str] = (), *, xlabel: str, ylabel: str, sqrt_x: bool
) -> tuple[Any, bool]:
    """A matplotlib figure of points with texts beside them, and False if some text found no place."""
    canvas, axes = make_axes(4.2, 3.4, legend)
    artists = []
    for i, point in enumerate(points):
        look = {"color": get_colour(i), "marker": get_marker(i), "markersize": 5.5, "elinewidth": 1, "capsize": 0}
        artists.append(draw_error_bars(axes, [point], **look))
        for bar in artists[-1][2]:
            bar.set_alpha(0.5)
    if sqrt_x:
        axes.set_xscale("function", functions=(_compute_signed_root, lambda value: np.sign(value) * np.square(value)))
    axes.set(xlabel=f"{xlabel}, root scale" if sqrt_x else xlabel, ylabel=ylabel)
    axes.margins(0.08)
    if sqrt_x:
        ticks = _choose_root_ticks(*axes.get_xlim())
        axes.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
    if legend:
        add_legend_below(canvas, artists, legend)
    render_svg(canvas, "", "")  # places all parts; other renderers measure text differently
    finite = [i for i, point in enumerate(points) if math.isfinite(point.x.mean) and math.isfinite(point.y.mean)]
    labels = place_labels(  # the page's font is unknown, so sizes are upper bounds for short wide names
        [axes.transData.transform((points[i].x.mean, points[i].y.mean)).tolist() for i in finite],
        [(LABEL_SIZE * (0.4 + 0.6 * len(texts[i])), LABEL_SIZE * 1.15) for i in finite],
        frame=Box(*axes.bbox.extents),
        error_bars=[line for i in finite for line in _compute_error_bar_boxes(axes, points[i])],
    )
    for i, label in zip(finite, labels, strict=True):
        if label is not None:
            _draw_label(axes, texts[i], label, get_colour(i))
    return canvas, all(label is not None for label in labels)


def _compute_error_bar_boxes(axes: Any, point: Point) -> list[Box]:
    """Boxes on the canvas that a point's error bars cover, in points of 1/72 inch."""
    x, y = point.x, point.y
    bars = [((x.low, y.mean), (x.high, y.mean)), ((x.mean, y.low), (x.mean, y.high))]
    finite = [axes.transData.transform(ends).tolist() for ends in bars if np.isfinite(ends).all()]
    return [Box(left - 0.5, bottom - 0.5, right + 0.5, top + 0.5) for (left, bottom), (right, top) in finite]


def _draw_label(axes: Any, text: str, label: PlacedLabel, colour: str) -> None:
    """Draw a text at its position, and the line from the point to it if there is one."""
    inches = axes.figure.dpi_scale_trans
    box = label.box
    x, align = {1: (box.left, "left"), 0: ((box.left + box.right) / 2, "center"), -1: (box.right, "right")}[label.side]
    look = {"transform": inches, "color": colour, "fontsize": LABEL_SIZE, "ha": align, "va": "center"}
    axes.text(x / 72, (box.bottom + box.top) / 144, text, **look).set_in_layout(False)
    if label.leader is not None:
        (x, y), (to_x, to_y) = label.leader
        line = Line2D([x / 72, to_x / 72], [y / 72, to_y / 72], transform=inches, color=colour, linewidth=0.6)
        line.set(alpha=0.6, zorder=1.5, in_layout=False)
        axes.add_artist(line)


def _compute_signed_root(x: Any) -> Any:
    """sign(x) * sqrt(|x|), the transform of an axis with square root scale."""
    return np.sign(x) * np.sqrt(np.abs(x))


def _choose_root_ticks(low: float, high: float) -> list[float]:
    """Ticks of a square root axis from low to high: 0, and those of ±1, 2, 5 times powers of ten that stand apart."""
    spacing = 0.075 * (_compute_signed_root(high) - _compute_signed_root(low))
    ticks: list[float] = []
    for tick in sorted((digit * 10.0**power for power in range(-4, 7) for digit in (1, 2, 5)), reverse=True):
        nearest = ticks[-1] if ticks else math.inf
        root = _compute_signed_root(tick)
        if tick <= high and _compute_signed_root(nearest) - root >= spacing and root >= spacing:
            ticks.append(tick)
    return [*(-tick for tick in ticks if -tick >= low), 0.0, *reversed(ticks)]
