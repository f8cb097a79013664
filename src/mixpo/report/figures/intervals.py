"""Means with their intervals by name: a forest plot, and groups side by side."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas

from mixpo.algorithms.intervals import Interval
from mixpo.report.document import Figure
from mixpo.report.figures.axes import add_legend_below, draw_error_bars, make_axes
from mixpo.report.figures.data import Point, exact_interval, make_y_point, split_heading, split_interval
from mixpo.report.figures.style import INK, STYLE, get_colour, get_marker, shorten_label, wrap_label
from mixpo.report.figures.svg import render_svg

FOREST_ROW, FOREST_LINE = 0.19, 0.13
"""Height of a name's row, and of every further line of the name, in inches."""


@rc_context(STYLE)
def plot_forest(panels: Mapping[str, Mapping[str, Interval]], *, name: str, reference: str | None = None) -> Figure:
    """A forest plot of intervals by panel and name: a row a name, and a dotted line at the mean of name `reference`."""
    names = list(dict.fromkeys(row for panel in panels.values() for row in panel))
    labels = [wrap_label(row) for row in names]
    ends = np.cumsum([FOREST_ROW + FOREST_LINE * label.count("\n") for label in labels])
    heights = ends - np.diff(ends, prepend=0.0) / 2
    total = float(ends[-1]) if names else FOREST_ROW
    canvas = Canvas(figsize=(3.2 + 0.6 * len(panels), total + 0.55), layout="constrained")
    all_axes = canvas.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for axes, (label, panel) in zip(all_axes, panels.items(), strict=False):
        rows_of_panel = [(row, height) for row, height in zip(names, heights, strict=True) if row in panel]
        points = [Point("", panel[row], exact_interval(height)) for row, height in rows_of_panel]
        draw_error_bars(axes, points, color=get_colour(0), marker="o", markersize=4.5, elinewidth=1.4, capsize=0)
        if reference is not None and reference in panel:
            axes.axvline(panel[reference].mean, color=INK, linewidth=0.8, linestyle=":", alpha=0.6)
        axes.set_xlabel(label)
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    all_axes[0].set_yticks(heights, labels)
    all_axes[0].set_ylim(total, 0.0)
    values = "; ".join(
        f"{label}: {', '.join(f'{row} {interval.mean:.2f}' for row, interval in panel.items())}"
        for label, panel in panels.items()
    )
    svg = render_svg(canvas, name, f"Means with their intervals. {values}")
    rows = [(row, *(cell for panel in panels.values() for cell in split_interval(panel.get(row)))) for row in names]
    return Figure(name, svg, ("name", *(text for label in panels for text in split_heading(label))), rows)


@rc_context(STYLE)
def plot_grouped_intervals(groups: Mapping[str, Sequence[Point]], *, name: str, ylabel: str) -> Figure:
    """A figure of means and intervals in y by the points' names, the groups side by side."""
    names = list(dict.fromkeys(point.name for points in groups.values() for point in points))
    canvas, axes = make_axes(4.2, 2.7, list(groups))
    artists = []
    for i, points in enumerate(groups.values()):
        offset = (i - (len(groups) - 1) / 2) * min(0.2, 0.7 / len(groups))
        moved = [make_y_point(names.index(point.name) + offset, point.y) for point in points]
        look = {"color": get_colour(i), "marker": get_marker(i), "capsize": 3, "markersize": 6}
        artists.append(draw_error_bars(axes, moved, **look))
    axes.set_xticks(range(len(names)), [shorten_label(label) for label in names])
    axes.set_xlim(-0.5, max(0, len(names) - 1) + 0.5)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(ylabel)
    add_legend_below(canvas, artists, list(groups))
    values = "; ".join(
        f"{group}: {', '.join(f'{point.name} {point.y.mean:.2f}' for point in points)}"
        for group, points in groups.items()
    )
    svg = render_svg(canvas, name, f"{ylabel}. {values}")
    rows = [(group, point.name, *split_interval(point.y)) for group, points in groups.items() for point in points]
    return Figure(name, svg, ("group", "name", *split_heading(ylabel)), rows)
